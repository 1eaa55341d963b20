cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint64_t

from rocmforge.block_allocator cimport BlockAllocator
from rocmforge.page_table cimport PageTable


cdef enum:
    MAX_GROUPS = 32  # of a cache


@cython.final
cdef class CacheGroup:
    cdef readonly BlockAllocator allocator
    cdef readonly PageTable page_table
    cdef readonly int window            # tokens that a query sees, itself included; 0 is all
    cdef readonly int table_epoch
    cdef int32_t ratio                  # kernel blocks a block
    cdef cnp.ndarray table              # int32 [rows, columns], in kernel blocks
    cdef int32_t *changed               # by row: first block that the table does not show yet
    cdef int32_t *changed_rows          # the rows with such blocks, each once
    cdef int32_t num_changed_rows
    cdef int32_t rows_capacity          # of the two arrays
    cdef uint64_t newest                # serial of the newest batch: `table` is as it needs

    cdef int reserve_row(self) except -1
    cdef void add_row(self, uint64_t key) noexcept
    cdef void drop_row(self, uint64_t key) noexcept
    cdef int grow_table(self, int64_t rows, int64_t blocks) except -1
    cdef int32_t first_needed(self, int64_t length) noexcept
    cdef void mark(self, int32_t row, int32_t block) noexcept
    cdef int64_t num_changes(self) noexcept
    cdef void show_changes(self, int32_t *delta) noexcept
    cdef void hide_released(self, int32_t row, int64_t length) noexcept


cdef CacheGroup new_group(int64_t num_blocks, int block_size, int64_t window, int32_t ratio,
                          int64_t rows, int64_t blocks)
