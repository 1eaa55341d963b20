cimport numpy as cnp
from libc.stdint cimport int64_t

from rocmforge.ops._params cimport (
    rf_attention_params, rf_copy_params, rf_merge_params, rf_write_params)

cdef object as_scale(object scale, str name)
cdef int read_attention(rf_attention_params *p, cnp.ndarray query, cnp.ndarray k, cnp.ndarray v,
                        object k_scale, object v_scale, bint nhd, object kv_dtype) except -1
cdef int read_batch(rf_attention_params *p, cnp.ndarray table, cnp.ndarray lens, cnp.ndarray cu,
                    cnp.ndarray rows) except -1
cdef int read_logits(rf_attention_params *p, object scale, object causal, object window_size,
                     object softcap, cnp.ndarray alibi_slopes, cnp.ndarray sinks) except -1
cdef int64_t read_mask(rf_attention_params *p, cnp.ndarray mask) except -2
cdef int read_write(rf_write_params *p, cnp.ndarray key, cnp.ndarray value, cnp.ndarray k,
                    cnp.ndarray v, cnp.ndarray slots, object k_scale, object v_scale,
                    bint nhd, object kv_dtype) except -1
cdef int read_merge(rf_merge_params *p, cnp.ndarray out_a, cnp.ndarray lse_a, cnp.ndarray out_b,
                    cnp.ndarray lse_b) except -1
cdef int read_merged(rf_merge_params *p, cnp.ndarray out_a, cnp.ndarray lse_a, cnp.ndarray out_b,
                     cnp.ndarray lse_b, cnp.ndarray out, cnp.ndarray lse) except -1
cdef int read_blocks(rf_copy_params *p, cnp.ndarray a, str name) except -1
