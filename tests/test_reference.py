"""The oracle itself, against dense attention that is written in another way."""

import numpy as np
import pytest

from ops_cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, make
from rocmforge import reference


def dense(problem, scale, causal):
    """Gather by slots, mask with a matrix, one einsum for all heads, sums in long double."""
    q, k, v = problem.query, problem.k_cache, problem.v_cache
    if problem.layout == "HND":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    block_size = k.shape[1]
    k, v = (x.reshape(-1, *x.shape[2:]).astype(np.longdouble) for x in (k, v))
    group = q.shape[1] // k.shape[1]
    starts = problem.cu_seqlens_q
    if starts is None:
        starts = np.arange(len(q) + 1)
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for i, length in enumerate(problem.seq_lens):
        queries = slice(starts[i], starts[i + 1])
        blocks = problem.block_table[i, np.arange(length) // block_size].astype(np.int64)
        present = blocks >= 0
        slots = (blocks * block_size + np.arange(length) % block_size)[present]
        keys, values = (np.repeat(x[slots], group, axis=1) for x in (k, v))
        logits = np.einsum("qhd,khd->hqk", q[queries].astype(np.longdouble), keys) * scale
        num_q = logits.shape[1]
        mask = np.tri(num_q, length, length - num_q, dtype=bool)[:, present]
        if causal:
            logits[:, ~mask] = -np.inf
        if not logits.size:
            continue
        weights = np.exp(logits - logits.max(axis=2, keepdims=True).clip(-1e300))
        total = weights.sum(axis=2, keepdims=True)
        weights = weights / np.where(total, total, 1)
        out[queries] = np.einsum("hqk,khd->qhd", weights, values)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("holes", [0.0, 0.5])
def test_attention(dtype, causal, layout, holes):
    problem = make(
        dtype,
        [0, 1, 15, 17, 40, 9],
        [0, 1, 3, 17, 1, 2],
        heads=(6, 2),
        head_dim=24,
        v_head_dim=16,
        block_size=5,
        layout=layout,
        holes=holes,
    )
    got = problem.call(reference.paged_attention, causal=causal, scale=0.3)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, dense(problem, 0.3, causal), rtol=1e-12, atol=1e-13)


def test_decode_and_default_scale():
    problem = make(FLOAT32, [1, 16, 33], heads=(4, 1), head_dim=64)
    got = problem.call(reference.paged_attention)
    np.testing.assert_allclose(got, dense(problem, 1 / 8, True), rtol=1e-12, atol=1e-13)


def test_rows():
    problem = make(FLOAT16, [20, 30])
    swapped = problem.but(
        rows=np.array([1, 0], np.int32), seq_lens=problem.seq_lens[::-1], query=problem.query[::-1]
    )
    np.testing.assert_array_equal(
        swapped.call(reference.paged_attention), problem.call(reference.paged_attention)[::-1]
    )


def test_softmax():
    x = np.array([[0.0, np.log(3.0)], [-np.inf, 5.0], [-np.inf, -np.inf], [1e4, 1e4]])
    want = [[0.25, 0.75], [0, 1], [0, 0], [0.5, 0.5]]
    np.testing.assert_allclose(reference.softmax(x), want, rtol=1e-15)
    assert reference.softmax(np.zeros((3, 0))).shape == (3, 0)
    assert np.isnan(reference.softmax(np.array([np.nan, 0.0]))).all()


def test_write_and_copy():
    """By hand, on a cache small enough to see."""
    k, v = np.zeros((3, 2, 4, 8), FLOAT32), np.zeros((3, 2, 4, 8), FLOAT32)
    key, value = (np.arange(48, dtype="f4").reshape(3, 2, 8) + i for i in (1, 100))
    reference.write_kv(key, value, k, v, np.array([5, -1, 8]))
    np.testing.assert_array_equal(k[1, :, 1], key[0])
    np.testing.assert_array_equal(v[2, :, 0], value[2])
    assert np.count_nonzero(k) == np.count_nonzero(v) == 32
    reference.copy_blocks([k, v], np.array([[2, 0]]))
    np.testing.assert_array_equal(k[0], k[2])
    reference.copy_blocks(v, np.array([[1, 0]]))
    np.testing.assert_array_equal(v[0], v[1])


def test_imports_only_numpy():
    """So that it can be read, and trusted, alone."""
    with open(reference.__file__, encoding="utf-8") as file:
        lines = [line.split() for line in file if line.startswith(("import ", "from "))]
    assert {line[1].split(".")[0] for line in lines} == {
        "__future__",
        "collections",
        "typing",
        "numpy",
    }
    assert BFLOAT16.itemsize == 2
