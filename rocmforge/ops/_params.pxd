# Arguments of the operations (src_c/include/rf) as Cython sees them.
from libc.stdint cimport int32_t, int64_t, uint8_t


cdef extern from "rf/layout.h" nogil:
    enum:
        RF_F32, RF_F16, RF_BF16, RF_E4M3FN, RF_E4M3FNUZ, RF_I8, RF_NUM_DTYPES, RF_NUM_WIDE_DTYPES
    ctypedef struct rf_scales:
        float *data
        int64_t block_stride
        int64_t head_stride
        int64_t token_stride
        float value
        int32_t per_token
    ctypedef struct rf_paged:
        void *data
        int64_t block_stride
        int64_t head_stride
        int64_t token_stride
    ctypedef struct rf_rows:
        void *data
        int64_t token_stride
        int64_t head_stride


cdef extern from "rf/params.h" nogil:
    ctypedef struct rf_attention_params:
        rf_rows query
        rf_rows out
        float *lse
        rf_paged k
        rf_paged v
        rf_scales k_scale
        rf_scales v_scale
        const int32_t *block_table
        const int32_t *rows
        const int32_t *seq_lens
        const int32_t *cu_seqlens_q
        const float *alibi_slopes
        const float *sinks
        const uint8_t *mask
        int64_t mask_stride
        int64_t table_stride
        int64_t num_tokens
        int64_t num_blocks
        int64_t num_rows
        int64_t table_width
        int32_t num_seqs
        int32_t num_heads
        int32_t num_kv_heads
        int32_t head_dim
        int32_t v_head_dim
        int32_t block_size
        int32_t dtype
        int32_t kv_dtype
        int32_t causal
        int32_t window_left
        int32_t window_right
        float scale
        float softcap
        int32_t reserved
    ctypedef struct rf_write_params:
        rf_rows key
        rf_rows value
        rf_paged k
        rf_paged v
        rf_scales k_scale
        rf_scales v_scale
        const int64_t *slot_mapping
        int64_t num_tokens
        int64_t num_blocks
        int32_t num_kv_heads
        int32_t head_dim
        int32_t v_head_dim
        int32_t block_size
        int32_t dtype
        int32_t kv_dtype
    ctypedef struct rf_merge_params:
        rf_rows a
        rf_rows b
        rf_rows out
        const float *lse_a
        const float *lse_b
        float *lse
        int64_t num_tokens
        int32_t num_heads
        int32_t head_dim
        int32_t dtype
        int32_t reserved
    ctypedef struct rf_copy_params:
        char *data
        int64_t block_stride
        int64_t outer_stride
        int64_t middle_stride
        int64_t outer
        int64_t middle
        int64_t inner
