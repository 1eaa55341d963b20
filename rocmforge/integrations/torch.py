"""The operations on PyTorch tensors, in eager code and in graphs that ``torch.compile`` makes.

Called from eager code a function here is the one of the same name in `rocmforge.ops`, which reads
tensors where they are; it works on PyTorch's current stream and gives tensors back. While a graph
is traced, and for tensors that are more than their memory (parameters, fake tensors), it is an
operator of ``torch.ops.rocmforge`` instead, so that a graph stays whole. The operators can be
called by name too; they take no floats as scales, no workspace and no stream.

There are no gradients: while they are recorded, a tensor that requires one is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

try:
    import torch
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f"rocmforge.integrations.torch needs PyTorch: pip install 'rocmforge[torch]' ({_error})",
        name=_error.name,
    ) from _error
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from rocmforge import ops

__all__ = [
    "calibrate",
    "copy_blocks",
    "gather_blocks",
    "merge_states",
    "paged_attention",
    "scatter_blocks",
    "stream_of",
    "write_kv",
]

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = frozenset({Tensor})  # what is no more than its memory


# ---- eager code ----


def stream_of(tensor: Tensor) -> int | None:
    """PyTorch's current stream of a tensor's GPU, as `rocmforge.ops` takes it; None on the CPU."""
    if not tensor.is_cuda:  # so PyTorch calls AMD GPUs too
        return None
    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _call(
    function: Callable[..., Any],
    one: Tensor | None,
    arguments: Sequence[Any],
    options: dict[str, Any],
) -> Any:
    """Call a function of `rocmforge.ops` where its tensors are, and give tensors back."""
    if one is None or not one.is_cuda:
        return function(*arguments, **options)
    if options.get("stream") is None:
        options["stream"] = stream_of(one)
    return _as_tensors(function(*arguments, **options))


def _as_tensors(result: Any) -> Any:
    """What an operation on a GPU has made, as PyTorch's, without a copy."""
    if isinstance(result, tuple):
        return tuple(map(_as_tensors, result))
    known = result is None or isinstance(result, Tensor)
    return result if known else torch.from_dlpack(result)


def _look_at(
    names: Sequence[str], arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Tensor | None, bool]:
    """A tensor among a call's arguments, and whether all are no more than their memory.

    Raises for one that requires a gradient. Each call pays for this: plain tensors, which most
    arguments are, in as little Python as there can be.
    """
    recorded = is_grad_enabled()
    one: Tensor | None = None
    others: list[Tensor] = []
    for value in (*arguments, *options.values()):
        if type(value) is Tensor:
            if recorded and value.requires_grad:
                _refuse_gradient(value, names, arguments, options)
            one = value
        elif isinstance(value, (Tensor, list, tuple)):
            others += _tensors((value,))
    if not others:
        return one, True
    for tensor in others:
        if recorded and tensor.requires_grad:
            _refuse_gradient(tensor, names, arguments, options)
    return others[0], _PLAIN.issuperset(map(type, others))


def _refuse_gradient(
    tensor: Tensor, names: Sequence[str], arguments: Iterable[Any], options: Mapping[str, Any]
) -> None:
    given = {**dict(zip(names, arguments, strict=False)), **options}
    name = next(key for key, x in given.items() if any(t is tensor for t in _tensors([x])))
    raise RuntimeError(
        f"{name} requires a gradient, and rocmforge computes none: call in torch.no_grad() or "
        f"torch.inference_mode(), or pass {name}.detach()"
    )


def _operation(direct: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """In eager code the function of `rocmforge.ops`, in a graph the one below."""

    def decorate(in_graph: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(in_graph).parameters)

        @functools.wraps(in_graph)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            one, plain = _look_at(names, arguments, options)
            if is_compiling() or not plain:
                return in_graph(*arguments, **options)
            result: R = _call(direct, one, arguments, options)
            return result

        return call

    return decorate


@_operation(ops.calibrate)
def calibrate(
    key: Tensor, value: Tensor | None, dtype: Any, *, stream: Any = None
) -> tuple[Tensor, Tensor | None]:
    """`rocmforge.ops.calibrate` on tensors, of which no graph is made."""
    scales: tuple[Tensor, Tensor | None] = ops.calibrate(
        _plain(key), _plain(value), dtype, stream=stream
    )
    return scales


@_operation(ops.paged_attention)
def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    max_seqlen_q: int | None = None,
    max_seq_len: int | None = None,
    num_splits: int | None = None,
    deterministic: bool = True,
    layout: str = "HND",
    out: Tensor | None = None,
    return_lse: bool = False,
    workspace: Tensor | None = None,
    stream: Any = None,
) -> Any:
    """`rocmforge.ops.paged_attention` on tensors.

    `workspace` and `stream` have no place in a compiled graph, whose memory and order are
    PyTorch's; in eager code no `stream` is PyTorch's current one.
    """
    _no_stream(workspace, stream)
    heads = _kv_heads(k_cache, layout)
    arguments = (query, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
    options = {
        "rows": rows,
        "scale": scale,
        "causal": causal,
        "window_left": window_size[0],
        "window_right": window_size[1],
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "mask": mask,
        "k_scale": _head_scales(k_scale, heads, query),
        "v_scale": _head_scales(v_scale, heads, query),
        "max_seqlen_q": max_seqlen_q,
        "max_seq_len": max_seq_len,
        "num_splits": num_splits,
        "deterministic": deterministic,
        "layout": layout,
    }
    if out is None:
        out, lse = torch.ops.rocmforge.paged_attention(*arguments, **options)
    else:
        lse = torch.ops.rocmforge.paged_attention_out(out, *arguments, **options)
    return (out, lse) if return_lse else out


@_operation(ops.write_kv)
def write_kv(
    key: Tensor,
    value: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    layout: str = "HND",
    stream: Any = None,
) -> None:
    """`rocmforge.ops.write_kv` on tensors; ``stream`` as in `paged_attention`."""
    _no_stream(None, stream)
    heads = _kv_heads(k_cache, layout)
    scales = {
        "k_scale": _head_scales(k_scale, heads, key),
        "v_scale": _head_scales(v_scale, heads, key),
    }
    torch.ops.rocmforge.write_kv(
        key, value, k_cache, v_cache, slot_mapping, **scales, layout=layout
    )


@_operation(ops.merge_states)
def merge_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    stream: Any = None,
) -> tuple[Tensor, Tensor]:
    """`rocmforge.ops.merge_states` on tensors; ``stream`` as in `paged_attention`."""
    _no_stream(None, stream)
    made, made_lse = torch.ops.rocmforge.merge_states(out_a, lse_a, out_b, lse_b)
    # in a graph the parts may be the results too: PyTorch sees a copy, and may leave it out
    return (
        made if out is None else out.copy_(made),
        made_lse if lse is None else lse.copy_(made_lse),
    )


@_operation(ops.copy_blocks)
def copy_blocks(caches: Any, copies: Tensor, *, stream: Any = None) -> None:
    """`rocmforge.ops.copy_blocks` on tensors; ``stream`` as in `paged_attention`."""
    _no_stream(None, stream)
    torch.ops.rocmforge.copy_blocks(_sequence(caches), copies)


@_operation(ops.gather_blocks)
def gather_blocks(
    caches: Any, block_ids: Tensor, out: Tensor | None = None, *, stream: Any = None
) -> Tensor:
    """`rocmforge.ops.gather_blocks` on tensors; ``stream`` as in `paged_attention`."""
    _no_stream(None, stream)
    rows: Tensor = torch.ops.rocmforge.gather_blocks(_sequence(caches), block_ids)
    return rows if out is None else out.copy_(rows)


@_operation(ops.scatter_blocks)
def scatter_blocks(caches: Any, block_ids: Tensor, data: Tensor, *, stream: Any = None) -> None:
    """`rocmforge.ops.scatter_blocks` on tensors; ``stream`` as in `paged_attention`."""
    _no_stream(None, stream)
    torch.ops.rocmforge.scatter_blocks(_sequence(caches), block_ids, data)


# ---- arguments of the operators ----


def _sequence(caches: Any) -> list[Any]:
    return list(caches) if isinstance(caches, (list, tuple)) else [caches]


def _kv_heads(k_cache: Tensor, layout: str) -> int:
    heads: int = k_cache.shape[1 if layout == "HND" else 2]
    return heads


def _head_scales(scale: Tensor | float | None, heads: int, like: Tensor) -> Tensor | None:
    """A scale as the operators take it: a float as one for each head."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    return torch.full((heads,), scale, dtype=torch.float32, device=like.device)


def _no_stream(workspace: object, stream: object) -> None:
    if workspace is not None or stream is not None:
        name = "stream" if workspace is None else "workspace"
        raise ValueError(f"{name} must be None in a compiled graph: it is PyTorch's to choose")


# ---- the operators ----
# By torch.library's functions, not its decorator, whose checks would be made again at each call.

_library = torch.library.Library("rocmforge", "DEF")

_ATTENTION = (
    "Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor? cu_seqlens_q=None, *, Tensor? rows=None, float? scale=None, bool causal=True, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? mask=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seq_len=None, int? num_splits=None, "
    'bool deterministic=True, str layout="HND"'
)


def _plain(value: Any) -> Any:
    """Parameters as tensors, whose results are tensors: those of a parameter would be arrays."""
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return value.detach() if isinstance(value, Tensor) and type(value) is not Tensor else value


def _attend(
    *arrays: Any, window_left: int = -1, window_right: int = -1, **options: Any
) -> tuple[Tensor, Tensor]:
    window = (window_left, window_right)
    result: tuple[Tensor, Tensor] = ops.paged_attention(
        *arrays, window_size=window, return_lse=True, **options
    )
    return result


def _attend_into(out: Tensor, *arrays: Any, **options: Any) -> Tensor:
    return _attend(*arrays, out=out, **options)[1]


# ---- what their results look like, for tensors that have no memory ----


def _fake_lse(query: Tensor) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1]), dtype=torch.float32)


def _fake_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], v_cache.shape[3])
    return query.new_empty(shape), _fake_lse(query)


def _fake_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    # C order, whatever order the parts have
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _fake_rows(caches: list[Tensor], block_ids: Tensor) -> Tensor:
    width = sum(cache[0].numel() * cache.element_size() for cache in caches)
    return caches[0].new_empty((block_ids.shape[0], width), dtype=torch.uint8)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One implementation for all devices: the tensors say where they are."""

    def run(*arguments: Any, **options: Any) -> Any:
        one, plain = _look_at(names, arguments, options)
        if not plain:
            arguments = tuple(map(_plain, arguments))
            options = {key: _plain(value) for key, value in options.items()}
        return _call(function, one, arguments, options)

    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rocmforge::{name}", fake, lib=_library)
    operator = getattr(torch.ops.rocmforge, name).default
    names = [argument.name for argument in operator._schema.arguments]


_define(f"paged_attention({_ATTENTION}) -> (Tensor, Tensor)", _attend, _fake_attention)
_define(
    f"paged_attention_out(Tensor(a!) out, {_ATTENTION}) -> Tensor",
    _attend_into,
    lambda out, query, *_, **__: _fake_lse(query),
)
_define(
    "write_kv(Tensor key, Tensor? value, Tensor(a!) k_cache, Tensor(b!)? v_cache, "
    "Tensor slot_mapping, *, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, "
    'str layout="HND") -> ()',
    ops.write_kv,
    _nothing,
)
_define(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    ops.merge_states,
    _fake_merge,
)
_define("copy_blocks(Tensor(a!)[] caches, Tensor copies) -> ()", ops.copy_blocks, _nothing)
_define("gather_blocks(Tensor[] caches, Tensor block_ids) -> Tensor", ops.gather_blocks, _fake_rows)
_define(
    "scatter_blocks(Tensor(a!)[] caches, Tensor block_ids, Tensor data) -> ()",
    ops.scatter_blocks,
    _nothing,
)
