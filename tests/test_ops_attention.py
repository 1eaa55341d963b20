"""paged_attention against the float64 oracle, for every instruction set this machine runs."""

import functools
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from ops_cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, assert_close, bits, make, pairwise
from rocmforge import reference
from rocmforge.ops import get_num_threads, paged_attention


def check(problem, **kwargs):
    want, _, bound = problem.expected(**kwargs)
    got = problem.call(paged_attention, **kwargs)
    assert got.dtype == problem.query.dtype
    assert_close(got, want, bound, problem.query.shape[2])


GRID = pairwise(
    dtype=DTYPES,
    head_dim=[8, 24, 64, 80, 128, 256, 512],
    block_size=[1, 7, 16, 256],
    heads=[(1, 1), (4, 1), (6, 3), (32, 8), (7, 7), (32, 1), (10, 2)],
    layout=["HND", "NHD"],
)


@functools.cache
def row(index):
    """A problem of the grid with what the oracle makes of it."""
    case = dict(GRID[index])
    contexts = [0, 1, 15, 16, 17, 1000 if case["head_dim"] <= 128 else 140]
    problem = make(case.pop("dtype"), contexts, **case)
    return problem, problem.expected()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", range(len(GRID)))
def test_decode(index):
    problem, (want, _, bound) = row(index)
    assert_close(problem.call(paged_attention), want, bound, problem.query.shape[2])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("around", [32, 64, 256, 512, 1024])
def test_lengths_around_tiles_and_parts(around):
    contexts = [around + i for i in (-1, 0, 1, 15, 16, 17)]
    check(make(FLOAT32, contexts, head_dim=16, block_size=16))
    check(make(FLOAT16, contexts, [1, 2, 3, 17, 1, 1], head_dim=16, block_size=5))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_table_entries(dtype):
    problem = make(dtype, [0, 1, 100, 700, 64], [0, 1, 20, 1, 64], block_size=7, holes=0.4)
    check(problem)
    check(problem, causal=False)
    table = np.full_like(problem.block_table, -1)  # nothing at all is left
    got = problem.but(block_table=table).call(paged_attention)
    assert not bits(got).any()


def test_sequences_choose_and_share_rows():
    problem = make(FLOAT32, [40, 17, 60, 3])
    rows = np.array([2, 0, 2, 1, 3, 0], np.int32)
    lens = np.array([60, 40, 35, 17, 0, 1], np.int32)
    query = np.random.default_rng(1).standard_normal((6, 4, 64), np.float32)
    check(problem.but(query=query, rows=rows, seq_lens=lens))
    check(problem.but(query=query, rows=rows, seq_lens=lens, cu_seqlens_q=np.arange(7, dtype="i4")))


@pytest.mark.parametrize("scale", [0.0, 0.03, 1, -0.5, np.float32(2.0)])
def test_scale(scale):
    check(make(FLOAT32, [40, 3]), scale=scale)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_strided_views(layout):
    """Caches, queries and outputs that are parts of larger arrays."""
    problem = make(FLOAT16, [40, 300, 1], [3, 1, 1], heads=(4, 2), head_dim=24, layout=layout)
    want = problem.call(reference.paged_attention)
    k, v = problem.k_cache, problem.v_cache

    fused = np.stack([k, v], axis=1)  # [num_blocks, 2, ...]: one block's keys beside its values
    assert_close(problem.but(k_cache=fused[:, 0], v_cache=fused[:, 1]).call(paged_attention), want)
    wide = np.full((2, *k.shape[:3], 40), np.nan, np.float16)  # padding after each vector
    wide[0, ..., :24], wide[1, ..., 8:32] = k, v
    padded = problem.but(k_cache=wide[0, ..., :24], v_cache=wide[1, ..., 8:32])
    assert_close(padded.call(paged_attention), want)
    swapped = problem.but(  # the other layout as a view of the same memory
        k_cache=k.swapaxes(1, 2),
        v_cache=v.swapaxes(1, 2),
        layout="NHD" if layout == "HND" else "HND",
    )
    np.testing.assert_array_equal(
        bits(swapped.call(paged_attention)), bits(problem.call(paged_attention))
    )
    backwards = problem.but(
        k_cache=k[::-1], v_cache=v[::-1], block_table=len(k) - 1 - problem.block_table
    )
    assert_close(backwards.call(paged_attention), want)

    qkv = np.full((5, 9, 32), np.nan, np.float16)
    qkv[:, :4, :24] = problem.query
    buffer = np.zeros((5, 9, 32), np.float16)
    out = buffer[:, 5:, 8:]
    result = problem.but(query=qkv[:, :4, :24]).call(paged_attention, out=out)
    assert result is out
    assert_close(out, want)
    assert not buffer[:, :5].any()
    assert not buffer[..., :8].any()
    # query and output interleaved in one buffer: their extents overlap, their elements do not
    problem.but(query=qkv[:, :4, :24]).call(paged_attention, out=qkv[:, 5:, :24])
    assert_close(qkv[:, 5:, :24], want)


def test_rows_of_nobody_keep_their_contents():
    problem = make(FLOAT32, [40, 3], [2, 1])
    query = np.concatenate([problem.query, problem.query[:2]])
    padded = problem.but(query=query)
    got = padded.call(paged_attention)
    assert_close(got, padded.call(reference.paged_attention))
    assert not got[3:].any()
    out = np.full_like(query, 7)
    padded.call(paged_attention, out=out)
    np.testing.assert_array_equal(out[3:], 7)


def test_empty_batch():
    empty = np.zeros(0, np.int32)
    cache = np.zeros((3, 2, 16, 64), np.float32)
    query = np.zeros((0, 4, 64), np.float32)
    for cu in (None, np.zeros(1, np.int32)):
        table = np.zeros((0, 0), np.int32)
        got = paged_attention(query, cache, cache.copy(), table, empty, cu)
        assert got.shape == query.shape


def test_pool_without_blocks():
    cache = np.zeros((0, 2, 16, 64), np.float32)
    table, lens = np.zeros((2, 0), np.int32), np.zeros(2, np.int32)
    query = np.ones((2, 4, 64), np.float32)
    got = paged_attention(query, cache, cache, table, lens, scale=1)
    assert not got.any()


@pytest.mark.usefixtures("isa")
def test_extreme_logits():
    """No overflow where exp(logit) would; one key takes all the weight."""
    problem = make(FLOAT32, [40, 300], [4, 1])
    check(problem, scale=1e-30)
    steep = problem.but(query=problem.query * 10)  # logits near 1,000: off by 6e-5 in float32
    want = steep.call(reference.paged_attention, scale=10.0)
    np.testing.assert_allclose(steep.call(paged_attention, scale=10.0), want, atol=2e-4)
    assert np.isfinite(problem.call(paged_attention, scale=1e30)).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_used_slot_is_not_hidden(dtype, value):
    problem = make(dtype, [300, 300])
    for cache in (problem.k_cache, problem.v_cache):
        block = problem.block_table[0, 5]
        kept = cache[block, 0, 3].copy()
        cache[block, 0, 3] = value
        got = problem.call(paged_attention).astype(np.float32)
        assert not np.isfinite(got[0, :2]).all()
        assert np.isfinite(got[0, 2:]).all()
        assert np.isfinite(got[1]).all()
        cache[block, 0, 3] = kept


# ---------------------------------------------------------------- the same bits


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_batch_or_the_threads(dtype, threads):
    """Lengths around every split boundary: alone, among 64, on 1 to 5 threads."""
    rng = np.random.default_rng(3)
    edges = [1, 16, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1024, 1025, 2050]
    contexts = edges + rng.integers(1, 600, 64 - len(edges)).tolist()
    problem = make(dtype, contexts, heads=(8, 2), head_dim=32, block_size=16)
    threads(1)
    want = bits(problem.call(paged_attention))
    for i in range(len(edges)):
        np.testing.assert_array_equal(bits(problem.only(i).call(paged_attention))[0], want[i])
    for n in (2, 3, 5):
        threads(n)
        np.testing.assert_array_equal(bits(problem.call(paged_attention)), want)
    for i in range(len(edges)):  # one sequence on many threads: split
        np.testing.assert_array_equal(bits(problem.only(i).call(paged_attention))[0], want[i])


@pytest.mark.usefixtures("isa")
def test_bits_of_prefill_do_not_depend_on_the_batch_or_the_threads(threads):
    queries = [300, 1, 17, 1, 64, 2]
    problem = make(BFLOAT16, [300, 900, 700, 2, 65, 1500], queries, heads=(6, 2), head_dim=64)
    threads(1)
    want = bits(problem.call(paged_attention))
    threads(3)
    np.testing.assert_array_equal(bits(problem.call(paged_attention)), want)
    for i, start in enumerate(np.cumsum([0, *queries[:-1]])):
        got = bits(problem.only(i).call(paged_attention))
        np.testing.assert_array_equal(got, want[start : start + queries[i]])


def test_bits_do_not_depend_on_where_blocks_are(threads):
    problem = make(FLOAT32, [1000, 30, 257], heads=(8, 2))
    order = np.random.default_rng(5).permutation(len(problem.k_cache))
    table = problem.block_table.copy()
    real = table < len(order)
    table[real] = np.argsort(order)[table[real]]
    moved = problem.but(
        k_cache=problem.k_cache[order], v_cache=problem.v_cache[order], block_table=table
    )
    for n in (1, 2):
        threads(n)
        np.testing.assert_array_equal(
            bits(moved.call(paged_attention)), bits(problem.call(paged_attention))
        )


def test_calls_from_several_threads_at_once(threads):
    """Who finds the workers taken does the work alone, with the same bits."""
    threads(2)
    problems = [make(FLOAT32, [2000, 50 * i + 1], heads=(8, 8), seed=i) for i in range(4)]
    want = [bits(p.call(paged_attention)) for p in problems]
    wrong = []

    def run(i):
        for _ in range(20):
            if not np.array_equal(bits(problems[i].call(paged_attention)), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_changing_the_number_of_threads(threads):
    problem = make(FLOAT32, [3000, 100], heads=(8, 8))
    want = bits(problem.call(paged_attention))
    for n in (4, 1, 2, 6, 2, 3):
        threads(n)
        assert get_num_threads() == n
        np.testing.assert_array_equal(bits(problem.call(paged_attention)), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# Python 3.12 warns about what this test is about
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_fork(threads):
    """The workers do not exist in a child: it starts its own, and its child again."""
    threads(3)
    problem = make(FLOAT32, [3000, 100], heads=(8, 8))
    want = bits(problem.call(paged_attention))

    def same():
        return np.array_equal(bits(problem.call(paged_attention)), want)

    def child(depth):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            ok = same() and (depth == 0 or child(depth - 1)) and same()
            os._exit(0 if ok else 1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return False

    sys.stdout.flush()
    assert child(1)
    assert same()
