cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint64_t

from rocmforge._core cimport rf_id_map


cdef struct BlockList:
    int32_t *ids   # [capacity] block ids in the order of the sequence's positions; NULL when 0
    int32_t num    # blocks of the sequence
    int32_t capacity


cdef class PageTable:
    cdef rf_id_map map            # sequence id -> row
    cdef BlockList *lists         # [lists_capacity], by row; zeros in rows without a sequence
    cdef int32_t lists_capacity
    cdef readonly int block_size
    cdef bint read_only           # a face of a cache's own table: only the cache may change it

    # For the manager. Reserving may fail and then changes nothing; what follows cannot fail.
    cdef int reserve_row(self) noexcept
    cdef int32_t add_row(self, uint64_t sequence_id) noexcept
    cdef int reserve_blocks(self, int32_t row, int32_t extra) noexcept
    cdef void push_blocks(self, int32_t row, const int32_t *ids, int32_t n) noexcept
    cdef int32_t drop_row(self, uint64_t sequence_id) noexcept
    cdef int32_t widest(self, list ids) except -1
    cdef bint has_sequence(self, int32_t row) noexcept
    cdef int32_t find(self, object sequence_id) except -2
    cdef int32_t require(self, object sequence_id) except -2
    cdef int check_writable(self) except -1
    cdef cnp.ndarray copy_ids(self, int32_t row)
    cdef int32_t append(self, uint64_t sequence_id, const int32_t *ids, int32_t n) except -2
    cdef int64_t *write_slots(self, int32_t row, int64_t position, int64_t count,
                              int64_t *slots) noexcept
    cdef cnp.ndarray slot_ranges(self, cnp.ndarray ids, cnp.ndarray starts, object num_tokens,
                                 object out)
