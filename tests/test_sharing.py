"""Prefix caching, copy-on-write, eviction, truncation and layer groups of the manager."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rocmforge import KVCacheManager, LayerGroup
from rocmforge.errors import OutOfBlocksError, UnknownSequenceError

Make = Callable[..., KVCacheManager]


@pytest.fixture(params=["hashed", "colliding"])
def make(request: pytest.FixtureRequest) -> Make:
    """Managers of block size 4, once with a hash that is the same for everything."""

    def build(
        num_blocks: int | None = 32, block_size: int = 4, **options: object
    ) -> KVCacheManager:
        manager = KVCacheManager(num_blocks, block_size=block_size, **options)  # type: ignore[arg-type]
        if request.param == "colliding":
            manager._constant_hash()
        return manager

    return build


def run(
    manager: KVCacheManager,
    sequence: int,
    tokens: Sequence[int],
    *,
    salt: bytes | str | None = None,
    priority: int = 0,
) -> int:
    """Add a sequence, compute all its tokens, commit them; returns the tokens found."""
    found = manager.add_sequence(sequence, tokens, salt, priority=priority)
    manager.commit(manager.append([sequence], len(tokens) - found))
    manager.check_integrity()
    return found


def tokens(n: int, start: int = 0) -> list[int]:
    return list(range(start, start + n))


# ---- finding ----


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (tokens(10), 8),
        (tokens(9), 8),
        (tokens(8), 4),  # one token is always left to compute
        (tokens(5), 4),
        (tokens(4), 0),
        (tokens(3), 0),
        ([], 0),
        ([*tokens(8), 99, 99], 8),
        ([*tokens(7), 99, 99], 4),
        ([99, *tokens(9)], 0),
        ([*tokens(4), *tokens(8)], 4),
    ],
)
def test_whole_blocks_are_found_and_one_token_left(
    make: Make, prompt: list[int], found: int
) -> None:
    manager = make()
    run(manager, 0, tokens(10))
    assert manager.match_prefix(prompt) == found
    assert manager.add_sequence(1, prompt) == found
    assert manager.seq_len(1) == manager.committed_len(1) == found
    shared = manager.page_table.get_sequence_blocks(1)
    assert shared == manager.page_table.get_sequence_blocks(0)[: found // 4]
    manager.check_integrity()


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint16, memoryview])
def test_tokens_of_every_kind(make: Make, kind: type) -> None:
    manager = make()
    run(manager, 0, tokens(10))
    given = (
        kind(tokens(10))
        if kind in (list, tuple)
        else memoryview(np.arange(10, dtype=np.int32))
        if kind is memoryview
        else np.arange(10, dtype=kind)
    )
    assert manager.match_prefix(given) == 8


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([2**31], ValueError, "token_ids: expected -2147483648 .. 2147483647, got"),
        (np.array([2**40]), ValueError, "token_ids: expected -2147483648 .. 2147483647, got"),
        ([1.5], TypeError, "token_ids: expected integers, got dtype float64"),
        ([[1, 2]], ValueError, "token_ids: expected one dimension"),
        (7, (TypeError, ValueError), "token_ids"),
    ],
)
def test_bad_tokens_change_nothing(
    make: Make, bad: object, error: type[Exception], message: str
) -> None:
    manager = make()
    for call in (
        lambda: manager.add_sequence(1, bad),
        lambda: manager.match_prefix(bad),
        lambda: manager.pin(bad),
    ):
        with pytest.raises(error, match=message):
            call()
    assert len(manager) == 0
    manager.check_integrity()


def test_asking_changes_no_recency() -> None:
    manager = KVCacheManager(4, block_size=4)
    run(manager, 0, tokens(5))
    manager.free(0)
    run(manager, 1, tokens(5, 100))
    manager.free(1)
    before = [manager.allocator.get_block(block) for block in range(4)]
    assert manager.match_prefix(tokens(5)) == 4
    assert [manager.allocator.get_block(block) for block in range(4)] == before


def test_nothing_is_found_before_it_is_committed(make: Make) -> None:
    manager = make()
    manager.add_sequence(0, tokens(10))
    batch = manager.append([0], 10)
    assert manager.match_prefix(tokens(10)) == 0
    manager.fork(0, 1)
    manager.append([1], 1)
    assert manager.match_prefix(tokens(10)) == 0
    manager.commit(batch)
    assert manager.match_prefix(tokens(10)) == 8


@pytest.mark.parametrize("steps_done", range(4))
def test_a_failed_step_is_never_found(make: Make, steps_done: int) -> None:
    manager = make()
    prompt = tokens(16)
    manager.add_sequence(0, prompt)
    for _ in range(steps_done):
        manager.commit(manager.append([0], 4))
    manager.append([0], 4)  # and the step fails: no commit
    manager.free(0)
    manager.check_integrity()
    assert manager.match_prefix([*prompt, 99]) == 4 * steps_done


def test_unknown_tokens_are_never_found(make: Make) -> None:
    manager = make()
    manager.add_sequence(0, tokens(6))
    manager.commit(manager.append([0], 12))  # six known tokens, six unknown ones
    manager.commit(manager.append([0], 4, token_ids=tokens(4, 12)))  # known again, behind a gap
    assert manager.match_prefix(tokens(20)) == 4


def test_tokens_given_while_appending_are_found(make: Make) -> None:
    manager = make()
    manager.add_sequence(0)
    for token in range(10):
        manager.commit(manager.append([0], 1, token_ids=[token]))
    assert manager.match_prefix(tokens(10)) == 8
    manager.check_integrity()


def test_tokens_that_differ_from_the_known_ones_are_refused(make: Make) -> None:
    manager = make()
    manager.add_sequence(0, tokens(10))
    with pytest.raises(ValueError, match="token_ids: they differ from tokens that are known"):
        manager.append([0], 6, token_ids=[0, 1, 2, 3, 4, 9])
    with pytest.raises(ValueError, match=r"token_ids: expected 6 as in num_tokens, got 5"):
        manager.append([0], 6, token_ids=tokens(5))
    assert manager.seq_len(0) == 0
    manager.commit(manager.append([0], 12, token_ids=tokens(12)))  # two more than were known
    assert manager.match_prefix(tokens(13)) == 12


def test_two_that_fill_the_same_block_keep_their_own_and_later_ones_share_the_first(
    make: Make,
) -> None:
    manager = make()
    for sequence in (0, 1):
        manager.add_sequence(sequence, tokens(5))
    manager.commit(manager.append([0, 1], 5))
    assert manager.page_table.block_ids(0)[0] != manager.page_table.block_ids(1)[0]
    manager.add_sequence(2, tokens(5))
    assert manager.page_table.block_ids(2)[0] == manager.page_table.block_ids(0)[0]
    manager.free([0, 2])
    assert manager.stats().cached_blocks == 1
    manager.free(1)
    assert manager.stats().cached_blocks == 1  # the twin became free
    manager.check_integrity()


def test_a_twin_takes_the_place_of_an_evicted_block(make: Make) -> None:
    manager = make(7)
    for sequence in (0, 1):
        manager.add_sequence(sequence, tokens(9))
    manager.commit(manager.append([0, 1], 9))  # three blocks each
    manager.free(0)
    manager.add_sequence(2)
    manager.append([2], 16)  # all the rest: what 0 published is evicted
    assert manager.match_prefix(tokens(9)) == 0
    manager.commit(manager.append([1], 3, token_ids=tokens(3, 9)))
    assert manager.match_prefix(tokens(13)) == 0  # its third block, with no beginning
    manager.free([1, 2])
    run(manager, 3, tokens(9))
    assert manager.match_prefix(tokens(13)) == 12  # the beginning is back, and so is the rest


def test_an_evicted_and_reused_block_never_matches(make: Make) -> None:
    manager = make(3)
    run(manager, 0, tokens(9))
    manager.free(0)
    run(manager, 1, tokens(9, 50))
    assert manager.match_prefix(tokens(9)) == 0
    assert manager.match_prefix(tokens(9, 50)) == 8
    manager.free(1)
    run(manager, 2, [*tokens(4), *tokens(5, 54)])  # the second block's tokens after another first
    assert manager.match_prefix([*tokens(4), *tokens(5, 54)]) == 8


# ---- salts ----


@pytest.mark.parametrize(
    ("salt", "found"),
    [(None, 0), (b"", 0), (b"tenant", 8), ("tenant", 8), (bytearray(b"tenant"), 8), (b"b", 0)],
)
def test_salts_are_spaces_of_their_own(make: Make, salt: object, found: int) -> None:
    manager = make()
    run(manager, 0, tokens(10), salt=b"tenant")
    assert manager.match_prefix(tokens(10), salt) == found  # type: ignore[arg-type]
    assert manager.add_sequence(1, tokens(10), salt) == found  # type: ignore[arg-type]


def test_a_wrong_salt_is_refused(make: Make) -> None:
    manager = make()
    with pytest.raises(TypeError, match="salt: expected bytes or str, got int"):
        manager.add_sequence(0, tokens(4), 3)  # type: ignore[arg-type]
    assert 0 not in manager


def test_unused_salts_are_dropped(make: Make) -> None:
    manager = make(8)
    for i in range(5000):  # more than the index has nodes
        assert run(manager, i, tokens(9), salt=f"tenant {i}") == 0
        manager.free(i)
    assert run(manager, 0, tokens(9), salt="tenant 4999") == 8


# ---- eviction ----


def evictions(manager: KVCacheManager, n: int) -> list[int]:
    """Blocks in the order in which they are taken."""
    manager.add_sequence(999)
    return [int(manager.append([999], 4).slot_mapping[0]) // 4 for _ in range(n)]


def test_the_order_of_eviction(make: Make) -> None:
    """Free blocks, then the least recently used, and of a sequence its tail before its head."""
    manager = make(8)
    run(manager, 0, tokens(9))  # blocks 0 1, and 2 with one token
    run(manager, 1, tokens(9, 50))  # blocks 3 4, and 5
    manager.free([0, 1])  # 2 and 5 become free
    run(manager, 2, [*tokens(4), 7])  # uses block 0 again, and block 5
    manager.free(2)
    order = evictions(manager, 8)
    assert order[:4] == [5, 2, 6, 7]
    assert order[4:] == [1, 4, 3, 0]


def test_priorities_are_evicted_from_the_lowest(make: Make) -> None:
    manager = make(6)
    block = {}
    for sequence, priority in enumerate([3, 0, 7]):
        run(manager, sequence, tokens(5, 50 * sequence), priority=priority)
        block[priority] = int(manager.page_table.block_ids(sequence)[0])
        manager.free(sequence)
    assert evictions(manager, 6)[3:] == [block[0], block[3], block[7]]
    manager.check_integrity()


def test_a_block_keeps_the_highest_priority_it_was_released_with(make: Make) -> None:
    manager = make(4)
    run(manager, 0, tokens(5), priority=5)
    high = int(manager.page_table.block_ids(0)[0])
    manager.free(0)
    run(manager, 1, tokens(5))  # shares it, with the lowest
    manager.free(1)
    run(manager, 2, tokens(5, 50), priority=1)
    low = int(manager.page_table.block_ids(2)[0])
    manager.free(2)
    assert evictions(manager, 4)[2:] == [low, high]


@pytest.mark.parametrize("priority", [-1, 8, 2**40])
def test_priorities_out_of_range(make: Make, priority: int) -> None:
    manager = make()
    with pytest.raises(ValueError, match=rf"priority: expected 0 .. 7, got {priority}"):
        manager.add_sequence(0, tokens(4), priority=priority)
    assert 0 not in manager


def test_pinned_prefixes_stay(make: Make) -> None:
    manager = make(8, max_pinned_blocks=2)
    run(manager, 0, tokens(13))
    manager.free(0)
    with pytest.raises(
        ValueError, match="0 blocks are pinned and 3 would be added, the limit is 2"
    ):
        manager.pin(tokens(13))
    assert manager.stats().pinned_blocks == 0
    assert manager.pin(tokens(8)) == 8
    assert manager.pin(tokens(9)) == 8  # a second time
    assert manager.stats().pinned_blocks == 2
    manager.check_integrity()
    evictions(manager, 6)
    assert manager.match_prefix(tokens(9)) == 8
    assert manager.unpin(tokens(9)) == 8
    assert not manager.can_append([999], 4)
    assert manager.unpin(tokens(8)) == 8
    with pytest.raises(ValueError, match="token_ids: no block of this prefix is pinned"):
        manager.unpin(tokens(8))
    manager.append([999], 4)  # evicts the tail first
    assert manager.match_prefix(tokens(9)) == 4
    manager.check_integrity()


def test_nothing_to_pin(make: Make) -> None:
    manager = make()
    assert manager.pin(tokens(8)) == 0
    with pytest.raises(ValueError, match="no block of this prefix is pinned"):
        manager.unpin(tokens(8))


def test_reset_forgets_everything_cached(make: Make) -> None:
    manager = make()
    run(manager, 0, tokens(9))
    run(manager, 1, tokens(9, 50))
    manager.pin(tokens(8, 50))
    manager.free(1)
    manager.add_sequence(2, tokens(20, 90))  # nothing computed: nothing of before in it
    assert manager.reset_prefix_cache() == 4
    manager.check_integrity()
    assert manager.match_prefix(tokens(9)) == manager.match_prefix(tokens(9, 50)) == 0
    assert manager.stats().cached_blocks == manager.stats().pinned_blocks == 0
    manager.commit(manager.append([0], 8, token_ids=tokens(8, 9)))
    assert manager.match_prefix(tokens(17)) == 0  # it began before
    manager.commit(manager.append([2], 20))
    assert manager.match_prefix(tokens(20, 90)) == 16


@pytest.mark.parametrize("length", [0, 3, 4, 8])
def test_truncate_after_a_reset(make: Make, length: int) -> None:
    manager = make()
    run(manager, 0, tokens(9))
    manager.reset_prefix_cache()
    manager.truncate(0, length)
    manager.check_integrity()
    manager.commit(manager.append([0], 9, token_ids=tokens(9, length)))
    manager.check_integrity()
    assert manager.match_prefix([*tokens(9 + length), 1]) == 0


def test_without_prefix_caching(make: Make) -> None:
    manager = KVCacheManager(8, block_size=4, prefix_caching=False)
    run(manager, 0, tokens(9))
    assert manager.match_prefix(tokens(9)) == 0
    manager.free(0)
    assert manager.stats().cached_blocks == 0


# ---- copy-on-write and truncation ----


def test_truncate_gives_back_blocks_and_forgets_tokens(make: Make) -> None:
    manager = make()
    run(manager, 0, tokens(14))
    manager.truncate(0, 6)
    manager.check_integrity()
    assert manager.seq_len(0) == manager.committed_len(0) == 6
    assert len(manager.page_table.block_ids(0)) == 2
    assert manager.match_prefix(tokens(14)) == 4  # the partly filled block is withdrawn
    assert manager.stats().cached_blocks == 0  # and so is what came behind it
    manager.commit(manager.append([0], 4, token_ids=[70, 71, 72, 73]))
    assert manager.match_prefix([*tokens(6), 70, 71, 72]) == 8
    assert manager.match_prefix(tokens(14)) == 4
    manager.check_integrity()


def test_truncate_leaves_what_others_share(make: Make) -> None:
    manager = make()
    run(manager, 0, tokens(14))
    run(manager, 1, tokens(14))
    manager.truncate(1, 6)
    manager.check_integrity()
    assert manager.match_prefix(tokens(14)) == 12
    batch = manager.append([1], 1, token_ids=[70])
    own, shared = (int(manager.page_table.block_ids(sequence)[1]) for sequence in (1, 0))
    assert batch.copies.tolist() == [[shared, own]]
    assert manager.match_prefix(tokens(14)) == 12


def test_a_block_that_was_shared_when_truncated_is_withdrawn_when_written(make: Make) -> None:
    manager = make()
    run(manager, 0, tokens(9))
    manager.fork(0, 1)
    manager.truncate(1, 6)
    manager.free(0)
    assert manager.match_prefix(tokens(9)) == 8
    batch = manager.append([1], 2, token_ids=[70, 71])
    assert len(batch.copies) == 0  # nobody else has it any more
    assert manager.match_prefix(tokens(9)) == 4
    manager.commit(batch)
    manager.check_integrity()
    assert manager.match_prefix([*tokens(6), 70, 71, 9]) == 8


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 13])
def test_truncate_to_every_length_and_on(make: Make, length: int) -> None:
    manager = make()
    run(manager, 0, tokens(13))
    manager.truncate(0, length)
    manager.check_integrity()
    rest = tokens(17 - length, length)
    manager.commit(manager.append([0], len(rest), token_ids=rest))
    manager.check_integrity()
    assert manager.match_prefix(tokens(17)) == 16


@pytest.mark.parametrize("length", [-1, 11, 2**70])
def test_truncate_out_of_range(make: Make, length: int) -> None:
    manager = make()
    run(manager, 0, tokens(10))
    with pytest.raises(ValueError, match=r"length: expected 0 .. 10, got"):
        manager.truncate(0, length)
    with pytest.raises(UnknownSequenceError):
        manager.truncate(5, 0)
    assert manager.seq_len(0) == 10


def test_look_ahead_slots_that_are_never_filled(make: Make) -> None:
    manager = make()
    run(manager, 0, tokens(6))
    for accepted in (0, 3, 5):
        begin = manager.seq_len(0)
        manager.commit(manager.append([0], 5))  # one token and four guesses
        manager.truncate(0, begin + accepted)
        manager.check_integrity()
    assert manager.seq_len(0) == 14


@pytest.mark.parametrize("then", ["again", "truncate", "free", "free and add", "other cache"])
def test_stale_batches_are_refused_and_change_nothing(make: Make, then: str) -> None:
    manager = make()
    manager.add_sequence(0, tokens(10))
    batch = manager.append([0], 10)
    if then == "again":
        manager.commit(batch)
    elif then == "truncate":
        manager.truncate(0, 9)
    elif then != "other cache":
        manager.free(0)
        if then == "free and add":
            manager.add_sequence(0, tokens(10))
    target = make() if then == "other cache" else manager
    before = target.stats()
    with pytest.raises(ValueError, match="batch: "):
        target.commit(batch)
    assert target.stats() == before
    target.check_integrity()


def test_batches_are_committed_in_order(make: Make) -> None:
    manager = make()
    manager.add_sequence(0, tokens(10))
    first, second = manager.append([0], 5), manager.append([0], 5)
    with pytest.raises(ValueError, match="it begins at token 5 of sequence 0, of which 0 are"):
        manager.commit(second)
    manager.commit(first)
    manager.commit(second)
    assert manager.match_prefix(tokens(10)) == 8


def test_beam_search_by_fork_and_free(make: Make) -> None:
    manager = make(64)
    run(manager, 0, tokens(9))
    beams = [0]
    fresh = itertools.count(1)
    for step in range(20):
        children = []
        for beam in beams:
            for _ in range(2):
                child = next(fresh)
                manager.fork(beam, child)
                children.append(child)
        manager.free(beams)
        beams, dropped = children[:4], children[4:]
        manager.free(dropped)
        manager.commit(
            manager.append(beams, 1, token_ids=[step * 4 + i for i in range(len(beams))])
        )
        manager.check_integrity()
    assert manager.stats().num_sequences == 4


def test_free_in_bulk_is_all_or_nothing(make: Make) -> None:
    manager = make()
    for sequence in range(3):
        run(manager, sequence, tokens(9, 20 * sequence))
    for wrong, error in (([0, 7], UnknownSequenceError), ([0, 1, 0], ValueError)):
        with pytest.raises(error):
            manager.free(wrong)
        assert len(manager) == 3
    manager.free(np.array([0, 1, 2], np.uint64))
    assert len(manager) == 0
    manager.check_integrity()


# ---- admission ----


def test_the_reserve_is_for_running_sequences(make: Make) -> None:
    manager = make(8, watermark=3)
    run(manager, 0, tokens(16))
    manager.add_sequence(1, tokens(8, 50))
    assert not manager.can_append([1], 8)
    with pytest.raises(OutOfBlocksError, match="2 requested, 1 free"):
        manager.append([1], 8)
    assert manager.can_append([1], 4)
    assert manager.can_append([0], 16)
    manager.append([0], 16, token_ids=tokens(16, 16))
    assert not manager.can_append([0], 1)
    manager.check_integrity()


def test_can_append_agrees_with_append(make: Make) -> None:
    manager = make(6)
    run(manager, 0, tokens(6))
    manager.fork(0, 1)
    for counts in itertools.product([1, 2, 3, 9, 11], repeat=2):
        trial = make(6)
        run(trial, 0, tokens(6))
        trial.fork(0, 1)
        possible = manager.can_append([0, 1], counts)
        try:
            trial.append([0, 1], counts)
        except OutOfBlocksError:
            assert not possible
        else:
            assert possible
    manager.check_integrity()


# ---- batches ----


def mirror(table: np.ndarray, delta: np.ndarray) -> None:
    for row, column, block in delta:
        table[row, column] = block


@pytest.mark.parametrize("kernel_block_size", [1, 2, 4])
def test_deltas_keep_a_copy_of_the_table_right(make: Make, kernel_block_size: int) -> None:
    manager = make(64, max_sequences=8, max_seq_len=64, kernel_block_size=kernel_block_size)
    copy = np.full_like(manager.block_table, -1)
    address = manager.block_table.ctypes.data
    rng = np.random.default_rng(3)
    alive: list[int] = []
    for step in range(200):
        if len(alive) < 6:
            prompt = rng.integers(0, 2, 12)
            manager.add_sequence(step, prompt)
            alive.append(step)
        if rng.random() < 0.2 and len(alive) < 8:
            manager.fork(alive[0], 1000 + step)
            alive.append(1000 + step)
        for sequence in list(alive):
            if manager.seq_len(sequence) > 50 or rng.random() < 0.05:
                manager.free(sequence)
                alive.remove(sequence)
            elif rng.random() < 0.1:
                manager.truncate(sequence, manager.seq_len(sequence) // 2)
        if not alive:
            continue
        batch = manager.append(alive, 3)
        mirror(copy, batch.table_delta)
        ratio = 4 // kernel_block_size
        for row, length in zip(batch.rows, batch.seq_lens, strict=True):
            filled = -(-length // 4) * ratio
            assert copy[row, :filled].tolist() == manager.block_table[row, :filled].tolist()
        for token, slot in enumerate(batch.slot_mapping):
            i = np.searchsorted(batch.cu_seqlens_q, token, side="right") - 1
            position = batch.positions[token]
            block = manager.block_table[batch.rows[i], position // kernel_block_size]
            assert slot == block * kernel_block_size + position % kernel_block_size
        manager.commit(batch)
        manager.check_integrity()
    assert manager.block_table.ctypes.data == address
    assert manager.table_epoch == 0


@pytest.mark.parametrize("kernel_block_size", [1, 2, 4])
def test_compressed_rows(make: Make, kernel_block_size: int) -> None:
    manager = make(64, kernel_block_size=kernel_block_size)
    for sequence, length in enumerate([1, 4, 5, 12, 15]):
        run(manager, sequence, tokens(length, 100 * sequence))
    batch = manager.append([4, 0, 2, 3, 1], [1, 1, 3, 4, 1])
    lengths = [16, 2, 8, 16, 5]
    pages = [-(-length // kernel_block_size) for length in lengths]
    assert batch.kv_indptr.tolist() == [0, *itertools.accumulate(pages)]
    assert batch.kv_last_page_len.tolist() == [
        length - (n - 1) * kernel_block_size for length, n in zip(lengths, pages, strict=True)
    ]
    expected = [batch.block_table[row, :n] for row, n in zip(batch.rows, pages, strict=True)]
    assert batch.kv_indices.tolist() == np.concatenate(expected).tolist()
    assert {array.dtype for array in (batch.kv_indptr, batch.kv_indices)} == {np.dtype(np.int32)}
    newer = manager.append([0], 1)
    assert batch.kv_indptr.size == 6  # it was made while the batch was the newest
    assert newer.kv_indptr.tolist() == [0, -(-3 // kernel_block_size)]


def test_the_table_of_an_older_batch_is_gone(make: Make) -> None:
    manager = make()
    manager.add_sequence(0)
    batch = manager.append([0], 1)
    manager.append([0], 1)
    for name in ("kv_indptr", "kv_indices", "kv_last_page_len", "num_common_blocks"):
        with pytest.raises(ValueError, match="batch: a newer one was made"):
            getattr(batch, name)


def test_the_common_prefix_of_a_batch(make: Make) -> None:
    manager = make(64)
    run(manager, 0, tokens(20))
    for sequence, common in ((1, 12), (2, 16)):
        manager.add_sequence(sequence, [*tokens(common), *tokens(8, 200 * sequence)])
    assert manager.append([0, 1, 2], 4).num_common_blocks == 3
    assert manager.append([0, 2], 1).num_common_blocks == 4
    assert manager.append([2], 1).num_common_blocks == 5
    assert manager.append([], 1).num_common_blocks == 0
    manager.add_sequence(3)
    assert manager.append([0, 3], 1).num_common_blocks == 0


def test_a_batch_that_is_given_back(make: Make) -> None:
    manager = make(64)
    for sequence in range(3):
        manager.add_sequence(sequence)
    batch = manager.append([0, 1, 2], 1)
    arrays = batch.slot_mapping, batch.positions, batch.seq_lens, batch.rows
    assert manager.append([2, 1, 0], 1, out=batch) is batch
    again = batch.slot_mapping, batch.positions, batch.seq_lens, batch.rows
    assert all(new is old for new, old in zip(again, arrays, strict=True))
    assert batch.sequence_ids.tolist() == [2, 1, 0]
    assert batch.positions.tolist() == [1, 1, 1]
    assert not batch.committed
    assert manager.append([0], 7, out=batch).slot_mapping.size == 7
    with pytest.raises(UnknownSequenceError):
        manager.append([9], 1, out=batch)
    with pytest.raises(ValueError, match="batch: "):
        manager.commit(batch)  # what it was is gone
    other = make()
    with pytest.raises(ValueError, match="out: it was made by another cache"):
        other.append([], 1, out=batch)
    with pytest.raises(TypeError, match="out: expected a Batch, got int"):
        manager.append([0], 1, out=3)  # type: ignore[call-overload]


# ---- layer groups ----


def windowed(make: Make, full: int = 64, window: int = 8, blocks: int = 16) -> KVCacheManager:
    return make(None, groups=[LayerGroup(full), LayerGroup(blocks, window=window)])


def test_a_window_gives_its_blocks_back(make: Make) -> None:
    manager = windowed(make)
    manager.add_sequence(0, tokens(200))
    for _ in range(50):
        manager.commit(manager.append([0], 4))
        manager.check_integrity()
    full, window = manager.groups
    assert (full.window, window.window) == (0, 8)
    assert len([b for b in full.page_table.block_ids(0) if b >= 0]) == 50
    held = [i for i, b in enumerate(window.page_table.block_ids(0)) if b >= 0]
    # tokens 193 .. 199 for the next query, and a block's worth for a truncate
    assert held == [47, 48, 49]
    assert window.page_table.get_block_for_position(0, 0) is None


@pytest.mark.parametrize("length", [5, 8, 9, 12, 13, 40, 41, 99, 100])
def test_a_hit_needs_the_last_window(make: Make, length: int) -> None:
    """The windowed group keeps all released blocks while it has room: every prefix is a hit."""
    manager = windowed(make, blocks=32)
    run(manager, 0, tokens(100))
    manager.free(0)
    prompt = [*tokens(length), 999]
    assert manager.match_prefix(prompt) == length // 4 * 4
    found = manager.add_sequence(1, prompt)
    first = max(0, found - 8 + 1) // 4 if found >= 8 else 0
    assert [b >= 0 for b in manager.groups[1].page_table.block_ids(1)] == [
        i >= first for i in range(found // 4)
    ]
    manager.check_integrity()


def test_no_hit_where_the_window_is_gone(make: Make) -> None:
    manager = windowed(make, blocks=6)
    manager.add_sequence(0, tokens(60))
    for _ in range(15):
        manager.commit(manager.append([0], 4))
    manager.free(0)
    assert manager.match_prefix([*tokens(60), 1]) == 60
    assert manager.match_prefix([*tokens(24), 1]) == 0  # the full group has it, the window not
    assert manager.match_prefix(tokens(60)) == 56


def test_truncate_within_a_window(make: Make) -> None:
    manager = windowed(make)
    manager.add_sequence(0, tokens(60))
    for _ in range(15):
        manager.commit(manager.append([0], 4))
    manager.truncate(0, 56)
    manager.check_integrity()
    with pytest.raises(ValueError, match="length: at 40 tokens a window of 8 needs blocks that"):
        manager.truncate(0, 40)
    assert manager.seq_len(0) == 56
    manager.truncate(0, 0)
    manager.check_integrity()


def test_a_group_that_is_full_fails_the_whole_batch(make: Make) -> None:
    manager = make(None, groups=[LayerGroup(10), LayerGroup(3, window=8)])
    manager.add_sequence(0, tokens(40))
    with pytest.raises(OutOfBlocksError, match="5 requested, 3 free"):
        manager.append([0], 20)
    manager.check_integrity()
    assert [group.num_free_blocks for group in manager.groups] == [10, 3]
    for _ in range(3):
        batch = manager.append([0], 4)
        assert batch.groups[0].slot_mapping.size == batch.groups[1].slot_mapping.size == 4
        manager.commit(batch)
    manager.check_integrity()


def test_groups_copy_and_share_on_their_own(make: Make) -> None:
    manager = windowed(make)
    run(manager, 0, tokens(6))
    manager.fork(0, 1)
    batch = manager.append([0, 1], 1)
    assert [part.copies.shape for part in batch.groups] == [(1, 2), (1, 2)]
    manager.check_integrity()
    manager.free([0, 1])
    manager.check_integrity()


def test_only_windows(make: Make) -> None:
    """Mistral: every layer slides, and nothing but the window is kept."""
    manager = make(None, groups=[LayerGroup(8, window=8)])
    for sequence in range(3):
        found = manager.add_sequence(sequence, tokens(60))
        assert found == (56 if sequence else 0)
        while manager.seq_len(sequence) < 60:
            manager.commit(manager.append([sequence], 4))
            manager.check_integrity()
        manager.free(sequence)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_blocks: expected either num_blocks or groups"),
        ({"num_blocks": 3, "groups": []}, "num_blocks: expected either num_blocks or groups"),
        ({"groups": []}, "groups: expected 1 .. 32, got 0"),
        ({"groups": [LayerGroup(-1)]}, r"groups\[0\].num_blocks: expected 0 .. 2147483647, got -1"),
        ({"groups": [LayerGroup(1, window=0)]}, r"groups\[0\].window: expected 1 .. "),
        ({"num_blocks": 1, "kernel_block_size": 3}, "kernel_block_size: expected a divisor"),
        ({"num_blocks": 1, "kernel_block_size": 0}, "kernel_block_size: expected 1 .. "),
        ({"num_blocks": 2**30, "kernel_block_size": 1}, "more than 2\\*\\*31 - 1 kernel blocks"),
        ({"num_blocks": 1, "watermark": -1}, "watermark: expected 0 .. "),
        ({"num_blocks": 1, "max_pinned_blocks": -1}, "max_pinned_blocks: expected 0 .. "),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCacheManager(block_size=4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (3, "groups: expected a list of LayerGroup, got int"),
        ([LayerGroup(1), 3], "groups\\[1\\]: "),
    ],
)
def test_no_groups(groups: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        KVCacheManager(groups=groups)  # type: ignore[arg-type]


def test_ranks_that_make_the_same_calls_hold_the_same_tables() -> None:
    """Whatever the seeds of their hashes, and even where all hashes collide."""
    ranks = [KVCacheManager(40, block_size=4, max_pinned_blocks=6) for _ in range(4)]
    ranks[-1]._constant_hash()
    rng = np.random.default_rng(0)
    running: list[int] = []
    for step in range(400):
        prompt = rng.integers(0, 2, rng.integers(1, 40)).tolist()
        if len(running) > 3:
            done = running.pop(int(rng.integers(len(running))))
            for rank in ranks:
                rank.free(done)
        found = {rank.add_sequence(step, prompt, priority=step % 3) for rank in ranks}
        assert len(found) == 1
        running.append(step)
        if not ranks[0].can_append([step], len(prompt) - found.pop()):
            for rank in ranks:
                rank.free(running)
            running = []
            continue
        tables = []
        for rank in ranks:
            batch = rank.append([step], len(prompt) - rank.seq_len(step))
            rank.commit(batch)
            tables.append((batch.slot_mapping.tolist(), batch.table_delta.tolist()))
        assert all(table == tables[0] for table in tables)
    assert ranks[0].stats().cached_blocks
    assert all(rank.stats() == ranks[0].stats() for rank in ranks)
