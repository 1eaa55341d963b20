/* New tokens' keys and values into their slots of the pool, quantised where the pool has 8 bits.
 *
 * Each vector (token, head, key or value) belongs to RF_WRITE_LANES lanes, which take its chunks of
 * 8 elements in turn: loads and stores of 16 bytes, stores of 8 into a pool of 8 bits, neighbouring
 * vectors in neighbouring lanes. The scale of a token's vector needs the vector twice; the second
 * time it comes from the cache.
 * No LDS. The arithmetic that decides bits (division, rounding) is IEEE's, as the CPU's is. */
#include "element.h"

namespace rf {

struct Vector {
    int64_t token, slot, block;
    int head, offset, dim;
    bool value;
};

/* Which vector these lanes write; false where there is none. */
RF_DEVICE bool find_vector(const rf_write_launch &a, Vector &v) {
    const rf_write_params &p = a.p;
    int64_t index = ((int64_t)group_x() * RF_WAVES + wave()) * (WAVE / RF_WRITE_LANES) +
                    lane() / RF_WRITE_LANES;
    if (index >= a.num_vectors) return false;
    int64_t rows = index;
    v.value = false;
    if (p.v.data) rows = index / 2, v.value = index % 2 != 0;
    v.token = rf_quotient((uint32_t)rows, a.heads);
    v.head = (int)(rows - v.token * a.heads.value);
    v.dim = v.value ? p.v_head_dim : p.head_dim;
    v.slot = load<int64_t>(p.slot_mapping + v.token);
    if (v.slot < 0 || v.slot >= p.num_blocks * p.block_size) return false;
    if (v.slot >> 31) v.block = v.slot / p.block_size;
    else v.block = rf_quotient((uint32_t)v.slot, a.block_size);
    v.offset = (int)(v.slot - v.block * p.block_size);
    return true;
}

RF_DEVICE int64_t source_of(const rf_rows &rows, const Vector &v) {
    return v.token * rows.token_stride + v.head * rows.head_stride;
}
RF_DEVICE int64_t slot_of(const rf_paged &pool, const Vector &v) {
    return v.block * pool.block_stride + v.head * pool.head_stride + v.offset * pool.token_stride;
}

/* Same type on both sides: bytes. */
template <int SIZE> RF_DEVICE void copy_vector(const rf_write_launch &a) {
    Vector v{};
    if (!find_vector(a, v)) return;
    const rf_rows &rows = v.value ? a.p.value : a.p.key;
    const rf_paged &pool = v.value ? a.p.v : a.p.k;
    const char *from = static_cast<const char *>(rows.data) + source_of(rows, v) * SIZE;
    char *to = static_cast<char *>(pool.data) + slot_of(pool, v) * SIZE;
    for (int chunk = lane() % RF_WRITE_LANES; 8 * chunk < v.dim; chunk += RF_WRITE_LANES)
        store_chunk(to + 8 * SIZE * chunk, load_chunk<SIZE>(from + 8 * SIZE * chunk));
}

template <int DTYPE> RF_DEVICE void quantise_vector(const rf_write_launch &a) {
    constexpr float largest = DTYPE == RF_E4M3FN ? 448 : DTYPE == RF_E4M3FNUZ ? 240 : 127;
    Vector v{};
    bool there = find_vector(a, v);
    const rf_rows &rows = v.value ? a.p.value : a.p.key;
    const rf_paged &pool = v.value ? a.p.v : a.p.k;
    const rf_scales &scales = v.value ? a.p.v_scale : a.p.k_scale;
    int64_t from = there ? source_of(rows, v) : 0;
    int part = lane() % RF_WRITE_LANES, end = there ? v.dim : 0;
    float scale = scales.value;
    bool finite = true;
    if (a.p.k_scale.per_token || a.p.v_scale.per_token) { /* all lanes take part in the maximum */
        float top = 0;
        int read = scales.per_token ? end : 0;
        for (int chunk = part; 8 * chunk < read; chunk += RF_WRITE_LANES) {
            float x[8];
            load_wide(rows.data, from + 8 * chunk, a.p.dtype, x);
            RF_UNROLL
            for (int i = 0; i < 8; i++) {
                float y = bits_to_float(float_to_bits(x[i]) & 0x7fffffff);
                finite &= y < INF;
                top = larger(top, y);
            }
        }
        top = maximum<RF_WRITE_LANES>(finite ? top : INF);
        float least = bits_to_float(1u << 23), own = top / largest; /* 2^-126 */
        own = top == 0 ? 1.0f : own < least ? least : own;
        if (!(top < INF)) own = bits_to_float(0x7fc00000);
        if (scales.per_token) scale = own;
    }
    if (!there) return;
    if (scales.data) {
        float *at = scales.data + v.block * scales.block_stride + v.head * scales.head_stride +
                    v.offset * scales.token_stride;
        if (!scales.per_token) scale = load<float>(at);
        else if (part == 0) store(at, scale);
    }
    float inverse = 1.0f / scale;
    char *to = static_cast<char *>(pool.data) + slot_of(pool, v);
    for (int chunk = part; 8 * chunk < end; chunk += RF_WRITE_LANES) {
        float x[8];
        load_wide(rows.data, from + 8 * chunk, a.p.dtype, x);
        RF_UNROLL
        for (int i = 0; i < 8; i++) x[i] *= inverse;
        store_chunk(to + 8 * chunk, narrow_chunk<DTYPE>(x));
    }
}

} // namespace rf

RF_KERNEL(write_kv_f32, rf_write_launch) { rf::copy_vector<4>(p); }
RF_KERNEL(write_kv_f16, rf_write_launch) { rf::copy_vector<2>(p); }
RF_KERNEL(write_kv_bf16, rf_write_launch) { rf::copy_vector<2>(p); }
RF_KERNEL(write_kv_e4m3fn, rf_write_launch) { rf::quantise_vector<RF_E4M3FN>(p); }
RF_KERNEL(write_kv_e4m3fnuz, rf_write_launch) { rf::quantise_vector<RF_E4M3FNUZ>(p); }
RF_KERNEL(write_kv_i8, rf_write_launch) { rf::quantise_vector<RF_I8>(p); }
