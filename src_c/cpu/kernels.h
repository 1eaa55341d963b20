/* The seam between what is the same on every processor (planning, threads) and what is compiled
 * once for each instruction set (variant.c, dot.c). */
#ifndef RF_CPU_KERNELS_H
#define RF_CPU_KERNELS_H

#include <stddef.h>

#include "products.h"
#include "rf/params.h"

/* Context tokens of a part: the unit by which a sequence's context may be split over threads. A
 * part starts from an empty softmax state, and the states of all parts are folded in their order,
 * on whichever threads they were made: so the bits do not depend on the split. */
#define RF_PART 256
/* Tokens whose scores are held at once, with few rows a head (of float32 half as many) and with
 * many. All divide RF_PART. */
#define RF_FEW_TILE  64
#define RF_MANY_TILE 64
/* Rows (query tokens x query heads of one key/value head) from which a head has many: then lanes
 * are rows and keys are broadcast, where with few rows lanes are elements of a key. */
#define RF_MANY_ROWS 12
/* Rows of a task, unless one query token has more. */
#define RF_MAX_ROWS 64
/* With products by blocks (rf_blocks): the rows of a block, and of a head from which it is cut into
 * blocks. */
#define RF_BLOCK_ROWS      32
#define RF_BLOCK_ROWS_FROM 96
/* Key/value heads of a task. */
#define RF_MAX_HEADS 8

/* Query tokens q0 .. q0 + num_q - 1 of a sequence, key/value heads head .. head + num_heads - 1,
 * parts part0 .. part1 - 1 of the context. */
typedef struct rf_task {
    int32_t seq;
    int32_t head;
    int32_t num_heads;
    int32_t q0;
    int32_t num_q;
    int32_t part0, part1;
    int32_t merge; /* index of the rf_merge it is a piece of, or -1 when it is all parts */
} rf_task;

/* Query tokens and heads whose parts were given to several tasks: the last one to finish folds
 * them.
 */
typedef struct rf_merge {
    int64_t states; /* floats from the start of the plan's states */
    int32_t seq, head, num_heads, q0, num_q;
    int32_t first_part, num_parts;
    int32_t pieces;  /* tasks that it was split into */
    int32_t pending; /* those not finished: changed atomically */
} rf_merge;

/* A softmax state of r rows: r * padded v_head_dim sums of exp2(logit - max) * value in the
 * kernel's own order of elements, then r maxima (base 2), then r sums of exp2(logit - max), both
 * padded. The rows of a task are those of its first head, then those of the next. */
static inline int64_t rf_pad_dim(int64_t dim) { return (dim + 63) & ~(int64_t)63; }
static inline int64_t rf_pad_rows(int64_t rows) { return (rows + 15) & ~(int64_t)15; }
static inline int64_t rf_state_floats(int64_t rows, int64_t v_head_dim) {
    return rows * rf_pad_dim(v_head_dim) + 2 * rf_pad_rows(rows);
}

/* Rows that a head takes in scratch and states: with many, whole vectors of them, or blocks. */
static inline int64_t rf_head_rows(int64_t rows) {
    if (rows >= RF_BLOCK_ROWS_FROM)
        return (rows + RF_BLOCK_ROWS - 1) & ~(int64_t)(RF_BLOCK_ROWS - 1);
    return rows < RF_MANY_ROWS ? rows : rf_pad_rows(rows);
}

/* Copies `count` pieces of `width` bytes, whole lines of 64 and aligned where they go, past the
 * caches, and fetches what lies `ahead` bytes behind each; 0: nothing. A fence is the caller's. */
typedef void rf_stream(char *to, int64_t to_stride, const char *from, int64_t from_stride,
                       int64_t count, int64_t width, int ahead);

/* What an instruction set has of everything but the products. */
typedef struct rf_kernels {
    /* Floats of scratch, 64-byte aligned, for a task of so many heads with so many rows each. */
    int64_t (*scratch_floats)(const rf_attention_params *p, int64_t rows, int64_t heads);
    /* states: NULL, and the task writes its output; or where the first part of its merge has its
     * state, and first_part which part that is. */
    void (*attend)(const rf_attention_params *p, const rf_products *f, const rf_task *t,
                   float *scratch, float *states, int32_t first_part);
    /* Folds the states of a merge and writes the output. */
    void (*merge)(const rf_attention_params *p, const rf_products *f, const rf_merge *m,
                  float *states);
    /* Tokens begin .. end - 1 of a merge of two results, and of a write to an 8-bit cache. */
    void (*merge_states)(const rf_merge_params *p, int64_t begin, int64_t end);
    void (*quantise)(const rf_write_params *p, int64_t begin, int64_t end);
    rf_stream *stream;
} rf_kernels;

/* Types of cache that a query can meet: its own, and the 8-bit ones. */
#define RF_NUM_CACHES (1 + RF_NUM_DTYPES - RF_NUM_WIDE_DTYPES)

/* What a processor can run. Most of what is best for bfloat16 is AVX-512's, and compiled once. */
typedef struct rf_variant {
    const char *name;
    const rf_kernels *kernels;
    /* For heads with few rows and with many; of each type of query and of cache. */
    const rf_products *few[RF_NUM_WIDE_DTYPES][RF_NUM_CACHES];
    const rf_products *many[RF_NUM_WIDE_DTYPES][RF_NUM_CACHES];
    int write_ahead; /* bytes from what a large write copies to what it fetches; 0: nothing */
    int (*available)(void);
    int (*is_slow)(void); /* whether this processor is better served by others; NULL: never */
} rf_variant;

static inline const rf_products *rf_products_of(const rf_variant *v, int64_t rows, int dtype,
                                                int kv_dtype) {
    const int wide = kv_dtype < RF_NUM_WIDE_DTYPES;
    const int cache = wide ? 0 : 1 + kv_dtype - RF_NUM_WIDE_DTYPES;
    return (rows < RF_MANY_ROWS ? v->few : v->many)[dtype][cache];
}

typedef const rf_products rf_products_of_caches[RF_NUM_CACHES];
extern const rf_kernels rf_kernels_portable, rf_kernels_avx2, rf_kernels_avx512;
extern rf_products_of_caches rf_products_portable[RF_NUM_WIDE_DTYPES];
extern rf_products_of_caches rf_products_avx2[RF_NUM_WIDE_DTYPES];
extern rf_products_of_caches rf_products_avx512[RF_NUM_WIDE_DTYPES];
/* For queries of bfloat16. */
extern rf_products_of_caches rf_products_avx512bf16, rf_products_amx;
/* The same over float8 caches, of few rows alone. */
extern const rf_products rf_products_float8[2];

/* Where a sequence's queries and context are. */
typedef struct rf_seq {
    const int32_t *blocks;
    int64_t q_start; /* first row of query and out */
    int64_t q_len;
    int64_t kv_len;
} rf_seq;

static inline rf_seq rf_seq_of(const rf_attention_params *p, int64_t s) {
    rf_seq q;
    q.blocks = p->block_table + (p->rows ? p->rows[s] : s) * p->table_stride;
    q.q_start = p->cu_seqlens_q ? p->cu_seqlens_q[s] : s;
    q.q_len = p->cu_seqlens_q ? p->cu_seqlens_q[s + 1] - q.q_start : 1;
    q.kv_len = p->seq_lens[s];
    return q;
}
/* Query token i of the sequence sees the context from rf_first to before rf_visible. */
static inline int64_t rf_visible(const rf_attention_params *p, const rf_seq *s, int64_t i) {
    int64_t own = s->kv_len - s->q_len + i, n = p->causal ? own + 1 : s->kv_len;
    if (p->window_right >= 0 && own + p->window_right + 1 < n) n = own + p->window_right + 1;
    if (n > s->kv_len) n = s->kv_len;
    return n > 0 ? n : 0;
}
static inline int64_t rf_first(const rf_attention_params *p, const rf_seq *s, int64_t i) {
    if (p->window_left < 0) return 0;
    int64_t first = s->kv_len - s->q_len + i - p->window_left;
    return first > 0 ? first : 0;
}

#endif
