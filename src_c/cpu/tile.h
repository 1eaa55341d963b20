/* Tiles: the tokens whose scores are held at once, where their vectors lie, and what to fetch
 * ahead. */
#ifndef RF_CPU_TILE_H
#define RF_CPU_TILE_H

#include "phase.h"

/* Tokens of a context that have a block. The offsets are of head 0, in elements, and go on with
 * that of the last token to the end of the arrays' use: blocks of tokens read past the end, and
 * what is fetched ahead may be for a longer tile. */
typedef struct rf_tile {
    int32_t n;
    int32_t pos[RF_PART]; /* in the context, ascending */
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
    if (t->pos[n - 1] - t->pos[0] == n - 1) { /* nothing was passed over */
        const int64_t before = limit - t->pos[0];
        return before < 0 ? 0 : before < n ? (int32_t)before : n;
    }
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

/* The vectors of a phase, to be fetched: in the order in which they lie in memory, but from so many
 * places of it in turn, each a part of the whole.
 *
 * Learnt on Zen 4 by bare reads: the order of memory is worth a tenth against the order of use (a
 * head's tokens, then the next head's), and prefetches into the second level a third; into the
 * first level they gain nothing, at any distance.
 * On a Xeon with AMX a core has 16 requests of its own in flight, and the processor's prefetching
 * brings what comes behind each place that is read. Where arithmetic leaves the core less time to
 * ask, one place is not enough: a loop that reads what it fetched before, with 16 multiply-adds of
 * vectors a line, got 11.0 to 11.7 GB/s from one place, 12.5 to 13.3 from two, 13.2 to 14.7 from
 * four, where memory gives 13.6 to 14.9 and the caches 24. Decode of 8 x 2,048 on one thread took
 * 0.76 (int8) to 0.89 (float32) of the time from four places, as much from eight, 0.87 to 0.92
 * from two. Places were not tried on Zen 4.
 * Where a page of 4 KiB is translated anew, a bare read gains 5 to 12% from asking for a line of
 * each page before it asks for the rest. Here that lost: 12 to 18% where the pages of a phase were
 * asked for in the phase before, all at once or some with each head, and nothing was gained or lost
 * with each place's next page a head before; the list of pages alone took 3%. */
#define RF_STREAMS 4
typedef struct rf_rows_ahead {
    const char *row[RF_MANY_TILE * RF_MAX_HEADS + RF_SLACK];
} rf_rows_ahead;

static void make_ahead(const rf_paged *x, const char *base, int size, const int64_t *off, int n,
                       int heads, int wanted, rf_rows_ahead *a) {
    const char *rows[RF_MANY_TILE * RF_MAX_HEADS + RF_STREAMS];
    int m = 0;
    if (x->head_stride < x->token_stride) { /* the heads of a token are neighbours */
        for (int t = 0; t < n; t++)
            for (int h = 0; h < heads; h++) rows[m++] = base + (off[t] + h * x->head_stride) * size;
    } else {
        for (int t = 0; t < n;) {
            int end = t + 1;
            while (end < n && off[end] - off[end - 1] == x->token_stride) end++;
            for (int h = 0; h < heads; h++)
                for (int i = t; i < end; i++)
                    rows[m++] = base + (off[i] + h * x->head_stride) * size;
            t = end;
        }
    }
    while (m % RF_STREAMS) rows[m++] = base;
    const int each = m / RF_STREAMS;
    for (int i = 0; i < each; i++)
        for (int j = 0; j < RF_STREAMS; j++) a->row[i * RF_STREAMS + j] = rows[j * each + i];
    while (m < wanted + RF_SLACK) a->row[m++] = base;
}

#endif
