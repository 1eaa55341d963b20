/* Arguments of the operations, one plain struct each: shared by the CPU and the HIP kernels.
 *
 * No pointer is owned. Nothing here is checked: see the rf_cpu_check functions in rf/cpu.h. */
#ifndef RF_PARAMS_H
#define RF_PARAMS_H

#include "rf/layout.h"

typedef struct rf_attention_params {
    rf_rows query;              /* [num_tokens, num_heads, head_dim] */
    rf_rows out;                /* [num_tokens, num_heads, v_head_dim], same type as the query */
    rf_paged k;                 /* head_dim elements a vector */
    rf_paged v;                 /* v_head_dim elements a vector */
    const int32_t *block_table; /* [num_rows, table_width] */
    const int32_t *rows;        /* [num_seqs] row of the table, or NULL: the sequence's own index */
    const int32_t *seq_lens;    /* [num_seqs] tokens in the cache, the new ones included */
    const int32_t *cu_seqlens_q; /* [num_seqs + 1], or NULL: one query token a sequence */
    int64_t table_stride;        /* elements from one row of the table to the next */
    int64_t num_tokens;
    int64_t num_blocks; /* in the pool */
    int64_t num_rows;   /* of the table */
    int64_t table_width;
    int32_t num_seqs;
    int32_t num_heads;
    int32_t num_kv_heads; /* divides num_heads */
    int32_t head_dim;     /* a multiple of 8 */
    int32_t v_head_dim;   /* a multiple of 8 */
    int32_t block_size;   /* tokens */
    int32_t dtype;        /* enum rf_dtype, of query, out, k and v */
    int32_t causal;       /* 0 or 1, aligned at the last token of query and context */
    float scale;          /* of the logits */
    int32_t reserved;     /* 0 */
} rf_attention_params;
static_assert(sizeof(rf_attention_params) == 224, "rf_attention_params is shared with device code");

typedef struct rf_write_params {
    rf_rows key;                 /* [num_tokens, num_kv_heads, head_dim] */
    rf_rows value;               /* [num_tokens, num_kv_heads, v_head_dim] */
    rf_paged k;                  /* of the same type as key */
    rf_paged v;                  /* of the same type as value */
    const int64_t *slot_mapping; /* [num_tokens] block * block_size + offset; negative is skipped */
    int64_t num_tokens;
    int64_t num_blocks;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t v_head_dim;
    int32_t block_size;
    int32_t dtype; /* enum rf_dtype */
    int32_t reserved;
} rf_write_params;
static_assert(sizeof(rf_write_params) == 160, "rf_write_params is shared with device code");

#endif
