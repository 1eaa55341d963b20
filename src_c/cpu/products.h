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
    /* Around all of a task with many rows; or NULL. */
    void (*begin)(void);
    void (*end)(void);
} rf_products;

#endif
