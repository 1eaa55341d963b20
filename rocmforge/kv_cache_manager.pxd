cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint64_t

from rocmforge.block_allocator cimport BlockAllocator
from rocmforge.page_table cimport PageTable


cdef struct Sequence:
    int64_t length     # tokens that have a slot
    int64_t committed  # tokens whose keys and values are known to be written, from the start on
    uint64_t version   # set from the manager's counter when the sequence is made: tells its batches
    uint64_t seen      # the planning that last met it, to find an id named twice


cdef struct Item:          # what one sequence does in a batch
    int64_t start          # its length before
    uint64_t version       # the sequence's, so that a stale batch is recognised
    int32_t row
    int32_t num_tokens
    int32_t new_blocks     # blocks to append
    bint copies            # its last block is shared and partly filled: write into a copy of it


cdef class Batch:
    cdef readonly cnp.ndarray sequence_ids, rows, slot_mapping, positions, seq_lens, cu_seqlens_q
    cdef readonly cnp.ndarray copies, block_table
    cdef readonly int num_tokens, max_seqlen_q, max_seq_len
    cdef object manager    # whose batch it is
    cdef Item *items       # [num_sequences]
    cdef int32_t num_sequences
    cdef readonly bint committed
    cdef object written    # bytearray [num_layers]: the layers that KVCache.write has done, or None
    cdef int unwritten     # layers that it has not


cdef class KVCacheManager:
    cdef readonly BlockAllocator allocator
    cdef readonly PageTable page_table
    cdef readonly object max_sequences, max_seq_len
    cdef readonly int table_epoch
    cdef bint initialized
    cdef Sequence *sequences       # [sequences_capacity], by the page table's row
    cdef int32_t sequences_capacity
    cdef cnp.ndarray table         # int32 [rows, columns], for kernels: mirrors the page table
    cdef uint64_t versions         # last version given to a sequence
    cdef uint64_t plannings        # appends planned so far
    cdef uint64_t changes          # state changes so far

    cdef int32_t require(self, object sequence_id) except -2
    cdef int reserve_sequence(self) except -1
    cdef int32_t add_row(self, uint64_t key, int64_t length, int64_t committed) noexcept
    cdef int grow_table(self, int64_t rows, int64_t columns) except -1
    cdef int64_t plan(self, Batch batch, int32_t *num_copies) except -1
    cdef void apply(self, Batch batch) noexcept
    cdef int32_t first_gap(self, Batch batch) noexcept
    cdef int check_batch(self, object batch) except -1
