"""PageTable: (sequence id, token position) -> (block id, offset)."""

import copy
import subprocess
import sys
from array import array
from contextlib import suppress

import numpy as np
import pytest

from metadata_state import raises_unchanged
from rocmforge import PageTable, RocmForgeError
from rocmforge.errors import UnknownSequenceError

LARGEST_ID = 2**64 - 1
LARGEST_BLOCK = 2**31 - 1
BLOCK_SIZES = [1, 7, 16, 256, 2**31 - 1]


def table_of(sequences, block_size=16):
    table = PageTable(block_size)
    for sequence_id, blocks in sequences.items():
        table.append_blocks(sequence_id, blocks)
    return table


# ---- the eleven cases of the original specification ----


def test_page_table_new():
    table = PageTable()
    assert table.num_sequences() == 0
    assert table.block_size == 16


def test_page_table_with_block_size():
    table = PageTable.with_block_size(32)
    assert isinstance(table, PageTable)
    assert table.block_size == 32
    assert table.num_sequences() == 0


def test_page_table_append_block():
    table = PageTable()
    assert table.append_block(1, 100) == 0
    assert table.append_block(1, 101) == 1
    assert table.num_sequences() == 1
    assert table.get_sequence_blocks(1) == [(100, 0), (101, 1)]


def test_page_table_get_block_for_position():
    table = table_of({1: [100, 101]})
    assert table.get_block_for_position(1, 0) == (100, 0)
    assert table.get_block_for_position(1, 15) == (100, 15)
    assert table.get_block_for_position(1, 16) == (101, 0)
    assert table.get_block_for_position(1, 31) == (101, 15)


def test_page_table_remove_sequence():
    table = table_of({1: [100]})
    assert table.remove_sequence(1) is True
    assert table.num_sequences() == 0
    assert table.get_sequence_blocks(1) is None
    assert table.remove_sequence(1) is False


def test_page_table_multiple_sequences():
    table = table_of({1: [100], 2: [200], 3: [300]})
    assert table.num_sequences() == 3
    for sequence_id in (1, 2, 3):
        assert table.get_block_for_position(sequence_id, 0) == (100 * sequence_id, 0)


def test_page_table_offset_calculation():
    table = table_of({1: [100]})
    for position in range(16):
        assert table.get_block_for_position(1, position) == (100, position)


def test_page_table_invalid_position():
    table = table_of({1: [100]})
    assert table.get_block_for_position(1, 16) is None
    assert table.get_block_for_position(1, 1000) is None


def test_page_table_invalid_sequence():
    table = PageTable()
    assert table.get_block_for_position(999, 0) is None
    assert table.get_sequence_blocks(999) is None


def test_page_table_custom_block_size():
    table = table_of({1: [100, 101]}, block_size=32)
    assert table.get_block_for_position(1, 31) == (100, 31)
    assert table.get_block_for_position(1, 32) == (101, 0)


def test_page_table_default():
    assert PageTable() == PageTable(16) == PageTable(block_size=16)


# ---- one sequence ----


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_position_around_a_block_boundary(block_size):
    blocks = [9, 0, LARGEST_BLOCK]
    table = table_of({5: blocks}, block_size)
    for index, block in enumerate(blocks):
        for offset in sorted({0, min(1, block_size - 1), block_size // 2, block_size - 1}):
            position = index * block_size + offset
            assert table.get_block_for_position(5, position) == (block, offset)
            assert table.slot_mapping([5], [position]).tolist() == [block * block_size + offset]
    for position in (3 * block_size, 2**63 - 1):
        assert table.get_block_for_position(5, position) is None


@pytest.mark.parametrize("sequence_id", [0, 1, 2**31, 2**63 - 1, 2**63, LARGEST_ID - 1, LARGEST_ID])
def test_any_unsigned_64_bit_sequence_id(sequence_id):
    table = PageTable(4)
    assert table.append_blocks(sequence_id, [3, 4]) == 0
    assert sequence_id in table
    assert table.sequence_ids().tolist() == [sequence_id]
    assert table.get_block_for_position(sequence_id, 5) == (4, 1)
    assert table.slot_mapping([sequence_id], [5]).tolist() == [17]
    assert table.block_table([sequence_id]).tolist() == [[3, 4]]
    assert table.remove_sequence(sequence_id)
    assert sequence_id not in table


def test_block_indices_count_up_by_themselves():
    table = PageTable()
    assert [table.append_block(1, 7) for _ in range(3)] == [0, 1, 2]  # a block may come twice
    assert table.append_blocks(1, [8, 9]) == 3
    assert table.append_block(1, 10) == 5
    assert table.append_blocks(1, []) == 6
    assert table.get_sequence_blocks(1) == list(zip([7, 7, 7, 8, 9, 10], range(6), strict=True))


def test_a_sequence_without_blocks():
    table = PageTable()
    assert table.append_blocks(1, []) == 0
    assert 1 in table
    assert table.get_sequence_blocks(1) == []
    assert table.block_ids(1).tolist() == []
    assert table.get_block_for_position(1, 0) is None
    assert table.block_table([1]).shape == (1, 0)
    assert table.append_block(1, 5) == 0


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        array("i", [1, 2, 3]),
        [np.int8(1), np.uint64(2), 3],
        *(np.array([1, 2, 3], dtype) for dtype in ("u1", "i2", "i4", "u4", "i8", "u8", ">i4")),
        np.arange(12, dtype=np.int32)[1:4],
        np.array([1, 0, 2, 0, 3], np.int32)[::2],
        np.array([3, 2, 1], np.int64)[::-1],
        np.frombuffer(b"\0" + np.array([1, 2, 3], "i4").tobytes(), "i4", offset=1),  # not aligned
    ],
    ids=lambda ids: f"{type(ids).__name__}-{getattr(ids, 'dtype', '')}",
)
def test_append_blocks_takes_any_sequence_of_integers(ids):
    table = PageTable()
    table.append_blocks(1, ids)
    assert table.block_ids(1).tolist() == [1, 2, 3]


@pytest.mark.parametrize("integer", [int, np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_numpy_integers_are_integers(integer):
    table = PageTable(integer(4))
    assert table.append_block(integer(1), integer(9)) == 0
    assert integer(1) in table
    table.set_block(integer(1), integer(0), integer(8))
    assert table.get_block_for_position(integer(1), integer(3)) == (8, 3)
    assert table.truncate(integer(1), integer(0)).tolist() == [8]
    assert table.remove_sequence(integer(1))


def test_results_are_plain_integers():
    table = table_of({1: np.array([5], np.int64)})
    block, offset = table.get_block_for_position(np.uint64(1), np.int32(3))
    assert [type(x) for x in (block, offset, table.append_block(1, 2))] == [int, int, int]
    assert {type(x) for pair in table.get_sequence_blocks(1) for x in pair} == {int}


def test_set_block_replaces_one_block():
    table = table_of({1: [10, 11, 12], 2: [20]})
    assert table.set_block(1, 1, 99) is None
    assert table.get_sequence_blocks(1) == [(10, 0), (99, 1), (12, 2)]
    assert table.get_sequence_blocks(2) == [(20, 0)]


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_truncate_keeps_the_first_blocks(keep):
    table = table_of({1: [10, 11, 12], 2: [20]})
    removed = table.truncate(1, keep)
    assert removed.dtype == np.int32
    assert removed.tolist() == [10, 11, 12][keep:]
    assert table.block_ids(1).tolist() == [10, 11, 12][:keep]
    assert 1 in table
    assert table.append_block(1, 13) == keep
    assert table.block_ids(2).tolist() == [20]


def test_block_ids_is_a_copy():
    table = table_of({1: [10, 11]})
    ids = table.block_ids(1)
    assert ids.dtype == np.int32
    ids[:] = 0
    table.set_block(1, 0, 5)
    assert ids.tolist() == [0, 0]
    assert table.block_ids(1).tolist() == [5, 11]


@pytest.mark.parametrize("room", [2, 3, 10])
def test_block_ids_into_a_buffer(room):
    table = table_of({1: [10, 11]})
    out = np.full(room, -7, np.int32)
    filled = table.block_ids(1, out)
    assert filled.tolist() == [10, 11]
    assert np.shares_memory(filled, out)
    assert out.tolist() == [10, 11] + [-7] * (room - 2)
    assert table.block_ids(1, out=out).tolist() == [10, 11]


def test_a_removed_id_starts_anew():
    table = table_of({1: [10, 11], 2: [20]})
    table.remove_sequence(1)
    assert table.append_block(1, 30) == 0
    assert table.get_sequence_blocks(1) == [(30, 0)]
    assert table.get_sequence_blocks(2) == [(20, 0)]


def test_sequence_ids_lists_every_sequence():
    ids = [0, 5, 2**63, LARGEST_ID]
    table = table_of({i: [1] for i in ids})
    assert table.sequence_ids().dtype == np.uint64
    assert sorted(table.sequence_ids().tolist()) == ids
    assert PageTable().sequence_ids().shape == (0,)


def test_ids_that_collide_with_free_rows_are_told_apart():
    # a free row's place holds a link to the next free row: small numbers and 2**64 - 1
    table = table_of({i: [i] for i in range(8)})
    for i in (1, 3, 5):
        table.remove_sequence(i)
    table.append_block(LARGEST_ID, 9)
    table.check_integrity()
    assert sorted(table.sequence_ids().tolist()) == [0, 2, 4, 6, 7, LARGEST_ID]
    assert 1 not in table
    assert 3 not in table


def test_many_sequences_come_and_go():
    rng = np.random.default_rng(7)
    table, model = PageTable(4), {}
    for step in range(20_000):
        sequence_id = int(rng.integers(0, 400)) * 0x9E3779B97F4A7C15 % 2**64
        if rng.random() < 0.45:
            assert table.remove_sequence(sequence_id) == (model.pop(sequence_id, None) is not None)
        else:
            blocks = model.setdefault(sequence_id, [])
            assert table.append_block(sequence_id, step) == len(blocks)
            blocks.append(step)
    table.check_integrity()
    assert {int(i): table.block_ids(i).tolist() for i in table.sequence_ids()} == model


# ---- batches ----


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_slot_mapping(block_size):
    table = table_of({3: [5, 2], LARGEST_ID: [0, 7]}, block_size)
    ids = [3, 3, LARGEST_ID, 3, LARGEST_ID]
    positions = [0, block_size, 2 * block_size - 1, block_size - 1, 0]
    expected = [
        block * block_size + offset
        for block, offset in map(table.get_block_for_position, ids, positions)
    ]
    slots = table.slot_mapping(np.array(ids, np.uint64), positions)
    assert slots.dtype == np.int64
    assert slots.tolist() == expected


def test_slot_mapping_of_long_runs():
    table = table_of({1: [4, 9, 1], 2: [7]}, block_size=7)
    ids = np.repeat(np.array([1, 2, 1], np.int64), [21, 7, 21])
    positions = np.concatenate([np.arange(21), np.arange(7), np.arange(20, -1, -1)])
    one = [block * 7 + offset for block in (4, 9, 1) for offset in range(7)]
    assert table.slot_mapping(ids, positions).tolist() == [*one, *range(49, 56), *one[::-1]]


@pytest.mark.parametrize("first", [0, 3, -5, -(2**63)])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 97, 300])
def test_slot_mapping_of_runs_of_any_length(length, first):
    table = table_of({1: range(100, 0, -1), 2: range(200, 300)}, block_size=4)
    one_by_one = {s: [b * 4 + k for b in table.block_ids(s) for k in range(4)] for s in (1, 2)}
    ids = [*[1] * length, *[2] * length, *[1] * length]
    positions = np.concatenate([np.arange(length, dtype=np.int64) + first] * 3)
    expected = [
        -1 if p < 0 else one_by_one[s][p] for s, p in zip(ids, positions.tolist(), strict=True)
    ]
    assert table.slot_mapping(ids, positions).tolist() == expected


@pytest.mark.parametrize("odd", [1, 5, 31, 32, 33, 40, 63, 64, 65, 99])
def test_slot_mapping_of_a_run_that_one_token_breaks(odd):
    table = table_of({1: range(30), 2: range(30, 60)}, block_size=4)
    ids, positions = np.full(100, 1), np.arange(100)
    ids[odd] = 2
    assert table.slot_mapping(ids, positions).tolist() == [
        *range(odd),
        120 + odd,
        *range(odd + 1, 100),
    ]
    ids[odd], positions[odd] = 1, 7
    assert table.slot_mapping(ids, positions).tolist() == [*range(odd), 7, *range(odd + 1, 100)]
    positions[odd] = 120
    out = np.full(100, 7)
    with raises_unchanged(table, ValueError, f"positions[{odd}]: sequence 1 has slots for 120"):
        table.slot_mapping(ids, positions, out)
    assert (out == 7).all()


def test_slot_mapping_of_more_runs_than_are_noted():
    table = table_of({1: range(30), 2: range(30, 60)}, block_size=4)
    ids = np.tile([1, 2], 700)
    positions = np.arange(1400) % 120
    assert table.slot_mapping(ids, positions).tolist() == (positions + 120 * (ids - 1)).tolist()


def test_the_first_position_without_a_slot_is_named():
    table = table_of({1: range(30)}, block_size=4)
    for first, bad in ((100, 20), (-40, 160), (119, 1), (120, 0)):
        with raises_unchanged(table, ValueError, f"positions[{bad}]: sequence 1 has slots for 120"):
            table.slot_mapping([1] * 200, np.arange(first, first + 200))


def test_slot_mapping_negative_positions_are_padding():
    table = table_of({1: [4, 9]}, block_size=4)
    assert table.slot_mapping([1] * 5, [-1, 5, -1, -(2**63), 0]).tolist() == [-1, 37, -1, -1, 16]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64, np.longlong, ">i8"])
def test_arrays_of_any_integer_type(dtype):
    table = table_of({1: [4, 9], 2: [3]}, block_size=4)
    ids, positions = np.array([2, 1, 1], dtype), np.array([1, 0, 4], dtype)
    assert table.slot_mapping(ids, positions).tolist() == [13, 16, 36]
    assert table.block_table(np.array([2, 1], dtype)).tolist() == [[3, -1], [4, 9]]


def test_sequence_ids_of_both_halves_in_one_list():
    # NumPy makes float64 of such a list
    table = table_of({5: [1], 2**63: [2], LARGEST_ID: [3]}, block_size=1)
    assert table.slot_mapping([5, 2**63, LARGEST_ID], [0, 0, 0]).tolist() == [1, 2, 3]
    assert table.slot_mapping((LARGEST_ID, np.int64(5)), range(0, -2, -1)).tolist() == [3, -1]
    assert table.block_table([5, 2**63, LARGEST_ID]).tolist() == [[1], [2], [3]]


def test_positions_past_2_to_the_31():
    table = table_of({1: [LARGEST_BLOCK, LARGEST_BLOCK]}, block_size=2**31 - 1)
    last = 2 * (2**31 - 1) - 1
    expected = LARGEST_BLOCK * (2**31 - 1) + 2**31 - 2
    assert table.slot_mapping([1], [last]).tolist() == [expected]


def test_block_table_pads_short_rows():
    table = table_of({1: [10, 11, 12], 2: [20], 3: []})
    dense = table.block_table([2, 1, 3, 2])
    assert dense.dtype == np.int32
    assert dense.tolist() == [[20, -1, -1], [10, 11, 12], [-1, -1, -1], [20, -1, -1]]
    assert table.block_table([2, 1], pad=0).tolist() == [[20, 0, 0], [10, 11, 12]]
    assert table.block_table(i for i in (2,)).tolist() == [[20]]


def test_empty_batches():
    table = table_of({1: [10]})
    assert table.slot_mapping([], []).shape == (0,)
    assert table.slot_mapping(np.empty(0, np.int64), []).dtype == np.int64
    assert table.block_table([]).shape == (0, 0)
    assert table.block_table([], out=np.empty((0, 5), np.int32)).shape == (0, 5)


def test_out_buffers_are_filled_and_returned():
    table = table_of({1: [10, 11], 2: [20]}, block_size=4)
    slots = np.zeros(2, np.int64)
    assert table.slot_mapping([1, 2], [4, 1], out=slots) is slots
    assert slots.tolist() == [44, 81]
    dense = np.zeros((2, 4), np.int32)
    assert table.block_table([2, 1], pad=-5, out=dense) is dense
    assert dense.tolist() == [[20, -5, -5, -5], [10, 11, -5, -5]]


def test_out_may_be_an_input():
    table = table_of({1: [10, 11]}, block_size=4)
    positions = np.array([5, 0, 7], np.int64)
    assert table.slot_mapping([1, 1, 1], positions, out=positions).tolist() == [45, 40, 47]
    ids = np.array([1, 1], np.int64)
    assert table.slot_mapping(ids, [1, 2], out=ids).tolist() == [41, 42]


@pytest.mark.parametrize("shift", [1, 2, -1])
def test_out_may_overlap_an_input(shift):
    table = table_of({1: [LARGEST_BLOCK, 0, 11], 2: [3]}, block_size=4)
    ids, positions = [1, 1, 2, 1, 2], [5, 0, 1, 11, -1]
    expected = table.slot_mapping(ids, positions).tolist()
    for name in ("ids", "positions"):
        buffer = np.zeros(9, np.int64)
        source, out = buffer[2:7], buffer[2 + shift : 7 + shift]
        source[:] = ids if name == "ids" else positions
        arguments = (source, positions) if name == "ids" else (ids, source)
        assert table.slot_mapping(*arguments, out=out).tolist() == expected


# ---- the whole table ----


def test_len_contains_repr():
    table = table_of({1: [10, 11], 2: [20]}, block_size=8)
    assert len(table) == table.num_sequences() == 2
    assert 1 in table
    assert 3 not in table
    assert repr(table) == "PageTable(block_size=8, num_sequences=2, num_blocks=3)"


def test_equality_is_by_contents():
    table = table_of({1: [10, 11], 2: []})
    assert table == table
    assert table == table_of({2: [], 1: [10, 11]})
    detour = table_of({7: [1], 1: [10], 2: []})
    detour.remove_sequence(7)
    detour.append_block(1, 11)
    assert table == detour
    for other in (
        table_of({1: [10, 11]}),
        table_of({1: [10, 11], 3: []}),
        table_of({1: [10, 12], 2: []}),
        table_of({1: [10, 11], 2: [1]}),
        table_of({1: [10, 11], 2: []}, block_size=8),
        {1: [10, 11], 2: []},
        None,
    ):
        assert table != other


def test_a_table_is_mutable_so_it_has_no_hash():
    with pytest.raises(TypeError, match="unhashable"):
        hash(PageTable())


@pytest.mark.parametrize("duplicate", [PageTable.copy, copy.copy, copy.deepcopy])
def test_copies_are_independent(duplicate):
    table = table_of({1: [10, 11], LARGEST_ID: [], 2: [20]}, block_size=8)
    table.remove_sequence(2)
    other = duplicate(table)
    assert other == table
    other.check_integrity()
    other.append_block(1, 12)
    other.append_block(3, 1)
    assert table == table_of({1: [10, 11], LARGEST_ID: []}, block_size=8)
    del table
    assert other.block_ids(1).tolist() == [10, 11, 12]


# ---- memory ----

MEASURE = """
import sys
from random import Random
from rocmforge import PageTable

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

growth, most = sys.argv[1], int(sys.argv[2])
random = Random(0)
counts = [random.randint(1, most) if growth != "rounds" else most for _ in range(100_000)]
table = PageTable()
table.append_blocks(0, list(range(most)))
table.remove_sequence(0)
before = resident()
if growth == "whole":
    for i, n in enumerate(counts):
        table.append_blocks(i, range(n))
elif growth == "single":
    for i, n in enumerate(counts):
        for block in range(n):
            table.append_block(i, block)
else:
    for block in range(most):
        for i in range(100_000):
            table.append_block(i, block)
print(resident() - before, table.nbytes, sum(counts))
"""


@pytest.mark.uninstrumented
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("most", [1, 8, 40])
@pytest.mark.parametrize("growth", ["whole", "single", "rounds"])
def test_memory_of_100_000_sequences(growth, most):
    command = [sys.executable, "-P", "-c", MEASURE, growth, str(most)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    resident, nbytes, blocks = map(int, done.stdout.split())
    bound = 4.5 * blocks + 64 * 100_000
    assert nbytes <= bound
    assert resident <= bound


def test_memory_of_a_long_sequence():
    table = PageTable()
    for block in range(100_000):
        table.append_block(1, block)
    assert table.nbytes <= 4.5 * 100_000 + 1024


# ---- bad input: the message, and nothing changed ----

BAD_IDS = [
    (-1, ValueError, "sequence id: expected 0 .. 2**64 - 1, got -1"),
    (2**64, ValueError, "sequence id: expected 0 .. 2**64 - 1, got 18446744073709551616"),
    ("1", TypeError, "sequence id: expected an integer, got str"),
    (1.0, TypeError, "sequence id: expected an integer, got float"),
    (None, TypeError, "sequence id: expected an integer, got NoneType"),
    (True, TypeError, "sequence id: expected an integer, got bool"),
]
BY_ID = {
    "append_block": lambda table, i: table.append_block(i, 1),
    "append_blocks": lambda table, i: table.append_blocks(i, [1]),
    "set_block": lambda table, i: table.set_block(i, 0, 1),
    "truncate": lambda table, i: table.truncate(i, 0),
    "remove_sequence": lambda table, i: table.remove_sequence(i),
    "get_block_for_position": lambda table, i: table.get_block_for_position(i, 0),
    "get_sequence_blocks": lambda table, i: table.get_sequence_blocks(i),
    "block_ids": lambda table, i: table.block_ids(i),
    "block_table": lambda table, i: table.block_table([1, i]),
    "in": lambda table, i: i in table,
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_IDS)
@pytest.mark.parametrize("method", BY_ID)
def test_bad_sequence_id(method, bad, error, message):
    table = table_of({1: [10, 11]})
    with raises_unchanged(table, error, message):
        BY_ID[method](table, bad)


@pytest.mark.parametrize("method", ["set_block", "truncate", "block_ids", "block_table"])
def test_unknown_sequence(method):
    table = table_of({1: [10, 11]})
    message = "sequence 9 is not in the page table"
    with raises_unchanged(table, UnknownSequenceError, message) as caught:
        BY_ID[method](table, 9)
    assert str(caught.value) == message
    assert isinstance(caught.value, (KeyError, RocmForgeError))


READ_ONLY = np.zeros(2, np.int64)
READ_ONLY.flags.writeable = False
UNALIGNED = np.zeros(9, np.uint8)[1:].view(np.int64)

BAD_CALLS = [
    (lambda t: t.append_block(1, -1), ValueError, "block_id: expected 0 .. 2147483647, got -1"),
    (lambda t: t.append_block(9, 2**31), ValueError,
     "block_id: expected 0 .. 2147483647, got 2147483648"),
    (lambda t: t.append_block(9, 2**70), ValueError, "block_id: expected 0 .. 2147483647, got"),
    (lambda t: t.append_block(9, 1.0), TypeError, "block_id: expected an integer, got float"),
    (lambda t: t.append_block(9, True), TypeError, "block_id: expected an integer, got bool"),
    (lambda t: t.append_blocks(1, [5, -2]), ValueError,
     "block_ids[1]: expected 0 .. 2147483647, got -2"),
    (lambda t: t.append_blocks(9, [0, 2**31]), ValueError,
     "block_ids: expected -2147483648 .. 2147483647, got 0 .. 2147483648"),
    (lambda t: t.append_blocks(9, [2**64]), ValueError, "block_ids: "),
    (lambda t: t.append_blocks(9, [1.0]), TypeError,
     "block_ids: expected integers, got dtype float64"),
    (lambda t: t.append_blocks(9, [1, None]), TypeError,
     "block_ids: expected integers, got dtype object"),
    (lambda t: t.append_blocks(9, [True]), TypeError,
     "block_ids: expected integers, got dtype bool"),
    (lambda t: t.append_blocks(9, ["1"]), TypeError, "block_ids: expected integers, got dtype <U1"),
    (lambda t: t.append_blocks(9, [[1]]), ValueError,
     "block_ids: expected one dimension, got shape (1, 1)"),
    (lambda t: t.append_blocks(9, [[1], [2, 3]]), TypeError,
     "block_ids: expected a sequence of integers, got list"),
    (lambda t: t.append_blocks(9, 5), ValueError,
     "block_ids: expected one dimension, got shape ()"),
    (lambda t: t.set_block(1, 2, 5), ValueError, "index: expected 0 .. 1, got 2"),
    (lambda t: t.set_block(1, -1, 5), ValueError, "index: expected 0 .. 1, got -1"),
    (lambda t: t.set_block(2, 0, 5), ValueError, "index: sequence 2 has no blocks"),
    (lambda t: t.set_block(1, 0, -1), ValueError, "block_id: expected 0 .. 2147483647, got -1"),
    (lambda t: t.set_block(1, "0", 1), TypeError, "index: expected an integer, got str"),
    (lambda t: t.truncate(1, 3), ValueError, "num_blocks: expected 0 .. 2, got 3"),
    (lambda t: t.truncate(1, -1), ValueError, "num_blocks: expected 0 .. 2, got -1"),
    (lambda t: t.truncate(1, None), TypeError, "num_blocks: expected an integer, got NoneType"),
    (lambda t: t.get_block_for_position(1, -1), ValueError, "token_pos: expected 0 .. "),
    (lambda t: t.get_block_for_position(9, -1), ValueError, "token_pos: expected 0 .. "),
    (lambda t: t.get_block_for_position(1, 2**63), ValueError, "token_pos: expected 0 .. "),
    (lambda t: t.get_block_for_position(1, 0.0), TypeError,
     "token_pos: expected an integer, got float"),
    (lambda t: t.block_ids(1, np.zeros(1, np.int32)), ValueError,
     "out: expected shape (2,), got (1,)"),
    (lambda t: t.block_ids(1, np.zeros((1, 2), np.int32)), ValueError,
     "out: expected shape (2,), got (1, 2)"),
    (lambda t: t.block_ids(1, np.zeros(2, np.int64)), ValueError,
     "out: expected dtype int32, got int64"),
    (lambda t: t.block_ids(1, np.zeros(4, np.int32)[::2]), ValueError,
     "out: expected a writable, aligned, C-contiguous array"),
    (lambda t: t.block_ids(1, [0, 0]), TypeError, "out: expected a NumPy array, got list"),
    (lambda t: t.slot_mapping([1, 9], [0, 0]), UnknownSequenceError,
     "sequence_ids[1]: sequence 9 is not in the page table"),
    (lambda t: t.slot_mapping([9], [-1]), UnknownSequenceError,
     "sequence_ids[0]: sequence 9 is not in the page table"),
    (lambda t: t.slot_mapping([1, 1], [0, 32]), ValueError,
     "positions[1]: sequence 1 has slots for 32 tokens, got position 32"),
    (lambda t: t.slot_mapping([2], [0]), ValueError,
     "positions[0]: sequence 2 has slots for 0 tokens, got position 0"),
    (lambda t: t.slot_mapping([1, 1], [0]), ValueError,
     "positions: expected 2 as in sequence_ids, got 1"),
    (lambda t: t.slot_mapping([1], [0.5]), TypeError,
     "positions: expected integers, got dtype float64"),
    (lambda t: t.slot_mapping([1], np.array([2**63], np.uint64)), ValueError,
     "positions: expected -9223372036854775808 .. 9223372036854775807, got"),
    (lambda t: t.slot_mapping([-1], [0]), ValueError,
     "sequence_ids: expected 0 .. 18446744073709551615, got -1"),
    (lambda t: t.slot_mapping(np.array([1, -1]), [0, 0]), ValueError, "sequence_ids"),
    (lambda t: t.slot_mapping([2**64], [0]), ValueError, "sequence_ids: "),
    (lambda t: t.slot_mapping([1.0], [0]), TypeError,
     "sequence_ids: expected integers, got dtype float64"),
    (lambda t: t.slot_mapping([2**63, 1.0], [0, 0]), TypeError,
     "sequence_ids: expected integers, got dtype float64"),
    (lambda t: t.slot_mapping(np.empty(0), []), TypeError,
     "sequence_ids: expected integers, got dtype float64"),
    (lambda t: t.slot_mapping([[1]], [[0]]), ValueError,
     "sequence_ids: expected one dimension, got shape (1, 1)"),
    (lambda t: t.slot_mapping([1], [0], out=np.zeros(2, np.int64)), ValueError,
     "out: expected shape (1,), got (2,)"),
    (lambda t: t.slot_mapping([1], [0], out=np.zeros(1, np.int32)), ValueError,
     "out: expected dtype int64, got int32"),
    (lambda t: t.slot_mapping([1, 1], [0, 1], out=READ_ONLY), ValueError,
     "out: expected a writable, aligned, C-contiguous array"),
    (lambda t: t.slot_mapping([1], [0], out=UNALIGNED), ValueError,
     "out: expected a writable, aligned, C-contiguous array"),
    (lambda t: t.slot_mapping([1], [0], out=np.zeros(1, ">i8")), ValueError,
     "out: expected dtype int64, got >i8"),
    (lambda t: t.block_table([1], pad=2**31), ValueError,
     "pad: expected -2147483648 .. 2147483647, got 2147483648"),
    (lambda t: t.block_table([1], pad=0.0), TypeError, "pad: expected an integer, got float"),
    (lambda t: t.block_table(1), TypeError, "not iterable"),
    (lambda t: t.block_table([1], out=np.zeros((1, 1), np.int32)), ValueError,
     "out: expected shape (1, 2), got (1, 1)"),
    (lambda t: t.block_table([1, 2], out=np.zeros((1, 2), np.int32)), ValueError,
     "out: expected shape (2, 2), got (1, 2)"),
    (lambda t: t.block_table([1], out=np.zeros((1, 2), np.uint32)), ValueError,
     "out: expected dtype int32, got uint32"),
    (lambda t: t.block_table([1, 2], out=np.zeros((2, 2), np.int32, order="F")), ValueError,
     "out: expected a writable, aligned, C-contiguous array"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[c[2] for c in BAD_CALLS])
def test_bad_call(call, error, message):
    table = table_of({1: [10, 11], 2: [], LARGEST_ID: [7]})
    with raises_unchanged(table, error, message):
        call(table)


def test_a_wrong_position_leaves_the_buffer_untouched():
    table = table_of({1: [10, 11]})
    out = np.full(2, 99, np.int64)
    with raises_unchanged(table, ValueError, "positions[1]"):
        table.slot_mapping([1, 1], [0, 32], out=out)
    with raises_unchanged(table, UnknownSequenceError, "sequence_ids[1]"):
        table.slot_mapping([1, 9], [0, 0], out=out)
    assert out.tolist() == [99, 99]


@pytest.mark.parametrize(
    ("block_size", "error", "message"),
    [
        (0, ValueError, "block_size: expected 1 .. 2147483647, got 0"),
        (-1, ValueError, "block_size: expected 1 .. 2147483647, got -1"),
        (2**31, ValueError, "block_size: expected 1 .. 2147483647, got 2147483648"),
        (2**64, ValueError, "block_size: expected 1 .. 2147483647, got 18446744073709551616"),
        (16.0, TypeError, "block_size: expected an integer, got float"),
        ("16", TypeError, "block_size: expected an integer, got str"),
        (True, TypeError, "block_size: expected an integer, got bool"),
        (None, TypeError, "block_size: expected an integer, got NoneType"),
    ],
)
@pytest.mark.parametrize("make", [PageTable, PageTable.with_block_size])
def test_bad_block_size(make, block_size, error, message):
    with pytest.raises(error) as caught:
        make(block_size)
    assert str(caught.value) == message


def test_block_size_cannot_be_set():
    with pytest.raises(AttributeError):
        PageTable().block_size = 8


class Index:
    """An integer in Python code, that does something else before it says its value."""

    def __init__(self, value, action):
        self.value, self.action = value, action

    def __index__(self):
        self.action()
        return self.value


@pytest.mark.parametrize(
    "call",
    [
        lambda table, i: table.set_block(1, i, 5),
        lambda table, i: table.set_block(1, 0, i),
        lambda table, i: table.truncate(1, i),
        lambda table, i: table.get_block_for_position(1, i),
        lambda table, i: table.append_block(1, i),
        lambda table, i: table.append_blocks(1, [i]),
        lambda table, i: table.block_table([1], pad=i),
        lambda table, i: table.slot_mapping([1], [i]),
    ],
)
@pytest.mark.parametrize("ending", ["remove", "truncate", "grow"])
def test_an_integer_that_changes_the_table(call, ending):
    table = table_of({1: [10, 11]})

    def action():
        if ending == "remove":
            table.remove_sequence(1)
        elif ending == "truncate":
            table.truncate(1, 0)
        else:
            table.append_blocks(1, range(1000))
            for other in range(2, 500):
                table.append_blocks(other, [1])

    with suppress(ValueError, KeyError):
        call(table, Index(0, action))
    table.check_integrity()
