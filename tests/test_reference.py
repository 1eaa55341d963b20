"""The oracle itself, against dense attention that is written in another way."""

import ml_dtypes
import numpy as np
import pytest

from ops_cases import DTYPES, FLOAT16, FLOAT32, make
from rocmforge import reference

FN, FNUZ, INT8 = (
    np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, np.int8)
)


def dense(problem, scale, *, causal=True, window=(-1, -1), softcap=0.0, slopes=None, sinks=None):
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
    lse = np.full(q.shape[:2], -np.inf if sinks is None else 0.0)
    if sinks is not None:
        lse[:] = sinks
    for i, length in enumerate(problem.seq_lens):
        queries = slice(starts[i], starts[i + 1])
        blocks = problem.block_table[i, np.arange(length) // block_size].astype(np.int64)
        present = blocks >= 0
        slots = (blocks * block_size + np.arange(length) % block_size)[present]
        keys, values = (np.repeat(x[slots], group, axis=1) for x in (k, v))
        logits = np.einsum("qhd,khd->hqk", q[queries].astype(np.longdouble), keys) * scale
        if softcap:
            logits = np.tanh(logits / softcap) * softcap
        num_q = logits.shape[1]
        row, column = np.ogrid[length - num_q : length, :length]
        if slopes is not None:
            logits += (slopes[:, None, None] * (column - row))[..., present]
        mask = np.ones((num_q, length), bool)
        if causal:
            mask &= np.tri(num_q, length, length - num_q, dtype=bool)
        if window[0] >= 0:
            mask &= column >= row - window[0]
        if window[1] >= 0:
            mask &= column <= row + window[1]
        if problem.mask is not None and num_q:
            mask[:, length - num_q :] &= problem.mask[queries, :num_q].astype(bool)
        logits[:, ~mask[:, present]] = -np.inf
        if sinks is not None:  # one more key, whose value is zero
            column = np.broadcast_to(sinks[:, None, None], (*logits.shape[:2], 1))
            logits = np.concatenate([logits, column], axis=2)
            values = np.concatenate([values, np.zeros_like(values, shape=(1, *values.shape[1:]))])
        if not logits.size:
            continue
        top = logits.max(axis=2, keepdims=True).clip(-1e300)
        weights = np.exp(logits - top)
        total = weights.sum(axis=2, keepdims=True)
        weights = weights / np.where(total, total, 1)
        out[queries] = np.einsum("hqk,khd->qhd", weights, values)
        with np.errstate(divide="ignore"):
            lse[queries] = (np.log(total) + top)[..., 0].T
    return out, lse


RAGGED = {"contexts": [0, 1, 15, 17, 40, 9], "queries": [0, 1, 3, 17, 1, 2]}
SLOPES = np.array([-0.5, 0.25, 0.1, 0, 1, -0.01], np.float32)
SINKS = np.array([-np.inf, 3, 0, -2, 1, 0.5], np.float32)


def ragged(dtype, *, layout="HND", holes=0.0, mask=False, seed=0):
    problem = make(
        dtype,
        **RAGGED,
        heads=(6, 2),
        head_dim=24,
        v_head_dim=16,
        block_size=5,
        layout=layout,
        holes=holes,
        seed=seed,
    )
    if mask:
        bits = np.random.default_rng(seed).random((len(problem.query), 20)) < 0.5
        problem = problem.but(mask=bits.astype(np.uint8) * 3)
    return problem


def assert_same(problem, **features):
    names = {"window": "window_size", "slopes": "alibi_slopes"}
    got, lse = problem.call(
        reference.paged_attention,
        scale=0.3,
        return_lse=True,
        **{names.get(name, name): value for name, value in features.items()},
    )
    assert got.dtype == lse.dtype == np.float64
    want, want_lse = dense(problem, 0.3, **features)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("holes", [0.0, 0.5])
def test_attention(dtype, causal, layout, holes):
    assert_same(ragged(dtype, layout=layout, holes=holes), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (3, -1), (-1, 2), (4, 1)])
@pytest.mark.parametrize("mask", [True, False])
def test_masks(causal, window, mask):
    for holes in (0.0, 0.5):
        problem = ragged(FLOAT32, mask=mask, holes=holes)
        assert_same(problem, causal=causal, window=window)
        assert_same(problem, causal=causal, window=window, sinks=SINKS)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("slopes", [None, SLOPES])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_logits(softcap, slopes, sinks):
    assert_same(ragged(FLOAT16), softcap=softcap, slopes=slopes, sinks=sinks, window=(9, 9))


def test_decode_and_default_scale():
    problem = make(FLOAT32, [1, 16, 33], heads=(4, 1), head_dim=64)
    got = problem.call(reference.paged_attention)
    np.testing.assert_allclose(got, dense(problem, 1 / 8)[0], rtol=1e-12, atol=1e-13)


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
    weights, lse = reference.softmax(x)
    np.testing.assert_allclose(weights, [[0.25, 0.75], [0, 1], [0, 0], [0.5, 0.5]], rtol=1e-15)
    np.testing.assert_allclose(lse, [np.log(4), 5, -np.inf, 1e4 + np.log(2)], rtol=1e-15)
    weights, lse = reference.softmax(np.zeros((3, 0)))
    assert weights.shape == (3, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    assert np.isnan(reference.softmax(np.array([np.nan, 0.0]))[0]).all()
    weights, lse = reference.softmax(x[:3], np.array([np.log(4.0), -np.inf, 2.0]))
    np.testing.assert_allclose(weights, [[0.125, 0.375], [0, 1], [0, 0]], rtol=1e-15)
    np.testing.assert_allclose(lse, [np.log(8), 5, 2], rtol=1e-15)


def test_merge_states():
    """Two halves of the context make the whole, whichever of them sees nothing."""
    whole = make(FLOAT32, [40, 5, 0], heads=(4, 2), head_dim=16, block_size=5)
    halves = []
    for keep in (slice(0, 3), slice(3, None)):
        table = np.full_like(whole.block_table, -1)
        table[:, keep] = whole.block_table[:, keep]
        halves.append(whole.but(block_table=table).call(reference.paged_attention, return_lse=True))
    (a, lse_a), (b, lse_b) = halves
    b[1] = np.nan  # saw nothing: not read
    assert np.isneginf(lse_b[1]).all()
    want = whole.call(reference.paged_attention, return_lse=True)
    for got in (
        reference.merge_states(a, lse_a, b, lse_b),
        reference.merge_states(b, lse_b, a, lse_a),
    ):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-12)


# ---------------------------------------------------------------- 8-bit elements


def nearest_codes(x, dtype):
    """The code of the nearest finite element; between two as near, the even code."""
    codes = np.arange(256, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        elements = codes.view(dtype).astype(np.float64)
    finite = np.isfinite(elements)
    finite[128] &= dtype != INT8  # it goes to -127
    codes, elements = codes[finite], elements[finite]
    distance = np.abs(x[..., None].astype(np.float64) - elements)
    # Rank by distance, then an even code, then +0 before -0 unless x is negative.
    best = distance == distance.min(axis=-1, keepdims=True)
    even = best & (codes % 2 == 0)
    best = np.where(even.any(axis=-1, keepdims=True), even, best)
    signed = best & (np.signbit(elements) == np.signbit(x)[..., None])
    best = np.where(signed.any(axis=-1, keepdims=True), signed, best)
    return codes[best.argmax(axis=-1)]


@pytest.mark.parametrize("dtype", [FN, FNUZ, INT8], ids=str)
def test_quantise(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.standard_normal(300),
            rng.standard_normal(300) * 100,
            rng.standard_normal(100) * 1e-3,
            np.arange(-140, 140) / 2,  # ties of int8
            [0.0, -0.0, 1e-9, -1e-9, 1e30, -1e30, np.inf, -np.inf],
        ]
    ).astype(np.float32)
    with np.errstate(invalid="ignore"):
        elements = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    elements = np.unique(elements[np.isfinite(elements)])
    ties = (elements[1:] + elements[:-1]) / 2
    x = np.concatenate(
        [x, elements, ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(1e9))]
    )
    for scale in (1.0, 0.37):
        codes = reference.quantise(x, np.float32(scale), dtype)
        wanted = np.clip(x * (np.float32(1) / np.float32(scale)), -1e6, 1e6)
        np.testing.assert_array_equal(codes.view(np.uint8), nearest_codes(wanted, dtype))
    nan = reference.quantise(np.array([np.nan, np.float32(-np.nan)]), np.float32(1), dtype)
    if dtype == INT8:
        assert not nan.any()
    else:
        assert np.isnan(nan.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [FN, FNUZ, INT8], ids=str)
def test_token_scales(dtype):
    top = {FN: 448, FNUZ: 240, INT8: 127}[dtype]
    x = np.zeros((6, 8), np.float32)
    x[1, 3] = -3
    x[2, 7] = 1e-44
    x[3, 0], x[4, 0] = np.nan, -np.inf
    x[5] = np.finfo(np.float32).max
    want = np.array([1, 3, 0, 0, 0, x[5, 0]], np.float32) / np.float32([1, top, 1, 1, 1, top])
    want[2], want[3:5] = 2.0**-126, np.nan
    got = reference.token_scales(x, dtype)
    np.testing.assert_array_equal(got, want)
    codes = reference.quantise(x, got[:, None], dtype)
    values = codes.astype(np.float64) * got[:, None].astype(np.float64)
    assert np.isnan(values[3:5]).all()
    np.testing.assert_allclose(values[[0, 1, 5]], x[[0, 1, 5]], rtol=1e-6)


def test_calibrate():
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((9, 3, 8)), rng.standard_normal((9, 3, 16))
    k_scale, v_scale = reference.calibrate(key, value, INT8)
    for x, scale in ((key, k_scale), (value, v_scale)):
        np.testing.assert_allclose(scale, np.abs(x).max(axis=(0, 2)) / 127, rtol=1e-6)


def test_write_and_read_an_8_bit_cache():
    """Every form of scale gives back what was written, up to the rounding of the element."""
    rng = np.random.default_rng(0)
    key = rng.standard_normal((4, 2, 8)).astype(np.float32)
    slots = np.array([5, -1, 8, 0])
    per_head = reference.calibrate(key, key, FN)[0]
    for scale in (float(per_head.max()), per_head, np.zeros((3, 2, 4), np.float32)):
        for layout, cache in (
            ("HND", np.zeros((3, 2, 4, 8), FN)),
            ("NHD", np.zeros((3, 4, 2, 8), FN)),
        ):
            reference.write_kv(key, None, cache, None, slots, k_scale=scale, layout=layout)
            blocks = cache if layout == "HND" else cache.swapaxes(1, 2)
            got = reference.dequantise(blocks, scale, slots[[0, 2, 3]] // 4, slots[[0, 2, 3]] % 4)
            np.testing.assert_allclose(got, key[[0, 2, 3]], rtol=2.0**-4, atol=1e-3)
            assert np.count_nonzero(cache.view(np.uint8)) == 3 * 2 * 8
    assert np.count_nonzero(scale) == 3 * 2


# ---------------------------------------------------------------- writing and copying


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


def test_gather_and_scatter():
    a = np.arange(24, dtype=np.float16).reshape(3, 2, 4)
    b = np.arange(6, dtype=np.uint8).reshape(3, 2)
    data = reference.gather_blocks([a.swapaxes(1, 2), b], np.array([2, 0]))
    assert data.shape == (2, 18)
    np.testing.assert_array_equal(data[0, :16].view(np.float16).reshape(4, 2), a[2].T)
    np.testing.assert_array_equal(data[:, 16:], b[[2, 0]])
    assert reference.gather_blocks(b, np.zeros(0, int)).shape == (0, 2)
    a2, b2 = np.zeros_like(a), np.zeros_like(b)
    reference.scatter_blocks([a2.swapaxes(1, 2), b2], np.array([1, 2]), data)
    np.testing.assert_array_equal(a2, [np.zeros((2, 4)), a[2], a[0]])
    np.testing.assert_array_equal(b2, [[0, 0], b[2], b[0]])


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
