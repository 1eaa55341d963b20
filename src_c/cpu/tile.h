/* Tiles: the tokens whose scores are held at once, where their vectors lie, and what to fetch
 * ahead. */
#ifndef RF_CPU_TILE_H
#define RF_CPU_TILE_H

#include <math.h> /* INFINITY */
#include <string.h>

#include "kernels.h"

#define RF_INLINE static inline __attribute__((always_inline))

/* Addresses, scores or tokens that a block of tokens may write or name past the end of a tile. */
#define RF_SLACK       16
#define RF_TILE_TOKENS (RF_MANY_TILE + RF_SLACK)

/* Tokens of a context that have a block. The offsets are of head 0, in elements, and go on with
 * that of the last token to the end of the arrays' use: blocks of tokens read past the end, and
 * what is fetched ahead may be for a longer tile. */
typedef struct rf_tile {
    int32_t n;
    int32_t pos[RF_MANY_TILE]; /* in the context, ascending */
    int64_t k[RF_TILE_TOKENS];
    int64_t v[RF_TILE_TOKENS];
    int64_t k_scale[RF_TILE_TOKENS]; /* where tokens have scales of their own */
    int64_t v_scale[RF_TILE_TOKENS];
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

/* Tokens start .. end - 1 of a context, at most `length`, which is that of the longest tile.
 * Negative entries of the table are passed over. */
static void make_tile(const rf_attention_params *p, const rf_seq *s, int64_t start, int64_t end,
                      int64_t length, rf_tile *t) {
    const int64_t bs = p->block_size;
    const int k_scales = scales_by_token(p, &p->k_scale),
              v_scales = scales_by_token(p, &p->v_scale);
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
    for (int32_t i = n; i < length + RF_SLACK; i++) {
        t->k[i] = n ? t->k[n - 1] : 0;
        t->v[i] = n ? t->v[n - 1] : 0;
    }
}

/* Tokens of the tile before position `limit`. */
RF_INLINE int32_t tokens_before(const rf_tile *t, int64_t limit) {
    int32_t n = t->n;
    while (n > 0 && t->pos[n - 1] >= limit) n--;
    return n;
}

/* Scales are too few to be worth a place in the order of things. */
static void prefetch_scales(const rf_scales *s, const int64_t *off, int n, int32_t head,
                            int heads) {
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < n; t += 16)
            __builtin_prefetch(s->data + off[t] + (head + h) * s->head_stride, 0, 2);
}

/* What to fetch while a phase reads its own vectors: as many, at other places. base NULL: nothing.
 */
typedef struct rf_ahead {
    const char *base;
    const int64_t *off; /* of each token, in elements */
    int n;              /* tokens from the first one; the others are for whoever comes after */
} rf_ahead;

/* How far ahead, in bytes: on Zen 4 a bare read in the order of the phases (tokens of a tile, head
 * after head) has 12 GB/s with no prefetch, 21 from 2 KiB ahead, and 23 from 8 to 64 KiB.
 * Prefetches go into the second level: into the first one, 15 to 17 at any distance. */
#define RF_AHEAD_BYTES 16384

/* The vectors of token t. */
RF_INLINE void prefetch_vector(const rf_ahead *a, int t, int size, int dim) {
    const char *p = a->base + a->off[t] * size;
    for (int at = 0; at < dim * size; at += 64) __builtin_prefetch(p + at, 0, 2);
}
/* The lines that begin in the i-th `step` bytes of the vectors one after another, row_bytes each, a
 * multiple of 64. Line after line between the arithmetic, as the memory likes it. */
RF_INLINE void prefetch_step(const rf_ahead *a, int i, int step, int size, int row_bytes) {
    const unsigned from = (unsigned)(i * step), bytes = (unsigned)row_bytes;
    if (step < 64 && from % 64) return;
#pragma GCC unroll 16
    for (unsigned at = 0; at < (unsigned)step; at += 64)
        __builtin_prefetch(a->base + a->off[(from + at) / bytes] * size + (from + at) % bytes, 0,
                           2);
}

/* Where keys are read element by element for tb tokens at once, from token `first` on: a line of
 * some of the vectors at each element, so that all are fetched by the end and none in a burst. */
RF_INLINE void prefetch_element(const rf_ahead *a, int first, int tb, int element, int size) {
    const int line = 64 / size, every = line / 4; /* elements of a line; between two fetches */
    if (element % every) return;
    const int from = element % line / every * tb / 4, to = (element % line / every + 1) * tb / 4;
    for (int t = from; t < to; t++)
        __builtin_prefetch(a->base + (a->off[first + t] + element / line * line) * size, 0, 2);
}

/* One phase of a tile and head: vectors to be read, and what to fetch meanwhile. */
typedef struct rf_phase {
    const char *base;   /* of the head */
    const int64_t *off; /* of each token, in elements */
    rf_ahead ahead;
    int n;   /* tokens, at least 1 */
    int dim; /* elements of a vector */
} rf_phase;

#endif
