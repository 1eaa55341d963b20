/* Prompts in float32: the products by blocks of rows (rf_blocks). Part of fma.h.
 *
 * Both products are one: rows that are broadcast, queries or probabilities, times panels of two
 * vectors, whose lanes are tokens of transposed keys or elements of values. A panel lies in one
 * piece and stays in the first level while all rows of a block pass by.
 *
 * Learnt on a Xeon of 230 GFLOP/s in multiply-adds alone, one thread, others at work. AVX-512, a
 * block over 256 tokens of heads of 64, in the caches: scores and values 5.1 us each, 0.86 of
 * that, softmax 1.3. A prompt of 1,800 gets 125 to 140 GFLOP/s: 69% of it is these products, 10%
 * softmax, 6% packing, most of that waiting for memory. Against the products of many rows it takes
 * 0.81 to 0.84 of the time with AVX-512 (the other types 0.78 to 0.80), 0.76 to 0.81 with AVX2,
 * 0.87 to 0.93 in portable C.
 *
 * Rows x vectors at once, AVX-512: 8 x 2, and four steps a turn, 195 to 205 GFLOP/s; a step a turn
 * 190; 12 x 2 as much; 4 x 4 175 to 190; 8 x 3, which leaves half a panel idle with heads of 64,
 * 175; 16 x 1 115 to 165. Keys and values as whole matrices, where a panel's lines share few sets
 * of the first level: 4% slower. Tasks of 512 rows instead of 256, which pack half as often: 2 to
 * 4% faster on one thread, 3% slower to 4% faster on two (heads of 128, 2,048 tokens over 1,024,
 * one thread: 384 rows 1%, 512 1.7%, 768 2.1%). Fetching ahead while packing: nothing.
 *
 * What is missing from the peak is the clock. In the first level these products do 0.99 of two
 * multiply-adds a cycle, as a loop without loads does, but with them the clock falls: of twelve
 * accumulators alone 3.6 to 3.8 GHz (235 to 242 GFLOP/s), with 8 x 2 3.1 to 3.2 (200 to 206), the
 * scalar chain beside it shows. So fewer loads for each multiply-add are what is left: 14 x 2, 13 x
 * 2, 9 x 3 and 5 x 5 212 to 219 at 3.3 GHz, none of which divides a block of 32 rows; 11 x 2 and
 * 4 x 4 201 to 207; 12 x 2, 8 x 3, 6 x 4 and others of 20 to 24 accumulators run at 3.3 GHz too,
 * but do 0.95 a cycle. The softmax takes 7.1 cycles a vector in the first level, where its
 * operations need 6.5; four vectors or four rows at once 6.9 to 7.1. */
#ifndef RF_CPU_FMA_BLOCK_H
#define RF_CPU_FMA_BLOCK_H

#include "block.h"

/* Floats of a step of a panel: two vectors. */
#define RF_PANEL (2 * RF_W)
RF_INLINE int panels(int n) { return (n + RF_PANEL - 1) / RF_PANEL; }

/* c = a b for RF_BLOCK_RB rows and a panel of b: a[row * lda + step], b[step * RF_PANEL + lane]. */
RF_INLINE void fma_product(const float *a, int64_t lda, const float *b, int steps, float *c,
                           int64_t ldc) {
    vf sum[RF_BLOCK_RB][2];
#pragma GCC unroll 8
    for (int r = 0; r < RF_BLOCK_RB; r++) sum[r][0] = sum[r][1] = vf_zero();
#pragma GCC unroll 4
    for (int k = 0; k < steps; k++, b += RF_PANEL) {
        const vf x = vf_load(b), y = vf_load(b + RF_W);
#pragma GCC unroll 8
        for (int r = 0; r < RF_BLOCK_RB; r++) {
            const vf z = vf_set1(a[r * lda + k]);
            sum[r][0] = vf_fma(x, z, sum[r][0]);
            sum[r][1] = vf_fma(y, z, sum[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < RF_BLOCK_RB; r++) {
        vf_store(c + r * ldc, sum[r][0]);
        vf_store(c + r * ldc + RF_W, sum[r][1]);
    }
}
/* The same for all rows of a block and n panels, `next` floats apart. */
static void fma_products(const float *a, int64_t lda, const float *b, int64_t next, int steps,
                         float *c, int64_t ldc, int n) {
    for (int i = 0; i < n; i++, b += next, c += RF_PANEL)
        for (int r = 0; r < RF_BLOCK_ROWS; r += RF_BLOCK_RB)
            fma_product(a + r * lda, lda, b, steps, c + r * ldc, ldc);
}

static inline void store_floats(float *row, int t, vf a, vf b) {
    vf_store(row + t, a);
    vf_store(row + t + RF_W, b);
}

static void run_blocks(const rf_part *x, const rf_block *first, const rf_block *second,
                       const rf_block *third) {
    if (first)
        fma_products(first->s, RF_BLOCK_LD, x->values, RF_PART * RF_PANEL, first->n, first->acc,
                     x->lda, panels(x->v_dim));
    for (int r = 0; second && r < RF_BLOCK_ROWS; r += 4) {
        vf sum[4];
        block_maxima(second, r);
        for (int j = 0; j < 4; j++) sum[j] = block_row(second, r + j, x->scale, store_floats);
        vf_hsum4(sum, second->sum + r);
    }
    if (third)
        fma_products(third->q, x->ldq, x->keys, x->ldq * RF_PANEL, panels(x->dim) * RF_PANEL,
                     third->s, RF_BLOCK_LD, panels(third->n));
}

#endif
