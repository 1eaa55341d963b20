/* Tiles: the tokens whose scores are held at once, where their vectors lie, and what to fetch
 * ahead. */
#ifndef RF_CPU_TILE_H
#define RF_CPU_TILE_H

#include <math.h> /* INFINITY */
#include <string.h>

#include "kernels.h"

#define RF_INLINE static inline __attribute__((always_inline))

/* Addresses, scores or tokens that a block of tokens may write or name past the end of a tile. */
#define RF_SLACK 16

/* Tokens of a context that have a block. */
typedef struct rf_tile {
    int32_t n;
    int32_t pos[RF_MANY_TILE]; /* in the context, ascending */
    int64_t k[RF_MANY_TILE];   /* element offset of the key vector of head 0 */
    int64_t v[RF_MANY_TILE];
    int64_t k_scale[RF_MANY_TILE]; /* offsets of the scales of head 0, where tokens have their own */
    int64_t v_scale[RF_MANY_TILE];
} rf_tile;

RF_INLINE int scales_by_token(const rf_attention_params *p, const rf_scales *s) {
    return p->kv_dtype >= RF_NUM_WIDE_DTYPES && s->data && (s->token_stride || s->block_stride);
}

/* The offsets of `n` tokens of a block from token `offset` on. */
RF_INLINE void offsets(int64_t block, int64_t block_stride, int64_t offset, int64_t token_stride,
                       int64_t n, int64_t *out) {
    int64_t at = block * block_stride + offset * token_stride;
    for (int64_t i = 0; i < n; i++, at += token_stride) out[i] = at;
}

/* Tokens start .. end - 1 of a context. Negative entries of the table are passed over. */
static void make_tile(const rf_attention_params *p, const rf_seq *s, int64_t start, int64_t end,
                      rf_tile *t) {
    const int64_t bs = p->block_size;
    const int k_scales = scales_by_token(p, &p->k_scale), v_scales = scales_by_token(p, &p->v_scale);
    int32_t n = 0;
    for (int64_t pos = start; pos < end;) {
        const int64_t index = pos / bs, offset = pos - index * bs;
        const int64_t stop = (index + 1) * bs < end ? (index + 1) * bs : end, count = stop - pos;
        const int64_t block = s->blocks[index];
        if (block >= 0) {
            offsets(block, p->k.block_stride, offset, p->k.token_stride, count, t->k + n);
            offsets(block, p->v.block_stride, offset, p->v.token_stride, count, t->v + n);
            if (k_scales)
                offsets(block, p->k_scale.block_stride, offset, p->k_scale.token_stride, count,
                        t->k_scale + n);
            if (v_scales)
                offsets(block, p->v_scale.block_stride, offset, p->v_scale.token_stride, count,
                        t->v_scale + n);
            for (int64_t i = 0; i < count; i++) t->pos[n + i] = (int32_t)(pos + i);
            n += (int32_t)count;
        }
        pos = stop;
    }
    t->n = n;
}

/* Tokens of the tile before position `limit`. */
RF_INLINE int32_t tokens_before(const rf_tile *t, int64_t limit) {
    int32_t n = t->n;
    while (n > 0 && t->pos[n - 1] >= limit) n--;
    return n;
}

/* Addresses to prefetch while a phase reads its own vectors, in the order in which they lie in
 * memory. A phase asks for as many as it reads, and for the rest of its last block of tokens. */
typedef struct rf_ahead {
    const char *row[RF_MANY_TILE * RF_MAX_HEADS + RF_SLACK];
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
    while (m < wanted + RF_SLACK) a->row[m++] = base;
}

/* Scales are too few to be worth a place in the order of things. */
static void prefetch_scales(const rf_scales *s, const int64_t *off, int n, int32_t head,
                            int heads) {
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < n; t += 16)
            __builtin_prefetch(s->data + off[t] + (head + h) * s->head_stride, 0, 2);
}

/* Prefetches go into the second level, as a phase may be more than the first one holds. */
RF_INLINE void prefetch_row(const char *row, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}
/* The lines that begin in the i-th `step` bytes of rows that follow one another, row_bytes each, a
 * multiple of 64. Line after line between the arithmetic, as the memory likes it. */
RF_INLINE void prefetch_step(const char *const *rows, int i, int step, int row_bytes) {
    for (int at = (i * step + 63) / 64 * 64; at < (i + 1) * step; at += 64)
        __builtin_prefetch(rows[at / row_bytes] + at % row_bytes, 0, 2);
}

/* One phase of a tile and head: vectors to be read, and addresses to prefetch meanwhile. */
typedef struct rf_phase {
    const char *base;         /* of the head */
    const int64_t *off;       /* of each token, in elements */
    const char *const *ahead; /* one a token, n + RF_SLACK of them */
    int n;                    /* tokens, at least 1 */
    int dim;                  /* elements of a vector */
} rf_phase;

#endif
