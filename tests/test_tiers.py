"""Blocks that leave a cache and come back: read_blocks, insert_prefix, suspend, resume."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cache_traffic import CacheTraffic, random_cache, small_cache
from rocmforge import KVCache, KVCacheManager, tiers
from rocmforge.errors import InvalidBlockError, OutOfBlocksError, UnknownSequenceError
from rocmforge.placement import describe, place, publish
from rocmforge.snapshot import construct
from traffic import Traffic, logical_state, random_manager

PROMPT = list(range(100, 121))  # 21 tokens: five blocks of four and one more


def computed(num_blocks: int = 16, **options: Any) -> tuple[KVCache, CacheTraffic]:
    """A cache that has computed PROMPT as sequence 1, with contents that tell their tokens."""
    cache = small_cache(0, num_layers=2, block_size=4, num_blocks=num_blocks, **options)
    traffic = CacheTraffic(cache, 0)
    traffic.random.random = lambda: 1.0  # type: ignore[method-assign]  # no step fails
    begin(traffic, 1, PROMPT)
    return cache, traffic


def begin(traffic: CacheTraffic, sequence: int, prompt: list[int]) -> int:
    found = traffic.cache.add_sequence(sequence, prompt)
    traffic.alive.append(sequence)
    traffic.tokens[sequence] = [0, *prompt]
    if len(prompt) > found:
        traffic.wrote(traffic.cache.append([sequence], len(prompt) - found))
    return found


def empty_like(cache: KVCache, **options: Any) -> KVCache:
    return construct(KVCache, cache._construction(), options)


# ---- read_blocks ----


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_row_is_all_layers_of_a_block(layout: str) -> None:
    cache, _ = computed(layout=layout)
    rows = cache.read_blocks([3, 0, 3])
    assert rows.shape == (3, cache.block_nbytes)
    assert (rows[0] == rows[2]).all()
    for row, block in zip(rows, (3, 0, 3), strict=True):
        parts = [part for layer in range(2) for part in cache.block_data(layer, block)]
        assert row.tobytes() == b"".join(part.tobytes() for part in parts)


def test_out_may_have_any_strides() -> None:
    cache, _ = computed()
    expected = cache.read_blocks(range(6))
    out = np.zeros((12, cache.block_nbytes + 5), np.uint8)
    view = out[::2, 3:-2]
    assert cache.read_blocks(np.arange(6, dtype=np.uint8), view) is view
    assert (view == expected).all()
    assert not out[1::2].any()
    assert cache.read_blocks([]).shape == (0, cache.block_nbytes)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([16], {}, InvalidBlockError, r"block 16: expected 0 \.\. 15"),
        ([0, -1], {}, InvalidBlockError, "block -1"),
        ([1.5], {}, TypeError, "ids: expected integers"),
        (["x"], {}, TypeError, "ids: expected integers"),
        ([[1]], {}, ValueError, "ids: expected one dimension"),
        ([1], {"group": 1}, ValueError, r"group: expected 0 \.\. 0, got 1"),
        ([1], {"out": np.zeros((1, 3), np.uint8)}, ValueError, "out: expected uint8"),
        ([1], {"out": b"x"}, TypeError, "out: expected a NumPy array"),
    ],
)
def test_bad_reads(ids: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    cache, _ = computed()
    with pytest.raises(error, match=message):
        cache.read_blocks(ids, **options)


def test_a_read_only_out_is_refused() -> None:
    cache, _ = computed()
    out = cache.read_blocks([0])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writable array"):
        cache.read_blocks([0], out)


# ---- insert_prefix ----

WAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda rows: rows,
    "bytes": lambda rows: rows.tobytes(),
    "generator": lambda rows: (row for row in rows),
    "list of bytes": lambda rows: [row.tobytes() for row in rows],
    "strided": lambda rows: np.repeat(rows, 2, axis=0)[::2],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_inserted_is_found_elsewhere(way: str) -> None:
    cache, traffic = computed()
    rows = cache.read_blocks(cache.page_table.block_ids(1)[:5])
    other = empty_like(cache)
    assert other.insert_prefix(PROMPT, WAYS[way](rows)) == 20
    other.check_integrity()
    assert len(other) == 0
    assert other.match_prefix(PROMPT) == 20
    assert other.match_prefix(PROMPT, salt="other") == 0
    assert other.stats().cached_blocks == 5
    assert other.add_sequence(1, PROMPT) == 20
    traffic.check(other)


def test_what_is_cached_already_stays() -> None:
    cache, traffic = computed()
    begin(traffic, 2, [*PROMPT[:8], 1, 2, 3])
    rows = cache.read_blocks(cache.page_table.block_ids(1)[:5])
    other = empty_like(cache)
    some = CacheTraffic(other, 0)
    some.random.random = lambda: 1.0  # type: ignore[method-assign]
    begin(some, 5, [*PROMPT[:8], 1, 2, 3])
    other.free(5)
    damaged = rows.copy()
    damaged[:2] = 7  # of blocks that are there: not looked at
    assert other.insert_prefix(PROMPT, damaged) == 20
    other.check_integrity()
    other.add_sequence(1, PROMPT)
    other.add_sequence(2, [*PROMPT[:8], 1, 2, 3])
    traffic.check(other)


def test_priority_and_salt() -> None:
    cache, _ = computed(num_blocks=16)
    rows = cache.read_blocks(cache.page_table.block_ids(1)[:5])
    other = empty_like(cache, num_blocks=11)
    other.insert_prefix(PROMPT, rows, "tenant", priority=5)
    other.insert_prefix([9] * 20, rows)
    other.add_sequence(1)
    other.append([1], 6 * 4)
    assert other.match_prefix(PROMPT, "tenant") == 20  # of a higher priority: evicted later
    assert other.match_prefix([9] * 21) == 0


class Broken(Exception):
    """The other tier went away."""


def breaking(rows: np.ndarray, seen: list[int], cache: KVCache) -> Iterator[np.ndarray]:
    for row in rows[:3]:
        seen.append(cache.match_prefix(PROMPT))
        cache.check_integrity()
        yield row
    raise Broken


def test_a_failed_fill_publishes_nothing() -> None:
    cache, _ = computed()
    rows = cache.read_blocks(cache.page_table.block_ids(1)[:5])
    other = empty_like(cache)
    before = other.stats()
    seen: list[int] = []
    with pytest.raises(Broken):
        other.insert_prefix(PROMPT, breaking(rows, seen, other))
    assert seen == [0, 0, 0]  # nothing is found while it is filled
    other.check_integrity()
    assert other.match_prefix(PROMPT) == 0
    after = other.stats()
    assert (after.free_blocks, after.cached_blocks, len(other)) == (before.free_blocks, 0, 0)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda rows: rows[:4], ValueError, r"data: expected uint8 \(5, "),
        (lambda rows: rows[:, :-1], ValueError, "data: expected uint8"),
        (lambda rows: rows.astype(np.int8), ValueError, "data: expected uint8"),
        (lambda rows: rows.tobytes()[:-1], ValueError, "bytes, got"),
        (lambda rows: iter(rows[:4]), ValueError, "data: expected 5 blocks, got 4"),
        (lambda rows: [rows[0], rows[1][:-1]], ValueError, r"data\[1\]: expected"),
        (lambda rows: [None], TypeError, r"data\[0\]: expected a buffer"),
        (lambda rows: 5, TypeError, "data: expected an array or buffers"),
    ],
)
def test_bad_data(data: Any, error: type[Exception], message: str) -> None:
    cache, _ = computed()
    rows = cache.read_blocks(cache.page_table.block_ids(1)[:5])
    other = empty_like(cache)
    with pytest.raises(error, match=message):
        other.insert_prefix(PROMPT, data(rows))
    other.check_integrity()
    assert (len(other), other.stats().cached_blocks, other.match_prefix(PROMPT)) == (0, 0, 0)


def test_inserts_that_have_no_room() -> None:
    cache, _ = computed()
    rows = cache.read_blocks(cache.page_table.block_ids(1)[:5])
    for options, error in (
        ({"num_blocks": 4}, OutOfBlocksError),
        ({"num_blocks": 6, "watermark": 2}, OutOfBlocksError),
        ({"max_sequences": 1}, ValueError),
        ({"max_seq_len": 19}, ValueError),
    ):
        other = empty_like(cache, **options)
        other.add_sequence(tiers.FILLING)
        before = logical_state(other)
        with pytest.raises(error):
            other.insert_prefix(PROMPT, rows)
        assert logical_state(other) == before
    assert empty_like(cache).insert_prefix([1, 2, 3], rows[:0]) == 0
    assert empty_like(cache, prefix_caching=False).insert_prefix(PROMPT, rows) == 0


def test_a_prefix_freed_by_somebody_while_it_is_filled() -> None:
    cache, _ = computed()
    rows = cache.read_blocks(cache.page_table.block_ids(1)[:5])
    other = empty_like(cache)

    def data() -> Iterator[np.ndarray]:
        yield rows[0]
        other.free(other.page_table.sequence_ids())
        other.add_sequence(3)
        other.append([3], 60)
        yield from rows[1:]

    with pytest.raises(ValueError, match="freed while they were filled"):
        other.insert_prefix(PROMPT, data())
    other.check_integrity()
    assert not other.read_blocks(range(1, 15)).any()  # nobody's blocks were written to


# ---- suspend and resume ----


@pytest.mark.parametrize("seed", range(30))
def test_sequences_come_back_as_they_were(seed: int) -> None:
    cache, traffic = random_cache(seed, steps=120, num_blocks=90)
    rng = np.random.default_rng(seed)
    refused: list[int] = []
    for _ in range(15):
        traffic.run(10)
        traffic.forget_batches()
        if not traffic.alive:
            continue
        some = rng.choice(traffic.alive, min(3, len(traffic.alive)), replace=False).tolist()
        before = {i: (cache.seq_len(i), cache.committed_len(i)) for i in some}
        buffers = {i: cache.suspend(i) for i in some}
        cache.check_integrity()
        assert not set(some) & set(cache.page_table.sequence_ids().tolist())
        if rng.random() < 0.5:  # others come in between
            filler = 10**9
            cache.add_sequence(filler)
            room = cache.num_free_blocks
            if room:
                cache.append([filler], int(rng.integers(1, room + 1)) * cache.block_size)
            cache.free(filler)
        if seed % 3 == 0:
            cache.reset_prefix_cache()
            traffic.pinned.clear()
        for i in some:
            buffer = pickle.loads(pickle.dumps(buffers[i])) if rng.random() < 0.3 else buffers[i]
            state = logical_state(cache)
            try:
                found = cache.resume(i, buffer)
            except OutOfBlocksError:  # it shared blocks that were not published
                assert logical_state(cache) == state
                traffic.alive.remove(i)
                refused.append(i)
                continue
            assert 0 <= found <= before[i][1]
            assert seed % 3 or found == 0
            assert (cache.seq_len(i), cache.committed_len(i)) == before[i]
            cache.check_integrity()
        assert traffic.check() >= 0
    assert len(refused) < 10
    traffic.run(60)
    cache.check_integrity()
    traffic.check()


def test_a_sequence_that_came_back_goes_on_and_is_found() -> None:
    cache, traffic = computed()
    buffer = cache.suspend(1)
    assert buffer.nbytes == 6 * cache.block_nbytes
    assert len(cache) == 0
    assert cache.match_prefix(PROMPT) == 20  # given up as by free
    cache.add_sequence(2, [7] * 64)
    cache.append([2], 64)  # evicts all of it
    assert cache.match_prefix(PROMPT) == 0
    before = logical_state(cache)
    with pytest.raises(OutOfBlocksError):
        cache.resume(1, buffer)
    assert logical_state(cache) == before
    cache.free(2)
    assert cache.resume(1, buffer) == 0
    cache.check_integrity()
    assert traffic.check() == 21
    assert cache.match_prefix([*PROMPT, 1]) == 20
    other = cache.suspend(1)
    assert cache.resume(1, other) == 20  # nothing needed to be copied
    traffic.append()
    assert traffic.check() > 21


def test_of_another_cache_and_after_a_reset_nothing_is_shared() -> None:
    cache, traffic = computed()
    buffer = cache.suspend(1)
    other = empty_like(cache)
    assert other.resume(1, buffer) == 0
    traffic.check(other)
    assert other.match_prefix(PROMPT) == 0
    cache.reset_prefix_cache()
    assert cache.resume(1, buffer) == 0
    assert cache.match_prefix(PROMPT) == 0
    traffic.check()
    cache.check_integrity()


def test_bad_suspend_and_resume() -> None:
    cache, _ = computed()
    with pytest.raises(UnknownSequenceError):
        cache.suspend(99)
    buffer = cache.suspend(1)
    with pytest.raises(TypeError, match="buffer: expected a SuspendedSequence, got bytes"):
        cache.resume(1, b"")  # type: ignore[arg-type]
    for options in ({"head_dim": 16}, {"block_size": 8}, {"num_layers": 3}, {"layout": "x"}):
        shape = {
            "num_layers": 2, "num_blocks": 16, "num_kv_heads": cache.num_kv_heads, "head_dim": 8,
            "block_size": 4, "dtype": cache.dtype, "layout": cache.layout,
        }  # fmt: skip
        if "layout" in options:
            options["layout"] = "NHD" if cache.layout == "HND" else "HND"
            shape["num_kv_heads"] = cache.num_kv_heads + 1
        other = KVCache(**shape | options)
        with pytest.raises(ValueError, match="blocks are others"):
            other.resume(1, buffer)
    cache.add_sequence(1)
    with pytest.raises(ValueError, match="sequence 1 is in the cache already"):
        cache.resume(1, buffer)
    for change in ({"length": 100}, {"firsts": (1,)}, {"data": (buffer.data[0][:, 1:],)}):
        damaged = type(buffer)(**{n: getattr(buffer, n) for n in buffer.__slots__} | change)
        with pytest.raises(ValueError, match="buffer: expected uint8"):
            cache.resume(2, damaged)
    cache.check_integrity()
    assert len(cache) == 1


# ---- with windows, on a manager ----


@pytest.mark.parametrize("seed", range(40))
def test_placing_what_was_described(seed: int) -> None:
    manager, traffic = random_manager(seed)
    for _ in range(10):
        traffic.run(20)
        traffic.forget_batches()
        if not traffic.alive:
            continue
        sequence = traffic.pick()
        found = describe(manager, sequence)
        firsts = [
            int((blocks >= 0).argmax()) if (blocks >= 0).any() else len(blocks)
            for blocks in found["blocks"]
        ]
        manager.free(sequence)
        before = logical_state(manager)
        try:
            shared, lists, version = place(
                manager, sequence, found["token_ids"], found["salt"], found["priority"],
                found["length"], found["committed"], firsts, found["shares"], found["started"],
            )  # fmt: skip
        except OutOfBlocksError:  # it shared blocks that were not published
            assert logical_state(manager) == before
            traffic.alive.remove(sequence)
            continue
        manager.check_integrity()
        publish(manager, sequence, version)
        manager.check_integrity()
        assert manager.seq_len(sequence) == found["length"]
        assert manager.committed_len(sequence) == found["committed"]
        again = describe(manager, sequence)
        assert (again["token_ids"] == found["token_ids"]).all()
        assert (again["salt"], again["shares"]) == (found["salt"], found["shares"])
        for blocks, group, first in zip(lists, manager.groups, firsts, strict=True):
            assert len(blocks) == -(-found["length"] // manager.block_size)
            needed = max(0, found["committed"] - group.window + 1) if group.window else 0
            assert (blocks[needed // manager.block_size :] >= 0).all()
            assert (blocks[shared:first] < 0).all()
        with pytest.raises(ValueError, match="freed or truncated"):
            publish(manager, sequence, version + 1)
    traffic.run(50)
    manager.check_integrity()


@pytest.mark.parametrize(
    "change",
    [
        {"length": -1}, {"length": 10**6}, {"committed": 9}, {"committed": -1}, {"priority": 8},
        {"firsts": [0, 0]}, {"firsts": [1]}, {"firsts": [-1]}, {"token_ids": [2**40]},
        {"sequence_id": 5}, {"salt": 7}, {"token_ids": [1] * 101},
    ],
)  # fmt: skip
def test_bad_places_change_nothing(change: dict[str, Any]) -> None:
    manager = KVCacheManager(8, block_size=4, max_seq_len=100)
    manager.add_sequence(5, [1, 2, 3])
    before = logical_state(manager)
    arguments: dict[str, Any] = {
        "sequence_id": 1, "token_ids": [1] * 8, "salt": None, "priority": 0, "length": 8,
        "committed": 8, "firsts": [0], "shares": True, "started": True,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError)):
        place(manager, *(arguments | change).values())
    assert logical_state(manager) == before
    manager.check_integrity()


def test_threads_that_suspend_and_resume() -> None:
    """Each with sequences of its own, on one cache that runs out of blocks now and then."""
    cache = small_cache(1, num_layers=2, block_size=4, num_blocks=60, dtype="float32")

    def work(number: int) -> None:
        traffic = CacheTraffic(cache, number, first_id=number * 10**6, max_alive=4)
        traffic.WEIGHTS = Traffic.WEIGHTS | {"reset": 0, "pin": 0, "unpin": 0}  # type: ignore[misc]
        for _ in range(40):
            traffic.run(8)
            if not traffic.alive:
                continue
            traffic.suspend_and_resume()
            traffic.check()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(1, 5)))
    cache.check_integrity()
    assert isinstance(cache, KVCacheManager)
