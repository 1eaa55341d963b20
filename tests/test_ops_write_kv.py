"""write_kv and copy_blocks against the oracle: the same bits, and no byte elsewhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, bits, guarded
from rocmforge import reference
from rocmforge.ops import copy_blocks, get_num_threads, set_num_threads, write_kv


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


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_write(threads):
    before = get_num_threads()
    set_num_threads(threads)
    try:
        check(*make(BFLOAT16, 3000, kv_heads=8, blocks=200), "HND")
        check(*make(FLOAT32, 3000, kv_heads=8, blocks=200, layout="NHD"), "NHD")
    finally:
        set_num_threads(before)


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


@pytest.mark.parametrize("threads", [1, 3])
def test_large_copy(threads):
    before = get_num_threads()
    set_num_threads(threads)
    try:
        layers = [random((400, 2, 16, 64), FLOAT32, i) for i in range(3)]
        check_copy(layers, np.random.default_rng(0).permutation(400).reshape(200, 2))
    finally:
        set_num_threads(before)
