# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Counting what a `KVCacheManager` holds: everything is found out when somebody asks."""

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t

from rocmforge._core cimport RF_BLOCK_KEPT, rf_block_pool, rf_block_pool_num_available
from rocmforge.cache_group cimport CacheGroup
from rocmforge.shared_sequences cimport SharedSequences

import numpy as np

from rocmforge.stats import CacheStats, Distribution

cnp.import_array()


cdef int64_t num_kept(SharedSequences manager) noexcept:
    cdef int64_t total = 0
    cdef CacheGroup group
    for group in manager.groups:
        total += group.allocator.pool.num_kept
    return total


def collect(SharedSequences manager not None):
    """The `CacheStats` of a manager; O(num_blocks)."""
    cdef int32_t row, block
    cdef int64_t total = 0, used = 0, cached = -1, pinned = 0, shared = 0, references = 0
    cdef int64_t tokens = 0, slots = 0, evictions = 0, i = 0
    cdef rf_block_pool *pool
    cdef CacheGroup group
    cdef cnp.ndarray lengths = None, ages
    # Made before anything is counted: objects that are made may run other code, which may change
    # the cache.
    while cached != num_kept(manager) or len(lengths) != manager.first.page_table.map.num_ids:
        cached = num_kept(manager)
        lengths = np.empty(manager.first.page_table.map.num_ids, np.int64)
        ages = np.empty(cached, np.int64)
    cdef int64_t *length = <int64_t *> cnp.PyArray_DATA(lengths)
    cdef int64_t *age = <int64_t *> cnp.PyArray_DATA(ages)
    for group in manager.groups:
        pool = &group.allocator.pool
        total += pool.num_blocks
        used += pool.num_blocks - rf_block_pool_num_available(pool)
        pinned += pool.num_pinned
        evictions += pool.total_evictions
        for block in range(pool.next_fresh):
            if pool.blocks[block].flags & RF_BLOCK_KEPT:
                age[i] = pool.clock - pool.blocks[block].last_use
                i += 1
            shared += pool.blocks[block].ref_count > 1
            references += pool.blocks[block].ref_count - pool.blocks[block].pins
    i = 0
    for row in range(manager.first.page_table.map.num_rows):
        if not manager.sequences[row].version:
            continue  # no sequence has this row
        length[i] = manager.sequences[row].length
        i += 1
        tokens += manager.sequences[row].length
        slots += (manager.sequences[row].length + manager.block_size - 1) // manager.block_size
    return CacheStats(
        block_size=manager.block_size, num_blocks=total, used_blocks=used,
        free_blocks=total - used, cached_blocks=cached, pinned_blocks=pinned,
        shared_blocks=shared, references=references,
        num_sequences=i,
        num_tokens=tokens, num_slots=slots * manager.block_size,
        prompt_tokens=manager.prompt_tokens, hit_tokens=manager.hit_tokens, evictions=evictions,
        copied_blocks=manager.copied_blocks, sequence_lengths=Distribution.of(lengths),
        cached_block_ages=Distribution.of(ages))
