"""`PageTable.slot_mapping` with `num_tokens`: consecutive positions, one look-up a sequence."""

import numpy as np
import pytest

from rocmforge import KVCacheManager, LayerGroup, PageTable
from rocmforge.errors import UnknownSequenceError


@pytest.fixture
def table() -> PageTable:
    table = PageTable(4)
    table.append_blocks(1, [7, 3, 9])
    table.append_blocks(2**63, [5, 0])
    return table


@pytest.mark.parametrize("counts", [0, 1, 3, 8, [8, 2], np.array([0, 5], np.int32)])
@pytest.mark.parametrize("starts", [[0, 0], [3, 1], np.array([4, 0], np.uint8)])
def test_ranges_are_the_positions_one_by_one(table, counts, starts):
    ids = [1, 2**63]
    lengths = np.broadcast_to(counts, 2)
    if any(s + n > end for s, n, end in zip(starts, lengths, (12, 8), strict=True)):
        with pytest.raises(ValueError, match=r"positions\[\d\]: sequence \d+ has slots for"):
            table.slot_mapping(ids, starts, num_tokens=counts)
        return
    one_by_one = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    expected = table.slot_mapping(
        np.repeat(np.array(ids, np.uint64), lengths), np.concatenate(one_by_one)
    )
    found = table.slot_mapping(ids, starts, num_tokens=counts)
    assert found.dtype == np.int64
    assert found.tolist() == expected.tolist()
    out = np.full(expected.size, -7)
    assert table.slot_mapping(ids, starts, out, num_tokens=counts) is out
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("arguments", "counts", "error", "message"),
    [
        (([1], [0]), -1, ValueError, "num_tokens: expected 0 .. 2147483647, got -1"),
        (([1], [0]), [-1], ValueError, "num_tokens[0]: expected 0 .. 2147483647, got -1"),
        (([1], [0]), [1, 2], ValueError, "num_tokens: expected an integer or 1 of them, got 2"),
        (([1], [0]), 13, ValueError, "positions[0]: sequence 1 has slots for 12 tokens, got 13"),
        (([1], [-1]), 1, ValueError, "positions[0]: sequence 1 has slots for 12 tokens, got 1"),
        (([9], [0]), 1, UnknownSequenceError, "sequence_ids[0]: sequence 9 is not in the"),
        (([1], [0], np.empty(2, np.int64)), 3, ValueError, "out: expected shape (3,), got (2,)"),
    ],
)
def test_bad_ranges(table, arguments, counts, error, message):
    with pytest.raises(error) as caught:
        table.slot_mapping(*arguments, num_tokens=counts)
    assert message in str(caught.value)


def test_a_buffer_that_is_read_is_refused(table):
    starts = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="out: it overlaps an array that is read"):
        table.slot_mapping([1], starts, starts, num_tokens=1)
    assert starts[0] == 0


def test_released_blocks_give_padding():
    manager = KVCacheManager(block_size=4, groups=[LayerGroup(16, window=4)])
    manager.add_sequence(0)
    manager.commit(manager.append([0], 20))
    slots = manager.page_table.slot_mapping([0], [0], num_tokens=20)
    assert (slots[:4] == -1).all()
    assert (slots[-4:] >= 0).all()


def test_what_belongs_to_a_cache_is_not_made_by_hand():
    manager = KVCacheManager(4)
    manager.add_sequence(0)
    batch = manager.append([0], 1)
    for kind in (type(manager.groups[0]), type(batch.groups[0]), type(batch)):
        with pytest.raises(TypeError, match="is made by"):
            kind()
    assert repr(manager.groups[0]) == "CacheGroup(num_blocks=4, block_size=16, window=0)"
