/* Dot products of bfloat16 pairs over one storage type T: included once for each by dot.c.
 *
 * Storage is handled by 64 elements, which become two registers of bfloat16 in an order of their
 * own: words stay as they are, bytes split into the lower and the upper half of each 16. Queries
 * are put into the same order. */

/* 64 elements from p, of which n exist. */
RF_INLINE void NAME(words)(const rf_table *table, const T *p, int n, __m512i *a, __m512i *b) {
#if RF_WORDS
    (void)table;
    load_words(p, n, a, b);
#else
    __m512i hi, lo;
    rf_bytes(table, load_bytes(p, n), &hi, &lo);
    *a = _mm512_unpacklo_epi8(lo, hi);
    *b = _mm512_unpackhi_epi8(lo, hi);
#endif
}

/* The same of two tokens, as pairs of them. */
RF_INLINE void NAME(pairs)(const rf_table *table, const T *p, const T *q, int n, __m512i out[4]) {
#if RF_WORDS
    __m512i a, b, c, d;
    (void)table;
    load_words(p, n, &a, &b);
    load_words(q, n, &c, &d);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
#else
    __m512i a = load_bytes(p, n), b = load_bytes(q, n), hi, lo;
    rf_bytes(table, _mm512_unpacklo_epi8(a, b), &hi, &lo);
    out[0] = _mm512_unpacklo_epi8(lo, hi);
    out[1] = _mm512_unpackhi_epi8(lo, hi);
    rf_bytes(table, _mm512_unpackhi_epi8(a, b), &hi, &lo);
    out[2] = _mm512_unpacklo_epi8(lo, hi);
    out[3] = _mm512_unpackhi_epi8(lo, hi);
#endif
}

/* A query in the order of words(), padded with zeros. */
static void NAME(query)(const void *query, int dim, void *out) {
    for (int c = 0; c < dim; c += 64) {
        __m512i a, b;
        load_words((const uint16_t *)query + c, dim - c, &a, &b);
#if !RF_WORDS
        const __m512i lower = _mm512_set_epi64(
            0x0037003600350034, 0x0033003200310030, 0x0027002600250024, 0x0023002200210020,
            0x0017001600150014, 0x0013001200110010, 0x0007000600050004, 0x0003000200010000);
        __m512i whole = a;
        a = _mm512_permutex2var_epi16(whole, lower, b);
        b = _mm512_permutex2var_epi16(whole, _mm512_add_epi16(lower, _mm512_set1_epi16(8)), b);
#endif
        _mm512_storeu_si512((uint16_t *)out + c, a);
        _mm512_storeu_si512((uint16_t *)out + c + 32, b);
    }
}

/* Scores of rb rows with four tokens; u: which four of the tile. fixed: dim is known when
 * compiling, a multiple of 64. */
RF_INLINE void NAME(qk_block)(const rf_table *table, const uint16_t *q, int64_t ldq,
                              const T *const k[4], rf_ahead ahead, int u, int dim, int fixed,
                              int rb, vf factor, float *s) {
    vf acc[4][4];
    for (int r = 0; r < rb; r++)
        for (int t = 0; t < 4; t++) acc[r][t] = vf_zero();
    const int bytes = dim * (int)sizeof(T);
    if (ahead && !fixed)
        for (int t = 0; t < 4; t++) prefetch_vector(ahead, u * 4 + t, dim * (int)sizeof(T));
    for (int c = 0; c < dim; c += 64) {
        __m512i ka[4], kb[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            NAME(words)(table, k[t] + c, dim - c, &ka[t], &kb[t]);
            if (ahead && fixed)
                prefetch_step(ahead, (u * (dim / 64) + c / 64) * 4 + t, 64 * (int)sizeof(T), bytes);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rb; r++) {
            __m512i qa = _mm512_loadu_si512(q + r * ldq + c);
            __m512i qb = _mm512_loadu_si512(q + r * ldq + c + 32);
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) acc[r][t] = vf_dot(acc[r][t], qa, ka[t]);
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) acc[r][t] = vf_dot(acc[r][t], qb, kb[t]);
        }
    }
    rf_reduce(acc, rb, factor, s + u * 4, RF_FEW_LD);
}

/* acc = acc * alpha + p v for rb rows and the 64 elements from c on; p: pairs of tokens. */
RF_INLINE void NAME(pv_block)(float *acc, int64_t lda, const float *alpha, const uint32_t *p,
                              const rf_phase *x, rf_ahead ahead, int dim, int fixed, int c,
                              int rb) {
    const rf_table table = table_of(RF_TABLE);
    const T *base = (const T *)x->base + c;
    vf a[4][4];
    acc += c;
    load_sums(a, acc, lda, alpha, rb);
    const int pairs = (x->n + 1) / 2, step = 2 * 64 * (int)sizeof(T);
    const int bytes = dim * (int)sizeof(T);
    for (int t = 0; t < pairs; t++) {
        __m512i v[4];
        const int64_t second = 2 * t + 1 < x->n ? 2 * t + 1 : 2 * t; /* its probability is 0 */
        NAME(pairs)(&table, base + x->off[2 * t], base + x->off[second], dim - c, v);
        if (ahead && c == 0) prefetch_own(x, 2 * t + 4, 2, (int)sizeof(T));
        if (ahead && fixed) prefetch_step(ahead, c / 64 * pairs + t, step, bytes);
        else if (ahead && c == 0) {
            prefetch_vector(ahead, 2 * t, dim * (int)sizeof(T));
            prefetch_vector(ahead, 2 * t + 1, dim * (int)sizeof(T));
        }
#pragma GCC unroll 4
        for (int r = 0; r < rb; r++) {
            __m512i y = _mm512_set1_epi32((int)p[r * RF_FEW_LD + t]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) a[r][j] = vf_dot(a[r][j], v[j], y);
        }
    }
    store_sums(a, acc, lda, rb);
}

#define RF_QUERY       uint16_t
#define RF_PROBABILITY uint32_t
#include "few.inc.h"

static void NAME(pv_few)(float *acc, int64_t lda, const float *alpha, float *p, const rf_phase *x,
                         int64_t rows, void *work) {
    (void)work;
    for (int64_t r = 0; r < rows; r++) pack_row(p + r * RF_FEW_LD, x->n);
    NAME(pv_dims)(acc, lda, alpha, p, x, rows);
}

/* 64 elements of tokens t and t + 1 from c on; of the last one twice, as its probability is 0. */
RF_INLINE void NAME(pairs_of)(const rf_table *table, const rf_phase *x, int t, int c,
                              __m512i out[4]) {
    const int second = t + 1 < x->n ? t + 1 : t;
    const T *base = (const T *)x->base + c;
    NAME(pairs)(table, base + x->off[t], base + x->off[second], x->dim - c, out);
}

/* Values of a tile as pairs of tokens, ld pairs from one to the next. */
static void NAME(pack_values)(const rf_phase *x, uint32_t *out, int64_t ld) {
    const rf_table table = table_of(RF_TABLE);
    for (int t = 0; t < x->n; t += 2, out += ld) {
        if (x->ahead) {
            prefetch_vector(x->ahead, t, x->dim * (int)sizeof(T));
            prefetch_vector(x->ahead, t + 1, x->dim * (int)sizeof(T));
        }
        for (int c = 0; c < x->dim; c += 64) {
            __m512i v[4];
            NAME(pairs_of)(&table, x, t, c, v);
            for (int j = 0; j < 4; j++) _mm512_storeu_si512(out + c + j * 16, v[j]);
        }
    }
}

#if !RF_WORDS
/* Keys of a tile as bfloat16, in the order of words(). */
static void NAME(widen)(const rf_phase *x, uint16_t *out, int64_t ld) {
    const rf_table table = table_of(RF_TABLE);
    for (int t = 0; t < x->n; t++, out += ld) {
        const T *p = (const T *)x->base + x->off[t];
        if (x->ahead) prefetch_vector(x->ahead, t, x->dim * (int)sizeof(T));
        for (int c = 0; c < x->dim; c += 64) {
            __m512i a, b;
            NAME(words)(&table, p + c, x->dim - c, &a, &b);
            _mm512_storeu_si512(out + c, a);
            _mm512_storeu_si512(out + c + 32, b);
        }
    }
}
#endif

static void NAME(qk_many_dot)(const void *query, int64_t ld, const rf_phase *x, float factor,
                              float *s, void *work) {
#if RF_WORDS
    (void)work;
    dot_scores_many(query, ld, x, factor, s);
#else
    const int dim = (int)rf_pad_dim(x->dim); /* the order is that of whole 64 */
    rf_wide w;
    NAME(widen)(x, work, dim);
    widened(&w, x, work, dim, dim);
    dot_scores_many(query, ld, &w.phase, factor, s);
#endif
}

#if RF_WORDS
/* acc = acc * alpha + p v for eight rows and the 32 elements from c on, of values as they are in
 * the cache. With sixteen rows, two passes that shuffle cost less than pairs written and read
 * again, and run at 0.9 of the dot product's peak. */
RF_INLINE void NAME(pv_eight_rows)(float *acc, int64_t lda, const float *alpha, const uint32_t *p,
                                   int64_t ld, const rf_phase *x, int c, rf_ahead ahead) {
    const T *base = (const T *)x->base + c;
    const int left = x->dim - c, pairs = (x->n + 1) / 2;
    const __mmask32 mask = left >= 32 ? ~(__mmask32)0 : left > 0 ? (1u << left) - 1 : 0;
    vf a[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            a[r][j] =
                alpha ? vf_mul(vf_load(acc + r * lda + j * 16), vf_set1(alpha[r])) : vf_zero();
    for (int t = 0; t < pairs; t++) {
        const int64_t second = 2 * t + 1 < x->n ? 2 * t + 1 : 2 * t; /* its probability is 0 */
        __m512i v = _mm512_maskz_loadu_epi16(mask, base + x->off[2 * t]);
        __m512i w = _mm512_maskz_loadu_epi16(mask, base + x->off[second]);
        __m512i lo = _mm512_unpacklo_epi16(v, w), hi = _mm512_unpackhi_epi16(v, w);
        if (ahead) {
            prefetch_own(x, 2 * t + 4, 2, (int)sizeof(T));
            prefetch_vector(ahead, 2 * t, x->dim * (int)sizeof(T));
            prefetch_vector(ahead, 2 * t + 1, x->dim * (int)sizeof(T));
        }
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            __m512i y = _mm512_set1_epi32((int)p[t * ld + r]);
            a[r][0] = vf_dot(a[r][0], lo, y);
            a[r][1] = vf_dot(a[r][1], hi, y);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) vf_store(acc + r * lda + j * 16, a[r][j]);
}
#endif

static void NAME(pv_many_dot)(float *acc, int64_t lda, const float *alpha, float *p, int64_t ld,
                              const rf_phase *x, int64_t rows, void *work) {
#if RF_WORDS
    if (ld == 16) {
        const uint32_t *q = (const uint32_t *)(const void *)p;
        for (int c = 0; c < lda; c += 32)
            for (int r = 0; r < 16; r += 8)
                NAME(pv_eight_rows)(acc + r * lda + c, lda, alpha ? alpha + r : NULL, q + r, ld, x,
                                    c, c == 0 && r == 0 ? x->ahead : NULL);
        return;
    }
#endif
    NAME(pack_values)(x, work, lda);
    dot_values_many(acc, lda, alpha, p, ld, work, x->n, x->dim, rows);
}

static void NAME(qk_many_amx)(const void *query, int64_t ld, const rf_phase *x, float factor,
                              float *s, void *work) {
    amx_tiles keys[AMX_KEYS];
#if RF_WORDS
    amx_keys(x, work, keys);
    amx_scores(query, ld, keys, x->n, x->dim, x->ahead, factor, s);
#else
    const int dim = (int)rf_pad_dim(x->dim);
    NAME(widen)(x, work, dim);
    amx_rows(work, dim, keys);
    amx_scores(query, ld, keys, x->n, dim, NULL, factor, s);
#endif
}

static void NAME(pv_many_amx)(float *acc, int64_t lda, const float *alpha, float *p, int64_t ld,
                              const rf_phase *x, int64_t rows, void *work) {
    (void)rows; /* whole sixteens of them */
    NAME(pack_values)(x, work, lda);
    amx_values(acc, lda, alpha, (uint32_t *)(void *)p, ld, work, x->n, x->dim);
}

/* Keys transposed, values in pairs of tokens: tiles of B. Past the end keys are the last token, and
 * values zero, since zero times what is not there must be zero. */
static void NAME(pack)(const rf_phase *k, const rf_phase *v, const rf_part *x) {
    const rf_table table = table_of(RF_TABLE);
    uint32_t *to = x->keys;
    for (int t = 0; t < block_tokens(k->n); t += 16)
        for (int c = 0; c < k->dim; c += 64) {
            _Alignas(64) uint32_t rows[16 * 32];
            for (int i = 0; i < 16; i++) {
                const int token = t + i < k->n ? t + i : k->n - 1;
                __m512i a, b;
                NAME(words)(&table, (const T *)k->base + k->off[token] + c, k->dim - c, &a, &b);
                _mm512_store_si512(rows + 32 * i, a);
                _mm512_store_si512(rows + 32 * i + 16, b);
            }
            rf_transpose(rows, 32, to, 16);
            rf_transpose(rows + 16, 32, to + AMX_TILE, 16);
            to += 2 * AMX_TILE;
        }
    const int64_t tiles = rf_pad_dim(v->dim) / 16;
    for (int t = 0; t < block_tokens(v->n); t += 2)
        for (int c = 0; c < v->dim; c += 64) {
            __m512i pairs[4] = {0};
            if (t < v->n) NAME(pairs_of)(&table, v, t, c, pairs);
            uint32_t *at =
                (uint32_t *)x->values + (t / 32 * tiles + c / 16) * AMX_TILE + t / 2 % 16 * 16;
            for (int j = 0; j < 4; j++) _mm512_storeu_si512(at + j * AMX_TILE, pairs[j]);
        }
}

/* Sums, queries and a packed part of so many rows stay in a core's second level of 2 MiB. */
static const rf_blocks NAME(blocks) = {.rows = 1024, .pack = NAME(pack), .run = run_blocks};

/* A row of sums, times f, as the output. */
static void NAME(finish)(const float *acc, int dim, float f, void *out) {
    for (int c = 0; c < dim; c += 64) {
        vf v[4];
        for (int j = 0; j < 4; j++) v[j] = vf_mul(vf_load(acc + c + 16 * j), vf_set1(f));
#if RF_WORDS
        natural_words(v);
#else
        natural_bytes(v);
#endif
        store_words((uint16_t *)out + c, dim - c, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]),
                    (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]));
    }
}

#undef T
#undef NAME
#undef RF_WORDS
#undef RF_TABLE
#undef rf_bytes
