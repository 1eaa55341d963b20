# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Sequences over shared blocks, and the batches that extend them: no tensor, no device."""

cimport numpy as cnp
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint64_t
from libc.string cimport memcpy

from rocmforge._core cimport (
    RF_NO_ROW, RF_OK, as_int, as_int_array, as_sequence_id, plain_int, rf_alloc, rf_block_pool,
    rf_block_pool_allocate, rf_block_pool_num_available, rf_block_pool_num_free,
    rf_block_pool_ref, rf_block_pool_release, rf_free, rf_id_map_find, rf_realloc)
from rocmforge.block_allocator cimport BlockAllocator
from rocmforge.page_table cimport BlockList, PageTable

import numpy as np

from rocmforge.errors import OutOfBlocksError, UnknownSequenceError
from rocmforge.stats import CacheStats

cnp.import_array()

cdef cnp.ndarray NO_COPIES = np.empty((0, 2), np.int32)
NO_COPIES.flags.writeable = False


cdef cnp.ndarray new_array(cnp.npy_intp n, int type_num):
    return cnp.PyArray_SimpleNew(1, &n, type_num)


cdef class Batch:
    """What one step of some sequences needs, made by `KVCacheManager.append`.

    The arrays never change after the batch is returned, but for `block_table`, a live view that is
    valid for the newest batch.

    Attributes
    ----------
    sequence_ids : numpy.ndarray
        uint64 ``[num_seqs]``, in the order given.
    rows : numpy.ndarray
        int32 ``[num_seqs]``: the row of `block_table` that each sequence uses.
    seq_lens : numpy.ndarray
        int32 ``[num_seqs]``: tokens of each sequence, the new ones included.
    cu_seqlens_q : numpy.ndarray
        int32 ``[num_seqs + 1]``: where each sequence's new tokens start in the flat arrays.
    positions, slot_mapping : numpy.ndarray
        int64 ``[num_tokens]``: position in its sequence and slot in the pool of each new token.
    copies : numpy.ndarray
        int32 ``[num_copies, 2]``: (source, destination) blocks to copy before anything is written.
    block_table : numpy.ndarray
        int32 ``[num_rows, max_blocks]``: the block ids of all sequences.
    num_tokens, max_seqlen_q, max_seq_len : int
        Number of new tokens, the most of one sequence, and the longest length.
    committed : bool
        Whether the batch was committed.
    """

    def __init__(self):
        raise TypeError("a Batch is made by append()")

    def __dealloc__(self):
        rf_free(self.items)

    def __len__(self):
        return self.num_sequences

    def __repr__(self):
        return (f"Batch(num_seqs={self.num_sequences}, num_tokens={self.num_tokens}, "
                f"max_seqlen_q={self.max_seqlen_q}, max_seq_len={self.max_seq_len}, "
                f"num_copies={len(self.copies)}, committed={bool(self.committed)})")


cdef Batch new_batch(KVCacheManager manager, object sequence_ids, object num_tokens):
    """A batch with the sequences and numbers of tokens read and checked."""
    cdef Batch batch = Batch.__new__(Batch)
    cdef cnp.ndarray counts
    cdef int64_t i, n, count, total = 0
    cdef bint is_uniform = hasattr(num_tokens, "__index__") and np.ndim(num_tokens) == 0
    batch.manager = manager
    # a copy also of an array, as the caller may change theirs
    batch.sequence_ids = as_int_array(sequence_ids, "sequence_ids", cnp.NPY_UINT64).copy()
    n = cnp.PyArray_SIZE(batch.sequence_ids)
    if n > INT32_MAX - 1:
        raise ValueError(f"sequence_ids: expected at most {INT32_MAX - 1} sequences, got {n}")
    batch.items = <Item *> rf_alloc(n * sizeof(Item))
    if batch.items == NULL:
        raise MemoryError(f"no memory for a batch of {n} sequences")
    if is_uniform:
        count = as_int(num_tokens, "num_tokens", 1, INT32_MAX)
        for i in range(n):
            batch.items[i].num_tokens = <int32_t> count
        total = n * count
    else:
        counts = as_int_array(num_tokens, "num_tokens", cnp.NPY_INT64)
        if cnp.PyArray_SIZE(counts) != n:
            raise ValueError(f"num_tokens: expected an integer or {n} of them, got {counts.size}")
        for i in range(n):
            count = (<int64_t *> cnp.PyArray_DATA(counts))[i]
            if count < 1 or count > INT32_MAX:
                raise ValueError(f"num_tokens[{i}]: expected 1 .. {INT32_MAX}, got {count}")
            batch.items[i].num_tokens = <int32_t> count
            total += count
    if total > INT32_MAX:
        raise ValueError(f"num_tokens: expected at most {INT32_MAX} in a batch, got {total}")
    batch.num_sequences = <int32_t> n
    batch.num_tokens = <int> total
    return batch


cdef int make_arrays(Batch batch, int32_t num_copies) except -1:
    """The arrays of a batch that was found possible, to be filled in."""
    cdef cnp.npy_intp n = batch.num_sequences
    if batch.rows is None:
        batch.rows = new_array(n, cnp.NPY_INT32)
        batch.seq_lens = new_array(n, cnp.NPY_INT32)
        batch.cu_seqlens_q = new_array(n + 1, cnp.NPY_INT32)
        batch.positions = new_array(batch.num_tokens, cnp.NPY_INT64)
        batch.slot_mapping = new_array(batch.num_tokens, cnp.NPY_INT64)
    batch.copies = np.empty((num_copies, 2), np.int32) if num_copies else NO_COPIES
    return 0


cdef class KVCacheManager:
    """Which blocks hold the tokens of which sequence, and which slots the next step writes.

    It knows no tensor and no device: `KVCache` adds those, and an engine with its own kernels uses
    the manager alone.

    Parameters
    ----------
    num_blocks : int
        Blocks of the pool, 0 .. 2**31 - 1.
    block_size : int
        Tokens a block, from 1 up.
    max_sequences : int, optional
        The most sequences at one time; unlimited when not given.
    max_seq_len : int, optional
        The most tokens of a sequence. With both limits the block table keeps one address for life,
        as captured graphs need; else it grows, and `table_epoch` counts how often it moved.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Notes
    -----
    After any error the manager is as it was before the call.

    Examples
    --------
    >>> manager = KVCacheManager(num_blocks=64, block_size=16)
    >>> manager.add_sequence(7)
    >>> batch = manager.append([7], 20)
    >>> batch.seq_lens, batch.block_table[batch.rows[0], :2]
    (array([20], dtype=int32), array([0, 1], dtype=int32))
    >>> manager.fork(7, 8)                       # shares both blocks
    >>> manager.append([8], 1).copies            # the partly filled one is copied before the write
    array([[1, 2]], dtype=int32)
    """

    def __cinit__(self, *args, **kwargs):
        # a valid empty cache, whatever a subclass does before it calls __init__
        self.page_table = PageTable(1)
        self.allocator = BlockAllocator(0)
        self.page_table.read_only = True
        self.allocator.read_only = True
        self.table = np.empty((0, 0), np.int32)

    def __init__(self, num_blocks, *, block_size=16, max_sequences=None, max_seq_len=None):
        cdef int64_t rows = 0, columns = 0
        if self.initialized:
            raise TypeError(f"{type(self).__name__}: it is initialised already")
        cdef PageTable pages = PageTable(block_size)
        cdef BlockAllocator allocator = BlockAllocator(num_blocks)
        if max_sequences is not None:
            max_sequences = rows = as_int(max_sequences, "max_sequences", 1, INT32_MAX)
        if max_seq_len is not None:
            max_seq_len = columns = as_int(max_seq_len, "max_seq_len", 1, INT32_MAX)
        columns = (columns + pages.block_size - 1) // pages.block_size
        self.table = np.full((rows, columns), -1, np.int32)
        self.initialized = True
        self.page_table = pages
        self.allocator = allocator
        self.page_table.read_only = True
        self.allocator.read_only = True
        self.max_sequences = max_sequences
        self.max_seq_len = max_seq_len

    def __dealloc__(self):
        rf_free(self.sequences)

    @property
    def num_blocks(self):
        """Blocks of the pool."""
        return self.allocator.pool.num_blocks

    @property
    def block_size(self):
        """Tokens a block."""
        return self.page_table.block_size

    @property
    def num_free_blocks(self):
        """Blocks that an append can have."""
        return rf_block_pool_num_available(&self.allocator.pool)

    @property
    def block_table(self):
        """The block ids of all sequences, int32 ``[num_rows, max_blocks]``: a live view."""
        return self.table

    # ---- sequences ----

    cdef int32_t require(self, object sequence_id) except -2:
        cdef int32_t row = rf_id_map_find(&self.page_table.map, as_sequence_id(sequence_id))
        if row == RF_NO_ROW:
            raise UnknownSequenceError(f"sequence {sequence_id} is not in the cache")
        return row

    cdef int reserve_sequence(self) except -1:
        """Make room for one more sequence, so that `add_row` cannot fail."""
        cdef PageTable pages = self.page_table
        cdef Sequence *sequences
        if self.max_sequences is not None and pages.map.num_ids >= self.max_sequences:
            raise ValueError(f"max_sequences: the cache holds {self.max_sequences} already")
        if pages.reserve_row() != RF_OK:
            raise MemoryError("no memory for a sequence of the page table")
        if self.sequences_capacity < pages.map.row_capacity:
            sequences = <Sequence *> rf_realloc(
                self.sequences, pages.map.row_capacity * sizeof(Sequence))
            if sequences == NULL:
                raise MemoryError("no memory for a sequence of the cache")
            self.sequences = sequences
            self.sequences_capacity = pages.map.row_capacity
        self.grow_table(pages.map.num_ids + 1, 0)
        return 0

    cdef int32_t add_row(self, uint64_t key, int64_t length, int64_t committed) noexcept:
        cdef int32_t row = self.page_table.add_row(key)
        self.versions += 1
        self.changes += 1
        self.sequences[row].length = length
        self.sequences[row].committed = committed
        self.sequences[row].version = self.versions
        self.sequences[row].seen = 0
        return row

    cdef int grow_table(self, int64_t rows, int64_t columns) except -1:
        """Make the block table at least this large; a new array, as old batches keep theirs."""
        cdef cnp.ndarray old, table
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

    def add_sequence(self, sequence_id):
        """Begin a sequence without tokens.

        Parameters
        ----------
        sequence_id : int
            Any unsigned 64-bit integer that is not in use.

        Raises
        ------
        ValueError
            If the id is in use, out of range, or `max_sequences` are there already.
        """
        cdef uint64_t key = as_sequence_id(sequence_id), changes
        while True:
            changes = self.changes
            if rf_id_map_find(&self.page_table.map, key) != RF_NO_ROW:
                raise ValueError(f"sequence_id: sequence {key} is in the cache already")
            self.reserve_sequence()
            if changes == self.changes:  # else another thread took the room meanwhile
                break
        self.add_row(key, 0, 0)

    def fork(self, parent, child):
        """Begin a sequence that has all tokens of another and shares all its blocks.

        The first append to either that would write into a block they share gets a copy of it.

        Parameters
        ----------
        parent : int
            A sequence of the cache.
        child : int
            The new id.

        Raises
        ------
        UnknownSequenceError
            If `parent` is not in the cache.
        ValueError
            If `child` is in use or out of range, or `max_sequences` are there already.
        """
        cdef uint64_t key = as_sequence_id(child), changes
        cdef PageTable pages = self.page_table
        cdef int32_t source, row, bad
        cdef BlockList *blocks
        cdef int32_t *target
        parent = plain_int(parent, "sequence id")
        while True:
            changes = self.changes
            source = self.require(parent)
            if rf_id_map_find(&pages.map, key) != RF_NO_ROW:
                raise ValueError(f"child: sequence {key} is in the cache already")
            self.reserve_sequence()
            if changes == self.changes:  # else another thread took the room meanwhile
                break
        row = self.add_row(key, self.sequences[source].length, self.sequences[source].committed)
        blocks = &pages.lists[source]
        if pages.reserve_blocks(row, blocks.num) != RF_OK:
            pages.drop_row(key)
            raise MemoryError(f"no memory for {blocks.num} blocks of the page table")
        status = rf_block_pool_ref(&self.allocator.pool, blocks.ids, blocks.num, &bad)
        if status != RF_OK:
            pages.drop_row(key)
            self.allocator.check(status, blocks.ids[bad], blocks.num)
        pages.push_blocks(row, blocks.ids, blocks.num)
        if blocks.num:
            target = <int32_t *> cnp.PyArray_DATA(self.table)
            memcpy(target + row * cnp.PyArray_DIM(self.table, 1), blocks.ids,
                   blocks.num * sizeof(int32_t))

    def free(self, sequence_id):
        """End a sequence and drop its references; blocks that nobody else holds become free.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the cache (a double free).
        """
        cdef uint64_t key = as_sequence_id(sequence_id)
        cdef int32_t row = self.require(key), bad = 0
        cdef BlockList *blocks = &self.page_table.lists[row]
        cdef int status = rf_block_pool_release(
            &self.allocator.pool, blocks.ids, blocks.num, False, &bad)
        self.allocator.check(status, blocks.ids[bad] if blocks.num else 0, blocks.num)
        self.page_table.drop_row(key)
        self.sequences[row].version = 0
        self.changes += 1

    def seq_len(self, sequence_id):
        """Tokens of a sequence that have a slot.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the cache.
        """
        return self.sequences[self.require(sequence_id)].length

    def committed_len(self, sequence_id):
        """Tokens of a sequence, from its start, whose keys and values were committed.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the cache.
        """
        return self.sequences[self.require(sequence_id)].committed

    # ---- steps ----

    def append(self, sequence_ids, num_tokens):
        """Reserve the slots of the next tokens of some sequences: all of them, or nothing.

        Parameters
        ----------
        sequence_ids : sequence of int, or uint64 or non-negative int64 array ``[num_seqs]``
            Different sequences of the cache.
        num_tokens : int, or sequence of int ``[num_seqs]``
            New tokens of every, or of each, sequence; from 1 up.

        Returns
        -------
        Batch
            Slots, lengths, block table and pending copies.

        Raises
        ------
        UnknownSequenceError
            If a sequence is not in the cache.
        OutOfBlocksError
            If the batch as a whole needs more blocks than are free.
        ValueError
            If a sequence is named twice, a number is out of range, or a sequence would pass
            `max_seq_len`.
        """
        cdef Batch batch = new_batch(self, sequence_ids, num_tokens)
        cdef int32_t num_copies
        cdef int64_t columns
        cdef uint64_t changes
        while True:
            changes = self.changes
            columns = self.plan(batch, &num_copies)
            self.grow_table(0, columns)
            make_arrays(batch, num_copies)
            # Creating objects may run the garbage collector and with it anybody's code. From here
            # on nothing does, and nothing can fail.
            if changes == self.changes:
                break
        self.apply(batch)
        return batch

    cdef int64_t plan(self, Batch batch, int32_t *num_copies) except -1:
        """Fill in the batch's items and check that all of them can be had; changes no state.

        Returns the columns that the block table needs.
        """
        cdef rf_block_pool *pool = &self.allocator.pool
        cdef PageTable pages = self.page_table
        cdef const uint64_t *ids = <const uint64_t *> cnp.PyArray_DATA(batch.sequence_ids)
        cdef int64_t limit = INT32_MAX if self.max_seq_len is None else self.max_seq_len
        cdef int64_t length, needed = 0, columns = 0, blocks, block_size = pages.block_size
        cdef int32_t i, j, row, last, planned = 0
        cdef str problem = None
        cdef Item *item
        cdef Sequence *sequence
        num_copies[0] = 0
        self.plannings += 1
        for i in range(batch.num_sequences):
            item = &batch.items[i]
            row = rf_id_map_find(&pages.map, ids[i])
            if row == RF_NO_ROW:
                problem = "unknown"
                break
            sequence = &self.sequences[row]
            if sequence.seen == self.plannings:
                problem = "twice"
                break
            sequence.seen = self.plannings
            length = sequence.length + item.num_tokens
            if length > limit:
                problem = "long"
                break
            blocks = (length + block_size - 1) // block_size
            item.row = row
            item.start = sequence.length
            item.version = sequence.version
            item.new_blocks = <int32_t> (blocks - pages.lists[row].num)
            item.copies = False
            if pages.reserve_blocks(row, item.new_blocks) != RF_OK:
                problem = "memory"
                break
            if sequence.length % block_size:
                last = pages.lists[row].ids[sequence.length // block_size]
                if pool.blocks[last].ref_count > 1:
                    # Its own copy leaves one holder less for the sequences that follow in this
                    # batch: the last of them may write in place.
                    pool.blocks[last].ref_count -= 1
                    item.copies = True
                    num_copies[0] += 1
            planned = i + 1
            needed += item.new_blocks + item.copies
            columns = max(columns, blocks)
        for j in range(planned):
            if batch.items[j].copies:
                row = batch.items[j].row
                last = pages.lists[row].ids[batch.items[j].start // block_size]
                pool.blocks[last].ref_count += 1
        # Raised only now that the counts are right again: to make an exception may run the garbage
        # collector, and a finalizer that frees its sequence.
        if problem is not None:
            where = f"sequence_ids[{i}]: sequence {ids[i]}"
            if problem == "unknown":
                raise UnknownSequenceError(f"{where} is not in the cache")
            if problem == "twice":
                raise ValueError(f"{where} is named twice")
            if problem == "long":
                raise ValueError(f"num_tokens: sequence {ids[i]} would have {length} tokens, "
                                 f"max_seq_len is {limit}")
            raise MemoryError(f"no memory for {item.new_blocks} blocks of the page table")
        if needed > rf_block_pool_num_available(pool):
            raise OutOfBlocksError(needed, rf_block_pool_num_available(pool))
        return columns

    cdef void apply(self, Batch batch) noexcept:
        """Carry out what `plan` found possible, and fill in the batch's arrays."""
        cdef rf_block_pool *pool = &self.allocator.pool
        cdef PageTable pages = self.page_table
        cdef int32_t *rows = <int32_t *> cnp.PyArray_DATA(batch.rows)
        cdef int32_t *seq_lens = <int32_t *> cnp.PyArray_DATA(batch.seq_lens)
        cdef int32_t *cu_seqlens_q = <int32_t *> cnp.PyArray_DATA(batch.cu_seqlens_q)
        cdef int64_t *positions = <int64_t *> cnp.PyArray_DATA(batch.positions)
        cdef int64_t *slots = <int64_t *> cnp.PyArray_DATA(batch.slot_mapping)
        cdef int32_t *copies = <int32_t *> cnp.PyArray_DATA(batch.copies)
        cdef int32_t *table = <int32_t *> cnp.PyArray_DATA(self.table)
        cdef int64_t columns = cnp.PyArray_DIM(self.table, 1)
        cdef int64_t block_size = pages.block_size, position, end, stop, slot, index
        cdef int32_t i, bad, source, token = 0
        cdef Item *item
        cdef BlockList *blocks
        batch.max_seqlen_q = batch.max_seq_len = 0
        for i in range(batch.num_sequences):
            item = &batch.items[i]
            blocks = &pages.lists[item.row]
            if item.copies:
                index = item.start // block_size
                source = blocks.ids[index]
                rf_block_pool_allocate(pool, 1, &blocks.ids[index])
                rf_block_pool_release(pool, &source, 1, False, &bad)
                table[item.row * columns + index] = blocks.ids[index]
                copies[0] = source
                copies[1] = blocks.ids[index]
                copies += 2
                if self.sequences[item.row].committed < item.start:
                    # Earlier batches that are not written yet point into the block just left.
                    self.versions += 1
                    self.sequences[item.row].version = item.version = self.versions
            if item.new_blocks:
                rf_block_pool_allocate(pool, item.new_blocks, blocks.ids + blocks.num)
                memcpy(table + item.row * columns + blocks.num, blocks.ids + blocks.num,
                       item.new_blocks * sizeof(int32_t))
                blocks.num += item.new_blocks
            rows[i] = item.row
            cu_seqlens_q[i] = token
            position = item.start
            end = item.start + item.num_tokens
            while position < end:  # a block at a time: consecutive positions are consecutive slots
                index = position // block_size
                slot = blocks.ids[index] * block_size + position - index * block_size
                stop = min(end, (index + 1) * block_size)
                while position < stop:
                    positions[token] = position
                    slots[token] = slot
                    token += 1
                    position += 1
                    slot += 1
            seq_lens[i] = <int32_t> end
            self.sequences[item.row].length = end
            batch.max_seqlen_q = max(batch.max_seqlen_q, item.num_tokens)
            batch.max_seq_len = max(batch.max_seq_len, <int> end)
        cu_seqlens_q[batch.num_sequences] = token
        batch.block_table = self.table
        self.changes += 1

    cdef int check_batch(self, object batch) except -1:
        """Refuse a batch that is not of this cache, or whose slots are no longer its sequences'."""
        cdef int32_t i
        cdef Batch b
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: expected a Batch, got {type(batch).__name__}")
        b = <Batch> batch
        if b.manager is not self:
            raise ValueError("batch: it was made by another cache")
        for i in range(b.num_sequences):
            if self.sequences[b.items[i].row].version != b.items[i].version:
                raise ValueError(f"batch: stale, sequence {b.sequence_ids[i]} was freed since, or "
                                 "left a shared block that the batch writes to")
        return 0

    cdef int32_t first_gap(self, Batch batch) noexcept:
        """The first sequence of which the batch is not the next to commit; their number if none."""
        cdef int32_t i
        for i in range(batch.num_sequences):
            if self.sequences[batch.items[i].row].committed != batch.items[i].start:
                return i
        return batch.num_sequences

    def commit(self, batch):
        """Say that the keys and values of a batch are written, in all layers.

        Batches of a sequence are committed in the order in which they were made.

        Parameters
        ----------
        batch : Batch
            Made by `append` of this cache, not committed yet.

        Raises
        ------
        ValueError
            If the batch is of another cache, was committed already, a sequence of it was freed, or
            tokens before it were never committed.
        """
        cdef Batch b
        cdef int32_t i
        cdef Item *item
        self.check_batch(batch)
        b = <Batch> batch
        if b.committed:
            raise ValueError("batch: it was committed already")
        i = self.first_gap(b)
        if i < b.num_sequences:
            item = &b.items[i]
            raise ValueError(
                f"batch: it begins at token {item.start} of sequence {b.sequence_ids[i]}, of which "
                f"{self.sequences[item.row].committed} are committed: commit in order")
        for i in range(b.num_sequences):
            item = &b.items[i]
            self.sequences[item.row].committed = item.start + item.num_tokens
        b.committed = True
        self.changes += 1

    # ---- for KVCache, which is written in Python ----

    def _check_batch(self, batch):
        self.check_batch(batch)

    def _check_writable_batch(self, batch):
        self.check_batch(batch)
        if (<Batch> batch).committed:
            raise ValueError("batch: it was committed already")

    def _mark_written(self, Batch batch, int layer, int num_layers):
        """Note that a layer was written; the last one commits the batch where that is in order."""
        if batch.written is None:
            batch.written = bytearray(num_layers)
            batch.unwritten = num_layers
        if not batch.written[layer]:
            batch.written[layer] = 1
            batch.unwritten -= 1
        if batch.unwritten == 0 and self.first_gap(batch) == batch.num_sequences:
            self.commit(batch)

    # ---- looking ----

    def stats(self):
        """Counts of blocks, sequences and tokens, as `CacheStats`. O(num_blocks)."""
        cdef rf_block_pool *pool = &self.allocator.pool
        cdef int32_t row, block
        cdef int64_t shared = 0, references = 0, tokens = 0
        for block in range(pool.num_blocks):
            shared += pool.blocks[block].ref_count > 1
        for row in range(self.page_table.map.num_rows):
            references += self.page_table.lists[row].num
        for _, row in self.page_table._items():
            tokens += self.sequences[row].length
        return CacheStats(
            block_size=self.page_table.block_size, num_blocks=pool.num_blocks,
            used_blocks=pool.num_blocks - rf_block_pool_num_free(pool) - pool.num_kept,
            free_blocks=rf_block_pool_num_available(pool), shared_blocks=shared,
            references=references, num_sequences=self.page_table.map.num_ids, num_tokens=tokens)

    def check_integrity(self):
        """Prove that page table, block pool, lengths and block table agree.

        Raises
        ------
        AssertionError
            With a sentence, if they do not.
        """
        cdef PageTable pages = self.page_table
        cdef int32_t row, i
        cdef BlockList *blocks
        cdef Sequence *sequence
        cdef int32_t *table = <int32_t *> cnp.PyArray_DATA(self.table)
        pages.check_integrity()
        self.allocator.check_integrity()
        holders = np.zeros(self.num_blocks, np.int32)
        for sequence_id, row in pages._items():
            blocks = &pages.lists[row]
            sequence = &self.sequences[row]
            if blocks.num != -(-sequence.length // pages.block_size):
                raise AssertionError(f"sequence {sequence_id}: {sequence.length} tokens in "
                                     f"{blocks.num} blocks")
            if not 0 <= sequence.committed <= sequence.length:
                raise AssertionError(f"sequence {sequence_id}: {sequence.committed} committed of "
                                     f"{sequence.length} tokens")
            for i in range(blocks.num):
                holders[blocks.ids[i]] += 1
                if table[row * cnp.PyArray_DIM(self.table, 1) + i] != blocks.ids[i]:
                    raise AssertionError(f"sequence {sequence_id}: the block table differs at {i}")
        for i in range(self.num_blocks):
            if self.allocator.pool.blocks[i].ref_count != holders[i]:
                raise AssertionError(f"block {i}: {holders[i]} holders, reference count "
                                     f"{self.allocator.pool.blocks[i].ref_count}")

    def __len__(self):
        return self.page_table.map.num_ids

    def __contains__(self, sequence_id):
        return self.page_table.find(sequence_id) != RF_NO_ROW

    def __repr__(self):
        return (f"{type(self).__name__}(num_blocks={self.num_blocks}, "
                f"block_size={self.block_size}, num_sequences={len(self)}, "
                f"num_free_blocks={self.num_free_blocks})")
