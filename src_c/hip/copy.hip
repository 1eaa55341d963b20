/* Strided block copies: within pools (copy-on-write), from pools to dense memory (gather), back
 * (scatter); and changed entries of a block table.
 *
 * Workgroup (x, y, z): the x-th 16 bytes x threads of block y's copy in pool z. Where the pieces'
 * size or an address is not a multiple of 16, bytes go one at a time. No LDS. */
#include "element.h"

namespace rf {

template <class T>
RF_DEVICE void copy_unit(const rf_copy_params &pool, const char *from, char *to, int direction,
                         int64_t unit) {
    int64_t per_piece = pool.inner / (int64_t)sizeof(T);
    int64_t piece = unit / per_piece, at = (unit - piece * per_piece) * (int64_t)sizeof(T);
    int64_t outer = piece / pool.middle, middle = piece - outer * pool.middle;
    int64_t strided = outer * pool.outer_stride + middle * pool.middle_stride + at;
    int64_t packed = piece * pool.inner + at;
    store(to + (direction == RF_COPY_GATHER ? packed : strided),
          load<T>(from + (direction == RF_COPY_SCATTER ? packed : strided)));
}

RF_DEVICE bool whole(int64_t a) { return a % 16 == 0; }

RF_DEVICE void copy_block(const rf_copy_launch &p) {
    int copy = group_y(), direction = p.direction, per_copy = direction == RF_COPY_WITHIN ? 2 : 1;
    const rf_copy_params &pool = p.pools[group_z()];
    int64_t ids[2];
    for (int i = 0; i < per_copy; i++) {
        ids[i] = p.pairs ? load<int32_t>(p.pairs + per_copy * copy + i)
                         : p.inline_pairs[per_copy * copy + i];
        if (ids[i] < 0 || ids[i] >= p.num_blocks) return;
    }
    int64_t bytes = pool.outer * pool.middle * pool.inner;
    const char *from = pool.data + ids[0] * pool.block_stride;
    char *to = pool.data + ids[per_copy - 1] * pool.block_stride;
    if (direction == RF_COPY_GATHER) to = p.dense[group_z()] + copy * p.dense_stride;
    if (direction == RF_COPY_SCATTER) from = p.dense[group_z()] + copy * p.dense_stride;
    bool wide = whole((int64_t)from) && whole((int64_t)to) && whole(pool.inner) &&
                whole(pool.outer_stride) && whole(pool.middle_stride);
    int64_t thread = wave() * WAVE + lane(), threads = RF_WAVES * WAVE;
    int64_t first = group_x() * 16 * threads, end = first + 16 * threads;
    if (end > bytes) end = bytes;
    if (wide) {
        if (first + 16 * thread < end)
            copy_unit<Bytes16>(pool, from, to, direction, first / 16 + thread);
    } else {
        for (int64_t i = first + thread; i < end; i += threads)
            copy_unit<uint8_t>(pool, from, to, direction, i);
    }
}

RF_DEVICE void update_table(const rf_table_launch &p) {
    for (int i = wave() * WAVE + lane(); i < p.num_entries; i += RF_WAVES * WAVE) {
        int row = p.row[i], column = p.column[i];
        if (row >= 0 && row < p.rows && column >= 0 && column < p.columns)
            store(p.table + row * p.stride + column, p.value[i]);
    }
}

} // namespace rf

RF_KERNEL(copy_blocks, rf_copy_launch) { rf::copy_block(p); }
RF_KERNEL(table_delta, rf_table_launch) { rf::update_table(p); }
