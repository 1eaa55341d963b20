/* What the products share, whatever they multiply with: a phase's vectors, fetching ahead, and the
 * softmax of many rows, which makes what the second product reads. */
#ifndef RF_CPU_PHASE_H
#define RF_CPU_PHASE_H

#include <math.h> /* INFINITY */
#include <string.h>

#include "kernels.h"

#define RF_INLINE static inline __attribute__((always_inline))

/* Addresses, scores or tokens that a block of tokens may write or name past the end of a tile. */
#define RF_SLACK       16
#define RF_TILE_TOKENS (RF_PART + RF_SLACK)

/* Floats from one row of scores to the next, with few rows and in blocks. */
#define RF_FEW_LD   (RF_FEW_TILE + RF_SLACK)
#define RF_BLOCK_LD (RF_PART + RF_SLACK)
/* Tokens of a block's scores: whole pairs of vectors. */
RF_INLINE int block_tokens(int n) { return (n + 31) / 32 * 32; }

/* Row t, whole. */
RF_INLINE void prefetch_vector(rf_ahead a, int t, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(a[t] + at, 0, 2);
}
/* Vectors t .. t + count - 1 of the phase itself, from the second level into the first, line after
 * line. Zen 4 drops prefetches when it has no room for them; what was dropped is found missing here
 * and not where it is computed with, and in an order that the processor's own prefetching follows:
 * blocks of rows and halves of vectors it does not (9 GB/s against 19, without other prefetches).
 * Gained 4 to 10% in decode of bfloat16, a sixth in verification, and nothing over
 * 8-bit caches, whose arithmetic is what takes the time; on a Xeon with AMX 3% over bfloat16 and
 * 8-bit caches, 2% over float32. */
RF_INLINE void prefetch_own(const rf_phase *x, int t, int count, int size) {
    for (int i = t; i < t + count; i++) {
        const char *p = x->base + x->off[i] * size;
        for (int at = 0; at < x->dim * size; at += 64) __builtin_prefetch(p + at, 0, 3);
    }
}
/* The lines that begin in the i-th `step` bytes of the rows one after another, row_bytes each, a
 * multiple of 64. Line after line between the arithmetic, as the memory likes it. */
RF_INLINE void prefetch_step(rf_ahead a, int i, int step, int row_bytes) {
    const unsigned from = (unsigned)(i * step), bytes = (unsigned)row_bytes;
    const int rows = step > row_bytes ? step / row_bytes : 1;
    if (step < 64 && from % 64) return;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const char *p = a[from / bytes + (unsigned)r] + from % bytes;
        for (int at = 0; at < step / rows; at += 64) __builtin_prefetch(p + at, 0, 2);
    }
}

/* Where keys are read element by element for tb tokens at once, from token `first` on: a line of
 * some of the rows at each element, so that all are fetched by the end and none in a burst. */
RF_INLINE void prefetch_element(rf_ahead a, int first, int tb, int element, int size) {
    const int line = 64 / size, every = line / 4; /* elements of a line; between two fetches */
    if (element % every) return;
    const int from = element % line / every * tb / 4, to = (element % line / every + 1) * tb / 4;
    for (int t = from; t < to; t++) __builtin_prefetch(a[first + t] + element / line * 64, 0, 2);
}

/* A tile that was converted: its vectors one after the other. */
typedef struct rf_wide {
    rf_phase phase;
    int64_t off[RF_TILE_TOKENS];
} rf_wide;
RF_INLINE void widened(rf_wide *w, const rf_phase *x, const void *base, int64_t ld, int dim) {
    for (int t = 0; t < x->n + RF_SLACK; t++) w->off[t] = (t < x->n ? t : x->n - 1) * ld;
    w->phase = (rf_phase){base, w->off, NULL, x->n, dim};
}

/* The new maximum, the factor for what was summed before, and what to subtract: nothing seen yet
 * needs a finite shift, as exp2(-inf) = 0 where exp2(-inf - -inf) would be NaN. */
RF_INLINE vf new_maximum(vf top, float *max, float *alpha) {
    const vf none = vf_set1(-INFINITY);
    vf old = vf_load(max), new = vf_max(top, old);
    vf shift = vf_zero_if_equal(new, none);
    vf_store(max, new);
    vf_store(alpha, vf_exp2(vf_sub(old, shift)));
    return shift;
}

/* softmax_few of softmax.h for many rows, ld of them, a multiple of 16: lanes are rows, and nothing
 * is shuffled.
 * pack: NULL, or how two tokens' probabilities become what the value product reads instead; scale:
 * factors of each token's values, for those alone, or NULL. */
RF_INLINE void softmax_columns(float *s, int64_t ld, int n, float *max, float *sum, float *alpha,
                               const float *scale, void (*pack)(vf a, vf b, float *out)) {
    for (int64_t r = 0; r < ld; r += RF_W) {
        vf top = vf_set1(-INFINITY), total = vf_zero();
        for (int t = 0; t < n; t++) top = vf_max(vf_load(s + t * ld + r), top);
        vf shift = new_maximum(top, max + r, alpha + r);
        for (int t = 0; t < n; t += 2) {
            float *at = s + t * ld + r;
            vf a = vf_exp2(vf_sub(vf_load(at), shift)), b = vf_zero();
            if (t + 1 < n) b = vf_exp2(vf_sub(vf_load(at + ld), shift));
            total = vf_add(total, vf_add(a, b));
            if (scale) {
                a = vf_mul(a, vf_set1(scale[t]));
                if (t + 1 < n) b = vf_mul(b, vf_set1(scale[t + 1]));
            }
            if (pack) pack(a, b, s + t / 2 * ld + r); /* behind what is still to be read */
            else {
                vf_store(at, a);
                if (t + 1 < n) vf_store(at + ld, b);
            }
        }
        vf_store(sum + r, vf_fma(vf_load(sum + r), vf_load(alpha + r), total));
    }
}

#endif
