cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from rocmforge.cache_group cimport CacheGroup


cdef struct Item:          # what one sequence does in a batch
    int64_t start          # its length before
    uint64_t version       # the sequence's, so that a stale batch is recognised
    int32_t row
    int32_t num_tokens
    bint copied            # planning found its last block of a group shared: it gets a copy


@cython.final
cdef class BatchGroup:
    cdef readonly cnp.ndarray slot_mapping, block_table, copies, table_delta
    cdef CacheGroup group
    cdef uint64_t serial       # of the batch: equal to the group's newest while the table is its
    cdef cnp.ndarray rows, seq_lens, cu_seqlens_q
    cdef tuple csr             # (indptr, indices, last page lengths), once asked for
    cdef cnp.ndarray csr_buffer  # what they are views of

    cdef int32_t *live_table(self) except NULL
    cdef tuple make_csr(self)


@cython.final
cdef class Batch:
    cdef readonly cnp.ndarray sequence_ids, rows, positions, seq_lens, cu_seqlens_q
    cdef readonly tuple groups
    cdef readonly int num_tokens, max_seqlen_q, max_seq_len
    cdef readonly bint committed
    cdef object manager        # whose batch it is; None while append fills it in
    cdef Item *items           # [num_sequences]
    cdef int32_t num_sequences
    cdef object written        # bytearray [num_layers] of what KVCache.write has done, or None
    cdef int unwritten         # layers that it has not

    cdef int resize(self, int64_t num_sequences) except -1
    cdef int read_sequences(self, object sequence_ids) except -1
    cdef int read_counts(self, object num_tokens) except -1
    cdef int make_room(self, tuple groups) except -1


cdef Batch new_batch()
