/* Prompts on the tile registers of AMX: the products by blocks of rows (rf_blocks). Part of dot.c.
 *
 * Other than in amx.h, where keys are read as they are and probabilities are transposed, here keys
 * are transposed while a part of the context is packed, once for all blocks of a task. Then rows of
 * queries and of probabilities are A as they lie, keys and pairs of values B, and the softmax is of
 * whole rows of a part, whose sums start from nothing: no tile of sums is read.
 *
 * Learnt on a Xeon, one thread, bfloat16, others at work: 2,048 tokens over 1,024 of heads of 128
 * at 660 GFLOP/s, 1,800 of heads of 64 at 460, where amx.h got 400 and 250. With 1,024 rows a
 * task, which is how often packed parts are used, 6 to 9% less time than with 256; 2,048 are no
 * better. A block of 32 rows and 256 tokens, alone: scores 1.06 us, values 0.98, of which the
 * products of tiles are 0.56 each, softmax 1.6; all three at once 3.5. Being side by side gains so
 * little because the tiles' unit takes one of the two ports of vectors: while it works, a vector
 * operation costs a cycle, not half of one. So each operation saved in the softmax counts, that
 * of the maxima too (7% of a call, 2^x 15%). Vectors of 32 bytes, which have a third port, lost
 * 7%: twice as many operations do not fit into what is looked ahead. No gain: prefetching tiles
 * into the first level (it lost 3%), products between quarters of rows, rounding to bfloat16 by
 * integers, how far apart rows of scores are, larger pages.
 *
 * In a call, by functions that were kept apart for it, 64 rows and 256 tokens take 2.8 us for
 * values, 2.7 for scores, 2.6 for the softmax, 0.65 for packing, 0.5 for folding parts and 0.7 for
 * the rest; the products, hot in the first level and without their loads, would be 1.25 each. What
 * was tried against that as a whole, and came to the same time within 2%: blocks of 64 rows of four
 * tiles, so that keys and values come half as often from the second level; scores of 64 tokens at a
 * time, made probabilities while they are in the first level, relative to the maximum of the first
 * 64; sums added to those of earlier parts between the products; one block after the other with one
 * place for scores. Parts of 512 tokens take 3 to 4% less. */
#ifndef RF_CPU_AMX_BLOCK_H
#define RF_CPU_AMX_BLOCK_H

#include "amx.h"
#include "block.h"

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

/* A row's probabilities as pairs of bfloat16, behind what is still to be read. */
static inline void pack_pairs(float *row, int t, vf a, vf b) {
    _mm512_storeu_si512(row + t / 2, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

static void run_blocks(const rf_part *x, const rf_block *first, const rf_block *second,
                       const rf_block *third) {
    amx_product todo[2] = {{0}, {0}};
    if (first) todo[0] = values_of(x, first);
    if (third) todo[1] = scores_of(x, third);
    amx_product *now = todo, *const end = todo + 2;
    if (second) {
        const int all = todo[0].blocks * todo[0].steps + todo[1].blocks * todo[1].steps;
        for (int r = 0, done = 0; r < RF_BLOCK_ROWS; r += 4) {
            vf sum[4];
            block_maxima(second, r);
            for (int j = 0; j < 4; j++) {
                sum[j] = block_row(second, r + j, x->scale, pack_pairs);
                for (; done < all * (r + j + 1) / RF_BLOCK_ROWS; done++) {
                    while (now->blocks == 0) now++;
                    amx_step(now);
                }
            }
            vf_hsum4(sum, second->sum + r);
        }
        return;
    }
    for (; now < end; now++)
        while (now->blocks) amx_step(now);
}

#endif
