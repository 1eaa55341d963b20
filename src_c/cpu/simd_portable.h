/* Vectors of floats in portable C: four lanes, which every compiler maps to SSE2, NEON or scalars.
 *
 * What each simd_*.h provides is told here.
 *   RF_W        lanes of vf. Storage is handled in pairs of vectors, 2 * RF_W elements.
 *   RF_TB       tokens of a query-key block; RF_RB rows of queries in it (registers decide).
 *   RF_BLOCK_RB in blocks: rows that meet a panel, two vectors, at once; divides RF_BLOCK_ROWS.
 *   RF_MANY_NV  with many rows: vectors of rows that a block of tokens has at most; RF_MANY_FULL
 *               tokens of such a block, RF_MANY_TB of one with a single vector.
 *   rf_ld2_T    2 * RF_W elements of storage type T as two vectors, in their order; bfloat16 may
 *               have an order of its own (it splits into even and odd), the same for queries, keys
 *               and values, which rf_st2_bf16 undoes; rf_ld2_bf16n and rf_st2_bf16n keep the order.
 *               _part: only the first n, a multiple of 8, are touched in memory; the others are
 *               zero. 8-bit types: the code's own value, not scaled.
 *   rf_stream_line  64 bytes, past the caches; they are aligned where they go.
 *   rf_transpose  RF_W dwords of each of RF_W rows, ld dwords apart, as rows ldt apart.
 *   rf_reduce   the sums over the lanes of acc[row][token], times factor, to s[row * lds + token].
 */
#ifndef RF_SIMD_H
#define RF_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define RF_W  4
#define RF_RB 4
#define RF_TB 2

#define RF_BLOCK_RB  4
#define RF_MANY_NV   2
#define RF_MANY_FULL 4
#define RF_MANY_TB   4

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));

static inline vf vf_set1(float x) { return (vf){x, x, x, x}; }
static inline vf vf_zero(void) { return vf_set1(0.0f); }
static inline vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline float vf_first(vf v) { return v[0]; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
static inline vf vf_copysign(vf a, vf sign) {
    return (vf)(((vu)a & 0x7fffffffu) | ((vu)sign & 0x80000000u));
}
/* x where a < b, else y. */
static inline vf vf_if_less(vf a, vf b, vf x, vf y) { return vf_select(a < b, x, y); }
/* a, but 0 where it equals b. */
static inline vf vf_zero_if_equal(vf a, vf b) { return vf_select(a == b, vf_zero(), a); }
/* NaN in either operand gives b, as maxps does. */
static inline vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
static inline vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
/* The sum or maximum of the lanes of each of four vectors. */
static inline void vf_hsum4(const vf v[4], float out[4]) {
    for (int i = 0; i < 4; i++) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}
static inline void vf_hmax4(const vf v[4], float out[4]) {
    for (int i = 0; i < 4; i++) {
        float a = v[i][0] > v[i][1] ? v[i][0] : v[i][1], b = v[i][2] > v[i][3] ? v[i][2] : v[i][3];
        out[i] = a > b ? a : b;
    }
}

/* 2^x within 2e-7 relative for x <= 127; 0 below -126. 2^f by a polynomial that is exact at 0,
 * fitted for the least relative error (2e-9) on [-0.5, 0.5]. */
static inline vf vf_exp2(vf x) {
    vi under = x < vf_set1(-126.0f);
    vf t = vf_max(vf_set1(-126.0f), x);
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf r = t + magic;
    vf f = t - (r - magic);
    vf p = vf_set1(0x1.41fbbcp-13f);
    p = vf_fma(p, f, vf_set1(0x1.5f3e54p-10f));
    p = vf_fma(p, f, vf_set1(0x1.3b2d4cp-7f));
    p = vf_fma(p, f, vf_set1(0x1.c6aee8p-5f));
    p = vf_fma(p, f, vf_set1(0x1.ebfbdcp-3f));
    p = vf_fma(p, f, vf_set1(0x1.62e430p-1f));
    p = vf_fma(p, f, vf_set1(1.0f));
    vi e = (vi)r - (vi)magic;
    vf y = p * (vf)(vi)((e + 127) << 23);
    return vf_select(under, vf_zero(), y);
}

static inline void rf_stream_line(void *to, const void *from) {
#if defined(__SSE2__)
    const __m128i *const x = from;
    __m128i *const y = to;
    for (int i = 0; i < 4; i++) _mm_stream_si128(y + i, _mm_loadu_si128(x + i));
#else
    memcpy(to, from, 64);
#endif
}

static inline void rf_transpose(const void *from, int64_t ld, void *to, int64_t ldt) {
    const float *const row = from;
    float *const column = to;
    for (int i = 0; i < RF_W; i++)
        for (int j = 0; j < RF_W; j++) column[j * ldt + i] = row[i * ld + j];
}

static inline vu rf_words(const uint16_t *p) { return (vu){p[0], p[1], p[2], p[3]}; }
static inline vu rf_bytes4(const uint8_t *p) { return (vu){p[0], p[1], p[2], p[3]}; }

static inline void rf_ld2_f32(const float *p, vf *a, vf *b) {
    *a = vf_load(p);
    *b = vf_load(p + 4);
}
static inline void rf_ld2_bf16(const uint16_t *p, vf *a, vf *b) {
    *a = (vf)(rf_words(p) << 16);
    *b = (vf)(rf_words(p + 4) << 16);
}
/* Half to float: the exponent's offset is a multiplication, which also serves subnormals. */
static inline vf rf_half(vu h) {
    vu em = (h & 0x7fffu) << 13;
    vu inf = (vu)(em >= (0x7c00u << 13)) & 0x7f800000u;
    vf x = (vf)em * vf_set1(0x1p112f);
    return (vf)((vu)x | inf | ((h & 0x8000u) << 16));
}
static inline void rf_ld2_f16(const uint16_t *p, vf *a, vf *b) {
    *a = rf_half(rf_words(p));
    *b = rf_half(rf_words(p + 4));
}
/* A float8 in the place of a half has its exponent's offset wrong, by a factor: see RF_ONE. */
static inline vf rf_float8(vu x, vu nan) {
    vf y = rf_half((x & 0x7fu) << 7 | (x & 0x80u) << 8);
    return (vf)((vu)y | (nan & 0x7fc00000u));
}
static inline vf rf_e4m3fn(vu x) { return rf_float8(x, (vu)((x & 0x7fu) == 0x7fu)); }
static inline vf rf_e4m3fnuz(vu x) { return rf_float8(x, (vu)(x == 0x80u)); }
static inline void rf_ld2_e4m3fn(const uint8_t *p, vf *a, vf *b) {
    *a = rf_e4m3fn(rf_bytes4(p));
    *b = rf_e4m3fn(rf_bytes4(p + 4));
}
static inline void rf_ld2_e4m3fnuz(const uint8_t *p, vf *a, vf *b) {
    *a = rf_e4m3fnuz(rf_bytes4(p));
    *b = rf_e4m3fnuz(rf_bytes4(p + 4));
}
static inline void rf_ld2_i8(const uint8_t *p, vf *a, vf *b) {
    const int8_t *q = (const int8_t *)p;
    *a = (vf){q[0], q[1], q[2], q[3]};
    *b = (vf){q[4], q[5], q[6], q[7]};
}

static inline uint32_t rf_float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
static inline uint32_t rf_round_bf16(float x) {
    uint32_t u = rf_float_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (u >> 16) | 0x40u;
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
static inline uint32_t rf_round_f16(float x) {
    uint32_t u = rf_float_bits(x), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7e00u;
    if (u >= 0x477ff000u) return sign | 0x7c00u; /* 65520 and above round to infinity */
    if (u < 0x38800000u) {                       /* subnormal: let an addition round it */
        float y;
        memcpy(&y, &u, sizeof y);
        return sign | (rf_float_bits(y + 0.5f) - 0x3f000000u);
    }
    return sign | ((u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13);
}
static inline void rf_st2_f32(float *p, vf a, vf b) {
    vf_store(p, a);
    vf_store(p + 4, b);
}
static inline void rf_st2_bf16(uint16_t *p, vf a, vf b) {
    for (int i = 0; i < 4; i++) {
        p[i] = (uint16_t)rf_round_bf16(a[i]);
        p[i + 4] = (uint16_t)rf_round_bf16(b[i]);
    }
}
static inline void rf_st2_f16(uint16_t *p, vf a, vf b) {
    for (int i = 0; i < 4; i++) {
        p[i] = (uint16_t)rf_round_f16(a[i]);
        p[i + 4] = (uint16_t)rf_round_f16(b[i]);
    }
}
#define rf_ld2_bf16n rf_ld2_bf16
#define rf_st2_bf16n rf_st2_bf16

/* A pair is 8 elements and head_dim a multiple of 8: there is never a part of one. */
#define rf_ld2_part_f32(p, n, a, b)      rf_ld2_f32(p, a, b)
#define rf_ld2_part_f16(p, n, a, b)      rf_ld2_f16(p, a, b)
#define rf_ld2_part_bf16(p, n, a, b)     rf_ld2_bf16(p, a, b)
#define rf_ld2_part_bf16n(p, n, a, b)    rf_ld2_bf16(p, a, b)
#define rf_ld2_part_e4m3fn(p, n, a, b)   rf_ld2_e4m3fn(p, a, b)
#define rf_ld2_part_e4m3fnuz(p, n, a, b) rf_ld2_e4m3fnuz(p, a, b)
#define rf_ld2_part_i8(p, n, a, b)       rf_ld2_i8(p, a, b)
#define rf_st2_part_f32(p, n, a, b)      rf_st2_f32(p, a, b)
#define rf_st2_part_f16(p, n, a, b)      rf_st2_f16(p, a, b)
#define rf_st2_part_bf16(p, n, a, b)     rf_st2_bf16(p, a, b)
#define rf_st2_part_bf16n(p, n, a, b)    rf_st2_bf16(p, a, b)

static inline void rf_reduce(vf acc[RF_RB][RF_TB], int rb, vf factor, float *s, int64_t lds) {
    for (int r = 0; r < rb; r++)
        for (int t = 0; t < RF_TB; t++)
            s[r * lds + t] =
                ((acc[r][t][0] + acc[r][t][2]) + (acc[r][t][1] + acc[r][t][3])) * factor[0];
}

#endif
