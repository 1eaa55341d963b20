/* Prompts on the tile registers of AMX: the products by blocks of rows (rf_blocks). Part of dot.c.
 *
 * Other than in amx.h, where keys are read as they are and probabilities are transposed, here keys
 * are transposed while a part of the context is packed, once for all blocks of a task. Then rows of
 * queries and of probabilities are A as they lie, keys and pairs of values B, and the softmax is of
 * whole rows of a part, whose sums start from nothing: no tile of sums is read.
 *
 * Learnt on a Xeon, one thread, bfloat16, others at work: 2,048 tokens over 1,024 of heads of 128
 * at 650 to 680 GFLOP/s, 1,800 of heads of 64 at 400 to 440, where amx.h got 400 and 250. A block
 * of 32 rows and 256 tokens, alone and in the caches: scores 0.94 us, values 0.87 (the products
 * 0.56 each), softmax 1.67 (12 cycles a vector, of which rounding to bfloat16 takes 3), all three
 * at once 3.2 instead of 3.5: so being side by side gains little, 2 to 7% of a call. How far apart
 * rows of scores are does not matter, nor do larger pages. */
#ifndef RF_CPU_AMX_BLOCK_H
#define RF_CPU_AMX_BLOCK_H

#include "amx.h"

/* Dwords of a tile. */
#define AMX_TILE 256

/* Blocks of 2 x 2 tiles of C beside each other, 32 rows high: their A is the same rows of tiles. */
typedef struct amx_product {
    const char *a, *b;
    int64_t lda;                       /* bytes from one row of A to the next */
    int64_t b_beside, b_below, b_next; /* bytes to B's tiles; next: of the next block */
    float *c;
    int64_t ldc;
    int steps, blocks; /* blocks: those that are left */
    int step;          /* of the first of them */
} amx_product;

/* One step of a product: a tile along what is summed over. */
RF_INLINE void amx_step(amx_product *x) {
    const char *a = x->a + 64 * x->step, *b = x->b + x->b_below * x->step;
    if (x->step == 0) {
        AMX_ZERO(0);
        AMX_ZERO(1);
        AMX_ZERO(2);
        AMX_ZERO(3);
    }
    AMX_LOAD(4, a, x->lda);
    AMX_LOAD(6, b, 64);
    AMX_DOT(0, 4, 6);
    AMX_LOAD(7, b + x->b_beside, 64);
    AMX_DOT(1, 4, 7);
    AMX_LOAD(5, a + 16 * x->lda, x->lda);
    AMX_DOT(2, 5, 6);
    AMX_DOT(3, 5, 7);
    if (++x->step < x->steps) return;
    const int64_t stride = 4 * x->ldc;
    AMX_STORE(0, x->c, stride);
    AMX_STORE(1, x->c + 16, stride);
    AMX_STORE(2, x->c + 16 * x->ldc, stride);
    AMX_STORE(3, x->c + 16 * x->ldc + 16, stride);
    x->step = 0;
    x->b += x->b_next;
    x->c += 32;
    x->blocks--;
}

RF_INLINE amx_product scores_of(const rf_part *x, const rf_block *block) {
    const int steps = (int)rf_pad_dim(x->dim) / 32;
    return (amx_product){.a = block->q,
                         .b = x->keys,
                         .lda = 2 * x->ldq,
                         .b_beside = steps * 4 * AMX_TILE,
                         .b_below = 4 * AMX_TILE,
                         .b_next = steps * 8 * AMX_TILE,
                         .c = block->s,
                         .ldc = RF_BLOCK_LD,
                         .steps = steps,
                         .blocks = block_tokens(block->n) / 32};
}
RF_INLINE amx_product values_of(const rf_part *x, const rf_block *block) {
    const int used = (int)rf_pad_dim(x->v_dim);
    return (amx_product){.a = (const char *)block->s,
                         .b = x->values,
                         .lda = 4 * RF_BLOCK_LD,
                         .b_beside = 4 * AMX_TILE,
                         .b_below = used / 16 * 4 * AMX_TILE,
                         .b_next = 8 * AMX_TILE,
                         .c = block->acc,
                         .ldc = x->lda,
                         .steps = block_tokens(block->n) / 32,
                         .blocks = used / 32};
}

/* 2^x within 1e-7, for x up to 0; 0 below 2^-125. Adding 1.5 * 2^23 rounds to an integer, whose
 * bits are the last of the sum. */
RF_INLINE vf block_exp2(vf x) {
    const vf round = vf_set1(0x1.8p23f);
    const __mmask16 seen = _mm512_cmp_ps_mask(x, vf_set1(-125.0f), _CMP_NLT_UQ);
    const vf t = vf_add(x, round), f = vf_sub(x, vf_sub(t, round));
    vf p = vf_set1(0x1.5b46fcp-10f);
    p = vf_fma(p, f, vf_set1(0x1.3cebb0p-7f));
    p = vf_fma(p, f, vf_set1(0x1.c6b88ep-5f));
    p = vf_fma(p, f, vf_set1(0x1.ebf9b8p-3f));
    p = vf_fma(p, f, vf_set1(0x1.62e428p-1f));
    p = vf_fma(p, f, vf_set1(1.0f));
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(seen, _mm512_castps_si512(p), n));
}

/* Probabilities of a row, which are pairs of bfloat16 afterwards, in its place. The sum by lanes.
 */
RF_INLINE vf block_row(float *row, int full, vf factor, vf shift, const float *scale) {
    vf total = vf_zero(), other = vf_zero();
    for (int t = 0; t < full; t += 32) {
        vf a = block_exp2(_mm512_fmsub_ps(vf_load(row + t), factor, shift));
        vf b = block_exp2(_mm512_fmsub_ps(vf_load(row + t + 16), factor, shift));
        total = vf_add(total, a);
        other = vf_add(other, b);
        if (scale) {
            a = vf_mul(a, vf_load(scale + t));
            b = vf_mul(b, vf_load(scale + t + 16));
        }
        _mm512_storeu_si512(row + t / 2, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    return vf_add(total, other);
}

static void run_blocks(const rf_part *x, const rf_block *first, const rf_block *second,
                       const rf_block *third) {
    amx_product todo[2] = {{0}, {0}};
    if (first) todo[0] = values_of(x, first);
    if (third) todo[1] = scores_of(x, third);
    amx_product *now = todo, *const end = todo + 2;
    if (second) {
        const int all = todo[0].blocks * todo[0].steps + todo[1].blocks * todo[1].steps;
        const int full = block_tokens(second->n);
        const vf factor = vf_set1(second->factor);
        for (int r = 0, done = 0; r < RF_BLOCK_ROWS; r += 4) {
            vf v[4];
            float *at = second->s + r * RF_BLOCK_LD, *max = second->max + r;
            for (int j = 0; j < 4; j++) v[j] = vf_set1(-INFINITY);
            for (int t = 0; t < full; t += 16)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) v[j] = vf_max(vf_load(at + j * RF_BLOCK_LD + t), v[j]);
            vf_hmax4(v, max);
            for (int j = 0; j < 4; j++) {
                max[j] *= second->factor;
                const vf shift = vf_set1(max[j] == -INFINITY ? 0.0f : max[j]); /* all are 0 then */
                v[j] = block_row(at + j * RF_BLOCK_LD, full, factor, shift, x->scale);
                for (; done < all * (r + j + 1) / RF_BLOCK_ROWS; done++) {
                    while (now->blocks == 0) now++;
                    amx_step(now);
                }
            }
            vf_hsum4(v, second->sum + r);
        }
        return;
    }
    for (; now < end; now++)
        while (now->blocks) amx_step(now);
}

#endif
