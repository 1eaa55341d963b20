/* The products of attention in float32: the few-row kernels for each storage type, and the one of
 * many rows, which reads float32. See kernels.h for few and many. */
#ifndef RF_CPU_FLOAT_H
#define RF_CPU_FLOAT_H

#include "softmax.h"

/* Scores of tb tokens with nv vectors of rows, s[token * ld + row]: a key's element meets all rows
 * at once, so keys are broadcast and nothing is summed across lanes. q[element * ld + row]. */
RF_INLINE void qk_many_block(const float *q, int64_t ld, const float *const *k,
                             const rf_ahead *ahead, int first, int dim, int tb, int nv, vf factor,
                             float *s) {
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
RF_INLINE void qk_many_rows(const float *q, int64_t ld, const rf_phase *x, const rf_ahead *ahead,
                            int tb, int nv, vf factor, float *s) {
    for (int t = 0; t < x->n; t += tb) {
        const float *k[RF_MANY_TB];
        for (int i = 0; i < tb; i++) k[i] = (const float *)x->base + x->off[t + i];
        qk_many_block(q, ld, k, t < x->ahead.n ? ahead : NULL, t, x->dim, tb, nv, factor,
                      s + t * ld);
    }
}

static void scores_of_many(const float *q, int64_t ld, const rf_phase *x, float factor, float *s) {
    const vf f = vf_set1(factor);
    const rf_ahead *ahead = x->ahead.row ? &x->ahead : NULL; /* for the first rows only */
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

/* A tile that was converted: its vectors one after the other. */
typedef struct rf_wide {
    rf_phase phase;
    int64_t off[RF_TILE_TOKENS];
} rf_wide;
RF_INLINE void widened(rf_wide *w, const rf_phase *x, const void *base, int64_t ld, int dim) {
    for (int t = 0; t < x->n + RF_SLACK; t++) w->off[t] = (t < x->n ? t : x->n - 1) * ld;
    w->phase = (rf_phase){base, w->off, {NULL, 0}, x->n, dim};
}

#define RF_KNOWN_DIM(T, dim) (RF_W > 4 && sizeof(T) > 1 ? (dim) : 0)

#define T           float
#define NAME(x)     x##_f32
#define RF_IS_FLOAT 1
#define rf_ld2      rf_ld2_f32
#define rf_ld2_part rf_ld2_part_f32
#include "float.inc.h"

#define T           uint16_t
#define NAME(x)     x##_f16
#define rf_ld2      rf_ld2_f16
#define rf_ld2_part rf_ld2_part_f16
#include "float.inc.h"

#if !RF_HAVE_DOT
#define T           uint16_t
#define NAME(x)     x##_bf16
#define rf_ld2      rf_ld2_bf16
#define rf_ld2_part rf_ld2_part_bf16
#include "float.inc.h"
#endif

#define T           uint8_t
#define NAME(x)     x##_e4m3fn
#define rf_ld2      rf_ld2_e4m3fn
#define rf_ld2_part rf_ld2_part_e4m3fn
#include "float.inc.h"

#define T           uint8_t
#define NAME(x)     x##_e4m3fnuz
#define rf_ld2      rf_ld2_e4m3fnuz
#define rf_ld2_part rf_ld2_part_e4m3fnuz
#include "float.inc.h"

#define T           uint8_t
#define NAME(x)     x##_i8
#define rf_ld2      rf_ld2_i8
#define rf_ld2_part rf_ld2_part_i8
#include "float.inc.h"

#endif
