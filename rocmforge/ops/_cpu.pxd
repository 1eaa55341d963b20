from libc.stdint cimport int32_t, int64_t

from rocmforge.ops._params cimport (
    rf_attention_params, rf_copy_params, rf_merge_params, rf_write_params)

cdef int64_t check_attention(const rf_attention_params *p, int64_t max_seqlen_q,
                             int64_t max_seq_len, int64_t mask_width) except -1
cdef int attention(const rf_attention_params *p, int64_t work) except -1
cdef int merge_states(const rf_merge_params *p) except -1
cdef int check_write(const rf_write_params *p) except -1
cdef int write_kv(const rf_write_params *p) except -1
cdef int check_copies(const int32_t *copies, int64_t num_copies, int64_t num_blocks) except -1
cdef int check_blocks(const int32_t *ids, int64_t num_ids, int64_t num_blocks,
                      bint written) except -1
cdef int64_t block_bytes(const rf_copy_params *pools, int64_t num_pools) noexcept
cdef int copy_blocks(const rf_copy_params *pools, int64_t num_pools, const int32_t *copies,
                     int64_t num_copies) except -1
cdef int gather_blocks(const rf_copy_params *pools, int64_t num_pools, const int32_t *ids,
                       int64_t num_ids, char *data, int64_t stride) except -1
cdef int scatter_blocks(const rf_copy_params *pools, int64_t num_pools, const int32_t *ids,
                        int64_t num_ids, const char *data, int64_t stride) except -1
