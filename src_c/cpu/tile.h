/* What the kernels of all storage types share: tiles of tokens, softmax over scores, states. */
#ifndef RF_CPU_TILE_H
#define RF_CPU_TILE_H

#include <math.h> /* INFINITY */
#include <string.h>

#include "kernels.h"

#define RF_INLINE static inline __attribute__((always_inline))
/* Scores of a row: a tile, and the lanes that a block of tokens or a vector writes past its end. */
#define RF_SCORES (RF_TILE + 16)

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
}

/* Tokens of the tile that a query sees which sees the first `limit` of the context. */
RF_INLINE int32_t tile_visible(const rf_tile *t, int64_t limit) {
    int32_t n = t->n;
    while (n > 0 && t->pos[n - 1] >= limit) n--;
    return n;
}

/* Prefetches the lines that begin in `bytes` bytes from base + offset on, at most 128, into the
 * second level: a phase may be more than the first one holds. */
RF_INLINE void prefetch(const char *base, int offset, int bytes) {
    if (bytes >= 64 || offset % 64 == 0) __builtin_prefetch(base + offset, 0, 2);
    if (bytes > 64) __builtin_prefetch(base + offset + 64, 0, 2);
}

/* Addresses to prefetch while a phase reads its own rows, in the order in which they lie in memory.
 * A phase asks for as many as it reads, and, where it reads keys by blocks of RF_TB, for the rest
 * of its last block: there are always `wanted` + RF_TB of them. */
typedef struct rf_ahead {
    const char *row[RF_TILE * RF_MAX_HEADS + RF_TB];
} rf_ahead;

static void make_ahead(const rf_paged *x, const char *base, int64_t size, const int64_t *off, int n,
                       int heads, int wanted, rf_ahead *a) {
    int32_t m = 0;
    if (x->head_stride < x->token_stride) { /* the heads of a token are neighbours */
        for (int t = 0; t < n; t++)
            for (int h = 0; h < heads; h++)
                a->row[m++] = base + (off[t] + h * x->head_stride) * size;
    } else {
        for (int t = 0; t < n;) {
            int end = t + 1;
            while (end < n && off[end] - off[end - 1] == x->token_stride) end++;
            for (int h = 0; h < heads; h++)
                for (int i = t; i < end; i++)
                    a->row[m++] = base + (off[i] + h * x->head_stride) * size;
            t = end;
        }
    }
    while (m < wanted + RF_TB) a->row[m++] = base;
}

/* The softmax of a tile for `rows` rows of scores with n tokens each, in base 2. Scores become
 * probabilities relative to the new maximum of their row, and alpha the factor for everything that
 * was summed before. All arrays have rf_pad_rows(rows) rows. */
static void softmax_tile(float *scores, int32_t n, int64_t rows, float *max, float *sum,
                         float *alpha, float *work) {
    const int32_t full = (n + RF_W - 1) / RF_W * RF_W;
    const vf none = vf_set1(-INFINITY);
    /* Four rows at a time: their reductions share the shuffles. Rows past the last are scratch. */
    for (int64_t r = 0; r < rows; r += 4) {
        const float *s = scores + r * RF_SCORES;
        vf top[4] = {none, none, none, none};
        for (int32_t i = 0; i < full; i += RF_W)
            for (int j = 0; j < 4; j++) top[j] = vf_max(vf_load(s + j * RF_SCORES + i), top[j]);
        vf_hmax4(top, work + r);
    }
    for (int64_t r = 0; r < rows; r += RF_W) {
        vf old = vf_load(max + r), new = vf_max(vf_load(work + r), old);
        /* Nothing seen yet: any finite shift gives exp2(-inf) = 0, where -inf would give NaN. */
        vf shift = vf_zero_if_equal(new, none);
        vf_store(max + r, new);
        vf_store(alpha + r, vf_exp2(vf_sub(old, shift)));
        vf_store(work + r, shift);
    }
    for (int64_t r = 0; r < rows; r += 4) {
        float *s = scores + r * RF_SCORES;
        vf total[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        for (int32_t i = 0; i < full; i += RF_W)
            for (int j = 0; j < 4; j++) {
                vf e = vf_exp2(vf_sub(vf_load(s + j * RF_SCORES + i), vf_set1(work[r + j])));
                vf_store(s + j * RF_SCORES + i, e);
                total[j] = vf_add(total[j], e);
            }
        vf_hsum4(total, work + r);
    }
    for (int64_t r = 0; r < rows; r += RF_W)
        vf_store(sum + r, vf_fma(vf_load(sum + r), vf_load(alpha + r), vf_load(work + r)));
}

/* See rf_state_floats. */
typedef struct rf_state {
    float *acc, *max, *sum;
} rf_state;

RF_INLINE rf_state state_at(float *base, int64_t rows, int64_t v_dim) {
    float *max = base + rows * v_dim;
    rf_state s = {base, max, max + rf_pad_rows(rows)};
    return s;
}

/* The first tile of a part overwrites acc. */
static void clear_sums(rf_state s, int64_t rows) {
    for (int64_t r = 0; r < rf_pad_rows(rows); r++) {
        s.max[r] = -INFINITY;
        s.sum[r] = 0.0f;
    }
}

static void clear_state(rf_state s, int64_t rows, int64_t v_dim) {
    memset(s.acc, 0, (size_t)(rows * v_dim) * sizeof(float));
    clear_sums(s, rows);
}

RF_INLINE float rf_exp2_of(float x) { return vf_first(vf_exp2(vf_set1(x))); }

/* a = fold(a, b), b being the later part. Rows are padded to v_dim, but written by pairs of
 * vectors. */
static void fold_state(rf_state a, rf_state b, int64_t rows, int64_t v_dim, int64_t v_head_dim) {
    const int64_t pair = 2 * RF_W, used = (v_head_dim + pair - 1) / pair * pair;
    for (int64_t r = 0; r < rows; r++) {
        if (b.max[r] == -INFINITY) continue;
        float top = a.max[r] > b.max[r] ? a.max[r] : b.max[r];
        float fa = rf_exp2_of(a.max[r] - top), fb = rf_exp2_of(b.max[r] - top);
        a.sum[r] = a.sum[r] * fa + b.sum[r] * fb;
        a.max[r] = top;
        float *pa = a.acc + r * v_dim, *pb = b.acc + r * v_dim;
        vf va = vf_set1(fa), vb = vf_set1(fb);
        for (int64_t i = 0; i < used; i += RF_W)
            vf_store(pa + i, vf_fma(vf_load(pb + i), vb, vf_mul(vf_load(pa + i), va)));
    }
}

static int64_t scratch_floats(const rf_attention_params *p, int64_t rows) {
    return rows * rf_pad_dim(p->head_dim) + 2 * rf_state_floats(rows, p->v_head_dim) +
           rf_pad_rows(rows) * (RF_SCORES + 2);
}

#endif
