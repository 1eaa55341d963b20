"""Arrays of libraries that offer DLPack's exchange API: read without Python, results of theirs."""

import numpy as np
import pytest

from exchange import Describe, Exchanged, offer
from ops_cases import BFLOAT16, FLOAT32, bits, make
from rocmforge.ops import calibrate, gather_blocks, merge_states, paged_attention, write_kv


@pytest.fixture
def library():
    """A fresh type each time, as what is known of a type is kept."""
    kind = type("Exchanged", (Exchanged,), {"make": Exchanged.__dict__["make"]})
    kind.table = offer(kind)
    return kind


def arrays(problem, library):
    names = ("query", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")
    return problem.but(**{name: library(getattr(problem, name)) for name in names})


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_results_are_of_the_library(library, dtype):
    problem = make(dtype, [40, 3], [2, 1], head_dim=24)
    want, want_lse = problem.call(paged_attention, return_lse=True)
    out, lse = arrays(problem, library).call(paged_attention, return_lse=True)
    assert type(out) is type(lse) is library
    np.testing.assert_array_equal(bits(out.array), bits(want))
    np.testing.assert_array_equal(lse.array, want_lse)
    merged, merged_lse = merge_states(out, lse, out, lse)
    assert type(merged) is type(merged_lse) is library
    np.testing.assert_array_equal(
        bits(merged.array), bits(merge_states(want, want_lse, want, want_lse)[0])
    )


def test_out_is_what_was_given(library):
    problem = make(FLOAT32, [5], head_dim=8)
    out = library.make(problem.query.shape, FLOAT32)
    assert (
        arrays(problem.but(cu_seqlens_q=np.array([0, 1], np.int32)), library).call(
            paged_attention, out=out
        )
        is out
    )
    np.testing.assert_array_equal(out.array, problem.call(paged_attention))


def test_blocks_and_scales(library):
    cache = library(np.arange(48, dtype=np.float32).reshape(3, 2, 8))
    ids = np.array([2, 0], np.int32)
    rows = gather_blocks(cache, ids)
    assert type(rows) is library
    np.testing.assert_array_equal(rows.array, gather_blocks(cache.array, ids))
    scale, none = calibrate(cache, None, "int8")
    assert type(scale) is library
    assert none is None
    np.testing.assert_array_equal(scale.array, calibrate(cache.array, None, "int8")[0])


def test_writes_go_to_its_memory(library):
    key = library(np.ones((1, 2, 8), np.float32))
    pools = [library(np.zeros((2, 2, 4, 8), np.float32)) for _ in range(2)]
    write_kv(key, key, *pools, library(np.array([5])))
    for pool in pools:
        assert pool.array[1, :, 1].all()
        assert pool.array.sum() == 16


def test_there_may_be_no_room(library):
    problem = arrays(make(FLOAT32, [5], [1], head_dim=8), library)
    library.room = False
    with pytest.raises(MemoryError, match=r"Exchanged of float32 \[1, 4, 8\]: there is no room"):
        problem.call(paged_attention)


def test_memory_of_another_device(library):
    problem = arrays(make(FLOAT32, [5], [1], head_dim=8), library)
    library.device = (2, 0)
    with pytest.raises(ValueError, match=r"query must be in host memory .* Exchanged on DLPack"):
        problem.call(paged_attention)


@pytest.mark.parametrize("changes", [{"major": 2}, {"major": 0}, {"describe": Describe()}])
def test_tables_that_are_not_known_are_left_alone(library, changes):
    library.table = offer(library, **changes)
    problem = arrays(make(FLOAT32, [5], [1], head_dim=8), library)
    with pytest.raises(AssertionError, match="asked for"):
        problem.call(paged_attention)


def test_a_subclass_is_another_type(library):
    """It may have no memory of its own, as PyTorch's fake tensors."""
    problem = make(FLOAT32, [5], head_dim=8)
    kind = type("Fake", (library,), {})
    with pytest.raises(AssertionError, match="asked for"):
        problem.but(query=kind(problem.query)).call(paged_attention)
