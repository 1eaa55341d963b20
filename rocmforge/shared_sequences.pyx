# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Sequences over shared blocks: begun, forked, ended, taken back, and what is found of them later.

All that a manager does without a batch; `KVCacheManager` adds the steps that extend sequences.
"""

cimport numpy as cnp
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint64_t
from libc.string cimport memcpy, memset

from rocmforge._core cimport (
    RF_BLOCK_CACHED, RF_KEEP_CACHED, RF_NO_BLOCK, RF_NO_NODE, RF_NO_ROW, RF_NUM_PRIORITIES, RF_OK,
    as_int, as_int_array, as_sequence_id, as_tokens, plain_int, rf_alloc, rf_block,
    rf_block_pool_drop, rf_block_pool_hold, rf_block_pool_num_available, rf_block_pool_pin,
    rf_block_pool_unpin, rf_free, rf_id_map_find, rf_prefix_index_block, rf_prefix_index_node,
    rf_prefix_index_step, rf_prefix_index_unuse, rf_prefix_index_use, rf_prefix_index_walk,
    rf_realloc)
from rocmforge.cache_group cimport MAX_GROUPS, CacheGroup, new_group
from rocmforge.page_table cimport BlockList
from rocmforge.prefix_cache cimport new_prefix_cache, salt_key

import copyreg

import numpy as np

from rocmforge.errors import UnknownSequenceError
from rocmforge.layer_group import LayerGroup

cnp.import_array()

# what __init__ takes besides the pools
OPTIONS = ("block_size", "kernel_block_size", "max_sequences", "max_seq_len", "prefix_caching",
           "watermark", "max_pinned_blocks")


cdef class SharedSequences:
    """What `KVCacheManager` is without its steps: which blocks hold the tokens of which sequence.

    Parameters and errors as of `KVCacheManager`.
    """

    def __cinit__(self, *args, **kwargs):
        # a valid empty cache, whatever a subclass does before it calls __init__
        self.first = new_group(0, 1, 0, 1, 0, 0)
        self.groups = (self.first,)
        self.block_size = self.kernel_block_size = 1
        self.prefixes = new_prefix_cache(self.groups, 1)

    def __init__(self, num_blocks=None, *, block_size=16, groups=None, kernel_block_size=None,
                 max_sequences=None, max_seq_len=None, prefix_caching=True, watermark=0,
                 max_pinned_blocks=None):
        cdef int64_t rows = 0, columns = 0, total = 0, ratio, blocks, window
        if self.initialized:
            raise TypeError(f"{type(self).__name__}: it is initialised already")
        block_size = as_int(block_size, "block_size", 1, INT32_MAX)
        if kernel_block_size is None:
            kernel_block_size = block_size
        kernel_block_size = as_int(kernel_block_size, "kernel_block_size", 1, INT32_MAX)
        if block_size % kernel_block_size:
            raise ValueError(f"kernel_block_size: expected a divisor of the block size "
                             f"{block_size}, got {kernel_block_size}")
        ratio = block_size // kernel_block_size
        if (num_blocks is None) == (groups is None):
            raise ValueError("num_blocks: expected either num_blocks or groups")
        if groups is None:
            sizes = [(as_int(num_blocks, "num_blocks", 0, INT32_MAX), 0)]
        else:
            if not isinstance(groups, (list, tuple)):
                raise TypeError(
                    f"groups: expected a list of LayerGroup, got {type(groups).__name__}")
            for i, group in enumerate(groups):
                if not isinstance(group, LayerGroup):
                    raise TypeError(
                        f"groups[{i}]: expected a LayerGroup, got {type(group).__name__}")
            sizes = [(as_int(group.num_blocks, f"groups[{i}].num_blocks", 0, INT32_MAX),
                      0 if group.window is None
                      else as_int(group.window, f"groups[{i}].window", 1, INT32_MAX))
                     for i, group in enumerate(groups)]
            as_int(len(sizes), "groups", 1, MAX_GROUPS)
        for blocks, _ in sizes:
            total += blocks
            if blocks * ratio > INT32_MAX:
                raise ValueError(f"num_blocks: {blocks} blocks are more than 2**31 - 1 kernel "
                                 f"blocks of {kernel_block_size} tokens")
        if max_sequences is not None:
            max_sequences = rows = as_int(max_sequences, "max_sequences", 1, INT32_MAX)
        if max_seq_len is not None:
            max_seq_len = columns = as_int(max_seq_len, "max_seq_len", 1, INT32_MAX)
        watermark = as_int(watermark, "watermark", 0, INT32_MAX)
        if max_pinned_blocks is None:
            max_pinned_blocks = min(total // 2, INT32_MAX)
        max_pinned_blocks = as_int(max_pinned_blocks, "max_pinned_blocks", 0, INT32_MAX)
        columns = (columns + block_size - 1) // block_size
        made = tuple([new_group(blocks, block_size, window, <int32_t> ratio, rows, columns)
                      for blocks, window in sizes])
        self.initialized = True
        self.groups = made
        self.first = made[0]
        self.prefixes = new_prefix_cache(made, block_size)
        self.block_size = block_size
        self.kernel_block_size = kernel_block_size
        self.max_sequences = max_sequences
        self.max_seq_len = max_seq_len
        self.prefix_caching = prefix_caching
        self.has_windows = any([group.window for group in made])
        self.watermark = watermark
        self.max_pinned_blocks = max_pinned_blocks

    def __dealloc__(self):
        cdef int32_t row
        # rows without a sequence have no tokens; those above num_rows were never set
        if self.first is not None:
            for row in range(min(self.first.page_table.map.num_rows, self.sequences_capacity)):
                rf_free(self.sequences[row].tokens)
        rf_free(self.sequences)

    @property
    def allocator(self):
        """The first group's blocks, read-only."""
        return self.first.allocator

    @property
    def page_table(self):
        """The first group's page table, read-only."""
        return self.first.page_table

    @property
    def num_blocks(self):
        """Blocks of the first group's pool."""
        return self.first.allocator.pool.num_blocks

    @property
    def num_free_blocks(self):
        """Blocks of the first group that an append can have, those to be evicted included."""
        return rf_block_pool_num_available(&self.first.allocator.pool)

    @property
    def block_table(self):
        """The first group's block table, int32 ``[num_rows, max_blocks]``: a live view."""
        return self.first.table

    @property
    def table_epoch(self):
        """How often the first group's block table moved to another address."""
        return self.first.table_epoch

    # ---- sequences ----

    cdef int32_t require(self, object sequence_id) except -2:
        cdef int32_t row = rf_id_map_find(&self.first.page_table.map, as_sequence_id(sequence_id))
        if row == RF_NO_ROW:
            raise UnknownSequenceError(f"sequence {sequence_id} is not in the cache")
        return row

    cdef int reserve_sequence(self) except -1:
        """Make room for one more sequence, so that `add_row` cannot fail."""
        cdef CacheGroup group
        cdef Sequence *sequences
        cdef int32_t capacity
        if (self.max_sequences is not None
                and self.first.page_table.map.num_ids >= self.max_sequences):
            raise ValueError(f"max_sequences: the cache holds {self.max_sequences} already")
        for group in self.groups:
            group.reserve_row()
        capacity = self.first.page_table.map.row_capacity
        if self.sequences_capacity < capacity:
            sequences = <Sequence *> rf_realloc(self.sequences, capacity * sizeof(Sequence))
            if sequences == NULL:
                raise MemoryError("no memory for a sequence of the cache")
            memset(sequences + self.sequences_capacity, 0,
                   (capacity - self.sequences_capacity) * sizeof(Sequence))
            self.sequences = sequences
            self.sequences_capacity = capacity
        return 0

    cdef int32_t add_row(self, uint64_t key) noexcept:
        """Add an empty sequence; all groups give it the same row, as they did the same before."""
        cdef CacheGroup group
        cdef int32_t row
        for group in self.groups:
            group.add_row(key)
        row = rf_id_map_find(&self.first.page_table.map, key)
        memset(&self.sequences[row], 0, sizeof(Sequence))
        self.versions += 1
        self.changes += 1
        self.sequences[row].version = self.versions
        self.sequences[row].root = self.sequences[row].chain = RF_NO_NODE
        return row

    cdef void drop_row(self, uint64_t key, int32_t row) noexcept:
        """Forget a sequence; its blocks are dropped already."""
        cdef CacheGroup group
        if self.sequences[row].chain >= 0:
            rf_prefix_index_unuse(&self.prefixes.index, self.sequences[row].chain)
        rf_free(self.sequences[row].tokens)
        memset(&self.sequences[row], 0, sizeof(Sequence))
        for group in self.groups:
            group.drop_row(key)
        self.changes += 1

    def add_sequence(self, sequence_id, token_ids=None, salt=None, *, priority=0):
        """Begin a sequence, sharing the blocks that hold the beginning of its tokens already.

        The sequence then has the length found, and `append` reserves slots for the tokens behind.
        At least the last token is always left to compute.

        Parameters
        ----------
        sequence_id : int
            Any unsigned 64-bit integer that is not in use.
        token_ids : sequence of int, or int32 or int64 array ``[n]``, optional
            The prompt: values of 32 bits. An int32 buffer is read in place.
        salt : bytes or str, optional
            Shares only with sequences of the same salt: a tenant, an adapter, an image's hash. A
            str stands for its UTF-8 bytes.
        priority : int
            0 .. 7: when blocks are needed, cached ones of a lower priority are evicted first.

        Returns
        -------
        int
            Tokens found: a multiple of the block size.

        Raises
        ------
        ValueError
            If the id is in use, a number is out of range, or `max_sequences` are there already.
        """
        cdef uint64_t key = as_sequence_id(sequence_id), changes
        cdef int32_t level = <int32_t> as_int(priority, "priority", 0, RF_NUM_PRIORITIES - 1)
        cdef cnp.ndarray tokens = None
        cdef const int32_t *data = NULL
        cdef int32_t *known = NULL
        cdef int32_t row, root = ROOT_UNSET, i, g = 0, block
        cdef int64_t n = 0, found = 0
        cdef bint failed = False
        cdef CacheGroup group
        cdef Sequence *sequence
        if token_ids is not None:
            tokens = as_tokens(token_ids, "token_ids")
            data = <const int32_t *> cnp.PyArray_DATA(tokens)
            n = cnp.PyArray_SIZE(tokens)
        if self.max_seq_len is not None and n > self.max_seq_len:
            raise ValueError(f"token_ids: {n} tokens, max_seq_len is {self.max_seq_len}")
        salt, extra = salt_key(salt), None
        while True:
            changes = self.changes
            if rf_id_map_find(&self.first.page_table.map, key) != RF_NO_ROW:
                raise ValueError(f"sequence_id: sequence {key} is in the cache already")
            self.prefixes.sweep_salts()
            if self.prefix_caching and (n or salt is not None):
                self.prefixes.require()
                self.prefixes.reserve_nodes(n // self.block_size)
                extra = self.prefixes.extra_of(salt)
            self.reserve_sequence()
            if changes == self.changes:  # else another thread took the room meanwhile
                break
        # From here on no Python code runs, and no object is made that the garbage collector counts
        # and could run somebody's code for: nobody changes what was looked at.
        if self.prefix_caching and (n or salt is not None):
            root = self.prefixes.root_of(salt, extra)
        if n:
            known = <int32_t *> rf_alloc(n * sizeof(int32_t))
            if known == NULL:
                raise MemoryError(f"no memory for {n} tokens")
            memcpy(known, data, n * sizeof(int32_t))
            if root >= 0:
                found = self.prefixes.match(root, data, (n - 1) // self.block_size)
        row = self.add_row(key)
        sequence = &self.sequences[row]
        sequence.tokens = known
        sequence.num_known = sequence.capacity = n
        sequence.root = sequence.chain = root
        sequence.priority = level
        if root >= 0:
            if found:
                sequence.chain = self.prefixes.nodes[found - 1]
            sequence.chained = <int32_t> found
            rf_prefix_index_use(&self.prefixes.index, sequence.chain)
        if found:
            for group in self.groups:
                failed |= group.page_table.reserve_blocks(row, <int32_t> found) != RF_OK
            if failed:
                self.drop_row(key, row)
                raise MemoryError(f"no memory for {found} blocks of the page table")
            for group in self.groups:
                for i in range(<int32_t> found):
                    block = RF_NO_BLOCK
                    if i >= group.first_needed(found * self.block_size):
                        block = self.prefixes.block(i, g)
                        rf_block_pool_hold(&group.allocator.pool, block)
                    group.page_table.push_blocks(row, &block, 1)
                group.mark(row, 0)
                g += 1
            sequence.length = sequence.committed = found * self.block_size
        self.prompt_tokens += n
        self.hit_tokens += found * self.block_size
        return found * self.block_size

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
        cdef int32_t source, row, i
        cdef int32_t *known = NULL
        cdef bint failed = False
        cdef CacheGroup group
        cdef BlockList *blocks
        cdef Sequence *old
        cdef Sequence *new
        parent = plain_int(parent, "sequence id")
        while True:
            changes = self.changes
            source = self.require(parent)
            if rf_id_map_find(&self.first.page_table.map, key) != RF_NO_ROW:
                raise ValueError(f"child: sequence {key} is in the cache already")
            self.reserve_sequence()
            if changes == self.changes:  # else another thread took the room meanwhile
                break
        if self.sequences[source].num_known:
            known = <int32_t *> rf_alloc(self.sequences[source].num_known * sizeof(int32_t))
            if known == NULL:
                raise MemoryError(f"no memory for {self.sequences[source].num_known} tokens")
        row = self.add_row(key)
        old = &self.sequences[source]
        new = &self.sequences[row]
        new.tokens = known
        for group in self.groups:
            failed |= group.page_table.reserve_blocks(
                row, group.page_table.lists[source].num) != RF_OK
        if failed:
            self.drop_row(key, row)
            raise MemoryError("no memory for the blocks of a page table")
        if known != NULL:
            memcpy(known, old.tokens, old.num_known * sizeof(int32_t))
        new.num_known = new.capacity = old.num_known
        new.length = old.length
        new.committed = old.committed
        new.root = old.root
        new.chain = old.chain
        new.chained = old.chained
        new.priority = old.priority
        new.started = old.started
        if new.chain >= 0:
            rf_prefix_index_use(&self.prefixes.index, new.chain)
        for group in self.groups:
            blocks = &group.page_table.lists[source]
            for i in range(blocks.num):
                if blocks.ids[i] != RF_NO_BLOCK:
                    rf_block_pool_hold(&group.allocator.pool, blocks.ids[i])
            group.page_table.push_blocks(row, blocks.ids, blocks.num)
            group.mark(row, 0)

    def free(self, sequence_ids):
        """End sequences and drop their references; all of them, or nothing.

        Their full committed blocks stay cached, until the space is needed, for sequences that
        begin with the same tokens.

        Parameters
        ----------
        sequence_ids : int, or sequence of int, or uint64 or non-negative int64 array
            Different sequences of the cache.

        Raises
        ------
        UnknownSequenceError
            If a sequence is not in the cache (a double free).
        ValueError
            If a sequence is named twice.
        """
        cdef cnp.ndarray ids
        cdef const uint64_t *keys
        cdef int32_t row
        cdef Py_ssize_t i, n
        cdef CacheGroup group
        if hasattr(sequence_ids, "__len__") and not isinstance(sequence_ids, (str, bytes)):
            ids = as_int_array(sequence_ids, "sequence_ids", cnp.NPY_UINT64)
        else:
            ids = np.array([as_sequence_id(sequence_ids)], np.uint64)
        keys = <const uint64_t *> cnp.PyArray_DATA(ids)
        n = cnp.PyArray_SIZE(ids)
        self.plannings += 1
        for i in range(n):
            row = rf_id_map_find(&self.first.page_table.map, keys[i])
            if row == RF_NO_ROW:
                raise UnknownSequenceError(f"sequence {keys[i]} is not in the cache")
            if self.sequences[row].seen == self.plannings:
                raise ValueError(f"sequence_ids[{i}]: sequence {keys[i]} is named twice")
            self.sequences[row].seen = self.plannings
        for i in range(n):
            row = rf_id_map_find(&self.first.page_table.map, keys[i])
            for group in self.groups:
                rf_block_pool_drop(
                    &group.allocator.pool, group.page_table.lists[row].ids,
                    group.page_table.lists[row].num, RF_KEEP_CACHED, self.sequences[row].priority)
            self.drop_row(keys[i], row)

    def truncate(self, sequence_id, length):
        """Take the tokens of a sequence from `length` on back, as after a rejected speculation.

        The blocks behind are released. What the sequence alone had published of them is withdrawn
        from the prefix cache, also the block that is now partly filled; a shared one is copied by
        the next append instead. Batches made before are stale, and the tokens taken back are no
        longer known.

        Parameters
        ----------
        sequence_id : int
            A sequence of the cache.
        length : int
            Tokens to keep, 0 .. ``seq_len(sequence_id)``.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the cache.
        ValueError
            If `length` is out of range, or so short that a windowed group has released blocks that
            the next token needs. Of the tokens behind the prefix that `add_sequence` found, the
            last `block_size` can always be taken back.
        """
        length = plain_int(length, "length")
        cdef int32_t row = self.require(sequence_id), g, i, keep, first, parent
        cdef Sequence *sequence = &self.sequences[row]
        cdef int64_t tokens = as_int(length, "length", 0, sequence.length)
        cdef CacheGroup group
        cdef BlockList *blocks
        cdef rf_block *block
        if tokens == sequence.length:
            return
        keep = <int32_t> ((tokens + self.block_size - 1) // self.block_size)
        for group in self.groups:
            first = group.first_needed(tokens)
            if first < keep and group.page_table.lists[row].ids[first] == RF_NO_BLOCK:
                raise ValueError(f"length: at {tokens} tokens a window of {group.window} needs "
                                 f"blocks that were released")
        g = 0
        for group in self.groups:
            blocks = &group.page_table.lists[row]
            first = keep - 1 if tokens % self.block_size else keep
            for i in range(first, blocks.num):
                if blocks.ids[i] != RF_NO_BLOCK:
                    block = &group.allocator.pool.blocks[blocks.ids[i]]
                    if block.ref_count == 1 and block.flags & RF_BLOCK_CACHED:
                        self.prefixes.unlink_block(g, blocks.ids[i])
            rf_block_pool_drop(&group.allocator.pool, blocks.ids + keep, blocks.num - keep,
                               RF_KEEP_CACHED, sequence.priority)
            blocks.num = keep
            g += 1
        while sequence.chain >= 0 and sequence.chained > tokens // self.block_size:
            parent = self.prefixes.index.nodes[sequence.chain].parent
            rf_prefix_index_use(&self.prefixes.index, parent)
            rf_prefix_index_unuse(&self.prefixes.index, sequence.chain)
            sequence.chain = parent
            sequence.chained -= 1
        sequence.length = tokens
        sequence.committed = min(sequence.committed, tokens)
        sequence.num_known = min(sequence.num_known, tokens)
        self.versions += 1
        sequence.version = self.versions
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

    # ---- the prefix cache ----

    def match_prefix(self, token_ids, salt=None):
        """Tokens that `add_sequence` with these arguments would find; changes nothing.

        Parameters
        ----------
        token_ids : sequence of int, or int32 or int64 array ``[n]``
            A prompt.
        salt : bytes or str, optional
            As in `add_sequence`.

        Returns
        -------
        int
            A multiple of the block size, below ``n``.
        """
        cdef cnp.ndarray tokens = as_tokens(token_ids, "token_ids")
        cdef int64_t n = cnp.PyArray_SIZE(tokens)
        cdef int32_t root = self.prefixes.find_root(salt_key(salt))
        if root < 0 or n == 0:
            return 0
        self.prefixes.reserve_nodes(n // self.block_size)
        return self.block_size * self.prefixes.match(
            root, <const int32_t *> cnp.PyArray_DATA(tokens), (n - 1) // self.block_size)

    def can_add(self, token_ids, salt=None, *, length=None):
        """Whether `add_sequence` and an `append` behind it would find all blocks that they need.

        Changes nothing, so that a scheduler can ask for a prompt before it lets it in.

        Parameters
        ----------
        token_ids : sequence of int, or int32 or int64 array ``[n]``
            A prompt.
        salt : bytes or str, optional
            As in `add_sequence`.
        length : int, optional
            Tokens that the sequence shall have slots for; those of the prompt when not given.

        Raises
        ------
        ValueError
            If a number is out of range.
        """
        cdef cnp.ndarray tokens = as_tokens(token_ids, "token_ids")
        cdef int64_t n = cnp.PyArray_SIZE(tokens), found = 0, needed, available, i
        cdef int64_t limit = INT32_MAX if self.max_seq_len is None else self.max_seq_len
        cdef int64_t end = as_int(n if length is None else length, "length", 0, limit)
        cdef int32_t root = self.prefixes.find_root(salt_key(salt)), g = 0
        cdef CacheGroup group
        if (self.max_sequences is not None
                and self.first.page_table.map.num_ids >= self.max_sequences):
            return False
        if root >= 0 and n:
            self.prefixes.reserve_nodes(n // self.block_size)
            found = self.prefixes.match(
                root, <const int32_t *> cnp.PyArray_DATA(tokens), (n - 1) // self.block_size)
        needed = (end + self.block_size - 1) // self.block_size - found
        for group in self.groups:
            available = rf_block_pool_num_available(&group.allocator.pool) - self.watermark
            for i in range(group.first_needed(found * self.block_size), found):
                # what is found and nobody holds is no longer there to be taken
                available -= group.allocator.pool.blocks[self.prefixes.block(i, g)].ref_count == 0
            if needed > 0 and needed > available:
                return False
            g += 1
        return True

    def pin(self, token_ids, salt=None):
        """Hold the cached blocks of a prefix, so that they are not evicted.

        Pins add up: each needs an `unpin`.

        Parameters
        ----------
        token_ids : sequence of int, or int32 or int64 array ``[n]``
            The prefix; whole blocks of it count, also the last.
        salt : bytes or str, optional
            As in `add_sequence`.

        Returns
        -------
        int
            Tokens pinned: as many as are cached, a multiple of the block size.

        Raises
        ------
        ValueError
            If more than `max_pinned_blocks` would be pinned.
        """
        cdef cnp.ndarray tokens = as_tokens(token_ids, "token_ids")
        cdef int64_t n = cnp.PyArray_SIZE(tokens), found, i, pinned = 0, added = 0
        cdef int32_t root = self.prefixes.find_root(salt_key(salt)), g = 0, block
        cdef CacheGroup group
        if root < 0 or n == 0:
            return 0
        self.prefixes.reserve_nodes(n // self.block_size)
        found = self.prefixes.match(
            root, <const int32_t *> cnp.PyArray_DATA(tokens), n // self.block_size)
        for group in self.groups:
            pinned += group.allocator.pool.num_pinned
            for i in range(group.first_needed(found * self.block_size), found):
                block = self.prefixes.block(i, g)
                added += group.allocator.pool.blocks[block].pins == 0
                if group.allocator.pool.blocks[block].pins == 65535:
                    raise ValueError(f"token_ids: block {i} is pinned 65535 times already")
            g += 1
        if pinned + added > self.max_pinned_blocks:
            raise ValueError(f"max_pinned_blocks: {pinned} blocks are pinned and {added} would be "
                             f"added, the limit is {self.max_pinned_blocks}")
        g = 0
        for group in self.groups:
            for i in range(group.first_needed(found * self.block_size), found):
                rf_block_pool_pin(&group.allocator.pool, self.prefixes.block(i, g))
            g += 1
        self.changes += 1
        return found * self.block_size

    def unpin(self, token_ids, salt=None):
        """Take one pin of a prefix off; its blocks stay cached until they are evicted.

        Returns
        -------
        int
            Tokens whose blocks lost a pin.

        Raises
        ------
        ValueError
            If no block of the prefix is pinned.
        """
        cdef cnp.ndarray tokens = as_tokens(token_ids, "token_ids")
        cdef int64_t n = cnp.PyArray_SIZE(tokens), count = 0
        cdef int32_t root = self.prefixes.find_root(salt_key(salt)), g, i, walked = 0, block
        cdef bint lost
        cdef CacheGroup group
        if root >= 0:
            self.prefixes.reserve_nodes(n // self.block_size)
            walked = rf_prefix_index_walk(
                &self.prefixes.index, root, <const int32_t *> cnp.PyArray_DATA(tokens),
                <int32_t> (n // self.block_size), self.prefixes.nodes)
        for i in range(walked - 1, -1, -1):  # the tail is older, as in `free`
            lost = False
            g = 0
            for group in self.groups:
                block = self.prefixes.block(i, g)
                if block != RF_NO_BLOCK and group.allocator.pool.blocks[block].pins:
                    rf_block_pool_unpin(&group.allocator.pool, block)
                    lost = True
                g += 1
            count += lost
        if count == 0:
            raise ValueError("token_ids: no block of this prefix is pinned")
        self.changes += 1
        return count * self.block_size

    def reset_prefix_cache(self):
        """Forget all cached contents, as after a change of the model's weights.

        Blocks that nobody holds become free, and pins are taken off. Running sequences go on, but
        publish nothing any more: their keys and values are of the time before.

        Returns
        -------
        int
            Blocks that were cached.
        """
        cdef int32_t row
        for row in range(self.first.page_table.map.num_rows):
            if self.sequences[row].length:
                if self.sequences[row].chain >= 0:
                    rf_prefix_index_unuse(&self.prefixes.index, self.sequences[row].chain)
                self.sequences[row].root = self.sequences[row].chain = RF_NO_NODE
                self.sequences[row].chained = 0
        self.changes += 1
        return self.prefixes.forget_all()

    cdef void publish(self, int32_t row) noexcept:
        """Put the full, known and committed blocks of a sequence into the prefix index.

        Where another block holds the same content already, that one stays.
        """
        cdef Sequence *sequence = &self.sequences[row]
        cdef int64_t full = min(sequence.committed, sequence.num_known) // self.block_size
        cdef int32_t node, g, block
        cdef CacheGroup group
        if sequence.chain < 0:
            return
        while sequence.chained < full:
            node = rf_prefix_index_step(
                &self.prefixes.index, sequence.chain,
                sequence.tokens + <int64_t> sequence.chained * self.block_size)
            if node == RF_NO_NODE:
                return
            self.prefixes.named(node)
            g = 0
            for group in self.groups:
                block = group.page_table.lists[row].ids[sequence.chained]
                if (block != RF_NO_BLOCK
                        and rf_prefix_index_block(&self.prefixes.index, node, g) == RF_NO_BLOCK
                        and rf_prefix_index_node(&self.prefixes.index, g, block) == RF_NO_NODE):
                    self.prefixes.attach(node, g, block)
                g += 1
            sequence.chain = node
            sequence.chained += 1

    cdef void release_window(self, int32_t row) noexcept:
        """Give back the blocks that the windows have passed, but for one block's worth of tokens
        that a truncate may take back.

        The table shows them until the sequence's next batch, for the layer that was written last:
        what attends to the batch that was committed still reads them, and nothing is written to
        them before blocks are taken again.
        """
        cdef int64_t length = self.sequences[row].committed - self.block_size
        cdef int32_t first, last
        cdef CacheGroup group
        cdef BlockList *blocks
        for group in self.groups:
            blocks = &group.page_table.lists[row]
            last = first = group.first_needed(length)
            while first > 0 and blocks.ids[first - 1] != RF_NO_BLOCK:
                first -= 1
            if first == last:
                continue
            rf_block_pool_drop(&group.allocator.pool, blocks.ids + first, last - first,
                               RF_KEEP_CACHED, self.sequences[row].priority)
            while first < last:
                blocks.ids[first] = RF_NO_BLOCK
                first += 1

    def _constant_hash(self):
        """Give all contents one hash, before any is stored: for tests, every result stays right."""
        self.prefixes.require()
        if self.prefixes.index.num_nodes > 1:
            raise ValueError("the prefix index is in use")
        self.prefixes.index.hash_mask = 0

    # ---- looking ----

    def enable_events(self, capacity=65536, *, seed="0", medium=None):
        """Keep events of blocks that are stored in the prefix cache or removed, for `take_events`.

        What is cached already counts as stored now. Once more, it begins anew.

        Parameters
        ----------
        capacity : int
            The most events that wait, 1 .. 2**30, a block each; beyond it the oldest are lost.
        seed : str
            The value of ``PYTHONHASHSEED`` that the engines run with whose hashes are compared.
        medium : str, optional
            What the events call this tier; vLLM's is "GPU".
        """
        cdef int32_t most = <int32_t> as_int(capacity, "capacity", 1, 1 << 30)
        if not isinstance(seed, str):
            raise TypeError(f"seed: expected a str, got {type(seed).__name__}")
        if not self.prefix_caching:
            raise ValueError("enable_events: the cache was made without prefix_caching")
        self.prefixes.enable_events(most, seed, medium)
        self.changes += 1  # who adds a sequence just now needs its salt's extra keys

    def take_events(self):
        """The events since the last call, oldest first.

        Returns
        -------
        list of BlockStored, BlockRemoved or AllBlocksCleared
            As in `rocmforge.events`; empty where events are not enabled.
        """
        return self.prefixes.events.take() if self.prefixes.events is not None else []

    @property
    def lost_events(self):
        """Events that were dropped because nobody took them: a picture made of them is wrong."""
        return self.prefixes.events.lost if self.prefixes.events is not None else 0

    def stats(self):
        """What the cache holds and what it did so far, as `CacheStats`; O(num_blocks), when asked.
        """
        from rocmforge.manager_stats import collect
        return collect(self)

    def check_integrity(self):
        """Prove that page tables, block pools, block tables and the prefix index agree.

        Raises
        ------
        AssertionError
            With a sentence, if they do not.
        """
        from rocmforge.integrity import check_manager
        check_manager(self)

    def __reduce__(self):
        """Pickle the sequences, the blocks and the prefix cache; no batch, as those are of a step.

        The copy decides as the original would have gone on to. Its first batch's table delta has
        all entries of the block table.
        """
        from rocmforge.saved_state import dump
        return copyreg.__newobj__, (type(self),), (*dump(self), getattr(self, "__dict__", None))

    def __setstate__(self, state):
        from rocmforge.saved_state import restore
        numbers, arrays, attributes = state
        options = {name: numbers[name] for name in OPTIONS}
        groups = [LayerGroup(**group) for group in numbers["groups"]]
        SharedSequences.__init__(self, groups=groups, **options)
        restore(self, numbers, arrays)
        if attributes:
            self.__dict__.update(attributes)

    def __len__(self):
        return self.first.page_table.map.num_ids

    def __contains__(self, sequence_id):
        return self.first.page_table.find(sequence_id) != RF_NO_ROW

    def __repr__(self):
        return (f"{type(self).__name__}(num_blocks={self.num_blocks}, "
                f"block_size={self.block_size}, num_sequences={len(self)}, "
                f"num_free_blocks={self.num_free_blocks})")
