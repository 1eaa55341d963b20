"""Many threads on one object of each public kind: nothing is lost, nothing is torn.

What the threads may not do is not told to them: they call whatever there is, with sequences of
their own where one's would be in the other's way. CI runs it under the thread sanitizer, too.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from cache_traffic import CacheTraffic, small_cache
from rocmforge import BlockAllocator, KVCache, KVCacheManager, LayerGroup, PageTable
from rocmforge.errors import OutOfBlocksError
from traffic import Traffic

# A traced build calls Python code at every line, and with it lets other threads in there.
pytestmark = pytest.mark.untraced
SECONDS = 1.0


@pytest.fixture(autouse=True, params=["at bytecodes", "at collections"])
def others_come_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads switch often; also where an object is made, as a finalizer there may let others in.

    Up to Python 3.11 the garbage collector runs where an object is made that it counts, in the
    middle of a compiled function, too. A full collection empties the lists of objects to be used
    again, so that what follows is made anew.
    """
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-5)

    def let_in(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop" and info["generation"] == 2:
            time.sleep(1e-6)

    if request.param == "at collections":
        gc.collect()
        gc.freeze()  # what exists already is not looked at
        gc.collect()
        gc.callbacks.append(let_in)
        gc.set_threshold(1, 0, 0)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)
    if let_in in gc.callbacks:
        gc.callbacks.remove(let_in)
        gc.unfreeze()


def together(*work: Callable[[int, Callable[[], bool]], None]) -> None:
    """Run each function in a thread, with its number and a question whether to go on."""
    failures: list[BaseException] = []
    end = time.monotonic() + SECONDS

    def run(number: int, function: Callable[[int, Callable[[], bool]], None]) -> None:
        try:
            function(number, lambda: time.monotonic() < end and not failures)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_page_table() -> None:
    table = PageTable(4)

    def work(number: int, goes_on: Callable[[], bool]) -> None:
        random = Random(number)
        mine: dict[int, list[int]] = {}
        while goes_on():
            sequence = number * 1000 + random.randrange(30)
            blocks = [random.randrange(99) for _ in range(random.randrange(8))]
            table.append_blocks(sequence, blocks)
            mine.setdefault(sequence, []).extend(blocks)
            other = random.choice(list(mine))
            assert table.block_ids(other).tolist() == mine[other]
            if len(mine[other]) > 40:
                table.truncate(other, 3)
                del mine[other][3:]
            if random.random() < 0.2:
                assert table.remove_sequence(other)
                del mine[other]

    def look(number: int, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            copied = pickle.loads(pickle.dumps(table))
            copied.check_integrity()
            assert table.copy().block_size == 4

    together(work, work, work, look)
    table.check_integrity()


def test_allocator() -> None:
    pool = BlockAllocator(200)

    def work(number: int, goes_on: Callable[[], bool]) -> None:
        random = Random(number)
        held: list[int] = []
        while goes_on():
            with contextlib.suppress(OutOfBlocksError):
                held += pool.allocate_blocks(random.randrange(20)).tolist()
            assert len(set(held)) == len(held)
            if held and random.random() < 0.5:
                some = [held.pop() for _ in range(random.randint(1, len(held)))]
                pool.deallocate_blocks(some, keep=random.random() < 0.5)
        pool.deallocate_blocks(held)

    def look(number: int, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            pool.take_evicted()
            pickle.loads(pickle.dumps(pool)).check_integrity()

    together(work, work, work, look)
    pool.check_integrity()
    assert pool.get_free_count() + pool.num_kept == 200


@pytest.mark.parametrize("windowed", [False, True])
def test_manager(windowed: bool) -> None:
    groups = [LayerGroup(120), LayerGroup(90, window=6)] if windowed else [LayerGroup(120)]
    manager = KVCacheManager(block_size=4, groups=groups)
    manager.enable_events(1000)

    def work(number: int, goes_on: Callable[[], bool]) -> None:
        traffic = Traffic(manager, number, first_id=number * 10**6, max_alive=8)
        while goes_on():
            traffic.run(20)
        manager.free(traffic.alive)

    def look(number: int, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            stats = manager.stats()
            assert stats.used_blocks + stats.free_blocks == stats.num_blocks
            manager.take_events()
            pickle.loads(pickle.dumps(manager)).check_integrity()

    together(work, work, work, look)
    manager.check_integrity()
    assert len(manager) == 0
    assert manager.stats().used_blocks == manager.stats().pinned_blocks


def test_cache(tmp_path: Path) -> None:
    """Steps, suspensions, insertions, snapshots and reads, and every key is where it belongs."""
    cache = small_cache(2, num_layers=2, block_size=4, num_blocks=90, dtype="float32")

    def work(number: int, goes_on: Callable[[], bool]) -> None:
        traffic = CacheTraffic(cache, number, first_id=number * 10**6, max_alive=5)
        traffic.WEIGHTS = Traffic.WEIGHTS | {"reset": 0}  # type: ignore[misc]
        while goes_on():
            traffic.run(10)
            traffic.check()
            if traffic.alive:
                traffic.suspend_and_resume()
        cache.free(traffic.alive)

    def keep(number: int, goes_on: Callable[[], bool]) -> None:
        rows = np.zeros((3, cache.block_nbytes), np.uint8)
        path = tmp_path / str(number)
        count = 0
        while goes_on():
            count += 1
            cache.save(path)
            KVCache.load(path).check_integrity()
            cache.read_blocks([0, 5, 80], rows)
            with contextlib.suppress(OutOfBlocksError):
                cache.insert_prefix([7000 + number] * 12, (row for row in rows))
            cache.stats()

    together(work, work, work, keep)
    cache.check_integrity()
    assert len(cache) == 0


def test_attention_beside_steps() -> None:
    """Long work lets the others go on, and sees the keys of its own batch only."""
    cache = KVCache(1, 256, 2, 64, block_size=16, dtype="float32")

    def work(number: int, goes_on: Callable[[], bool]) -> None:
        rng = np.random.default_rng(number)
        while goes_on():
            cache.add_sequence(number)
            values = rng.standard_normal((300, 2, 64), np.float32)
            batch = cache.append([number], 300)
            cache.write(0, np.zeros_like(values), values, batch)  # all keys alike: a mean
            query = rng.standard_normal((300, 4, 64), np.float32)
            out = cache.attend(0, query, batch)
            means = np.cumsum(values, axis=0) / np.arange(1, 301)[:, None, None]
            np.testing.assert_allclose(out, np.repeat(means, 2, axis=1), atol=1e-4)
            cache.free(number)

    together(work, work, work)
    cache.check_integrity()
