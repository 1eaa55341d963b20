"""Pickles of managers, page tables and allocators: the copy goes on as the original would."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rocmforge import BlockAllocator, KVCacheManager, LayerGroup, PageTable
from rocmforge.errors import SnapshotError
from rocmforge.saved_state import dump, load_allocator, load_page_table, restore
from traffic import Traffic, logical_state, random_manager

WAYS: list[Callable[[Any], Any]] = [
    *(lambda thing, n=n: pickle.loads(pickle.dumps(thing, n)) for n in (0, 2, 5)),
    copy.copy,
    copy.deepcopy,
]


@pytest.mark.parametrize("seed", range(60))
def test_a_copy_goes_on_as_the_original(seed: int) -> None:
    manager, traffic = random_manager(seed)
    before = logical_state(manager)
    other = WAYS[seed % len(WAYS)](manager)
    other.check_integrity()
    assert logical_state(manager) == before == logical_state(other)
    for name in ("block_size", "max_sequences", "max_seq_len", "watermark", "max_pinned_blocks"):
        assert getattr(other, name) == getattr(manager, name)
    following = copy.copy(traffic)
    following.random = copy.deepcopy(traffic.random)
    following.manager, following.pending, following.log = other, [], []
    following.alive, following.pinned = list(traffic.alive), list(traffic.pinned)
    traffic.log.clear()
    for _ in range(6):
        traffic.run(50)
        following.run(50)
        assert traffic.log == following.log
        assert logical_state(manager) == logical_state(other)
        other.check_integrity()


def test_the_first_batch_of_a_copy_brings_the_whole_table() -> None:
    manager = KVCacheManager(64, block_size=4)
    manager.add_sequence(7, range(30))
    manager.commit(manager.append([7], 30))
    manager.add_sequence(8)
    other = pickle.loads(pickle.dumps(manager))
    batch = other.append([8], 1)
    table = np.full_like(batch.block_table, -1)
    for row, column, block in batch.table_delta:
        table[row, column] = block
    assert (table == batch.block_table).all()
    ids = other.page_table.block_ids(7)
    row = other.append([7], 1).rows[0]
    assert (other.block_table[row, : len(ids)] == ids).all()


class Named(KVCacheManager):
    def __init__(self, name: str) -> None:
        super().__init__(16, block_size=4)
        self.name = name


def test_a_subclass() -> None:
    manager = Named("seven")
    manager.add_sequence(1, [1, 2, 3, 4, 5])
    manager.commit(manager.append([1], 5))
    other = pickle.loads(pickle.dumps(manager))
    assert type(other) is Named
    assert other.name == "seven"
    assert other.match_prefix([1, 2, 3, 4, 5]) == 4


@pytest.mark.parametrize("way", WAYS)
def test_a_page_table(way: Callable[[Any], Any]) -> None:
    table = PageTable(4)
    for sequence in (2**64 - 1, 0, 5):
        table.append_blocks(sequence, range(sequence % 7))
    table.remove_sequence(0)
    other = way(table)
    assert other == table
    other.check_integrity()
    other.append_block(5, 1)
    assert other != table
    manager = KVCacheManager(16, block_size=4)
    manager.add_sequence(1)
    manager.append([1], 10)
    face = way(manager.page_table)
    assert face == manager.page_table
    face.append_block(1, 5)  # a copy is writable


@pytest.mark.parametrize("seed", range(20))
def test_an_allocator(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = BlockAllocator(24)
    held: list[int] = []

    def drive(pool: BlockAllocator, held: list[int], rng: np.random.Generator) -> list[object]:
        seen: list[object] = []
        for _ in range(40):
            kind = rng.integers(0, 6)
            if kind < 3 and pool.get_free_count() + pool.num_kept >= 3:
                ids = pool.allocate_blocks(int(rng.integers(0, 4))).tolist()
                held += ids
                seen.append(ids)
            elif kind == 3 and held:
                block = held.pop(int(rng.integers(0, len(held))))
                pool.deallocate_block(block, keep=bool(rng.integers(0, 2)))
            elif kind == 4 and held:
                block = held[int(rng.integers(0, len(held)))]
                pool.ref(block)
                held.append(block)
            elif kind == 5 and rng.random() < 0.3:
                seen.append(pool.take_evicted().tolist())
        pool.check_integrity()
        return seen

    drive(pool, held, rng)
    other = WAYS[seed % len(WAYS)](pool)
    state = rng.bit_generator.state
    expected = drive(pool, list(held), rng)
    rng.bit_generator.state = state
    assert drive(other, list(held), rng) == expected
    assert [pool.get_block(i) for i in range(24)] == [other.get_block(i) for i in range(24)]


# ---- what must be refused ----


def small() -> KVCacheManager:
    """Two sequences that share a block, a third with a block of its own, and a cached one."""
    manager = KVCacheManager(16, block_size=4)
    for sequence, tokens in enumerate([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7, 8, 9, 10], [9] * 6]):
        found = manager.add_sequence(sequence, tokens)
        manager.commit(manager.append([sequence], len(tokens) - found))
    manager.add_sequence(3, [5] * 9, "salt")
    manager.commit(manager.append([3], 9))
    manager.pin([9] * 4)
    manager.free([0, 3])
    return manager


def test_the_small_state_is_as_the_cases_need_it() -> None:
    numbers, arrays = dump(small())
    assert numbers["salts"] == [None, b"salt".hex()]
    assert arrays["nodes.parents"].tolist() == [-1, -1, 0, 2, 0, 1, 5]
    assert arrays["sequences.ids"].tolist() == [1, 2]
    assert arrays["free_rows"].tolist() == [3, 0]
    assert arrays["group0.kept"].tolist() == [7, 6]
    assert arrays["group0.lists"].tolist() == [0, 2, 3, 4, 5]


def change(name: str, index: Any, value: Any) -> Callable[[Any, Any], None]:
    def apply(numbers: dict[str, Any], arrays: dict[str, Any]) -> None:
        if index is None:
            (numbers if name in numbers else arrays)[name] = value
        else:
            arrays[name][index] = value

    return apply


HOSTILE = {
    "a list past the pool": change("group0.lists", 0, 2**31 - 1),
    "a negative block": change("group0.lists", 0, -7),
    "a block that is missing": change("group0.lists", 0, -1),
    "a free block": change("group0.lists", 1, 1),
    "another holder": change("group0.lists", 4, 2),
    "a block twice in a sequence": change("group0.lists", 1, 0),
    "a cached block at another place": change("group0.lists", slice(0, 2), [2, 0]),
    "too many blocks": change("group0.lists", None, np.zeros(6, np.int32)),
    "too few blocks": change("group0.lists", None, np.zeros(3, np.int32)),
    "a reference too many": change("group0.ref_counts", 0, 9),
    "a negative reference": change("group0.ref_counts", 0, -1),
    "a pin too many": change("group0.pins", 2, 1),
    "pins of nobody": change("group0.pins", 6, 60000),
    "a priority": change("group0.priorities", 1, 8),
    "used in the future": change("group0.last_uses", 1, 2**40),
    "a clock past all counting": change("clocks", None, [2**63]),
    "a free block twice": change("group0.free_ids", None, np.array([1, 1], np.int32)),
    "a free block out of range": change("group0.free_ids", 0, 77),
    "a kept block twice": change("group0.kept", 0, 6),
    "a kept block that is used": change("group0.kept", 0, 0),
    "evicted blocks": change("group0.evicted", None, np.array([1], np.int32)),
    "more blocks than the pool": change("group0.ref_counts", None, np.ones(17, np.int32)),
    "arrays that differ in size": change("group0.pins", None, np.ones(3, np.uint16)),
    "a parent behind its child": change("nodes.parents", 2, 3),
    "a parent of itself": change("nodes.parents", 2, 2),
    "a parent out of range": change("nodes.parents", 3, 2**30),
    "a root too many": change("nodes.parents", 2, -1),
    "a root with a parent": change("nodes.parents", 1, 0),
    "the same content twice": lambda n, a: a["nodes.tokens"].__setitem__(4, a["nodes.tokens"][2]),
    "nodes of another size": change("nodes.tokens", None, np.zeros((7, 5), np.int32)),
    "a node's block out of range": change("nodes.blocks", (2, 0), 99),
    "a node's block that is another's": change("nodes.blocks", (2, 0), 2),
    "contents of a free block": change("nodes.blocks", (3, 0), 1),
    "a node that nothing uses": change("nodes.blocks", (6, 0), -1),
    "a block of a root": change("nodes.blocks", (0, 0), 0),
    "a chain out of range": change("sequences.chains", 0, 7),
    "a chain below": change("sequences.chains", 0, -3),
    "a chain of other tokens": change("sequences.chains", 0, 4),
    "a chain of another space": change("sequences.roots", 0, 1),
    "a chain that nobody had committed": change("sequences.committed", 0, 3),
    "no root": change("sequences.roots", 0, -1),
    "a space without its node": change("sequences.chains", 1, -1),
    "more committed than there is": change("sequences.committed", 0, 99),
    "a negative length": change("sequences.lengths", 0, -1),
    "an enormous length": change("sequences.lengths", 0, 2**62),
    "tokens that are not there": change("sequences.num_known", 0, 2**62),
    "negative tokens": change("sequences.num_known", 0, -1),
    "tokens too many": change("sequences.tokens", None, np.zeros(99, np.int32)),
    "a priority of a sequence": change("sequences.priorities", 0, 255),
    "started how": change("sequences.started", 0, 2),
    "a row twice": change("sequences.rows", 0, 2),
    "a row out of range": change("sequences.rows", 0, 2**31 - 1),
    "a free row in use": change("free_rows", 0, 1),
    "an id twice": change("sequences.ids", 0, 2),
    "no array": lambda n, a: a.pop("group0.kept"),
    "floats": change("group0.lists", None, np.zeros(5)),
    "two dimensions": change("group0.lists", None, np.zeros((5, 1), np.int32)),
    "a list": change("group0.lists", None, [0, 2, 3, 4, 5]),
    "no salts": change("salts", None, None),
    "no roots for salts": change("salts", None, []),
    "a salt twice": change("salts", None, [None, "aa", "aa"]),
    "another first salt": change("salts", None, ["aa", "bb"]),
    "no hexadecimal digits": change("salts", None, [None, "xy"]),
    "a salt of a number": change("salts", None, [None, 7]),
    "another block size": change("block_size", None, 8),
    "a block size that is no number": change("block_size", None, "4"),
    "another number of groups": change("clocks", None, [1, 2]),
    "counters that are none": change("prompt_tokens", None, -1),
    "clocks that are no list": change("clocks", None, 5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_state_is_refused(name: str) -> None:
    numbers, arrays = dump(small())
    restore(KVCacheManager(16, block_size=4), numbers, arrays)  # as it is, it is sound
    HOSTILE[name](numbers, arrays)
    with pytest.raises(SnapshotError):
        restore(KVCacheManager(16, block_size=4), numbers, arrays)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_accepted_is_sound(seed: int) -> None:
    """Random damage: it is refused, or makes a manager that is whole and goes on."""
    rng = np.random.default_rng(seed)
    manager, driver = random_manager(seed)
    driver.run(200)
    numbers, arrays = dump(manager)
    options = {
        name: getattr(manager, name)
        for name in ("block_size", "max_sequences", "max_seq_len", "watermark")
    }
    pools = [LayerGroup(g.allocator.num_blocks, g.window or None) for g in manager.groups]
    accepted = refused = 0
    for _ in range(250):
        damaged = dict(arrays)
        for _ in range(rng.integers(1, 3)):
            name = str(rng.choice([name for name in arrays if damaged[name].size]))
            array = damaged[name] = damaged[name].copy()
            where = rng.integers(0, array.size)
            value = rng.choice([-2, -1, 0, 1, 2, 3, 8, 60, 2**31 - 1])
            array.flat[where] = np.int64(value).astype(array.dtype)
            if rng.random() < 0.3:
                array.flat[where] = array.flat[rng.integers(0, array.size)]
        other = KVCacheManager(groups=pools, **options)
        try:
            restore(other, numbers, damaged)
        except SnapshotError:
            refused += 1
            continue
        accepted += 1
        other.check_integrity()
        traffic = Traffic(other, seed, first_id=1000)
        traffic.alive = other.page_table.sequence_ids().tolist()
        traffic.run(30)
        other.check_integrity()
    assert accepted > 5
    assert refused > 50


def test_only_a_new_manager_is_restored() -> None:
    numbers, arrays = dump(small())
    manager = small()
    before = logical_state(manager)
    with pytest.raises(ValueError, match="never used"):
        restore(manager, numbers, arrays)
    with pytest.raises(TypeError, match="initialised already"):
        manager.__setstate__((numbers, arrays, None))
    assert logical_state(manager) == before


def test_a_larger_pool_takes_a_smaller_state() -> None:
    numbers, arrays = dump(small())
    manager = KVCacheManager(100, block_size=4)
    restore(manager, numbers, arrays)
    manager.check_integrity()
    assert manager.num_free_blocks == 100 - 5
    with pytest.raises(SnapshotError, match="more blocks than the pool has"):
        restore(KVCacheManager(7, block_size=4), numbers, arrays)


@pytest.mark.parametrize(
    "arguments",
    [
        (4, np.array([1, 1], np.uint64), np.array([1, 1]), np.array([5, 5], np.int32)),
        (4, np.array([1], np.uint64), np.array([2]), np.array([5], np.int32)),
        (4, np.array([1], np.uint64), np.array([0]), np.array([5], np.int32)),
        (4, np.array([1], np.uint64), np.array([-1]), np.array([], np.int32)),
        (4, np.array([1], np.uint64), np.array([1]), np.array([-2], np.int32)),
        (4, np.array([1]), np.array([1]), np.array([2], np.int32)),
        (4, [1], np.array([1]), np.array([2], np.int32)),
    ],
)
def test_a_hostile_page_table_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(SnapshotError):
        load_page_table(*arguments)


def test_a_hostile_allocator_is_refused() -> None:
    _, _, _, arrays = BlockAllocator(4).__reduce__()[1]
    with pytest.raises(SnapshotError, match="total_evictions"):
        load_allocator(4, 0, -1, arrays)
    arrays["kept"] = np.array([0], np.int32)
    with pytest.raises(SnapshotError, match="more kept blocks than blocks"):
        load_allocator(4, 0, 0, arrays)
    with pytest.raises(ValueError, match="num_blocks"):
        load_allocator(-4, 0, 0, arrays)
