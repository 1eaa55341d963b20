/* Vectors of eight floats: AVX2, FMA, F16C. The contract of each name is in simd_portable.h. */
#ifndef RF_SIMD_H
#define RF_SIMD_H

#include <immintrin.h>
#include <stdint.h>

#define RF_W  8
#define RF_RB 4 /* 8 accumulators, 4 keys, 2 queries of the 16 registers */
#define RF_TB 2

#define RF_BLOCK_RB  4 /* 8 accumulators, a panel's pair, a row */
#define RF_MANY_NV   2
#define RF_MANY_FULL 6 /* 12 accumulators, 2 queries, a key */
#define RF_MANY_TB   8

typedef __m256 vf;

static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_zero(void) { return _mm256_setzero_ps(); }
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
static inline float vf_first(vf v) { return _mm256_cvtss_f32(v); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_zero_if_equal(vf a, vf b) {
    return _mm256_andnot_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ), a);
}
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(vf_set1(-0.0f), a); }
static inline vf vf_copysign(vf a, vf sign) {
    return _mm256_or_ps(vf_abs(a), _mm256_and_ps(vf_set1(-0.0f), sign));
}
static inline vf vf_if_less(vf a, vf b, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline void vf_hsum4(const vf v[4], float out[4]) {
    vf x = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    vf y = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    x = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline void vf_hmax4(const vf v[4], float out[4]) {
    vf x = _mm256_max_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    vf y = _mm256_max_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    x = _mm256_max_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

static inline vf vf_exp2(vf x) {
    vf keep = _mm256_cmp_ps(x, vf_set1(-126.0f), _CMP_NLT_UQ);
    vf t = _mm256_max_ps(vf_set1(-126.0f), x);
    vf n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = _mm256_sub_ps(t, n);
    vf p = vf_set1(0x1.41fbbcp-13f);
    p = vf_fma(p, f, vf_set1(0x1.5f3e54p-10f));
    p = vf_fma(p, f, vf_set1(0x1.3b2d4cp-7f));
    p = vf_fma(p, f, vf_set1(0x1.c6aee8p-5f));
    p = vf_fma(p, f, vf_set1(0x1.ebfbdcp-3f));
    p = vf_fma(p, f, vf_set1(0x1.62e430p-1f));
    p = vf_fma(p, f, vf_set1(1.0f));
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    vf y = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
    return _mm256_and_ps(y, keep);
}

static inline void rf_stream_line(void *to, const void *from) {
    const __m256i *const x = from;
    __m256i *const y = to;
    for (int i = 0; i < 2; i++) _mm256_stream_si256(y + i, _mm256_loadu_si256(x + i));
}

static inline void rf_transpose(const void *from, int64_t ld, void *to, int64_t ldt) {
    const float *const row = from;
    float *const column = to;
    __m256 x[8], y[8];
    for (int i = 0; i < 4; i++) { /* rows i and i + 4: their columns 0 .. 3, and 4 .. 7 */
        const __m256 a = vf_load(row + i * ld), b = vf_load(row + (i + 4) * ld);
        x[i] = _mm256_permute2f128_ps(a, b, 0x20);
        x[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            y[i + j] = _mm256_unpacklo_ps(x[i + j], x[i + j + 2]);
            y[i + j + 2] = _mm256_unpackhi_ps(x[i + j], x[i + j + 2]);
        }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 4; j += 2) {
            vf_store(column + (i + j) * ldt, _mm256_unpacklo_ps(y[i + j], y[i + j + 1]));
            vf_store(column + (i + j + 1) * ldt, _mm256_unpackhi_ps(y[i + j], y[i + j + 1]));
        }
}

static inline void rf_ld2_f32(const float *p, vf *a, vf *b) {
    *a = vf_load(p);
    *b = vf_load(p + 8);
}
static inline void rf_ld2_part_f32(const float *p, int n, vf *a, vf *b) {
    (void)n; /* a part of 16 that is a multiple of 8 is 8 */
    *a = vf_load(p);
    *b = vf_zero();
}
static inline void rf_st2_f32(float *p, vf a, vf b) {
    vf_store(p, a);
    vf_store(p + 8, b);
}
static inline void rf_st2_part_f32(float *p, int n, vf a, vf b) {
    (void)n, (void)b;
    vf_store(p, a);
}

static inline __m128i rf_load128(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
static inline void rf_store128(void *p, __m128i v) { _mm_storeu_si128((__m128i *)p, v); }

static inline void rf_ld2_f16(const uint16_t *p, vf *a, vf *b) {
    *a = _mm256_cvtph_ps(rf_load128(p));
    *b = _mm256_cvtph_ps(rf_load128(p + 8));
}
static inline void rf_ld2_part_f16(const uint16_t *p, int n, vf *a, vf *b) {
    (void)n;
    *a = _mm256_cvtph_ps(rf_load128(p));
    *b = vf_zero();
}
static inline __m128i rf_to_half(vf v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline void rf_st2_f16(uint16_t *p, vf a, vf b) {
    rf_store128(p, rf_to_half(a));
    rf_store128(p + 8, rf_to_half(b));
}
static inline void rf_st2_part_f16(uint16_t *p, int n, vf a, vf b) {
    (void)n, (void)b;
    rf_store128(p, rf_to_half(a));
}

/* One load and one operation a vector: even elements are shifted up, odd ones masked. */
static inline void rf_split_bf16(__m256i x, vf *even, vf *odd) {
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000u)));
}
static inline void rf_ld2_bf16(const uint16_t *p, vf *a, vf *b) {
    rf_split_bf16(_mm256_loadu_si256((const __m256i *)p), a, b);
}
static inline void rf_ld2_part_bf16(const uint16_t *p, int n, vf *a, vf *b) {
    (void)n;
    rf_split_bf16(_mm256_zextsi128_si256(rf_load128(p)), a, b);
}
/* Rounds to nearest even into the upper half of each lane; NaN stays NaN. */
static inline __m256i rf_round_bf16(vf v) {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, nan, is_nan);
}
static inline __m256i rf_join_bf16(vf even, vf odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rf_round_bf16(even), 16), rf_round_bf16(odd), 0xaa);
}
static inline void rf_st2_bf16(uint16_t *p, vf a, vf b) {
    _mm256_storeu_si256((__m256i *)p, rf_join_bf16(a, b));
}
static inline void rf_st2_part_bf16(uint16_t *p, int n, vf a, vf b) {
    (void)n;
    rf_store128(p, _mm256_castsi256_si128(rf_join_bf16(a, b)));
}

static inline void rf_ld2_bf16n(const uint16_t *p, vf *a, vf *b) {
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(rf_load128(p)), 16));
    *b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(rf_load128(p + 8)), 16));
}
static inline void rf_ld2_part_bf16n(const uint16_t *p, int n, vf *a, vf *b) {
    (void)n;
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(rf_load128(p)), 16));
    *b = vf_zero();
}
static inline __m128i rf_to_bf16(vf v) {
    __m256i r = _mm256_srli_epi32(rf_round_bf16(v), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
static inline void rf_st2_bf16n(uint16_t *p, vf a, vf b) {
    rf_store128(p, rf_to_bf16(a));
    rf_store128(p + 8, rf_to_bf16(b));
}
static inline void rf_st2_part_bf16n(uint16_t *p, int n, vf a, vf b) {
    (void)n, (void)b;
    rf_store128(p, rf_to_bf16(a));
}

/* A float8 in the place of a half has its exponent's offset wrong, by a factor: see RF_ONE. x:
 * words, with the sign in all of the upper byte. */
static inline void rf_float8(__m256i x, __m256i nan, vf *a, vf *b) {
    __m256i h = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16((short)0xbf80));
    h = _mm256_or_si256(h, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
    *a = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
    *b = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
}
static inline void rf_e4m3fn(__m128i x, vf *a, vf *b) {
    __m256i w = _mm256_cvtepi8_epi16(x), most = _mm256_set1_epi16(0x7f);
    rf_float8(w, _mm256_cmpeq_epi16(_mm256_and_si256(w, most), most), a, b);
}
static inline void rf_e4m3fnuz(__m128i x, vf *a, vf *b) {
    __m256i w = _mm256_cvtepi8_epi16(x);
    rf_float8(w, _mm256_cmpeq_epi16(w, _mm256_set1_epi16((short)0xff80)), a, b);
}
static inline void rf_i8(__m128i x, vf *a, vf *b) {
    *a = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
    *b = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
static inline __m128i rf_load64(const void *p) { return _mm_loadl_epi64((const __m128i *)p); }
static inline void rf_ld2_e4m3fn(const uint8_t *p, vf *a, vf *b) { rf_e4m3fn(rf_load128(p), a, b); }
static inline void rf_ld2_e4m3fnuz(const uint8_t *p, vf *a, vf *b) {
    rf_e4m3fnuz(rf_load128(p), a, b);
}
static inline void rf_ld2_i8(const uint8_t *p, vf *a, vf *b) { rf_i8(rf_load128(p), a, b); }
static inline void rf_ld2_part_e4m3fn(const uint8_t *p, int n, vf *a, vf *b) {
    (void)n;
    rf_e4m3fn(rf_load64(p), a, b);
}
static inline void rf_ld2_part_e4m3fnuz(const uint8_t *p, int n, vf *a, vf *b) {
    (void)n;
    rf_e4m3fnuz(rf_load64(p), a, b);
}
static inline void rf_ld2_part_i8(const uint8_t *p, int n, vf *a, vf *b) {
    (void)n;
    rf_i8(rf_load64(p), a, b);
}

static inline void rf_reduce(vf acc[RF_RB][RF_TB], int rb, vf factor, float *s, int64_t lds) {
    for (int r = 0; r < rb; r++) {
        vf h = _mm256_hadd_ps(acc[r][0], acc[r][1]);
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        x = _mm_mul_ps(_mm_add_ps(x, _mm_movehdup_ps(x)), _mm256_castps256_ps128(factor));
        s[r * lds] = _mm_cvtss_f32(x);
        s[r * lds + 1] = _mm_cvtss_f32(_mm_movehl_ps(x, x));
    }
}

#endif
