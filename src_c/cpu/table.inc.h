/* Few rows over a float8 cache in float32, by elements from tables: included once for each float8
 * by dot.c, and for processors whose dot products of bfloat16 do less than their multiply-adds.
 *
 * Elements are looked up by 64, as words() of dot.inc.h leaves them: two registers of bfloat16,
 * whose even and odd elements are a shift and a mask away from float32. Queries and sums are
 * float32 in that order. With four rows that is 13 operations for 64 elements beside 16
 * multiply-adds; by way of a half (simd_avx512.h) 22. Fewest would be to shift a float8 into the
 * place of a subnormal float32, but a multiply-add of one takes 36 ns.
 *
 * On a Xeon with AMX, against the halves, decode of 8 x 2,048 takes 0.91 of the time over e4m3fn,
 * 0.97 over e4m3fnuz, in the caches 0.84; two query tokens 0.88; heads of 96, of which whole 64 are
 * computed, 1.08. */

/* Scores of rb rows with four tokens; u: which four of the tile. fixed: dim is known when
 * compiling, a multiple of 64. */
RF_INLINE void NAME(qk_block)(const rf_table *table, const float *q, int64_t ldq,
                              const T *const k[4], rf_ahead ahead, int u, int dim, int fixed,
                              int rb, vf factor, float *s) {
    vf acc[4][4];
    for (int r = 0; r < rb; r++)
        for (int t = 0; t < 4; t++) acc[r][t] = vf_zero();
    if (ahead && !fixed)
        for (int t = 0; t < 4; t++) prefetch_vector(ahead, u * 4 + t, dim);
    for (int c = 0; c < dim; c += 64) {
        __m512i words[2][4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            rf_words(table, k[t] + c, dim - c, &words[0][t], &words[1][t]);
            if (ahead && fixed) prefetch_step(ahead, (u * (dim / 64) + c / 64) * 4 + t, 64, dim);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            vf x[4];
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) x[t] = half_of(words[i / 2][t], i % 2);
#pragma GCC unroll 4
            for (int r = 0; r < rb; r++) {
                const vf y = vf_load(q + r * ldq + c + 16 * i);
#pragma GCC unroll 4
                for (int t = 0; t < 4; t++) acc[r][t] = vf_fma(x[t], y, acc[r][t]);
            }
        }
    }
    rf_reduce(acc, rb, factor, s + u * 4, RF_FEW_LD);
}

/* acc = acc * alpha + p v for rb rows and the 64 elements from c on. */
RF_INLINE void NAME(pv_block)(float *acc, int64_t lda, const float *alpha, const float *p,
                              const rf_phase *x, rf_ahead ahead, int dim, int fixed, int c,
                              int rb) {
    const rf_table table = table_of(RF_TABLE);
    vf a[4][4];
    acc += c;
    load_sums(a, acc, lda, alpha, rb);
    for (int t = 0; t < x->n; t++) {
        __m512i words[2];
        rf_words(&table, (const T *)x->base + x->off[t] + c, dim - c, words, words + 1);
        if (ahead && c == 0) prefetch_own(x, t + 4, 1, (int)sizeof(T));
        if (ahead && fixed) prefetch_step(ahead, c / 64 * x->n + t, 64, dim);
        else if (ahead && c == 0) prefetch_vector(ahead, t, dim);
        vf v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) v[j] = half_of(words[j / 2], j % 2);
#pragma GCC unroll 4
        for (int r = 0; r < rb; r++) {
            const vf y = vf_set1(p[r * RF_FEW_LD + t]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) a[r][j] = vf_fma(v[j], y, a[r][j]);
        }
    }
    store_sums(a, acc, lda, rb);
}

#define RF_QUERY       float
#define RF_PROBABILITY float
#include "few.inc.h"

static void NAME(pv_few)(float *acc, int64_t lda, const float *alpha, float *p, const rf_phase *x,
                         int64_t rows, void *work) {
    (void)work;
    NAME(pv_dims)(acc, lda, alpha, p, x, rows);
}

#undef T
#undef NAME
#undef RF_TABLE
#undef rf_words
