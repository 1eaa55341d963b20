"""paged_attention on a device against the float64 oracle."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_cases import FEATURES, ROUNDING, attend, check, on, up
from ops_cases import (
    BFLOAT16,
    DTYPES,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    assert_close,
    bits,
    make,
    tree_mask,
)
from rocmforge import hip, reference
from rocmforge.ops import paged_attention

EIGHT_BIT = [np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, np.int8)]

HEADS = itertools.cycle([(1, 1), (4, 1), (6, 3), (8, 2), (3, 3), (16, 1), (10, 2), (40, 2)])
GRID = [
    (head_dim, block_size, next(HEADS), ("HND", "NHD")[i % 2])
    for i, (head_dim, block_size) in enumerate(
        itertools.product([8, 24, 64, 80, 128, 256, 264, 512, 576], [1, 7, 16, 256])
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "block_size", "heads", "layout"), GRID)
def test_decode(device, dtype, head_dim, block_size, heads, layout):
    contexts = [1, block_size, block_size + 1, 0, 40]
    check(
        make(dtype, contexts, heads=heads, head_dim=head_dim, block_size=block_size, layout=layout),
        device,
    )


def test_every_head_dim(device):
    """All 72, each with a block size of its own."""
    for i, head_dim in enumerate(range(8, 577, 8)):
        kinds = {"block_size": 1 + 37 * i % 256, "layout": ("HND", "NHD")[i % 2]}
        check(make(DTYPES[i % 3], [3, 18], heads=(3, 1), head_dim=head_dim, **kinds), device)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"head_dim": 584}, "query must have a head_dim .* of 8 to 576 in steps of 8"),
        ({"head_dim": 20}, "query must have a head_dim .* of 8 to 576 in steps of 8"),
        ({"v_head_dim": 584}, "v_cache must have a head_dim .* of 8 to 576 in steps of 8"),
    ],
)
def test_what_is_not_built(device, shape, message):
    problem = on(make(FLOAT32, [3], **shape), device)
    with pytest.raises(ValueError, match=message):
        problem.call(paged_attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (8, 2), (20, 1), (5, 5)])
def test_ragged_prefill(device, dtype, heads):
    problem = make(dtype, [70, 33, 5, 0, 120, 1], [70, 1, 5, 0, 37, 1], heads=heads, head_dim=64)
    check(problem, device)
    check(problem, device, causal=False)
    check(problem, device, launch={"max_seqlen_q": 70, "max_seq_len": 120})


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"), [(96, 64), (64, 96), (192, 128), (576, 512), (16, 256), (128, 8)]
)
def test_values_of_another_size(device, head_dim, v_head_dim):
    problem = make(
        BFLOAT16, [40, 21], [3, 1], heads=(4, 2), head_dim=head_dim, v_head_dim=v_head_dim
    )
    check(problem, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latent_cache(device, dtype):
    problem = make(dtype, [40, 21], [3, 1], heads=(16, 1), head_dim=576)
    host = problem.but(v_cache=problem.k_cache[..., :512])
    want, want_lse = host.call(reference.paged_attention, scale=0.07, return_lse=True)
    moved = on(problem, device)
    moved = moved.but(v_cache=moved.k_cache[..., :512])
    out, lse = moved.call(paged_attention, scale=0.07, return_lse=True)
    bound = 0.0
    if dtype in ROUNDING:
        magnitudes = host.but(v_cache=np.abs(host.v_cache.astype(np.float32)))
        bound = magnitudes.call(reference.paged_attention, scale=0.07) * ROUNDING[dtype]
    assert_close(out.numpy(), want, bound, rounds=True)
    np.testing.assert_allclose(lse.numpy(), want_lse, atol=5e-6)
    with pytest.raises(ValueError, match="scale must be given"):
        moved.call(paged_attention)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "head_dim"),
    [(FLOAT16, None, 96), (BFLOAT16, None, 72), (FLOAT16, FLOAT8, 80), (BFLOAT16, FLOAT8, 320)],
)
@pytest.mark.usefixtures("vector_kernels")
def test_pairs(device, dtype, kv_dtype, head_dim):
    """16-bit queries in vector arithmetic."""
    kinds = {"heads": (4, 2), "head_dim": head_dim, "kv_dtype": kv_dtype}
    for feature in FEATURES.values():
        for queries in (None, [1, 40, 7, 1]):
            check(make(dtype, [130, 40, 80, 1], queries, **kinds), device, **feature)
    problem = make(dtype, [140, 90, 200], [6, 1, 8], holes=0.3, **kinds)
    check(problem, device)
    check(problem.but(mask=tree_mask(problem)), device)
    check(make(dtype, [600, 513], v_head_dim=64, **kinds), device, launch={"num_splits": 3})


@pytest.mark.parametrize("queries", [None, [1, 40, 7, 1]], ids=["decode", "ragged"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(device, feature, queries):
    problem = make(FLOAT32, [130, 40, 80, 1], queries, heads=(4, 2))
    check(problem, device, **FEATURES[feature])
    check(problem, device, launch={"num_splits": 3}, **FEATURES[feature])


def test_sinks_of_sequences_without_keys(device):
    sinks = np.array([0.5, -1.0, 3.0, -np.inf], np.float32)
    problem = make(FLOAT32, [0, 3], heads=(4, 2))
    check(problem, device, sinks=sinks)


def test_mask_of_new_tokens(device, rng):
    queries = [6, 1, 3]
    problem = make(FLOAT32, [40, 20, 3], queries, heads=(4, 2))
    mask = rng.integers(0, 2, (10, 8)).astype(np.uint8)
    check(problem.but(mask=mask), device)
    narrow = np.ascontiguousarray(mask[:, :6]).astype(bool)
    check(problem.but(mask=narrow), device, causal=False)


def test_negative_blocks_are_masked(device):
    problem = make(FLOAT32, [140, 90, 200, 30], [9, 1, 1, 30], holes=0.4)
    check(problem, device)


def test_rows_of_a_larger_table(device):
    problem = make(FLOAT32, [40, 21, 7], heads=(4, 2))
    table = np.full((6, problem.block_table.shape[1]), 2**30, np.int32)
    rows = np.array([4, 0, 5], np.int32)
    table[rows] = problem.block_table
    check(problem.but(block_table=table, rows=rows), device)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize(
    ("forms", "head_dim"),
    [
        (("float", "float"), 64),
        (("heads", "heads"), 72),
        (("pool", "pool"), 256),
        (("pool", "float"), 128),
        (("heads", "pool"), 64),
        (("pool", "heads"), 8),
        (("pool", "pool"), 576),
        (("float", "pool"), 520),
    ],
)
def test_eight_bit_caches(device, rng, dtype, forms, head_dim):
    problem = make(FLOAT32, [70, 33, 7], [3, 1, 1], head_dim=head_dim)
    caches = {}
    for name in ("k_cache", "v_cache"):
        values = np.nan_to_num(getattr(problem, name), nan=1, posinf=1, neginf=1) * 20
        caches[name] = values.clip(-100, 100).astype(dtype)
    shapes = {"heads": (2,), "pool": problem.k_cache.shape[:3]}
    scales = [
        float(rng.uniform(0.01, 0.1))
        if form == "float"
        else rng.uniform(0.01, 0.1, shapes[form]).astype(np.float32)
        for form in forms
    ]
    for query_dtype in DTYPES:
        case = problem.but(query=problem.query.astype(query_dtype), **caches)
        check(case.but(k_scale=scales[0], v_scale=scales[1]), device)


def test_float8_bytes_of_both_encodings_mean_what_they_say(device):
    """Each of the 256 codes, read by attention over a single token."""
    for dtype, query_dtype in itertools.product(EIGHT_BIT, (FLOAT32, FLOAT16)):
        codes = np.arange(256, dtype=np.uint8).view(dtype).reshape(32, 1, 1, 8)
        keys = np.zeros_like(codes)
        query = np.zeros((32, 1, 8), query_dtype)
        table = np.arange(32, dtype=np.int32)[:, None]
        got = paged_attention(
            *(up(a, device) for a in (query, keys, codes, table, np.ones(32, np.int32))),
            k_scale=1.0,
            v_scale=1.0,
        )
        np.testing.assert_array_equal(got.numpy(), codes.astype(np.float32).reshape(32, 1, 8))


@pytest.mark.parametrize("splits", [1, 2, 5, 256])
def test_any_number_of_splits(device, splits):
    problem = make(FLOAT32, [300, 64, 65, 1, 0], [1, 3, 1, 1, 1], heads=(8, 2))
    check(problem, device, launch={"num_splits": splits})


@pytest.mark.parametrize("head_dim", [64, 512], ids=["16 rows", "8 rows"])
def test_the_last_workgroup_merges_as_a_second_kernel_does(device, merge_by_last, head_dim):
    """Bit for bit, with any number of splits after any other; a tile of one, two and more waves."""
    shape = {"heads": (10, 2), "head_dim": head_dim}
    problem = make(FLOAT32, [300, 64, 65, 1, 0, 150], [1, 3, 1, 1, 0, 7], **shape)
    for splits in (5, 2, None, 3):
        launch = {"num_splits": splits, "return_lse": True, "sinks": np.ones(10, np.float32)}
        merge_by_last(False)
        want = attend(problem, device, **launch)
        merge_by_last(True)
        for _ in range(2):
            got = attend(problem, device, **launch)
            assert all(np.array_equal(bits(g), bits(w)) for g, w in zip(got, want, strict=True))
    check(problem, device, launch={"num_splits": 3})


def test_any_workgroup_may_be_the_last(sim, device, merge_by_last):
    problem = make(FLOAT32, [310], heads=(4, 1))
    want = attend(problem, device, num_splits=5)
    merge_by_last(True)
    moved, last = on(problem, device), set()
    for seed in range(1, 60):
        sim.set_seed(seed)
        launches = sim.launches()
        out = moved.call(paged_attention, num_splits=5)
        assert sim.launches() == launches + 1
        assert np.array_equal(bits(out.numpy()), bits(want))
        last.add(sim.last_split())
    assert last == set(range(5))


def test_who_merges(sim, device):
    """The last workgroup on chips of one die, in our memory, where its waves read 16 parts each."""
    one = not device.architecture.startswith(("gfx942", "gfx950"))

    def launches(heads, splits, **given):
        moved = on(make(FLOAT32, [1300], heads=heads), device)
        moved.call(paged_attention, num_splits=splits)
        hip.synchronize()
        before = sim.launches()
        moved.call(paged_attention, num_splits=splits, **given)
        return sim.launches() - before

    assert device.one_die == one
    assert launches((4, 1), 1) == 1
    assert launches((4, 1), 16) == 2 - one
    assert launches((4, 1), 17) == 2
    assert launches((8, 1), 8) == 2 - one
    assert launches((8, 1), 9) == 2
    assert launches((16, 1), 4) == 2 - one
    assert launches((32, 1), 5) == 2
    workspace = hip.zeros(1 << 20, np.uint8, device)
    assert launches((4, 1), 2, workspace=workspace) == 2


def test_long_contexts_are_split(device):
    problem = make(BFLOAT16, [1500, 700, 513, 512], heads=(4, 1))
    check(problem, device)
    check(problem, device, launch={"deterministic": False})


def test_bits_do_not_depend_on_the_batch(device):
    problem = make(BFLOAT16, [1100, 40, 600, 90], [1, 40, 5, 90], heads=(8, 2))
    together, lse = attend(problem, device, return_lse=True)
    for i in range(4):
        start, stop = problem.cu_seqlens_q[i : i + 2]
        alone, alone_lse = attend(problem.only(i), device, return_lse=True)
        assert np.array_equal(bits(alone), bits(together[start:stop]))
        assert np.array_equal(bits(alone_lse), bits(lse[start:stop]))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "head_dim"),
    [
        (FLOAT32, None, 64),
        (FLOAT16, None, 72),
        (BFLOAT16, None, 192),
        (FLOAT16, FLOAT8, 96),
        (BFLOAT16, FLOAT8, 576),
        (FLOAT32, FLOAT8, 64),
    ],
)
@pytest.mark.usefixtures("vector_kernels")
def test_what_lies_past_the_end_is_never_seen(device, dtype, kv_dtype, head_dim):
    """NaN in keys and values of tokens that a row must not see does not reach it."""
    problem = make(dtype, [50], [50], heads=(4, 2), head_dim=head_dim, kv_dtype=kv_dtype)
    want = attend(problem, device)
    block, offset = problem.block_table[0, 49 // 16], 49 % 16
    for name in ("k_cache", "v_cache"):
        cache = getattr(problem, name).copy()
        cache[block, :, offset] = np.nan
        got = attend(problem.but(**{name: cache}), device)
        assert np.array_equal(bits(got[:49]), bits(want[:49]))
        assert np.isnan(got[49]).all()


def test_indices_out_of_range_are_masked(device):
    """Nobody can check what lies on the device: kernels do not follow it out of the pool."""
    problem = make(FLOAT32, [40, 21, 7], heads=(4, 2))
    want = problem.call(reference.paged_attention)
    for name, index, value in (
        ("block_table", (0, 0), 2**30),
        ("block_table", (0, 1), problem.k_cache.shape[0]),
        ("seq_lens", 0, 2**30),
        ("seq_lens", 0, -5),
    ):
        bad = getattr(problem, name).copy()
        bad[index] = value
        got = attend(problem.but(**{name: bad}), device)
        np.testing.assert_allclose(got[1:], want[1:], atol=2e-6, rtol=2e-6)
        assert np.isfinite(got[0]).all() or name == "seq_lens"
    for rows in ([9, 1, 2], [-1, 1, 2]):
        got = attend(problem.but(rows=np.array(rows, np.int32)), device)
        assert not got[0].any()
    ragged = make(FLOAT32, [40, 21], [2, 3], heads=(4, 2))
    for cu in ([0, 9, 5], [0, -1, 5], [0, 3, 2]):
        attend(ragged.but(cu_seqlens_q=np.array(cu, np.int32)), device)


def test_strides(device):
    """Fused, padded and misaligned arrays, read and written where they lie."""
    problem = make(BFLOAT16, [40, 21], [3, 1], heads=(4, 2), head_dim=64)
    want = problem.call(reference.paged_attention)
    blocks, heads, tokens, dim = problem.k_cache.shape
    fused = np.zeros((blocks, 2, heads, tokens, dim + 5), BFLOAT16)
    fused[:, 0, ..., 3 : dim + 3], fused[:, 1, ..., 3 : dim + 3] = problem.k_cache, problem.v_cache
    moved = up(fused, device)
    wide = np.zeros((4, 6, 65), BFLOAT16)
    wide[:, 1:5, 1:] = problem.query
    out = hip.zeros((4, 6, 67), BFLOAT16, device)
    case = on(problem, device).but(
        query=up(wide, device)[:, 1:5, 1:],
        k_cache=moved[:, 0, :, :, 3 : dim + 3],
        v_cache=moved[:, 1, :, :, 3 : dim + 3],
    )
    view = out[:, 2:, 1:65]
    assert case.call(paged_attention, out=view) is view
    host = out.numpy()
    np.testing.assert_allclose(host[:, 2:, 1:65].astype(float), want, atol=4e-3, rtol=4e-3)
    host[:, 2:, 1:65] = 0
    assert not host.any()


def test_rows_of_nobody(device):
    problem = make(FLOAT32, [40, 21], [3, 1], heads=(4, 2))
    longer = problem.but(query=np.concatenate([problem.query, problem.query[:2]]))
    out, lse = attend(longer, device, return_lse=True)
    assert not out[4:].any()
    assert np.isneginf(lse[4:]).all()


@settings(max_examples=25)
@given(
    st.data(),
    st.sampled_from([8, 40, 64, 128, 200, 512]),
    st.sampled_from([1, 2, 5, 16, 32]),
    st.sampled_from([(1, 1), (4, 2), (12, 3), (8, 1), (33, 1)]),
)
def test_random_batches(data, head_dim, block_size, heads):
    contexts = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=5))
    queries = [data.draw(st.integers(0, n)) for n in contexts]
    problem = make(
        data.draw(st.sampled_from(DTYPES)),
        contexts,
        queries,
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        holes=data.draw(st.sampled_from([0.0, 0.3])),
        seed=data.draw(st.integers(0, 2**16)),
    )
    kwargs = {"causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        kwargs["window_size"] = (data.draw(st.integers(0, 60)), data.draw(st.integers(-1, 30)))
    launch = {"num_splits": data.draw(st.sampled_from([None, 1, 4]))}
    for index in range(hip.device_count()):
        check(problem, hip.get_device(index), launch=launch, **kwargs)
