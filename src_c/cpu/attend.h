/* Attention of a task: tiles of its context, scores, softmax, values; then the output.
 *
 * A task holds `rows` rows (query tokens x group) for each of its key/value heads. Per tile: the
 * scores of all heads, the softmax of each row, then the values of all heads: the keys of a tile,
 * its values, the keys of the next, as they lie in memory, so that while one is computed with, the
 * next is on its way. Everything but keys and values is float32 and stays in the caches.
 *
 * Tiles of few rows were 32 tokens once. On a Xeon with AMX, those of 64 take 0.88 to 0.99 of the
 * time in decode, least with heads of 64 and in the caches, 1.03 with two query tokens, and over
 * float32 1.02; those of 128 1.04 over bfloat16 and 0.96 over int8, where 64 take 0.94. */
#ifndef RF_CPU_ATTEND_H
#define RF_CPU_ATTEND_H

#include "softmax.h"

static const int8_t rf_size[RF_NUM_DTYPES] = {4, 2, 2, 1, 1, 1};

/* Rows of a head: how many there are, and how many it takes in scratch and states. */
typedef struct rf_shape {
    int64_t group, rows, head_rows, all; /* all: head_rows of all heads */
    int64_t q_dim, v_dim, used;          /* used: of v_dim, what the kernels write */
    int64_t q_bytes;                     /* of a row of queries */
    int heads, many, blocks, columns;    /* columns: queries are, see load_queries */
} rf_shape;

static rf_shape shape_of(const rf_attention_params *p, const rf_products *f, int64_t num_q,
                         int heads) {
    rf_shape s;
    s.group = p->num_heads / p->num_kv_heads;
    s.rows = num_q * s.group;
    s.head_rows = rf_head_rows(s.rows);
    s.heads = heads;
    s.all = heads * s.head_rows;
    s.many = s.rows >= RF_MANY_ROWS;
    s.blocks = f->blocks && s.rows >= RF_BLOCK_ROWS_FROM;
    s.q_dim = rf_pad_dim(p->head_dim);
    s.v_dim = rf_pad_dim(p->v_head_dim);
    s.used = (p->v_head_dim + f->chunk - 1) / f->chunk * f->chunk;
    s.columns = s.many && !s.blocks;
    s.q_bytes = s.q_dim * (s.columns ? 4 : f->query_size);
    return s;
}

static int64_t score_floats(int64_t head_rows, int64_t heads) {
    if (head_rows >= RF_MANY_ROWS) return heads * head_rows * (RF_MANY_TILE + RF_SLACK);
    return (heads * head_rows + 4) * RF_FEW_LD; /* rows are handled by four */
}

/* A part's keys and values, packed as wide as queries are, and the scores of two blocks. */
static int64_t block_floats(int64_t q_dim, int64_t v_dim) {
    return RF_PART * (q_dim + v_dim) + 2 * RF_BLOCK_ROWS * RF_BLOCK_LD;
}

static int64_t scratch_floats(const rf_attention_params *p, int64_t rows, int64_t heads) {
    const int64_t head_rows = rf_head_rows(rows), all = heads * head_rows;
    const int64_t q_dim = rf_pad_dim(p->head_dim), v_dim = rf_pad_dim(p->v_head_dim);
    const int64_t row = q_dim > v_dim ? q_dim : v_dim;
    int64_t work = rows < RF_MANY_ROWS ? row : RF_MANY_TILE * row;
    if (rows >= RF_BLOCK_ROWS_FROM && work < block_floats(q_dim, v_dim))
        work = block_floats(q_dim, v_dim);
    return all * q_dim + 2 * rf_state_floats(all, p->v_head_dim) + score_floats(head_rows, heads) +
           3 * rf_pad_rows(all) + 3 * RF_TILE_TOKENS + work;
}

/* Row r of a head, of queries or outputs. */
RF_INLINE char *row_of(const rf_rows *x, const rf_shape *s, int64_t token, int64_t head, int64_t r,
                       int size) {
    return (char *)x->data + ((token + r / s->group) * x->token_stride +
                              (head * s->group + r % s->group) * x->head_stride) *
                                 size;
}
/* Brings nearer the row that comes eight later: rows of a head are too far apart for what the
 * processor fetches by itself. Gained 4 to 5% of short prompts with heads of 64. */
RF_INLINE void prefetch_row(const rf_rows *x, const rf_shape *s, int64_t token, int64_t head,
                            int64_t r, int dim, int size) {
    if (r + 8 >= s->rows) return;
    const char *const later = row_of(x, s, token, head, r + 8, size);
    prefetch_vector(&later, 0, dim * size);
}

/* The queries of a head, as rows, or with many rows not in blocks as columns: q[unit * head_rows +
 * row], a unit being 4 bytes. */
static void load_queries(const rf_attention_params *p, const rf_products *f, const rf_shape *s,
                         int64_t token, int32_t head, char *q, float *work) {
    const int size = rf_size[p->dtype];
    if (s->many) memset(q, 0, (size_t)(s->head_rows * s->q_bytes));
    for (int64_t r = 0; r < s->rows; r++) {
        const char *row = row_of(&p->query, s, token, head, r, size);
        prefetch_row(&p->query, s, token, head, r, p->head_dim, size);
        if (!s->columns) {
            f->query(row, p->head_dim, q + r * s->q_bytes);
            continue;
        }
        f->query(row, p->head_dim, work);
        const int64_t dim = (p->head_dim + f->chunk - 1) / f->chunk * f->chunk;
        const int64_t units = dim * f->query_size / 4;
        for (int64_t i = 0; i < units; i++)
            memcpy(q + (i * s->head_rows + r) * 4, (const char *)work + i * 4, 4);
    }
}

/* Factors that all of a head's tokens share. */
RF_INLINE float head_scale(const rf_attention_params *p, const rf_products *f, const rf_scales *s,
                           int64_t head) {
    float scale = 1.0f;
    if (p->kv_dtype >= RF_NUM_WIDE_DTYPES && !scales_by_token(p, s))
        scale = s->data ? s->data[head * s->head_stride] : s->value;
    return scale / f->one;
}
static const float *token_scales(const rf_attention_params *p, const rf_scales *s,
                                 const int64_t *off, int n, int64_t head, float *out) {
    if (!scales_by_token(p, s)) return NULL;
    for (int t = 0; t < n; t++) out[t] = s->data[off[t] + head * s->head_stride];
    for (int t = n; t % 32; t++) out[t] = 0.0f; /* whole pairs of vectors are read */
    return out;
}

/* The scores of a head that a query must not see become -inf; with few rows, so do those past the
 * end of the tile, up to whole vectors. */
static void mask_scores(const rf_attention_params *p, const rf_shape *s, const rf_seq *seq,
                        int64_t q0, int64_t num_q, const rf_tile *t, float *scores) {
    const int n = t->n, full = s->many ? n : (n + RF_W - 1) / RF_W * RF_W;
    const int64_t row_step = s->many ? 1 : RF_FEW_LD, token_step = s->many ? s->head_rows : 1;
    const int64_t new = seq->kv_len - seq->q_len; /* position of the first new token */
    for (int64_t i = 0; i < num_q; i++, scores += s->group * row_step) {
        const int64_t first = rf_first(p, seq, q0 + i);
        const int from = t->pos[0] >= first ? 0 : tokens_before(t, first);
        const int to = tokens_before(t, rf_visible(p, seq, q0 + i));
        const uint8_t *mask = NULL;
        if (p->mask && t->pos[n - 1] >= new)
            mask = p->mask + (seq->q_start + q0 + i) * p->mask_stride;
        if (from == 0 && to == full && !mask) continue;
        for (int j = 0; j < full; j++) {
            const int hidden = mask && j < n && t->pos[j] >= new && !mask[t->pos[j] - new];
            if (j >= from && j < to && !hidden) continue;
            for (int64_t g = 0; g < s->group; g++)
                scores[g * row_step + j * token_step] = -INFINITY;
        }
    }
}

/* Sums become outputs: the sink takes its part of the denominator. */
static void store_rows(const rf_attention_params *p, const rf_products *f, const rf_shape *s,
                       int64_t token, int32_t head, rf_state st) {
    const int size = rf_size[p->dtype];
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t r = 0; r < s->rows; r++) {
            const int64_t at = h * s->head_rows + r;
            const int64_t out_head = (head + h) * s->group + r % s->group;
            float sum = st.sum[at], max = st.max[at], factor = 1.0f;
            if (p->sinks) {
                const float sink = p->sinks[out_head] * RF_LOG2E, top = sink > max ? sink : max;
                if (top > -INFINITY) {
                    factor = rf_exp2_of(max - top);
                    sum = sum * factor + rf_exp2_of(sink - top);
                    max = top;
                }
            }
            factor = sum == 0.0f ? 0.0f : factor / sum; /* no visible key: zeros */
            factor *= head_scale(p, f, &p->v_scale, head + h);
            prefetch_row(&p->out, s, token, head + h, r, p->v_head_dim, size);
            f->finish(st.acc + at * s->v_dim, p->v_head_dim, factor,
                      row_of(&p->out, s, token, head + h, r, size));
            if (p->lse)
                p->lse[(token + r / s->group) * p->num_heads + out_head] =
                    sum == 0.0f ? -INFINITY : max * RF_LN2 + logf(sum);
        }
}

/* What a task carries from tile to tile. */
typedef struct rf_work {
    const rf_attention_params *p;
    const rf_products *f;
    rf_shape shape;
    rf_seq seq;
    const rf_task *task;
    const char *k, *v; /* of the task's first head */
    char *q;
    int change; /* logits are not only masked */
    float *scores, *alpha, *slope, *position, *key, *k_scale, *v_scale, *wide;
    rf_rows_ahead ahead;
} rf_work;

RF_INLINE float *scores_at(const rf_work *w, int h) {
    if (w->shape.many) return w->scores + h * w->shape.head_rows * (RF_MANY_TILE + RF_SLACK);
    return w->scores + h * w->shape.rows * RF_FEW_LD;
}

/* Scale by token, soft cap and ALiBi, of one head. */
static rf_logits logits_of(rf_work *w, const rf_tile *t, int h) {
    const rf_attention_params *p = w->p;
    const rf_shape *shape = &w->shape;
    rf_logits l = {
        .scale = token_scales(p, &p->k_scale, t->k_scale, t->n, w->task->head + h, w->k_scale),
        .cap = p->softcap * RF_LOG2E,
        .alibi = p->alibi_slopes != NULL,
        .slope = w->slope + h * shape->head_rows,
        .query = w->position,
        .key = w->key,
    };
    if (l.alibi) {
        const int64_t own = w->seq.kv_len - w->seq.q_len + w->task->q0 - t->pos[0];
        for (int i = 0; i < t->n; i++) w->key[i] = (float)(t->pos[i] - t->pos[0]);
        for (int i = t->n; i < t->n + RF_SLACK; i++) w->key[i] = 0.0f;
        for (int64_t r = 0; r < shape->rows; r++) w->position[r] = (float)(own + r / shape->group);
    }
    return l;
}

RF_INLINE const char *at_head(const char *base, const rf_paged *pool, int size, int h) {
    return base + h * pool->head_stride * size;
}

/* The masked logits of a head. */
static void score_head(rf_work *w, const rf_tile *t, int h, rf_ahead ahead) {
    const rf_attention_params *p = w->p;
    const rf_shape *s = &w->shape;
    const int n = t->n, size = rf_size[p->kv_dtype];
    const char *q = w->q + h * s->head_rows * s->q_bytes;
    const float factor = p->scale * RF_LOG2E * head_scale(p, w->f, &p->k_scale, w->task->head + h);
    float *to = scores_at(w, h);
    const rf_phase x = {at_head(w->k, &p->k, size, h), t->k, ahead, n, p->head_dim};
    if (s->many) w->f->scores_many(q, s->head_rows, &x, factor, to, w->wide);
    else w->f->scores_few(q, s->q_dim, &x, s->rows, factor, to);
    if (w->change) {
        const rf_logits l = logits_of(w, t, h);
        if (s->many) logits_many(to, s->head_rows, n, &l);
        else logits_few(to, RF_FEW_LD, n, s->rows, &l);
    }
    mask_scores(p, s, &w->seq, w->task->q0, w->task->num_q, t, to);
}

/* Probabilities of the heads from h to before `end`: one with many rows, else as many as whole
 * vectors of rows hold. */
static void softmax_heads(rf_work *w, const rf_tile *t, rf_state st, int h, int end) {
    const rf_attention_params *p = w->p;
    const rf_shape *s = &w->shape;
    const int64_t r = h * s->head_rows;
    float *x = scores_at(w, h), *max = st.max + r, *sum = st.sum + r, *alpha = w->alpha + r;
    if (!s->many) softmax_few(x, t->n, (end - h) * s->rows, max, sum, alpha);
    for (; h < end; h++) {
        const float *scale =
            token_scales(p, &p->v_scale, t->v_scale, t->n, w->task->head + h, w->v_scale);
        if (s->many) w->f->softmax_many(x, s->head_rows, t->n, max, sum, alpha, scale);
        else if (scale) scale_few(scores_at(w, h), t->n, s->rows, scale);
    }
}

static void add_tile(rf_work *w, const rf_tile *t, const rf_tile *next, rf_state st, int fresh) {
    const rf_attention_params *p = w->p;
    const rf_products *f = w->f;
    const rf_shape *s = &w->shape;
    const int heads = s->heads, n = t->n, size = rf_size[p->kv_dtype];
    const int together = s->many ? 1 : (int)(RF_FEW_ROWS / s->rows);

    make_ahead(&p->v, w->v, size, t->v, n, heads, n * heads, &w->ahead);
    for (int h = 0, end; h < heads; h = end) {
        end = h + together < heads ? h + together : heads;
        for (int i = h; i < end; i++) score_head(w, t, i, w->ahead.row + i * n);
        softmax_heads(w, t, st, h, end);
    }
    if (next && scales_by_token(p, &p->k_scale))
        prefetch_scales(&p->k_scale, next->k_scale, next->n, w->task->head, heads);
    if (next && scales_by_token(p, &p->v_scale))
        prefetch_scales(&p->v_scale, next->v_scale, next->n, w->task->head, heads);
    if (next) make_ahead(&p->k, w->k, size, next->k, next->n, heads, n * heads, &w->ahead);
    for (int h = 0; h < heads; h++) {
        const int64_t r = h * s->head_rows;
        const rf_ahead ahead = next ? w->ahead.row + h * n : NULL;
        const rf_phase x = {at_head(w->v, &p->v, size, h), t->v, ahead, n, p->v_head_dim};
        float *acc = st.acc + r * s->v_dim, *to = scores_at(w, h);
        const float *alpha = fresh ? NULL : w->alpha + r;
        if (s->many) f->values_many(acc, s->v_dim, alpha, to, s->head_rows, &x, s->rows, w->wide);
        else f->values_few(acc, s->v_dim, alpha, to, &x, s->rows, w->wide);
    }
}

/* As mask_scores, of rows from r0 on; up to whole pairs of vectors. */
static void mask_block(const rf_work *w, const rf_tile *t, int64_t r0, int64_t rows, int n,
                       float *s) {
    const rf_attention_params *p = w->p;
    const int full = block_tokens(n);
    const int64_t new = w->seq.kv_len - w->seq.q_len; /* position of the first new token */
    const int64_t top = w->task->q0 + r0 / w->shape.group;
    const int64_t bottom = w->task->q0 + (r0 + rows - 1) / w->shape.group;
    if (!p->mask && tokens_before(t, rf_first(p, &w->seq, bottom)) == 0 &&
        tokens_before(t, rf_visible(p, &w->seq, top)) >= full)
        return; /* every row sees all of them */
    for (int64_t r = r0; r < r0 + rows; r++, s += RF_BLOCK_LD) {
        const int64_t i = w->task->q0 + r / w->shape.group;
        const int64_t first = rf_first(p, &w->seq, i);
        const int from = t->pos[0] >= first ? 0 : tokens_before(t, first);
        const int to = tokens_before(t, rf_visible(p, &w->seq, i));
        for (int j = 0; j < from && j < n; j++) s[j] = -INFINITY;
        for (int j = to < n ? to : n; j < full; j++) s[j] = -INFINITY;
        if (!p->mask || t->pos[n - 1] < new) continue;
        const uint8_t *mask = p->mask + (w->seq.q_start + i) * p->mask_stride;
        for (int j = 0; j < n; j++)
            if (t->pos[j] >= new && !mask[t->pos[j] - new]) s[j] = -INFINITY;
    }
}

/* Brings tokens from .. to - 1 of a head nearer. */
static void prefetch_tokens(const rf_work *w, const rf_tile *t, int h, int from, int to) {
    const rf_attention_params *p = w->p;
    const int size = rf_size[p->kv_dtype];
    const char *k = at_head(w->k, &p->k, size, h), *v = at_head(w->v, &p->v, size, h);
    for (int i = from; i < to; i++) {
        const char *const row[2] = {k + t->k[i] * size, v + t->v[i] * size};
        prefetch_vector(row, 0, p->head_dim * size);
        prefetch_vector(row, 1, p->v_head_dim * size);
    }
}

/* A block on its way through the products. */
typedef struct rf_flow {
    rf_block block;
    rf_state whole;  /* what it becomes, or is added to */
    int64_t r, rows; /* the head's rows from r on */
} rf_flow;

/* Scores become masked logits. */
static void finish_scores(const rf_work *w, const rf_tile *t, const rf_logits *head, rf_flow *x) {
    rf_block *b = &x->block;
    if (w->change || !(b->factor > 0.0f)) { /* else the largest score is the largest logit */
        for (int64_t i = 0; i < RF_BLOCK_ROWS * RF_BLOCK_LD; i += RF_W)
            vf_store(b->s + i, vf_mul(vf_load(b->s + i), vf_set1(b->factor)));
        b->factor = 1.0f;
    }
    if (w->change) {
        rf_logits l = *head;
        l.slope += x->r;
        l.query += x->r;
        logits_few(b->s, RF_BLOCK_LD, b->n, x->rows, &l);
    }
    mask_block(w, t, x->r, x->rows, b->n, b->s);
}

/* A part by blocks of rows, of one head: its states, where `st` is fresh, else added to it. later:
 * room for a block's state. */
static void add_blocks(rf_work *w, const rf_tile *t, const rf_tile *next, rf_state st, int fresh,
                       float *later, int h) {
    const rf_attention_params *p = w->p;
    const rf_blocks *f = w->f->blocks;
    const rf_shape *s = &w->shape;
    const int size = rf_size[p->kv_dtype], all = t->n;
    const rf_phase k = {at_head(w->k, &p->k, size, h), t->k, NULL, all, p->head_dim};
    const rf_phase v = {at_head(w->v, &p->v, size, h), t->v, NULL, all, p->v_head_dim};
    rf_part part = {.keys = w->wide, .ldq = s->q_dim, .lda = s->v_dim};
    part.values = (char *)w->wide + RF_PART * s->q_bytes;
    part.scale = token_scales(p, &p->v_scale, t->v_scale, all, w->task->head + h, w->v_scale);
    part.dim = p->head_dim;
    part.v_dim = p->v_head_dim;
    const int64_t values = RF_PART * s->v_dim * w->f->query_size;
    float *const scores = (float *)(void *)((char *)part.values + values);
    float *const states = later + RF_BLOCK_ROWS * s->v_dim;
    const float factor = p->scale * RF_LOG2E * head_scale(p, w->f, &p->k_scale, w->task->head + h);
    rf_logits logits = {0};
    if (w->change) logits = logits_of(w, t, h);
    f->pack(&k, &v, &part);

    rf_flow flow[3], *first = NULL, *second = NULL;
    for (int64_t r = 0, made = 0; r < s->rows || first || second; r += RF_BLOCK_ROWS) {
        rf_flow *third = NULL;
        if (r < s->rows) {
            const int64_t rows = r + RF_BLOCK_ROWS < s->rows ? RF_BLOCK_ROWS : s->rows - r;
            const int64_t at = h * s->head_rows + r, last = (r + rows - 1) / s->group;
            const rf_state whole = {st.acc + at * s->v_dim, st.max + at, st.sum + at};
            const int n = tokens_before(t, rf_visible(p, &w->seq, w->task->q0 + last));
            if (next)
                prefetch_tokens(w, next, h, (int)(next->n * r / s->rows),
                                (int)(next->n * (r + rows) / s->rows));
            if (n == 0) { /* and so it was for all before */
                const size_t sums = (size_t)(RF_BLOCK_ROWS * s->v_dim);
                if (fresh) memset(whole.acc, 0, sums * sizeof(float));
                continue;
            }
            float *const max = states + made % 3 * 2 * RF_BLOCK_ROWS;
            third = &flow[made++ % 3];
            *third = (rf_flow){.whole = whole, .r = r, .rows = rows};
            third->block = (rf_block){
                .q = w->q + at * s->q_bytes,
                .s = scores + made % 2 * RF_BLOCK_ROWS * RF_BLOCK_LD,
                .acc = fresh ? whole.acc : later,
                .max = fresh ? whole.max : max,
                .sum = fresh ? whole.sum : max + RF_BLOCK_ROWS,
                .factor = factor,
                .n = n,
            };
        }
        f->run(&part, first ? &first->block : NULL, second ? &second->block : NULL,
               third ? &third->block : NULL);
        if (first && !fresh) {
            const rf_block *b = &first->block;
            const rf_state own = {b->acc, b->max, b->sum};
            fold_state(first->whole, own, 1, RF_BLOCK_ROWS, first->rows, s->v_dim, s->used);
        }
        if (third) finish_scores(w, t, &logits, third);
        first = second;
        second = third;
    }
}

static void attend(const rf_attention_params *p, const rf_products *f, const rf_task *task,
                   float *scratch, float *states, int32_t first_part) {
    rf_work w = {.p = p, .f = f, .task = task, .seq = rf_seq_of(p, task->seq)};
    w.shape = shape_of(p, f, task->num_q, task->num_heads);
    const rf_shape *s = &w.shape;
    const int size = rf_size[p->kv_dtype];
    const int64_t state = rf_state_floats(s->all, p->v_head_dim);
    w.k = (const char *)p->k.data + task->head * p->k.head_stride * size;
    w.v = (const char *)p->v.data + task->head * p->v.head_stride * size;

    float *whole = scratch, *later = whole + state;
    w.q = (char *)(later + state);
    w.scores = (float *)(void *)w.q + s->all * s->q_dim;
    w.alpha = w.scores + score_floats(s->head_rows, s->heads);
    w.slope = w.alpha + rf_pad_rows(s->all);
    w.position = w.slope + rf_pad_rows(s->all);
    w.key = w.position + rf_pad_rows(s->all);
    w.k_scale = w.key + RF_TILE_TOKENS;
    w.v_scale = w.k_scale + RF_TILE_TOKENS;
    w.wide = w.v_scale + RF_TILE_TOKENS;

    w.change = p->softcap != 0.0f || p->alibi_slopes || scales_by_token(p, &p->k_scale);
    const int64_t token = w.seq.q_start + task->q0;
    if (s->many && f->begin) f->begin();
    for (int h = 0; h < s->heads; h++)
        load_queries(p, f, s, token, task->head + h, w.q + h * s->head_rows * s->q_bytes, w.wide);
    if (p->alibi_slopes) {
        for (int64_t r = 0; r < rf_pad_rows(s->all); r++) w.slope[r] = w.position[r] = 0.0f;
        for (int h = 0; h < s->heads; h++)
            for (int64_t r = 0; r < s->rows; r++)
                w.slope[h * s->head_rows + r] =
                    p->alibi_slopes[(task->head + h) * s->group + r % s->group] * RF_LOG2E;
    }

    const int64_t first = rf_first(p, &w.seq, task->q0);
    const int64_t visible = rf_visible(p, &w.seq, task->q0 + task->num_q - 1);
    const int64_t part_end = (int64_t)task->part1 * RF_PART;
    const int64_t last = visible < part_end ? visible : part_end;
    const int64_t few = size == 4 ? RF_FEW_TILE / 2 : RF_FEW_TILE;
    const int64_t length = s->blocks ? RF_PART : s->many ? RF_MANY_TILE : few;
    int64_t pos = (int64_t)task->part0 * RF_PART > first ? (int64_t)task->part0 * RF_PART : first;
    rf_tile tiles[2];
    int now = 0;
    if (!states) clear_state(state_at(whole, s->all, s->v_dim), s->all, s->v_dim);
    if (pos < last) {
        const int64_t end =
            (pos / RF_PART + 1) * RF_PART < last ? (pos / RF_PART + 1) * RF_PART : last;
        make_tile(p, &w.seq, pos, pos + length < end ? pos + length : end, length, &tiles[0]);
    }
    for (int64_t part = task->part0; part < task->part1; part++) {
        const int in_place = !states && part * RF_PART <= first;
        const int fold = !states && !in_place;
        rf_state st = state_at(states               ? states + (part - first_part) * state
                               : fold && !s->blocks ? later
                                                    : whole,
                               s->all, s->v_dim);
        const int64_t end = (part + 1) * RF_PART < last ? (part + 1) * RF_PART : last;
        int fresh = !(fold && s->blocks); /* blocks are folded one by one */
        if (fresh) clear_sums(st, s->all);
        while (pos < end) {
            const rf_tile *t = &tiles[now];
            rf_tile *next = NULL;
            pos = pos + length < end ? pos + length : end;
            if (pos < last) { /* what is read next can be prefetched when it is known */
                const int64_t limit =
                    (pos / RF_PART + 1) * RF_PART < last ? (pos / RF_PART + 1) * RF_PART : last;
                next = &tiles[now ^= 1];
                make_tile(p, &w.seq, pos, pos + length < limit ? pos + length : limit, length,
                          next);
            }
            if (t->n == 0) continue;
            if (s->blocks)
                for (int h = 0; h < s->heads; h++) add_blocks(&w, t, next, st, fresh, later, h);
            else add_tile(&w, t, next, st, fresh);
            fresh = 0;
        }
        if (fresh) memset(st.acc, 0, (size_t)(s->all * s->v_dim) * sizeof(float));
        else if (fold && !s->blocks)
            fold_state(state_at(whole, s->all, s->v_dim), st, s->heads, s->head_rows, s->rows,
                       s->v_dim, s->used);
    }
    if (s->many && f->end) f->end();
    if (!states) store_rows(p, f, s, token, task->head, state_at(whole, s->all, s->v_dim));
}

static void merge(const rf_attention_params *p, const rf_products *f, const rf_merge *m,
                  float *states) {
    const rf_seq seq = rf_seq_of(p, m->seq);
    const rf_shape s = shape_of(p, f, m->num_q, m->num_heads);
    const int64_t state = rf_state_floats(s.all, p->v_head_dim);
    rf_state whole = state_at(states, s.all, s.v_dim);
    for (int32_t i = 1; i < m->num_parts; i++)
        fold_state(whole, state_at(states + i * state, s.all, s.v_dim), s.heads, s.head_rows,
                   s.rows, s.v_dim, s.used);
    store_rows(p, f, &s, seq.q_start + m->q0, m->head, whole);
}

#endif
