"""Any allocation of metadata memory may fail: then MemoryError, and everything as it was.

Each call is repeated on a fresh state with its first allocation made to fail, then its second, and
so on until it makes no more allocations.
"""

import copy

import pytest

from metadata_state import state_of
from rocmforge import BlockAllocator, KVCacheManager, LayerGroup, PageTable
from rocmforge.page_table import _fail_allocation

# Sizes before the call, so that every kind of growth comes up: rows, hash slots, lists of blocks.
SIZES = range(46)


@pytest.fixture(autouse=True)
def no_failure_left():
    yield
    _fail_allocation(0)


def fails_at(n, call):
    """Run the call with its n-th allocation failing; False if it made fewer."""
    _fail_allocation(n)
    error = None
    try:
        call()
    except MemoryError as caught:
        error = caught
    happened = _fail_allocation(0) == 0
    assert happened == (error is not None)
    assert error is None or (type(error) is MemoryError and str(error).startswith("no memory for"))
    return happened


def logical_state(thing):
    """All but the place of the block table, which may have moved to make room."""
    state = state_of(thing)
    state.pop("table", None)
    return state


def count_failures(make, call):
    """Let each allocation of `call(make())` fail in turn; how many there were."""
    n = 0
    while True:
        thing = make()
        before = logical_state(thing)
        if not fails_at(n + 1, lambda thing=thing: call(thing)):
            thing.check_integrity()
            return n
        thing.check_integrity()
        assert logical_state(thing) == before
        call(thing)  # the failure is over: it succeeds, and on a sound structure
        thing.check_integrity()
        n += 1


def page_table(size):
    table = PageTable(4)
    for sequence_id in range(size):
        table.append_block(sequence_id, sequence_id)
    table.append_blocks(1000, range(size))
    return table


def manager(size, **limits):
    """`size` sequences of one token, and 1000 with `size` blocks, the last partly filled."""
    cache = KVCacheManager(400, block_size=4, **limits)
    for sequence_id in range(size):
        cache.add_sequence(sequence_id)
        cache.append([sequence_id], 1)
    cache.add_sequence(1000)
    if size:
        cache.append([1000], 4 * size - 2)
    return cache


def forked(size):
    cache = manager(size)
    cache.fork(1000, 1001)
    cache.fork(1000, 1002)
    return cache


def prompt(size):
    return list(range(4 * size + 2))


def sharing(size):
    """Two groups; the prompt of `size` is cached, 1000 computes it, and 1001 was promised it."""
    cache = KVCacheManager(
        block_size=4, groups=[LayerGroup(200), LayerGroup(200, window=9)], watermark=1
    )
    cache.add_sequence(0, prompt(size))
    cache.commit(cache.append([0], len(prompt(size))))
    cache.free(0)
    cache.add_sequence(1000)
    cache.append([1000], 3, token_ids=[7, 8, 9])
    cache.add_sequence(1001, prompt(size), priority=3)
    return cache


# (how many allocations over all sizes at least, state, call)
CALLS = {
    "PageTable.append_block, new": (46, page_table, lambda t: t.append_block(2000, 5)),
    "PageTable.append_block": (4, page_table, lambda t: t.append_block(1000, 5)),
    "PageTable.append_blocks, new": (46, page_table, lambda t: t.append_blocks(2000, range(20))),
    "PageTable.append_blocks, none": (4, page_table, lambda t: t.append_blocks(2000, [])),
    "PageTable.append_blocks": (46, page_table, lambda t: t.append_blocks(1000, range(20))),
    "PageTable.copy": (300, page_table, PageTable.copy),
    "copy.deepcopy": (300, page_table, copy.deepcopy),
    "PageTable.truncate": (0, page_table, lambda t: t.truncate(1000, 0)),
    "PageTable.remove_sequence": (0, page_table, lambda t: t.remove_sequence(1000)),
    "PageTable.slot_mapping": (0, page_table, lambda t: t.slot_mapping([1000], [-1])),
    "PageTable.block_table": (0, page_table, lambda t: t.block_table([1000])),
    "KVCacheManager.add_sequence": (4, manager, lambda m: m.add_sequence(2000)),
    "KVCacheManager.fork": (46, manager, lambda m: m.fork(1000, 2000)),
    "KVCacheManager.append": (50, manager, lambda m: m.append([1000], 7)),
    "KVCacheManager.append, many": (
        100,
        manager,
        lambda m: m.append([1000, *range(min(len(m) - 1, 5))], 24),
    ),
    "KVCacheManager.append, copies": (
        46,
        forked,
        lambda m: m.append([1001, 1000, 1002], [1, 30, 2]),
    ),
    "KVCacheManager.free": (0, forked, lambda m: m.free(1000)),
    "KVCacheManager.stats": (0, forked, KVCacheManager.stats),
    "add_sequence, a hit": (180, sharing, lambda m: m.add_sequence(2000, prompt(60))),
    "add_sequence, a new salt": (46, sharing, lambda m: m.add_sequence(2000, prompt(9), "new")),
    "fork, tokens known": (90, sharing, lambda m: m.fork(1001, 2000)),
    "append, tokens known": (46, sharing, lambda m: m.append([1001], 2)),
    "append, tokens": (
        138,
        sharing,
        lambda m: m.append(
            [1000, 1001], [40, 2], [*range(40), *prompt(len(SIZES))[m.seq_len(1001) :][:2]]
        ),
    ),
    "can_append": (46, sharing, lambda m: m.can_append([1000, 1001], 20)),
    "match_prefix": (46, sharing, lambda m: m.match_prefix(prompt(60))),
    "pin": (46, sharing, lambda m: m.pin(prompt(60))),
    "truncate": (0, sharing, lambda m: m.truncate(1000, 1)),
    "reset_prefix_cache": (0, sharing, KVCacheManager.reset_prefix_cache),
    "free, cached": (0, sharing, lambda m: m.free([1000, 1001])),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_allocation_of_a_call(name):
    at_least, make, call = CALLS[name]
    total = sum(count_failures(lambda size=size: make(size), call) for size in SIZES)
    assert total >= at_least


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.add_sequence(2000, prompt(5)),
        lambda m: m.append([1000], 1, token_ids=[1]),
    ],
)
def test_the_prefix_index_gets_its_memory_with_the_first_tokens(call):
    assert count_failures(lambda: manager(2), call) >= 8


def test_unpin():
    for size in SIZES[1:]:

        def pinned(size=size):
            cache = sharing(size)
            assert cache.pin(prompt(size)) == 4 * size
            return cache

        assert count_failures(pinned, lambda cache: cache.unpin(prompt(60))) == 1


def test_commit_allocates_nothing():
    cache = manager(3)
    cache.add_sequence(9)
    batch = cache.append([9], 5)
    assert not fails_at(1, lambda: cache.commit(batch))
    assert cache.committed_len(9) == 5


def test_commit_that_publishes_and_releases_allocates_nothing():
    for size in SIZES:
        cache = sharing(size)
        cache.add_sequence(2000, prompt(10), salt="b")
        batch = cache.append([2000], len(prompt(10)))
        assert not fails_at(1, lambda cache=cache, batch=batch: cache.commit(batch))
        assert cache.match_prefix(prompt(10), salt="b") == 40
        cache.check_integrity()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockAllocator(10),
        lambda: KVCacheManager(10),
        lambda: KVCacheManager(10, max_sequences=4, max_seq_len=100),
    ],
)
def test_construction(make):
    n = 0
    while fails_at(n + 1, make):
        n += 1
    assert n >= 3
    make().check_integrity()


def test_a_block_pool_allocates_nothing_after_its_construction():
    allocator = BlockAllocator(8)

    def use():
        ids = allocator.allocate_blocks(8)
        allocator.ref(ids[0])
        allocator.deallocate_blocks(ids, keep=True)
        allocator.allocate_block()
        allocator.take_evicted()

    assert not fails_at(1, use)
    allocator.check_integrity()


def test_a_manager_with_both_limits_still_takes_memory_for_its_sequences():
    assert (
        count_failures(
            lambda: manager(0, max_sequences=4, max_seq_len=100), lambda m: m.append([1000], 100)
        )
        >= 1
    )


def test_the_hook_counts_down_and_turns_off():
    assert _fail_allocation(5) == 0
    BlockAllocator(1)  # three allocations
    assert _fail_allocation(0) == 2
    assert _fail_allocation(1) == 0
    with pytest.raises(MemoryError):
        BlockAllocator(1)
    BlockAllocator(1)
    assert _fail_allocation(0) == 0


@pytest.mark.parametrize("bad", [-1, 2**63])
def test_a_bad_countdown(bad):
    with pytest.raises(ValueError, match="n: expected"):
        _fail_allocation(bad)
