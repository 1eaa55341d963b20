/* The seam between what is the same on every processor (planning, threads) and what is compiled
 * once for each instruction set (variant.c). One table of functions a variant. */
#ifndef RF_CPU_KERNELS_H
#define RF_CPU_KERNELS_H

#include <stddef.h>

#include "rf/params.h"

/* Context tokens of a part: the unit by which a sequence's context may be split over threads. A
 * part starts from an empty softmax state, and the states of all parts are folded in their order,
 * on whichever threads they were made: so the bits do not depend on the split. */
#define RF_PART 256
/* Tokens whose scores are held at once. Divides RF_PART. */
#define RF_TILE 32
/* Rows (query tokens x query heads of one key/value head) of a task, unless one token has more. */
#define RF_MAX_ROWS 64
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

/* A (query tokens, head) whose parts were given to several tasks: the last one to finish folds
 * them.
 */
typedef struct rf_merge {
    int64_t states; /* floats from the start of the plan's states */
    int32_t seq, head, num_heads, q0, num_q;
    int32_t num_parts;
    int32_t pending; /* tasks not finished: changed atomically */
} rf_merge;

/* A softmax state of r rows: r * padded v_head_dim sums of exp2(logit - max) * value in the
 * variant's own order of elements, then r maxima (base 2), then r sums of exp2(logit - max), both
 * padded. */
static inline int64_t rf_pad_dim(int64_t dim) { return (dim + 31) & ~(int64_t)31; }
static inline int64_t rf_pad_rows(int64_t rows) { return (rows + 15) & ~(int64_t)15; }
static inline int64_t rf_state_floats(int64_t rows, int64_t v_head_dim) {
    return rows * rf_pad_dim(v_head_dim) + 2 * rf_pad_rows(rows);
}

typedef struct rf_kernels {
    const char *name;
    /* Floats of scratch that a task of that many rows, of all its heads, needs; 64-byte aligned. */
    int64_t (*scratch_floats)(const rf_attention_params *p, int64_t rows);
    /* states: NULL, and the task writes its output; or where part 0 of its merge has its state. */
    void (*attend[RF_NUM_WIDE_DTYPES])(const rf_attention_params *p, const rf_task *t, float *scratch,
                                  float *states);
    /* Folds the states of a merge and writes the output. */
    void (*merge[RF_NUM_WIDE_DTYPES])(const rf_attention_params *p, const rf_merge *m, float *states);
} rf_kernels;

/* Those compiled in, best first, NULL at the end; available() asks the processor. */
typedef struct rf_variant {
    const rf_kernels *kernels;
    int (*available)(void);
} rf_variant;

extern const rf_kernels rf_kernels_portable;
extern const rf_kernels rf_kernels_avx2;
extern const rf_kernels rf_kernels_avx512;

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
/* Context tokens that query token i of the sequence sees. */
static inline int64_t rf_visible(const rf_attention_params *p, const rf_seq *s, int64_t i) {
    int64_t n = p->causal ? s->kv_len - s->q_len + i + 1 : s->kv_len;
    return n > 0 ? n : 0;
}

#endif
