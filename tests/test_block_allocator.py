"""BlockAllocator: which physical blocks are free, used by whom, or kept for reuse."""

import pickle

import numpy as np
import pytest

from metadata_state import raises_unchanged, state_of
from rocmforge import BlockAllocator, RocmForgeError
from rocmforge.block_allocator import PhysicalBlock
from rocmforge.errors import InvalidBlockError, OutOfBlocksError


def kept_pool(*released, num_blocks=None):
    """A pool of which all blocks were used, and these then released with keep, in this order."""
    allocator = BlockAllocator(len(released) if num_blocks is None else num_blocks)
    allocator.allocate_blocks(allocator.num_blocks)
    for block in released:
        allocator.deallocate_block(block, keep=True)
    return allocator


def counts(allocator):
    """(free, kept, used)."""
    blocks = [allocator.get_block(i) for i in range(allocator.num_blocks)]
    used = sum(block.ref_count > 0 for block in blocks)
    free = sum(block.is_free for block in blocks)
    assert free == allocator.get_free_count()
    assert free + allocator.num_kept + used == allocator.num_blocks
    return free, allocator.num_kept, used


# ---- taking and giving back ----


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 1000])
def test_a_new_pool_is_all_free(num_blocks):
    allocator = BlockAllocator(num_blocks)
    assert allocator.num_blocks == len(allocator) == allocator.get_free_count() == num_blocks
    assert allocator.num_kept == 0
    assert counts(allocator) == (num_blocks, 0, 0)
    allocator.check_integrity()


def test_every_block_is_given_once():
    allocator = BlockAllocator(5)
    ids = [allocator.allocate_block() for _ in range(5)]
    assert sorted(ids) == [0, 1, 2, 3, 4]
    assert {type(i) for i in ids} == {int}
    assert counts(allocator) == (0, 0, 5)


def test_a_freed_block_is_given_again():
    allocator = BlockAllocator(3)
    allocator.allocate_blocks(3)
    assert allocator.deallocate_block(1) is None
    assert counts(allocator) == (1, 0, 2)
    assert allocator.allocate_block() == 1
    allocator.check_integrity()


def test_the_order_depends_on_the_calls_only():
    def run():
        allocator = BlockAllocator(8)
        given = [*allocator.allocate_blocks(6)]
        allocator.deallocate_blocks([4, 0, 2])
        allocator.deallocate_block(5, keep=True)
        return [*given, *(allocator.allocate_block() for _ in range(6))]

    assert run() == run()


def test_a_block_says_what_it_is():
    allocator = BlockAllocator(3)
    assert allocator.get_block(0) == PhysicalBlock(id=0, ref_count=0, is_free=True, last_use=0)
    allocator.allocate_block()
    allocator.ref(0)
    assert allocator.get_block(0)[:3] == (0, 2, False)
    allocator.deallocate_blocks([0])
    allocator.deallocate_block(0, keep=True)
    assert allocator.get_block(0)[:3] == (0, 0, False)
    assert allocator.get_block(1)[:3] == (1, 0, True)


def test_last_use_is_a_count_of_calls():
    allocator = BlockAllocator(4)
    allocator.allocate_block()
    allocator.allocate_blocks(2)
    uses = [allocator.get_block(i).last_use for i in range(4)]
    assert 0 == uses[3] < uses[0] < uses[1] == uses[2]
    for call in (allocator.ref, allocator.deallocate_block, allocator.deallocate_block):
        before = max(allocator.get_block(i).last_use for i in range(4))
        call(0)
        assert allocator.get_block(0).last_use > before


# ---- reference counts ----


def test_a_block_is_free_when_its_last_holder_lets_go():
    allocator = BlockAllocator(2)
    block = allocator.allocate_block()
    for expected in (2, 3):
        assert allocator.ref(block) is None
        assert allocator.get_block(block).ref_count == expected
    for expected in (2, 1):
        allocator.deallocate_block(block)
        assert allocator.get_block(block).ref_count == expected
        assert allocator.get_free_count() == 1
    allocator.deallocate_block(block)
    assert allocator.get_free_count() == 2


@pytest.mark.parametrize("keep", [[True, False], [False, True]])
def test_the_last_holder_decides_whether_a_block_is_kept(keep):
    allocator = BlockAllocator(1)
    allocator.allocate_block()
    allocator.ref(0)
    for flag in keep:
        allocator.deallocate_block(0, keep=flag)
    assert allocator.num_kept == keep[-1]


# ---- kept blocks, eviction ----


def test_ref_revives_a_kept_block():
    allocator = kept_pool(0, 1)
    allocator.ref(0)
    assert allocator.get_block(0).ref_count == 1
    assert counts(allocator) == (0, 1, 1)
    assert allocator.allocate_block() == 1
    assert allocator.take_evicted().tolist() == [1]
    allocator.check_integrity()


def test_free_blocks_go_before_kept_ones():
    allocator = kept_pool(0, num_blocks=3)
    allocator.deallocate_block(2)
    assert allocator.allocate_block() == 2
    assert allocator.num_kept == 1
    assert allocator.take_evicted().tolist() == []
    assert allocator.allocate_block() == 0


def test_the_block_kept_longest_is_evicted_first():
    allocator = kept_pool(2, 0, 3, 1)
    assert [allocator.allocate_block() for _ in range(4)] == [2, 0, 3, 1]
    assert allocator.take_evicted().tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("revived", [0, 1, 2, 3])
def test_a_revived_block_leaves_the_list_and_comes_back_newest(revived):
    allocator = kept_pool(0, 1, 2, 3)
    allocator.ref(revived)
    allocator.check_integrity()
    allocator.deallocate_block(revived, keep=True)
    allocator.check_integrity()
    expected = [i for i in range(4) if i != revived] + [revived]
    assert allocator.allocate_blocks(4).tolist() == expected


def test_kept_blocks_released_together_age_in_the_order_given():
    allocator = BlockAllocator(4)
    allocator.allocate_blocks(4)
    allocator.deallocate_blocks([3, 1, 2], keep=True)
    assert allocator.allocate_blocks(3).tolist() == [3, 1, 2]


def test_take_evicted_lists_each_block_once_and_forgets():
    allocator = kept_pool(0, 1)
    for _ in range(3):
        assert allocator.allocate_block() == 0
        allocator.deallocate_block(0, keep=True)
        assert allocator.allocate_block() == 1
        allocator.deallocate_block(1, keep=True)
    evicted = allocator.take_evicted()
    assert evicted.dtype == np.int32
    assert evicted.tolist() == [0, 1]
    assert allocator.take_evicted().tolist() == []
    allocator.allocate_block()
    assert allocator.take_evicted().tolist() == [0]
    allocator.check_integrity()


def test_a_block_that_is_not_kept_any_longer_is_not_evicted():
    allocator = kept_pool(0, 1)
    allocator.ref(1)
    allocator.deallocate_block(1)
    assert allocator.allocate_block() == 1
    assert allocator.take_evicted().tolist() == []


# ---- bulk ----


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_allocate_blocks(n):
    allocator = BlockAllocator(5)
    ids = allocator.allocate_blocks(np.int64(n))
    assert ids.dtype == np.int32
    assert sorted(ids.tolist()) == list(range(n))
    assert counts(allocator) == (5 - n, 0, n)


def test_allocate_blocks_takes_free_then_oldest_kept():
    allocator = kept_pool(3, 1, num_blocks=5)
    allocator.deallocate_block(4)
    assert allocator.allocate_blocks(3).tolist() == [4, 3, 1]
    assert allocator.take_evicted().tolist() == [3, 1]


@pytest.mark.parametrize(
    "ids",
    [[1, 0], (1, 0), range(2), np.array([0, 1], np.uint8), np.array([0, 7, 1], np.int64)[::2], []],
    ids=repr,
)
@pytest.mark.parametrize("keep", [False, True])
def test_deallocate_blocks(ids, keep):
    allocator = BlockAllocator(4)
    allocator.allocate_blocks(4)
    assert allocator.deallocate_blocks(ids, keep=keep) is None
    freed = len(ids) * (not keep)
    assert counts(allocator) == (freed, len(ids) - freed, 4 - len(ids))
    allocator.check_integrity()


def test_deallocate_blocks_drops_one_reference_each():
    allocator = BlockAllocator(3)
    allocator.allocate_blocks(3)
    allocator.ref(1)
    allocator.deallocate_blocks([0, 1, 2])
    assert [allocator.get_block(i).ref_count for i in range(3)] == [0, 1, 0]


# ---- what is wrong changes nothing ----


@pytest.fixture
def mixed():
    """0 and 1 used (1 twice), 2 kept, 3 free again, 4 never used."""
    allocator = BlockAllocator(5)
    allocator.allocate_blocks(4)
    allocator.ref(1)
    allocator.deallocate_block(2, keep=True)
    allocator.deallocate_block(3)
    return allocator


NOT_IN_USE = "is not in use: freed twice, or never allocated"
OUT_OF_RANGE = "expected 0 .. 4"

BAD_BLOCKS = [
    ([3], f"block 3 {NOT_IN_USE}"),
    ([4], f"block 4 {NOT_IN_USE}"),
    ([2], f"block 2 {NOT_IN_USE}"),
    ([5], f"block 5: {OUT_OF_RANGE}"),
    ([-1], f"block -1: {OUT_OF_RANGE}"),
    ([2**31 - 1], f"block 2147483647: {OUT_OF_RANGE}"),
    ([-(2**31)], f"block -2147483648: {OUT_OF_RANGE}"),
    ([2**31], "expected -2147483648 .. 2147483647"),
    ([2**64], "expected -2147483648 .. 2147483647"),
]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("ids", "message"), BAD_BLOCKS)
def test_deallocate_a_bad_block(mixed, ids, message, keep):
    with raises_unchanged(mixed, InvalidBlockError, message):
        mixed.deallocate_block(ids[0], keep=keep)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        *BAD_BLOCKS,
        *([[0, 1, *ids], message] for ids, message in BAD_BLOCKS),
        ([0, 0], "block 0 is named twice in one call"),
        ([0, 1, 1], "block 1 is named twice in one call"),  # held twice: still once a call
        ([0, 1, 0, 1, 0, 1, 0, 1], "block 0 is named twice in one call"),
        ([[0]], "block_ids: expected one dimension, got shape (1, 1)"),
    ],
)
def test_deallocate_bad_blocks(mixed, ids, message, keep):
    with raises_unchanged(mixed, InvalidBlockError, message):
        mixed.deallocate_blocks(ids, keep=keep)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (3, "block 3 is free: it has no contents to share"),
        (4, "block 4 is free: it has no contents to share"),
        (5, f"block 5: {OUT_OF_RANGE}"),
        (-1, f"block -1: {OUT_OF_RANGE}"),
        (2**31, "expected -2147483648 .. 2147483647, got 2147483648"),
    ],
)
def test_ref_a_bad_block(mixed, block, message):
    with raises_unchanged(mixed, InvalidBlockError, message):
        mixed.ref(block)


@pytest.mark.parametrize("block", [-1, 5, 2**31, -(2**70)])
def test_get_a_block_out_of_range(mixed, block):
    with raises_unchanged(mixed, InvalidBlockError, "expected"):
        mixed.get_block(block)


@pytest.mark.parametrize("bad", [1.0, "1", None, True, [1]])
@pytest.mark.parametrize("method", ["deallocate_block", "ref", "get_block", "allocate_blocks"])
def test_no_integer(mixed, method, bad):
    with raises_unchanged(mixed, TypeError, f"expected an integer, got {type(bad).__name__}"):
        getattr(mixed, method)(bad)


@pytest.mark.parametrize("bad", [[1.0], ["1"], [True], [None], [0, 1.0]])
def test_no_integers(mixed, bad):
    with raises_unchanged(mixed, TypeError, "block_ids: expected integers, got dtype"):
        mixed.deallocate_blocks(bad)


def test_an_invalid_block_is_a_value_error():
    assert issubclass(InvalidBlockError, (RocmForgeError, ValueError))
    with pytest.raises(ValueError, match="block 0"):
        BlockAllocator(0).get_block(0)


@pytest.mark.parametrize("n", [4, 5, 2**31 - 1])
def test_exhaustion_in_bulk(mixed, n):
    message = f"out of blocks: {n} requested, 3 free"
    with raises_unchanged(mixed, OutOfBlocksError, message) as caught:
        mixed.allocate_blocks(n)
    assert (caught.value.requested, caught.value.available) == (n, 3)
    assert mixed.take_evicted().tolist() == []
    assert len(mixed.allocate_blocks(3)) == 3


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_exhaustion(num_blocks):
    allocator = BlockAllocator(num_blocks)
    allocator.allocate_blocks(num_blocks)
    with raises_unchanged(allocator, OutOfBlocksError, "out of blocks: 1 requested, 0 free"):
        allocator.allocate_block()
    with raises_unchanged(allocator, OutOfBlocksError, "out of blocks: 2 requested, 0 free"):
        allocator.allocate_blocks(2)
    assert allocator.allocate_blocks(0).tolist() == []


def test_out_of_blocks_is_a_memory_error_with_its_numbers():
    with pytest.raises(MemoryError) as caught:
        BlockAllocator(0).allocate_block()
    assert isinstance(caught.value, RocmForgeError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is OutOfBlocksError
    assert (again.requested, again.available, str(again)) == (1, 0, str(caught.value))


@pytest.mark.parametrize("n", [-1, 2**31, 2**64])
def test_a_bad_number_of_blocks(mixed, n):
    with raises_unchanged(mixed, ValueError, f"n: expected 0 .. 2147483647, got {n}"):
        mixed.allocate_blocks(n)


@pytest.mark.parametrize(
    ("num_blocks", "error", "message"),
    [
        (-1, ValueError, "num_blocks: expected 0 .. 2147483647, got -1"),
        (2**31, ValueError, "num_blocks: expected 0 .. 2147483647, got 2147483648"),
        (2**70, ValueError, "num_blocks: expected 0 .. 2147483647, got"),
        (1.0, TypeError, "num_blocks: expected an integer, got float"),
        (True, TypeError, "num_blocks: expected an integer, got bool"),
        (None, TypeError, "num_blocks: expected an integer, got NoneType"),
    ],
)
def test_a_bad_size(num_blocks, error, message):
    with pytest.raises(error) as caught:
        BlockAllocator(num_blocks)
    assert message in str(caught.value)


# ---- the whole pool ----


def test_repr(mixed):
    assert repr(mixed) == "BlockAllocator(num_blocks=5, free=2, kept=1, used=2)"


def test_a_large_pool_costs_nothing_before_it_is_used():
    allocator = BlockAllocator(20_000_000)
    assert allocator.allocate_blocks(3).tolist() == [0, 1, 2]


def test_random_calls():
    rng = np.random.default_rng(3)
    allocator, held = BlockAllocator(64), []
    for _ in range(30_000):
        choice = rng.random()
        if choice < 0.45 and len(held) < 64:
            held.append(allocator.allocate_block())
        elif choice < 0.55 and held:
            held.append(held[rng.integers(len(held))])
            allocator.ref(held[-1])
        elif held:
            allocator.deallocate_block(held.pop(rng.integers(len(held))), keep=choice < 0.8)
    allocator.check_integrity()
    references = np.bincount(held, minlength=64).tolist()
    assert [block.ref_count for block in state_of(allocator)["blocks"]] == references
