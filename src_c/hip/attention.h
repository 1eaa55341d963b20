/* What all attention kernels share: which rows and which tokens a workgroup has, what a row sees,
 * and how its result leaves. */
#ifndef RF_HIP_ATTENTION_H
#define RF_HIP_ATTENTION_H

#include "element.h"

namespace rf {

/* Where a workgroup's tile is. Uniform. */
struct Tile {
    int seq, kv_head, row0, rows; /* rows of the sequence, from row0 */
    int64_t token0;               /* the sequence's first query token */
    int q_len, kv_len, num_rows;  /* num_rows: of the whole sequence */
    const int32_t *blocks;
};

/* Context tokens low .. high - 1 that a row may see, before the mask. */
struct Range {
    int low, high;
};

RF_DEVICE Range visible(const rf_attention_params &p, const Tile &tile, int row, int group) {
    int position = tile.kv_len - tile.q_len + row / group;
    int high = tile.kv_len, low = 0;
    if (p.causal) high = smaller(high, position + 1);
    if (p.window_right >= 0)
        high = (int64_t)position + p.window_right + 1 < high ? position + p.window_right + 1 : high;
    if (p.window_left < position && p.window_left >= 0) low = position - p.window_left;
    return {low, larger(high, low)};
}

/* Which tokens the rows of a tile see, and the part of them that is split number `split`. */
struct Share {
    int begin, end, splits;
};
RF_DEVICE Share share_of(const rf_attention_launch &a, const Tile &tile, int split) {
    int group = (int)a.group.value;
    int low = visible(a.p, tile, tile.row0, group).low;
    int high = visible(a.p, tile, tile.row0 + tile.rows - 1, group).high;
    int n = larger(0, high - low);
    int splits = tile.num_rows <= a.split_rows ? rf_splits(n, a.part_tokens, a.max_splits) : 1;
    int size = rf_split_size(n, splits);
    int begin = low + smaller(n, split * size);
    return {begin, smaller(begin + size, low + n), splits};
}

RF_DEVICE void find_sequence(const rf_attention_launch &a, int seq, Tile &tile) {
    const rf_attention_params &p = a.p;
    int64_t first = seq, last = seq + 1;
    if (p.cu_seqlens_q) {
        first = load<int32_t>(p.cu_seqlens_q + seq);
        last = load<int32_t>(p.cu_seqlens_q + seq + 1);
        if (first < 0 || last > p.num_tokens || last < first) first = last = 0;
    }
    int64_t row = p.rows ? load<int32_t>(p.rows + seq) : seq;
    int64_t capacity = p.table_width * p.block_size;
    int64_t length = load<int32_t>(p.seq_lens + seq);
    if (row < 0 || row >= p.num_rows || length < 0) row = 0, length = 0;
    if (length > capacity) length = capacity;
    tile.seq = seq;
    tile.token0 = first;
    tile.q_len = (int)(last - first);
    tile.kv_len = (int)length;
    tile.num_rows = tile.q_len * (int)a.group.value;
    tile.blocks = p.block_table + row * p.table_stride;
}

/* Sequence i has the tiles from rows / TILE + i on, rows being those of the sequences before it: at
 * least as many as it needs, and the host can bound the grid without knowing any length. */
template <int TILE> RF_DEVICE int64_t first_tile(const rf_attention_params &p, int seq, int group) {
    int64_t token = p.cu_seqlens_q ? load<int32_t>(p.cu_seqlens_q + seq) : seq;
    return token * group / TILE + seq;
}

/* False: the sequence has fewer. */
template <int TILE> RF_DEVICE bool find_tile(const rf_attention_launch &a, Tile &tile) {
    const rf_attention_params &p = a.p;
    int index = (int)rf_quotient((uint32_t)group_x(), a.heads);
    int group = (int)a.group.value, low = 0, first = 0;
    tile.kv_head = group_x() - index * p.num_kv_heads;
    if (!a.one_tile) {
        int high = p.num_seqs;
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (first_tile<TILE>(p, middle, group) <= index) low = middle;
            else high = middle;
        }
        first = (int)first_tile<TILE>(p, low, group);
    } else {
        low = first = index;
    }
    find_sequence(a, low, tile);
    tile.row0 = (index - first) * TILE;
    tile.rows = smaller(TILE, tile.num_rows - tile.row0);
    return index >= first && tile.rows > 0;
}

RF_DEVICE float scale_at(const rf_scales &s, int64_t block, int head, int offset) {
    if (!s.data) return s.value;
    return load<float>(s.data + block * s.block_stride + head * s.head_stride +
                       offset * s.token_stride);
}

/* Whether each token has a scale of its own; else the head has one. */
RF_DEVICE bool of_tokens(const rf_scales &s) {
    return s.data && (s.block_stride | s.token_stride) != 0;
}
RF_DEVICE float of_head(const rf_scales &s, int head) {
    return of_tokens(s) ? 1.0f : scale_at(s, 0, head, 0);
}

/* A row of the query for 8-bit caches, of which these lanes have eight elements of each chunk: to
 * float16 in the order of widen_bytes. A row of bfloat16 is multiplied by a power of two that
 * brings its largest element near to float16's, so that only what is 2^29 times smaller than that
 * loses digits. What undoes it is returned. */
template <int CHUNKS, int TO, int FROM = 1>
RF_DEVICE float narrow_query(int dtype, unsigned (*q)[4]) {
    float undo = 1;
    if (dtype == RF_BF16) {
        int top = 0; /* exponent of the largest */
        RF_UNROLL
        for (int c = 0; c < CHUNKS; c++) RF_UNROLL
        for (int i = 0; i < 8; i++) {
            int e = (int)(q[c][i / 2] >> (i % 2 ? 23 : 7) & 0xff);
            top = e == 255 ? top : larger(e, top);
        }
        int up = smaller(127 + 14 - (int)maximum<TO, FROM>((float)top), 120);
        float scale = bits_to_float((unsigned)(127 + up) << 23);
        undo = bits_to_float((unsigned)(127 - up) << 23);
        RF_UNROLL
        for (int c = 0; c < CHUNKS; c++) RF_UNROLL
        for (int i = 0; i < 4; i++)
            q[c][i] = float_to_half(bits_to_float(q[c][i] << 16) * scale) |
                      float_to_half(bits_to_float(q[c][i] & 0xffff0000) * scale) << 16;
    }
    RF_UNROLL
    for (int c = 0; c < CHUNKS; c++) RF_UNROLL
    for (int i = 0; i < 4; i += 2) {
        unsigned x = q[c][i], y = q[c][i + 1];
        q[c][i] = halves<false>(x, y), q[c][i + 1] = halves<true>(x, y);
    }
    return undo;
}

/* tanh without a library: 1 - 2 / (exp(2x) + 1) loses digits near 0, where its series is used. */
RF_DEVICE float tanh(float x) {
    float y = x < 0 ? -x : x, z = x * x;
    if (y < 0.25f)
        return x *
               (1 + z * (-1.0f / 3 + z * (2.0f / 15 + z * (-17.0f / 315 + z * (62.0f / 2835)))));
    float t = 1 - 2 / (exp2(2 * LOG2E * y) + 1);
    return x < 0 ? -t : t;
}

/* Eight sums of a row, its maximum and its sum: to the output, sinks included. */
RF_DEVICE void finish(const rf_attention_params &p, int64_t token, int head, int chunk,
                      const float *sums, float m, float l) {
    float factor = 1, out[8];
    if (p.sinks) {
        float sink = load<float>(p.sinks + head) * LOG2E, top = larger(m, sink);
        float base = top == -INF ? 0.0f : top;
        factor = exp2(m - base);
        l = l * factor + exp2(sink - base);
        m = top;
    }
    float inverse = l == 0 ? 0.0f : factor / l;
    RF_UNROLL
    for (int i = 0; i < 8; i++) out[i] = sums[i] * inverse;
    store_wide(p.out.data, token * p.out.token_stride + head * p.out.head_stride + 8 * chunk,
               p.dtype, out);
    if (p.lse && chunk == 0)
        store(p.lse + token * p.num_heads + head, l == 0 ? -INF : (m + log2(l)) * LN2);
}

/* The state of a row after all tokens of a split. */
RF_DEVICE void leave(const rf_attention_launch &a, const Tile &tile, int splits, int split, int row,
                     int chunk, const float *sums, float m, float l) {
    const rf_attention_params &p = a.p;
    int group = (int)a.group.value;
    if (splits == 1) {
        int token = (int)rf_quotient((uint32_t)row, a.group);
        finish(p, tile.token0 + token, tile.kv_head * group + row - token * group, chunk, sums, m,
               l);
        return;
    }
    int64_t index =
        (((int64_t)tile.seq * a.split_rows + row) * p.num_kv_heads + tile.kv_head) * a.max_splits +
        split;
    float *to = a.partial + index * p.v_head_dim + 8 * chunk;
    store_chunk(to, narrow_chunk<RF_F32>(sums));
    if (chunk == 0) {
        store(a.partial_state + 2 * index, m);
        store(a.partial_state + 2 * index + 1, l);
    }
}

/* A row's splits to its output, by a wave. */
RF_DEVICE void merge_splits(const rf_attention_launch &a, const Tile &tile, int splits, int row) {
    const rf_attention_params &p = a.p;
    int64_t index =
        (((int64_t)tile.seq * a.split_rows + row) * p.num_kv_heads + tile.kv_head) * a.max_splits;
    float top = -INF, total = 0;
    for (int i = 0; i < splits; i++)
        top = larger(top, load<float>(a.partial_state + 2 * (index + i)));
    float base = top == -INF ? 0.0f : top;
    for (int i = 0; i < splits; i++)
        total += load<float>(a.partial_state + 2 * (index + i) + 1) *
                 exp2(load<float>(a.partial_state + 2 * (index + i)) - base);
    int group = (int)a.group.value, token = (int)rf_quotient((uint32_t)row, a.group);
    for (int chunk = lane(); 8 * chunk < p.v_head_dim; chunk += WAVE) {
        float out[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int i = 0; i < splits; i++) {
            float m = load<float>(a.partial_state + 2 * (index + i)), x[8];
            if (m == -INF) continue;
            widen<RF_F32>(load_chunk<4>(a.partial + (index + i) * p.v_head_dim + 8 * chunk), x);
            RF_UNROLL
            for (int j = 0; j < 8; j++) out[j] += x[j] * exp2(m - base);
        }
        finish(p, tile.token0 + token, tile.kv_head * group + row - token * group, chunk, out, top,
               total);
    }
}

/* The end of a workgroup whose tile has several splits. Where the launch has arrivals, the last of
 * the tile's workgroups to get here merges what all have left, in the order of reduce: who it is
 * changes no bit. All lanes get here, and nobody needs the LDS any more. The tile is found again,
 * as registers that kept it for so long would be spilled. */
template <int TILE>
RF_DEVICE void merge_if_last(const rf_attention_launch &a, int splits, uint32_t &lds) {
    if (!a.arrivals || splits == 1) return;
    uint32_t *arrivals = a.arrivals + group_x();
    release();
    barrier();
    if (thread() == 0) lds = fetch_add(arrivals, 1);
    barrier();
    if ((int)lds != splits - 1) return;
    acquire();
    if (thread() == 0) store(arrivals, 0u);
    Tile tile;
    find_tile<TILE>(a, tile);
    for (int row = tile.row0 + wave(); row < tile.row0 + tile.rows; row += RF_WAVES)
        merge_splits(a, tile, splits, row);
}

/* The same by a second kernel: grid x sequence, y key/value head, z four rows, one a wave. */
RF_DEVICE void reduce(const rf_attention_launch &a, int tile_rows) {
    int row = group_z() * RF_WAVES + wave();
    Tile tile;
    find_sequence(a, group_x(), tile);
    tile.kv_head = group_y();
    if (row >= tile.num_rows || tile.num_rows > a.split_rows) return;
    tile.row0 = row / tile_rows * tile_rows;
    tile.rows = smaller(tile_rows, tile.num_rows - tile.row0);
    int splits = share_of(a, tile, 0).splits;
    if (splits > 1) merge_splits(a, tile, splits, row); /* else it is written already */
}

template <class Kernel> RF_DEVICE void attend(const rf_attention_launch &p) {
    RF_SHARED(typename Kernel::Shared, lds);
    Kernel{p}(lds);
}

} // namespace rf

#endif
