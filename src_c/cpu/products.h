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

/* The products by blocks of rows, over a whole part of the context, whose keys and values are
 * packed once for all of a task's blocks. Scores are s[row * RF_BLOCK_LD + token], not yet times
 * `factor`.
 */
typedef struct rf_blocks {
    int rows; /* of a task, at most, unless one query token has more */
    void (*pack_keys)(const rf_phase *x, void *keys);
    void (*pack_values)(const rf_phase *x, void *values, int64_t ld);
    /* Of `rows` rows, ldq elements each, with the first n tokens. */
    void (*scores)(const void *q, int64_t ldq, int64_t rows, const void *keys, int n, int dim,
                   float *s);
    /* The first state of a part: max, sum, and probabilities as `values` reads them. -inf is
     * expected from the n-th token to whole pairs of vectors. scale: as for softmax_many. */
    void (*softmax)(float *s, int64_t rows, int n, float factor, float *max, float *sum,
                    const float *scale);
    /* acc = p v. */
    void (*values)(float *acc, int64_t lda, const float *p, int64_t rows, const void *values, int n,
                   int dim);
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
    /* Of tasks with RF_BLOCK_ROWS_FROM rows or more, in blocks of them: see block.h. NULL where the
     * functions above serve those too. */
    const rf_blocks *blocks;
    /* Around all of a task with many rows; or NULL. */
    void (*begin)(void);
    void (*end)(void);
} rf_products;

#endif
