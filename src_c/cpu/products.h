/* The two products of attention for a type of query and of cache: what differs most between
 * instruction sets, and all that the ones for bfloat16 have of their own. */
#ifndef RF_CPU_PRODUCTS_H
#define RF_CPU_PRODUCTS_H

#include <stdint.h>

/* What to fetch while a phase reads its own vectors: as many, and RF_SLACK more, at other places.
 * NULL: nothing. */
typedef const char *const *rf_ahead;

/* One phase of a tile and head: vectors to be read, and what to fetch meanwhile. */
typedef struct rf_phase {
    const char *base;   /* of the head */
    const int64_t *off; /* of each token, in elements */
    rf_ahead ahead;
    int n;   /* tokens, at least 1 */
    int dim; /* elements of a vector */
} rf_phase;

/* A block of RF_BLOCK_ROWS rows, and the n tokens of a part that one of them sees. Scores are
 * s[row * RF_BLOCK_LD + token], not yet times `factor`; -inf from n on to whole pairs of vectors.
 */
typedef struct rf_block {
    const void *q; /* rows of queries */
    float *s;
    float *acc, *max, *sum; /* its state */
    float factor;
    int n;
} rf_block;

/* A head's part of the context. */
typedef struct rf_part {
    void *keys, *values; /* packed, as wide as queries are */
    const float *scale;  /* factors of each token's values, or NULL */
    int64_t ldq, lda;    /* elements from one row of queries to the next, and of sums */
    int dim, v_dim;
} rf_part;

/* The products by blocks of rows, over a whole part of the context, whose keys and values are
 * packed once for all blocks of a task. */
typedef struct rf_blocks {
    int rows; /* of a task, at most, unless one query token has more */
    void (*pack)(const rf_phase *k, const rf_phase *v, const rf_part *x);
    /* What can be done at the same time for three blocks that follow each other: the values of the
     * first, which end its state; the softmax of the second; the scores of the third. Each may be
     * NULL. The third may have the first one's place for scores. */
    void (*run)(const rf_part *x, const rf_block *first, const rf_block *second,
                const rf_block *third);
} rf_blocks;

/* Rows of queries are query_size bytes an element, and a tile's scores have one of the two forms in
 * softmax.h. */
typedef struct rf_products {
    int query_size;
    int chunk; /* elements that a row of queries and of sums is padded to */
    float one; /* what an element that is 1 is read as, a power of two */
    /* One query as a row, zero to the end of its last chunk. */
    void (*query)(const void *query, int dim, void *row);
    void (*scores_few)(const void *q, int64_t ldq, const rf_phase *x, int64_t rows, float factor,
                       float *s);
    void (*scores_many)(const void *q, int64_t ld, const rf_phase *x, float factor, float *s,
                        void *work);
    /* softmax_many of softmax.h: probabilities as values_many reads them. */
    void (*softmax_many)(float *s, int64_t ld, int n, float *max, float *sum, float *alpha,
                         const float *scale);
    /* acc = acc * alpha + p v; alpha NULL: acc = p v. p is scratch afterwards. */
    void (*values_few)(float *acc, int64_t lda, const float *alpha, float *p, const rf_phase *x,
                       int64_t rows, void *work);
    void (*values_many)(float *acc, int64_t lda, const float *alpha, float *p, int64_t ld,
                        const rf_phase *x, int64_t rows, void *work);
    /* f times a row of sums, as the output's type. */
    void (*finish)(const float *acc, int dim, float f, void *out);
    /* Of tasks with RF_BLOCK_ROWS_FROM rows or more, in blocks of them; NULL where the
     * functions above serve those too. */
    const rf_blocks *blocks;
    /* Around all of a task with many rows; or NULL. */
    void (*begin)(void);
    void (*end)(void);
} rf_products;

#endif
