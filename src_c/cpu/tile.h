/* What the kernels of all storage types share: tiles of tokens, softmax over scores, states. */
#ifndef RF_CPU_TILE_H
#define RF_CPU_TILE_H

#include <math.h> /* INFINITY */
#include <string.h>

#include "kernels.h"

#define RF_INLINE static inline __attribute__((always_inline))
/* Scores of a row: a tile, and the lanes that a block of tokens or a vector writes past its end. */
#define RF_SCORES (RF_TILE + 16)

RF_INLINE float rf_exp2_of(float x) { return vf_first(vf_exp2(vf_set1(x))); }

/* Up to RF_TILE tokens of a context that have a block. */
typedef struct rf_tile {
    int32_t n;
    int32_t pos[RF_TILE]; /* in the context, ascending */
    int64_t k[RF_TILE];   /* element offset of the key vector of head 0 */
    int64_t v[RF_TILE];
} rf_tile;

/* Tokens start .. end - 1 of a context. Negative entries of the table are passed over. */
static void make_tile(const rf_attention_params *p, const rf_seq *s, int64_t start, int64_t end,
                      rf_tile *t) {
    int64_t bs = p->block_size;
    int32_t n = 0;
    for (int64_t pos = start; pos < end;) {
        int64_t index = pos / bs, offset = pos - index * bs;
        int64_t stop = (index + 1) * bs < end ? (index + 1) * bs : end;
        int64_t block = s->blocks[index];
        if (block < 0) {
            pos = stop;
            continue;
        }
        int64_t k = block * p->k.block_stride + offset * p->k.token_stride;
        int64_t v = block * p->v.block_stride + offset * p->v.token_stride;
        for (; pos < stop; pos++, n++) {
            t->pos[n] = (int32_t)pos;
            t->k[n] = k;
            t->v[n] = v;
            k += p->k.token_stride;
            v += p->v.token_stride;
        }
    }
    t->n = n;
    /* prefetches may look past the end: at what is there already */
    for (int32_t i = n; i < RF_TILE; i++) {
        t->k[i] = n ? t->k[n - 1] : 0;
        t->v[i] = n ? t->v[n - 1] : 0;
    }
}

/* Tokens of the tile that a query sees which sees the first `limit` of the context. */
RF_INLINE int32_t tile_visible(const rf_tile *t, int64_t limit) {
    int32_t n = t->n;
    while (n > 0 && t->pos[n - 1] >= limit) n--;
    return n;
}

/* Turns n scores into probabilities relative to the new maximum, zeros up to the next vector, and
 * returns the factor for everything that was summed before. */
RF_INLINE float softmax_row(float *s, int32_t n, float *row_max, float *row_sum) {
    int32_t full = (n + RF_W - 1) / RF_W * RF_W;
    for (int32_t i = n; i < full; i++) s[i] = -INFINITY;
    vf top = vf_set1(*row_max);
    for (int32_t i = 0; i < full; i += RF_W) top = vf_max(vf_load(s + i), top);
    float new_max = vf_hmax(top);
    if (new_max == -INFINITY) { /* nothing seen so far: every difference would be NaN */
        for (int32_t i = 0; i < full; i++) s[i] = 0.0f;
        return 1.0f;
    }
    vf shift = vf_set1(-new_max), sum = vf_zero();
    const vf one = vf_set1(1.0f);
    for (int32_t i = 0; i < full; i += RF_W) {
        vf e = vf_exp2(vf_fma(vf_load(s + i), one, shift));
        vf_store(s + i, e);
        sum = vf_fma(e, one, sum);
    }
    float alpha = rf_exp2_of(*row_max - new_max);
    *row_sum = *row_sum * alpha + vf_hsum(sum);
    *row_max = new_max;
    return alpha;
}

typedef struct rf_state {
    float *acc, *max, *sum;
} rf_state;

RF_INLINE rf_state state_at(float *base, int64_t rows, int64_t v_dim) {
    rf_state s = {base, base + rows * v_dim, base + rows * v_dim + rows};
    return s;
}

static void clear_state(rf_state s, int64_t rows, int64_t v_dim) {
    memset(s.acc, 0, (size_t)(rows * v_dim) * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        s.max[r] = -INFINITY;
        s.sum[r] = 0.0f;
    }
}

/* a = fold(a, b), b being the later part. */
static void fold_state(rf_state a, rf_state b, int64_t rows, int64_t v_dim) {
    for (int64_t r = 0; r < rows; r++) {
        if (b.max[r] == -INFINITY) continue;
        float top = a.max[r] > b.max[r] ? a.max[r] : b.max[r];
        float fa = rf_exp2_of(a.max[r] - top), fb = rf_exp2_of(b.max[r] - top);
        a.sum[r] = a.sum[r] * fa + b.sum[r] * fb;
        a.max[r] = top;
        float *pa = a.acc + r * v_dim, *pb = b.acc + r * v_dim;
        vf va = vf_set1(fa), vb = vf_set1(fb);
        for (int64_t i = 0; i < v_dim; i += RF_W)
            vf_store(pa + i, vf_fma(vf_load(pb + i), vb, vf_fma(vf_load(pa + i), va, vf_zero())));
    }
}

static int64_t scratch_floats(const rf_attention_params *p, int64_t rows, int64_t heads) {
    return heads * rows * rf_pad_dim(p->head_dim) +
           2 * heads * rf_state_floats(rows, p->v_head_dim) + rows * (RF_SCORES + 1) + 16;
}

#endif
