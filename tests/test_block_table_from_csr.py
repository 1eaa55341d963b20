"""Block tables from the compressed rows of FlashInfer and AITER."""

import numpy as np
import pytest

from rocmforge import KVCacheManager
from rocmforge.ops import block_table_from_csr


def csr(rows: list[list[int]], filled: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    indptr = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return (
        indptr,
        np.array([block for row in rows for block in row], np.int32),
        np.array(filled, np.int32),
    )


ROWS, FILLED = [[5, 1, 7], [], [4], [0, 2]], [3, 0, 4, 1]
TABLE = [[5, 1, 7], [-1, -1, -1], [4, -1, -1], [0, 2, -1]]
LENGTHS = [11, 0, 4, 5]


def test_rows_of_all_lengths():
    table, lengths = block_table_from_csr(*csr(ROWS, FILLED), 4)
    assert (table.dtype, lengths.dtype) == (np.int32, np.int32)
    assert (table.tolist(), lengths.tolist()) == (TABLE, LENGTHS)


@pytest.mark.parametrize("filled", [0, 99, -1])
def test_the_last_page_of_nothing_is_not_read(filled):
    table, lengths = block_table_from_csr(*csr([[], [3]], [filled, 2]), np.int64(2))
    assert (table.tolist(), lengths.tolist()) == ([[-1], [3]], [0, 2])


@pytest.mark.parametrize("rows", [[], [[], []]])
def test_no_blocks(rows):
    table, lengths = block_table_from_csr(*csr(rows, [0] * len(rows)), 16)
    assert table.shape == (len(rows), 0)
    assert lengths.tolist() == [0] * len(rows)


def test_entries_past_the_last_row_are_not_read():
    indptr, indices, filled = csr([[2], [8, 3]], [1, 1])
    padded = np.concatenate([indices, np.full(50, 2**31 - 1, np.int32)])
    table, lengths = block_table_from_csr(indptr, padded, filled, 16)
    assert (table.tolist(), lengths.tolist()) == ([[2, -1], [8, 3]], [1, 17])


def test_a_table_that_is_kept():
    kept = np.full((6, 10), 77, np.int32)
    view = kept[:5, 1:]  # any row stride
    table, lengths = block_table_from_csr(*csr(ROWS, FILLED), 4, out=view)
    assert table is view
    assert lengths.tolist() == LENGTHS
    expected = np.full((6, 10), 77)
    for i, row in enumerate(ROWS):
        expected[i, 1 : 1 + len(row)] = row
    assert kept.tolist() == expected.tolist()


def test_there_and_back():
    manager = KVCacheManager(200, block_size=8)
    rng = np.random.default_rng(0)
    for i in range(20):
        manager.add_sequence(i)
    batch = manager.append(range(20), rng.integers(1, 60, 20))
    table, lengths = block_table_from_csr(
        batch.kv_indptr, batch.kv_indices, batch.kv_last_page_len, 8
    )
    assert lengths.tolist() == batch.seq_lens.tolist()
    for row, length, ours in zip(batch.rows, lengths, table, strict=True):
        num_blocks = -(-length // 8)
        assert ours[:num_blocks].tolist() == batch.block_table[row, :num_blocks].tolist()
        assert (ours[num_blocks:] == -1).all()


INT = np.int32
GOOD = {
    "kv_indptr": np.array([0, 2, 3], INT),
    "kv_indices": np.array([1, 2, 3], INT),
    "kv_last_page_len": np.array([1, 4], INT),
    "block_size": 4,
}
READ_ONLY = np.zeros((2, 2), INT)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_indptr": [0, 2, 3]}, TypeError, "kv_indptr must be a NumPy array or an object with"),
        ({"kv_indptr": np.array([0, 2, 3])}, ValueError, "kv_indptr must be int32, got int64"),
        ({"kv_indptr": np.array([], INT)}, ValueError, "must have shape [num_seqs + 1], got [0]"),
        ({"kv_indptr": np.array([[0]], INT)}, ValueError, "kv_indptr must have shape"),
        ({"kv_indptr": np.array([1, 2, 3], INT)}, ValueError, "must begin with 0, got 1"),
        (
            {"kv_indptr": np.array([0, 2, 1], INT)},
            ValueError,
            "kv_indptr must not decrease, got 2 and then 1 at entry 2",
        ),
        ({"kv_indptr": np.array([0, -1, 3], INT)}, ValueError, "not decrease, got 0 and then -1"),
        (
            {"kv_indptr": np.array([0, 2, 4], INT)},
            ValueError,
            "kv_indices must have the 4 entries that kv_indptr ends with, got [3]",
        ),
        (
            {"kv_indptr": np.array([0, 2], INT)},
            ValueError,
            "kv_last_page_len must have shape [num_seqs] with 1 entries, got [2]",
        ),
        ({"kv_indices": np.array([1, 2, 3], np.uint32)}, ValueError, "kv_indices must be int32"),
        ({"kv_indices": np.arange(6, dtype=INT)[::2]}, ValueError, "kv_indices must be contiguous"),
        (
            {"kv_last_page_len": np.array([1, 5], INT)},
            ValueError,
            "kv_last_page_len must be 1 to block_size, 4, got 5 for sequence 1",
        ),
        ({"kv_last_page_len": np.array([0, 4], INT)}, ValueError, "got 0 for sequence 0"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 1.0}, TypeError, "block_size must be an integer"),
        ({"block_size": None}, TypeError, "block_size must be an integer, got NoneType"),
        ({"block_size": 2**31}, ValueError, "less than 2**31 tokens, got 2 blocks of 2147483648"),
        ({"out": np.zeros((1, 2), INT)}, ValueError, "out must have shape [2, 2] or larger"),
        ({"out": np.zeros((2, 1), INT)}, ValueError, "out must have shape [2, 2] or larger"),
        ({"out": np.zeros(4, INT)}, ValueError, "out must have shape [2, 2] or larger, got [4]"),
        ({"out": np.zeros((2, 2))}, ValueError, "out must be int32, got float64"),
        ({"out": np.zeros((2, 2), INT, "F")}, ValueError, "out must be contiguous in its last"),
        ({"out": READ_ONLY}, ValueError, "out must be writable, got a read-only array"),
        ({"out": GOOD["kv_indices"][:0].reshape(0, 2)}, ValueError, "out must have shape [2, 2]"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {**GOOD, **change}
    before = None if "out" not in change else change["out"].tobytes()
    with pytest.raises(error) as caught:
        block_table_from_csr(**arguments)
    assert message in str(caught.value)
    assert before is None or change["out"].tobytes() == before


def test_the_table_must_not_be_one_of_the_inputs():
    buffer = np.array([0, 2, 3, 7], INT)
    with pytest.raises(ValueError, match="out must not overlap kv_indptr in memory"):
        block_table_from_csr(**{**GOOD, "kv_indptr": buffer[:3]}, out=buffer.reshape(2, 2))
