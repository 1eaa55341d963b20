/* Attention for one storage type T: included once for each by variant.c.
 *
 * A task holds R rows (query tokens x group) for each of its key/value heads. Per tile of tokens
 * and head: scores = q.k by blocks of RF_RB rows x RF_TB tokens, then the softmax of each row, then
 * acc += p v by blocks of RF_RB rows x 4 vectors. Everything but keys and values is float32 and
 * stays in the first-level cache.
 */

/* Scores of rb rows with RF_TB tokens. `ahead`: one address to prefetch a token, as long as a key,
 * or NULL. fixed: dim is a constant and a multiple of 4 vectors. */
RF_INLINE void NAME(qk_block)(const float *q, int64_t ldq, const T *const k[RF_TB],
                              const char *const *ahead, int dim, int fixed, int rb, float *s,
                              int64_t lds) {
    vf acc[RF_RB][RF_TB];
    for (int r = 0; r < rb; r++)
        for (int t = 0; t < RF_TB; t++) acc[r][t] = vf_zero();
    const int bytes = 2 * RF_W * (int)sizeof(T); /* of a row, in each step */
    const int per_row = fixed ? dim / (2 * RF_W) : 0;
    for (int c = 0; c < dim; c += 2 * RF_W) {
        vf ka[RF_TB], kb[RF_TB];
#pragma GCC unroll 8
        for (int t = 0; t < RF_TB; t++) {
            if (dim - c >= 2 * RF_W) rf_ld2(k[t] + c, &ka[t], &kb[t]);
            else rf_ld2_part(k[t] + c, dim - c, &ka[t], &kb[t]);
            if (ahead && per_row) { /* line after line, as the memory likes it */
                int u = c / (2 * RF_W) * RF_TB + t;
                prefetch(ahead[u / per_row], u % per_row * bytes, bytes);
            } else if (ahead) prefetch(ahead[t], c / (2 * RF_W) * bytes, bytes);
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
    rf_reduce(acc, rb, s, lds);
}

RF_INLINE void NAME(qk_tokens)(const float *q, int64_t ldq, const T *k, const int64_t *off, int n,
                               const char *const *ahead, int dim, int fixed, int rb, float *s,
                               int64_t lds) {
    for (int t = 0; t < n; t += RF_TB) {
        const T *kp[RF_TB];
        for (int i = 0; i < RF_TB; i++)
            kp[i] = k + off[t + i < n ? t + i : n - 1]; /* past the end: scores nobody reads */
        NAME(qk_block)(q, ldq, kp, ahead ? ahead + t : NULL, dim, fixed, rb, s + t, lds);
    }
}

/* The first block of rows prefetches, the others find the keys in the cache. */
RF_INLINE void NAME(qk_rows)(const float *q, int64_t ldq, const T *k, const int64_t *off, int n,
                             const char *const *ahead, int dim, int fixed, int64_t rows, float *s,
                             int64_t lds) {
    int64_t r = 0;
    if (rows >= RF_RB) {
        NAME(qk_tokens)(q, ldq, k, off, n, ahead, dim, fixed, RF_RB, s, lds);
        for (r = RF_RB; r + RF_RB <= rows; r += RF_RB)
            NAME(qk_tokens)(q + r * ldq, ldq, k, off, n, NULL, dim, fixed, RF_RB, s + r * lds, lds);
        ahead = NULL;
    }
    q += r * ldq;
    s += r * lds;
    switch (rows - r) {
    case 1: NAME(qk_tokens)(q, ldq, k, off, n, ahead, dim, fixed, 1, s, lds); break;
    case 2: NAME(qk_tokens)(q, ldq, k, off, n, ahead, dim, fixed, 2, s, lds); break;
    case 3: NAME(qk_tokens)(q, ldq, k, off, n, ahead, dim, fixed, 3, s, lds); break;
    default: break;
    }
}

/* The common head sizes get loops of known length. */
static void NAME(qk)(const float *q, int64_t ldq, const T *k, const int64_t *off, int n,
                     const char *const *ahead, int dim, int64_t rows, float *s, int64_t lds) {
    switch (dim) {
    case 64: NAME(qk_rows)(q, ldq, k, off, n, ahead, 64, 1, rows, s, lds); break;
    case 128: NAME(qk_rows)(q, ldq, k, off, n, ahead, 128, 1, rows, s, lds); break;
    default: NAME(qk_rows)(q, ldq, k, off, n, ahead, dim, 0, rows, s, lds); break;
    }
}

/* acc = acc * alpha + p v (p v for alpha NULL) for rb rows and `pairs` pairs of vectors from
 * element c on; the last may be a part. */
RF_INLINE void NAME(pv_block)(float *acc, int64_t lda, const float *alpha, const float *s,
                              int64_t lds, const T *v, const int64_t *off, int n,
                              const char *const *ahead, int dim, int fixed, int c, int pairs,
                              int part, int rb) {
    vf a[RF_RB][4];
    acc += c;
#pragma GCC unroll 8
    for (int r = 0; r < rb; r++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * pairs; j++)
            a[r][j] =
                alpha ? vf_mul(vf_load(acc + r * lda + j * RF_W), vf_set1(alpha[r])) : vf_zero();
    const int bytes = 2 * RF_W * (int)sizeof(T);
    const int per_row = fixed ? dim / (4 * RF_W) : 0, first = c / (4 * RF_W) * n;
    for (int t = 0; t < n; t++) {
        const T *row = v + off[t] + c;
        vf x[4];
#pragma GCC unroll 8
        for (int j = 0; j < pairs; j++) {
            if (part && j == pairs - 1)
                rf_ld2_part(row + j * 2 * RF_W, part, &x[2 * j], &x[2 * j + 1]);
            else rf_ld2(row + j * 2 * RF_W, &x[2 * j], &x[2 * j + 1]);
            if (ahead && per_row)
                prefetch(ahead[(first + t) / per_row], ((first + t) % per_row * 2 + j) * bytes,
                         bytes);
            else if (ahead) prefetch(ahead[t], (c / (2 * RF_W) + j) * bytes, bytes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rb; r++) {
            vf pr = vf_set1(s[r * lds + t]);
#pragma GCC unroll 8
            for (int j = 0; j < 2 * pairs; j++) a[r][j] = vf_fma(pr, x[j], a[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rb; r++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * pairs; j++) vf_store(acc + r * lda + j * RF_W, a[r][j]);
}

RF_INLINE void NAME(pv_dims)(float *acc, int64_t lda, const float *alpha, const float *s,
                             int64_t lds, const T *v, const int64_t *off, int n,
                             const char *const *ahead, int dim, int fixed, int rb) {
    int c = 0;
    for (; c + 4 * RF_W <= dim; c += 4 * RF_W)
        NAME(pv_block)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, fixed, c, 2, 0, rb);
    int left = dim - c, part = left % (2 * RF_W);
    if (left > 2 * RF_W)
        NAME(pv_block)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, 0, c, 2, part, rb);
    else if (left)
        NAME(pv_block)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, 0, c, 1, part, rb);
}

RF_INLINE void NAME(pv_rows)(float *acc, int64_t lda, const float *alpha, const float *s,
                             int64_t lds, const T *v, const int64_t *off, int n,
                             const char *const *ahead, int dim, int fixed, int64_t rows) {
    int64_t r = 0;
    if (rows >= RF_RB) {
        NAME(pv_dims)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, fixed, RF_RB);
        for (r = RF_RB; r + RF_RB <= rows; r += RF_RB)
            NAME(pv_dims)(acc + r * lda, lda, alpha ? alpha + r : NULL, s + r * lds, lds, v, off, n,
                          NULL, dim, fixed, RF_RB);
        ahead = NULL;
    }
    acc += r * lda;
    if (alpha) alpha += r;
    s += r * lds;
    switch (rows - r) {
    case 1: NAME(pv_dims)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, fixed, 1); break;
    case 2: NAME(pv_dims)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, fixed, 2); break;
    case 3: NAME(pv_dims)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, fixed, 3); break;
    default: break;
    }
}

static void NAME(pv)(float *acc, int64_t lda, const float *alpha, const float *s, int64_t lds,
                     const T *v, const int64_t *off, int n, const char *const *ahead, int dim,
                     int64_t rows) {
    switch (dim) {
    case 64: NAME(pv_rows)(acc, lda, alpha, s, lds, v, off, n, ahead, 64, 1, rows); break;
    case 128: NAME(pv_rows)(acc, lda, alpha, s, lds, v, off, n, ahead, 128, 1, rows); break;
    default: NAME(pv_rows)(acc, lda, alpha, s, lds, v, off, n, ahead, dim, 0, rows); break;
    }
}

/* A query vector as float32, times the scale of base-2 logits, zero-padded. */
static void NAME(load_query)(const T *q, int dim, float scale, float *out) {
    vf f = vf_set1(scale), a, b;
    int c = 0;
    for (; c + 2 * RF_W <= dim; c += 2 * RF_W) {
        rf_ld2(q + c, &a, &b);
        vf_store(out + c, vf_mul(a, f));
        vf_store(out + c + RF_W, vf_mul(b, f));
    }
    if (c < dim) {
        rf_ld2_part(q + c, dim - c, &a, &b);
        vf_store(out + c, vf_mul(a, f));
        vf_store(out + c + RF_W, vf_mul(b, f));
    }
}

static void NAME(store_row)(T *out, int dim, const float *acc, float sum) {
    vf f = vf_set1(sum == 0.0f ? 0.0f : 1.0f / sum); /* no visible key: zeros */
    int c = 0;
    for (; c + 2 * RF_W <= dim; c += 2 * RF_W)
        rf_st2(out + c, vf_mul(vf_load(acc + c), f), vf_mul(vf_load(acc + c + RF_W), f));
    if (c < dim)
        rf_st2_part(out + c, dim - c, vf_mul(vf_load(acc + c), f),
                    vf_mul(vf_load(acc + c + RF_W), f));
}

/* Writes the rows of all heads of a task. */
static void NAME(store_rows)(const rf_attention_params *p, int64_t token, int32_t head, int heads,
                             int64_t num_q, rf_state s) {
    int64_t group = p->num_heads / p->num_kv_heads, v_dim = rf_pad_dim(p->v_head_dim), r = 0;
    for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < num_q; i++)
            for (int64_t g = 0; g < group; g++, r++)
                NAME(store_row)((T *)p->out.data + (token + i) * p->out.token_stride +
                                    ((head + h) * group + g) * p->out.head_stride,
                                p->v_head_dim, s.acc + r * v_dim, s.sum[r]);
}

/* Tokens of the tile at pos; what is read next can be prefetched when it is known. */
static int64_t NAME(next_tile)(const rf_attention_params *p, const rf_seq *s, int64_t pos,
                               int64_t last, rf_tile *t) {
    make_tile(p, s, pos, pos + RF_TILE < last ? pos + RF_TILE : last, t);
    return pos + RF_TILE;
}

static void NAME(attend)(const rf_attention_params *p, const rf_task *task, float *scratch,
                         float *states) {
    const rf_seq s = rf_seq_of(p, task->seq);
    const int64_t group = p->num_heads / p->num_kv_heads, rows = task->num_q * group;
    const int heads = task->num_heads;
    const int64_t all = heads * rows; /* rows of head h are h * rows .. (h + 1) * rows - 1 */
    const int64_t q_dim = rf_pad_dim(p->head_dim), v_dim = rf_pad_dim(p->v_head_dim);
    const int64_t state = rf_state_floats(all, p->v_head_dim);
    const T *kb = (const T *)p->k.data + task->head * p->k.head_stride;
    const T *vb = (const T *)p->v.data + task->head * p->v.head_stride;

    float *q = scratch;
    float *whole = q + all * q_dim, *later = whole + state;
    float *scores = later + state, *alpha = scores + rf_pad_rows(all) * RF_SCORES;
    float *work = alpha + rf_pad_rows(all);

    const float scale = p->scale * 1.44269504088896340736f; /* logits in base 2 */
    for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < task->num_q; i++)
            for (int64_t g = 0; g < group; g++)
                NAME(load_query)(
                    (const T *)p->query.data + (s.q_start + task->q0 + i) * p->query.token_stride +
                        ((task->head + h) * group + g) * p->query.head_stride,
                    p->head_dim, scale, q + ((h * task->num_q + i) * group + g) * q_dim);
    if (task->part1 == 0) clear_state(state_at(whole, all, v_dim), all, v_dim);

    const int64_t last = rf_visible(p, &s, task->q0 + task->num_q - 1);
    rf_tile tiles[2];
    rf_ahead ahead;
    int now = 0;
    NAME(next_tile)(p, &s, (int64_t)task->part0 * RF_PART, last, &tiles[0]);
    for (int64_t part = task->part0; part < task->part1; part++) {
        rf_state st = state_at(states ? states + part * state : part ? later : whole, all, v_dim);
        clear_sums(st, all);
        int64_t end = (part + 1) * RF_PART < last ? (part + 1) * RF_PART : last;
        for (int64_t pos = part * RF_PART; pos < end; pos += RF_TILE, now ^= 1) {
            const rf_tile *t = &tiles[now];
            rf_tile *next = &tiles[now ^ 1];
            const int n = t->n;

            /* Keys of all heads, then values of all heads, as they lie in memory; meanwhile what
             * comes after is on its way. */
            make_ahead(&p->v, (const char *)vb, sizeof(T), t->v, n, heads, n * heads, &ahead);
            for (int h = 0; h < heads; h++)
                NAME(qk)(q + h * rows * q_dim, q_dim, kb + h * p->k.head_stride, t->k, n,
                         ahead.row + h * n, p->head_dim, rows, scores + h * rows * RF_SCORES,
                         RF_SCORES);

            const int full = (n + RF_W - 1) / RF_W * RF_W;
            for (int64_t i = 0; i < task->num_q; i++) {
                const int seen = tile_visible(t, rf_visible(p, &s, task->q0 + i));
                if (seen < full)
                    for (int h = 0; h < heads; h++)
                        for (int64_t g = 0; g < group; g++)
                            for (int j = seen; j < full; j++)
                                scores[(h * rows + i * group + g) * RF_SCORES + j] = -INFINITY;
            }
            softmax_tile(scores, n, all, st.max, st.sum, alpha, work);

            if (pos + RF_TILE < last) {
                NAME(next_tile)(p, &s, pos + RF_TILE, last, next);
                make_ahead(&p->k, (const char *)kb, sizeof(T), next->k, next->n, heads, n * heads,
                           &ahead);
            }
            for (int h = 0; h < heads; h++)
                NAME(pv)(st.acc + h * rows * v_dim, v_dim,
                         pos > part * RF_PART ? alpha + h * rows : NULL,
                         scores + h * rows * RF_SCORES, RF_SCORES, vb + h * p->v.head_stride, t->v,
                         n, ahead.row + h * n, p->v_head_dim, rows);
        }
        if (!states && part) fold_state(state_at(whole, all, v_dim), st, all, v_dim, p->v_head_dim);
    }
    if (!states)
        NAME(store_rows)(p, s.q_start + task->q0, task->head, heads, task->num_q,
                         state_at(whole, all, v_dim));
}

static void NAME(merge)(const rf_attention_params *p, const rf_merge *m, float *states) {
    const rf_seq s = rf_seq_of(p, m->seq);
    const int64_t rows = m->num_heads * m->num_q * (p->num_heads / p->num_kv_heads);
    const int64_t v_dim = rf_pad_dim(p->v_head_dim), state = rf_state_floats(rows, p->v_head_dim);
    rf_state whole = state_at(states, rows, v_dim);
    for (int32_t i = 1; i < m->num_parts; i++)
        fold_state(whole, state_at(states + i * state, rows, v_dim), rows, v_dim, p->v_head_dim);
    NAME(store_rows)(p, s.q_start + m->q0, m->head, m->num_heads, m->num_q, whole);
}

#undef T
#undef NAME
#undef rf_ld2
#undef rf_ld2_part
#undef rf_st2
#undef rf_st2_part
