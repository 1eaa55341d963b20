# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The whole state of a manager as plain arrays, and back: what pickles and snapshots hold.

What comes back is not trusted. Every number is checked before it is used as an index, so that no
file, however it was made, can do more than be refused.
"""

cimport numpy as cnp
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy, memset

from rocmforge._core cimport (
    RF_BLOCK_CACHED, RF_BLOCK_KEPT, RF_NO_BLOCK, RF_NO_NODE, RF_NO_ROW, RF_NUM_PRIORITIES, RF_OK,
    rf_alloc, rf_block, rf_block_pool, rf_id_map_find, rf_prefix_index_block,
    rf_prefix_index_node, rf_prefix_index_order, rf_saved_nodes, rf_saved_nodes_restore,
    rf_saved_pool, rf_saved_pool_fill, rf_saved_pool_measure, rf_saved_pool_restore)
from rocmforge.block_allocator cimport BlockAllocator
from rocmforge.cache_group cimport MAX_GROUPS, CacheGroup
from rocmforge.page_table cimport BlockList, PageTable
from rocmforge.shared_sequences cimport ROOT_UNSET, Sequence, SharedSequences

import numpy as np

from rocmforge.errors import SnapshotError

cnp.import_array()

cdef dict POOL_ARRAYS = {
    "ref_counts": np.int32, "priorities": np.uint8, "pins": np.uint16, "last_uses": np.uint64,
    "free_ids": np.int32, "kept": np.int32, "evicted": np.int32,
}
cdef dict SEQUENCE_ARRAYS = {
    "ids": np.uint64, "rows": np.int32, "lengths": np.int64, "committed": np.int64,
    "num_known": np.int64, "roots": np.int32, "chains": np.int32, "priorities": np.uint8,
    "started": np.uint8,
}


cdef void *data(object arrays, str name) except NULL:
    return cnp.PyArray_DATA(<cnp.ndarray> arrays[name])


cdef cnp.ndarray checked(object arrays, str name, object dtype, object shape):
    """An array that was saved, if it has the type and shape that it must have; None is any size."""
    array = arrays.get(name)
    if not isinstance(array, np.ndarray):
        raise SnapshotError(f"{name}: it is missing")
    if array.dtype != dtype:
        raise SnapshotError(f"{name}: expected {np.dtype(dtype).name}, got {array.dtype.name}")
    if array.ndim != len(shape) or False in [
            n is None or n == m for n, m in zip(shape, array.shape)]:
        raise SnapshotError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.size > INT32_MAX:
        raise SnapshotError(f"{name}: more than 2**31 - 1 elements")
    return np.require(array, None, "CA")


cdef object number(object numbers, str name, int64_t low=0, int64_t high=0x7fffffffffffffff):
    """A saved integer, if it is one of the range."""
    value = numbers.get(name)
    if type(value) is not int or not low <= value <= high:
        raise SnapshotError(f"{name}: expected {low} .. {high}, got {value!r}")
    return value


# ---- a pool of blocks ----

cdef int point(rf_saved_pool *saved, object arrays, str prefix) except -1:
    """Let the C struct's pointers lead to the arrays."""
    saved.ref_counts = <int32_t *> data(arrays, prefix + "ref_counts")
    saved.priorities = <uint8_t *> data(arrays, prefix + "priorities")
    saved.pins = <uint16_t *> data(arrays, prefix + "pins")
    saved.last_uses = <uint64_t *> data(arrays, prefix + "last_uses")
    saved.free_ids = <int32_t *> data(arrays, prefix + "free_ids")
    saved.kept = <int32_t *> data(arrays, prefix + "kept")
    saved.evicted = <int32_t *> data(arrays, prefix + "evicted")
    return 0


cdef int make_pool_arrays(const rf_saved_pool *saved, dict arrays, str prefix) except -1:
    """Empty arrays of the sizes that were measured."""
    sizes = {"free_ids": saved.num_free, "kept": saved.num_kept, "evicted": saved.num_evicted}
    for name, dtype in POOL_ARRAYS.items():
        arrays[prefix + name] = np.empty(sizes.get(name, saved.num_touched), dtype)
    return 0


cdef int restore_pool(rf_block_pool *pool, object arrays, str prefix, uint64_t clock,
                      uint64_t total_evictions) except -1:
    cdef rf_saved_pool saved
    cdef const char *reason
    memset(&saved, 0, sizeof(saved))
    found = {prefix + name: checked(arrays, prefix + name, dtype, (None,))
             for name, dtype in POOL_ARRAYS.items()}
    for name in ("priorities", "pins", "last_uses"):
        checked(found, prefix + name, POOL_ARRAYS[name], (len(found[prefix + "ref_counts"]),))
    point(&saved, found, prefix)
    saved.num_touched = <int32_t> len(found[prefix + "ref_counts"])
    saved.num_free = <int32_t> len(found[prefix + "free_ids"])
    saved.num_kept = <int32_t> len(found[prefix + "kept"])
    saved.num_evicted = <int32_t> len(found[prefix + "evicted"])
    saved.clock = clock
    saved.total_evictions = total_evictions
    if rf_saved_pool_restore(&saved, pool, &reason) != RF_OK:
        raise SnapshotError(f"{prefix or 'pool'}: {reason.decode()}")
    return 0


def dump_allocator(BlockAllocator allocator not None):
    """What `load_allocator` takes."""
    cdef rf_saved_pool saved, measured
    arrays = {}
    while True:
        rf_saved_pool_measure(&measured, &allocator.pool)
        make_pool_arrays(&measured, arrays, "")
        rf_saved_pool_measure(&saved, &allocator.pool)
        # Making the arrays may have let others in. From here on nothing does.
        if (measured.num_touched == saved.num_touched and measured.num_free == saved.num_free
                and measured.num_kept == saved.num_kept
                and measured.num_evicted == saved.num_evicted):
            break
    point(&saved, arrays, "")
    rf_saved_pool_fill(&saved, &allocator.pool)
    return allocator.pool.num_blocks, saved.clock, saved.total_evictions, arrays


def load_allocator(num_blocks, clock, total_evictions, arrays):
    """The allocator that was dumped."""
    cdef BlockAllocator allocator = BlockAllocator(num_blocks)
    numbers = {"clock": clock, "total_evictions": total_evictions}
    restore_pool(&allocator.pool, arrays, "", number(numbers, "clock"),
                 number(numbers, "total_evictions"))
    return allocator


# ---- a page table ----

def dump_page_table(PageTable table not None):
    """What `load_page_table` takes."""
    cdef int64_t num_blocks = 0, i = 0
    cdef int32_t row
    cdef BlockList *blocks
    cdef cnp.ndarray ids, counts, flat
    while True:
        num_blocks = 0
        for row in range(table.map.num_rows):
            num_blocks += table.lists[row].num
        ids, counts = np.empty(table.map.num_ids, np.uint64), np.empty(table.map.num_ids, np.int64)
        flat = np.empty(num_blocks, np.int32)
        # making the arrays may have let others in
        for row in range(table.map.num_rows):
            num_blocks -= table.lists[row].num
        if num_blocks == 0 and len(ids) == len(counts) == table.map.num_ids:
            break
    for row in range(table.map.num_rows):
        if table.has_sequence(row):
            blocks = &table.lists[row]
            (<uint64_t *> cnp.PyArray_DATA(ids))[i] = table.map.ids[row]
            (<int64_t *> cnp.PyArray_DATA(counts))[i] = blocks.num
            if blocks.num:
                memcpy(<int32_t *> cnp.PyArray_DATA(flat) + num_blocks, blocks.ids,
                       blocks.num * sizeof(int32_t))
            num_blocks += blocks.num
            i += 1
    return table.block_size, ids, counts, flat


def load_page_table(block_size, ids, counts, blocks):
    """The page table that was dumped; it is writable."""
    cdef PageTable table = PageTable(block_size)
    cdef int64_t i, n, begin = 0
    arrays = {"ids": ids, "counts": counts, "blocks": blocks}
    cdef cnp.ndarray keys = checked(arrays, "ids", np.uint64, (None,))
    cdef cnp.ndarray numbers = checked(arrays, "counts", np.int64, (len(keys),))
    cdef cnp.ndarray flat = checked(arrays, "blocks", np.int32, (None,))
    if len(flat) and flat.min() < RF_NO_BLOCK:
        raise SnapshotError("blocks: a negative block id")
    for i in range(len(keys)):
        n = (<int64_t *> cnp.PyArray_DATA(numbers))[i]
        if n < 0 or n > len(flat) - begin:
            raise SnapshotError("counts: they differ from the number of blocks")
        if rf_id_map_find(&table.map, (<uint64_t *> cnp.PyArray_DATA(keys))[i]) != RF_NO_ROW:
            raise SnapshotError("ids: a sequence twice")
        table.append((<uint64_t *> cnp.PyArray_DATA(keys))[i],
                     <int32_t *> cnp.PyArray_DATA(flat) + begin, <int32_t> n)
        begin += n
    if begin != len(flat):
        raise SnapshotError("counts: they differ from the number of blocks")
    return table


# ---- a manager ----

def dump(SharedSequences manager not None):
    """The state at one moment, as numbers that JSON can hold, and arrays by name."""
    cdef uint64_t changes
    while True:
        changes = manager.changes
        arrays = {}
        known = manager.prefixes.salts.copy()
        salts = list(known.items())
        make_arrays(manager, arrays)
        numbers = make_numbers(manager, salts)
        # Making objects may let other threads in, or run a finalizer that frees a sequence. From
        # here on no object is made that the garbage collector counts, so nobody comes in between.
        if changes == manager.changes and known == manager.prefixes.salts:
            break
    for g in range(len(manager.groups)):
        fill_group(manager, g, arrays, f"group{g}.")
    fill_nodes(manager, arrays, salts)
    fill_sequences(manager, arrays)
    del arrays["order"], arrays["place"]
    return numbers, arrays


cdef dict make_numbers(SharedSequences manager, list salts):
    return {
        "block_size": manager.block_size,
        "kernel_block_size": manager.kernel_block_size,
        "max_sequences": manager.max_sequences,
        "max_seq_len": manager.max_seq_len,
        "prefix_caching": bool(manager.prefix_caching),
        "watermark": manager.watermark,
        "max_pinned_blocks": manager.max_pinned_blocks,
        "groups": [
            {"num_blocks": group.allocator.num_blocks, "window": group.window or None}
            for group in manager.groups],
        "clocks": [(<CacheGroup> group).allocator.pool.clock for group in manager.groups],
        "total_evictions": [
            (<CacheGroup> group).allocator.pool.total_evictions for group in manager.groups],
        "salts": [None if salt is None else salt.hex() for salt, _ in salts],
        "prompt_tokens": manager.prompt_tokens,
        "hit_tokens": manager.hit_tokens,
        "copied_blocks": manager.copied_blocks,
    }


cdef int make_arrays(SharedSequences manager, dict arrays) except -1:
    cdef CacheGroup group
    cdef rf_saved_pool saved
    cdef int64_t listed, known = 0, num_nodes = 0, num_fresh = 0
    cdef int32_t row, num_rows = manager.first.page_table.map.num_rows
    cdef int32_t num_ids = manager.first.page_table.map.num_ids
    for g, group in enumerate(manager.groups):
        rf_saved_pool_measure(&saved, &group.allocator.pool)
        make_pool_arrays(&saved, arrays, f"group{g}.")
        listed = 0
        for row in range(num_rows):
            listed += group.page_table.lists[row].num
        arrays[f"group{g}.lists"] = np.empty(listed, np.int32)
    if manager.prefixes.is_ready:
        num_nodes = manager.prefixes.index.num_nodes
        num_fresh = manager.prefixes.index.next_fresh
    arrays["nodes.parents"] = np.empty(num_nodes, np.int32)
    arrays["nodes.tokens"] = np.empty((num_nodes, manager.block_size), np.int32)
    arrays["nodes.blocks"] = np.empty((num_nodes, len(manager.groups)), np.int32)
    arrays["order"] = np.empty(num_nodes, np.int32)
    arrays["place"] = np.empty(num_fresh, np.int32)
    for row in range(num_rows):
        known += manager.sequences[row].num_known
    for name, dtype in SEQUENCE_ARRAYS.items():
        arrays["sequences." + name] = np.empty(num_ids, dtype)
    arrays["sequences.tokens"] = np.empty(known, np.int32)
    arrays["free_rows"] = np.empty(num_rows - num_ids, np.int32)
    return 0


cdef int fill_group(SharedSequences manager, Py_ssize_t g, dict arrays, str prefix) except -1:
    cdef CacheGroup group = manager.groups[g]
    cdef rf_saved_pool saved
    cdef int32_t *lists = <int32_t *> data(arrays, prefix + "lists")
    cdef int32_t row
    cdef BlockList *blocks
    rf_saved_pool_measure(&saved, &group.allocator.pool)
    point(&saved, arrays, prefix)
    rf_saved_pool_fill(&saved, &group.allocator.pool)
    for row in range(group.page_table.map.num_rows):
        blocks = &group.page_table.lists[row]
        if blocks.num:
            memcpy(lists, blocks.ids, blocks.num * sizeof(int32_t))
            lists += blocks.num
    return 0


cdef int fill_nodes(SharedSequences manager, dict arrays, list salts) except -1:
    """The index's nodes, the salts' roots first; `place` tells afterwards where a node is."""
    cdef int32_t *order = <int32_t *> data(arrays, "order")
    cdef int32_t *place = <int32_t *> data(arrays, "place")
    cdef int32_t *parents = <int32_t *> data(arrays, "nodes.parents")
    cdef int32_t *tokens = <int32_t *> data(arrays, "nodes.tokens")
    cdef int32_t *blocks = <int32_t *> data(arrays, "nodes.blocks")
    cdef int64_t i, size = manager.block_size
    cdef int32_t g, node, num_groups = <int32_t> len(manager.groups)
    if not manager.prefixes.is_ready:
        return 0
    for i in range(len(salts)):
        order[i] = salts[i][1]
    rf_prefix_index_order(&manager.prefixes.index, <int32_t> len(salts), order, place)
    for i in range(manager.prefixes.index.num_nodes):
        node = order[i]
        for g in range(num_groups):
            blocks[i * num_groups + g] = rf_prefix_index_block(&manager.prefixes.index, node, g)
        if i < len(salts):
            parents[i] = RF_NO_NODE
            memset(tokens + i * size, 0, size * sizeof(int32_t))
        else:
            parents[i] = place[manager.prefixes.index.nodes[node].parent]
            memcpy(tokens + i * size, manager.prefixes.index.tokens + node * size,
                   size * sizeof(int32_t))
    return 0


cdef int fill_sequences(SharedSequences manager, dict arrays) except -1:
    cdef int32_t *place = <int32_t *> data(arrays, "place")
    cdef uint64_t *ids = <uint64_t *> data(arrays, "sequences.ids")
    cdef int32_t *rows = <int32_t *> data(arrays, "sequences.rows")
    cdef int64_t *lengths = <int64_t *> data(arrays, "sequences.lengths")
    cdef int64_t *committed = <int64_t *> data(arrays, "sequences.committed")
    cdef int64_t *num_known = <int64_t *> data(arrays, "sequences.num_known")
    cdef int32_t *roots = <int32_t *> data(arrays, "sequences.roots")
    cdef int32_t *chains = <int32_t *> data(arrays, "sequences.chains")
    cdef uint8_t *priorities = <uint8_t *> data(arrays, "sequences.priorities")
    cdef uint8_t *started = <uint8_t *> data(arrays, "sequences.started")
    cdef int32_t *tokens = <int32_t *> data(arrays, "sequences.tokens")
    cdef int32_t *free_rows = <int32_t *> data(arrays, "free_rows")
    cdef int32_t row, i = 0
    cdef Sequence *sequence
    for row in range(manager.first.page_table.map.num_rows):
        sequence = &manager.sequences[row]
        if not sequence.version:
            continue  # a free row
        ids[i] = manager.first.page_table.map.ids[row]
        rows[i] = row
        lengths[i] = sequence.length
        committed[i] = sequence.committed
        num_known[i] = sequence.num_known
        roots[i] = place[sequence.root] if sequence.root >= 0 else sequence.root
        chains[i] = place[sequence.chain] if sequence.chain >= 0 else sequence.chain
        priorities[i] = <uint8_t> sequence.priority
        started[i] = sequence.started
        if sequence.num_known:
            memcpy(tokens, sequence.tokens, sequence.num_known * sizeof(int32_t))
            tokens += sequence.num_known
        i += 1
    row = manager.first.page_table.map.free_row
    i = 0
    while row != RF_NO_ROW:
        free_rows[i] = row
        row = <int32_t> <int64_t> manager.first.page_table.map.ids[row]
        i += 1
    return 0


def restore(SharedSequences manager not None, numbers, arrays):
    """Bring a new manager to a state that was dumped.

    Its pools may be larger than they were. After an error the manager must be thrown away.
    """
    cdef CacheGroup group
    cdef int32_t g
    if manager.changes or manager.prefixes.is_ready:
        raise ValueError("restore: expected a manager that was never used")
    if number(numbers, "block_size") != manager.block_size:
        raise SnapshotError(f"block_size: {numbers['block_size']} when it was saved, "
                            f"{manager.block_size} now")
    clocks, evictions = numbers.get("clocks"), numbers.get("total_evictions")
    if not type(clocks) is type(evictions) is list or not (
            len(clocks) == len(evictions) == len(manager.groups)):
        raise SnapshotError(f"groups: expected {len(manager.groups)} of them")
    manager.prompt_tokens = number(numbers, "prompt_tokens")
    manager.hit_tokens = number(numbers, "hit_tokens")
    manager.copied_blocks = number(numbers, "copied_blocks")
    for g, group in enumerate(manager.groups):
        counters = {"clock": clocks[g], "total_evictions": evictions[g]}
        restore_pool(&group.allocator.pool, arrays, f"group{g}.", number(counters, "clock"),
                     number(counters, "total_evictions"))
    depths = restore_nodes(manager, numbers, arrays)
    restore_rows(manager, arrays)
    restore_sequences(manager, arrays, depths)


cdef cnp.ndarray restore_nodes(SharedSequences manager, object numbers, object arrays):
    """The prefix index; returns the depth of each node, int32 ``[num_nodes]``."""
    cdef rf_saved_nodes saved
    cdef const char *reason
    cdef int32_t[MAX_GROUPS] sizes
    cdef int32_t i, g, block, num_groups = <int32_t> len(manager.groups)
    cdef CacheGroup group
    cdef rf_block *b
    cdef cnp.ndarray parents = checked(arrays, "nodes.parents", np.int32, (None,))
    cdef int32_t n = <int32_t> len(parents)
    cdef cnp.ndarray tokens = checked(arrays, "nodes.tokens", np.int32, (n, manager.block_size))
    cdef cnp.ndarray blocks = checked(arrays, "nodes.blocks", np.int32, (n, num_groups))
    cdef cnp.ndarray chains = checked(arrays, "sequences.chains", np.int32, (None,))
    cdef cnp.ndarray depths = np.zeros(n, np.int32)
    cdef int32_t *depth = <int32_t *> cnp.PyArray_DATA(depths)
    cdef int32_t *of = <int32_t *> cnp.PyArray_DATA(blocks)
    salts = read_salts(numbers)
    if (n == 0) != (len(salts) == 0):
        raise SnapshotError("salts: they differ from the roots of the prefix index")
    if len(chains) and not ROOT_UNSET <= chains.min() <= chains.max() < n:
        raise SnapshotError("sequences.chains: a node out of range")
    if n:
        uses = np.bincount(chains[chains >= 0], minlength=n).astype(np.int32)
        uses[0] += 1  # the space of no salt is in use for ever
        for g, group in enumerate(manager.groups):
            sizes[g] = group.allocator.pool.next_fresh
        manager.prefixes.make_index()
        saved.num_nodes = n
        saved.num_roots = <int32_t> len(salts)
        saved.parents = <int32_t *> cnp.PyArray_DATA(parents)
        saved.tokens = <int32_t *> cnp.PyArray_DATA(tokens)
        saved.blocks = of
        saved.uses = <int32_t *> cnp.PyArray_DATA(<cnp.ndarray> uses)
        if rf_saved_nodes_restore(&saved, &manager.prefixes.index, sizes, &reason) != RF_OK:
            raise SnapshotError(f"nodes: {reason.decode()}")
        manager.prefixes.unsalted = 0
        manager.prefixes.salts = {salt: i for i, salt in enumerate(salts)}
        manager.prefixes.salts_limit = max(64, 2 * len(salts))
        manager.prefixes.is_ready = True
        for i in range(<int32_t> len(salts), n):
            depth[i] = depth[(<int32_t *> cnp.PyArray_DATA(parents))[i]] + 1
            for g in range(num_groups):
                block = of[<int64_t> i * num_groups + g]
                if block != RF_NO_BLOCK:
                    group = manager.groups[g]
                    b = &group.allocator.pool.blocks[block]
                    if b.ref_count == 0 and not b.flags & RF_BLOCK_KEPT:
                        raise SnapshotError("nodes.blocks: a free block has contents")
                    b.flags |= RF_BLOCK_CACHED
    for group in manager.groups:
        for i in range(group.allocator.pool.next_fresh):
            b = &group.allocator.pool.blocks[i]
            if not b.flags & RF_BLOCK_CACHED and (b.flags & RF_BLOCK_KEPT or b.pins):
                raise SnapshotError("nodes.blocks: a block is kept or pinned for nothing")
        if group.allocator.pool.num_evicted:
            raise SnapshotError("evicted: blocks that nobody was told of")
    return depths


cdef list read_salts(object numbers):
    """The salts' keys; the first stands for no salt."""
    texts = numbers.get("salts")
    if type(texts) is not list or (texts and texts[0] is not None):
        raise SnapshotError("salts: expected a list that begins with none")
    try:
        salts = [bytes.fromhex(text) for text in texts[1:]]
    except (TypeError, ValueError):
        raise SnapshotError("salts: expected hexadecimal digits") from None
    if len(set(salts)) != len(salts):
        raise SnapshotError("salts: one is there twice")
    return [None, *salts] if texts else []


cdef int restore_rows(SharedSequences manager, object arrays) except -1:
    """Give each sequence the row that it had, and leave the rows between free in the same order."""
    cdef cnp.ndarray ids = checked(arrays, "sequences.ids", np.uint64, (None,))
    cdef cnp.ndarray rows = checked(arrays, "sequences.rows", np.int32, (len(ids),))
    cdef cnp.ndarray free_rows = checked(arrays, "free_rows", np.int32, (None,))
    cdef int64_t n = len(ids) + len(free_rows)
    every = np.concatenate([rows, free_rows])
    if n > INT32_MAX or not np.array_equal(np.sort(every), np.arange(n)):
        raise SnapshotError("sequences.rows: they and the free rows are not each once")
    if len(np.unique(ids)) != len(ids):
        raise SnapshotError("sequences.ids: one is there twice")
    if manager.max_sequences is not None and n > manager.max_sequences:
        raise SnapshotError(f"sequences.rows: {n} rows, max_sequences is {manager.max_sequences}")
    # ids that no sequence has, for the free rows
    others = np.setdiff1d(np.arange(n, dtype=np.uint64), ids)[:len(free_rows)]
    keys = np.empty(n, np.uint64)
    keys[every] = np.concatenate([ids, others])
    for key in keys.tolist():
        manager.reserve_sequence()
        manager.add_row(key)
    for row, key in reversed(list(zip(free_rows.tolist(), others.tolist()))):
        manager.drop_row(key, row)
    return 0


cdef int restore_sequences(SharedSequences manager, object arrays, cnp.ndarray depths) except -1:
    cdef CacheGroup group
    found = {name: checked(arrays, "sequences." + name, dtype,
                           arrays["sequences.ids"].shape)
             for name, dtype in SEQUENCE_ARRAYS.items()}
    cdef int32_t *rows = <int32_t *> data(found, "rows")
    cdef int64_t *lengths = <int64_t *> data(found, "lengths")
    cdef int64_t *committed = <int64_t *> data(found, "committed")
    cdef int64_t *num_known = <int64_t *> data(found, "num_known")
    cdef int32_t *roots = <int32_t *> data(found, "roots")
    cdef int32_t *chains = <int32_t *> data(found, "chains")
    cdef uint8_t *priorities = <uint8_t *> data(found, "priorities")
    cdef uint8_t *started = <uint8_t *> data(found, "started")
    cdef cnp.ndarray known = checked(arrays, "sequences.tokens", np.int32, (None,))
    cdef int32_t *tokens = <int32_t *> cnp.PyArray_DATA(known)
    cdef int32_t *depth = <int32_t *> cnp.PyArray_DATA(depths)
    cdef int64_t i, n = len(found["ids"]), left = len(known), longest = 0
    cdef int64_t limit = INT32_MAX if manager.max_seq_len is None else manager.max_seq_len
    cdef Sequence *sequence
    for i in range(n):
        sequence = &manager.sequences[rows[i]]
        if not 0 <= committed[i] <= lengths[i] <= limit or not 0 <= num_known[i] <= left:
            raise SnapshotError(f"sequences: {committed[i]} tokens committed and {num_known[i]} "
                                f"known of {lengths[i]}, at most {limit}")
        if num_known[i] > limit or priorities[i] >= RF_NUM_PRIORITIES or started[i] > 1:
            raise SnapshotError("sequences: a number out of range")
        if num_known[i]:
            sequence.tokens = <int32_t *> rf_alloc(num_known[i] * sizeof(int32_t))
            if sequence.tokens == NULL:
                raise MemoryError(f"no memory for {num_known[i]} tokens")
            memcpy(sequence.tokens, tokens, num_known[i] * sizeof(int32_t))
        tokens += num_known[i]
        left -= num_known[i]
        sequence.num_known = sequence.capacity = num_known[i]
        sequence.length = lengths[i]
        sequence.committed = committed[i]
        sequence.priority = priorities[i]
        sequence.started = started[i]
        sequence.root = roots[i]
        sequence.chain = chains[i]
        if chains[i] >= 0:
            sequence.chained = depth[chains[i]]
            check_chain(manager, sequence)
        elif roots[i] != chains[i]:
            raise SnapshotError("sequences.roots: a space without its node")
        longest = max(longest, lengths[i])
    if left:
        raise SnapshotError("sequences.num_known: they differ from the number of tokens")
    longest = (longest + manager.block_size - 1) // manager.block_size
    for g, group in enumerate(manager.groups):
        restore_lists(manager, g, found["rows"], arrays, depths)
        group.grow_table(0, longest)
    return 0


cdef int check_chain(SharedSequences manager, Sequence *sequence) except -1:
    """A sequence's node must stand for just the tokens that it knows."""
    cdef int32_t node = sequence.chain
    cdef int64_t i = sequence.chained, size = manager.block_size, k
    cdef const int32_t *tokens
    if i * size > min(sequence.committed, sequence.num_known):
        raise SnapshotError("sequences.chains: published before committed and known")
    while i > 0:  # a node of depth i has i ancestors
        i -= 1
        tokens = manager.prefixes.index.tokens + node * size
        for k in range(size):
            if tokens[k] != sequence.tokens[i * size + k]:
                raise SnapshotError("sequences.chains: a node of other tokens")
        node = manager.prefixes.index.nodes[node].parent
    if node != sequence.root:
        raise SnapshotError("sequences.roots: a node of another space")
    return 0


cdef int restore_lists(SharedSequences manager, int32_t g, cnp.ndarray rows, object arrays,
                       cnp.ndarray depths) except -1:
    """The page table of one group, and that reference counts are the holders and pins."""
    cdef CacheGroup group = manager.groups[g]
    cdef rf_block_pool *pool = &group.allocator.pool
    cdef cnp.ndarray flat = checked(arrays, f"group{g}.lists", np.int32, (None,))
    cdef cnp.ndarray holders = np.zeros(pool.next_fresh, np.int32)
    cdef cnp.ndarray seen = np.full(pool.next_fresh, -1, np.int32)
    cdef int32_t *count = <int32_t *> cnp.PyArray_DATA(holders)
    cdef int32_t *last = <int32_t *> cnp.PyArray_DATA(seen)
    cdef int32_t *depth = <int32_t *> cnp.PyArray_DATA(depths)
    cdef int32_t *ids = <int32_t *> cnp.PyArray_DATA(flat)
    cdef int64_t left = len(flat), num, k
    cdef int32_t row, node, block, needed
    cdef bint missing
    for row in (<object> rows).tolist():
        num = (manager.sequences[row].length + manager.block_size - 1) // manager.block_size
        if num > left:
            raise SnapshotError(f"group{g}.lists: fewer blocks than the sequences have")
        needed = group.first_needed(manager.sequences[row].committed)
        missing = True  # the blocks that a window has passed come first
        for k in range(num):
            block = ids[k]
            if block == RF_NO_BLOCK and missing and k < needed:
                continue
            missing = False
            if block < 0 or block >= pool.next_fresh or pool.blocks[block].ref_count == 0:
                raise SnapshotError(f"group{g}.lists: a block out of range or not in use")
            if last[block] == row:
                raise SnapshotError(f"group{g}.lists: a block twice in a sequence")
            last[block] = row
            count[block] += 1
            if pool.blocks[block].flags & RF_BLOCK_CACHED:
                node = rf_prefix_index_node(&manager.prefixes.index, g, block)
                if depth[node] != k + 1:
                    raise SnapshotError(f"group{g}.lists: a cached block at another place")
        if group.page_table.reserve_blocks(row, <int32_t> num) != RF_OK:
            raise MemoryError(f"no memory for {num} blocks of the page table")
        group.page_table.push_blocks(row, ids, <int32_t> num)
        group.mark(row, 0)
        ids += num
        left -= num
    if left:
        raise SnapshotError(f"group{g}.lists: more blocks than the sequences have")
    for block in range(pool.next_fresh):
        if pool.blocks[block].ref_count != count[block] + pool.blocks[block].pins:
            raise SnapshotError(
                f"group{g}.ref_counts: block {block} has {count[block]} holders and "
                f"{pool.blocks[block].pins} pins, {pool.blocks[block].ref_count} references")
    return 0
