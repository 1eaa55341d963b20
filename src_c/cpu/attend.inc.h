/* Attention for one storage type T: included once for each by variant.c.
 *
 * A task holds R rows (query tokens x group) for each of its key/value heads. Per tile of tokens and
 * head: scores = q.k by blocks of RF_RB rows x RF_TB tokens, then the softmax of each row, then
 * acc += p v by blocks of RF_RB rows x 4 vectors. Everything but keys and values is float32 and stays
 * in the first-level cache.
 */

/* Scores of rb rows with tokens t .. t + RF_TB - 1. `ahead` are addresses to prefetch, one a token,
 * each as long as a key. */
RF_INLINE void NAME(qk_block)(const float *q, int64_t ldq, const T *const k[RF_TB],
                              const T *const ahead[RF_TB], int dim, int rb, float *s, int64_t lds) {
    vf acc[RF_RB][RF_TB];
    for (int r = 0; r < rb; r++)
        for (int t = 0; t < RF_TB; t++) acc[r][t] = vf_zero();
    int c = 0;
    for (; c + 2 * RF_W <= dim; c += 2 * RF_W) {
        vf ka[RF_TB], kb[RF_TB];
#pragma GCC unroll 8
        for (int t = 0; t < RF_TB; t++) {
            rf_ld2(k[t] + c, &ka[t], &kb[t]);
            __builtin_prefetch(ahead[t] + c);
            if (2 * RF_W * sizeof(T) > 64) __builtin_prefetch(ahead[t] + c + 64 / sizeof(T));
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
    if (c < dim) {
        vf ka[RF_TB], kb[RF_TB];
#pragma GCC unroll 8
        for (int t = 0; t < RF_TB; t++) {
            rf_ld2_part(k[t] + c, dim - c, &ka[t], &kb[t]);
            __builtin_prefetch(ahead[t] + c);
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
                               const T *ahead, const int64_t *ahead_off, int dim, int rb, float *s,
                               int64_t lds) {
    for (int t = 0; t < n; t += RF_TB) {
        const T *kp[RF_TB], *ap[RF_TB];
        for (int i = 0; i < RF_TB; i++) {
            kp[i] = k + off[t + i < n ? t + i : n - 1]; /* past the end: scores nobody reads */
            ap[i] = ahead + ahead_off[t + i];
        }
        NAME(qk_block)(q, ldq, kp, ap, dim, rb, s + t, lds);
    }
}

RF_INLINE void NAME(qk_rows)(const float *q, int64_t ldq, const T *k, const int64_t *off, int n,
                             const T *ahead, const int64_t *ahead_off, int dim, int64_t rows,
                             float *s, int64_t lds) {
    int64_t r = 0;
    for (; r + RF_RB <= rows; r += RF_RB)
        NAME(qk_tokens)(q + r * ldq, ldq, k, off, n, ahead, ahead_off, dim, RF_RB, s + r * lds,
                        lds);
    q += r * ldq;
    s += r * lds;
    switch (rows - r) {
    case 1: NAME(qk_tokens)(q, ldq, k, off, n, ahead, ahead_off, dim, 1, s, lds); break;
    case 2: NAME(qk_tokens)(q, ldq, k, off, n, ahead, ahead_off, dim, 2, s, lds); break;
    case 3: NAME(qk_tokens)(q, ldq, k, off, n, ahead, ahead_off, dim, 3, s, lds); break;
    default: break;
    }
}

/* The common head sizes get loops of known length. */
static void NAME(qk)(const float *q, int64_t ldq, const T *k, const int64_t *off, int n,
                     const T *ahead, const int64_t *ahead_off, int dim, int64_t rows, float *s,
                     int64_t lds) {
    switch (dim) {
    case 64: NAME(qk_rows)(q, ldq, k, off, n, ahead, ahead_off, 64, rows, s, lds); break;
    case 128: NAME(qk_rows)(q, ldq, k, off, n, ahead, ahead_off, 128, rows, s, lds); break;
    default: NAME(qk_rows)(q, ldq, k, off, n, ahead, ahead_off, dim, rows, s, lds); break;
    }
}

/* acc = acc * alpha + p v for rb rows and `pairs` pairs of vectors; the last may be a part. */
RF_INLINE void NAME(pv_block)(float *acc, int64_t lda, const float *alpha, const float *s,
                              int64_t lds, const T *v, const int64_t *off, int n, const T *ahead,
                              const int64_t *ahead_off, int pairs, int part, int rb) {
    vf a[RF_RB][4];
#pragma GCC unroll 8
    for (int r = 0; r < rb; r++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * pairs; j++)
            a[r][j] =
                vf_fma(vf_load(acc + r * lda + j * RF_W), vf_set1(alpha[r]), vf_zero());
    for (int t = 0; t < n; t++) {
        const T *row = v + off[t], *next = ahead + ahead_off[t];
        vf x[4];
#pragma GCC unroll 8
        for (int j = 0; j < pairs; j++) {
            if (part && j == pairs - 1)
                rf_ld2_part(row + j * 2 * RF_W, part, &x[2 * j], &x[2 * j + 1]);
            else
                rf_ld2(row + j * 2 * RF_W, &x[2 * j], &x[2 * j + 1]);
            __builtin_prefetch(next + j * 2 * RF_W);
            if (2 * RF_W * sizeof(T) > 64)
                __builtin_prefetch(next + j * 2 * RF_W + 64 / sizeof(T));
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

RF_INLINE void NAME(pv_rows)(float *acc, int64_t lda, const float *alpha, const float *s,
                             int64_t lds, const T *v, const int64_t *off, int n, const T *ahead,
                             const int64_t *ahead_off, int dim, int rb) {
    int c = 0;
    for (; c + 4 * RF_W <= dim; c += 4 * RF_W)
        NAME(pv_block)(acc + c, lda, alpha, s, lds, v + c, off, n, ahead + c, ahead_off, 2, 0, rb);
    int left = dim - c, part = left % (2 * RF_W);
    if (left == 0) return;
    if (left > 2 * RF_W)
        NAME(pv_block)(acc + c, lda, alpha, s, lds, v + c, off, n, ahead + c, ahead_off, 2, part,
                       rb);
    else
        NAME(pv_block)(acc + c, lda, alpha, s, lds, v + c, off, n, ahead + c, ahead_off, 1, part,
                       rb);
}

static void NAME(pv)(float *acc, int64_t lda, const float *alpha, const float *s, int64_t lds,
                     const T *v, const int64_t *off, int n, const T *ahead,
                     const int64_t *ahead_off, int dim, int64_t rows) {
    int64_t r = 0;
    for (; r + RF_RB <= rows; r += RF_RB)
        NAME(pv_rows)(acc + r * lda, lda, alpha + r, s + r * lds, lds, v, off, n, ahead, ahead_off,
                      dim, RF_RB);
    acc += r * lda;
    alpha += r;
    s += r * lds;
    switch (rows - r) {
    case 1: NAME(pv_rows)(acc, lda, alpha, s, lds, v, off, n, ahead, ahead_off, dim, 1); break;
    case 2: NAME(pv_rows)(acc, lda, alpha, s, lds, v, off, n, ahead, ahead_off, dim, 2); break;
    case 3: NAME(pv_rows)(acc, lda, alpha, s, lds, v, off, n, ahead, ahead_off, dim, 3); break;
    default: break;
    }
}

/* A query vector as float32, times the scale of base-2 logits, zero-padded. */
static void NAME(load_query)(const T *q, int dim, float scale, float *out) {
    vf f = vf_set1(scale), a, b;
    int c = 0;
    for (; c + 2 * RF_W <= dim; c += 2 * RF_W) {
        rf_ld2(q + c, &a, &b);
        vf_store(out + c, vf_fma(a, f, vf_zero()));
        vf_store(out + c + RF_W, vf_fma(b, f, vf_zero()));
    }
    if (c < dim) {
        rf_ld2_part(q + c, dim - c, &a, &b);
        vf_store(out + c, vf_fma(a, f, vf_zero()));
        vf_store(out + c + RF_W, vf_fma(b, f, vf_zero()));
    }
}

static void NAME(store_row)(T *out, int dim, const float *acc, float sum) {
    vf f = vf_set1(sum == 0.0f ? 0.0f : 1.0f / sum); /* no visible key: zeros */
    int c = 0;
    for (; c + 2 * RF_W <= dim; c += 2 * RF_W)
        rf_st2(out + c, vf_fma(vf_load(acc + c), f, vf_zero()),
               vf_fma(vf_load(acc + c + RF_W), f, vf_zero()));
    if (c < dim)
        rf_st2_part(out + c, dim - c, vf_fma(vf_load(acc + c), f, vf_zero()),
                    vf_fma(vf_load(acc + c + RF_W), f, vf_zero()));
}

/* Writes the rows of one key/value head: query tokens q0 .. of the sequence. */
static void NAME(store_rows)(const rf_attention_params *p, int64_t token, int32_t head, int64_t num_q,
                             rf_state s) {
    int64_t group = p->num_heads / p->num_kv_heads, v_dim = rf_pad_dim(p->v_head_dim);
    T *out = (T *)p->out.data;
    for (int64_t i = 0, r = 0; i < num_q; i++)
        for (int64_t g = 0; g < group; g++, r++)
            NAME(store_row)(out + (token + i) * p->out.token_stride +
                                (head * group + g) * p->out.head_stride,
                            p->v_head_dim, s.acc + r * v_dim, s.sum[r]);
}

static void NAME(attend)(const rf_attention_params *p, const rf_task *task, float *scratch,
                         float *states) {
    const rf_seq s = rf_seq_of(p, task->seq);
    const int64_t group = p->num_heads / p->num_kv_heads, rows = task->num_q * group;
    const int64_t q_dim = rf_pad_dim(p->head_dim), v_dim = rf_pad_dim(p->v_head_dim);
    const int64_t state = rf_state_floats(rows, p->v_head_dim);
    const int heads = task->num_heads;
    const T *kb = (const T *)p->k.data + task->head * p->k.head_stride;
    const T *vb = (const T *)p->v.data + task->head * p->v.head_stride;

    float *q = scratch;
    float *whole = q + heads * rows * q_dim, *part_states = whole + heads * state;
    float *scores = part_states + heads * state, *alpha = scores + rows * RF_SCORES;

    const float scale = p->scale * 1.44269504088896340736f;
    for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < task->num_q; i++)
            for (int64_t g = 0; g < group; g++)
                NAME(load_query)((const T *)p->query.data +
                                     (s.q_start + task->q0 + i) * p->query.token_stride +
                                     ((task->head + h) * group + g) * p->query.head_stride,
                                 p->head_dim, scale,
                                 q + ((h * task->num_q + i) * group + g) * q_dim);

    if (task->part1 == 0) /* nothing is visible */
        for (int h = 0; h < heads; h++)
            clear_state(state_at(whole + h * state, rows, v_dim), rows, v_dim);

    const int64_t last = rf_visible(p, &s, task->q0 + task->num_q - 1);
    rf_tile tiles[2];
    int now = 0;
    int64_t begin = (int64_t)task->part0 * RF_PART;
    make_tile(p, &s, begin, begin + RF_TILE < last ? begin + RF_TILE : last, &tiles[0]);
    for (int64_t part = task->part0; part < task->part1; part++) {
        float *to = states ? states + part * state : part ? part_states : whole;
        for (int h = 0; h < heads; h++)
            clear_state(state_at(to + h * state, rows, v_dim), rows, v_dim);
        int64_t end = (part + 1) * RF_PART < last ? (part + 1) * RF_PART : last;
        for (int64_t pos = part * RF_PART; pos < end; pos += RF_TILE, now ^= 1) {
            const rf_tile *t = &tiles[now];
            rf_tile *next = &tiles[now ^ 1];
            int64_t after = pos + RF_TILE;
            if (after < last)
                make_tile(p, &s, after, after + RF_TILE < last ? after + RF_TILE : last, next);
            for (int h = 0; h < heads; h++) {
                const T *k = kb + h * p->k.head_stride, *v = vb + h * p->v.head_stride;
                /* in the order of use: values of this head, then keys of the next */
                const T *after_k = h + 1 < heads ? k + p->k.head_stride : kb;
                const int64_t *after_off = h + 1 < heads || after >= last ? t->k : next->k;
                rf_state st = state_at(to + h * state, rows, v_dim);
                NAME(qk)(q + h * rows * q_dim, q_dim, k, t->k, t->n, v, t->v, p->head_dim, rows,
                         scores, RF_SCORES);
                for (int64_t r = 0; r < rows; r++) {
                    float *row = scores + r * RF_SCORES;
                    int32_t n = t->n;
                    if (p->causal) n = tile_visible(t, rf_visible(p, &s, task->q0 + r / group));
                    alpha[r] = softmax_row(row, n, &st.max[r], &st.sum[r]);
                    for (int32_t i = n; i < t->n; i++) row[i] = 0.0f;
                }
                NAME(pv)(st.acc, v_dim, alpha, scores, RF_SCORES, v, t->v, t->n, after_k, after_off,
                         p->v_head_dim, rows);
            }
        }
        if (!states && part)
            for (int h = 0; h < heads; h++)
                fold_state(state_at(whole + h * state, rows, v_dim),
                           state_at(to + h * state, rows, v_dim), rows, v_dim);
    }
    if (!states)
        for (int h = 0; h < heads; h++)
            NAME(store_rows)(p, s.q_start + task->q0, task->head + h, task->num_q,
                             state_at(whole + h * state, rows, v_dim));
}

static void NAME(merge)(const rf_attention_params *p, const rf_merge *m, float *states) {
    const rf_seq s = rf_seq_of(p, m->seq);
    const int64_t rows = m->num_q * (p->num_heads / p->num_kv_heads);
    const int64_t v_dim = rf_pad_dim(p->v_head_dim), state = rf_state_floats(rows, p->v_head_dim);
    rf_state whole = state_at(states, rows, v_dim);
    for (int32_t i = 1; i < m->num_parts; i++)
        fold_state(whole, state_at(states + i * state, rows, v_dim), rows, v_dim);
    NAME(store_rows)(p, s.q_start + m->q0, m->head, m->num_q, whole);
}

#undef T
#undef NAME
#undef rf_ld2
#undef rf_ld2_part
#undef rf_st2
#undef rf_st2_part
