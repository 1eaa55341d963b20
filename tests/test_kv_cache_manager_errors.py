"""KVCacheManager and bad input: what the message says, and that nothing changed."""

import numpy as np
import pytest

from manager_checks import BY_ID, check_batch, manager_of
from metadata_state import raises_unchanged, state_of
from rocmforge import KVCacheManager, RocmForgeError
from rocmforge.errors import OutOfBlocksError, UnknownSequenceError

BAD_IDS = [
    (-1, ValueError, "sequence id: expected 0 .. 2**64 - 1, got -1"),
    (2**64, ValueError, "sequence id: expected 0 .. 2**64 - 1, got 18446744073709551616"),
    ("1", TypeError, "sequence id: expected an integer, got str"),
    (1.0, TypeError, "sequence id: expected an integer, got float"),
    (True, TypeError, "sequence id: expected an integer, got bool"),
    (None, TypeError, "sequence id: expected an integer, got NoneType"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_IDS)
@pytest.mark.parametrize("method", BY_ID)
def test_bad_sequence_id(method, bad, error, message):
    manager = manager_of({0: 6})
    with raises_unchanged(manager, error, message):
        BY_ID[method](manager, bad)


@pytest.mark.parametrize("method", ["fork from", "free", "seq_len", "committed_len"])
@pytest.mark.parametrize("was_there", [False, True])
def test_unknown_sequence(method, was_there):
    manager = manager_of({1: 6, 9: 5} if was_there else {1: 6})
    if was_there:
        manager.free(9)
    with raises_unchanged(
        manager, UnknownSequenceError, "sequence 9 is not in the cache"
    ) as caught:
        BY_ID[method](manager, 9)
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, RocmForgeError)


@pytest.mark.parametrize("num_sequences", [1, 16, 17, 32])
@pytest.mark.parametrize("method", ["add_sequence", "fork to"])
def test_an_id_in_use(method, num_sequences):
    # also where the table is full: it must not grow for a sequence that is refused
    manager = manager_of(dict.fromkeys(range(num_sequences), 5))
    with raises_unchanged(manager, ValueError, "sequence 0 is in the cache already"):
        BY_ID[method](manager, 0)


def test_a_sequence_is_no_fork_of_itself():
    manager = manager_of({1: 6})
    with raises_unchanged(manager, ValueError, "child: sequence 1 is in the cache already"):
        manager.fork(1, 1)


BAD_APPENDS = [
    (([9], 1), UnknownSequenceError, "sequence_ids[0]: sequence 9 is not in the cache"),
    (([1, 2, 9], 1), UnknownSequenceError, "sequence_ids[2]: sequence 9 is not in the cache"),
    (([1, 2, 1], 1), ValueError, "sequence_ids[2]: sequence 1 is named twice"),
    (([1, 2], [1]), ValueError, "num_tokens: expected an integer or 2 of them, got 1"),
    (([1], [1, 2]), ValueError, "num_tokens: expected an integer or 1 of them, got 2"),
    (([1], 0), ValueError, "num_tokens: expected 1 .. 2147483647, got 0"),
    (([1], -1), ValueError, "num_tokens: expected 1 .. 2147483647, got -1"),
    (([1], 2**31), ValueError, "num_tokens: expected 1 .. 2147483647, got 2147483648"),
    (([1], 2**80), ValueError, "num_tokens: expected 1 .. 2147483647, got"),
    (([1, 2], [1, 0]), ValueError, "num_tokens[1]: expected 1 .. 2147483647, got 0"),
    (([1, 2], [1, -5]), ValueError, "num_tokens[1]: expected 1 .. 2147483647, got -5"),
    (([1, 2], [2**31, 1]), ValueError, "num_tokens[0]: expected 1 .. 2147483647, got 2147483648"),
    (([1, 2], 2**31 - 1), ValueError, "num_tokens: expected at most 2147483647 in a batch"),
    (([1, 2], [2**31 - 1, 1]), ValueError, "num_tokens: expected at most 2147483647 in a batch"),
    (([1], 1.0), (TypeError, ValueError), "num_tokens: expected"),
    (([1], None), (TypeError, ValueError), "num_tokens: expected"),
    (([1], True), TypeError, "num_tokens: expected an integer, got bool"),
    (([1], [1.0]), TypeError, "num_tokens: expected integers, got dtype float64"),
    (([1], [True]), TypeError, "num_tokens: expected integers, got dtype bool"),
    (([1], [[1]]), ValueError, "num_tokens: expected one dimension, got shape (1, 1)"),
    ((1, 1), ValueError, "sequence_ids: expected one dimension, got shape ()"),
    (([[1]], 1), ValueError, "sequence_ids: expected one dimension, got shape (1, 1)"),
    (([1.0], 1), TypeError, "sequence_ids: expected integers, got dtype float64"),
    ((["1"], 1), TypeError, "sequence_ids: expected integers, got dtype <U1"),
    (([-1], 1), ValueError, "sequence_ids: expected 0 .. 18446744073709551615, got -1 .. -1"),
    (([2**64], 1), ValueError, "sequence_ids: expected 0 .. 18446744073709551615"),
    ((np.array([1, -1]), 1), ValueError, "sequence_ids: expected 0 .. 18446744073709551615"),
    (([1], 243), OutOfBlocksError, "out of blocks: 62 requested, 59 free"),
    (([2, 1], [1, 300]), OutOfBlocksError, "out of blocks: 77 requested, 59 free"),
    (([1, 4], [1, 1000]), OutOfBlocksError, "free"),
    (([1, 3, 4, 9], 1), UnknownSequenceError, "sequence_ids[3]"),  # after planned copies
    (([1, 3, 4, 1], 1), ValueError, "sequence_ids[3]: sequence 1 is named twice"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_APPENDS)
def test_bad_append(arguments, error, message):
    manager = manager_of({1: 6, 2: 12})  # 5 of 64 blocks used
    manager.fork(1, 3)
    manager.fork(1, 4)
    before = state_of(manager)
    with pytest.raises(error) as caught:
        manager.append(*arguments)
    assert message in str(caught.value)
    manager.check_integrity()
    assert state_of(manager) == before
    # nothing is left behind that the next append could trip over
    batch = manager.append([1, 3, 4, 2], 1)
    check_batch(manager, batch, [1, 3, 4, 2], [1] * 4)
    assert len(batch.copies) == 2


def test_the_numbers_of_an_exhaustion():
    manager = manager_of({1: 6}, num_blocks=4)
    manager.fork(1, 2)
    with raises_unchanged(manager, OutOfBlocksError) as caught:
        manager.append([1, 2], 5)  # 1 new block each, and a copy for the first
    assert (caught.value.requested, caught.value.available) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_blocks": -1}, ValueError, "num_blocks: expected 0 .. 2147483647, got -1"),
        ({"num_blocks": 2**31}, ValueError, "num_blocks: expected 0 .. 2147483647"),
        ({"num_blocks": 4.0}, TypeError, "num_blocks: expected an integer, got float"),
        ({"block_size": 0}, ValueError, "block_size: expected 1 .. 2147483647, got 0"),
        ({"block_size": None}, TypeError, "block_size: expected an integer, got NoneType"),
        ({"max_sequences": 0}, ValueError, "max_sequences: expected 1 .. 2147483647, got 0"),
        ({"max_sequences": "3"}, TypeError, "max_sequences: expected an integer, got str"),
        ({"max_seq_len": -1}, ValueError, "max_seq_len: expected 1 .. 2147483647, got -1"),
        ({"max_seq_len": True}, TypeError, "max_seq_len: expected an integer, got bool"),
        ({"blocks": 1}, TypeError, "unexpected keyword argument"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error) as caught:
        KVCacheManager(**{"num_blocks": 4, **arguments})
    assert message in str(caught.value)


def test_options_are_named():
    with pytest.raises(TypeError, match="positional"):
        KVCacheManager(4, 16)


def test_a_block_table_that_was_overwritten_is_found_out():
    manager = manager_of({1: 6})
    manager.block_table[0, 1] = 5
    with pytest.raises(AssertionError, match="sequence 1: the block table differs at 1"):
        manager.check_integrity()
