"""Attention of other libraries over the same blocks: optional, where they can be imported.

A peer is made for a problem and gives a function of the block table, after its result was compared
with ours: a benchmark that times a wrong answer times nothing.
"""

import functools
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

Run = Callable[[np.ndarray], object]


def set_num_threads(threads: int) -> None:
    if torch:
        torch.set_num_threads(threads)


def _tensor(array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _compare(name: str, problem: Any, run: Run, result: Callable[[Any], Any]) -> Run:
    table = problem.table()
    problem.ours(table)
    got = result(run(table)).reshape(problem.query.shape)
    if not torch.allclose(got.float(), _tensor(problem.out).float(), atol=2e-2, rtol=2e-2):
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


def attention_peers(problem: Any) -> dict[str, Run]:
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
    return peers
