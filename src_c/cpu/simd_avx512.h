/* Vectors of sixteen floats: AVX-512 F, BW, DQ, VL. The contract of each name is in
 * simd_portable.h. */
#ifndef RF_SIMD_H
#define RF_SIMD_H

#include <immintrin.h>
#include <stdint.h>

/* Without optimisation gcc's intrinsics are macros, and their own mask constants warn here. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"

#define RF_W  16
#define RF_RB 4 /* 16 accumulators, 8 keys, 2 queries of the 32 registers */
#define RF_TB 4

#define RF_BLOCK_RB  8 /* 16 accumulators, a panel's pair, a row */
#define RF_MANY_NV   4
#define RF_MANY_FULL 6  /* 24 accumulators, 4 queries, a key */
#define RF_MANY_TB   16 /* divides RF_MANY_TILE */

typedef __m512 vf;

static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline float vf_first(vf v) { return _mm512_cvtss_f32(v); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_zero_if_equal(vf a, vf b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ), a);
}
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_copysign(vf a, vf sign) {
    return _mm512_or_ps(vf_abs(a), _mm512_and_ps(vf_set1(-0.0f), sign));
}
static inline vf vf_if_less(vf a, vf b, vf x, vf y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}
static inline void vf_hsum4(const vf v[4], float out[4]) {
    vf x = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    vf y = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    x = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
static inline void vf_hmax4(const vf v[4], float out[4]) {
    vf x = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    vf y = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    x = _mm512_max_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    __m256 h = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

/* 2^floor(x) 2^f within 2e-7; exact where f is 0. */
static inline vf vf_exp2(vf x) {
    /* Below the normal range the result is 0 by a mask: computing it takes a slow path. */
    const __mmask16 normal = _mm512_cmp_ps_mask(x, vf_set1(-126.0f), _CMP_NLT_UQ);
    const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = vf_set1(0x1.e974fcp-10f);
    p = vf_fma(p, f, vf_set1(0x1.277854p-7f));
    p = vf_fma(p, f, vf_set1(0x1.c91ce6p-5f));
    p = vf_fma(p, f, vf_set1(0x1.ebdb56p-3f));
    p = vf_fma(p, f, vf_set1(0x1.62e4bap-1f));
    p = vf_fma(p, f, vf_set1(1.0f));
    return _mm512_maskz_scalef_ps(normal, p, x);
}

static inline void rf_stream_line(void *to, const void *from) {
    _mm512_stream_si512(to, _mm512_loadu_si512(from));
}

static inline void rf_transpose(const void *from, int64_t ld, void *to, int64_t ldt) {
    const uint32_t *const row = from;
    uint32_t *const column = to;
    __m512i x[16], y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(row + i * ld);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* x[i + j]: of rows i .. i + 3, columns j, j + 4, ... */
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88); /* columns j, j + 8 */
        __m512i b = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd); /* j + 4, j + 12 */
        __m512i c = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
        _mm512_storeu_si512(column + j * ldt, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512(column + (j + 4) * ldt, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_storeu_si512(column + (j + 8) * ldt, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_storeu_si512(column + (j + 12) * ldt, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}
static inline __mmask32 rf_lanes(int n) { return (__mmask32)((1u << n) - 1u); }

static inline void rf_ld2_f32(const float *p, vf *a, vf *b) {
    *a = vf_load(p);
    *b = vf_load(p + 16);
}
static inline void rf_ld2_part_f32(const float *p, int n, vf *a, vf *b) {
    *a = _mm512_maskz_loadu_ps((__mmask16)rf_lanes(n), p);
    *b = _mm512_maskz_loadu_ps((__mmask16)(rf_lanes(n) >> 16), p + 16);
}
static inline void rf_st2_f32(float *p, vf a, vf b) {
    vf_store(p, a);
    vf_store(p + 16, b);
}
static inline void rf_st2_part_f32(float *p, int n, vf a, vf b) {
    _mm512_mask_storeu_ps(p, (__mmask16)rf_lanes(n), a);
    _mm512_mask_storeu_ps(p + 16, (__mmask16)(rf_lanes(n) >> 16), b);
}

static inline void rf_split_f16(__m512i x, vf *a, vf *b) {
    *a = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
    *b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
}
static inline void rf_ld2_f16(const uint16_t *p, vf *a, vf *b) {
    *a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    *b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + 16)));
}
static inline void rf_ld2_part_f16(const uint16_t *p, int n, vf *a, vf *b) {
    rf_split_f16(_mm512_maskz_loadu_epi16(rf_lanes(n), p), a, b);
}
static inline __m512i rf_join_f16(vf a, vf b) {
    __m256i lo = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i hi = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}
static inline void rf_st2_f16(uint16_t *p, vf a, vf b) {
    _mm512_storeu_si512(p, rf_join_f16(a, b));
}
static inline void rf_st2_part_f16(uint16_t *p, int n, vf a, vf b) {
    _mm512_mask_storeu_epi16(p, rf_lanes(n), rf_join_f16(a, b));
}

/* One load and one operation a vector: even elements are shifted up, odd ones masked. Widening
 * (vpmovzxwd and a shift) costs twice that, half of it on the one shuffle port. */
static inline void rf_split_bf16(__m512i x, vf *even, vf *odd) {
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u)));
}
static inline void rf_ld2_bf16(const uint16_t *p, vf *a, vf *b) {
    rf_split_bf16(_mm512_loadu_si512(p), a, b);
}
static inline void rf_ld2_part_bf16(const uint16_t *p, int n, vf *a, vf *b) {
    rf_split_bf16(_mm512_maskz_loadu_epi16(rf_lanes(n), p), a, b);
}
/* Rounds to nearest even into the upper half of each lane; NaN stays NaN. */
static inline __m512i rf_round_bf16(vf v) {
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(r, is_nan, u, _mm512_set1_epi32(0x400000));
}
static inline __m512i rf_join_bf16(vf even, vf odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rf_round_bf16(even), 16),
                                   rf_round_bf16(odd));
}
static inline void rf_st2_bf16(uint16_t *p, vf a, vf b) {
    _mm512_storeu_si512(p, rf_join_bf16(a, b));
}
static inline void rf_st2_part_bf16(uint16_t *p, int n, vf a, vf b) {
    _mm512_mask_storeu_epi16(p, rf_lanes(n), rf_join_bf16(a, b));
}

static inline void rf_ld2_bf16n(const uint16_t *p, vf *a, vf *b) {
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + 16)));
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *b = _mm512_castsi512_ps(_mm512_slli_epi32(y, 16));
}
static inline void rf_ld2_part_bf16n(const uint16_t *p, int n, vf *a, vf *b) {
    __m512i x = _mm512_maskz_loadu_epi16(rf_lanes(n), p);
    __m512i y = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1));
    x = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x));
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *b = _mm512_castsi512_ps(_mm512_slli_epi32(y, 16));
}
static inline __m512i rf_join_bf16n(vf a, vf b) {
    __m256i lo = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rf_round_bf16(a), 16));
    __m256i hi = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rf_round_bf16(b), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}
static inline void rf_st2_bf16n(uint16_t *p, vf a, vf b) {
    _mm512_storeu_si512(p, rf_join_bf16n(a, b));
}
static inline void rf_st2_part_bf16n(uint16_t *p, int n, vf a, vf b) {
    _mm512_mask_storeu_epi16(p, rf_lanes(n), rf_join_bf16n(a, b));
}

/* A float8 in the place of a half has its exponent's offset wrong, by a factor: see RF_ONE. */
static inline void rf_float8(__m256i x, __mmask32 nan, vf *a, vf *b) {
    __m512i h = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(x), 7),
                                 _mm512_set1_epi16((short)0xbf80));
    rf_split_f16(_mm512_mask_mov_epi16(h, nan, _mm512_set1_epi16(0x7e00)), a, b);
}
static inline void rf_e4m3fn(__m256i x, vf *a, vf *b) {
    const __m256i most = _mm256_set1_epi8(0x7f);
    rf_float8(x, _mm256_cmpeq_epi8_mask(_mm256_and_si256(x, most), most), a, b);
}
static inline void rf_e4m3fnuz(__m256i x, vf *a, vf *b) {
    rf_float8(x, _mm256_cmpeq_epi8_mask(x, _mm256_set1_epi8((char)0x80)), a, b);
}
static inline void rf_i8(__m256i x, vf *a, vf *b) {
    *a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
    *b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
}
static inline __m256i rf_load256(const uint8_t *p) {
    return _mm256_loadu_si256((const __m256i *)p);
}
static inline __m256i rf_part256(const uint8_t *p, int n) {
    return _mm256_maskz_loadu_epi8(rf_lanes(n), p);
}
static inline void rf_ld2_e4m3fn(const uint8_t *p, vf *a, vf *b) { rf_e4m3fn(rf_load256(p), a, b); }
static inline void rf_ld2_e4m3fnuz(const uint8_t *p, vf *a, vf *b) {
    rf_e4m3fnuz(rf_load256(p), a, b);
}
/* Two loads, so that nothing is shuffled but by the conversion. */
static inline void rf_ld2_i8(const uint8_t *p, vf *a, vf *b) {
    *a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
    *b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16))));
}
static inline void rf_ld2_part_e4m3fn(const uint8_t *p, int n, vf *a, vf *b) {
    rf_e4m3fn(rf_part256(p, n), a, b);
}
static inline void rf_ld2_part_e4m3fnuz(const uint8_t *p, int n, vf *a, vf *b) {
    rf_e4m3fnuz(rf_part256(p, n), a, b);
}
static inline void rf_ld2_part_i8(const uint8_t *p, int n, vf *a, vf *b) {
    rf_i8(rf_part256(p, n), a, b);
}

/* Four tokens of one row: within each 128-bit lane, [t0 t1 t2 t3]. */
static inline vf rf_reduce_row(const vf a[RF_TB]) {
    vf s0 = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    vf s1 = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    __m512d d0 = _mm512_castps_pd(s0), d1 = _mm512_castps_pd(s1);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(d0, d1)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(d0, d1)));
}
static inline void rf_reduce(vf acc[RF_RB][RF_TB], int rb, vf factor, float *s, int64_t lds) {
    if (rb == 4) {
        vf r0 = rf_reduce_row(acc[0]), r1 = rf_reduce_row(acc[1]);
        vf r2 = rf_reduce_row(acc[2]), r3 = rf_reduce_row(acc[3]);
        vf r01 =
            _mm512_add_ps(_mm512_shuffle_f32x4(r0, r1, 0x44), _mm512_shuffle_f32x4(r0, r1, 0xee));
        vf r23 =
            _mm512_add_ps(_mm512_shuffle_f32x4(r2, r3, 0x44), _mm512_shuffle_f32x4(r2, r3, 0xee));
        vf r = _mm512_add_ps(_mm512_shuffle_f32x4(r01, r23, 0x88),
                             _mm512_shuffle_f32x4(r01, r23, 0xdd));
        r = _mm512_mul_ps(r, factor);
        _mm_storeu_ps(s, _mm512_castps512_ps128(r));
        _mm_storeu_ps(s + lds, _mm512_extractf32x4_ps(r, 1));
        _mm_storeu_ps(s + 2 * lds, _mm512_extractf32x4_ps(r, 2));
        _mm_storeu_ps(s + 3 * lds, _mm512_extractf32x4_ps(r, 3));
        return;
    }
    for (int r = 0; r < rb; r++) {
        vf v = rf_reduce_row(acc[r]);
        __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        _mm_storeu_ps(s + r * lds, _mm_mul_ps(x, _mm512_castps512_ps128(factor)));
    }
}

#pragma GCC diagnostic pop

#endif
