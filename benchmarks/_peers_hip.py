"""Decode attention of other libraries for ROCm: optional, where they can be imported.

A peer takes a problem of attention_hip.py and gives a function for each of its copies of keys and
values, which lie in the layout that the peer wants. Layouts and arguments are those of the
libraries' own tests, as read in 2026-11; none of this has run on a GPU yet.
"""

from collections.abc import Callable, Iterator
from typing import Any

from _peers import _tensor, torch, vllm_ops

try:
    import aiter
except ImportError:
    aiter = None

Runs = list[Callable[[], Any]]  # each gives the output, [sequences, heads, dim]
PARTITION = 256  # tokens of a split, in both libraries
PEERS = ("PyTorch", "vLLM", "AITER", "AITER assembly")


def _on_gpu(problem: Any) -> list[Any]:
    return [_tensor(a).to("cuda") for a in (problem.query, problem.table, problem.lens)]


def _caches(problem: Any, keys_of: Callable[[Any], Any], values_of: Callable[[Any], Any]) -> Any:
    """Copies of the keys and values in other layouts; ours is [blocks, heads, tokens, dim]."""
    for _ in range(problem.copies):
        keys, values = (_tensor(a).to("cuda") for a in (problem.keys, problem.values))
        yield keys_of(keys).contiguous(), values_of(values).contiguous()


def _keys_in_pieces(keys: Any) -> Any:
    """As [blocks, heads, dim / 8, tokens, 8]: 16 bytes of a token are neighbours."""
    return keys.unflatten(-1, (-1, 8)).transpose(2, 3)


def torch_gather(problem: Any) -> Runs:
    """Gather the blocks, then scaled_dot_product_attention."""
    query, table, _ = _on_gpu(problem)
    index = table.long()

    def attend(keys: Any, values: Any) -> Any:
        gathered = [
            cache[index].transpose(1, 2).flatten(2, 3)[:, :, : problem.context]
            for cache in (keys, values)
        ]
        rows = query.unsqueeze(2)
        out = torch.nn.functional.scaled_dot_product_attention(rows, *gathered, enable_gqa=True)
        return out.squeeze(2)

    same = [*_caches(problem, lambda x: x, lambda x: x)]
    return [lambda pair=pair: attend(*pair) for pair in same]


def _split_kernel(problem: Any, call: Callable[..., object], *starts: None) -> Runs:
    """The kernel that vLLM and AITER have in common, whose scratch memory the caller gives."""
    query, table, lens = _on_gpu(problem)
    sequences, heads, dim = query.shape
    splits = -(-problem.context // PARTITION)
    out = torch.empty_like(query)
    partial = torch.empty((sequences, heads, splits, dim), dtype=query.dtype, device="cuda")
    sums = torch.empty((sequences, heads, splits), dtype=torch.float32, device="cuda")
    maxima = torch.empty_like(sums)
    one = torch.ones((), dtype=torch.float32, device="cuda")

    def attend(keys: Any, values: Any) -> Any:
        call(
            *(out, sums, maxima, partial, query, keys, values, keys.shape[1], dim**-0.5, table),
            *(lens, *starts, problem.block_size, problem.context, None, "auto", one, one),
        )
        return out

    pairs = [*_caches(problem, _keys_in_pieces, lambda x: x.transpose(2, 3))]
    return [lambda pair=pair: attend(*pair) for pair in pairs]


def vllm_rocm(problem: Any) -> Runs:
    """The kernel of vLLM's ROCm backends; no variable number of query tokens."""
    return _split_kernel(problem, vllm_ops.paged_attention_rocm, None)


def aiter_hip(problem: Any) -> Runs:
    """AITER's kernel in HIP."""
    return _split_kernel(problem, aiter.paged_attention_rocm)


def aiter_assembly(problem: Any) -> Runs:
    """AITER's kernel in assembly."""
    query, table, lens = _on_gpu(problem)

    def attend(keys: Any, values: Any) -> Any:
        return aiter.pa_fwd_asm(query, keys, values, table, lens, table.stride(0))

    def values_in_pieces(values: Any) -> Any:  # [blocks, heads, tokens / 8, dim, 8]
        return values.unflatten(2, (-1, 8)).transpose(3, 4)

    pairs = [*_caches(problem, _keys_in_pieces, values_in_pieces)]
    return [lambda pair=pair: attend(*pair) for pair in pairs]


def peers(problem: Any, want: Any, stream: int) -> Iterator[tuple[str, Runs]]:
    """Every peer that is present, takes the problem, and gives what we give.

    While a peer is out, what PyTorch enqueues is enqueued on `stream`.
    """
    if torch is None or not torch.cuda.is_available():
        return
    makers: dict[str, Callable[[Any], Runs]] = {"PyTorch": torch_gather}
    if hasattr(vllm_ops, "paged_attention_rocm"):
        makers["vLLM"] = vllm_rocm
    if aiter:
        makers |= {"AITER": aiter_hip, "AITER assembly": aiter_assembly}
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        for name, make in makers.items():
            try:
                runs = make(problem)
                got = runs[0]().float().cpu()
            except (RuntimeError, TypeError, NotImplementedError) as error:
                print(f"{name} does not take {problem}: {str(error).splitlines()[0]}")
                continue
            if not torch.allclose(got, _tensor(want).float(), atol=2e-2, rtol=2e-2):
                raise SystemExit(f"{name} and we disagree about {problem}")
            yield name, runs
