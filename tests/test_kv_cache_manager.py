"""KVCacheManager: sequences over shared blocks, and the batches that extend them."""

from random import Random

import numpy as np
import pytest

from manager_checks import blocks_of, check_batch, manager_of
from metadata_state import raises_unchanged
from rocmforge import Batch, KVCacheManager
from rocmforge.errors import OutOfBlocksError, UnknownSequenceError

LARGEST_ID = 2**64 - 1


# ---- sequences ----


def test_a_new_manager():
    manager = KVCacheManager(10)
    assert (manager.num_blocks, manager.block_size, manager.num_free_blocks) == (10, 16, 10)
    assert (manager.max_sequences, manager.max_seq_len, manager.table_epoch) == (None, None, 0)
    assert len(manager) == 0
    assert repr(manager) == (
        "KVCacheManager(num_blocks=10, block_size=16, num_sequences=0, num_free_blocks=10)"
    )
    manager.check_integrity()


@pytest.mark.parametrize("sequence_id", [0, 7, 2**63, LARGEST_ID, np.uint64(LARGEST_ID)])
def test_life_of_a_sequence(sequence_id):
    manager = KVCacheManager(10, block_size=4)
    assert manager.add_sequence(sequence_id) == 0
    assert sequence_id in manager
    assert (manager.seq_len(sequence_id), manager.committed_len(sequence_id)) == (0, 0)
    assert manager.num_free_blocks == 10
    batch = manager.append([sequence_id], 5)
    assert (manager.seq_len(sequence_id), manager.committed_len(sequence_id)) == (5, 0)
    assert manager.num_free_blocks == 8
    assert manager.commit(batch) is None
    assert batch.committed
    assert manager.committed_len(sequence_id) == 5
    assert manager.free(sequence_id) is None
    assert sequence_id not in manager
    assert (len(manager), manager.num_free_blocks) == (0, 10)
    manager.check_integrity()


def test_a_freed_id_starts_anew():
    manager = manager_of({1: 9, 2: 3})
    manager.free(1)
    manager.add_sequence(1)
    assert (manager.seq_len(1), manager.committed_len(1)) == (0, 0)
    assert blocks_of(manager, 1) == []


# ---- append ----


@pytest.mark.parametrize("block_size", [1, 7, 16, 256])
@pytest.mark.parametrize("first", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("second", [1, 16, 33])
def test_append_around_block_boundaries(block_size, first, second):
    manager = KVCacheManager(1024, block_size=block_size)
    for sequence_id in (5, 6):
        manager.add_sequence(sequence_id)
    check_batch(manager, manager.append([5, 6], first), [5, 6], [first, first])
    check_batch(manager, manager.append([6, 5], second), [6, 5], [second, second])
    blocks = -(-(first + second) // block_size)
    assert manager.num_free_blocks == 1024 - 2 * blocks


@pytest.mark.parametrize(
    ("ids", "counts"),
    [
        ([3, 1, LARGEST_ID], [4, 1, 30]),
        ((3, 1), (1, 9)),
        (range(1, 4, 2), np.array([2, 3], np.uint8)),
        (np.array([3, 1], np.uint64), np.array([2, 3], np.int64)),
        (np.array([3, 1], np.int64), [np.int8(2), np.uint64(3)]),
        (np.array([1, 9, 3], np.int32)[::2], np.array([5, 0, 6])[::2]),
    ],
    ids=repr,
)
def test_append_takes_any_sequences_of_integers(ids, counts):
    manager = manager_of({1: 3, 3: 0, LARGEST_ID: 5})
    batch = manager.append(ids, counts)
    check_batch(manager, batch, [int(i) for i in ids], [int(n) for n in counts])


@pytest.mark.parametrize("count", [3, np.int64(3), np.uint8(3), np.array(3)], ids=repr)
def test_append_one_number_for_all(count):
    manager = manager_of({1: 3, 2: 0})
    check_batch(manager, manager.append([1, 2], count), [1, 2], [3, 3])


@pytest.mark.parametrize("count", [1, []])
def test_an_empty_batch(count):
    manager = manager_of({1: 3})
    batch = manager.append([], count)
    assert (batch.num_tokens, len(batch), batch.max_seqlen_q, batch.max_seq_len) == (0, 0, 0, 0)
    assert batch.cu_seqlens_q.tolist() == [0]
    assert batch.copies.shape == (0, 2)
    assert batch.slot_mapping.shape == batch.positions.shape == batch.rows.shape == (0,)
    manager.commit(batch)
    manager.check_integrity()


def test_a_batch_keeps_its_arrays():
    manager = manager_of({1: 3, 2: 3})
    ids = np.array([1, 2], np.uint64)
    batch = manager.append(ids, 2)
    names = ("sequence_ids", "rows", "seq_lens", "cu_seqlens_q", "positions", "slot_mapping")
    before = {name: getattr(batch, name).tolist() for name in names}
    ids[:] = 9
    manager.append([2, 1], 30)
    manager.fork(1, 3)
    manager.append([1, 3], 1)
    manager.free(1)
    assert {name: getattr(batch, name).tolist() for name in names} == before
    for name in (*names, "copies", "block_table", "num_tokens", "committed"):
        with pytest.raises(AttributeError):
            setattr(batch, name, None)


def test_repr_of_a_batch():
    manager = manager_of({1: 3, 2: 0})
    assert repr(manager.append([1, 2], [1, 5])) == (
        "Batch(num_seqs=2, num_tokens=6, max_seqlen_q=5, max_seq_len=5, "
        "num_copies=0, committed=False)"
    )


def test_a_batch_is_made_by_append_only():
    with pytest.raises(TypeError, match="a Batch is made by append"):
        Batch()


def test_all_blocks_can_be_used():
    manager = manager_of({1: 0, 2: 0}, num_blocks=6)
    manager.append([1, 2], 12)
    assert manager.num_free_blocks == 0
    manager.check_integrity()
    manager.free(1)
    assert manager.num_free_blocks == 3
    manager.append([2], 12)
    manager.check_integrity()


# ---- fork and copy-on-write ----


@pytest.mark.parametrize("length", [0, 1, 4, 7, 8])
def test_fork_shares_all_blocks(length):
    manager = manager_of({1: length})
    free = manager.num_free_blocks
    assert manager.fork(1, 2) is None
    assert manager.num_free_blocks == free
    assert blocks_of(manager, 2) == blocks_of(manager, 1)
    assert (manager.seq_len(2), manager.committed_len(2)) == (length, length)
    manager.check_integrity()
    manager.free(1)
    assert (manager.num_free_blocks, manager.seq_len(2)) == (free, length)
    manager.free(2)
    assert manager.num_free_blocks == 64


@pytest.mark.parametrize("writer", [1, 2])
def test_the_first_write_into_a_shared_block_gets_a_copy(writer):
    manager = manager_of({1: 6})  # blocks 0 and 1; the second holds 2 tokens
    manager.fork(1, 2)
    other = 3 - writer
    batch = manager.append([writer], 1)
    check_batch(manager, batch, [writer], [1])
    (_, copied) = blocks_of(manager, writer)
    assert batch.copies.tolist() == [[1, copied]]
    assert copied != 1
    assert blocks_of(manager, other) == [0, 1]
    assert manager.append([writer], 1).copies.shape == (0, 2)
    batch = manager.append([other], 1)  # the only holder now: in place
    assert batch.copies.shape == (0, 2)
    assert blocks_of(manager, other) == [0, 1]


def test_no_copy_at_a_block_boundary():
    manager = manager_of({1: 8})
    manager.fork(1, 2)
    batch = manager.append([1, 2], 1)
    assert batch.copies.shape == (0, 2)
    assert blocks_of(manager, 1)[:2] == blocks_of(manager, 2)[:2] == [0, 1]
    assert blocks_of(manager, 1)[2] != blocks_of(manager, 2)[2]
    manager.check_integrity()


@pytest.mark.parametrize("num_siblings", [2, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_of_siblings_in_one_batch_the_last_writes_in_place(num_siblings, num_tokens):
    manager = manager_of({0: 6})
    ids = list(range(num_siblings))
    for child in ids[1:]:
        manager.fork(0, child)
    batch = manager.append(ids[::-1], num_tokens)
    check_batch(manager, batch, ids[::-1], [num_tokens] * num_siblings)
    copies = batch.copies.tolist()
    assert [source for source, _ in copies] == [1] * (num_siblings - 1)
    lasts = [blocks_of(manager, i)[1] for i in ids[::-1]]
    assert lasts == [destination for _, destination in copies] + [1]
    assert len(set(lasts)) == num_siblings
    assert {blocks_of(manager, i)[0] for i in ids} == {0}
    assert manager.append(ids, 1).copies.shape == (0, 2)


def test_siblings_of_whom_one_stays_behind_are_all_copied():
    manager = manager_of({0: 6})
    for child in (1, 2):
        manager.fork(0, child)
    assert len(manager.append([1, 2], 1).copies) == 2
    assert blocks_of(manager, 0) == [0, 1]
    manager.check_integrity()


def test_two_families_in_one_batch():
    manager = manager_of({1: 6, 2: 3})
    manager.fork(1, 11)
    manager.fork(2, 12)
    batch = manager.append([1, 2, 11, 12], 1)
    check_batch(manager, batch, [1, 2, 11, 12], [1] * 4)
    assert [source for source, _ in batch.copies.tolist()] == [1, 2]


def test_a_fork_of_a_fork():
    manager = manager_of({1: 6})
    manager.fork(1, 2)
    manager.append([2], 1)
    manager.fork(2, 3)
    assert blocks_of(manager, 3) == blocks_of(manager, 2) != blocks_of(manager, 1)
    assert len(manager.append([2, 3], 1).copies) == 1
    manager.check_integrity()


def test_a_copy_needs_a_block_of_its_own():
    manager = manager_of({1: 6}, num_blocks=2)
    manager.fork(1, 2)
    with raises_unchanged(manager, OutOfBlocksError, "out of blocks: 1 requested, 0 free"):
        manager.append([2], 1)
    with raises_unchanged(manager, OutOfBlocksError, "out of blocks: 1 requested, 0 free"):
        manager.append([1, 2], 1)
    manager.free(1)
    assert manager.append([2], 1).copies.shape == (0, 2)


# ---- commit ----


def test_batches_are_committed_in_order():
    manager = manager_of({1: 2, 2: 0})
    first, second = manager.append([1], 3), manager.append([2, 1], 3)
    message = "batch: it begins at token 5 of sequence 1, of which 2 are committed: commit in order"
    with raises_unchanged(manager, ValueError, message):
        manager.commit(second)
    assert not second.committed
    assert manager.committed_len(2) == 0
    manager.commit(first)
    manager.commit(second)
    assert (manager.committed_len(1), manager.committed_len(2)) == (8, 3)


def test_a_batch_is_committed_once():
    manager = manager_of({1: 0})
    batch = manager.append([1], 3)
    manager.commit(batch)
    with raises_unchanged(manager, ValueError, "batch: it was committed already"):
        manager.commit(batch)


@pytest.mark.parametrize("again", ["gone", "added", "forked"])
def test_a_batch_of_a_freed_sequence_is_stale(again):
    manager = manager_of({1: 0, 2: 0, 3: 4})
    batch = manager.append([1, 2], 3)
    manager.free(2)
    if again == "added":
        manager.add_sequence(2)
        manager.append([2], 3)
    elif again == "forked":
        manager.fork(3, 2)
    with raises_unchanged(
        manager, ValueError, "batch: stale, sequence 2 was freed or truncated since"
    ):
        manager.commit(batch)
    assert not batch.committed
    assert manager.committed_len(1) == 0


def test_a_batch_is_stale_when_its_block_was_copied_away():
    manager = manager_of({1: 2})
    batch = manager.append([1], 2)  # token 2 and 3 of block 0, not written yet
    manager.append([1], 2)
    manager.fork(1, 2)
    manager.append([1], 1)
    with raises_unchanged(manager, ValueError, "batch: stale"):
        manager.commit(batch)


def test_a_batch_of_another_manager():
    manager, other = manager_of({1: 0}), manager_of({1: 0})
    batch = other.append([1], 3)
    with raises_unchanged(manager, ValueError, "batch: it was made by another cache"):
        manager.commit(batch)
    with raises_unchanged(manager, ValueError, "batch: it was made by another cache"):
        manager.commit(Batch.__new__(Batch))
    other.commit(batch)


@pytest.mark.parametrize("bad", [None, 1, "batch", object()], ids=repr)
def test_no_batch(bad):
    manager = manager_of({1: 3})
    with raises_unchanged(manager, TypeError, "batch: expected a Batch, got " + type(bad).__name__):
        manager.commit(bad)


# ---- the block table ----


def test_the_table_grows_and_the_epoch_counts():
    manager = KVCacheManager(4096, block_size=1)
    epoch, table = manager.table_epoch, manager.block_table
    moves = 0
    for sequence_id in range(100):
        manager.add_sequence(sequence_id)
        manager.append([sequence_id], 30)
        if manager.block_table is not table:
            moves += 1
            assert manager.table_epoch > epoch
            assert manager.block_table.shape >= table.shape
            epoch, table = manager.table_epoch, manager.block_table
        else:
            assert manager.table_epoch == epoch
    manager.check_integrity()
    assert 2 <= moves <= 8
    assert manager.block_table.shape[0] >= 100
    assert manager.block_table.shape[1] >= 30


def test_a_batch_sees_the_table_of_its_time():
    manager = manager_of({1: 4})
    old = manager.append([1], 1)
    rows = old.block_table[old.rows[0]].tolist()
    for sequence_id in range(2, 200):
        manager.add_sequence(sequence_id)
    assert manager.block_table is not old.block_table
    assert old.block_table[old.rows[0]].tolist() == rows
    new = manager.append([1], 1)
    assert new.block_table is manager.block_table


def test_with_both_limits_the_table_never_moves():
    manager = KVCacheManager(256, block_size=4, max_sequences=20, max_seq_len=30)
    table = manager.block_table
    address = table.ctypes.data
    assert table.shape == (20, 8)
    random = Random(1)
    for step in range(300):
        sequence_id = random.randrange(20)
        if sequence_id not in manager:
            manager.add_sequence(sequence_id)
        elif manager.seq_len(sequence_id) > 25:
            manager.free(sequence_id)
        else:
            batch = manager.append([sequence_id], 1 + step % 5)
            assert batch.block_table is table
    manager.check_integrity()
    assert (manager.block_table is table, table.ctypes.data) == (True, address)
    assert manager.table_epoch == 0


@pytest.mark.parametrize(
    ("limits", "rows", "columns"),
    [
        ({"max_sequences": 3}, 3, 0),
        ({"max_seq_len": 9}, 0, 3),
        ({"max_sequences": 3, "max_seq_len": 8}, 3, 2),
    ],
)
def test_limits_size_the_table(limits, rows, columns):
    manager = KVCacheManager(8, block_size=4, **limits)
    assert manager.block_table.shape == (rows, columns)
    assert [getattr(manager, name) for name in limits] == list(limits.values())


def test_max_sequences():
    manager = manager_of({1: 5, 2: 0, 3: 0}, max_sequences=3)
    message = "max_sequences: the cache holds 3 already"
    with raises_unchanged(manager, ValueError, message):
        manager.add_sequence(4)
    with raises_unchanged(manager, ValueError, message):
        manager.fork(1, 4)
    manager.free(2)
    manager.add_sequence(4)


def test_max_seq_len():
    manager = manager_of({1: 8, 2: 0}, max_seq_len=10)
    for ids, counts, total in (([1], 3, 11), ([2, 1], [10, 3], 11), ([2], 10**5, 10**5)):
        message = f"would have {total} tokens, max_seq_len is 10"
        with raises_unchanged(manager, ValueError, message):
            manager.append(ids, counts)
    check_batch(manager, manager.append([1, 2], [2, 10]), [1, 2], [2, 10])


@pytest.mark.uninstrumented  # asks for arrays of 16 GiB, which are never written
@pytest.mark.parametrize(("limit", "total"), [(10, 2**31 - 1), (None, 2**31 + 7)])
def test_more_tokens_than_an_int32(limit, total):
    manager = manager_of({1: 8, 2: 0}, max_seq_len=limit)
    message = f"would have {total} tokens, max_seq_len is {limit or 2**31 - 1}"
    with raises_unchanged(manager, ValueError, message):
        manager.append([2 if limit else 1], 2**31 - 1)


# ---- statistics ----


def test_stats():
    manager = manager_of({1: 6, 2: 1}, num_blocks=10)  # 2 blocks and 1 block
    manager.fork(1, 3)
    stats = manager.stats()
    assert (stats.block_size, stats.num_blocks) == (4, 10)
    assert (stats.used_blocks, stats.free_blocks, stats.shared_blocks) == (3, 7, 2)
    assert (stats.references, stats.num_sequences, stats.num_tokens) == (5, 3, 13)
    assert stats.utilization == 0.3
    assert stats.internal_fragmentation == pytest.approx(1 - 13 / 20)
    assert stats.blocks_saved == 2


def test_stats_of_nothing():
    stats = KVCacheManager(0).stats()
    assert (stats.utilization, stats.internal_fragmentation, stats.blocks_saved) == (0, 0, 0)


# ---- the faces of page table and allocator ----


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.page_table.append_block(1, 5),
        lambda m: m.page_table.append_blocks(9, []),
        lambda m: m.page_table.set_block(1, 0, 5),
        lambda m: m.page_table.truncate(1, 0),
        lambda m: m.page_table.remove_sequence(1),
        lambda m: m.allocator.allocate_block(),
        lambda m: m.allocator.allocate_blocks(1),
        lambda m: m.allocator.deallocate_block(0),
        lambda m: m.allocator.deallocate_blocks([0]),
        lambda m: m.allocator.ref(0),
        lambda m: m.allocator.take_evicted(),
    ],
)
def test_page_table_and_allocator_of_a_manager_are_read_only(change):
    manager = manager_of({1: 6})
    with raises_unchanged(manager, ValueError, "belongs to a cache and is read-only"):
        change(manager)


def test_a_copy_of_the_page_table_is_writable():
    manager = manager_of({1: 6})
    table = manager.page_table.copy()
    assert table == manager.page_table
    table.append_block(1, 5)
    assert table != manager.page_table


# ---- subclasses ----


class Counting(KVCacheManager):
    def __init__(self, name, **kwargs):
        self.name, self.added = name, 0
        super().__init__(8, block_size=4, **kwargs)

    def add_sequence(self, sequence_id):
        super().add_sequence(sequence_id)
        self.added += 1


def test_a_subclass():
    manager = Counting("mine", max_sequences=2)
    manager.add_sequence(1)
    check_batch(manager, manager.append([1], 9), [1], [9])
    assert (manager.name, manager.added, manager.num_free_blocks) == ("mine", 1, 5)
    assert repr(manager).startswith("Counting(num_blocks=8,")


def test_a_subclass_that_does_not_initialise():
    class Forgetful(KVCacheManager):
        def __init__(self):
            pass

    manager = Forgetful()
    assert (manager.num_blocks, len(manager)) == (0, 0)
    manager.check_integrity()
    with raises_unchanged(manager, ValueError, "read-only"):
        manager.page_table.append_block(1, 0)
    with raises_unchanged(manager, UnknownSequenceError, "sequence 1"):
        manager.seq_len(1)
    manager.add_sequence(1)
    with raises_unchanged(manager, OutOfBlocksError, "1 requested, 0 free"):
        manager.append([1], 1)
    manager.free(1)


def test_a_manager_is_initialised_once():
    manager = manager_of({1: 6})
    with raises_unchanged(manager, TypeError, "KVCacheManager: it is initialised already"):
        manager.__init__(3)


def test_a_construction_that_failed_can_be_repeated():
    manager = KVCacheManager.__new__(KVCacheManager)
    for bad in ({"block_size": 0}, {"max_sequences": 2**31 - 1, "max_seq_len": 2**31 - 1}):
        with pytest.raises((ValueError, MemoryError)):
            manager.__init__(4, **bad)
        assert (manager.num_blocks, manager.max_sequences) == (0, None)
    manager.__init__(4)
    assert manager.num_blocks == 4
