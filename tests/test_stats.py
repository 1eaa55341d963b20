"""What a manager says about itself, and whether a prompt would fit."""

from __future__ import annotations

import numpy as np
import pytest

from rocmforge import KVCacheManager, LayerGroup
from rocmforge.stats import Distribution


def run(manager: KVCacheManager, sequence: int, tokens: list[int], salt: str | None = None) -> int:
    found = manager.add_sequence(sequence, tokens, salt)
    manager.commit(manager.append([sequence], len(tokens) - found))
    return found


def test_hits_are_counted_by_tokens() -> None:
    manager = KVCacheManager(32, block_size=4)
    run(manager, 0, list(range(10)))
    run(manager, 1, [*range(8), 50, 51])
    run(manager, 2, [*range(8), 50, 51], salt="other")
    stats = manager.stats()
    assert (stats.prompt_tokens, stats.hit_tokens) == (30, 8)
    assert stats.hit_rate == pytest.approx(8 / 30)
    assert KVCacheManager(1).stats().hit_rate == 0
    assert manager.match_prefix(list(range(10))) == 8  # asking is no hit
    with pytest.raises(ValueError, match="already"):
        manager.add_sequence(0, list(range(10)))
    assert manager.stats().prompt_tokens == 30


def test_evictions_and_copies_are_counted() -> None:
    manager = KVCacheManager(4, block_size=4)
    run(manager, 0, list(range(12)))
    manager.free(0)
    assert manager.stats().cached_blocks == 3
    run(manager, 1, list(range(100, 112)))
    assert manager.stats().evictions == 2
    manager.fork(1, 2)
    manager.append([1], 1)
    manager.free(1)
    manager.fork(2, 3)
    manager.append([2], 1)
    assert manager.stats().copied_blocks == 0
    manager.free([2, 3])
    run(manager, 4, [1, 2])
    manager.fork(4, 5)
    manager.append([4, 5], 1)
    assert manager.stats().copied_blocks == 1


def test_lengths_and_ages() -> None:
    manager = KVCacheManager(64, block_size=4)
    for length in range(1, 11):
        run(manager, length, [length] * length)
    lengths = manager.stats().sequence_lengths
    assert lengths == Distribution(count=10, mean=5.5, min=1, p50=5, p90=9, p99=10, max=10)
    assert manager.stats().cached_block_ages.count == 0
    manager.free([9, 8])  # two and two blocks: a call that gives blocks for each
    assert manager.stats().cached_block_ages == Distribution(4, 0.5, 0, 0, 1, 1, 1)
    run(manager, 20, [5] * 3)
    assert manager.stats().cached_block_ages == Distribution(4, 1.5, 1, 1, 2, 2, 2)


@pytest.mark.parametrize("n", [1, 2, 3, 99, 100, 101, 1000])
def test_percentiles_are_of_the_numbers(n: int) -> None:
    rng = np.random.default_rng(n)
    numbers = rng.integers(-50, 50, n)
    found = Distribution.of(numbers)
    assert (found.count, found.min, found.max) == (n, numbers.min(), numbers.max())
    assert found.mean == pytest.approx(numbers.mean())
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        expected = np.percentile(numbers, percent, method="inverted_cdf")
        assert value == expected
    assert type(found.p50) is int


# ---- can_add ----


@pytest.mark.parametrize("windowed", [False, True])
def test_can_add_tells_what_adding_would_do(windowed: bool) -> None:
    """Compared with trying, over random states; and it changes nothing."""
    rng = np.random.default_rng(5)
    groups = [LayerGroup(24), LayerGroup(16, window=5)] if windowed else [LayerGroup(24)]
    answers = set()
    for _ in range(40):
        manager = KVCacheManager(
            block_size=4, groups=groups, watermark=int(rng.integers(0, 4)), max_sequences=6
        )
        for sequence in range(6):
            prompt = [int(rng.integers(0, 2))] * int(rng.integers(0, 50))
            if rng.random() < 0.3 and len(manager):
                manager.free(next(iter(manager.page_table.sequence_ids())))
            length = len(prompt) + int(rng.integers(0, 12))
            before = manager.stats(), [manager.allocator.get_block(b) for b in range(24)]
            answer = manager.can_add(prompt, length=length)
            after = manager.stats(), [manager.allocator.get_block(b) for b in range(24)]
            assert before == after
            assert manager.can_add(prompt) == manager.can_add(prompt, length=len(prompt))
            found = manager.add_sequence(sequence, prompt)
            fits = length <= found or manager.can_append([sequence], length - found)
            assert answer == fits
            answers.add(answer)
            if fits and length > found:
                manager.commit(manager.append([sequence], length - found))
    assert answers == {True, False}


def test_can_add_where_no_sequence_has_a_place() -> None:
    manager = KVCacheManager(8, block_size=4, max_sequences=1, max_seq_len=8)
    assert manager.can_add([1, 2, 3])
    manager.add_sequence(0)
    assert not manager.can_add([1, 2, 3])
    with pytest.raises(ValueError, match=r"length: expected 0 \.\. 8, got 9"):
        manager.can_add([1] * 9)
    with pytest.raises(TypeError, match="token_ids"):
        manager.can_add([1.5])  # type: ignore[list-item]
