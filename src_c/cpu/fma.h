/* The products of attention in float32: the few-row kernels for each storage type, and the one of
 * many rows, which reads float32. See kernels.h for few and many. */
#ifndef RF_CPU_FMA_H
#define RF_CPU_FMA_H

#include "fma_block.h"

/* Scores of tb tokens with nv vectors of rows, s[token * ld + row]: a key's element meets all rows
 * at once, so keys are broadcast and nothing is summed across lanes. q[element * ld + row].
 *
 * Learnt on a Xeon with AMX, AVX-512, 16 rows (4 query tokens x 4 heads), 32 x 2,048 and in the
 * caches: 16 tokens at once, which divide a tile, 1.03 to 1.09 times as fast as 12, 11 and 13 1.01
 * to 1.05. Of float16's time a third is widening, a third the scores, a quarter the values.
 * Fetching while the scores of float16 are made instead of while it is widened: 1.00 to 1.02. As
 * few rows: float16 and int8 1.13, in the caches 1.2, but float32 0.92 and float8 0.88. As half a
 * block of rows: 1.2 in the caches, from memory float16 0.95, int8 1.04, float32 0.78. */
RF_INLINE void qk_many_block(const float *q, int64_t ld, const float *const *k, rf_ahead ahead,
                             int first, int dim, int tb, int nv, vf factor, float *s) {
    vf acc[RF_MANY_TB][RF_MANY_NV];
    for (int t = 0; t < tb; t++)
        for (int j = 0; j < nv; j++) acc[t][j] = vf_zero();
    for (int d = 0; d < dim; d++) {
        vf x[RF_MANY_NV];
        if (ahead) prefetch_element(ahead, first, tb, d, (int)sizeof(float));
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) x[j] = vf_load(q + d * ld + j * RF_W);
#pragma GCC unroll 16
        for (int t = 0; t < tb; t++) {
            vf y = vf_set1(k[t][d]);
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) acc[t][j] = vf_fma(x[j], y, acc[t][j]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < tb; t++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) vf_store(s + t * ld + j * RF_W, vf_mul(acc[t][j], factor));
}

/* Of tokens past the end, the scores are written and not read. */
RF_INLINE void qk_many_rows(const float *q, int64_t ld, const rf_phase *x, rf_ahead ahead, int tb,
                            int nv, vf factor, float *s) {
    for (int t = 0; t < x->n; t += tb) {
        const float *k[RF_MANY_TB];
        for (int i = 0; i < tb; i++) k[i] = (const float *)x->base + x->off[t + i];
        qk_many_block(q, ld, k, ahead, t, x->dim, tb, nv, factor, s + t * ld);
    }
}

static void scores_of_many(const float *q, int64_t ld, const rf_phase *x, float factor, float *s) {
    const vf f = vf_set1(factor);
    rf_ahead ahead = x->ahead; /* for the first rows only */
    for (int64_t r = 0, nv; r < ld; r += nv * RF_W, ahead = NULL) {
        nv = (ld - r) / RF_W < RF_MANY_NV ? (ld - r) / RF_W : RF_MANY_NV;
        switch (nv) {
        case 1: qk_many_rows(q + r, ld, x, ahead, RF_MANY_TB, 1, f, s + r); break;
#if RF_MANY_NV == 4
        case 2: qk_many_rows(q + r, ld, x, ahead, 12, 2, f, s + r); break;
        case 3: qk_many_rows(q + r, ld, x, ahead, 8, 3, f, s + r); break;
#endif
        default: qk_many_rows(q + r, ld, x, ahead, RF_MANY_FULL, RF_MANY_NV, f, s + r); break;
        }
    }
}

#define RF_KNOWN_DIM(T, dim) (RF_W > (sizeof(T) > 1 ? 4 : 8) ? (dim) : 0)

#define T           float
#define NAME(x)     x##_f32
#define RF_IS_FLOAT 1
#define rf_ld2      rf_ld2_f32
#define rf_ld2_part rf_ld2_part_f32
#include "fma.inc.h"

#define T           uint16_t
#define NAME(x)     x##_f16
#define rf_ld2      rf_ld2_f16
#define rf_ld2_part rf_ld2_part_f16
#include "fma.inc.h"

#define T           uint16_t
#define NAME(x)     x##_bf16
#define rf_ld2      rf_ld2_bf16
#define rf_ld2_part rf_ld2_part_bf16
#include "fma.inc.h"

#define T           uint8_t
#define NAME(x)     x##_e4m3fn
#define rf_ld2      rf_ld2_e4m3fn
#define rf_ld2_part rf_ld2_part_e4m3fn
#include "fma.inc.h"

#define T           uint8_t
#define NAME(x)     x##_e4m3fnuz
#define rf_ld2      rf_ld2_e4m3fnuz
#define rf_ld2_part rf_ld2_part_e4m3fnuz
#include "fma.inc.h"

#define T           uint8_t
#define NAME(x)     x##_i8
#define rf_ld2      rf_ld2_i8
#define rf_ld2_part rf_ld2_part_i8
#include "fma.inc.h"

/* Rows of queries in float32, and rows of sums as outputs: for each type, whole pairs of vectors
 * and a part. */
#define RF_QUERY(name, T)                                                                          \
    static void query_##name(const void *query, int dim, void *row) {                              \
        const T *q = query;                                                                        \
        float *to = row;                                                                           \
        for (int c = 0; c < dim; c += 2 * RF_W) {                                                  \
            vf a, b;                                                                               \
            if (dim - c >= 2 * RF_W) rf_ld2_##name(q + c, &a, &b);                                 \
            else rf_ld2_part_##name(q + c, dim - c, &a, &b);                                       \
            vf_store(to + c, a);                                                                   \
            vf_store(to + c + RF_W, b);                                                            \
        }                                                                                          \
    }                                                                                              \
    static void finish_##name(const float *acc, int dim, float f, void *out) {                     \
        T *to = out;                                                                               \
        for (int c = 0; c < dim; c += 2 * RF_W) {                                                  \
            vf a = vf_mul(vf_load(acc + c), vf_set1(f));                                           \
            vf b = vf_mul(vf_load(acc + c + RF_W), vf_set1(f));                                    \
            if (dim - c >= 2 * RF_W) rf_st2_##name(to + c, a, b);                                  \
            else rf_st2_part_##name(to + c, dim - c, a, b);                                        \
        }                                                                                          \
    }
RF_QUERY(f32, float)
RF_QUERY(f16, uint16_t)
RF_QUERY(bf16, uint16_t)
RF_QUERY(bf16n, uint16_t) /* over caches whose elements keep their order */

static void softmax_many(float *s, int64_t ld, int n, float *max, float *sum, float *alpha,
                         const float *scale) {
    softmax_columns(s, ld, n, max, sum, alpha, scale, NULL);
}

/* A float8 is put in the place of a half, and so read as too small. */
#define RF_ONE_f32      1.0f
#define RF_ONE_f16      1.0f
#define RF_ONE_bf16     1.0f
#define RF_ONE_i8       1.0f
#define RF_ONE_e4m3fn   0x1p-8f
#define RF_ONE_e4m3fnuz 0x1p-7f

#define RF_FMA(q, kv)                                                                              \
    {.query_size = 4,                                                                              \
     .chunk = 2 * RF_W,                                                                            \
     .one = RF_ONE_##kv,                                                                           \
     .query = query_##q,                                                                           \
     .scores_few = qk_few_##kv,                                                                    \
     .scores_many = qk_many_##kv,                                                                  \
     .softmax_many = softmax_many,                                                                 \
     .values_few = pv_few_##kv,                                                                    \
     .values_many = pv_many_##kv,                                                                  \
     .finish = finish_##q,                                                                         \
     .blocks = &blocks_##kv}
#define RF_FMA_8BIT(q) RF_FMA(q, e4m3fn), RF_FMA(q, e4m3fnuz), RF_FMA(q, i8)

#endif
