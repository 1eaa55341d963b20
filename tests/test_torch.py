"""The operations on PyTorch tensors, eager and in compiled graphs."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ops_cases import BFLOAT16, EIGHT_BIT, FLOAT8, FLOAT16, FLOAT32, INT8, bits, make  # noqa: E402
from rocmforge import KVCache, ops  # noqa: E402
from rocmforge.integrations import torch as rt  # noqa: E402

TYPES = {
    "bfloat16": (np.uint16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e4m3fnuz": (np.uint8, torch.float8_e4m3fnuz),
}


def tensor(array):
    """A tensor over the memory of an array; anything else as it is."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.name in TYPES:
        carrier, kind = TYPES[array.dtype.name]
        return torch.from_numpy(array.view(carrier)).view(kind)
    return torch.from_numpy(array)


def array(result):
    """The bits of a tensor as an array of integers."""
    assert type(result) is torch.Tensor
    return bits(result.contiguous().view(torch.uint8).numpy())


def tensors(problem):
    names = ("query", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q", "rows")
    names += ("mask", "k_scale", "v_scale")
    return problem.but(**{name: tensor(getattr(problem, name)) for name in names})


def problem_of(dtype, kv_dtype=None):
    return make(dtype, [40, 3, 17], [2, 1, 5], heads=(6, 2), head_dim=40, kv_dtype=kv_dtype)


@pytest.mark.parametrize("module", [ops, rt], ids=["ops", "integration"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(FLOAT32, None), (FLOAT16, None), (BFLOAT16, None), *((BFLOAT16, kv) for kv in EIGHT_BIT)],
    ids=str,
)
def test_the_same_bits_as_with_numpy(module, dtype, kv_dtype):
    problem = problem_of(dtype, kv_dtype)
    want, want_lse = problem.call(ops.paged_attention, return_lse=True)
    out, lse = tensors(problem).call(module.paged_attention, return_lse=True)
    np.testing.assert_array_equal(array(out), bits(want.view(np.uint8)))
    np.testing.assert_array_equal(array(lse), bits(want_lse.view(np.uint8)))
    mine = torch.empty_like(out)
    assert tensors(problem).call(module.paged_attention, out=mine) is mine
    np.testing.assert_array_equal(array(mine), array(out))
    merged, merged_lse = module.merge_states(out, lse, out, lse, out=mine)
    assert merged is mine
    np.testing.assert_allclose(merged_lse.numpy(), want_lse + np.log(2), rtol=1e-5)


@pytest.mark.parametrize("kv_dtype", [None, *EIGHT_BIT], ids=str)
def test_writes_and_blocks_are_seen_by_numpy(kv_dtype):
    """Nothing is copied: what an operation writes is in the tensors' own memory."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 5, 2, 16), np.float32).astype(BFLOAT16)
    slots = np.array([7, -1, 0, 22, 13])
    pools, same = ([np.zeros((6, 2, 4, 16), kv_dtype or BFLOAT16) for _ in "kv"] for _ in "ab")
    scales, same_scales = ({}, {})
    if kv_dtype is not None:
        scales, same_scales = (
            {name: np.zeros((6, 2, 4), np.float32) for name in ("k_scale", "v_scale")} for _ in "ab"
        )
    ops.write_kv(key, value, *pools, slots, **scales)
    there = [tensor(pool) for pool in same]
    rt.write_kv(
        tensor(key),
        tensor(value),
        *there,
        tensor(slots),
        **{name: tensor(scale) for name, scale in same_scales.items()},
    )
    moved = [*pools, *scales.values()]
    seen = [*same, *same_scales.values()]
    for a, b in zip(moved, seen, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    copies = np.array([[1, 2], [5, 4]], np.int32)
    ops.copy_blocks(moved, copies)
    rt.copy_blocks([tensor(a) for a in seen], tensor(copies))
    ids = np.array([4, 2], np.int32)
    rows = ops.gather_blocks(moved, ids)
    mine = rt.gather_blocks([tensor(a) for a in seen], tensor(ids))
    np.testing.assert_array_equal(mine.numpy(), rows)
    ops.scatter_blocks(moved, ids[::-1].copy(), rows)
    rt.scatter_blocks([tensor(a) for a in seen], tensor(ids[::-1].copy()), mine)
    for a, b in zip(moved, seen, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_calibrate():
    key = torch.randn(4, 2, 8)
    k_scale, v_scale = rt.calibrate(key, key.bfloat16(), "int8")
    assert type(k_scale) is type(v_scale) is torch.Tensor
    torch.testing.assert_close(k_scale, key.abs().amax(dim=(0, 2)) / 127)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_a_cache_takes_and_gives_tensors(dtype):
    wide = torch.float32 if dtype == "float32" else torch.bfloat16
    caches = [
        KVCache(1, 8, num_kv_heads=2, head_dim=16, dtype=dtype, device="cpu") for _ in range(2)
    ]
    key, value, query = torch.randn(3, 20, 2, 16).to(wide)
    results = []
    for cache, convert in zip(caches, (lambda x: x, to_numpy), strict=True):
        cache.add_sequence(0)
        batch = cache.append([0], 20)
        cache.write(0, convert(key), convert(value), batch)
        results.append(cache.attend(0, convert(query), batch, return_lse=True))
    assert type(results[0][1]) is torch.Tensor
    np.testing.assert_array_equal(array(results[0][0]), bits(results[1][0].view(np.uint8)))


def to_numpy(x):
    if x.dtype == torch.float32:
        return x.numpy()
    return x.contiguous().view(torch.uint16).numpy().view(BFLOAT16)


def test_errors_name_the_argument():
    problem = tensors(problem_of(FLOAT32))
    with pytest.raises(ValueError, match="seq_lens must be int32, got int64"):
        problem.but(seq_lens=problem.seq_lens.long()).call(rt.paged_attention)
    with pytest.raises(ValueError, match="query must be contiguous in its last dimension"):
        problem.but(query=problem.query.transpose(0, 2).contiguous().transpose(0, 2)).call(
            rt.paged_attention
        )


# ---- operators and graphs ----


def operator_calls():
    problem = tensors(problem_of(FLOAT32))
    arguments = (
        problem.query,
        problem.k_cache.nan_to_num(1, 1, 1),
        problem.v_cache.nan_to_num(1, 1, 1),
    )
    arguments += (problem.block_table, problem.seq_lens, problem.cu_seqlens_q)
    options = {
        "sinks": torch.zeros(6),
        "alibi_slopes": torch.ones(6),
        "window_left": 9,
        "softcap": 2.0,
        "scale": 0.3,
        "max_seqlen_q": 5,
    }
    out, lse = torch.ops.rocmforge.paged_attention(*arguments)
    key = torch.randn(3, 2, 40)
    slots = torch.tensor([0, 33, -1])
    k_cache, v_cache = arguments[1:3]
    pools = [torch.zeros(k_cache.shape, dtype=torch.int8) for _ in "kv"]
    scales = [torch.zeros(k_cache.shape[:3]) for _ in "kv"]
    ids = torch.tensor([1, 0], dtype=torch.int32)
    caches = [k_cache, v_cache, scales[0]]
    rows = torch.ops.rocmforge.gather_blocks(caches, ids)
    return {
        "paged_attention": (arguments, options),
        "paged_attention_out": ((torch.empty_like(out), *arguments), {}),
        "write_kv": ((key, key + 1, k_cache, v_cache, slots), {}),
        "write_kv quantised": (
            (key, key + 1, *pools, slots),
            {"k_scale": scales[0], "v_scale": scales[1]},
        ),
        "write_kv latent": ((key, None, k_cache, None, slots), {}),
        "merge_states": ((out, lse, out + 1, lse), {}),
        "copy_blocks": ((caches, torch.tensor([[0, 2]], dtype=torch.int32)), {}),
        "gather_blocks": ((caches, ids), {}),
        "scatter_blocks": ((caches, ids, rows), {}),
    }


@pytest.mark.parametrize("name", operator_calls())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(name):
    arguments, options = operator_calls()[name]
    operator = getattr(torch.ops.rocmforge, name.partition(" ")[0]).default
    done = torch.library.opcheck(operator, arguments, options)
    assert set(done.values()) == {"SUCCESS"}


def step(query, key, k_cache, v_cache, slots, table, lens, scale):
    """A layer: projection, write, attention of two parts, merge."""
    rt.write_kv(key * 2, key + 1, k_cache, v_cache, slots, k_scale=scale, v_scale=scale)
    options = {"k_scale": scale, "v_scale": scale, "return_lse": True}
    near = rt.paged_attention(query * 2, k_cache, v_cache, table, lens, **options, sinks=lens * 1.0)
    far = rt.paged_attention(
        query, k_cache, v_cache, table, lens, out=torch.empty_like(query), causal=False, **options
    )
    out, lse = rt.merge_states(*near, *far)
    rt.copy_blocks([k_cache, v_cache], table[:1, :2].contiguous())
    rows = rt.gather_blocks([k_cache, v_cache], table[0])
    rt.scatter_blocks([k_cache, v_cache], table[0], rows)
    return out + 1, lse.exp(), rows.sum()


def assert_same_step(other_step, dtype, num_seqs):
    """`step` and another form of it give the same results and leave the same in the cache."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_seqs, num_seqs, 16, generator=generator)
    key = torch.randn(num_seqs, 1, 16, generator=generator)
    table = torch.randperm(2 * num_seqs, generator=generator, dtype=torch.int32).view(-1, 2)
    lens = torch.arange(num_seqs, dtype=torch.int32) + 1
    slots = table[:, 0].long() * 4 + lens - 1
    scale = None if dtype == FLOAT32 else 0.05
    kind = tensor(np.empty(0, dtype)).dtype
    caches = [[torch.zeros(2 * num_seqs, 1, 4, 16, dtype=kind) for _ in "kv"] for _ in "ab"]
    want = step(query, key, *caches[0], slots, table, lens, scale)
    got = other_step(query, key, *caches[1], slots, table, lens, scale)
    for a, b in zip([*want, *caches[0]], [*got, *caches[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert caches[1][0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [FLOAT32, INT8], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_is_whole(dtype, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_seqs in (3, 4):
        assert_same_step(compiled, dtype, num_seqs)


@pytest.mark.parametrize("dtype", [FLOAT32, INT8], ids=str)
def test_subclasses_of_tensors_go_through_the_operators(dtype):
    """A parameter, as any tensor that is more than its memory, is PyTorch's to take apart."""

    def step_of_parameters(*arguments):
        return step(
            *(
                torch.nn.Parameter(x, requires_grad=False) if isinstance(x, torch.Tensor) else x
                for x in arguments
            )
        )

    assert_same_step(step_of_parameters, dtype, 3)


def test_graphs_have_no_stream_and_no_workspace():
    torch._dynamo.reset()
    problem = tensors(problem_of(FLOAT32))
    compiled = torch.compile(rt.paged_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="stream must be None in a compiled graph"):
        problem.call(compiled, stream=0)


def wanting(tensor):
    """The same, of which a gradient is wanted."""
    return tensor.clone().requires_grad_()


def calls_with_gradients():
    """By function: the argument that requires a gradient, and the call's arguments."""
    problem = tensors(problem_of(FLOAT32))
    query, k_cache, v_cache = problem.query, problem.k_cache, problem.v_cache
    rest = (problem.block_table, problem.seq_lens, problem.cu_seqlens_q)
    key, lse, pool = torch.randn(3, 2, 8), torch.randn(3, 2), torch.zeros(4, 2, 4, 8)
    slots, ids = torch.tensor([0, 9, 4]), torch.tensor([1, 0], dtype=torch.int32)
    rows = torch.zeros(2, 256, dtype=torch.uint8)
    sinks = torch.nn.Parameter(torch.zeros(6))
    return [
        ("paged_attention", "query", (wanting(query), k_cache, v_cache, *rest), {}),
        ("paged_attention", "v_cache", (query, k_cache, wanting(v_cache), *rest), {}),
        ("paged_attention", "sinks", (query, k_cache, v_cache, *rest), {"sinks": sinks}),
        ("paged_attention", "sinks", (query, k_cache, v_cache, *rest), {"sinks": wanting(sinks)}),
        ("write_kv", "value", (key, wanting(key), pool, pool.clone(), slots), {}),
        ("write_kv", "k_cache", (key, key, wanting(pool), pool, slots), {}),
        ("merge_states", "out_b", (key, lse, wanting(key), lse), {}),
        ("copy_blocks", "caches", ([pool, wanting(pool)], ids[None]), {}),
        ("gather_blocks", "caches", ([pool, wanting(pool)], ids), {}),
        ("scatter_blocks", "caches", ([wanting(pool)], ids, rows), {}),
        ("calibrate", "key", (wanting(key), key, "int8"), {}),
    ]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("module", [rt, torch.ops.rocmforge], ids=["eager", "operator"])
@pytest.mark.parametrize(("name", "argument", "arguments", "options"), calls_with_gradients())
def test_a_gradient_is_refused_not_forgotten(name, argument, arguments, options, module, off):
    if not hasattr(module, name):
        pytest.skip("no operator")
    function = getattr(module, name)
    with pytest.raises(RuntimeError, match=rf"^{argument} requires a gradient, .*no_grad\(\)"):
        function(*arguments, **options)
    with off():  # as models for inference are called, whose parameters still say that they do
        function(*arguments, **options)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_without_gradients_parameters_are_tensors(kind, off):
    problem = tensors(problem_of(FLOAT32))
    sinks = torch.linspace(-1, 1, 6)
    want = problem.call(rt.paged_attention, sinks=sinks)
    wrap = torch.nn.Parameter if kind == "parameter" else lambda x: x.clone().requires_grad_()
    with off():
        got = problem.but(query=wrap(problem.query), k_cache=wrap(problem.k_cache)).call(
            rt.paged_attention, sinks=wrap(sinks)
        )
    assert type(got) is torch.Tensor
    np.testing.assert_array_equal(got.numpy(), want.numpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_for_training_is_refused():
    torch._dynamo.reset()
    problem = tensors(problem_of(FLOAT32))
    query = problem.query.clone().requires_grad_()
    compiled = torch.compile(
        lambda query: problem.but(query=query * 2).call(rt.paged_attention).sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match="query requires a gradient, and rocmforge computes none"):
        compiled(query)
    with torch.no_grad():
        compiled(query)


def test_work_goes_to_the_current_stream(monkeypatch):
    """Of tensors on a GPU; tests/test_torch_rocm.py has a device. These are in host memory."""
    asked = []

    def current_stream(device):
        asked.append(device)
        return SimpleNamespace(cuda_stream=1234)

    calls = operator_calls()
    assert rt.stream_of(torch.zeros(1)) is None
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    assert rt.stream_of(torch.zeros(1)) == 1234
    for name, (arguments, options) in calls.items():
        for module in (torch.ops.rocmforge, rt):
            if module is rt and (options or name in ("paged_attention_out", "write_kv quantised")):
                continue
            asked.clear()
            function = getattr(module, name.partition(" ")[0])
            with pytest.raises(ValueError, match="stream must be None for arrays in host"):
                function(*arguments, **options)
            assert asked == [torch.device("cpu")]
    asked.clear()
    with pytest.raises(ValueError, match="stream must be None for arrays in host memory, got str"):
        tensors(problem_of(FLOAT32)).call(rt.paged_attention, stream="mine")
    assert not asked


def test_fake_tensors_say_what_would_come():
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = tensors(problem_of(BFLOAT16, FLOAT8))
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value)
            for name, value in vars(problem).items()
            if isinstance(value, torch.Tensor)
        }
        out, lse = problem.but(**fake).call(rt.paged_attention, return_lse=True)
    assert (out.shape, out.dtype) == ((8, 6, 40), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((8, 6), torch.float32)


def test_rocmforge_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, rocmforge, rocmforge.integrations; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
