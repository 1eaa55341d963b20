/* What the products by blocks of rows share: the softmax of whole rows of a part. */
#ifndef RF_CPU_BLOCK_H
#define RF_CPU_BLOCK_H

#include "phase.h"

/* The largest logits of rows r .. r + 3 of a block. */
RF_INLINE void block_maxima(const rf_block *b, int r) {
    const float *s = b->s + r * RF_BLOCK_LD;
    const int full = block_tokens(b->n);
    vf top[4];
    for (int j = 0; j < 4; j++) top[j] = vf_set1(-INFINITY);
    for (int t = 0; t < full; t += RF_W)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) top[j] = vf_max(vf_load(s + j * RF_BLOCK_LD + t), top[j]);
    vf_hmax4(top, b->max + r);
    for (int j = r; j < r + 4; j++) b->max[j] *= b->factor;
}

/* Probabilities of a row, in its place, as `store` leaves two vectors of tokens from t on for the
 * value product. Their sum by lanes, before they are scaled. */
RF_INLINE vf block_row(const rf_block *b, int r, const float *scale,
                       void (*store)(float *row, int t, vf p, vf q)) {
    float *const row = b->s + r * RF_BLOCK_LD;
    const int full = block_tokens(b->n);
    const vf factor = vf_set1(b->factor);
    const vf shift = vf_set1(b->max[r] == -INFINITY ? 0.0f : -b->max[r]); /* all are 0 then */
    vf sum = vf_zero(), other = vf_zero();
    for (int t = 0; t < full; t += 2 * RF_W) {
        vf p = vf_exp2(vf_fma(vf_load(row + t), factor, shift));
        vf q = vf_exp2(vf_fma(vf_load(row + t + RF_W), factor, shift));
        sum = vf_add(sum, p);
        other = vf_add(other, q);
        if (scale) {
            p = vf_mul(p, vf_load(scale + t));
            q = vf_mul(q, vf_load(scale + t + RF_W));
        }
        store(row, t, p, q);
    }
    return vf_add(sum, other);
}

#endif
