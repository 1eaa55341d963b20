"""Every feature of attention with every type and every instruction set, against the oracle."""

import functools
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
    FLOAT8UZ,
    FLOAT16,
    FLOAT32,
    INT8,
    TOLERANCE,
    assert_close,
    assert_lse_close,
    bits,
    guarded,
    make,
    pairwise,
    tree_mask,
)
from rocmforge import reference
from rocmforge.ops import (
    _cpu,
    get_num_threads,
    merge_states,
    paged_attention,
    set_num_threads,
    write_kv,
)

ISAS = _cpu.available_isas()


def check(problem, **kwargs):
    want, want_lse, bound = problem.expected(**kwargs)
    got, lse = problem.call(paged_attention, return_lse=True, **kwargs)
    assert got.dtype == problem.query.dtype
    assert_close(got, want, bound, problem.query.shape[2])
    assert_lse_close(lse, want_lse)


def head_values(count, low, high, seed=0):
    return np.random.default_rng(seed).uniform(low, high, count).astype(np.float32)


TYPES = [(dtype, dtype) for dtype in DTYPES] + [(q, kv) for q in DTYPES for kv in EIGHT_BIT]
BATCHES = {
    "decode": ([0, 1, 31, 33, 257, 530], None),
    "verify": ([4, 40, 300, 9], [4, 3, 4, 0]),
    "prefill": ([70, 33], [70, 33]),
    "ragged": ([70, 1, 0, 40, 300, 290, 5, 0], [70, 1, 0, 1, 4, 33, 5, 2]),
}
GRID = pairwise(
    types=TYPES,
    batch=sorted(BATCHES),
    heads=[(1, 1), (6, 3), (8, 1), (12, 2), (40, 2)],
    dims=[(64, 64), (128, 128), (8, 32), (80, 24), (192, 128), (256, 8)],
    block_size=[1, 7, 16, 64],
    layout=["HND", "NHD"],
    scales=["token", "head", "scalar"],
    causal=[True, False],
    window=[(-1, -1), (0, 0), (20, -1), (-1, 3), (45, 7)],
    softcap=[0.0, 1.5, 50.0],
    alibi=[False, True],
    sinks=[False, True],
    mask=[False, True],
    holes=[0.0, 0.3],
)


@functools.cache
def row(index):
    """A problem of the grid with what the oracle makes of it."""
    case = GRID[index]
    contexts, queries = BATCHES[case["batch"]]
    problem = make(
        case["types"][0],
        contexts,
        queries,
        kv_dtype=case["types"][1],
        scales=case["scales"],
        heads=case["heads"],
        head_dim=case["dims"][0],
        v_head_dim=case["dims"][1],
        block_size=case["block_size"],
        layout=case["layout"],
        holes=case["holes"],
        seed=index,
    )
    rng = np.random.default_rng(index)
    num_heads = case["heads"][0]
    options = {
        "causal": case["causal"],
        "window_size": case["window"],
        "softcap": case["softcap"],
        "alibi_slopes": None,
        "sinks": None,
    }
    if case["alibi"]:
        options["alibi_slopes"] = rng.uniform(-0.1, 0.3, num_heads).astype(np.float32)
    if case["sinks"]:
        options["sinks"] = rng.standard_normal(num_heads).astype(np.float32) * 2
    problem = problem.but(options=options)
    if case["mask"]:
        problem = problem.but(mask=tree_mask(problem, index))
    return problem, problem.expected()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", range(len(GRID)))
def test_grid(index):
    problem, (want, want_lse, bound) = row(index)
    got, lse = problem.call(paged_attention, return_lse=True)
    assert got.dtype == problem.query.dtype
    assert_close(got, want, bound)
    assert_lse_close(lse, want_lse)


# ---------------------------------------------------------------- latent caches, sizes, ratios


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("dtype", "kv_dtype"), TYPES, ids=str)
def test_latent(dtype, kv_dtype):
    """Keys and values from the same rows: as in multi-head latent attention, and smaller ones."""
    for heads, dims, scales in (((16, 1), (576, 512), "token"), ((6, 2), (80, 24), "head")):
        problem = make(
            dtype,
            [1, 40, 300],
            [1, 3, 1],
            heads=heads,
            head_dim=dims[0],
            v_head_dim=dims[1],
            kv_dtype=kv_dtype,
            latent=True,
            scales=scales,
        )
        check(problem)
        check(problem, window_size=(20, -1), sinks=head_values(heads[0], -1, 1))
        if kv_dtype in EIGHT_BIT:  # given, it is taken
            factor = problem.k_scale * 2
            check(problem.but(v_scale=factor))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 13, 16, 32, 71, 128])
def test_group_ratios(group):
    check(make(BFLOAT16, [40, 3], heads=(2 * group, 2), head_dim=64, kv_dtype=INT8))
    check(make(FLOAT32, [40, 3], [7, 2], heads=(group, 1), kv_dtype=FLOAT8), window_size=(5, 0))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("start", range(8, 577, 64))
def test_every_head_dim(start):
    """All sizes of keys and of values, each with four pairs of types that take turns."""
    for head_dim in range(start, start + 64, 8):
        for i in range(4):
            dtype, kv_dtype = TYPES[(head_dim // 8 + 3 * i) % len(TYPES)]
            dims = {"head_dim": head_dim, "v_head_dim": 584 - head_dim}
            queries = (None, [2, 17])[i % 2]
            check(make(dtype, [3, 18], queries, heads=(3, 1), kv_dtype=kv_dtype, **dims))


# ---------------------------------------------------------------- one feature at a time


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("around", [32, 64, 256, 512])
def test_windows_around_tiles_and_parts(around):
    problem = make(FLOAT32, [around + 700, around + 1, around], [1, 4, 2], head_dim=16)
    for left in (0, around - 1, around, around + 1, 2**40):
        check(problem, window_size=(left, -1))
    check(problem, window_size=(-1, 1), causal=False)
    check(problem, window_size=(around, 2), causal=False)


@pytest.mark.usefixtures("isa")
def test_nothing_is_visible():
    """Zeros, and -inf or the sink, for a window or a mask that hides all."""
    problem = make(FLOAT16, [5, 40], [5, 2])
    mask = np.zeros((7, 5), np.uint8)
    first = problem.only(0).but(mask=mask[:5])  # all its tokens are new
    sinks = head_values(4, -3, 3)
    for kwargs, want in (({}, -np.inf), ({"sinks": sinks}, sinks)):
        got, lse = first.call(paged_attention, return_lse=True, **kwargs)
        assert not bits(got).any()
        np.testing.assert_array_equal(lse, np.broadcast_to(want, lse.shape))
    check(problem.but(mask=mask))
    empty = problem.but(seq_lens=np.zeros(2, np.int32))
    got, lse = empty.call(paged_attention, return_lse=True, sinks=sinks)
    assert not bits(got).any()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, lse.shape))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sink", [-np.inf, -1e30, 0.0, 80.0, 1e30])
def test_extreme_sinks(sink):
    sinks = np.array([sink, 0, 1, -1], np.float32)
    check(make(FLOAT32, [40, 300], [3, 1]), sinks=sinks)


@pytest.mark.usefixtures("isa")
def test_softcap_of_large_logits():
    problem = make(FLOAT32, [40, 300], [3, 1])
    check(problem, softcap=30.0, scale=3.0)
    check(problem, softcap=1e-3, scale=1.0)
    check(problem, softcap=1e6)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_tree_of_drafts(dtype):
    """Three branches behind a common token: each sees its own ancestors, as if it were alone."""
    parents = [-1, 0, 0, 0, 1, 2, 4]
    mask = np.zeros((7, 7), dtype)
    for i, parent in enumerate(parents):
        mask[i] = mask[parent] if parent >= 0 else 0
        mask[i, i] = 1
    tree = make(FLOAT32, [50], [7], head_dim=32).but(mask=mask)
    check(tree)
    got = tree.call(paged_attention)
    slots = tree.block_table[0, np.arange(50) // 16].astype(int) * 16 + np.arange(50) % 16
    for token in range(7):  # the chain of its ancestors, laid out as a sequence of its own
        chain = [*range(43), *(43 + np.flatnonzero(mask[token]))]
        caches = [
            c.swapaxes(1, 2).reshape(-1, 2, 32)[slots[chain]].swapaxes(0, 1)[None].copy()
            for c in (tree.k_cache, tree.v_cache)
        ]
        alone = paged_attention(
            tree.query[token : token + 1],
            *caches,
            np.zeros((1, 1), np.int32),
            np.array([len(chain)], np.int32),
        )
        np.testing.assert_allclose(alone[0], got[token], rtol=2e-5, atol=2e-6)


def test_strided_masks_and_scales():
    problem = make(FLOAT32, [40, 9], [7, 2], kv_dtype=INT8)
    want = problem.but(mask=tree_mask(problem)).expected()
    wide = np.full((18, 40), 7, np.uint8)
    mask = tree_mask(problem)
    view = wide[::2, 3 : 3 + mask.shape[1]]
    view[...] = mask
    scale = np.full((*problem.k_scale.shape, 2), np.nan, np.float32)
    scale[..., 1] = problem.k_scale
    strided = problem.but(
        mask=view, k_scale=scale[..., 1], v_scale=np.asfortranarray(problem.v_scale)
    )
    assert_close(strided.call(paged_attention), *want[::2])


# ---------------------------------------------------------------- what is not read


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("dtype", "kv_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 128])
def test_reads_nothing_past_the_end(dtype, kv_dtype, head_dim):
    """Every array ends where a page ends that must not be touched."""
    problem = make(
        dtype, [16, 31, 32, 80], [1, 3, 1, 40], heads=(3, 1), head_dim=head_dim, kv_dtype=kv_dtype
    )
    last = len(problem.k_cache) - 1  # the last slot of the last block is in use
    table = problem.block_table.copy()
    problem.k_cache[last] = problem.k_cache[table[2, 1]]
    problem.v_cache[last] = problem.v_cache[table[2, 1]]
    if problem.k_scale is not None:
        problem.k_scale[last] = problem.k_scale[table[2, 1]]
        problem.v_scale[last] = problem.v_scale[table[2, 1]]
    table[2, 1] = last
    problem = problem.but(block_table=np.ascontiguousarray(table[:, :5]))
    problem = problem.but(mask=np.ascontiguousarray(tree_mask(problem)[:, :40]))
    options = {"alibi_slopes": head_values(3, 0, 0.2), "sinks": head_values(3, -1, 1)}
    want, want_lse, bound = problem.expected(**options)
    arrays = ["query", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q", "mask"]
    if problem.k_scale is not None:
        arrays += ["k_scale", "v_scale"]
    safe = problem.but(**{name: guarded(getattr(problem, name)) for name in arrays})
    out = guarded(np.zeros_like(problem.query))
    options = {name: guarded(array) for name, array in options.items()}
    _, lse = safe.call(paged_attention, out=out, return_lse=True, **options)
    assert_close(out, want, bound)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("kv_dtype", [FLOAT8, FLOAT8UZ], ids=str)
@pytest.mark.parametrize("scales", ["token", "head"])
def test_float8_as_uint8(kv_dtype, scales):
    problem = make(BFLOAT16, [40, 7], [2, 1], kv_dtype=kv_dtype, scales=scales)
    out = problem.call(paged_attention)
    plain = problem.but(k_cache=problem.k_cache.view("u1"), v_cache=problem.v_cache.view("u1"))
    np.testing.assert_array_equal(plain.call(paged_attention, kv_dtype=kv_dtype.name), out)
    one = problem.but(v_cache=plain.v_cache)  # the other cache decides
    np.testing.assert_array_equal(one.call(paged_attention), out)

    key = np.repeat(np.float32([1.0, -3.0, 0.1]), 128).reshape(3, 2, 64)
    slots = np.array([33, 5, -1])
    caches = np.zeros((2, 2, 4, 2, 16, 64), np.uint8)
    for pair, how in zip(caches, (kv_dtype, None), strict=True):
        k, v = pair if how is not None else pair.view(kv_dtype)
        write_kv(key, key, k, v, slots, k_scale=0.5, v_scale=2.0, kv_dtype=how)
    np.testing.assert_array_equal(*caches)
    assert caches.any()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv_dtype", [FLOAT8, INT8], ids=str)
def test_nan_scale_of_a_used_slot_is_not_hidden(kv_dtype):
    problem = make(FLOAT32, [300, 300], kv_dtype=kv_dtype)
    for scale in (problem.k_scale, problem.v_scale):
        block = problem.block_table[0, 5]
        kept = scale[block, 0, 3]
        scale[block, 0, 3] = np.nan
        got = problem.call(paged_attention)
        assert np.isnan(got[0, :2]).all()
        assert np.isfinite(got[0, 2:]).all()
        assert np.isfinite(got[1]).all()
        scale[block, 0, 3] = kept


# ---------------------------------------------------------------- the same bits


OPTIONS = [
    {},
    {"window_size": (300, -1), "sinks": head_values(8, -1, 1)},
    {"softcap": 5.0, "alibi_slopes": head_values(8, 0, 0.05)},
]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [(BFLOAT16, FLOAT8), (FLOAT32, INT8), (BFLOAT16, BFLOAT16)], ids=str
)
def test_bits_do_not_depend_on_the_batch_or_the_threads(dtype, kv_dtype, options, threads):
    """Lengths around every split boundary, with 1 to 4 query tokens: alone, among 64, threads."""
    rng = np.random.default_rng(3)
    edges = [1, 31, 32, 33, 64, 65, 255, 256, 257, 511, 513, 1024, 1025, 2050]
    contexts = edges + rng.integers(4, 600, 64 - len(edges)).tolist()
    queries = [min(context, 1 + i % 4) for i, context in enumerate(contexts)]
    problem = make(dtype, contexts, queries, heads=(8, 2), head_dim=32, kv_dtype=kv_dtype)
    problem = problem.but(mask=tree_mask(problem), options=options)

    def run(problem):
        out, lse = problem.call(paged_attention, return_lse=True)
        return np.concatenate([bits(out).reshape(len(out), -1), bits(lse)], axis=1)

    threads(1)
    want = run(problem)
    starts = problem.cu_seqlens_q
    for n in (3, 2, 1):
        threads(n)
        np.testing.assert_array_equal(run(problem), want)
        for i in range(len(edges) if n < 3 else 0):  # one sequence on many threads: split
            np.testing.assert_array_equal(run(problem.only(i)), want[starts[i] : starts[i + 1]])
    order = np.random.default_rng(5).permutation(len(problem.k_cache))
    inverse = np.argsort(order).astype(np.int32)
    table = problem.block_table.copy()
    real = (table >= 0) & (table < len(order))
    table[real] = inverse[table[real]]
    moved = {name: getattr(problem, name)[order] for name in ("k_cache", "v_cache")}
    if problem.k_scale is not None:
        moved |= {name: getattr(problem, name)[order] for name in ("k_scale", "v_scale")}
    np.testing.assert_array_equal(run(problem.but(block_table=table, **moved)), want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(dtype, dtype) for dtype in DTYPES] + [(BFLOAT16, kv_dtype) for kv_dtype in EIGHT_BIT],
    ids=str,
)
@pytest.mark.parametrize(
    ("options", "tree"),
    [
        *((options, False) for options in OPTIONS),
        ({"scale": -0.1}, False),
        ({"causal": False, "window_size": (270, 30)}, False),
        ({"causal": False}, True),
    ],
    ids=["plain", "window-sinks", "cap-alibi", "negative", "both-sides", "tree"],
)
def test_prompts_over_several_parts(dtype, kv_dtype, options, tree, threads):
    """Chunks of prompts, whose rows are many blocks: right, and the same bits however split."""
    problem = make(
        dtype, [700, 513, 40, 300], [150, 97, 40, 1], heads=(8, 2), kv_dtype=kv_dtype, holes=0.1
    )
    if tree:
        problem = problem.but(mask=tree_mask(problem))
    problem = problem.but(options=options)
    threads(1)
    check(problem)
    want = bits(problem.call(paged_attention))
    threads(3)
    np.testing.assert_array_equal(bits(problem.call(paged_attention)), want)
    for i, (start, stop) in enumerate(itertools.pairwise(problem.cu_seqlens_q)):
        got = bits(problem.only(i).call(paged_attention))
        np.testing.assert_array_equal(got, want[start:stop])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, INT8)],
    ids=str,
)
@pytest.mark.parametrize("dims", [(8, 8), (40, 72), (136, 24), (576, 512)], ids=str)
def test_prompts_of_any_head_dim(dtype, kv_dtype, dims):
    """Blocks of rows where elements are no whole panels or tiles, over whole and partial parts."""
    head_dim, v_head_dim = dims
    problem = make(
        dtype,
        [300, 101],
        [110, 101],
        heads=(4, 2),
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        kv_dtype=kv_dtype,
        layout="NHD",
    )
    check(problem)


# ---------------------------------------------------------------- merging


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 24, 64, 128, 576])
def test_merge_states(dtype, dim):
    rng = np.random.default_rng(dim)
    a, b = (rng.standard_normal((9, 5, dim)).astype(dtype) for _ in range(2))
    lse_a, lse_b = (rng.uniform(-20, 20, (9, 5)).astype(np.float32) for _ in range(2))
    lse_a[0, 0] = lse_b[1] = lse_a[2] = lse_b[2] = -np.inf
    a[0, 0] = b[1] = np.nan  # not read
    lse_a[3, 0], lse_b[3, 0] = -200, 200
    lse_a[4, 0], lse_b[4, 0] = 1e30, -1e30
    want, want_lse = reference.merge_states(a, lse_a, b, lse_b)
    out, lse = merge_states(a, lse_a, b, lse_b)
    assert out.dtype == dtype
    scale = np.maximum(np.abs(np.nan_to_num(a.astype("f8"))), np.abs(np.nan_to_num(b.astype("f8"))))
    atol, rtol = TOLERANCE[out.dtype]
    error = np.abs(out.astype(np.float64) - want)
    assert (error <= atol + rtol * np.abs(want) + 1e-6 * scale).all()
    assert_lse_close(lse, want_lse)
    assert not bits(out[2]).any()
    np.testing.assert_array_equal(bits(out[1]), bits(a[1]))

    for target, target_lse in ((a.copy(), lse_a.copy()), (b.copy(), lse_b.copy())):
        first = (target, target_lse) if (bits(target) == bits(a)).all() else (a, lse_a)
        second = (b, lse_b) if first[0] is target else (target, target_lse)
        result = merge_states(*first, *second, out=target, lse=target_lse)
        assert result[0] is target
        assert result[1] is target_lse
        np.testing.assert_array_equal(bits(target), bits(out))
        np.testing.assert_array_equal(bits(target_lse), bits(lse))
    ends = [guarded(x) for x in (a, lse_a, b, lse_b)]
    got, _ = merge_states(*ends, out=guarded(np.zeros_like(a)), lse=guarded(lse_a))
    np.testing.assert_array_equal(bits(got), bits(out))


def test_merge_of_strided_and_many(threads):
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((300, 2, 20, 80)).astype(np.float16)
    lse = rng.uniform(-2, 2, (2, 300, 20)).astype(np.float32)
    parts = wide[:, 0, :, :64], lse[0], wide[:, 1, ::-1, 16:], lse[1]
    want, want_lse = reference.merge_states(*parts)
    for n in (1, 3):
        threads(n)
        out, out_lse = merge_states(*parts)
        assert_close(out, want)
        assert_lse_close(out_lse, want_lse)
    none = np.zeros((0, 4, 8), np.float32), np.zeros((0, 4), np.float32)
    assert merge_states(*none, *none)[0].shape == (0, 4, 8)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_context_make_the_whole(dtype):
    """A context in two halves, the sinks in one: as attention over all of it."""
    problem = make(dtype, [300, 64, 40], [1, 4, 2], block_size=16)
    sinks = head_values(4, -1, 1)
    parts = []
    for keep, options in ((slice(0, 2), {"sinks": sinks}), (slice(2, None), {})):
        table = np.full_like(problem.block_table, -1)
        table[:, keep] = problem.block_table[:, keep]
        parts += problem.but(block_table=table).call(paged_attention, return_lse=True, **options)
    want, want_lse, bound = problem.expected(sinks=sinks)
    out, lse = merge_states(*parts)
    extra = 3 * TOLERANCE[out.dtype][1]  # each part is rounded once
    assert (np.abs(out.astype("f8") - want) <= bound + extra * (1 + np.abs(want))).all()
    assert_lse_close(lse, want_lse)


# ---------------------------------------------------------------- hypothesis


@st.composite
def problems(draw):
    """Any shapes, types and features; the numbers come from a seed."""
    kv_heads = draw(st.integers(1, 5))
    heads = kv_heads * draw(st.integers(1, 20))
    contexts = draw(st.lists(st.integers(0, 90) | st.integers(0, 600), max_size=4))
    queries = None
    if draw(st.booleans()):
        queries = [draw(st.integers(0, min(c, 40) if c else 3)) for c in contexts]
    dtype, kv_dtype = draw(st.sampled_from(TYPES))
    head_dim = 8 * draw(st.integers(1, 20))
    latent = draw(st.booleans())
    problem = make(
        dtype,
        contexts,
        queries,
        heads=(heads, kv_heads),
        head_dim=head_dim,
        v_head_dim=8 * draw(st.integers(1, head_dim // 8 if latent else 20)),
        block_size=draw(st.integers(1, 40)),
        layout=draw(st.sampled_from(["HND", "NHD"])),
        kv_dtype=kv_dtype,
        scales=draw(st.sampled_from(["token", "head", "scalar"])),
        latent=latent,
        holes=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 2**16)),
    )
    sides = st.just(-1) | st.integers(0, 700)
    options = {
        "causal": draw(st.booleans()),
        "window_size": (draw(sides), draw(sides)),
        "softcap": draw(st.sampled_from([0.0, 2.0, 50.0])),
        "scale": draw(st.floats(0.1, 1.0)) / np.sqrt(head_dim),
    }
    if draw(st.booleans()):
        options["alibi_slopes"] = head_values(heads, -0.05, 0.2)
    if draw(st.booleans()):
        options["sinks"] = head_values(heads, -3, 3)
    if draw(st.booleans()):
        problem = problem.but(mask=tree_mask(problem))
    return problem.but(options=options)


@given(problem=problems(), isa=st.sampled_from(ISAS), n=st.integers(1, 3))
def test_any_shape(problem, isa, n):
    before = _cpu.isa(), get_num_threads()
    _cpu._set_isa(isa)
    set_num_threads(n)
    try:
        check(problem)
    finally:
        _cpu._set_isa(before[0])
        set_num_threads(before[1])
