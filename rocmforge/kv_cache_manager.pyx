# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Sequences over shared blocks, and the batches that extend them: no tensor, no device."""

cimport numpy as cnp
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint64_t
from libc.string cimport memcmp, memcpy

from rocmforge._core cimport (
    RF_BLOCK_CACHED, RF_KEEP_CACHED, RF_NO_ROW, RF_OK, as_tokens, rf_block_pool,
    rf_block_pool_drop, rf_block_pool_num_available, rf_id_map, rf_id_map_find,
    rf_prefix_index_use, rf_realloc)
from rocmforge.batch cimport Batch, BatchGroup, Item, new_batch
from rocmforge.cache_group cimport CacheGroup
from rocmforge.page_table cimport BlockList
from rocmforge.shared_sequences cimport ROOT_UNSET, Sequence, SharedSequences

from rocmforge.errors import OutOfBlocksError, UnknownSequenceError

cnp.import_array()

cdef enum:
    SLOTS_UNSET = -1


cdef class KVCacheManager(SharedSequences):
    """Which blocks hold the tokens of which sequence, and which slots the next step writes.

    It knows no tensor and no device: `KVCache` adds those, and an engine with its own kernels uses
    the manager alone.

    Parameters
    ----------
    num_blocks : int, optional
        Blocks of the pool, 0 .. 2**31 - 1. Not with `groups`.
    block_size : int
        Tokens a block, from 1 up.
    groups : sequence of LayerGroup, optional
        Pools of layers that differ in their window, at most 32.
    kernel_block_size : int, optional
        Tokens a block as kernels see them, a divisor of `block_size`: a block is then several
        consecutive kernel blocks, and block tables, copies and deltas count in those.
    max_sequences : int, optional
        The most sequences at one time; unlimited when not given.
    max_seq_len : int, optional
        The most tokens of a sequence. With both limits the block tables keep one address for life,
        as captured graphs need; else they grow, and `table_epoch` counts how often one moved.
    prefix_caching : bool
        Share the full blocks of sequences that begin with the same tokens, and keep them when
        their sequences end until their blocks are needed.
    watermark : int
        Blocks of each pool that only sequences which were in a batch before may take: a reserve,
        so that what runs can go on when something new was admitted.
    max_pinned_blocks : int, optional
        The most blocks that `pin` may hold; half of all when not given.

    Raises
    ------
    ValueError
        If a number is out of its range.
    MemoryError
        If there is no memory for 32 bytes a block.

    Notes
    -----
    After any error the manager is as it was before the call.

    Examples
    --------
    >>> manager = KVCacheManager(num_blocks=64, block_size=4)
    >>> manager.add_sequence(7, [11, 12, 13, 14, 15, 16])
    0
    >>> batch = manager.append([7], 6)
    >>> batch.seq_lens, batch.block_table[batch.rows[0], :2]
    (array([6], dtype=int32), array([0, 1], dtype=int32))
    >>> manager.commit(batch)
    >>> manager.add_sequence(8, [11, 12, 13, 14, 99])    # the first block is shared
    4
    >>> manager.fork(7, 9)                               # shares both blocks
    >>> manager.append([9], 1).copies                    # copied before it is written to
    array([[1, 2]], dtype=int32)
    """

    def append(self, sequence_ids, num_tokens, token_ids=None, *, out=None):
        """Reserve the slots of the next tokens of some sequences: all of them, or nothing.

        Known tokens that were not computed yet come first. The slots may be more than will be
        filled (look-ahead): `truncate` takes the rest back.

        Parameters
        ----------
        sequence_ids : sequence of int, or uint64 or non-negative int64 array ``[num_seqs]``
            Different sequences of the cache.
        num_tokens : int, or sequence of int ``[num_seqs]``
            New tokens of every, or of each, sequence; from 1 up.
        token_ids : sequence of int, or int32 or int64 array ``[num_tokens]``, optional
            The tokens whose keys and values this batch writes, flat and in the batch's order.
            Only blocks whose tokens are known can be shared by others.
        out : Batch, optional
            A batch of this cache that is no longer needed: its arrays are used again where their
            sizes fit. Also after an error its former contents are gone.

        Returns
        -------
        Batch
            Slots, lengths, block tables and pending copies.

        Raises
        ------
        UnknownSequenceError
            If a sequence is not in the cache.
        OutOfBlocksError
            If the batch as a whole needs more blocks than there are, or would take the reserve
            (`watermark`) for a sequence that was in no batch yet.
        ValueError
            If a sequence is named twice, a number is out of range, a sequence would pass
            `max_seq_len`, or `token_ids` differ from tokens that are known.
        """
        cdef Batch batch
        cdef BatchGroup part
        cdef CacheGroup group
        cdef cnp.ndarray tokens = None
        cdef const int32_t *data = NULL
        cdef int64_t columns, needed, copies, delta
        cdef uint64_t changes, plannings
        cdef int32_t g
        cdef cnp.npy_intp[2] shape
        if out is None:
            batch = new_batch()
        elif isinstance(out, Batch):
            batch = <Batch> out
            if (batch.groups is not None
                    and (<BatchGroup> batch.groups[0]).group is not self.first):
                raise ValueError("out: it was made by another cache")
        else:
            raise TypeError(f"out: expected a Batch, got {type(out).__name__}")
        batch.read_sequences(sequence_ids)
        batch.read_counts(num_tokens)
        if token_ids is not None:
            tokens = as_tokens(token_ids, "token_ids")
            if cnp.PyArray_SIZE(tokens) != batch.num_tokens:
                raise ValueError(
                    f"token_ids: expected {batch.num_tokens} as in num_tokens, got {tokens.size}")
            data = <const int32_t *> cnp.PyArray_DATA(tokens)
            if self.prefix_caching:
                self.prefixes.require()
        while True:
            changes = self.changes
            batch.make_room(self.groups)
            columns = self.plan(batch, data)
            plannings = self.plannings
            for g in range(len(self.groups)):
                part = batch.groups[g]
                self.plan_group(batch, g, <int64_t *> cnp.PyArray_DATA(part.slot_mapping), &needed,
                                &copies, &delta)
                if copies:
                    shape[0] = copies
                    shape[1] = 2
                    part.copies = cnp.PyArray_SimpleNew(2, shape, cnp.NPY_INT32)
                if delta:
                    shape[0] = delta
                    shape[1] = 3
                    part.table_delta = cnp.PyArray_SimpleNew(2, shape, cnp.NPY_INT32)
            for group in self.groups:  # only when the batch fits everywhere
                group.grow_table(0, columns)
            # Making objects may run the garbage collector and with it anybody's code. From here on
            # nothing does, and nothing can fail.
            if changes == self.changes and plannings == self.plannings:
                break
        self.apply(batch, data)
        return batch

    def can_append(self, sequence_ids, num_tokens):
        """Whether `append` with these arguments would find all blocks that it needs.

        Raises
        ------
        UnknownSequenceError, ValueError
            As `append`, for what is wrong with the arguments.
        """
        cdef Batch batch = new_batch()
        cdef int64_t needed, copies, delta
        cdef int32_t g
        batch.read_sequences(sequence_ids)
        batch.read_counts(num_tokens)
        self.plan(batch, NULL)
        try:
            for g in range(len(self.groups)):
                self.plan_group(batch, g, NULL, &needed, &copies, &delta)
        except OutOfBlocksError:
            return False
        return True

    cdef int learn(self, Sequence *sequence, const int32_t *tokens, int64_t n) except -1:
        """Check a batch's tokens of a sequence against those known, and make room for the rest."""
        cdef int64_t start = sequence.length, capacity
        cdef int64_t again = min(sequence.num_known - start, n)
        cdef int32_t *grown
        if again > 0 and memcmp(sequence.tokens + start, tokens, again * sizeof(int32_t)):
            raise ValueError(f"token_ids: they differ from tokens that are known, among the "
                             f"{again} from position {start} on")
        if sequence.num_known >= start and start + n > sequence.capacity:
            capacity = max(start + n, sequence.capacity + sequence.capacity // 2, 16)
            grown = <int32_t *> rf_realloc(sequence.tokens, capacity * sizeof(int32_t))
            if grown == NULL:
                raise MemoryError(f"no memory for {capacity} tokens")
            sequence.tokens = grown
            sequence.capacity = capacity
        return 0

    cdef int64_t plan(self, Batch batch, const int32_t *tokens) except -1:
        """Fill in the batch's items and check the sequences; changes no state.

        Returns the blocks of the longest sequence.
        """
        cdef const uint64_t *ids = <const uint64_t *> cnp.PyArray_DATA(batch.sequence_ids)
        cdef int64_t limit = INT32_MAX if self.max_seq_len is None else self.max_seq_len
        cdef int64_t length, longest = 0
        cdef const rf_id_map *map = &self.first.page_table.map
        cdef int32_t i, row
        cdef Item *item
        cdef Sequence *sequence
        self.plannings += 1
        for i in range(batch.num_sequences):
            item = &batch.items[i]
            row = item.row  # of the step before, in a batch that was given back
            if (row >= map.num_rows or map.ids[row] != ids[i]
                    or self.sequences[row].version == 0):  # a free row
                row = rf_id_map_find(map, ids[i])
            if row == RF_NO_ROW:
                raise UnknownSequenceError(
                    f"sequence_ids[{i}]: sequence {ids[i]} is not in the cache")
            sequence = &self.sequences[row]
            if sequence.seen == self.plannings:
                raise ValueError(f"sequence_ids[{i}]: sequence {ids[i]} is named twice")
            sequence.seen = self.plannings
            length = sequence.length + item.num_tokens
            if length > limit:
                raise ValueError(f"num_tokens: sequence {ids[i]} would have {length} tokens, "
                                 f"max_seq_len is {limit}")
            item.row = row
            item.start = sequence.length
            item.version = sequence.version
            longest = max(longest, length)
            if tokens != NULL:
                if sequence.num_known != sequence.length or length > sequence.capacity:
                    self.learn(sequence, tokens, item.num_tokens)
                tokens += item.num_tokens
        return (longest + self.block_size - 1) // self.block_size

    cdef int plan_group(self, Batch batch, int32_t g, int64_t *slots, int64_t *needed,
                        int64_t *copies, int64_t *delta) except -1:
        """Count the blocks, copies and table entries that the batch takes of a group.

        Notes the slots of sequences that just go on in a block of their own, and for the others
        that they are `SLOTS_UNSET`; not where slots is NULL. Makes room in the page table, changes
        no state, and raises where blocks are too few.
        """
        cdef CacheGroup group = self.groups[g]
        cdef rf_block_pool *pool = &group.allocator.pool
        cdef int64_t reserve = 0, available, block_size = self.block_size, first, shown
        cdef int64_t end, reserved, k
        cdef int32_t i, last, new_blocks
        cdef bint copied, failed = False
        cdef Item *item
        cdef BlockList *blocks
        needed[0] = copies[0] = 0
        delta[0] = group.num_changes()
        for i in range(batch.num_sequences):
            item = &batch.items[i]
            blocks = &group.page_table.lists[item.row]
            end = item.start + item.num_tokens
            reserved = blocks.num * block_size  # a sequence has no block too many
            new_blocks = 0
            if end > reserved:
                new_blocks = <int32_t> ((end - reserved + block_size - 1) // block_size)
            copied = False
            if slots != NULL:
                slots[0] = SLOTS_UNSET
            if item.start < reserved:
                last = blocks.ids[blocks.num - 1]
                if pool.blocks[last].ref_count == 1:
                    if (slots != NULL and end <= reserved
                            and not pool.blocks[last].flags & RF_BLOCK_CACHED):
                        for k in range(item.num_tokens):
                            slots[k] = (last + 1) * block_size + (item.start - reserved) + k
                else:
                    # Its own copy leaves one holder less for the sequences that follow in this
                    # batch: the last of them may write in place. Taken back below.
                    pool.blocks[last].ref_count -= 1
                    copied = True
                    copies[0] += 1
            if slots != NULL:
                slots += item.num_tokens
            item.copied = copied
            if copied or new_blocks:
                first = blocks.num - copied
                shown = min(<int64_t> group.changed[item.row], blocks.num)
                delta[0] += (max(0, shown - first) + new_blocks) * group.ratio
                needed[0] += new_blocks + copied
                failed |= group.page_table.reserve_blocks(item.row, new_blocks) != RF_OK
            if not self.sequences[item.row].started:
                reserve = self.watermark
        if copies[0]:
            for i in range(batch.num_sequences):
                item = &batch.items[i]
                if item.copied:
                    blocks = &group.page_table.lists[item.row]
                    pool.blocks[blocks.ids[blocks.num - 1]].ref_count += 1
            copies[0] *= group.ratio
        if failed:
            raise MemoryError(f"no memory for {needed[0]} blocks of the page table")
        available = rf_block_pool_num_available(pool)
        if needed[0] and needed[0] > available - reserve:
            raise OutOfBlocksError(needed[0], max(0, available - reserve))
        return 0

    cdef void apply(self, Batch batch, const int32_t *tokens) noexcept:
        """Carry out what the planning found possible, and fill in the batch's arrays."""
        cdef int32_t *rows = <int32_t *> cnp.PyArray_DATA(batch.rows)
        cdef int32_t *seq_lens = <int32_t *> cnp.PyArray_DATA(batch.seq_lens)
        cdef int32_t *cu_seqlens_q = <int32_t *> cnp.PyArray_DATA(batch.cu_seqlens_q)
        cdef int64_t *positions = <int64_t *> cnp.PyArray_DATA(batch.positions)
        cdef int64_t end, known, k
        cdef int32_t i, g, token = 0, max_seqlen_q = 0, max_seq_len = 0
        cdef Item *item
        cdef Sequence *sequence
        self.batches += 1
        for g in range(len(self.groups)):
            self.apply_group(batch, g)
        for i in range(batch.num_sequences):
            item = &batch.items[i]
            sequence = &self.sequences[item.row]
            end = item.start + item.num_tokens
            if tokens != NULL:
                if sequence.root == ROOT_UNSET and self.prefix_caching:
                    sequence.root = sequence.chain = self.prefixes.unsalted
                    rf_prefix_index_use(&self.prefixes.index, sequence.chain)
                known = sequence.num_known
                if item.start <= known < end:
                    if end - known == 1:  # a decode step: the call would cost more than the copy
                        sequence.tokens[known] = tokens[known - item.start]
                    else:
                        memcpy(sequence.tokens + known, tokens + (known - item.start),
                               (end - known) * sizeof(int32_t))
                    sequence.num_known = end
                tokens += item.num_tokens
            rows[i] = item.row
            cu_seqlens_q[i] = token
            for k in range(item.num_tokens):
                positions[k] = item.start + k
            positions += item.num_tokens
            token += item.num_tokens
            seq_lens[i] = <int32_t> end
            sequence.length = end
            sequence.started = True
            max_seqlen_q = max(max_seqlen_q, item.num_tokens)
            max_seq_len = max(max_seq_len, <int32_t> end)
        cu_seqlens_q[batch.num_sequences] = token
        batch.max_seqlen_q = max_seqlen_q
        batch.max_seq_len = max_seq_len
        batch.manager = self
        self.changes += 1

    cdef void apply_group(self, Batch batch, int32_t g) noexcept:
        """Take the blocks of a group, and fill in its part of the batch."""
        cdef CacheGroup group = self.groups[g]
        cdef BatchGroup part = batch.groups[g]
        cdef rf_block_pool *pool = &group.allocator.pool
        cdef int64_t *slots = <int64_t *> cnp.PyArray_DATA(part.slot_mapping)
        cdef int32_t *copies = <int32_t *> cnp.PyArray_DATA(part.copies)
        cdef int64_t block_size = self.block_size, position, end, slot, index, n, k
        cdef int32_t i, source, new_blocks
        cdef Item *item
        cdef BlockList *blocks
        for i in range(batch.num_sequences):
            item = &batch.items[i]
            if group.window:
                group.hide_released(item.row, item.start)
            if slots[0] != SLOTS_UNSET:  # most sequences of a decode step
                slots += item.num_tokens
                continue
            blocks = &group.page_table.lists[item.row]
            position = item.start
            end = position + item.num_tokens
            index = blocks.num
            if position < index * block_size:  # behind the tokens of its last block
                index -= 1
                source = blocks.ids[index]
                if pool.blocks[source].ref_count > 1:
                    self.prefixes.take(g, 1, &blocks.ids[index])
                    self.copied_blocks += 1
                    rf_block_pool_drop(pool, &source, 1, RF_KEEP_CACHED, 0)
                    group.mark(item.row, <int32_t> index)
                    for k in range(group.ratio):
                        copies[0] = <int32_t> (source * group.ratio + k)
                        copies[1] = <int32_t> (blocks.ids[index] * group.ratio + k)
                        copies += 2
                    if self.sequences[item.row].committed < position:
                        # Batches that are not written yet point into the block just left.
                        self.versions += 1
                        self.sequences[item.row].version = item.version = self.versions
                elif pool.blocks[source].flags & RF_BLOCK_CACHED:
                    # The others who had it are gone: what follows overwrites what it was known for.
                    self.prefixes.unlink_block(g, source)
            if end > blocks.num * block_size:
                new_blocks = <int32_t> ((end - blocks.num * block_size + block_size - 1)
                                        // block_size)
                self.prefixes.take(g, new_blocks, blocks.ids + blocks.num)
                group.mark(item.row, blocks.num)
                blocks.num += new_blocks
            while position < end:  # a block at a time: consecutive positions are consecutive slots
                slot = (blocks.ids[index] - index) * block_size + position
                index += 1
                n = min(end, index * block_size) - position
                for k in range(n):
                    slots[k] = slot + k
                slots += n
                position += n
        group.show_changes(<int32_t *> cnp.PyArray_DATA(part.table_delta))
        group.newest = part.serial = self.batches
        part.block_table = group.table

    cdef int check_batch(self, object batch) except -1:
        """Refuse a batch that is not of this cache, or whose slots are no longer its sequences'."""
        cdef int32_t i
        cdef Batch b
        if not isinstance(batch, Batch):
            raise TypeError(f"batch: expected a Batch, got {type(batch).__name__}")
        b = <Batch> batch
        if b.manager is not self:
            raise ValueError("batch: it was made by another cache, or given back and never filled")
        for i in range(b.num_sequences):
            if self.sequences[b.items[i].row].version != b.items[i].version:
                raise ValueError(f"batch: stale, sequence {b.sequence_ids[i]} was freed or "
                                 "truncated since, or left a shared block that the batch writes to")
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

        From then on others find the blocks that it filled, and windowed groups release those that
        their windows have passed. Batches of a sequence are committed in the order in which they
        were made.

        Parameters
        ----------
        batch : Batch
            Made by `append` of this cache, not committed yet.

        Raises
        ------
        ValueError
            If the batch is of another cache or was committed already, if a sequence of it was
            freed or truncated since, or if tokens before it were never committed.
        """
        cdef Batch b
        cdef int64_t block_size = self.block_size
        cdef int32_t i
        cdef Item *item
        cdef Sequence *sequence
        self.check_batch(batch)
        b = <Batch> batch
        if b.committed:
            raise ValueError("batch: it was committed already")
        i = self.first_gap(b)
        if i < b.num_sequences:
            item = &b.items[i]
            raise ValueError(
                f"batch: it begins at token {item.start} of sequence {b.sequence_ids[i]}, of which "
                f"{self.sequences[item.row].committed} are committed: commit in order, or truncate")
        for i in range(b.num_sequences):
            item = &b.items[i]
            sequence = &self.sequences[item.row]
            sequence.committed = item.start + item.num_tokens
            if ((sequence.chained + 1) * block_size <= sequence.committed
                    and sequence.chain >= 0):
                self.publish(item.row)
            if self.has_windows:
                self.release_window(item.row)
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
