"""Writing to the cache and moving its blocks: the oracle's bits, and no byte elsewhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_cases import (
    BFLOAT16,
    DTYPES,
    EIGHT_BIT,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    INT8,
    bits,
    guarded,
)
from rocmforge import reference
from rocmforge.ops import (
    _cpu,
    calibrate,
    copy_blocks,
    gather_blocks,
    scatter_blocks,
    write_kv,
)

ISAS = _cpu.available_isas()


def random(shape, dtype, seed):
    """Random bits, NaN and Inf among them: they are moved, not computed with."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]


def make(
    dtype, tokens, *, kv_heads=2, dims=(64, 64), blocks=9, block_size=16, layout="HND", seed=0
):
    rng = np.random.default_rng(seed)
    inner = (kv_heads, block_size) if layout == "HND" else (block_size, kv_heads)
    caches = [random((blocks, *inner, dim), dtype, seed + i) for i, dim in enumerate(dims)]
    new = [random((tokens, kv_heads, dim), dtype, seed + 5 + i) for i, dim in enumerate(dims)]
    slots = rng.permutation(blocks * block_size)[:tokens].astype(np.int64)
    slots[rng.random(tokens) < 0.2] = -rng.integers(1, 2**62)
    return new, caches, slots


def check(new, caches, slots, layout):
    want = [cache.copy() for cache in caches]
    reference.write_kv(*new, *want, slots, layout=layout)
    assert write_kv(*new, *caches, slots, layout=layout) is None
    for got, expected in zip(caches, want, strict=True):
        np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 128), (512, 256)])
@pytest.mark.parametrize(("blocks", "block_size"), [(200, 1), (30, 7), (9, 16), (2, 256)])
def test_write(dtype, layout, dims, blocks, block_size):
    for tokens, kv_heads in itertools.product((0, 1, 100), (1, 8)):
        case = make(
            dtype,
            tokens,
            kv_heads=kv_heads,
            dims=dims,
            blocks=blocks,
            block_size=block_size,
            layout=layout,
        )
        check(*case, layout)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_large_write(n, threads):
    threads(n)
    check(*make(BFLOAT16, 3000, kv_heads=8, blocks=200), "HND")
    check(*make(FLOAT32, 3000, kv_heads=8, blocks=200, layout="NHD"), "NHD")


def test_strided_views():
    (key, value), (k, v), slots = make(FLOAT16, 20, kv_heads=3, dims=(24, 24))
    qkv = np.zeros((20, 7, 24), np.float16)
    qkv[:, 1:4], qkv[:, 4:] = key, value
    fused = np.stack([k, v], axis=1)
    check((qkv[:, 1:4], qkv[:, 4:]), (fused[:, 0], fused[:, 1]), slots, "HND")
    check((key[::-1], value[:, ::-1]), (k.swapaxes(1, 2), v.swapaxes(1, 2)), slots, "NHD")
    wide = np.zeros((*k.shape[:3], 64), np.float16)
    check((key, value), (wide[..., :24], wide[..., 32:56]), slots, "HND")
    assert not wide[..., 24:32].any()
    assert not wide[..., 56:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 24, 128])
def test_touches_nothing_past_the_end(dtype, dim):
    new, caches, slots = make(dtype, 30, dims=(dim, dim), blocks=3)
    slots[0] = 3 * 16 - 1
    check([guarded(x) for x in new], [guarded(x) for x in caches], guarded(slots), "HND")


@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 70),
    kv_heads=st.integers(1, 9),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    blocks=st.integers(70, 90),
    block_size=st.integers(1, 20),
    layout=st.sampled_from(["HND", "NHD"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(dtype, tokens, kv_heads, dims, blocks, block_size, layout, seed):
    case = make(
        dtype,
        tokens,
        kv_heads=kv_heads,
        dims=tuple(8 * dim for dim in dims),
        blocks=blocks,
        block_size=block_size,
        layout=layout,
        seed=seed,
    )
    check(*case, layout)


# ---------------------------------------------------------------- 8-bit caches


def make_8_bit(dtype, kv_dtype, tokens, scales, *, dims=(64, 64), layout="HND", seed=0, **kwargs):
    """New vectors of every magnitude, some zero, some not finite, and caches with their scales."""
    _, caches, slots = make(kv_dtype, tokens, dims=dims, layout=layout, seed=seed, **kwargs)
    rng = np.random.default_rng(seed)
    blocks, heads, block_size = (caches[0] if layout == "HND" else caches[0].swapaxes(1, 2)).shape[
        :3
    ]
    new = []
    for dim in dims:
        x = rng.standard_normal((tokens, heads, dim)) * 10.0 ** rng.uniform(
            -6, 3, (tokens, heads, 1)
        )
        x[rng.random((tokens, heads)) < 0.1] = 0
        for value in (np.nan, np.inf, -np.inf):
            x[rng.random(x.shape) < 0.2 / dim] = value
        with np.errstate(over="ignore"):
            new.append(x.astype(dtype))
    factors = {
        "token": lambda: np.full((blocks, heads, block_size), 7, np.float32),
        "head": lambda: (10 ** rng.uniform(-3, 1, heads)).astype(np.float32),
        "scalar": lambda: float(10 ** rng.uniform(-2, 1)),
    }[scales]
    return new, caches, slots, [factors(), factors()]


def check_8_bit(new, caches, slots, factors, layout="HND"):
    def copies(arrays):
        return [x.copy() if isinstance(x, np.ndarray) else x for x in arrays]

    want, want_factors = copies(caches), copies(factors)
    for write, c, f in ((reference.write_kv, want, want_factors), (write_kv, caches, factors)):
        write(*new, *c, slots, k_scale=f[0], v_scale=f[1], layout=layout)
    for got, expected in zip([*caches, *factors], [*want, *want_factors], strict=True):
        if isinstance(got, float):
            continue
        # Any NaN is as good: it has no bits that mean something.
        nan = np.isnan(expected.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
        np.testing.assert_array_equal(bits(got)[~nan], bits(expected)[~nan])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("scales", ["token", "head", "scalar"])
def test_write_8_bit(dtype, kv_dtype, scales):
    for i, dims in enumerate([(8, 24), (64, 64), (128, 40), (576, 512)]):
        layout = ("HND", "NHD")[i % 2]
        case = make_8_bit(dtype, kv_dtype, 60, scales, dims=dims, layout=layout, kv_heads=3, seed=i)
        check_8_bit(*case, layout=layout)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv_dtype", EIGHT_BIT, ids=str)
def test_every_rounding(kv_dtype):
    """Elements, the points halfway between two, and their neighbours; all magnitudes of float16."""
    with np.errstate(invalid="ignore"):
        elements = np.arange(256, dtype=np.uint8).view(kv_dtype).astype(np.float32)
    elements = np.unique(elements[np.isfinite(elements)])
    ties = (elements[1:] + elements[:-1]) / 2
    x = np.concatenate([elements, ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(1e9))])
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    for values, dtype in ((x, FLOAT32), (halves, FLOAT16)):
        key = np.zeros((-(-len(values) // 64), 1, 64), dtype)
        key.reshape(-1)[: len(values)] = values
        cache = np.zeros((1, 1, len(key), 64), kv_dtype)
        for scale in (1.0, 0.3):
            want, slots = cache.copy(), np.arange(len(key))
            reference.write_kv(key, None, want, None, slots, k_scale=scale)
            write_kv(key, None, cache, None, slots, k_scale=scale)
            nan = np.isnan(want.astype(np.float32))
            np.testing.assert_array_equal(np.isnan(cache.astype(np.float32)), nan)
            np.testing.assert_array_equal(bits(cache)[~nan], bits(want)[~nan])


def test_latent_write():
    (key, _), (cache, _), slots = make(BFLOAT16, 40, dims=(576, 8), kv_heads=1)
    want = cache.copy()
    reference.write_kv(key, None, want, None, slots)
    write_kv(key, None, cache, None, slots)
    np.testing.assert_array_equal(bits(cache), bits(want))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_large_write_8_bit(n, threads):
    threads(n)
    check_8_bit(*make_8_bit(BFLOAT16, INT8, 1000, "token", kv_heads=8, blocks=80))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 24, 128])
def test_8_bit_touches_nothing_past_the_end(dtype, dim):
    new, caches, slots, factors = make_8_bit(dtype, FLOAT8, 30, "token", dims=(dim, dim), blocks=3)
    slots[0] = 3 * 16 - 1
    check_8_bit(
        *([guarded(x) for x in arrays] for arrays in (new, caches)),
        guarded(slots),
        [guarded(x) for x in factors],
    )


@given(
    dtype=st.sampled_from(DTYPES),
    kv_dtype=st.sampled_from(EIGHT_BIT),
    scales=st.sampled_from(["token", "head", "scalar"]),
    isa=st.sampled_from(ISAS),
    tokens=st.integers(0, 70),
    kv_heads=st.integers(1, 9),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block_size=st.integers(1, 20),
    layout=st.sampled_from(["HND", "NHD"]),
    seed=st.integers(0, 2**16),
)
def test_any_8_bit_shape(
    dtype, kv_dtype, scales, isa, tokens, kv_heads, dims, block_size, layout, seed
):
    case = make_8_bit(
        dtype,
        kv_dtype,
        tokens,
        scales,
        kv_heads=kv_heads,
        dims=tuple(8 * dim for dim in dims),
        blocks=80,
        block_size=block_size,
        layout=layout,
        seed=seed,
    )
    before = _cpu.isa()
    _cpu._set_isa(isa)
    try:
        check_8_bit(*case, layout=layout)
    finally:
        _cpu._set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", EIGHT_BIT, ids=str)
def test_calibrate(dtype, kv_dtype):
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((30, 3, dim)).astype(dtype) for dim in (64, 24))
    key[:, 1] = 0
    got = calibrate(key, value, kv_dtype)
    for scale, want in zip(got, reference.calibrate(key, value, kv_dtype), strict=True):
        assert scale.dtype == FLOAT32
        np.testing.assert_array_equal(scale, want)
    assert got[0][1] == 1
    k_scale, none = calibrate(key[::-1, ::-1], None, kv_dtype.name)
    np.testing.assert_array_equal(k_scale, got[0][::-1])
    assert none is None


# ---------------------------------------------------------------- copy_blocks


def check_copy(caches, copies):
    copies = np.array(copies, np.int32).reshape(-1, 2)
    arrays = [caches] if isinstance(caches, np.ndarray) else caches
    want = [cache.copy() for cache in arrays]
    reference.copy_blocks(want, copies)
    assert copy_blocks(caches, copies) is None
    for got, expected in zip(arrays, want, strict=True):
        np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy(dtype):
    layers = [random((9, 2, 16, 24), dtype, i) for i in range(6)]
    check_copy(layers, [[0, 8], [0, 1], [5, 2]])
    check_copy(tuple(layers[:1]), [[8, 7]])
    check_copy(layers[0], [[8, 0]])
    check_copy(layers, [])
    check_copy([], [])


def test_copy_of_views_and_scales():
    fused = random((9, 2, 4, 16, 24), BFLOAT16, 0)
    wide = random((9, 4, 16, 32), FLOAT16, 1)[..., :24]
    scales = random((9, 4, 16), FLOAT32, 2)
    flags = np.arange(9, dtype=np.uint8)
    check_copy(
        [fused[:, 0], fused[:, 1], wide, scales, flags, fused[:, 0].swapaxes(1, 2)], [[3, 6]]
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_large_copy(n, threads):
    threads(n)
    layers = [random((400, 2, 16, 64), FLOAT32, i) for i in range(3)]
    check_copy(layers, np.random.default_rng(0).permutation(400).reshape(200, 2))


# ---------------------------------------------------------------- gather and scatter


def check_moves(caches, ids, **kwargs):
    ids = np.array(ids, np.int32)
    arrays = [caches] if isinstance(caches, np.ndarray) else caches
    want = reference.gather_blocks(arrays, ids)
    got = gather_blocks(caches, ids, **kwargs)
    np.testing.assert_array_equal(got, want)
    others = [cache.copy(order="K") for cache in arrays]
    for cache in arrays:
        cache[ids] = cache.dtype.type(0)
    scatter_blocks(caches, ids, got)
    for cache, expected in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(bits(cache), bits(expected))
    return got


@pytest.mark.parametrize("dtype", [*DTYPES, *EIGHT_BIT], ids=str)
def test_gather_and_scatter(dtype):
    layers = [random((9, 2, 16, 24), dtype, i) for i in range(6)]
    scales = [random((9, 2, 16), FLOAT32, i) for i in range(6)]
    check_moves(layers + scales, [3, 0, 8])
    check_moves(layers[0], [4])
    assert check_moves(layers, []).shape[0] == 0
    data = gather_blocks(layers, np.array([1, 1], np.int32))
    np.testing.assert_array_equal(data[0], data[1])
    other = [np.zeros_like(layer) for layer in layers]
    scatter_blocks(other, np.array([7], np.int32), data[:1])
    for layer, moved in zip(layers, other, strict=True):
        np.testing.assert_array_equal(bits(moved[7]), bits(layer[1]))


def test_gather_of_views_into_a_buffer():
    fused = random((9, 2, 4, 16, 24), BFLOAT16, 0)
    wide = random((9, 4, 16, 32), FLOAT16, 1)[..., :24]
    views = [fused[:, 0], fused[:, 1].swapaxes(1, 2), wide, np.arange(9, dtype=np.uint8)]
    size = 2 * 4 * 16 * 24 * 2 + 4 * 16 * 24 * 2 + 1
    buffer = np.zeros((3, size + 9), np.uint8)
    got = check_moves(views, [8, 2, 5], out=buffer[:, 4:-5])
    assert np.shares_memory(got, buffer)
    assert not buffer[:, :4].any()
    assert not buffer[:, -5:].any()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_large_gather(n, threads):
    threads(n)
    layers = [random((100, 2, 16, 64), FLOAT32, i) for i in range(3)]
    check_moves(layers, np.random.default_rng(0).permutation(100)[:70])


def test_moves_touch_nothing_past_the_end():
    caches = [guarded(random((4, 2, 8, 8), FLOAT16, 0)), guarded(random((4, 2, 8), FLOAT32, 1))]
    ids = guarded(np.array([3, 1], np.int32))
    out = guarded(np.zeros((2, 2 * 8 * 8 * 2 + 2 * 8 * 4), np.uint8))
    gather_blocks(caches, ids, out)
    np.testing.assert_array_equal(out, reference.gather_blocks(caches, ids))
    scatter_blocks(caches, ids, out)
