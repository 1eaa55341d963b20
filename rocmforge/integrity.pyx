# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What must hold between the parts of a `KVCacheManager`; for tests and bug reports."""

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t

from rocmforge._core cimport (
    RF_BLOCK_CACHED, RF_BLOCK_KEPT, RF_NO_BLOCK, RF_NO_NODE, RF_OK, rf_block,
    rf_prefix_index_node, rf_prefix_index_validate)
from rocmforge.cache_group cimport MAX_GROUPS, CacheGroup
from rocmforge.page_table cimport BlockList
from rocmforge.shared_sequences cimport Sequence, SharedSequences

import numpy as np

cnp.import_array()


def check_manager(SharedSequences manager not None):
    """Raise AssertionError with a sentence where two parts of a manager disagree."""
    cdef int32_t g
    uses = {}  # of the prefix index's nodes
    expected = list(manager.first.page_table._items())
    for g in range(len(manager.groups)):
        check_group(manager, g, expected, uses)
    for sequence_id, row in expected:
        check_sequence(manager, sequence_id, row, uses)
    if manager.prefixes.is_ready:
        check_index(manager, uses)


cdef check_group(SharedSequences manager, int32_t g, list expected, dict uses):
    """Blocks, page table and block table of one group."""
    cdef CacheGroup group = manager.groups[g]
    cdef const int32_t *table = <const int32_t *> cnp.PyArray_DATA(group.table)
    cdef int64_t columns = cnp.PyArray_DIM(group.table, 1)
    cdef int32_t row, i, block, node, shown
    cdef BlockList *blocks
    cdef Sequence *sequence
    cdef rf_block *b
    group.page_table.check_integrity()
    group.allocator.check_integrity()
    if group.page_table._items() != expected:
        raise AssertionError(f"group {g} has other sequences or rows than the first")
    holders = np.zeros(group.allocator.pool.num_blocks, np.int32)
    for sequence_id, row in expected:
        blocks = &group.page_table.lists[row]
        sequence = &manager.sequences[row]
        if blocks.num != (sequence.length + manager.block_size - 1) // manager.block_size:
            raise AssertionError(f"sequence {sequence_id}: {sequence.length} tokens in "
                                 f"{blocks.num} blocks")
        for i in range(blocks.num):
            block = blocks.ids[i]
            if block != RF_NO_BLOCK:
                holders[block] += 1
            elif i >= group.first_needed(sequence.committed):
                raise AssertionError(f"sequence {sequence_id}: block {i} is missing")
            if block == RF_NO_BLOCK:
                continue  # the table may still show what was released
            shown = block * group.ratio
            if i < group.changed[row] and table[row * columns + i * group.ratio] != shown:
                raise AssertionError(f"sequence {sequence_id}: the block table differs at {i}")
    for block in range(group.allocator.pool.num_blocks):
        b = &group.allocator.pool.blocks[block]
        if b.ref_count != holders[block] + b.pins:
            raise AssertionError(f"block {block}: {holders[block]} holders and {b.pins} pins, "
                                 f"reference count {b.ref_count}")
        node = RF_NO_NODE
        if manager.prefixes.is_ready:
            node = rf_prefix_index_node(&manager.prefixes.index, g, block)
            if node != RF_NO_NODE:
                uses[node] = uses.get(node, 0) + 1
        if (node != RF_NO_NODE) != (b.flags & RF_BLOCK_CACHED != 0):
            raise AssertionError(f"block {block}: its flag and the prefix index disagree")
        if b.flags & RF_BLOCK_KEPT and node == RF_NO_NODE:
            raise AssertionError(f"block {block} is kept for nothing")


cdef check_sequence(SharedSequences manager, object sequence_id, int32_t row, dict uses):
    """Counts of tokens of one sequence."""
    cdef Sequence *sequence = &manager.sequences[row]
    if not 0 <= sequence.committed <= sequence.length:
        raise AssertionError(f"sequence {sequence_id}: {sequence.committed} committed of "
                             f"{sequence.length} tokens")
    if sequence.num_known > sequence.capacity:
        raise AssertionError(f"sequence {sequence_id}: more tokens known than stored")
    if sequence.chained * <int64_t> manager.block_size > sequence.committed:
        raise AssertionError(f"sequence {sequence_id}: published before committed")
    if sequence.chain >= 0:
        uses[sequence.chain] = uses.get(sequence.chain, 0) + 1


cdef check_index(SharedSequences manager, dict uses):
    """The prefix index, and that each node is used by those counted, and by its children."""
    cdef int32_t[MAX_GROUPS] sizes
    cdef int32_t g, node, parent
    cdef const char *reason
    for g in range(len(manager.groups)):
        sizes[g] = (<CacheGroup> manager.groups[g]).allocator.pool.num_blocks
    if rf_prefix_index_validate(&manager.prefixes.index, sizes, &reason) != RF_OK:
        raise AssertionError(reason.decode())
    roots = set(manager.prefixes.salts.values())
    uses[manager.prefixes.unsalted] = uses.get(manager.prefixes.unsalted, 0) + 1
    for node in range(manager.prefixes.index.next_fresh):
        if manager.prefixes.index.nodes[node].uses and node not in roots:
            parent = manager.prefixes.index.nodes[node].parent
            uses[parent] = uses.get(parent, 0) + 1
    for node in range(manager.prefixes.index.next_fresh):
        if manager.prefixes.index.nodes[node].uses != uses.get(node, 0):
            raise AssertionError(f"node {node}: {uses.get(node, 0)} uses, counted "
                                 f"{manager.prefixes.index.nodes[node].uses}")
