/* From scores to probabilities: features of the logits, masks, online softmax, and its states.
 *
 * Scores of a head come in one of two forms. With few rows, s[row * ld + token]; with many,
 * s[token * ld + row]. They are logits in base 2: times log2(e). */
#ifndef RF_CPU_SOFTMAX_H
#define RF_CPU_SOFTMAX_H

#include "tile.h"

#define RF_LOG2E 1.44269504088896340736f
#define RF_LN2   0.69314718055994530942f

/* Rows that are handled at once, with few: whole vectors of them. */
#define RF_FEW_ROWS 16

/* tanh within 3e-7: an odd polynomial, fitted for the least relative error on [0, 0.625], and
 * 1 - 2 / (e^2x + 1) beyond, where nothing cancels. */
RF_INLINE vf vf_tanh(vf x) {
    const vf one = vf_set1(1.0f), y = vf_mul(x, x);
    vf p = vf_set1(-0x1.75b9f0p-8f);
    p = vf_fma(p, y, vf_set1(0x1.521e0ap-6f));
    p = vf_fma(p, y, vf_set1(-0x1.b83b18p-5f));
    p = vf_fma(p, y, vf_set1(0x1.11071ep-3f));
    p = vf_fma(p, y, vf_set1(-0x1.555532p-2f));
    vf near = vf_fma(vf_mul(x, y), p, x);
    vf a = vf_min(vf_abs(x), vf_set1(20.0f));
    vf e = vf_exp2(vf_mul(a, vf_set1(2.0f * RF_LOG2E)));
    vf far = vf_sub(one, vf_div(vf_set1(2.0f), vf_add(e, one)));
    return vf_if_less(vf_abs(x), vf_set1(0.625f), near, vf_copysign(far, x));
}

/* What changes logits before they are masked. Arrays of tokens are for one head and tile. */
typedef struct rf_logits {
    const float *scale; /* of each token, or NULL */
    float cap;          /* in base 2; 0: none */
    int alibi;
    const float *slope; /* of each row, times log2(e) */
    const float *query; /* position of each row's query, from the tile's first token */
    const float *key;   /* position of each token, from the tile's first token */
} rf_logits;

RF_INLINE vf logit_of(const rf_logits *l, vf x, vf scale, vf slope, vf distance) {
    if (l->scale) x = vf_mul(x, scale);
    if (l->cap != 0.0f) x = vf_mul(vf_tanh(vf_mul(x, vf_set1(1.0f / l->cap))), vf_set1(l->cap));
    if (l->alibi) x = vf_fma(slope, distance, x);
    return x;
}

static void logits_few(float *s, int64_t ld, int n, int64_t rows, const rf_logits *l) {
    for (int64_t r = 0; r < rows; r++)
        for (int t = 0; t < n; t += RF_W) {
            vf scale = l->scale ? vf_load(l->scale + t) : vf_zero(), slope = vf_zero();
            vf distance = vf_zero();
            if (l->alibi) {
                slope = vf_set1(l->slope[r]);
                distance = vf_sub(vf_load(l->key + t), vf_set1(l->query[r]));
            }
            float *at = s + r * ld + t;
            vf_store(at, logit_of(l, vf_load(at), scale, slope, distance));
        }
}

static void logits_many(float *s, int64_t ld, int n, const rf_logits *l) {
    for (int t = 0; t < n; t++)
        for (int64_t r = 0; r < ld; r += RF_W) {
            vf scale = l->scale ? vf_set1(l->scale[t]) : vf_zero(), slope = vf_zero();
            vf distance = vf_zero();
            if (l->alibi) {
                slope = vf_load(l->slope + r);
                distance = vf_sub(vf_set1(l->key[t]), vf_load(l->query + r));
            }
            float *at = s + t * ld + r;
            vf_store(at, logit_of(l, vf_load(at), scale, slope, distance));
        }
}

/* See rf_state_floats. */
typedef struct rf_state {
    float *acc, *max, *sum;
} rf_state;

RF_INLINE rf_state state_at(float *base, int64_t rows, int64_t v_dim) {
    float *max = base + rows * v_dim;
    rf_state s = {base, max, max + rf_pad_rows(rows)};
    return s;
}

/* The first tile of a part overwrites acc. */
static void clear_sums(rf_state s, int64_t rows) {
    for (int64_t r = 0; r < rf_pad_rows(rows); r++) {
        s.max[r] = -INFINITY;
        s.sum[r] = 0.0f;
    }
}

static void clear_state(rf_state s, int64_t rows, int64_t v_dim) {
    memset(s.acc, 0, (size_t)(rows * v_dim) * sizeof(float));
    clear_sums(s, rows);
}

/* Scores of n tokens become probabilities relative to the new maximum of their row; alpha is the
 * factor of everything summed before. rows: at most RF_FEW_ROWS; those of scores are handled by
 * four. */
static void softmax_few(float *scores, int32_t n, int64_t rows, float *max, float *sum,
                        float *alpha) {
    const int32_t full = (n + RF_W - 1) / RF_W * RF_W;
    const vf none = vf_set1(-INFINITY);
    const size_t bytes = (size_t)rows * sizeof(float);
    float top[RF_FEW_ROWS], total[RF_FEW_ROWS], now[RF_FEW_ROWS], factor[RF_FEW_ROWS];
    for (int r = 0; r < RF_FEW_ROWS; r += RF_W) vf_store(now + r, none);
    memcpy(now, max, bytes);
    /* Four rows at a time: their reductions share the shuffles. Those past the last are scratch. */
    for (int64_t r = 0; r < rows; r += 4) {
        const float *s = scores + r * RF_FEW_LD;
        vf x[4] = {none, none, none, none};
        for (int32_t i = 0; i < full; i += RF_W)
            for (int j = 0; j < 4; j++) x[j] = vf_max(vf_load(s + j * RF_FEW_LD + i), x[j]);
        vf_hmax4(x, top + r);
    }
    for (int64_t r = 0; r < rows; r += RF_W)
        vf_store(top + r, new_maximum(vf_load(top + r), now + r, factor + r));
    for (int64_t r = 0; r < rows; r += 4) {
        float *s = scores + r * RF_FEW_LD;
        vf x[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        for (int32_t i = 0; i < full; i += RF_W)
            for (int j = 0; j < 4; j++) {
                vf e = vf_exp2(vf_sub(vf_load(s + j * RF_FEW_LD + i), vf_set1(top[r + j])));
                vf_store(s + j * RF_FEW_LD + i, e);
                x[j] = vf_add(x[j], e);
            }
        vf_hsum4(x, total + r);
    }
    memcpy(max, now, bytes);
    memcpy(alpha, factor, bytes);
    for (int64_t r = 0; r < rows; r++) sum[r] = sum[r] * factor[r] + total[r];
}

/* Factors of each token's values, for the value product alone. */
static void scale_few(float *p, int n, int64_t rows, const float *scale) {
    for (int64_t r = 0; r < rows; r++)
        for (int t = 0; t < n; t += RF_W) {
            float *at = p + r * RF_FEW_LD + t;
            vf_store(at, vf_mul(vf_load(at), vf_load(scale + t)));
        }
}

RF_INLINE float rf_exp2_of(float x) { return vf_first(vf_exp2(vf_set1(x))); }

/* Maxima and sums of sixteen rows of a state and of the later part b become the state's; keep, add:
 * the factors of their sums of values. */
RF_INLINE void fold_rows(float *max, float *sum, const float *b_max, const float *b_sum,
                         float *keep, float *add) {
    for (int r = 0; r < 16; r += RF_W) {
        const vf later = vf_load(b_max + r), shift = new_maximum(later, max + r, keep + r);
        const vf old = vf_mul(vf_load(sum + r), vf_load(keep + r));
        vf_store(add + r, vf_exp2(vf_sub(later, shift)));
        vf_store(sum + r, vf_fma(vf_load(b_sum + r), vf_load(add + r), old));
    }
}

/* a = fold(a, b), b being the later part; of each head's head_rows rows the first `rows` count, and
 * of each row the first `used` elements, whole vectors. Maxima and sums have whole sixteens. */
static void fold_state(rf_state a, rf_state b, int64_t heads, int64_t head_rows, int64_t rows,
                       int64_t v_dim, int64_t used) {
    float keep[16], add[16];
    for (int64_t r = 0; r < heads * head_rows; r++) {
        if (r % 16 == 0) fold_rows(a.max + r, a.sum + r, b.max + r, b.sum + r, keep, add);
        if (r % head_rows >= rows) continue;
        float *pa = a.acc + r * v_dim, *pb = b.acc + r * v_dim;
        const vf va = vf_set1(keep[r % 16]), vb = vf_set1(add[r % 16]);
        for (int64_t i = 0; i < used; i += RF_W)
            vf_store(pa + i, vf_fma(vf_load(pb + i), vb, vf_mul(vf_load(pa + i), va)));
    }
}

#endif
