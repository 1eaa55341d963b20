/* Arguments of the operations, one plain struct each: shared by the CPU and the HIP kernels.
 *
 * No pointer is owned. Nothing here is checked: see the rf_cpu_check functions in rf/cpu.h. */
#ifndef RF_PARAMS_H
#define RF_PARAMS_H

#include "rf/layout.h"

/* Logit = scale * q.k, then the soft cap, then ALiBi, then the masks: causal, window, mask, and a
 * negative block. Positions count from the sequence's first token; the last query token is at
 * position seq_len - 1. */
typedef struct rf_attention_params {
    rf_rows query;              /* [num_tokens, num_heads, head_dim] */
    rf_rows out;                /* [num_tokens, num_heads, v_head_dim], same type as the query */
    float *lse;                 /* [num_tokens, num_heads] natural logarithm, contiguous; or NULL */
    rf_paged k;                 /* head_dim elements a vector */
    rf_paged v;                 /* v_head_dim elements a vector; may be the first ones of k */
    rf_scales k_scale, v_scale; /* read for 8-bit caches only */
    const int32_t *block_table; /* [num_rows, table_width] */
    const int32_t *rows;        /* [num_seqs] row of the table, or NULL: the sequence's own index */
    const int32_t *seq_lens;    /* [num_seqs] tokens in the cache, the new ones included */
    const int32_t *cu_seqlens_q; /* [num_seqs + 1], or NULL: one query token a sequence */
    const float *alibi_slopes;   /* [num_heads], or NULL: slope * (key - query position) is added */
    const float *sinks;          /* [num_heads] logits that take part in the sum alone, or NULL */
    const uint8_t *mask; /* [num_tokens, >= query tokens of its sequence]: 0 hides that new token */
    int64_t mask_stride; /* bytes from one query token to the next */
    int64_t table_stride; /* elements from one row of the table to the next */
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
    int32_t dtype;        /* enum rf_dtype, one of the wide ones, of query and out */
    int32_t kv_dtype;     /* enum rf_dtype of k and v: dtype, or an 8-bit one */
    int32_t causal;       /* 0 or 1, aligned at the last token of query and context */
    int32_t window_left;  /* the query at position p sees p - left .. p + right; */
    int32_t window_right; /* negative: no bound */
    float scale;          /* of the logits */
    float softcap;        /* logit = softcap * tanh(logit / softcap); 0: off */
    int32_t reserved;     /* 0 */
} rf_attention_params;
static_assert(sizeof(rf_attention_params) == 360, "rf_attention_params is shared with device code");

typedef struct rf_write_params {
    rf_rows key;   /* [num_tokens, num_kv_heads, head_dim] */
    rf_rows value; /* [num_tokens, num_kv_heads, v_head_dim] */
    rf_paged k;
    rf_paged v;                  /* data NULL: a latent cache, which has keys only */
    rf_scales k_scale, v_scale;  /* for 8-bit caches: given, or filled by the write (per_token) */
    const int64_t *slot_mapping; /* [num_tokens] block * block_size + offset; negative is skipped */
    int64_t num_tokens;
    int64_t num_blocks;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t v_head_dim;
    int32_t block_size;
    int32_t dtype;    /* enum rf_dtype, one of the wide ones, of key and value */
    int32_t kv_dtype; /* enum rf_dtype of k and v: dtype, or an 8-bit one */
} rf_write_params;
static_assert(sizeof(rf_write_params) == 240, "rf_write_params is shared with device code");

/* Two partial results over different keys of the same queries become one. A part without a visible
 * key has lse -inf, and what its out holds is not read. */
typedef struct rf_merge_params {
    rf_rows a, b, out;          /* [num_tokens, num_heads, head_dim]; out may be a or b */
    const float *lse_a, *lse_b; /* [num_tokens, num_heads], contiguous */
    float *lse;                 /* likewise, or NULL; may be lse_a or lse_b */
    int64_t num_tokens;
    int32_t num_heads;
    int32_t head_dim;
    int32_t dtype; /* enum rf_dtype, one of the wide ones */
    int32_t reserved;
} rf_merge_params;
static_assert(sizeof(rf_merge_params) == 120, "rf_merge_params is shared with device code");

/* Whole blocks as bytes: outer x middle pieces of `inner` contiguous bytes each, in a pool. */
typedef struct rf_copy_params {
    char *data;
    int64_t block_stride;  /* bytes */
    int64_t outer_stride;  /* bytes */
    int64_t middle_stride; /* bytes */
    int64_t outer;         /* pieces in the first of two inner dimensions */
    int64_t middle;        /* pieces in the second */
    int64_t inner;         /* contiguous bytes of a piece */
} rf_copy_params;
static_assert(sizeof(rf_copy_params) == 56, "rf_copy_params is shared with device code");

#endif
