# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Sequences whose keys and values come from elsewhere: host memory, a disk, another machine.

`place` takes all blocks that such a sequence needs, or none. Nothing is published before `publish`
says that they are filled: who gives up in between frees the sequence, and no trace is left.
"""

cimport numpy as cnp
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint64_t
from libc.string cimport memcpy

from rocmforge._core cimport (
    RF_NO_BLOCK, RF_NO_NODE, RF_NO_ROW, RF_NUM_PRIORITIES, RF_OK, as_int, as_sequence_id, as_tokens,
    rf_alloc, rf_block_pool_hold, rf_block_pool_num_available, rf_id_map_find, rf_prefix_index_use)
from rocmforge.cache_group cimport CacheGroup
from rocmforge.page_table cimport BlockList
from rocmforge.prefix_cache cimport salt_key
from rocmforge.shared_sequences cimport Sequence, SharedSequences

import numpy as np

from rocmforge.errors import OutOfBlocksError

cnp.import_array()


def describe(SharedSequences manager not None, sequence_id):
    """All that `place` needs to know of a sequence, and its blocks in each group."""
    cdef int32_t row
    cdef Sequence sequence
    cdef cnp.npy_intp n
    cdef cnp.ndarray tokens
    cdef CacheGroup group
    cdef uint64_t changes
    while True:
        changes = manager.changes
        row = manager.require(sequence_id)
        sequence = manager.sequences[row]
        n = sequence.num_known
        tokens = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_INT32)
        if n:
            memcpy(cnp.PyArray_DATA(tokens), sequence.tokens, n * sizeof(int32_t))
        found = {
            "length": sequence.length, "committed": sequence.committed,
            "priority": sequence.priority, "started": bool(sequence.started),
            "shares": sequence.root != RF_NO_NODE, "resets": manager.prefixes.resets,
            "token_ids": tokens, "salt": None,
            "blocks": [group.page_table.copy_ids(row) for group in manager.groups],
        }
        for salt, node in manager.prefixes.salts.copy().items():
            if node == sequence.root:
                found["salt"] = salt
        if changes == manager.changes:  # else objects that were made let others in
            return found


def place(SharedSequences manager not None, sequence_id, token_ids, salt, priority, length,
          committed, list firsts, bint shares, bint started):
    """Add a sequence with blocks for `length` tokens, sharing those of its prefix that are cached.

    Parameters
    ----------
    firsts : list of int
        For each group the first block that is needed; those before were passed by its window.
    shares : bool
        Whether its blocks may be found by others, and others' by it.

    Returns
    -------
    tuple of (int, list of numpy.ndarray, int)
        Blocks found, which are filled; the blocks of each group; and the number by which `publish`
        knows that nobody has changed the sequence since.

    Raises
    ------
    OutOfBlocksError, ValueError
        And then nothing has changed.
    """
    cdef uint64_t key = as_sequence_id(sequence_id), changes
    cdef cnp.ndarray tokens = as_tokens(token_ids, "token_ids")
    cdef const int32_t *data = <const int32_t *> cnp.PyArray_DATA(tokens)
    cdef int64_t n = cnp.PyArray_SIZE(tokens), found = 0, available, needed, i
    cdef int64_t limit = INT32_MAX if manager.max_seq_len is None else manager.max_seq_len
    cdef int64_t end = as_int(length, "length", 0, limit)
    cdef int64_t written = as_int(committed, "committed", 0, end)
    cdef int32_t level = <int32_t> as_int(priority, "priority", 0, RF_NUM_PRIORITIES - 1)
    cdef int32_t blocks = <int32_t> ((end + manager.block_size - 1) // manager.block_size)
    cdef int32_t row, root = RF_NO_NODE, block, g
    cdef int32_t *known = NULL
    cdef int32_t *ids
    cdef bint failed = False
    cdef CacheGroup group
    cdef BlockList *taken
    cdef Sequence *sequence
    if n > limit:
        raise ValueError(f"token_ids: {n} tokens, max_seq_len is {limit}")
    if len(firsts) != len(manager.groups):
        raise ValueError(f"firsts: expected {len(manager.groups)} of them, got {len(firsts)}")
    for g in range(len(firsts)):
        group = manager.groups[g]
        as_int(firsts[g], "firsts", 0, group.first_needed(written))
    salt, extra = salt_key(salt), None
    shares &= manager.prefix_caching
    while True:
        changes = manager.changes
        if rf_id_map_find(&manager.first.page_table.map, key) != RF_NO_ROW:
            raise ValueError(f"sequence_id: sequence {key} is in the cache already")
        manager.prefixes.sweep_salts()
        if shares:
            manager.prefixes.require()
            manager.prefixes.reserve_nodes(n // manager.block_size)
            extra = manager.prefixes.extra_of(salt)
        manager.reserve_sequence()
        lists = [np.empty(blocks, np.int32) for _ in manager.groups]
        for group in manager.groups:
            group.grow_table(0, blocks)
        if changes == manager.changes:  # else another thread took the room meanwhile
            break
    # From here on no Python code runs, as in `add_sequence`.
    if shares:
        root = manager.prefixes.root_of(salt, extra)
        if root >= 0:
            found = manager.prefixes.match(root, data, min(written, n) // manager.block_size)
    for g in range(len(firsts)):
        group = manager.groups[g]
        needed = max(0, blocks - max(found, <int64_t> firsts[g]))
        available = rf_block_pool_num_available(&group.allocator.pool)
        if not started:
            available -= manager.watermark
        for i in range(group.first_needed(found * manager.block_size), found):
            available -= group.allocator.pool.blocks[manager.prefixes.block(i, g)].ref_count == 0
        if needed > max(0, available):
            raise OutOfBlocksError(needed, max(0, available))
    if n:
        known = <int32_t *> rf_alloc(n * sizeof(int32_t))
        if known == NULL:
            raise MemoryError(f"no memory for {n} tokens")
        memcpy(known, data, n * sizeof(int32_t))
    row = manager.add_row(key)
    sequence = &manager.sequences[row]
    sequence.tokens = known
    sequence.num_known = sequence.capacity = n
    sequence.priority = level
    sequence.started = started
    for group in manager.groups:
        failed |= group.page_table.reserve_blocks(row, blocks) != RF_OK
    if failed:
        manager.drop_row(key, row)
        raise MemoryError(f"no memory for {blocks} blocks of the page table")
    sequence.length = end
    sequence.committed = written
    sequence.root = sequence.chain = root
    if root >= 0:
        if found:
            sequence.chain = manager.prefixes.nodes[found - 1]
        sequence.chained = <int32_t> found
        rf_prefix_index_use(&manager.prefixes.index, sequence.chain)
    for g in range(len(firsts)):
        group = manager.groups[g]
        for i in range(blocks):
            block = RF_NO_BLOCK
            if group.first_needed(found * manager.block_size) <= i < found:
                block = manager.prefixes.block(i, g)
                rf_block_pool_hold(&group.allocator.pool, block)
            group.page_table.push_blocks(row, &block, 1)
        taken = &group.page_table.lists[row]
        i = max(found, <int64_t> firsts[g])
        if i < blocks:
            manager.prefixes.take(g, <int32_t> (blocks - i), taken.ids + i)
        group.mark(row, 0)
        ids = <int32_t *> cnp.PyArray_DATA(<cnp.ndarray> lists[g])
        if blocks:
            memcpy(ids, taken.ids, blocks * sizeof(int32_t))
    manager.changes += 1
    return found, lists, sequence.version


def num_resets(SharedSequences manager not None):
    """How often the prefix cache was reset."""
    return manager.prefixes.resets


def is_placed(SharedSequences manager not None, sequence_id, version):
    """Whether the sequence is there and its blocks are those that `place` gave."""
    cdef int32_t row = rf_id_map_find(&manager.first.page_table.map, as_sequence_id(sequence_id))
    return row != RF_NO_ROW and manager.sequences[row].version == <uint64_t> version


def publish(SharedSequences manager not None, sequence_id, version):
    """Say that the blocks of a placed sequence are filled: others find them from now on.

    Raises
    ------
    ValueError
        If the sequence was freed or truncated since.
    """
    cdef int32_t row
    if not is_placed(manager, sequence_id, version):
        raise ValueError(f"sequence_id: sequence {sequence_id} was freed or truncated meanwhile")
    row = manager.require(sequence_id)
    manager.publish(row)
    if manager.has_windows:
        manager.release_window(row)
    manager.changes += 1
