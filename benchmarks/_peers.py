"""Attention of other libraries over the same blocks: optional, where they can be imported.

A peer is made for a problem and gives a function of the block table, after its result was compared
with ours: a benchmark that times a wrong answer times nothing.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

try:
    import torch
except ImportError:
    torch = None
try:
    from vllm import _custom_ops as vllm_ops
except ImportError:
    vllm_ops = None
try:
    import openvino
except ImportError:
    openvino = None

# As in attention_cpu.py: gets a block table, and may return the seconds that count.
Run = Callable[[np.ndarray], object]


def set_num_threads(threads: int) -> None:
    """Of PyTorch, and so of vLLM; OpenVINO is told with each model."""
    if torch:
        torch.set_num_threads(threads)


def _tensor(array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(result: Any) -> np.ndarray:
    result = result.float().numpy() if torch and isinstance(result, torch.Tensor) else result
    return result.astype(np.float32)


def _compare(name: str, problem: Any, run: Run, result: Callable[[Any], Any]) -> Run:
    table = problem.table()
    problem.ours(table)
    got = _array(result(run(table))).reshape(problem.query.shape)
    if not np.allclose(got, problem.out.astype(np.float32), atol=2e-2, rtol=2e-2):
        raise SystemExit(f"{name} and we disagree")
    return run


def torch_attention(problem: Any, *, rows_as_tokens: bool) -> Run:
    """Gather the blocks, then scaled_dot_product_attention; plain, or the faster way for decode."""
    query, queries = _tensor(problem.query), problem.queries
    caches = [_tensor(cache) for cache in problem.pool.caches]
    heads, dim = problem.query.shape[1:]
    kv_heads = problem.pool.kv_heads
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = None
    if queries > 1:
        mask = torch.ones(queries, problem.context, dtype=torch.bool)
        mask = mask.tril(problem.context - queries)

    def run(table: np.ndarray) -> Any:
        index = torch.from_numpy(table).long()
        gathered = []
        for cache in caches:
            blocks = cache[index]  # [batch, blocks, heads, tokens, dim] in HND
            if problem.pool.layout == "HND":
                blocks = blocks.transpose(2, 3)
            flat = blocks.reshape(problem.batch, -1, kv_heads, dim)[:, : problem.context]
            gathered.append(flat.transpose(1, 2))
        if rows_as_tokens:  # the query heads of a key/value head as so many query tokens
            rows = query.view(problem.batch, kv_heads, heads // kv_heads, dim)
            return attend(rows, *gathered)
        rows = query.view(problem.batch, queries, heads, dim).transpose(1, 2)
        return attend(rows, *gathered, attn_mask=mask, enable_gqa=True)

    return _compare("PyTorch", problem, run, lambda x: x if rows_as_tokens else x.transpose(1, 2))


@functools.lru_cache(maxsize=1)
def _vllm_caches(pool: Any) -> Any:
    """A copy of a pool in vLLM's own layout, written by vLLM."""
    num_blocks, size, heads, dim = len(pool.order), pool.block_size, pool.kv_heads, pool.head_dim
    isa = "vec" if size % 32 == 0 else "vec16"
    if pool.dtype == ml_dtypes.bfloat16 and size % 32 == 0 and torch.cpu._is_amx_tile_supported():
        isa = "amx"
    dtype = _tensor(np.zeros(1, pool.dtype)).dtype
    shape = (num_blocks, heads, size, dim)
    copies = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    for start in range(0, num_blocks, 1024):
        blocks = [cache[start : start + 1024] for cache in pool.caches]
        if pool.layout == "HND":
            blocks = [block.swapaxes(1, 2) for block in blocks]
        tokens = [_tensor(np.ascontiguousarray(b)).view(-1, heads, dim) for b in blocks]
        slots = torch.arange(start * size, start * size + len(tokens[0]))
        vllm_ops.cpu_attn_reshape_and_cache(*tokens, *copies, slots, isa)
    return copies, isa, dtype


def vllm_attention(problem: Any) -> Run:
    """Attention of vLLM on the CPU, planned once as its engine does for all layers of a step."""
    caches, isa, dtype = _vllm_caches(problem.pool)
    query, lens = _tensor(problem.query), torch.from_numpy(problem.lens)
    heads, dim = problem.query.shape[1:]
    out = torch.empty_like(query)
    starts = torch.arange(problem.batch + 1, dtype=torch.int32) * problem.queries
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        problem.batch, heads, problem.pool.kv_heads, dim, lens, dtype, starts, True, -1, isa, True
    )

    def run(table: np.ndarray) -> Any:
        blocks = torch.from_numpy(np.ascontiguousarray(table))
        vllm_ops.cpu_attention_with_kv_cache(
            query, *caches, out, starts, lens, dim**-0.5, True, None, -1, blocks, 0.0, plan, None
        )
        return out

    return _compare("vLLM", problem, run, lambda x: x)


def vllm_write(pool: Any, new: list[np.ndarray]) -> Callable[[np.ndarray], object]:
    """The write of vLLM; what it wrote its attention has read here, and so was compared."""
    caches, isa, _ = _vllm_caches(pool)
    tokens = [_tensor(x) for x in new]

    def run(slots: np.ndarray) -> Any:
        vllm_ops.cpu_attn_reshape_and_cache(*tokens, *caches, torch.from_numpy(slots), isa)

    return run


@functools.lru_cache(maxsize=1)
def _openvino_request(dtype: str, heads: int, kv_heads: int, dim: int, threads: int) -> Any:
    """OpenVINO's PagedAttention as a model of that operation alone, for blocks of 32 tokens.

    The operation is internal to its runtime and has another list of inputs in each of its releases
    (28 in 2026.4): the tensors by name, then what a scheduler may ask for and nobody does here.
    """
    op, kinds = openvino.op, openvino.Type
    kind, integer, real = (
        getattr(kinds, {"float32": "f32"}.get(dtype, "bf16")),
        kinds.i32,
        kinds.f32,
    )

    def tensor(name: str, kind: Any, *shape: int) -> Any:
        made = op.Parameter(kind, openvino.PartialShape(list(shape)))
        made.output(0).get_tensor().set_names({name})
        return made

    def value(kind: Any, shape: list[int], *numbers: float) -> Any:
        return op.Constant(kind, openvino.Shape(shape), list(numbers))

    new = [tensor("query", kind, -1, heads * dim)]
    new += [tensor(name, kind, -1, kv_heads * dim) for name in ("key", "value")]
    caches = [tensor(f"{name}_cache.0", kinds.dynamic, -1, kv_heads, 32, dim) for name in "kv"]
    batch = [
        tensor(name, integer, -1)
        for name in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
    ]
    longest = tensor("max_context_len", integer)
    scale_window_slopes = [value(real, [], dim**-0.5), value(integer, [], 0), value(real, [0])]
    scores_and_rotation = [*(value(integer, [0]) for _ in range(3)), value(real, [0])]
    sparse_attention = [value(real, [0]), value(integer, [], 64), value(integer, [], 8)]
    sinks = [value(kind, [0])]
    eviction = [value(integer, [], 0), *(value(integer, [0]) for _ in range(3))]
    tree = [value(integer, [0]), value(kinds.u8, [0]), value(integer, [0])]
    inputs = [*new, *caches, *batch, *scale_window_slopes, longest, *scores_and_rotation]
    inputs += [*sparse_attention, *sinks, *eviction, *tree]
    node = op._PagedAttentionExtension([x.output(0) for x in inputs])
    facts = {"num_k_heads": kv_heads, "k_head_size": dim}
    facts |= {"num_v_heads": kv_heads, "v_head_size": dim}
    for name, number in facts.items():
        node.get_rt_info()[name] = number
    precision = kind.get_type_name()
    compiled = openvino.Core().compile_model(
        openvino.Model([node.output(0)], [*new, *caches, *batch, longest]),
        "CPU",
        {
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
        },
    )
    return compiled.create_infer_request()


def openvino_attention(problem: Any, threads: int) -> Run:
    """OpenVINO's PagedAttention over our blocks themselves, whose last tokens it writes again."""
    pool, queries, size = problem.pool, problem.queries, problem.pool.block_size
    heads, dim = problem.query.shape[1:]
    request = _openvino_request(pool.dtype.name, heads, pool.kv_heads, dim, threads)
    starts = np.arange(problem.batch + 1, dtype=np.int32)
    new = np.arange(problem.context - queries, problem.context)

    held: dict[str, np.ndarray] = {}  # its tensors do not keep the memory that they are over

    def give(name: str, array: np.ndarray) -> None:
        held[name] = array
        if array.dtype == ml_dtypes.bfloat16:
            shape, kind = openvino.Shape(array.shape), openvino.Type.bf16
            tensor = openvino.Tensor(array.view(np.int16), shape, kind)
        else:
            tensor = openvino.Tensor(array, shared_memory=True)
        request.set_tensor(name, tensor)

    def run(table: np.ndarray) -> float:
        give("query", problem.query.reshape(len(problem.query), -1))
        for name, cache in zip(("key", "value"), pool.caches, strict=True):
            tokens = cache[table[:, new // size], :, new % size]  # [batch, queries, heads, dim]
            give(name, np.ascontiguousarray(tokens).reshape(len(problem.query), -1))
            give(f"{name[0]}_cache.0", cache)
        give("past_lens", problem.lens - np.int32(queries))
        give("subsequence_begins", starts * np.int32(queries))
        give("block_indices", np.ascontiguousarray(table).ravel())
        give("block_indices_begins", starts * np.int32(table.shape[1]))
        give("max_context_len", np.array(problem.context, np.int32))
        begin = time.perf_counter()
        request.infer()
        return time.perf_counter() - begin

    def result(_: Any) -> np.ndarray:
        return request.get_output_tensor(0).data.view(pool.dtype)

    return _compare("OpenVINO", problem, run, result)


def write_peers(pool: Any, new: list[np.ndarray]) -> dict[str, Callable[[np.ndarray], object]]:
    """Every peer that is present and takes the pool's type and blocks."""
    if vllm_ops and pool.dtype.itemsize > 1 and pool.block_size % 16 == 0:
        return {"vllm": vllm_write(pool, new)}
    return {}


def attention_peers(problem: Any, threads: int) -> dict[str, Run]:
    """Every peer that is present and takes the problem's type."""
    peers: dict[str, Run] = {}
    if problem.pool.dtype.itemsize == 1:
        return peers
    if torch:
        peers["torch"] = torch_attention(problem, rows_as_tokens=False)
        if problem.queries == 1:
            peers["torch rows"] = torch_attention(problem, rows_as_tokens=True)
    if vllm_ops and problem.pool.block_size % 16 == 0:
        peers["vllm"] = vllm_attention(problem)
    known = problem.pool.dtype.name in ("float32", "bfloat16")
    if openvino and known and problem.pool.block_size == 32 and problem.pool.layout == "HND":
        peers["openvino"] = openvino_attention(problem, threads)
    return peers
