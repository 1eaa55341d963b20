"""KVCacheManager when other code runs in the middle of a call: finalizers and threads."""

import gc
import sys
import threading
from functools import partial
from random import Random

import numpy as np
import pytest

from manager_checks import BY_ID, check_batch, manager_of
from rocmforge import KVCacheManager
from rocmforge.errors import OutOfBlocksError, UnknownSequenceError


class Finalized:
    """An object in a cycle, such as an engine's request, and what is done when it is collected."""

    def __init__(self, action):
        self.action, self.cycle = action, self

    def __del__(self):
        self.action()


def call_and_collect(call, delay):
    """Make the call with a garbage collection at the delay-th object that it creates.

    From Python 3.12 on the collection waits for the next bytecode: fewer calls meet it inside.
    """
    threshold = gc.get_threshold()
    gc.set_threshold(gc.get_count()[0] + delay)
    try:
        call()
    except (ValueError, KeyError, MemoryError):
        pass
    finally:
        gc.set_threshold(*threshold)


@pytest.fixture
def few_objects_to_collect():
    """What exists already is left out of collections, which are then a hundred times faster."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.untraced
@pytest.mark.usefixtures("few_objects_to_collect")
@pytest.mark.parametrize("num_requests", [1, 14])  # with 14 the table is full
@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.append([1, 10], 1),
        lambda m: m.append([1, 10, 2], 300),
        lambda m: m.append([1, 10, 999], 1),
        lambda m: m.append([1, 10, 1], 1),
        lambda m: m.append([1, 10, 2], [1, 1, 2**31 - 2]),
        lambda m: m.fork(1, 100),
        lambda m: m.fork(10, 100),
        lambda m: m.fork(1, 2),
        lambda m: m.add_sequence(100),
        lambda m: m.add_sequence(1),
        lambda m: m.stats(),
        lambda m: m.page_table.copy(),
        lambda m: m.page_table.block_table([1, 10]),
        lambda m: m.page_table.block_ids(10, np.empty(9, np.int32)),
        lambda m: m.page_table.slot_mapping([10], [1], out=np.empty(1, np.int64)),
        lambda m: m.page_table.get_sequence_blocks(10),
    ],
)
def test_a_finalizer_may_free_its_sequence_during_any_call(call, num_requests):
    for delay in range(12):  # the collection comes at each allocation of the call in turn
        manager = manager_of({1: 6, 2: 5})
        for child in range(10, 10 + num_requests):
            manager.fork(1, child)
            Finalized(partial(manager.free, child))
        call_and_collect(lambda manager=manager: call(manager), delay)
        manager.check_integrity()
        gc.collect()
        manager.check_integrity()
        assert 10 not in manager


@pytest.fixture
def while_the_table_grows(monkeypatch):
    """Run an action, once, at the place where growing the table lets other threads in."""

    def arrange(action):
        full = np.full

        def interrupted(*args, **kwargs):
            monkeypatch.setattr(np, "full", full)
            action()
            return full(*args, **kwargs)

        monkeypatch.setattr(np, "full", interrupted)

    return arrange


@pytest.mark.parametrize("num_added", [1, 19, 20, 21])  # 20 fill the room for ids exactly
@pytest.mark.parametrize("method", ["add_sequence", "fork to"])
def test_sequences_added_while_one_is_added(while_the_table_grows, method, num_added):
    manager = manager_of(dict.fromkeys(range(16), 5))
    added = range(100, 100 + num_added)
    while_the_table_grows(lambda: [manager.add_sequence(i) for i in added])
    BY_ID[method](manager, 50)
    manager.check_integrity()
    assert len(manager) == 17 + num_added


def test_the_parent_freed_while_it_is_forked(while_the_table_grows):
    manager = manager_of(dict.fromkeys(range(16), 5))
    while_the_table_grows(lambda: manager.free(0))
    with pytest.raises(UnknownSequenceError, match="sequence 0 is not in the cache"):
        manager.fork(0, 50)
    manager.check_integrity()
    assert len(manager) == 15


@pytest.mark.parametrize("method", ["add_sequence", "fork to"])
def test_the_same_id_added_while_it_is_added(while_the_table_grows, method):
    manager = manager_of(dict.fromkeys(range(16), 5))
    while_the_table_grows(lambda: manager.add_sequence(50))
    with pytest.raises(ValueError, match="sequence 50 is in the cache already"):
        BY_ID[method](manager, 50)
    manager.check_integrity()
    assert len(manager) == 17


def test_a_batch_is_planned_again_when_something_changed(while_the_table_grows):
    manager = manager_of({1: 6})
    manager.fork(1, 2)
    while_the_table_grows(lambda: manager.append([2], 1))  # now 1 holds its last block alone
    batch = manager.append([1], 100)
    check_batch(manager, batch, [1], [100])
    assert batch.copies.shape == (0, 2)

    manager.fork(1, 3)
    while_the_table_grows(lambda: manager.append([1], 2))
    batch = manager.append([1], 100)
    check_batch(manager, batch, [1], [100])
    assert batch.positions[0] == 108


@pytest.mark.parametrize("freed", [1, 2])
def test_a_sequence_freed_while_it_is_appended_to(while_the_table_grows, freed):
    manager = manager_of({1: 6, 2: 6})
    while_the_table_grows(lambda: manager.free(freed))
    with pytest.raises(UnknownSequenceError, match=f"sequence {freed} is not in the cache"):
        manager.append([1, 2], 80)
    manager.check_integrity()
    assert manager.seq_len(3 - freed) == 6


def test_blocks_taken_while_a_batch_is_made(while_the_table_grows):
    manager = manager_of({1: 6, 2: 6})
    while_the_table_grows(lambda: manager.append([1], 100))
    with pytest.raises(OutOfBlocksError, match="37 requested, 35 free"):
        manager.append([2], 148)
    manager.check_integrity()


# A traced build calls Python code at every line, and with it lets other threads in there.
needs_the_gil = pytest.mark.skipif(
    sys.gettrace() is not None, reason="line tracing makes a call divisible"
)


@needs_the_gil
@pytest.mark.parametrize("limits", [{}, {"max_sequences": 4 * 12, "max_seq_len": 480}])
def test_threads_on_one_manager(limits):
    """Several threads, each with sequences of its own, over one pool that runs out now and then."""
    manager = KVCacheManager(120, block_size=4, **limits)
    errors = []

    def work(number):
        random = Random(number)
        mine, pending = [], []
        try:
            for step in range(1500):
                action = random.random()
                try:
                    if len(mine) < 12 and action < 0.3:
                        sequence_id = number << 32 | step
                        if mine and action < 0.15:
                            manager.fork(random.choice(mine), sequence_id)
                        else:
                            manager.add_sequence(sequence_id)
                        mine.append(sequence_id)
                    elif mine and action < 0.75:
                        chosen = random.sample(mine, random.randint(1, len(mine)))
                        counts = [random.randint(1, 6) for _ in chosen]
                        batch = manager.append(chosen, counts)
                        expected = [manager.seq_len(i) for i in chosen]
                        assert batch.seq_lens.tolist() == expected
                        pending.append(batch)
                    elif mine and action < 0.9:
                        manager.free(mine.pop(random.randrange(len(mine))))
                    elif pending:
                        manager.commit(pending.pop(0))
                    else:
                        manager.stats()
                except OutOfBlocksError:
                    for _ in range(min(3, len(mine))):
                        manager.free(mine.pop())
                except ValueError as error:
                    if "commit in order" not in str(error) and "stale" not in str(error):
                        raise
            for sequence_id in mine:
                manager.free(sequence_id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        manager.stats()
        threads[0].join(0.001)
    for thread in threads:
        thread.join()
    assert errors == []
    manager.check_integrity()
    assert (len(manager), manager.num_free_blocks) == (0, 120)


@needs_the_gil
def test_threads_that_make_the_table_grow():
    manager = KVCacheManager(6000, block_size=1)
    errors = []

    def work(number):
        try:
            for step in range(300):
                sequence_id = step * 4 + number
                manager.add_sequence(sequence_id)
                manager.append([sequence_id], 1 + step % 7)
                if step % 3:
                    manager.fork(sequence_id, 10_000 + sequence_id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(manager) == 4 * 500
    manager.check_integrity()
