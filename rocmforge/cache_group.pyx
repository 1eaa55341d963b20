# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The metadata of one layer group: its blocks, who has them, and the table that kernels read."""

cimport cython
cimport numpy as cnp
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint64_t
from libc.string cimport memcpy

from rocmforge._core cimport RF_NO_BLOCK, RF_OK, rf_free, rf_realloc
from rocmforge.block_allocator cimport BlockAllocator
from rocmforge.page_table cimport BlockList, PageTable

import numpy as np

cnp.import_array()

cdef int32_t UNCHANGED = INT32_MAX       # the row is not listed
cdef int32_t LISTED = INT32_MAX - 1      # it is, but nothing of it changed


@cython.final
cdef class CacheGroup:
    """The blocks of the layers that share a pool, read-only to all but their cache.

    Attributes
    ----------
    allocator : BlockAllocator
        The group's physical blocks.
    page_table : PageTable
        Which sequence has which of them.
    window : int
        Tokens that a query sees, itself included; 0 is all.
    table_epoch : int
        How often `block_table` moved to another address.

    Notes
    -----
    The page table is the truth and `block_table` its mirror in the shape that kernels read. Changes
    reach the mirror when a batch is made, and come out of it as ``table_delta``, so that a copy on
    a device follows by the same few entries.
    """

    def __init__(self):
        raise TypeError("a CacheGroup is made by its cache")

    def __dealloc__(self):
        rf_free(self.changed)
        rf_free(self.changed_rows)

    @property
    def block_table(self):
        """Kernel block ids by row, int32 ``[num_rows, max_blocks]``: a live view."""
        return self.table

    @property
    def num_free_blocks(self):
        """Blocks that an append can have: free ones and cached ones that nobody holds."""
        return self.allocator.get_free_count() + self.allocator.num_kept

    cdef int reserve_row(self) except -1:
        """Make room for one more sequence, so that `add_row` cannot fail."""
        cdef int32_t capacity, i
        cdef int32_t *array
        if self.page_table.reserve_row() != RF_OK:
            raise MemoryError("no memory for a sequence of the page table")
        capacity = self.page_table.map.row_capacity
        if capacity > self.rows_capacity:
            array = <int32_t *> rf_realloc(self.changed, capacity * sizeof(int32_t))
            if array == NULL:
                raise MemoryError("no memory for a sequence of the block table")
            self.changed = array
            array = <int32_t *> rf_realloc(self.changed_rows, capacity * sizeof(int32_t))
            if array == NULL:
                raise MemoryError("no memory for a sequence of the block table")
            self.changed_rows = array
            for i in range(self.rows_capacity, capacity):
                self.changed[i] = UNCHANGED
            self.rows_capacity = capacity
        self.grow_table(self.page_table.map.num_ids + 1, 0)
        return 0

    cdef void add_row(self, uint64_t key) noexcept:
        self.page_table.add_row(key)

    cdef void drop_row(self, uint64_t key) noexcept:
        cdef int32_t row = self.page_table.drop_row(key)
        if self.changed[row] != UNCHANGED:
            self.changed[row] = LISTED

    cdef int grow_table(self, int64_t rows, int64_t blocks) except -1:
        """Make the block table at least this large; a new array, as old batches keep theirs."""
        cdef cnp.ndarray old, table
        cdef int64_t columns = blocks * self.ratio
        cdef int64_t old_rows, old_columns, new_rows, new_columns, row
        while True:
            old = self.table
            old_rows, old_columns = cnp.PyArray_DIM(old, 0), cnp.PyArray_DIM(old, 1)
            if rows <= old_rows and columns <= old_columns:
                return 0
            new_rows, new_columns = old_rows, old_columns
            if rows > old_rows:
                new_rows = max(rows, 2 * old_rows, 16)
            if columns > old_columns:
                new_columns = max(columns, 2 * old_columns, 16)
            table = np.full((new_rows, new_columns), -1, np.int32)
            if self.table is old:  # else another thread grew it meanwhile
                break
        # by memcpy, as an assignment in NumPy lets other threads in, who may write to the old one
        for row in range(old_rows):
            memcpy(<int32_t *> cnp.PyArray_DATA(table) + row * new_columns,
                   <int32_t *> cnp.PyArray_DATA(old) + row * old_columns,
                   old_columns * sizeof(int32_t))
        self.table = table
        self.table_epoch += 1
        return 0

    cdef int32_t first_needed(self, int64_t length) noexcept:
        """The first block that a query at position `length` sees."""
        if self.window == 0 or length < self.window:
            return 0
        return <int32_t> ((length - self.window + 1) // self.page_table.block_size)

    cdef void mark(self, int32_t row, int32_t block) noexcept:
        """Note that the table does not show the blocks of a row from this one on."""
        if self.changed[row] == UNCHANGED:
            self.changed_rows[self.num_changed_rows] = row
            self.num_changed_rows += 1
            self.changed[row] = block
        elif block < self.changed[row]:
            self.changed[row] = block

    cdef int64_t num_changes(self) noexcept:
        """Kernel blocks that the table does not show yet."""
        cdef int64_t total = 0
        cdef int32_t i, row
        for i in range(self.num_changed_rows):
            row = self.changed_rows[i]
            # a truncate may have left fewer blocks than were changed
            total += max(0, self.page_table.lists[row].num - self.changed[row])
        return total * self.ratio

    cdef void show_changes(self, int32_t *delta) noexcept:
        """Bring the table up to date; (row, column, kernel block id) of each entry to delta."""
        cdef int32_t *table = <int32_t *> cnp.PyArray_DATA(self.table)
        cdef int64_t columns = cnp.PyArray_DIM(self.table, 1)
        cdef int32_t i, j, k, row, value
        cdef BlockList *blocks
        for i in range(self.num_changed_rows):
            row = self.changed_rows[i]
            blocks = &self.page_table.lists[row]
            for j in range(self.changed[row], blocks.num):
                for k in range(self.ratio):
                    value = blocks.ids[j]
                    if value != RF_NO_BLOCK:
                        value = value * self.ratio + k
                    table[row * columns + j * self.ratio + k] = value
                    delta[0] = row
                    delta[1] = j * self.ratio + k
                    delta[2] = value
                    delta += 3
            self.changed[row] = UNCHANGED
        self.num_changed_rows = 0

    cdef void hide_released(self, int32_t row, int64_t length) noexcept:
        """Take the blocks that a query at `length` no longer sees, and that the row gave up, off
        the table.

        They need no place in the delta: no query of this group looks there again.
        """
        cdef int32_t *table = <int32_t *> cnp.PyArray_DATA(self.table)
        cdef int64_t start = row * cnp.PyArray_DIM(self.table, 1)
        cdef int32_t block = self.first_needed(length), k
        cdef BlockList *blocks = &self.page_table.lists[row]
        while block > 0 and blocks.ids[block - 1] != RF_NO_BLOCK:  # kept for a truncate
            block -= 1
        while block > 0 and table[start + (block - 1) * self.ratio] != RF_NO_BLOCK:
            block -= 1
            for k in range(self.ratio):
                table[start + block * self.ratio + k] = RF_NO_BLOCK

    def __repr__(self):
        return (f"CacheGroup(num_blocks={self.allocator.num_blocks}, "
                f"block_size={self.page_table.block_size}, window={self.window})")


cdef CacheGroup new_group(int64_t num_blocks, int block_size, int64_t window, int32_t ratio,
                          int64_t rows, int64_t blocks):
    """A group without sequences, with a block table of the given size."""
    cdef CacheGroup group = CacheGroup.__new__(CacheGroup)
    group.allocator = BlockAllocator(num_blocks)
    group.page_table = PageTable(block_size)
    group.allocator.read_only = True
    group.page_table.read_only = True
    group.window = <int> window
    group.ratio = ratio
    group.table = np.full((rows, blocks * ratio), -1, np.int32)
    return group
