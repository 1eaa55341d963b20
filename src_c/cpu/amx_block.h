/* Prompts on the tile registers of AMX: the products by blocks of rows (rf_blocks). Part of dot.c.
 *
 * Other than in amx.h, where keys are read as they are and probabilities are transposed, here keys
 * are transposed while a part of the context is packed, once for all blocks of a task. Then rows of
 * queries and of probabilities are A as they lie, keys and pairs of values B, and the softmax is of
 * whole rows of a part, whose sums start from nothing: no tile of sums is read. */
#ifndef RF_CPU_AMX_BLOCK_H
#define RF_CPU_AMX_BLOCK_H

#include "amx.h"

/* Dwords of a tile. */
#define AMX_TILE 256

RF_INLINE int amx_steps(int dim) { return (dim + 31) / 32; }

static void block_scores(const void *q, int64_t ldq, int64_t rows, const void *keys, int n, int dim,
                         float *s) {
    const char *at = q, *k = keys;
    const int steps = amx_steps(dim);
    const amx_tiles queries[2] = {{at, 2 * ldq, 64}, {at + 32 * ldq, 2 * ldq, 64}};
    for (int t = 0; t < n; t += 32, k += 2 * steps * 4 * AMX_TILE) {
        const amx_tiles tokens[2] = {{k, 64, 4 * AMX_TILE},
                                     {k + steps * 4 * AMX_TILE, 64, 4 * AMX_TILE}};
        amx_blocks(queries, tokens, rows > 16 ? 2 : 1, n - t > 16 ? 2 : 1, steps, s + t,
                   RF_BLOCK_LD, 0, NULL, 0);
    }
}

/* acc = p v: values are rows of pairs of tokens, lda of them from one to the next. */
static void block_values(float *acc, int64_t lda, const float *p, int64_t rows, const void *values,
                         int n, int dim) {
    const int64_t stride = lda * 4, ldp = RF_BLOCK_LD * 4;
    const char *at = (const char *)p, *v = values;
    const amx_tiles rows2[2] = {{at, ldp, 64}, {at + 16 * ldp, ldp, 64}};
    for (int c = 0; c < rf_pad_dim(dim); c += 32, v += 128) {
        const amx_tiles pairs[2] = {{v, stride, 16 * stride}, {v + 64, stride, 16 * stride}};
        amx_blocks(rows2, pairs, rows > 16 ? 2 : 1, 2, amx_steps(n), acc + c, lda, 0, NULL, 0);
    }
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

/* Four rows at a time: their reductions share the shuffles. */
static void block_softmax(float *s, int64_t rows, int n, float factor, float *max, float *sum,
                          const float *scale) {
    const vf f = vf_set1(factor);
    const int full = (n + 31) / 32 * 32;
    for (int64_t r = 0; r < rows; r += 4) {
        vf x[4];
        float *at = s + r * RF_BLOCK_LD;
        for (int j = 0; j < 4; j++) x[j] = vf_set1(-INFINITY);
        for (int t = 0; t < full; t += 16)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) x[j] = vf_max(vf_load(at + j * RF_BLOCK_LD + t), x[j]);
        vf_hmax4(x, max + r);
        for (int j = 0; j < 4; j++) {
            float *row = at + j * RF_BLOCK_LD;
            const float top = max[r + j] * factor;
            const vf shift = vf_set1(top == -INFINITY ? 0.0f : top); /* nothing seen: all are 0 */
            vf total = vf_zero(), other = vf_zero();
            max[r + j] = top;
            for (int t = 0; t < full; t += 32) {
                vf a = block_exp2(_mm512_fmsub_ps(vf_load(row + t), f, shift));
                vf b = block_exp2(_mm512_fmsub_ps(vf_load(row + t + 16), f, shift));
                total = vf_add(total, a);
                other = vf_add(other, b);
                if (scale) {
                    a = vf_mul(a, vf_load(scale + t));
                    b = vf_mul(b, vf_load(scale + t + 16));
                }
                _mm512_storeu_si512(row + t / 2, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            }
            x[j] = vf_add(total, other);
        }
        vf_hsum4(x, sum + r);
    }
}

#endif
