"""Attention by matrix instructions against the float64 oracle, and who gets them.

The simulated chips have each kind of matrix unit (simulated.h); what the other tests of
attention check of float16 and bfloat16 with these sizes of head runs here on two of them.
"""

from __future__ import annotations

import numpy as np
import pytest

from device_cases import FEATURES, attend, check, on, up
from ops_cases import (
    BFLOAT16,
    EIGHT_BIT,
    FLOAT8,
    FLOAT8UZ,
    FLOAT16,
    FLOAT32,
    INT8,
    bits,
    make,
    tree_mask,
)
from rocmforge.ops import paged_attention


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "block_size", "layout"),
    [
        (FLOAT16, 64, (4, 1), 16, "HND"),
        (BFLOAT16, 64, (3, 3), 7, "NHD"),
        (BFLOAT16, 128, (4, 1), 32, "NHD"),
        (FLOAT16, 128, (8, 2), 1, "HND"),
        (BFLOAT16, 256, (8, 1), 16, "HND"),
        (FLOAT16, 256, (4, 2), 48, "NHD"),
    ],
)
def test_decode(device, dtype, head_dim, heads, block_size, layout):
    contexts = [1, 16, 70, 0, 200, 33]
    problem = make(
        dtype, contexts, heads=heads, head_dim=head_dim, block_size=block_size, layout=layout
    )
    check(problem, device)
    check(problem, device, launch={"num_splits": 3})


@pytest.mark.parametrize(
    ("dtype", "heads"),
    [(FLOAT16, (4, 1)), (BFLOAT16, (8, 2)), (BFLOAT16, (1, 1)), (FLOAT16, (40, 1))],
)
def test_verification_and_prefill(device, dtype, heads):
    """Sequences of 1 to 4 tiles of 16 rows, and of several workgroups."""
    problem = make(dtype, [150, 64, 7, 0, 33], [4, 40, 1, 0, 33], heads=heads, head_dim=128)
    check(problem, device)
    check(problem, device, causal=False)


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("scales", ["tensor", "head", "token"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "block_size", "layout"),
    [
        (FLOAT16, 64, (4, 1), 16, "HND"),
        (BFLOAT16, 128, (8, 2), 32, "NHD"),
        (FLOAT16, 256, (3, 3), 7, "HND"),
        (BFLOAT16, 256, (4, 2), 16, "NHD"),
    ],
)
def test_eight_bit_caches(device, kv_dtype, scales, dtype, head_dim, heads, block_size, layout):
    kinds = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "layout": layout}
    kinds |= {"kv_dtype": kv_dtype, "scales": scales}
    check(make(dtype, [1, 16, 70, 0, 200, 33], **kinds), device)
    check(make(dtype, [150, 64, 7, 600], [4, 40, 1, 1], **kinds), device)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "head_dim", "v_head_dim"),
    [
        (FLOAT16, None, 96, 96),
        (BFLOAT16, None, 192, 128),
        (BFLOAT16, None, 8, 40),
        (FLOAT16, None, 136, 248),
        (BFLOAT16, FLOAT8, 80, 112),
        (FLOAT16, INT8, 16, 32),
        (FLOAT16, FLOAT8, 240, 16),
    ],
)
def test_heads_of_other_sizes(device, dtype, kv_dtype, head_dim, v_head_dim):
    """Between those that kernels are built for: nothing is read past a vector's end."""
    kinds = {"heads": (4, 2), "head_dim": head_dim, "v_head_dim": v_head_dim, "kv_dtype": kv_dtype}
    check(make(dtype, [150, 64, 7, 0, 33], [4, 40, 1, 0, 33], **kinds), device)
    check(make(dtype, [1, 70, 200], **kinds), device, launch={"num_splits": 3})


@pytest.mark.parametrize("head_dim", [64, 72])  # 72: pairs in vector arithmetic
def test_scales_of_tokens_far_apart(device, head_dim):
    """Float16 holds neither the largest times the largest probability nor the smallest."""
    kinds = {"heads": (4, 1), "head_dim": head_dim, "kv_dtype": FLOAT8, "scales": "token"}
    problem = make(BFLOAT16, [300, 40], [2, 1], **kinds)
    for exponents in ((-60, -30), (10, 40), (-20, 20)):
        spread = np.random.default_rng(0).integers(*exponents, problem.v_scale.shape)
        check(problem.but(v_scale=np.ldexp(problem.v_scale, spread).astype(np.float32)), device)
    nothing = problem.v_scale.copy()
    nothing[problem.block_table[0, :10]] = 0
    check(problem.but(v_scale=nothing), device)
    for name in ("k_scale", "v_scale"):
        nan = getattr(problem, name).copy()
        nan[problem.block_table[0, 299 // 16], 0, 299 % 16] = np.nan  # the last query's own
        got = attend(problem.but(**{name: nan}), device)
        assert np.isnan(got).all(axis=(1, 2)).tolist() == [False, True, False]
        assert np.isnan(got).any(axis=(1, 2)).tolist() == [False, True, False]


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_queries_beyond_float16(device, power, head_dim):
    problem = make(BFLOAT16, [70, 33], [3, 1], heads=(4, 1), head_dim=head_dim, kv_dtype=INT8)
    query = np.ldexp(problem.query.astype(np.float32), power).astype(BFLOAT16)
    check(problem.but(query=query), device, scale=2.0**-power / 8)


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT[:2], ids=str)
def test_nan_of_float8(device, kv_dtype):
    """In a key it is the logit's, in a value that of its own element."""
    code = 0x7F if kv_dtype == FLOAT8 else 0x80
    for head_dim in (64, 72, 128, 256, 520):
        problem = make(FLOAT16, [50, 50, 50], heads=(4, 1), head_dim=head_dim, kv_dtype=kv_dtype)
        for sequence, name, element in ((0, "k_cache", 5), (1, "v_cache", head_dim - 2)):
            block = problem.block_table[sequence, 20 // 16]
            getattr(problem, name).view(np.uint8)[block, 0, 20 % 16, element] = code
        got = attend(problem, device)
        assert np.isnan(got[0]).all()
        assert np.isnan(got[1, :, head_dim - 2]).all()
        assert np.isnan(got[1]).sum() == 4
        assert not np.isnan(got[2]).any()


@pytest.mark.parametrize("queries", [None, [1, 40, 7, 1]], ids=["decode", "ragged"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(device, feature, queries):
    problem = make(FLOAT16, [130, 64, 80, 1], queries, heads=(4, 2), head_dim=64)
    check(problem, device, **FEATURES[feature])
    eight = make(
        BFLOAT16, [130, 64, 80, 1], queries, heads=(4, 2), head_dim=64, kv_dtype=FLOAT8,
        scales="token",
    )  # fmt: skip
    check(eight, device, **FEATURES[feature])


def test_masks_and_holes(device):
    problem = make(BFLOAT16, [140, 90, 200], [6, 1, 8], heads=(4, 2), head_dim=128, holes=0.3)
    check(problem, device)
    check(problem.but(mask=tree_mask(problem)), device)


def test_logits_that_rise(device):
    """The maximum is replaced again and again, and rows differ in when."""
    problem = make(BFLOAT16, [500], [3], heads=(4, 1), head_dim=64)
    keys = problem.k_cache.astype(np.float32)
    for i, block in enumerate(problem.block_table[0, :32]):
        keys[block] *= (i % 7) * 2.0
    check(problem.but(k_cache=keys.astype(BFLOAT16)), device)


@pytest.mark.parametrize("kv_dtype", [FLOAT16, BFLOAT16, FLOAT8, FLOAT8UZ], ids=str)
def test_small_probabilities_count(device, kv_dtype):
    """Each is too small for a normal float16, all of them are a thirteenth of the result."""
    dtype = kv_dtype if kv_dtype in (FLOAT16, BFLOAT16) else BFLOAT16
    problem = make(dtype, [5000], heads=(4, 1), kv_dtype=kv_dtype, scales="scalar")
    problem = problem.but(k_scale=1.0, v_scale=1.0) if kv_dtype != dtype else problem
    query = np.zeros_like(problem.query)
    query[:, :, 0] = 11
    key, value = np.zeros_like(problem.k_cache), np.ones_like(problem.v_cache)
    key[problem.block_table[0, 0], 0, 0, 0] = 1
    value[problem.block_table[0, 0], 0, 0] = 0
    problem = problem.but(query=query, k_cache=key, v_cache=value, options={"scale": 1.0})
    assert 0.07 < problem.expected()[0].min() < 0.08
    check(problem, device)


@pytest.mark.parametrize("kv_dtype", [FLOAT8, FLOAT8UZ], ids=str)
def test_small_elements_count(device, kv_dtype):
    """The subnormal numbers of float8, which its smallest exponent has."""
    problem = make(FLOAT16, [300, 20], [4, 1], heads=(4, 1), kv_dtype=kv_dtype, scales="scalar")
    small = {}
    for name in ("k_cache", "v_cache"):
        codes = getattr(problem, name).view(np.uint8) & 0x87
        small[name] = np.where(codes == 0x80, 0, codes).astype(np.uint8).view(kv_dtype)
    assert 0 < np.abs(small["v_cache"].astype(np.float32)).max() < 2.0**-6
    check(problem.but(**small, k_scale=100.0, v_scale=100.0), device)


def test_bits_do_not_depend_on_the_batch(device):
    problem = make(BFLOAT16, [1100, 40, 600, 90], [1, 40, 5, 90], heads=(8, 2), head_dim=64)
    together, lse = attend(problem, device, return_lse=True)
    for i in range(4):
        start, stop = problem.cu_seqlens_q[i : i + 2]
        alone, alone_lse = attend(problem.only(i), device, return_lse=True)
        assert np.array_equal(bits(alone), bits(together[start:stop]))
        assert np.array_equal(bits(alone_lse), bits(lse[start:stop]))


@pytest.mark.parametrize("kv_dtype", [None, FLOAT8], ids=str)
def test_the_last_workgroup_merges_as_a_second_kernel_does(device, merge_by_last, kv_dtype):
    problem = make(
        BFLOAT16, [300, 64, 0, 150], [1, 3, 0, 7], heads=(16, 2), head_dim=64, kv_dtype=kv_dtype
    )
    for splits in (5, 2, 3):
        merge_by_last(False)
        want = attend(problem, device, num_splits=splits, return_lse=True)
        merge_by_last(True)
        for _ in range(2):
            got = attend(problem, device, num_splits=splits, return_lse=True)
            assert all(np.array_equal(bits(g), bits(w)) for g, w in zip(got, want, strict=True))
    check(problem, device, launch={"num_splits": 3})


def test_any_workgroup_may_be_the_last(sim, device, merge_by_last):
    problem = make(BFLOAT16, [310], heads=(4, 1), head_dim=64)
    want = attend(problem, device, num_splits=5)
    merge_by_last(True)
    moved, last = on(problem, device), set()
    for seed in range(1, 60):
        sim.set_seed(seed)
        out = moved.call(paged_attention, num_splits=5)
        assert np.array_equal(bits(out.numpy()), bits(want))
        last.add(sim.last_split())
    assert last == set(range(5))


def test_what_no_row_of_a_tile_sees_does_not_matter(device):
    """NaN and infinities past the end, before a window, in a hole, in the pool's first block."""
    problem = make(FLOAT16, [50, 70], [2, 1], heads=(4, 1), head_dim=64, block_size=16)
    got = attend(problem, device, window_size=(20, 0))
    dirty = {}
    for name in ("k_cache", "v_cache"):
        cache = getattr(problem, name).copy()
        for row, length in zip(problem.block_table, (50, 70), strict=True):
            cache[row[0]] = np.nan  # before the window
            cache[row[length // 16], :, length % 16 :] = np.inf
        dirty[name] = cache
    again = attend(problem.but(**dirty), device, window_size=(20, 0))
    assert np.array_equal(bits(got), bits(again))


def test_strides(device):
    """Keys and values between each other, misaligned, beside other things."""
    problem = make(BFLOAT16, [90, 33], [3, 1], heads=(4, 2), head_dim=64)
    blocks, heads, tokens, dim = problem.k_cache.shape
    fused = np.zeros((blocks, heads, tokens, 2, dim + 3), BFLOAT16)
    fused[..., 0, 1 : dim + 1], fused[..., 1, 1 : dim + 1] = problem.k_cache, problem.v_cache
    moved = up(fused, device)
    case = on(problem, device).but(
        k_cache=moved[..., 0, 1 : dim + 1], v_cache=moved[..., 1, 1 : dim + 1]
    )
    want = attend(problem, device)
    assert np.array_equal(bits(case.call(paged_attention).numpy()), bits(want))


def test_who_takes_a_call(device):
    """A NaN that the first of two rows does not see reaches it by matrix instructions alone."""
    for dtype, kv_dtype, head_dim, unit in (
        (FLOAT16, None, 64, True),
        (BFLOAT16, None, 128, True),
        (BFLOAT16, None, 256, True),
        (BFLOAT16, None, 512, False),
        (FLOAT16, None, 72, True),
        (FLOAT16, FLOAT8, 72, False),
        (FLOAT16, FLOAT8, 80, True),
        (FLOAT32, None, 64, False),
        (FLOAT16, FLOAT8, 64, True),
        (BFLOAT16, FLOAT8, 256, True),
        (BFLOAT16, FLOAT8, 512, False),
        (FLOAT32, FLOAT8, 64, False),
    ):
        problem = make(dtype, [50], [2], heads=(1, 1), head_dim=head_dim, kv_dtype=kv_dtype)
        problem.v_cache[problem.block_table[0, 49 // 16], :, 49 % 16] = np.nan
        first = attend(problem, device)[0]
        unit &= not device.architecture.startswith(("gfx906", "gfx1030"))
        assert np.isnan(first).all() == unit, (dtype, kv_dtype, head_dim)
