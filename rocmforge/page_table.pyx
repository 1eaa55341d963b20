# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The page table: (sequence id, token position) -> (block id, offset)."""

cimport cython
cimport numpy as cnp
from libc.stdint cimport INT32_MAX, INT64_MAX, int32_t, int64_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from rocmforge._core cimport (
    RF_ERR_NO_MEMORY, RF_NO_ROW, RF_OK, as_int, as_int_array, as_out, as_sequence_id, plain_int,
    rf_alloc_fail_after, rf_free, rf_id_map_add, rf_id_map_find, rf_id_map_free, rf_id_map_init,
    rf_id_map_remove, rf_id_map_reserve, rf_id_map_validate, rf_realloc)

import numpy as np

from rocmforge.errors import UnknownSequenceError

cnp.import_array()


cdef enum:
    NUM_RUNS = 256


cdef struct Run:  # of consecutive positions
    int64_t position
    int64_t count
    int32_t row


def _fail_allocation(n: int) -> int:
    """Make the n-th allocation of metadata memory from now fail, once; 0 turns it off. For tests.

    Returns what was left of the former countdown: 0 when its failure has happened.
    """
    return rf_alloc_fail_after(as_int(n, "n", 0, 1 << 62))


@cython.final
cdef class PageTable:
    """Which physical block holds which token positions of which sequence.

    A sequence is a list of block ids; block ``i`` of the list holds the positions
    ``i * block_size .. (i + 1) * block_size - 1``. Look-ups and appends are O(1). The table keeps
    4 bytes a block and a few dozen a sequence, with no Python object for either.

    Parameters
    ----------
    block_size : int
        Tokens in a block, from 1 up.

    Raises
    ------
    ValueError
        If `block_size` is below 1 or above 2**31 - 1.

    Notes
    -----
    Sequence ids are any unsigned 64-bit integers. A method that raises has changed nothing.
    """

    def __cinit__(self, block_size=16):
        rf_id_map_init(&self.map)
        self.block_size = <int> as_int(block_size, "block_size", 1, INT32_MAX)

    def __dealloc__(self):
        cdef int32_t row
        for row in range(min(self.map.num_rows, self.lists_capacity)):
            rf_free(self.lists[row].ids)
        rf_free(self.lists)
        rf_id_map_free(&self.map)

    @classmethod
    def with_block_size(cls, block_size):
        """A new table whose blocks hold `block_size` tokens."""
        return cls(block_size)

    # ---- C level: reserve first, then change without a possible failure ----

    cdef int reserve_row(self) noexcept:
        """Make room for one more sequence."""
        cdef BlockList *lists
        if rf_id_map_reserve(&self.map) != RF_OK:
            return RF_ERR_NO_MEMORY
        if self.lists_capacity < self.map.row_capacity:
            lists = <BlockList *> rf_realloc(self.lists, self.map.row_capacity * sizeof(BlockList))
            if lists == NULL:
                return RF_ERR_NO_MEMORY
            self.lists = lists
            self.lists_capacity = self.map.row_capacity
        return RF_OK

    cdef int32_t add_row(self, uint64_t sequence_id) noexcept:
        """Add a sequence without blocks, after `reserve_row`, and return its row."""
        cdef int32_t row = rf_id_map_add(&self.map, sequence_id)
        memset(&self.lists[row], 0, sizeof(BlockList))
        return row

    cdef int reserve_blocks(self, int32_t row, int32_t extra) noexcept:
        """Make room for `extra` more blocks of a sequence."""
        cdef BlockList *blocks = &self.lists[row]
        cdef int64_t needed = <int64_t> blocks.num + extra, capacity
        cdef int32_t *ids
        if needed <= blocks.capacity:
            return RF_OK
        if needed > INT32_MAX - 16:
            return RF_ERR_NO_MEMORY
        # An eighth more keeps appends O(1) and the slack below half a byte a block. The size is
        # rounded to what a 16-byte aligned allocator with an 8-byte header hands out anyway.
        capacity = max(6, needed, blocks.capacity + blocks.capacity // 8)
        capacity = min((capacity + 1) // 4 * 4 + 2, INT32_MAX)
        ids = <int32_t *> rf_realloc(blocks.ids, <size_t> capacity * sizeof(int32_t))
        if ids == NULL:
            return RF_ERR_NO_MEMORY
        blocks.ids = ids
        blocks.capacity = <int32_t> capacity
        return RF_OK

    cdef void push_blocks(self, int32_t row, const int32_t *ids, int32_t n) noexcept:
        """Append blocks to a sequence, after `reserve_blocks`."""
        cdef BlockList *blocks = &self.lists[row]
        if n:
            memcpy(blocks.ids + blocks.num, ids, n * sizeof(int32_t))
        blocks.num += n

    cdef int32_t drop_row(self, uint64_t sequence_id) noexcept:
        """Remove a sequence that is in the table and return the row it had."""
        cdef int32_t row = rf_id_map_remove(&self.map, sequence_id)
        rf_free(self.lists[row].ids)
        memset(&self.lists[row], 0, sizeof(BlockList))
        return row

    cdef int32_t find(self, object sequence_id) except -2:
        return rf_id_map_find(&self.map, as_sequence_id(sequence_id))

    cdef int32_t require(self, object sequence_id) except -2:
        cdef int32_t row = self.find(sequence_id)
        if row == RF_NO_ROW:
            raise UnknownSequenceError(f"sequence {sequence_id} is not in the page table")
        return row

    cdef int check_writable(self) except -1:
        if self.read_only:
            raise ValueError("this page table belongs to a cache and is read-only: use copy()")
        return 0

    # ---- one sequence ----

    cdef int32_t append(self, uint64_t sequence_id, const int32_t *ids, int32_t n) except -2:
        """Append blocks, adding the sequence if it is new; returns the first index."""
        cdef int32_t row = rf_id_map_find(&self.map, sequence_id), first
        cdef bint is_new = row == RF_NO_ROW
        if is_new:
            if self.reserve_row() != RF_OK:
                raise MemoryError("no memory for a sequence of the page table")
            row = self.add_row(sequence_id)
        if self.reserve_blocks(row, n) != RF_OK:
            if is_new:
                self.drop_row(sequence_id)
            raise MemoryError(f"no memory for {n} blocks of the page table")
        first = self.lists[row].num
        self.push_blocks(row, ids, n)
        return first

    def append_block(self, sequence_id, block_id):
        """Give a block to a sequence, behind its last one; a new sequence begins with it.

        Parameters
        ----------
        sequence_id : int
            Any unsigned 64-bit integer.
        block_id : int
            Physical block, 0 .. 2**31 - 1.

        Returns
        -------
        int
            The index of the block in its sequence.
        """
        self.check_writable()
        cdef uint64_t key = as_sequence_id(sequence_id)
        cdef int32_t block = <int32_t> as_int(block_id, "block_id", 0, INT32_MAX)
        return self.append(key, &block, 1)

    def append_blocks(self, sequence_id, block_ids):
        """Give several blocks to a sequence, in order; all or none.

        Parameters
        ----------
        sequence_id : int
            Any unsigned 64-bit integer. With no block ids, a new sequence is added without blocks.
        block_ids : sequence of int or integer array ``[n]``
            Physical blocks, each 0 .. 2**31 - 1.

        Returns
        -------
        int
            The index of the first of them in the sequence.
        """
        self.check_writable()
        cdef uint64_t key = as_sequence_id(sequence_id)
        cdef cnp.ndarray ids = as_int_array(block_ids, "block_ids", cnp.NPY_INT32)
        cdef const int32_t *data = <const int32_t *> cnp.PyArray_DATA(ids)
        cdef Py_ssize_t i, n = cnp.PyArray_SIZE(ids)
        for i in range(n):
            if data[i] < 0:
                raise ValueError(f"block_ids[{i}]: expected 0 .. {INT32_MAX}, got {data[i]}")
        if n > INT32_MAX:
            raise ValueError(f"block_ids: expected at most {INT32_MAX} blocks, got {n}")
        return self.append(key, data, <int32_t> n)

    def set_block(self, sequence_id, index, block_id):
        """Put another physical block at an index that the sequence has, as copy-on-write does.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the table.
        ValueError
            If the sequence has no block of this index, or `block_id` is out of range.
        """
        self.check_writable()
        cdef int32_t block = <int32_t> as_int(block_id, "block_id", 0, INT32_MAX)
        index = plain_int(index, "index")
        cdef int32_t row = self.require(sequence_id)  # behind here no code of the caller's runs
        if self.lists[row].num == 0:
            raise ValueError(f"index: sequence {sequence_id} has no blocks")
        cdef int64_t i = as_int(index, "index", 0, self.lists[row].num - 1)
        self.lists[row].ids[i] = block

    def truncate(self, sequence_id, num_blocks):
        """Keep the first `num_blocks` blocks of a sequence and return the ids of the others.

        Returns
        -------
        numpy.ndarray
            int32 ``[n]``: the blocks taken off, in the order of their positions.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the table.
        ValueError
            If `num_blocks` is negative or more than the sequence has.
        """
        self.check_writable()
        num_blocks = plain_int(num_blocks, "num_blocks")
        cdef int32_t row = self.require(sequence_id)  # behind here no code of the caller's runs
        cdef BlockList *blocks = &self.lists[row]
        cdef int32_t keep = <int32_t> as_int(num_blocks, "num_blocks", 0, blocks.num)
        cdef cnp.npy_intp n = blocks.num - keep
        cdef cnp.ndarray removed = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_INT32)
        if n:
            memcpy(cnp.PyArray_DATA(removed), blocks.ids + keep, n * sizeof(int32_t))
        blocks.num = keep
        return removed

    def remove_sequence(self, sequence_id):
        """Forget a sequence; False when it is not in the table."""
        self.check_writable()
        cdef uint64_t key = as_sequence_id(sequence_id)
        if rf_id_map_find(&self.map, key) == RF_NO_ROW:
            return False
        self.drop_row(key)
        return True

    def get_block_for_position(self, sequence_id, token_pos):
        """The block and the offset in it that hold a token position.

        Returns
        -------
        tuple of (int, int) or None
            ``(block_id, offset)``; None for an unknown sequence, or a position past its blocks.

        Raises
        ------
        ValueError
            If `token_pos` is negative.
        """
        cdef int64_t position = as_int(token_pos, "token_pos", 0, INT64_MAX)
        cdef int32_t row = self.find(sequence_id)
        cdef int64_t index = position // self.block_size
        if row == RF_NO_ROW or index >= self.lists[row].num or self.lists[row].ids[index] < 0:
            return None
        return self.lists[row].ids[index], position - index * self.block_size

    def get_sequence_blocks(self, sequence_id):
        """All blocks of a sequence as a list of ``(block_id, block_index)``; None if unknown."""
        cdef int32_t row = self.find(sequence_id), i
        if row == RF_NO_ROW:
            return None
        # From a copy: making tuples may run the garbage collector, and a finalizer that removes
        # the sequence.
        cdef cnp.ndarray copied = self.copy_ids(row)
        cdef const int32_t *ids = <const int32_t *> cnp.PyArray_DATA(copied)
        return [(ids[i], i) for i in range(<int32_t> cnp.PyArray_SIZE(copied))]

    cdef cnp.ndarray copy_ids(self, int32_t row):
        """The block ids of a row as a new array; runs nobody else's code."""
        cdef cnp.npy_intp n = self.lists[row].num
        cdef cnp.ndarray ids = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_INT32)
        if n:
            memcpy(cnp.PyArray_DATA(ids), self.lists[row].ids, n * sizeof(int32_t))
        return ids

    def block_ids(self, sequence_id, out=None):
        """The block ids of a sequence as an array; a copy.

        Parameters
        ----------
        sequence_id : int
            A sequence of the table.
        out : numpy.ndarray, optional
            int32, one-dimensional, contiguous, with room for at least all blocks.

        Returns
        -------
        numpy.ndarray
            int32 ``[num_blocks]``; with `out`, the filled part of it.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the table.
        ValueError
            If `out` has another dtype or too little room.
        """
        cdef cnp.ndarray ids = self.copy_ids(self.require(sequence_id)), result
        cdef cnp.npy_intp n = cnp.PyArray_SIZE(ids)
        if out is None:
            return ids
        if cnp.PyArray_Check(out) and out.ndim == 1 and out.shape[0] > n:
            out = out[:n]
        result = as_out(out, "out", cnp.NPY_INT32, (n,))
        if n:
            memcpy(cnp.PyArray_DATA(result), cnp.PyArray_DATA(ids), n * sizeof(int32_t))
        return result

    # ---- batches ----

    def slot_mapping(self, sequence_ids, positions, out=None, *, num_tokens=None):
        """The slots of many token positions: block id x block size + offset.

        Parameters
        ----------
        sequence_ids : sequence of int, or uint64 or non-negative int64 array ``[n]``
            The sequence of each position.
        positions : sequence of int or integer array ``[n]``
            Token positions; a negative one is padding and gives -1. With `num_tokens`, the first
            position of each sequence.
        out : numpy.ndarray, optional
            int64, as long as the result, contiguous.
        num_tokens : int, or sequence of int or integer array ``[n]``, optional
            Consecutive positions of every, or of each, sequence: for whole chunks of prompts,
            without an array of their positions.

        Returns
        -------
        numpy.ndarray
            int64 ``[n]``, or ``[sum of num_tokens]``.

        Raises
        ------
        UnknownSequenceError
            If a sequence is not in the table.
        ValueError
            If a position is past the blocks of its sequence, or the lengths differ.
        """
        cdef cnp.ndarray ids = as_int_array(
            sequence_ids, "sequence_ids",
            cnp.NPY_INT64 if _is_int64(sequence_ids) else cnp.NPY_UINT64)
        cdef cnp.ndarray where = as_int_array(positions, "positions", cnp.NPY_INT64)
        cdef cnp.npy_intp n = cnp.PyArray_SIZE(ids), i
        if cnp.PyArray_SIZE(where) != n:
            raise ValueError(f"positions: expected {n} as in sequence_ids, got {where.size}")
        if num_tokens is not None:
            return self.slot_ranges(ids, where, num_tokens, out)
        cdef cnp.ndarray result
        if out is None:
            result = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_INT64)
        else:
            result = as_out(out, "out", cnp.NPY_INT64, (n,))
            if overlap(result, ids):  # else a slot written would be read as an id
                ids = ids.copy()
            if overlap(result, where):
                where = where.copy()
        cdef const uint64_t *id = <const uint64_t *> cnp.PyArray_DATA(ids)
        cdef const int64_t *position = <const int64_t *> cnp.PyArray_DATA(where)
        cdef int64_t *slot = <int64_t *> cnp.PyArray_DATA(result)
        cdef bint is_signed = cnp.PyArray_TYPE(ids) == cnp.NPY_INT64
        cdef Run[NUM_RUNS] runs
        cdef Run *run
        cdef int64_t end = 0, count, bad, written = 0
        cdef uint64_t last = 0
        cdef int32_t row = RF_NO_ROW, num_runs = 0, r
        # Two passes, so that a caller's buffer stays untouched when a position is wrong. What the
        # first one finds is noted, as far as there is room, and need not be found again.
        i = 0
        while i < n:
            if row == RF_NO_ROW or id[i] != last:
                last = id[i]
                if is_signed and last > <uint64_t> INT64_MAX:
                    raise ValueError(f"sequence_ids[{i}]: expected 0 .. 2**64 - 1, got {ids[i]}")
                row = rf_id_map_find(&self.map, last)
                if row == RF_NO_ROW:
                    raise UnknownSequenceError(
                        f"sequence_ids[{i}]: sequence {ids[i]} is not in the page table")
                end = <int64_t> self.lists[row].num * self.block_size
            count = run_length(id + i, position + i, n - i)
            if position[i + count - 1] >= end:
                bad = i + max(<int64_t> 0, end - position[i])
                raise ValueError(f"positions[{bad}]: sequence {ids[i]} has slots for {end} tokens, "
                                 f"got position {position[bad]}")
            i += count
            if num_runs < NUM_RUNS:
                run = &runs[num_runs]
                run.row, run.position, run.count = row, position[i - count], count
                num_runs += 1
                written = i
        for r in range(num_runs):
            slot = self.write_slots(runs[r].row, runs[r].position, runs[r].count, slot)
        row = RF_NO_ROW
        i = written
        while i < n:
            if row == RF_NO_ROW or id[i] != last:
                last = id[i]
                row = rf_id_map_find(&self.map, last)
            count = run_length(id + i, position + i, n - i)
            slot = self.write_slots(row, position[i], count, slot)
            i += count
        return result

    cdef int64_t *write_slots(self, int32_t row, int64_t position, int64_t count,
                              int64_t *slots) noexcept:
        """Write the slots of positions that a sequence has, or -1 where one is negative; returns
        where the next slot goes."""
        cdef int64_t end = position + count, block_size = self.block_size, index, base, k, step
        cdef const int32_t *ids = self.lists[row].ids
        while position < 0 and position < end:
            slots[0] = -1
            slots += 1
            position += 1
        index = position // block_size
        while position < end:  # a block at a time: consecutive positions are consecutive slots
            step = min(end, (index + 1) * block_size) - position
            if ids[index] < 0:  # released: reads and writes skip it
                for k in range(step):
                    slots[k] = -1
            else:
                base = (ids[index] - index) * block_size + position
                for k in range(step):
                    slots[k] = base + k
            slots += step
            position += step
            index += 1
        return slots

    cdef cnp.ndarray slot_ranges(self, cnp.ndarray ids, cnp.ndarray starts, object num_tokens,
                                 object out):
        """The slots of consecutive positions: a block at a time, with one look-up a sequence."""
        cdef cnp.npy_intp n = cnp.PyArray_SIZE(ids), i, total = 0
        cdef cnp.ndarray counts, result
        if hasattr(num_tokens, "__index__") and np.ndim(num_tokens) == 0:
            counts = np.full(n, as_int(num_tokens, "num_tokens", 0, INT32_MAX), np.int64)
        else:
            counts = as_int_array(num_tokens, "num_tokens", cnp.NPY_INT64)
            if cnp.PyArray_SIZE(counts) != n:
                raise ValueError(
                    f"num_tokens: expected an integer or {n} of them, got {counts.size}")
        cdef const uint64_t *id = <const uint64_t *> cnp.PyArray_DATA(ids)
        cdef const int64_t *start = <const int64_t *> cnp.PyArray_DATA(starts)
        cdef const int64_t *count = <const int64_t *> cnp.PyArray_DATA(counts)
        for i in range(n):
            if count[i] < 0 or count[i] > INT32_MAX:
                raise ValueError(f"num_tokens[{i}]: expected 0 .. {INT32_MAX}, got {count[i]}")
            total += count[i]
        if out is None:
            result = cnp.PyArray_SimpleNew(1, &total, cnp.NPY_INT64)
        else:
            result = as_out(out, "out", cnp.NPY_INT64, (total,))
            if overlap(result, ids) or overlap(result, starts) or overlap(result, counts):
                raise ValueError("out: it overlaps an array that is read")
        cdef int64_t *slot = <int64_t *> cnp.PyArray_DATA(result)
        cdef int64_t end
        cdef int32_t row
        for i in range(n):
            row = rf_id_map_find(&self.map, id[i])
            if row == RF_NO_ROW:
                raise UnknownSequenceError(
                    f"sequence_ids[{i}]: sequence {ids[i]} is not in the page table")
            end = <int64_t> self.lists[row].num * self.block_size
            if start[i] < 0 or start[i] > end - count[i]:
                raise ValueError(f"positions[{i}]: sequence {ids[i]} has slots for {end} tokens, "
                                 f"got {count[i]} from position {start[i]}")
        for i in range(n):
            row = rf_id_map_find(&self.map, id[i])
            slot = self.write_slots(row, start[i], count[i], slot)
        return result

    def block_table(self, sequence_ids, pad=-1, out=None):
        """The block ids of several sequences as one dense array, as attention kernels take it.

        Parameters
        ----------
        sequence_ids : sequence of int
            Sequences of the table, in the order of the rows.
        pad : int
            Fills a row behind the sequence's blocks.
        out : numpy.ndarray, optional
            int32 ``[n, m]``, contiguous; ``m`` at least the most blocks of a sequence.

        Returns
        -------
        numpy.ndarray
            int32 ``[n, max_blocks]``.

        Raises
        ------
        UnknownSequenceError
            If a sequence is not in the table.
        ValueError
            If `out` has another dtype or too little room, or `pad` is no int32.
        """
        cdef list keys = [as_sequence_id(sequence_id) for sequence_id in sequence_ids]
        cdef int32_t filler = <int32_t> as_int(pad, "pad", -INT32_MAX - 1, INT32_MAX)
        cdef int32_t row, num
        cdef Py_ssize_t i, j, n = len(keys), width
        cdef int32_t *target
        cdef cnp.ndarray result
        while True:
            width = self.widest(keys)
            if out is None:
                result = np.empty((n, width), np.int32)
            else:
                if cnp.PyArray_Check(out) and out.ndim == 2 and out.shape[1] > width:
                    width = out.shape[1]
                result = as_out(out, "out", cnp.NPY_INT32, (n, width))
            if self.widest(keys) <= width:  # else others, let in meanwhile, made a list longer
                break
        target = <int32_t *> cnp.PyArray_DATA(result)
        for i in range(n):
            row = rf_id_map_find(&self.map, keys[i])
            num = self.lists[row].num
            if num:
                memcpy(target, self.lists[row].ids, num * sizeof(int32_t))
            for j in range(num, width):
                target[j] = filler
            target += width
        return result

    cdef int32_t widest(self, list ids) except -1:
        """The most blocks that one of some sequences has."""
        cdef int32_t row, most = 0
        for id in ids:
            row = rf_id_map_find(&self.map, id)
            if row == RF_NO_ROW:
                raise UnknownSequenceError(f"sequence {id} is not in the page table")
            most = max(most, self.lists[row].num)
        return most

    # ---- the whole table ----

    def num_sequences(self):
        """How many sequences the table holds."""
        return self.map.num_ids

    def sequence_ids(self):
        """The ids of all sequences as a uint64 array ``[num_sequences]``, in no promised order."""
        cdef int32_t row
        cdef uint64_t *at
        while True:  # making the array may have let others in
            out = np.empty(self.map.num_ids, np.uint64)
            if len(out) == self.map.num_ids:
                break
        at = <uint64_t *> cnp.PyArray_DATA(out)
        for row in range(self.map.num_rows):
            if self.has_sequence(row):
                at[0] = self.map.ids[row]
                at += 1
        return out

    def _items(self):
        """Pairs (sequence id, row) of all sequences, by row: for checks."""
        cdef int32_t row
        return [(self.map.ids[row], row) for row in range(self.map.num_rows)
                if self.has_sequence(row)]

    cdef bint has_sequence(self, int32_t row) noexcept:
        """Whether a row is a sequence's. No object is made: loops over rows see one moment."""
        # a free row's id is a link, which may look like an id: only its own row counts
        return rf_id_map_find(&self.map, self.map.ids[row]) == row

    @property
    def nbytes(self):
        """Bytes of memory that the table holds, without the object itself."""
        cdef int64_t total = 0
        cdef int32_t row
        for row in range(self.map.num_rows):
            total += self.lists[row].capacity * sizeof(int32_t)
        return (total + self.lists_capacity * sizeof(BlockList)
                + self.map.row_capacity * sizeof(uint64_t) + self.map.num_slots * sizeof(int32_t))

    def copy(self):
        """An independent table with the same sequences and blocks; writable."""
        cdef PageTable other = PageTable(self.block_size)
        cdef int32_t row
        for row in range(self.map.num_rows):
            if self.has_sequence(row):
                other.append(self.map.ids[row], self.lists[row].ids, self.lists[row].num)
        return other

    def __reduce__(self):
        from rocmforge.saved_state import dump_page_table, load_page_table
        return load_page_table, dump_page_table(self)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def __len__(self):
        return self.map.num_ids

    def __contains__(self, sequence_id):
        return self.find(sequence_id) != RF_NO_ROW

    def __eq__(self, other):
        if not isinstance(other, PageTable):
            return NotImplemented
        cdef PageTable that = other
        cdef int32_t mine, theirs
        if self.block_size != that.block_size or self.map.num_ids != that.map.num_ids:
            return False
        for mine in range(self.map.num_rows):
            if not self.has_sequence(mine):
                continue
            theirs = rf_id_map_find(&that.map, self.map.ids[mine])
            if theirs == RF_NO_ROW or self.lists[mine].num != that.lists[theirs].num:
                return False
            if self.lists[mine].num and memcmp(self.lists[mine].ids, that.lists[theirs].ids,
                                               self.lists[mine].num * sizeof(int32_t)):
                return False
        return True

    __hash__ = None

    def __repr__(self):
        cdef int64_t total = 0
        cdef int32_t row
        for row in range(self.map.num_rows):
            total += self.lists[row].num
        return (f"PageTable(block_size={self.block_size}, num_sequences={self.map.num_ids}, "
                f"num_blocks={total})")

    def check_integrity(self):
        """Prove that the table's structures agree; raises AssertionError with a sentence if not."""
        cdef const char *reason
        cdef int32_t row
        if rf_id_map_validate(&self.map, &reason) != RF_OK:
            raise AssertionError(reason.decode())
        live = {row for _, row in self._items()}
        if len(live) != self.map.num_ids:
            raise AssertionError("the rows of sequences differ from their number")
        for row in range(self.map.num_rows):
            if row not in live and (self.lists[row].num or self.lists[row].ids != NULL):
                raise AssertionError(f"row {row} has blocks and no sequence")
            if self.lists[row].num > self.lists[row].capacity or self.lists[row].num < 0:
                raise AssertionError(f"row {row} holds more blocks than it has room for")


cdef inline int64_t run_length(const uint64_t *ids, const int64_t *positions, int64_t n) noexcept:
    """How many of n tokens, at least one, are consecutive positions of the first one's sequence."""
    cdef uint64_t id = ids[0], first = <uint64_t> positions[0]  # unsigned, as a sum may overflow
    cdef uint64_t differ
    cdef int64_t length = 1, k
    while length + 32 <= n:  # without a branch for each token
        if ids[length] != id or <uint64_t> positions[length] != first + <uint64_t> length:
            return length
        differ = 0
        for k in range(length, length + 32):
            differ |= (ids[k] ^ id) | (<uint64_t> positions[k] ^ (first + <uint64_t> k))
        if differ:  # no condition of the loop: gcc 12.2 then never left it
            break
        length += 32
    while length < n and ids[length] == id and (
            <uint64_t> positions[length] == first + <uint64_t> length):
        length += 1
    return length


cdef bint overlap(cnp.ndarray a, cnp.ndarray b):
    """Whether two contiguous arrays share memory."""
    cdef const char *a_data = <const char *> cnp.PyArray_DATA(a)
    cdef const char *b_data = <const char *> cnp.PyArray_DATA(b)
    return a_data < b_data + cnp.PyArray_NBYTES(b) and b_data < a_data + cnp.PyArray_NBYTES(a)


cdef bint _is_int64(object values):
    return cnp.PyArray_Check(values) and cnp.PyArray_TYPE(<cnp.ndarray> values) == cnp.NPY_INT64
