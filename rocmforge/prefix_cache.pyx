# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What the cached blocks of all groups hold: the prefix index, and the spaces of its salts."""

cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memset

from rocmforge._core cimport (
    RF_BLOCK_CACHED, RF_BLOCK_KEPT, RF_NO_BLOCK, RF_NO_NODE, RF_OK, rf_block,
    rf_block_pool, rf_block_pool_allocate, rf_block_pool_forget, rf_block_pool_take_evicted,
    rf_block_pool_unpin, rf_free, rf_prefix_index_add_root, rf_prefix_index_attach,
    rf_prefix_index_block, rf_prefix_index_detach, rf_prefix_index_drop_root, rf_prefix_index_free,
    rf_prefix_index_init, rf_prefix_index_order, rf_prefix_index_use, rf_prefix_index_walk,
    rf_realloc)
from rocmforge.cache_group cimport MAX_GROUPS, CacheGroup
from rocmforge.event_log cimport EventLog, extra_keys, new_event_log

import os

import numpy as np

cnp.import_array()


cdef object salt_key(object salt):
    """The key of a salt's space: bytes, or None for none."""
    if salt is None or type(salt) is bytes:
        return salt
    if isinstance(salt, str):
        return salt.encode()
    if isinstance(salt, (bytes, bytearray, memoryview)):
        return bytes(memoryview(salt))
    raise TypeError(f"salt: expected bytes or str, got {type(salt).__name__}")


@cython.final
cdef class PrefixCache:
    """The contents that the blocks of some groups hold, for `KVCacheManager`.

    A space of contents belongs to each salt, and one to no salt. What blocks are taken for new
    contents, and which old ones are forgotten for it, is decided by the groups' block pools; this
    class only follows.
    """

    def __init__(self):
        raise TypeError("a PrefixCache is made by its manager")

    def __dealloc__(self):
        rf_free(self.nodes)
        if self.is_ready:
            rf_prefix_index_free(&self.index)

    cdef int make_index(self) except -1:
        """Give the index its memory; it has no node yet."""
        cdef int32_t[MAX_GROUPS] sizes
        cdef int32_t g = 0
        cdef uint64_t seed = int.from_bytes(os.urandom(8), "little")
        cdef CacheGroup group
        if self.is_ready:  # urandom let another thread in
            return 0
        for group in self.groups:
            sizes[g] = group.allocator.pool.num_blocks
            g += 1
        if rf_prefix_index_init(&self.index, self.block_size, g, sizes, seed) != RF_OK:
            raise MemoryError("no memory for the prefix index")
        return 0

    cdef int require(self) except -1:
        """Make the index when it is first needed."""
        if self.is_ready:
            return 0
        self.make_index()
        if self.is_ready:
            return 0
        # The space of no salt is in use for ever. A new index has nodes, so that this cannot fail.
        self.unsalted = rf_prefix_index_add_root(&self.index)
        rf_prefix_index_use(&self.index, self.unsalted)
        self.salts[None] = self.unsalted
        self.is_ready = True
        return 0

    cdef int32_t find_root(self, object key) except -2:
        """The root of the space of a salt, by its `salt_key`; RF_NO_NODE where there is none."""
        found = self.salts.get(key)
        return RF_NO_NODE if found is None else found

    cdef object extra_of(self, object key):
        """What `root_of` takes for a new space: it makes objects, which `root_of` must not."""
        return None if self.events is None else extra_keys(key)

    cdef int32_t root_of(self, object key, object extra) except -2:
        """The root of a salt's space, which is made if need be; RF_NO_NODE where there is no room.
        """
        cdef int32_t root = self.find_root(key)
        if root == RF_NO_NODE:
            root = rf_prefix_index_add_root(&self.index)
            if root != RF_NO_NODE:
                self.salts[key] = root
                if self.events is not None:
                    self.events.add_root(root, extra)
        return root

    cdef int enable_events(self, int32_t capacity, str seed, object medium) except -1:
        """Begin a log, with what is cached already as stored just now."""
        cdef EventLog log
        cdef int32_t node, root, g, block, num_salts, i
        cdef cnp.ndarray order, place
        cdef int32_t *ordered
        cdef dict salts
        self.require()
        while True:
            salts = self.salts.copy()
            log = new_event_log(&self.index, capacity, seed, medium)
            order = np.empty(self.index.num_nodes, np.int32)
            place = np.empty(self.index.next_fresh, np.int32)
            for salt, root in salts.items():
                log.add_root(root, extra_keys(salt))
            # Making objects may have run other code. From here on none is made.
            if (salts == self.salts and cnp.PyArray_SIZE(order) == self.index.num_nodes
                    and cnp.PyArray_SIZE(place) == self.index.next_fresh):
                break
        ordered = <int32_t *> cnp.PyArray_DATA(order)
        num_salts = 0
        for root in salts.values():
            ordered[num_salts] = root
            num_salts += 1
        rf_prefix_index_order(&self.index, num_salts, ordered,
                              <int32_t *> cnp.PyArray_DATA(place))
        for i in range(num_salts, self.index.num_nodes):
            node = ordered[i]
            log.name(&self.index, node)
            for g in range(self.index.num_groups):
                block = rf_prefix_index_block(&self.index, node, g)
                if block != RF_NO_BLOCK:
                    log.stored(&self.index, g, node)
        self.events = log
        return 0

    cdef void named(self, int32_t node) noexcept:
        """A node was made, or found again."""
        if self.events is not None:
            self.events.name(&self.index, node)

    cdef void attach(self, int32_t node, int32_t group, int32_t block) noexcept:
        """Say that a block holds a node's content: it is worth keeping."""
        cdef CacheGroup owner = self.groups[group]
        rf_prefix_index_attach(&self.index, node, group, block)
        owner.allocator.pool.blocks[block].flags |= RF_BLOCK_CACHED
        if self.events is not None:
            self.events.stored(&self.index, group, node)

    cdef void detach(self, int32_t group, int32_t block) noexcept:
        if self.events is not None:
            self.events.removed(&self.index, group, block)
        rf_prefix_index_detach(&self.index, group, block)

    cdef int sweep_salts(self) except -1:
        """Drop the spaces that nothing uses, once there are twice as many as were left last time:
        so the work is O(1) for each new salt."""
        cdef int32_t root
        if len(self.salts) < self.salts_limit and (
                not self.is_ready or self.index.num_nodes < self.index.capacity):
            return 0
        for salt, root in self.salts.copy().items():
            # the copy may have let others in, who swept, too
            if self.find_root(salt) == root and self.index.nodes[root].uses == 0:
                del self.salts[salt]
                rf_prefix_index_drop_root(&self.index, root)
        self.salts_limit = max(64, 2 * len(self.salts))
        return 0

    cdef int reserve_nodes(self, int64_t n) except -1:
        """Room to note the nodes of n blocks."""
        cdef int32_t *nodes
        if n > self.nodes_capacity:
            nodes = <int32_t *> rf_realloc(self.nodes, n * sizeof(int32_t))
            if nodes == NULL:
                raise MemoryError(f"no memory for a match of {n} blocks")
            self.nodes = nodes
            self.nodes_capacity = n
        return 0

    cdef int64_t match(self, int32_t root, const int32_t *tokens, int64_t limit) noexcept:
        """Blocks of the longest cached prefix of at most `limit` blocks; its nodes in `nodes`.

        Groups without a window must have them all, the others those of the last window.
        """
        cdef int32_t[MAX_GROUPS] run  # blocks in a row that the group has, up to here
        cdef int64_t i, best = 0
        cdef int32_t g, walked
        cdef bint hit
        cdef CacheGroup group
        memset(run, 0, sizeof(run))
        walked = rf_prefix_index_walk(&self.index, root, tokens, <int32_t> limit, self.nodes)
        if self.index.num_groups == 1 and (<CacheGroup> self.groups[0]).window == 0:
            while best < walked and rf_prefix_index_block(
                    &self.index, self.nodes[best], 0) != RF_NO_BLOCK:
                best += 1
            return best
        for i in range(walked):
            hit = True
            g = 0
            for group in self.groups:
                if rf_prefix_index_block(&self.index, self.nodes[i], g) != RF_NO_BLOCK:
                    run[g] += 1
                else:
                    if group.window == 0:
                        return best
                    run[g] = 0
                hit &= run[g] >= i + 1 - group.first_needed((i + 1) * self.block_size)
                g += 1
            if hit:
                best = i + 1
        return best

    cdef int32_t block(self, int64_t i, int32_t g) noexcept:
        """The block of a group that holds the content of the i-th node matched, or RF_NO_BLOCK."""
        return rf_prefix_index_block(&self.index, self.nodes[i], g)

    cdef void unlink_block(self, int32_t group, int32_t block) noexcept:
        """Take a block out of the prefix index; it is no longer worth keeping."""
        cdef CacheGroup owner = self.groups[group]
        self.detach(group, block)
        owner.allocator.pool.blocks[block].flags &= ~RF_BLOCK_CACHED

    cdef void take(self, int32_t g, int32_t n, int32_t *ids) noexcept:
        """Allocate blocks that are known to be there, and forget what the evicted ones held."""
        cdef CacheGroup group = self.groups[g]
        cdef rf_block_pool *pool = &group.allocator.pool
        cdef int32_t i
        rf_block_pool_allocate(pool, n, ids)
        if pool.num_evicted:
            for i in range(pool.num_evicted):
                self.detach(g, pool.evicted[i])
            rf_block_pool_take_evicted(pool, pool.evicted)

    cdef int64_t forget_all(self) noexcept:
        """Take all blocks out of the index, make the kept ones free, and take pins off.

        Returns the number of blocks that were in it.
        """
        cdef int32_t g = 0, block
        cdef int64_t count = 0
        cdef rf_block *b
        cdef CacheGroup group
        self.resets += 1
        for group in self.groups:
            for block in range(group.allocator.pool.num_blocks):
                b = &group.allocator.pool.blocks[block]
                if not b.flags & RF_BLOCK_CACHED:
                    continue
                count += 1
                while b.pins:
                    rf_block_pool_unpin(&group.allocator.pool, block)
                rf_prefix_index_detach(&self.index, g, block)
                b.flags &= ~RF_BLOCK_CACHED
                if b.flags & RF_BLOCK_KEPT:
                    rf_block_pool_forget(&group.allocator.pool, block)
            g += 1
        if self.events is not None:
            self.events.cleared()
        return count


cdef PrefixCache new_prefix_cache(tuple groups, int block_size):
    """An empty one over the blocks of these groups; it takes its memory when it is first needed."""
    cdef PrefixCache cache = PrefixCache.__new__(PrefixCache)
    cache.groups = groups
    cache.block_size = block_size
    cache.salts = {}
    cache.salts_limit = 64
    return cache
