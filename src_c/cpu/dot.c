/* The products of attention by dot products of bfloat16 pairs: AVX512-BF16, for a bfloat16 query
 * over a bfloat16 or 8-bit cache.
 *
 * An instruction adds two products to each of sixteen sums, twice the arithmetic of float32 for
 * half the loads. Queries stay bfloat16, and 8-bit elements become it exactly (by table look-up,
 * which needs VBMI). Probabilities are rounded to bfloat16 for the value product. */
#include "simd_avx512.h"

#include "phase.h"

static inline vf vf_dot(vf acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

/* The bfloat16 of an 8-bit code without its sign bit: tables of the upper and the lower byte. */
typedef struct rf_table {
    __m512i hi[2], lo[2];
} rf_table;

#define RF_8(f, i)  f(i), f(i + 1), f(i + 2), f(i + 3), f(i + 4), f(i + 5), f(i + 6), f(i + 7)
#define RF_32(f, i) RF_8(f, i), RF_8(f, i + 8), RF_8(f, i + 16), RF_8(f, i + 24)
#define RF_128(f)   RF_32(f, 0), RF_32(f, 32), RF_32(f, 64), RF_32(f, 96)
#define RF_HI(x)    (uint8_t)((x) >> 8)
#define RF_LO(x)    (uint8_t)((x) & 255)
/* A float8 code: three bits of mantissa; below the first power of two in steps of 2^-(6 + bias -
 * 4). `one` is the code of bfloat16's exponent that stands for exponent field 0. */
#define RF_FLOAT8(i, zero)                                                                         \
    ((i) >= 8   ? ((((i) >> 3) + zero) << 7 | ((i) & 7) << 4)                                      \
     : (i) >= 4 ? ((zero) << 7 | ((i) & 3) << 5)                                                   \
     : (i) >= 2 ? ((zero - 1) << 7 | ((i) & 1) << 6)                                               \
     : (i) == 1 ? (zero - 2) << 7                                                                  \
                : 0)
#define RF_E4M3FN_OF(i)   ((i) == 127 ? 0x7fc0 : RF_FLOAT8(i, 120))
#define RF_E4M3FNUZ_OF(i) RF_FLOAT8(i, 119)
/* An integer: its exponent is where its first bit is. */
#define RF_FIRST(i)                                                                                \
    ((i) >= 64 ? 6 : (i) >= 32 ? 5 : (i) >= 16 ? 4 : (i) >= 8 ? 3 : (i) >= 4 ? 2 : (i) >= 2 ? 1 : 0)
#define RF_I8_OF(i) ((i) == 0 ? 0 : (127 + RF_FIRST(i)) << 7 | (((i) << (7 - RF_FIRST(i))) & 127))

#define RF_E4M3FN_HI(i)   RF_HI(RF_E4M3FN_OF(i))
#define RF_E4M3FN_LO(i)   RF_LO(RF_E4M3FN_OF(i))
#define RF_E4M3FNUZ_HI(i) RF_HI(RF_E4M3FNUZ_OF(i))
#define RF_E4M3FNUZ_LO(i) RF_LO(RF_E4M3FNUZ_OF(i))
#define RF_I8_HI(i)       RF_HI(RF_I8_OF(i))
#define RF_I8_LO(i)       RF_LO(RF_I8_OF(i))

static const uint8_t rf_tables[3][2][128] = {
    {{RF_128(RF_E4M3FN_HI)}, {RF_128(RF_E4M3FN_LO)}},
    {{RF_128(RF_E4M3FNUZ_HI)}, {RF_128(RF_E4M3FNUZ_LO)}},
    {{RF_128(RF_I8_HI)}, {RF_128(RF_I8_LO)}},
};

RF_INLINE rf_table table_of(int i) {
    rf_table t;
    for (int j = 0; j < 2; j++) {
        t.hi[j] = _mm512_loadu_si512(rf_tables[i][0] + 64 * j);
        t.lo[j] = _mm512_loadu_si512(rf_tables[i][1] + 64 * j);
    }
    return t;
}
RF_INLINE void look_up(const rf_table *t, __m512i x, __m512i *hi, __m512i *lo) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    *lo = _mm512_permutex2var_epi8(t->lo[0], x, t->lo[1]);
    *hi = _mm512_permutex2var_epi8(t->hi[0], x, t->hi[1]);
    *hi = _mm512_ternarylogic_epi64(*hi, x, sign, 0xf8); /* hi | (x & sign) */
}
static inline void bytes_bf16(const rf_table *t, __m512i x, __m512i *hi, __m512i *lo) {
    (void)t, *hi = x, *lo = x; /* bfloat16 has no bytes to look up */
}
static inline void bytes_e4m3fn(const rf_table *t, __m512i x, __m512i *hi, __m512i *lo) {
    look_up(t, x, hi, lo);
}
static inline void bytes_e4m3fnuz(const rf_table *t, __m512i x, __m512i *hi, __m512i *lo) {
    __mmask64 nan = _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8((char)0x80));
    look_up(t, x, hi, lo);
    *hi = _mm512_mask_mov_epi8(*hi, nan, _mm512_set1_epi8(0x7f));
    *lo = _mm512_mask_mov_epi8(*lo, nan, _mm512_set1_epi8((char)0xc0));
}
static inline void bytes_i8(const rf_table *t, __m512i x, __m512i *hi, __m512i *lo) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __mmask64 least = _mm512_cmpeq_epi8_mask(x, sign); /* -128 has no place in the table */
    __m512i index = _mm512_abs_epi8(x);
    *lo = _mm512_permutex2var_epi8(t->lo[0], index, t->lo[1]);
    *hi = _mm512_permutex2var_epi8(t->hi[0], index, t->hi[1]);
    *hi = _mm512_ternarylogic_epi64(*hi, x, sign, 0xf8);
    *hi = _mm512_mask_mov_epi8(*hi, least, _mm512_set1_epi8((char)0xc3));
}

/* n elements of 2 or 1 bytes, at most 64; the others are zero. */
RF_INLINE void load_words(const uint16_t *p, int n, __m512i *a, __m512i *b) {
    if (n >= 64) {
        *a = _mm512_loadu_si512(p);
        *b = _mm512_loadu_si512(p + 32);
        return;
    }
    uint64_t mask = ((uint64_t)1 << n) - 1;
    *a = _mm512_maskz_loadu_epi16((__mmask32)mask, p);
    *b = _mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), p + 32);
}
RF_INLINE void store_words(uint16_t *p, int n, __m512i a, __m512i b) {
    const uint64_t mask = n >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1;
    _mm512_mask_storeu_epi16(p, (__mmask32)mask, a);
    _mm512_mask_storeu_epi16(p + 32, (__mmask32)(mask >> 32), b);
}
RF_INLINE __m512i load_bytes(const uint8_t *p, int n) {
    return n >= 64 ? _mm512_loadu_si512(p)
                   : _mm512_maskz_loadu_epi8((__mmask64)(((uint64_t)1 << n) - 1), p);
}

/* Sums of 64 elements in the order in which pairs() leaves them, to their natural order. */
RF_INLINE void natural_words(vf v[4]) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    vf a = _mm512_permutex2var_ps(v[0], first, v[1]),
       b = _mm512_permutex2var_ps(v[0], second, v[1]);
    vf c = _mm512_permutex2var_ps(v[2], first, v[3]),
       d = _mm512_permutex2var_ps(v[2], second, v[3]);
    v[0] = a, v[1] = b, v[2] = c, v[3] = d;
}
RF_INLINE void natural_bytes(vf v[4]) {
    vf a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
    vf c = _mm512_shuffle_f32x4(v[0], v[1], 0xee), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_f32x4(a, b, 0x88), v[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
    v[2] = _mm512_shuffle_f32x4(c, d, 0x88), v[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

/* Two tokens' probabilities of sixteen rows as pairs of bfloat16. */
static inline void pack_pair(vf a, vf b, float *out) {
    __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
    __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
    _mm512_storeu_si512(out, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
}
/* The same of the tokens of a row, which lie next to each other: in place. */
RF_INLINE void pack_row(float *p, int n) {
    uint32_t *to = (uint32_t *)(void *)p;
    for (int t = 0; t < n; t += 32) {
        vf a = vf_load(p + t), b = vf_load(p + t + 16);
        _mm512_storeu_si512(to + t / 2, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

/* ---- many rows ---- */

/* Scores of tb tokens with nv vectors of rows, s[token * ld + row]. q: pairs of elements,
 * q[pair * ld + row]; keys are bfloat16 in the same order of elements. tb divides a tile where it
 * can; with one vector the pointers of tb tokens are more than there are registers, so each is used
 * for four pairs (loaded for every pair, they took a third of the time). */
RF_INLINE void dot_many_block(const uint32_t *q, int64_t ld, const uint16_t *const *k,
                              rf_ahead ahead, int first, int dim, int tb, int nv, vf factor,
                              float *s) {
    vf acc[16][4];
    for (int t = 0; t < tb; t++)
        for (int j = 0; j < nv; j++) acc[t][j] = vf_zero();
    const int step = nv > 2 ? 1 : 4 / nv;  /* pairs whose queries are held at once */
    for (int d = 0; d < dim / 2; d += 4) { /* dim is a multiple of 8 */
        if (ahead) prefetch_element(ahead, first, tb, 2 * d, (int)sizeof(uint16_t));
#pragma GCC unroll 4
        for (int e = d; e < d + 4; e += step) {
            __m512i x[4][4];
#pragma GCC unroll 4
            for (int i = 0; i < step; i++)
#pragma GCC unroll 4
                for (int j = 0; j < nv; j++)
                    x[i][j] = _mm512_loadu_si512(q + (e + i) * ld + j * 16);
#pragma GCC unroll 16
            for (int t = 0; t < tb; t++)
#pragma GCC unroll 4
                for (int i = 0; i < step; i++) {
                    int pair;
                    memcpy(&pair, k[t] + 2 * (e + i), sizeof pair);
                    __m512i y = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
                    for (int j = 0; j < nv; j++) acc[t][j] = vf_dot(acc[t][j], x[i][j], y);
                }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < tb; t++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) vf_store(s + t * ld + j * 16, vf_mul(acc[t][j], factor));
}

/* Of tokens past the end, the scores are written and not read. */
RF_INLINE void dot_many_rows(const uint32_t *q, int64_t ld, const rf_phase *x, rf_ahead ahead,
                             int tb, int nv, vf factor, float *s) {
    for (int t = 0; t < x->n; t += tb) {
        const uint16_t *k[16];
        if (ahead && t + tb < x->n) prefetch_own(x, t + tb, tb, (int)sizeof(uint16_t));
        for (int i = 0; i < tb; i++) k[i] = (const uint16_t *)x->base + x->off[t + i];
        dot_many_block(q, ld, k, ahead, t, x->dim, tb, nv, factor, s + t * ld);
    }
}

static void dot_scores_many(const void *query, int64_t ld, const rf_phase *x, float factor,
                            float *s) {
    const uint32_t *q = query;
    const vf f = vf_set1(factor);
    rf_ahead ahead = x->ahead; /* for the first rows only */
    for (int64_t r = 0, nv; r < ld; r += nv * 16, ahead = NULL) {
        nv = (ld - r) / 16 < 4 ? (ld - r) / 16 : 4;
        switch (nv) {
        case 1: dot_many_rows(q + r, ld, x, ahead, 16, 1, f, s + r); break;
        case 2: dot_many_rows(q + r, ld, x, ahead, 8, 2, f, s + r); break;
        case 3: dot_many_rows(q + r, ld, x, ahead, 8, 3, f, s + r); break;
        default: dot_many_rows(q + r, ld, x, ahead, 6, 4, f, s + r); break;
        }
    }
}

/* Sums of rb rows and 64 elements: acc * alpha, or zeros where alpha is NULL; and back. */
RF_INLINE void load_sums(vf a[4][4], const float *acc, int64_t lda, const float *alpha, int rb) {
#pragma GCC unroll 4
    for (int r = 0; r < rb; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            a[r][j] =
                alpha ? vf_mul(vf_load(acc + r * lda + j * 16), vf_set1(alpha[r])) : vf_zero();
}
RF_INLINE void store_sums(vf a[4][4], float *acc, int64_t lda, int rb) {
#pragma GCC unroll 4
    for (int r = 0; r < rb; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) vf_store(acc + r * lda + j * 16, a[r][j]);
}

/* acc = acc * alpha + p v for rb rows and 64 elements; v: pairs of tokens, v[pair * ldv + element].
 */
RF_INLINE void dot_values_block(float *acc, int64_t lda, const float *alpha, const uint32_t *p,
                                int64_t ld, const uint32_t *v, int64_t ldv, int pairs, int rb) {
    vf a[4][4];
    load_sums(a, acc, lda, alpha, rb);
    for (int t = 0; t < pairs; t++) {
        __m512i x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) x[j] = _mm512_loadu_si512(v + t * ldv + j * 16);
#pragma GCC unroll 4
        for (int r = 0; r < rb; r++) {
            __m512i y = _mm512_set1_epi32((int)p[t * ld + r]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) a[r][j] = vf_dot(a[r][j], x[j], y);
        }
    }
    store_sums(a, acc, lda, rb);
}

static void dot_values_many(float *acc, int64_t lda, const float *alpha, const float *p, int64_t ld,
                            const uint32_t *v, int n, int dim, int64_t rows) {
    const uint32_t *q = (const uint32_t *)(const void *)p;
    const int pairs = (n + 1) / 2;
    for (int c = 0; c < dim; c += 64)
        for (int64_t r = 0; r < rows; r += 4) {
            float *to = acc + r * lda + c;
            const float *factor = alpha ? alpha + r : NULL;
            switch (rows - r) {
            case 1: dot_values_block(to, lda, factor, q + r, ld, v + c, lda, pairs, 1); break;
            case 2: dot_values_block(to, lda, factor, q + r, ld, v + c, lda, pairs, 2); break;
            case 3: dot_values_block(to, lda, factor, q + r, ld, v + c, lda, pairs, 3); break;
            default: dot_values_block(to, lda, factor, q + r, ld, v + c, lda, pairs, 4); break;
            }
        }
}

static void softmax_pairs(float *s, int64_t ld, int n, float *max, float *sum, float *alpha,
                          const float *scale) {
    softmax_columns(s, ld, n, max, sum, alpha, scale, pack_pair);
}

#include "amx.h"
#include "amx_block.h"

/* ---- each type of cache ---- */

#define T        uint16_t
#define NAME(x)  x##_bf16
#define RF_WORDS 1
#define RF_TABLE 0
#define rf_bytes bytes_bf16
#include "dot.inc.h"

#define T        uint8_t
#define NAME(x)  x##_e4m3fn
#define RF_WORDS 0
#define RF_TABLE 0
#define rf_bytes bytes_e4m3fn
#include "dot.inc.h"

#define T        uint8_t
#define NAME(x)  x##_e4m3fnuz
#define RF_WORDS 0
#define RF_TABLE 1
#define rf_bytes bytes_e4m3fnuz
#include "dot.inc.h"

#define T        uint8_t
#define NAME(x)  x##_i8
#define RF_WORDS 0
#define RF_TABLE 2
#define rf_bytes bytes_i8
#include "dot.inc.h"

/* ---- float8 in float32, few rows ---- */

/* Of 32 elements the even or the odd ones. */
RF_INLINE vf half_of(__m512i words, int odd) {
    vf x[2];
    rf_split_bf16(words, x, x + 1);
    return x[odd];
}

/* A query as float32 in the order in which bytes become words, and half_of them floats. */
static void query_table(const void *query, int dim, void *row) {
    for (int c = 0; c < dim; c += 64) {
        const __m512i lower = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
        __m512i a, b;
        load_words((const uint16_t *)query + c, dim - c, &a, &b);
        const __m512i words[2] = {
            _mm512_permutex2var_epi64(a, lower, b),
            _mm512_permutex2var_epi64(a, _mm512_add_epi64(lower, _mm512_set1_epi64(2)), b),
        };
        for (int i = 0; i < 4; i++)
            vf_store((float *)row + c + 16 * i, half_of(words[i / 2], i % 2));
    }
}
/* A row of sums in that order, times f, as the output. */
static void finish_table(const float *acc, int dim, float f, void *out) {
    for (int c = 0; c < dim; c += 64) {
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        vf v[4];
        for (int i = 0; i < 4; i++) v[i] = vf_mul(vf_load(acc + c + 16 * i), vf_set1(f));
        const __m512i a = rf_join_bf16(v[0], v[1]), b = rf_join_bf16(v[2], v[3]);
        store_words((uint16_t *)out + c, dim - c, _mm512_permutex2var_epi64(a, first, b),
                    _mm512_permutex2var_epi64(a, _mm512_add_epi64(first, _mm512_set1_epi64(4)), b));
    }
}

#define T        uint8_t
#define NAME(x)  x##_table_e4m3fn
#define RF_TABLE 0
#define rf_words words_e4m3fn
#include "table.inc.h"

#define T        uint8_t
#define NAME(x)  x##_table_e4m3fnuz
#define RF_TABLE 1
#define rf_words words_e4m3fnuz
#include "table.inc.h"

#define RF_DOT(kv, unit, in_blocks, begin_, end_)                                                  \
    {.query_size = 2,                                                                              \
     .chunk = 64,                                                                                  \
     .one = 1.0f,                                                                                  \
     .query = query_##kv,                                                                          \
     .scores_few = qk_few_##kv,                                                                    \
     .scores_many = qk_many_##unit##_##kv,                                                         \
     .softmax_many = softmax_pairs,                                                                \
     .values_few = pv_few_##kv,                                                                    \
     .values_many = pv_many_##unit##_##kv,                                                         \
     .finish = finish_##kv,                                                                        \
     .blocks = in_blocks ? &blocks_##kv : NULL,                                                    \
     .begin = begin_,                                                                              \
     .end = end_}
#define RF_DOT_ALL(...)                                                                            \
    {RF_DOT(bf16, __VA_ARGS__), RF_DOT(e4m3fn, __VA_ARGS__), RF_DOT(e4m3fnuz, __VA_ARGS__),        \
     RF_DOT(i8, __VA_ARGS__)}

rf_products_of_caches rf_products_avx512bf16 = RF_DOT_ALL(dot, 0, NULL, NULL);
rf_products_of_caches rf_products_amx = RF_DOT_ALL(amx, 1, amx_begin, amx_end);

#define RF_BY_TABLE(kv)                                                                            \
    {.query_size = 4,                                                                              \
     .chunk = 64,                                                                                  \
     .one = 1.0f,                                                                                  \
     .query = query_table,                                                                         \
     .scores_few = qk_few_table_##kv,                                                              \
     .values_few = pv_few_table_##kv,                                                              \
     .finish = finish_table}
const rf_products rf_products_float8[2] = {RF_BY_TABLE(e4m3fn), RF_BY_TABLE(e4m3fnuz)};
