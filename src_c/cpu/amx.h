/* The products of many rows on the tile registers of AMX, for a bfloat16 query over a bfloat16 or
 * 8-bit cache; everything else of the variant is AVX512-BF16's. Part of dot.c.
 *
 * TDPBF16PS adds A B to C, with A sixteen rows of 32 bfloat16, B sixteen pairs of rows of sixteen,
 * C sixteen rows of sixteen float32. The layouts of the vector kernels fit as they are. Scores: A
 * is sixteen keys, read from the cache where they are equally far apart, B the queries as columns
 * of pairs, C the scores. Values: A is the probabilities of sixteen rows (the one thing that has to
 * be transposed), B pairs of tokens' values, C the sums. Four tiles of C are made at once, so that
 * each tile of A and B that is read is multiplied twice: one load a product, which takes twice as
 * long.
 *
 * The tests run this very code, on processors with AMX or emulated (tests/c/amx_emulator.c).
 *
 * Learnt on a Xeon (16 cycles a product of tiles whatever its size, 8 a load from the first level):
 * with 64 rows the products alone would be a tenth of the time, the rest is loads of tiles,
 * softmax, transposing and packing; so heads with many more rows go by amx_block.h. Tiles of 128
 * tokens, half as many loads and stores of sums, lost 1% to 12% in verification. With fewer than 12
 * rows, sixteen keys times so many queries, and so many rows of probabilities times packed values:
 * as fast as AVX-512 in the caches, where the fetching ahead takes a third of it, and 0.83 of it
 * from memory over bfloat16 and int8. */
#ifndef RF_CPU_AMX_H
#define RF_CPU_AMX_H

/* ---- the instructions ----
 * Not the compilers' intrinsics: gcc 12's loads do not say that they read memory, and so pass the
 * stores before them. Registers are numbers in the text of an instruction. */

#define AMX_LOAD(reg, at, stride)                                                                  \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #reg ::"r"(at), "r"((int64_t)(stride))           \
                     : "memor"                                                                     \
                       "y")
#define AMX_STORE(reg, at, stride)                                                                 \
    __asm__ volatile("tilestored %%tmm" #reg ", (%0,%1,1)" ::"r"(at), "r"((int64_t)(stride))       \
                     : "memory")
#define AMX_ZERO(reg)    __asm__ volatile("tilezero %%tmm" #reg ::)
#define AMX_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

/* All eight registers with sixteen rows of 64 bytes; of the calling thread, until amx_end. */
static void amx_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
/* Without it, every switch of the thread would save the registers. */
static void amx_end(void) { __asm__ volatile("tilerelease" ::); }

/* ---- products of tiles ---- */

/* Tiles of A below each other, or of B beside each other, along the dimension that is summed over:
 * tile k is at + k * step, its rows are stride apart; both in bytes. */
typedef struct amx_tiles {
    const char *at;
    int64_t stride, step;
} amx_tiles;

/* c = a b, or with `add` c += a b: na x nb tiles, each 1 or 2, summed over `steps` tiles. Meanwhile
 * fetches a line of each of 16 na vectors a step, from token `first` on. */
RF_INLINE void amx_block(const amx_tiles *a, const amx_tiles *b, int na, int nb, int steps,
                         float *c, int64_t ldc, int add, rf_ahead ahead, int first) {
    float *const below = c + 16 * ldc;
    const int64_t stride = ldc * (int64_t)sizeof(float);
    if (add) {
        AMX_LOAD(0, c, stride);
        if (nb > 1) AMX_LOAD(1, c + 16, stride);
        if (na > 1) AMX_LOAD(2, below, stride);
        if (na > 1 && nb > 1) AMX_LOAD(3, below + 16, stride);
    } else {
        AMX_ZERO(0);
        if (nb > 1) AMX_ZERO(1);
        if (na > 1) AMX_ZERO(2);
        if (na > 1 && nb > 1) AMX_ZERO(3);
    }
    for (int k = 0; k < steps; k++) {
        AMX_LOAD(4, a[0].at + k * a[0].step, a[0].stride);
        AMX_LOAD(6, b[0].at + k * b[0].step, b[0].stride);
        AMX_DOT(0, 4, 6);
        if (nb > 1) {
            AMX_LOAD(7, b[1].at + k * b[1].step, b[1].stride);
            AMX_DOT(1, 4, 7);
        }
        if (na > 1) {
            AMX_LOAD(5, a[1].at + k * a[1].step, a[1].stride);
            AMX_DOT(2, 5, 6);
        }
        if (na > 1 && nb > 1) AMX_DOT(3, 5, 7);
        if (!ahead) continue;
        for (int t = first; t < first + 16 * na; t++) __builtin_prefetch(ahead[t] + k * 64, 0, 2);
    }
    AMX_STORE(0, c, stride);
    if (nb > 1) AMX_STORE(1, c + 16, stride);
    if (na > 1) AMX_STORE(2, below, stride);
    if (na > 1 && nb > 1) AMX_STORE(3, below + 16, stride);
}
RF_INLINE void amx_blocks(const amx_tiles *a, const amx_tiles *b, int na, int nb, int steps,
                          float *c, int64_t ldc, int add, rf_ahead ahead, int first) {
    if (na > 1 && nb > 1) amx_block(a, b, 2, 2, steps, c, ldc, add, ahead, first);
    else if (na > 1) amx_block(a, b, 2, 1, steps, c, ldc, add, ahead, first);
    else if (nb > 1) amx_block(a, b, 1, 2, steps, c, ldc, add, ahead, first);
    else amx_block(a, b, 1, 1, steps, c, ldc, add, ahead, first);
}

/* ---- scores ---- */

#define AMX_KEYS (RF_MANY_TILE / 16)

/* Keys that lie one after another, ld elements each, and may be read to whole sixteens of them. */
RF_INLINE void amx_rows(const uint16_t *base, int64_t ld, amx_tiles keys[AMX_KEYS]) {
    for (int i = 0; i < AMX_KEYS; i++)
        keys[i] = (amx_tiles){(const char *)(base + 16 * i * ld), 2 * ld, 64};
}

/* bfloat16 keys of a cache: as they are where sixteen tokens are equally far apart and have nothing
 * but whole rows of tiles, else copied to `work`, padded with zeros. Only what exists is read. */
static void amx_keys(const rf_phase *x, uint16_t *work, amx_tiles keys[AMX_KEYS]) {
    const uint16_t *base = (const uint16_t *)(const void *)x->base;
    const int64_t ld = rf_pad_dim(x->dim);
    for (int t = 0; t < x->n; t += 16) {
        const int64_t *off = x->off + t; /* past the end: those of the last token */
        const int64_t apart = off[1] - off[0];
        int direct = x->dim % 32 == 0;
        for (int i = 2; i < 16; i++) direct &= off[i] - off[i - 1] == apart;
        if (direct) {
            keys[t / 16] = (amx_tiles){(const char *)(base + off[0]), 2 * apart, 64};
            continue;
        }
        uint16_t *to = work + t * ld;
        keys[t / 16] = (amx_tiles){(const char *)to, 2 * ld, 64};
        for (int i = 0; i < 16; i++, to += ld)
            for (int c = 0; c < x->dim; c += 64) {
                __m512i a, b;
                load_words(base + off[i] + c, x->dim - c, &a, &b);
                _mm512_storeu_si512(to + c, a);
                _mm512_storeu_si512(to + c + 32, b);
            }
    }
}

/* As dot_scores_many: of whole sixteens of tokens, those past the end are not read. ahead: NULL, or
 * what to fetch. */
static void amx_scores(const uint32_t *q, int64_t ld, const amx_tiles keys[AMX_KEYS], int n,
                       int dim, rf_ahead ahead, float factor, float *s) {
    const int64_t stride = ld * 4;
    const int steps = (dim + 31) / 32;
    for (int64_t r = 0; r < ld; r += 32, ahead = NULL) {
        const char *at = (const char *)(q + r);
        const amx_tiles queries[2] = {{at, stride, 16 * stride}, {at + 64, stride, 16 * stride}};
        for (int t = 0; t < n; t += 32)
            amx_blocks(keys + t / 16, queries, n - t > 16 ? 2 : 1, ld - r > 16 ? 2 : 1, steps,
                       s + t * ld + r, ld, 0, ahead, t);
    }
    const vf f = vf_set1(factor);
    for (int64_t i = 0; i < n * ld; i += 16) vf_store(s + i, vf_mul(vf_load(s + i), f));
}

/* ---- values ---- */

/* acc = acc * alpha for sixteen rows. Most tiles raise no row's maximum. */
RF_INLINE void amx_rescale(float *acc, int64_t lda, const float *alpha, int dim) {
    if (_mm512_cmp_ps_mask(vf_load(alpha), vf_set1(1.0f), _CMP_EQ_OQ) == 0xffff) return;
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < dim; c += 16)
            vf_store(acc + r * lda + c, vf_mul(vf_load(acc + r * lda + c), vf_set1(alpha[r])));
}

/* acc = acc * alpha + p v; alpha NULL: acc = p v. Whole sixteens of rows, which acc has, and whole
 * 64 elements. p: pairs of tokens, p[pair * ld + row], with as much room again behind RF_MANY_TILE
 * / 2 of them; v: v[pair * lda + element], with room for whole sixteens of pairs. */
static void amx_values(float *acc, int64_t lda, const float *alpha, uint32_t *p, int64_t ld,
                       uint32_t *v, int n, int dim) {
    const int pairs = (n + 1) / 2, steps = (pairs + 15) / 16, used = (int)rf_pad_dim(dim);
    uint32_t *const turned = p + RF_MANY_TILE / 2 * ld;
    for (int i = pairs; i < steps * 16; i++) { /* zero times what is not there must be zero */
        memset(p + i * ld, 0, (size_t)ld * 4);
        memset(v + i * lda, 0, (size_t)used * 4);
    }
    for (int64_t r = 0; r < ld; r += 16) {
        for (int k = 0; k < steps; k++)
            rf_transpose(p + k * 16 * ld + r, ld, turned + (r / 16 * steps + k) * 256, 16);
        if (alpha) amx_rescale(acc + r * lda, lda, alpha + r, used);
    }
    for (int c = 0; c < used; c += 32) {
        const char *at = (const char *)(v + c);
        const int64_t stride = lda * 4;
        const amx_tiles values[2] = {{at, stride, 16 * stride}, {at + 64, stride, 16 * stride}};
        for (int64_t r = 0; r < ld; r += 32) {
            const char *rows = (const char *)(turned + r / 16 * steps * 256);
            const amx_tiles p2[2] = {{rows, 64, 1024}, {rows + steps * 1024, 64, 1024}};
            amx_blocks(p2, values, ld - r > 16 ? 2 : 1, 2, steps, acc + r * lda + c, lda,
                       alpha != NULL, NULL, 0);
        }
    }
}

#endif
