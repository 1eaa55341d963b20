/* Few rows, by four, over heads of 64, 128 or another number of elements: what is around
 * NAME(qk_block) and NAME(pv_block) of dot.inc.h and of table.inc.h, which include it after them,
 * with the types of queries, of probabilities and of the cache: RF_QUERY, RF_PROBABILITY, T. */

RF_INLINE void NAME(qk_tokens)(const RF_QUERY *q, int64_t ldq, const rf_phase *x, rf_ahead ahead,
                               int dim, int fixed, int rb, vf factor, float *s) {
    const rf_table table = table_of(RF_TABLE);
    for (int t = 0; t < x->n; t += 4) {
        const T *k[4];
        if (ahead) prefetch_own(x, t + 4, 4, (int)sizeof(T));
        for (int i = 0; i < 4; i++) /* past the end: scores nobody reads */
            k[i] = (const T *)x->base + x->off[t + i];
        NAME(qk_block)(&table, q, ldq, k, ahead, t / 4, dim, fixed, rb, factor, s);
    }
}

/* The first block of rows prefetches, the others find the keys in the cache. */
RF_INLINE void NAME(qk_rows)(const RF_QUERY *q, int64_t ldq, const rf_phase *x, int dim, int fixed,
                             int64_t rows, vf factor, float *s) {
    rf_ahead ahead = x->ahead;
    for (int64_t r = 0; r < rows; r += 4, ahead = NULL, q += 4 * ldq, s += 4 * RF_FEW_LD)
        switch (rows - r) {
        case 1: NAME(qk_tokens)(q, ldq, x, ahead, dim, fixed, 1, factor, s); break;
        case 2: NAME(qk_tokens)(q, ldq, x, ahead, dim, fixed, 2, factor, s); break;
        case 3: NAME(qk_tokens)(q, ldq, x, ahead, dim, fixed, 3, factor, s); break;
        default: NAME(qk_tokens)(q, ldq, x, ahead, dim, fixed, 4, factor, s); break;
        }
}

static void NAME(qk_few)(const void *query, int64_t ldq, const rf_phase *x, int64_t rows,
                         float factor, float *s) {
    const RF_QUERY *q = query;
    const vf f = vf_set1(factor);
    switch (x->dim) {
    case 64: NAME(qk_rows)(q, ldq, x, 64, 1, rows, f, s); break;
    case 128: NAME(qk_rows)(q, ldq, x, 128, 1, rows, f, s); break;
    default: NAME(qk_rows)(q, ldq, x, x->dim, 0, rows, f, s); break;
    }
}

RF_INLINE void NAME(pv_rows)(float *acc, int64_t lda, const float *alpha, const RF_PROBABILITY *p,
                             const rf_phase *x, int dim, int fixed, int64_t rows) {
    for (int64_t r = 0; r < rows; r += 4) {
        rf_ahead ahead = r ? NULL : x->ahead;
        const float *factor = alpha ? alpha + r : NULL;
        float *to = acc + r * lda;
        const RF_PROBABILITY *pr = p + r * RF_FEW_LD;
        for (int c = 0; c < dim; c += 64) switch (rows - r) {
            case 1: NAME(pv_block)(to, lda, factor, pr, x, ahead, dim, fixed, c, 1); break;
            case 2: NAME(pv_block)(to, lda, factor, pr, x, ahead, dim, fixed, c, 2); break;
            case 3: NAME(pv_block)(to, lda, factor, pr, x, ahead, dim, fixed, c, 3); break;
            default: NAME(pv_block)(to, lda, factor, pr, x, ahead, dim, fixed, c, 4); break;
            }
    }
}

/* p: rows of probabilities, RF_FEW_LD apart. */
static void NAME(pv_dims)(float *acc, int64_t lda, const float *alpha, const void *p,
                          const rf_phase *x, int64_t rows) {
    switch (x->dim) {
    case 64: NAME(pv_rows)(acc, lda, alpha, p, x, 64, 1, rows); break;
    case 128: NAME(pv_rows)(acc, lda, alpha, p, x, 128, 1, rows); break;
    default: NAME(pv_rows)(acc, lda, alpha, p, x, x->dim, 0, rows); break;
    }
}

#undef RF_QUERY
#undef RF_PROBABILITY
