/* The two products in float32, for one storage type T: included once for each by fma.h.
 *
 * With few rows a head: scores by blocks of RF_RB rows x RF_TB tokens whose lanes are elements of a
 * key, and sums by blocks of RF_RB rows x 4 vectors. Elements are converted as they are read, once,
 * as all rows are in a block. With many rows a tile is converted first (widen), or a part of the
 * context packed (pack), and the products are those of float32. */

/* Scores of rb rows with RF_TB tokens; u: which block of the tile. fixed: dim is known when
 * compiling, a multiple of 4 vectors. */
RF_INLINE void NAME(qk_block)(const float *q, int64_t ldq, const T *const k[RF_TB], rf_ahead ahead,
                              int u, int dim, int fixed, int rb, vf factor, float *s) {
    vf acc[RF_RB][RF_TB];
    for (int r = 0; r < rb; r++)
        for (int t = 0; t < RF_TB; t++) acc[r][t] = vf_zero();
    const int bytes = dim * (int)sizeof(T);
    if (ahead && !fixed)
        for (int t = 0; t < RF_TB; t++) prefetch_vector(ahead, u * RF_TB + t, dim * (int)sizeof(T));
    for (int c = 0; c < dim; c += 2 * RF_W) {
        vf ka[RF_TB], kb[RF_TB];
#pragma GCC unroll 8
        for (int t = 0; t < RF_TB; t++) {
            if (dim - c >= 2 * RF_W) rf_ld2(k[t] + c, &ka[t], &kb[t]);
            else rf_ld2_part(k[t] + c, dim - c, &ka[t], &kb[t]);
            if (ahead && fixed)
                prefetch_step(ahead, (u * (dim / (2 * RF_W)) + c / (2 * RF_W)) * RF_TB + t,
                              2 * RF_W * (int)sizeof(T), bytes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rb; r++) {
            vf qa = vf_load(q + r * ldq + c), qb = vf_load(q + r * ldq + c + RF_W);
#pragma GCC unroll 8
            for (int t = 0; t < RF_TB; t++) acc[r][t] = vf_fma(qa, ka[t], acc[r][t]);
#pragma GCC unroll 8
            for (int t = 0; t < RF_TB; t++) acc[r][t] = vf_fma(qb, kb[t], acc[r][t]);
        }
    }
    rf_reduce(acc, rb, factor, s + u * RF_TB, RF_FEW_LD);
}

RF_INLINE void NAME(qk_tokens)(const float *q, int64_t ldq, rf_phase x, rf_ahead ahead, int dim,
                               int fixed, int rb, vf factor, float *s) {
    for (int t = 0; t < x.n; t += RF_TB) {
        const T *k[RF_TB];
        if (ahead) prefetch_own(&x, t + RF_TB, RF_TB, (int)sizeof(T));
        for (int i = 0; i < RF_TB; i++) /* past the end: scores nobody reads */
            k[i] = (const T *)x.base + x.off[t + i];
        NAME(qk_block)(q, ldq, k, ahead, t / RF_TB, dim, fixed, rb, factor, s);
    }
}

/* The first block of rows prefetches, the others find the keys in the cache. */
RF_INLINE void NAME(qk_rows)(const float *q, int64_t ldq, rf_phase x, int dim, int fixed,
                             int64_t rows, vf factor, float *s) {
    rf_ahead ahead = x.ahead;
    int64_t r = 0;
    for (; r + RF_RB <= rows; r += RF_RB, ahead = NULL)
        NAME(qk_tokens)(q + r * ldq, ldq, x, ahead, dim, fixed, RF_RB, factor, s + r * RF_FEW_LD);
    q += r * ldq;
    s += r * RF_FEW_LD;
    switch (rows - r) {
    case 1: NAME(qk_tokens)(q, ldq, x, ahead, dim, fixed, 1, factor, s); break;
    case 2: NAME(qk_tokens)(q, ldq, x, ahead, dim, fixed, 2, factor, s); break;
    case 3: NAME(qk_tokens)(q, ldq, x, ahead, dim, fixed, 3, factor, s); break;
    default: break;
    }
}

/* The common head sizes get loops of known length, where that is worth its time to compile. */
static void NAME(qk_few)(const void *query, int64_t ldq, const rf_phase *x, int64_t rows,
                         float factor, float *s) {
    const float *q = query;
    const vf f = vf_set1(factor);
    switch (RF_KNOWN_DIM(T, x->dim)) {
    case 64: NAME(qk_rows)(q, ldq, *x, 64, 1, rows, f, s); break;
    case 128: NAME(qk_rows)(q, ldq, *x, 128, 1, rows, f, s); break;
    default: NAME(qk_rows)(q, ldq, *x, x->dim, 0, rows, f, s); break;
    }
}

/* acc = acc * alpha + p v (p v for alpha NULL) for rb rows and `pairs` pairs of vectors from
 * element c on; the last may be a part. Probabilities: p[row * rs + token * ts]. */
RF_INLINE void NAME(pv_block)(float *acc, int64_t lda, const float *alpha, const float *p,
                              int64_t rs, int64_t ts, rf_phase x, rf_ahead ahead, int dim,
                              int fixed, int c, int pairs, int part, int rb) {
    vf a[RF_RB][4];
    acc += c;
#pragma GCC unroll 8
    for (int r = 0; r < rb; r++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * pairs; j++)
            a[r][j] =
                alpha ? vf_mul(vf_load(acc + r * lda + j * RF_W), vf_set1(alpha[r])) : vf_zero();
    const int step = 4 * RF_W * (int)sizeof(T), bytes = dim * (int)sizeof(T);
    for (int t = 0; t < x.n; t++) {
        const T *row = (const T *)x.base + x.off[t] + c;
        vf v[4];
#pragma GCC unroll 8
        for (int j = 0; j < pairs; j++) {
            if (part && j == pairs - 1)
                rf_ld2_part(row + j * 2 * RF_W, part, &v[2 * j], &v[2 * j + 1]);
            else rf_ld2(row + j * 2 * RF_W, &v[2 * j], &v[2 * j + 1]);
        }
        if (ahead && c == 0) prefetch_own(&x, t + 4, 1, (int)sizeof(T));
        if (ahead && fixed) prefetch_step(ahead, c / (4 * RF_W) * x.n + t, step, bytes);
        else if (ahead && c == 0) prefetch_vector(ahead, t, dim * (int)sizeof(T));
#pragma GCC unroll 8
        for (int r = 0; r < rb; r++) {
            vf pr = vf_set1(p[r * rs + t * ts]);
#pragma GCC unroll 8
            for (int j = 0; j < 2 * pairs; j++) a[r][j] = vf_fma(pr, v[j], a[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rb; r++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * pairs; j++) vf_store(acc + r * lda + j * RF_W, a[r][j]);
}

RF_INLINE void NAME(pv_dims)(float *acc, int64_t lda, const float *alpha, const float *p,
                             int64_t rs, int64_t ts, rf_phase x, rf_ahead ahead, int dim, int fixed,
                             int rb) {
    int c = 0;
    for (; c + 4 * RF_W <= dim; c += 4 * RF_W)
        NAME(pv_block)(acc, lda, alpha, p, rs, ts, x, ahead, dim, fixed, c, 2, 0, rb);
    int left = dim - c, part = left % (2 * RF_W);
    if (left > 2 * RF_W)
        NAME(pv_block)(acc, lda, alpha, p, rs, ts, x, ahead, dim, 0, c, 2, part, rb);
    else if (left) NAME(pv_block)(acc, lda, alpha, p, rs, ts, x, ahead, dim, 0, c, 1, part, rb);
}

RF_INLINE void NAME(pv_rows)(float *acc, int64_t lda, const float *alpha, const float *p,
                             int64_t rs, int64_t ts, rf_phase x, int dim, int fixed, int64_t rows) {
    rf_ahead ahead = x.ahead;
    int64_t r = 0;
    for (; r + RF_RB <= rows; r += RF_RB, ahead = NULL)
        NAME(pv_dims)(acc + r * lda, lda, alpha ? alpha + r : NULL, p + r * rs, rs, ts, x, ahead,
                      dim, fixed, RF_RB);
    acc += r * lda;
    if (alpha) alpha += r;
    p += r * rs;
    switch (rows - r) {
    case 1: NAME(pv_dims)(acc, lda, alpha, p, rs, ts, x, ahead, dim, fixed, 1); break;
    case 2: NAME(pv_dims)(acc, lda, alpha, p, rs, ts, x, ahead, dim, fixed, 2); break;
    case 3: NAME(pv_dims)(acc, lda, alpha, p, rs, ts, x, ahead, dim, fixed, 3); break;
    default: break;
    }
}

static void NAME(pv)(float *acc, int64_t lda, const float *alpha, const float *p, int64_t rs,
                     int64_t ts, const rf_phase *x, int64_t rows) {
    switch (RF_KNOWN_DIM(T, x->dim)) {
    case 64: NAME(pv_rows)(acc, lda, alpha, p, rs, ts, *x, 64, 1, rows); break;
    case 128: NAME(pv_rows)(acc, lda, alpha, p, rs, ts, *x, 128, 1, rows); break;
    default: NAME(pv_rows)(acc, lda, alpha, p, rs, ts, *x, x->dim, 0, rows); break;
    }
}

static void NAME(pv_few)(float *acc, int64_t lda, const float *alpha, float *p, const rf_phase *x,
                         int64_t rows, void *work) {
    (void)work;
    NAME(pv)(acc, lda, alpha, p, RF_FEW_LD, 1, x, rows);
}

/* Two vectors of elements, of which n exist. */
RF_INLINE void NAME(two)(const T *from, int n, float *to) {
    vf a, b;
    if (n >= 2 * RF_W) rf_ld2(from, &a, &b);
    else rf_ld2_part(from, n, &a, &b);
    vf_store(to, a);
    vf_store(to + RF_W, b);
}

#ifdef RF_IS_FLOAT
static void NAME(qk_many)(const void *query, int64_t ld, const rf_phase *x, float factor, float *s,
                          void *work) {
    (void)work;
    scores_of_many(query, ld, x, factor, s);
}

static void NAME(pv_many)(float *acc, int64_t lda, const float *alpha, float *p, int64_t ld,
                          const rf_phase *x, int64_t rows, void *work) {
    (void)work;
    NAME(pv)(acc, lda, alpha, p, 1, ld, x, rows);
}
#else
/* The vectors of a tile as float32, ld floats from one to the next. */
static void NAME(widen)(const rf_phase *x, float *out, int64_t ld) {
    for (int t = 0; t < x->n; t++) {
        const T *row = (const T *)x->base + x->off[t];
        float *to = out + t * ld;
        if (x->ahead) prefetch_vector(x->ahead, t, x->dim * (int)sizeof(T));
        for (int c = 0; c < x->dim; c += 2 * RF_W) NAME(two)(row + c, x->dim - c, to + c);
    }
}

/* The order of elements within a vector may be the type's own: whole pairs of vectors count. */
static void NAME(qk_many)(const void *query, int64_t ld, const rf_phase *x, float factor, float *s,
                          void *work) {
    const int dim = (x->dim + 2 * RF_W - 1) / (2 * RF_W) * (2 * RF_W);
    rf_wide w;
    NAME(widen)(x, work, rf_pad_dim(x->dim));
    widened(&w, x, work, rf_pad_dim(x->dim), dim);
    scores_of_many(query, ld, &w.phase, factor, s);
}

static void NAME(pv_many)(float *acc, int64_t lda, const float *alpha, float *p, int64_t ld,
                          const rf_phase *x, int64_t rows, void *work) {
    const int dim = (x->dim + 2 * RF_W - 1) / (2 * RF_W) * (2 * RF_W);
    rf_wide w;
    NAME(widen)(x, work, rf_pad_dim(x->dim));
    widened(&w, x, work, rf_pad_dim(x->dim), dim);
    pv_f32(acc, lda, alpha, p, 1, ld, &w.phase, rows);
}
#endif

/* Keys as panels of columns, values as panels of rows. Past the end keys are the last token. */
static void NAME(pack)(const rf_phase *k, const rf_phase *v, const rf_part *x) {
    for (int t = 0; t < panels(k->n) * RF_PANEL; t += RF_W) {
        float *const to = (float *)x->keys + t / RF_PANEL * RF_PANEL * x->ldq + t % RF_PANEL;
        for (int c = 0; c < k->dim; c += RF_PANEL) {
            _Alignas(64) float rows[RF_W * RF_PANEL];
            for (int i = 0; i < RF_W; i++) {
                const int64_t at = k->off[t + i < k->n ? t + i : k->n - 1] + c;
                NAME(two)((const T *)k->base + at, k->dim - c, rows + i * RF_PANEL);
            }
            rf_transpose(rows, RF_PANEL, to + c * RF_PANEL, RF_PANEL);
            rf_transpose(rows + RF_W, RF_PANEL, to + (c + RF_W) * RF_PANEL, RF_PANEL);
        }
    }
    for (int t = 0; t < v->n; t++)
        for (int c = 0; c < v->dim; c += RF_PANEL)
            NAME(two)((const T *)v->base + v->off[t] + c, v->dim - c,
                      (float *)x->values + c * RF_PART + t * RF_PANEL);
}
static const rf_blocks NAME(blocks) = {.rows = 256, .pack = NAME(pack), .run = run_blocks};

#undef RF_IS_FLOAT
#undef T
#undef NAME
#undef rf_ld2
#undef rf_ld2_part
