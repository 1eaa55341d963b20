"""The operations on PyTorch tensors, in eager code and in graphs that ``torch.compile`` makes.

Called from eager code a function here is the one of the same name in `rocmforge.ops`, which reads
tensors where they are and gives tensors back. While a graph is traced, for tensors that stand for
others (fake tensors) and for those that need a gradient it is an operator of
``torch.ops.rocmforge`` instead, so that a graph stays whole. The operators can be called by name
too; they take no floats as scales, no workspace and no stream.

There are no gradients: going back through a result is an error.
"""

from __future__ import annotations

from typing import Any

try:
    import torch
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f"rocmforge.integrations.torch needs PyTorch: pip install 'rocmforge[torch]' ({_error})",
        name=_error.name,
    ) from _error
from torch import Tensor

from rocmforge import ops

__all__ = [
    "calibrate",
    "copy_blocks",
    "gather_blocks",
    "merge_states",
    "paged_attention",
    "scatter_blocks",
    "write_kv",
]

calibrate = ops.calibrate


def _direct(tensor: Tensor) -> bool:
    """Whether its memory can be read here and now."""
    return type(tensor) is Tensor and not tensor.requires_grad and not torch.compiler.is_compiling()


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
    PyTorch's.
    """
    if _direct(query):
        return ops.paged_attention(
            query,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            cu_seqlens_q,
            rows=rows,
            scale=scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            mask=mask,
            k_scale=k_scale,
            v_scale=v_scale,
            max_seqlen_q=max_seqlen_q,
            max_seq_len=max_seq_len,
            num_splits=num_splits,
            deterministic=deterministic,
            layout=layout,
            out=out,
            return_lse=return_lse,
            workspace=workspace,
            stream=stream,
        )
    _no_stream(workspace, stream)
    heads = _kv_heads(k_cache, layout)
    arguments = (query, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, rows, scale, causal)
    options = (
        *(window_size[0], window_size[1], softcap, alibi_slopes, sinks, mask),
        *(_head_scales(k_scale, heads, query), _head_scales(v_scale, heads, query)),
        *(max_seqlen_q, max_seq_len, num_splits, deterministic, layout),
    )
    if out is None:
        out, lse = torch.ops.rocmforge.paged_attention(*arguments, *options)
    else:
        lse = torch.ops.rocmforge.paged_attention_out(out, *arguments, *options)
    return (out, lse) if return_lse else out


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
    if _direct(key):
        return ops.write_kv(
            key,
            value,
            k_cache,
            v_cache,
            slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
            layout=layout,
            stream=stream,
        )
    _no_stream(None, stream)
    heads = _kv_heads(k_cache, layout)
    k_scale, v_scale = _head_scales(k_scale, heads, key), _head_scales(v_scale, heads, key)
    torch.ops.rocmforge.write_kv(
        key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout
    )
    return None


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
    if _direct(out_a):
        merged: tuple[Tensor, Tensor] = ops.merge_states(
            out_a, lse_a, out_b, lse_b, out=out, lse=lse, stream=stream
        )
        return merged
    _no_stream(None, stream)
    made, made_lse = torch.ops.rocmforge.merge_states(out_a, lse_a, out_b, lse_b)
    # in a graph the parts may be the results too: PyTorch sees a copy, and may leave it out
    return (
        made if out is None else out.copy_(made),
        made_lse if lse is None else lse.copy_(made_lse),
    )


def copy_blocks(caches: Any, copies: Tensor, *, stream: Any = None) -> None:
    """`rocmforge.ops.copy_blocks` on tensors; ``stream`` as in `paged_attention`."""
    caches = _sequence(caches)
    if not caches or _direct(caches[0]):
        return ops.copy_blocks(caches, copies, stream=stream)
    _no_stream(None, stream)
    torch.ops.rocmforge.copy_blocks(caches, copies)
    return None


def gather_blocks(
    caches: Any, block_ids: Tensor, out: Tensor | None = None, *, stream: Any = None
) -> Tensor:
    """`rocmforge.ops.gather_blocks` on tensors; ``stream`` as in `paged_attention`."""
    caches = _sequence(caches)
    if not caches or _direct(caches[0]):
        rows: Tensor = ops.gather_blocks(caches, block_ids, out, stream=stream)
        return rows
    _no_stream(None, stream)
    rows = torch.ops.rocmforge.gather_blocks(caches, block_ids)
    return rows if out is None else out.copy_(rows)


def scatter_blocks(caches: Any, block_ids: Tensor, data: Tensor, *, stream: Any = None) -> None:
    """`rocmforge.ops.scatter_blocks` on tensors; ``stream`` as in `paged_attention`."""
    caches = _sequence(caches)
    if not caches or _direct(caches[0]):
        return ops.scatter_blocks(caches, block_ids, data, stream=stream)
    _no_stream(None, stream)
    torch.ops.rocmforge.scatter_blocks(caches, block_ids, data)
    return None


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
# What a result is like is detached: plain tensors give tensors, parameters would give arrays.

_library = torch.library.Library("rocmforge", "DEF")

_ATTENTION = (
    "Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor? cu_seqlens_q=None, Tensor? rows=None, float? scale=None, bool causal=True, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? mask=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seq_len=None, int? num_splits=None, "
    'bool deterministic=True, str layout="HND"'
)


def _attend(
    out: Tensor | None,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seq_len: int | None = None,
    num_splits: int | None = None,
    deterministic: bool = True,
    layout: str = "HND",
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = ops.paged_attention(
        query,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        rows=rows,
        scale=scale,
        causal=causal,
        window_size=(window_left, window_right),
        softcap=softcap,
        alibi_slopes=_plain(alibi_slopes),
        sinks=_plain(sinks),
        mask=mask,
        k_scale=k_scale,
        v_scale=v_scale,
        max_seqlen_q=max_seqlen_q,
        max_seq_len=max_seq_len,
        num_splits=num_splits,
        deterministic=deterministic,
        layout=layout,
        out=out,
        return_lse=True,
    )
    return result


def _plain(tensor: Tensor | None) -> Tensor | None:
    """A parameter of a model as a tensor."""
    return None if tensor is None else tensor.detach()


def _paged_attention(query: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _attend(None, query.detach(), *arguments, **options)


def _paged_attention_out(out: Tensor, query: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return _attend(out, query.detach(), *arguments, **options)[1]


def _write_kv(
    key: Tensor,
    value: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    layout: str = "HND",
) -> None:
    ops.write_kv(
        key.detach(),
        _plain(value),
        k_cache,
        v_cache,
        slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        layout=layout,
    )


def _merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    merged: tuple[Tensor, Tensor] = ops.merge_states(
        *(part.detach() for part in (out_a, lse_a, out_b, lse_b))
    )
    return merged


def _gather_blocks(caches: list[Tensor], block_ids: Tensor) -> Tensor:
    rows: Tensor = ops.gather_blocks([cache.detach() for cache in caches], block_ids)
    return rows


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


def _define(schema: str, function: Any, fake: Any) -> None:
    """One implementation for all devices: the tensors say where they are."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rocmforge::{name}", fake, lib=_library)


_define(f"paged_attention({_ATTENTION}) -> (Tensor, Tensor)", _paged_attention, _fake_attention)
_define(
    f"paged_attention_out(Tensor(a!) out, {_ATTENTION}) -> Tensor",
    _paged_attention_out,
    lambda out, query, *_, **__: _fake_lse(query),
)
_define(
    "write_kv(Tensor key, Tensor? value, Tensor(a!) k_cache, Tensor(b!)? v_cache, "
    "Tensor slot_mapping, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, "
    'str layout="HND") -> ()',
    _write_kv,
    _nothing,
)
_define(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    _merge_states,
    _fake_merge,
)
_define("copy_blocks(Tensor(a!)[] caches, Tensor copies) -> ()", ops.copy_blocks, _nothing)
_define("gather_blocks(Tensor[] caches, Tensor block_ids) -> Tensor", _gather_blocks, _fake_rows)
_define(
    "scatter_blocks(Tensor(a!)[] caches, Tensor block_ids, Tensor data) -> ()",
    ops.scatter_blocks,
    _nothing,
)


def _no_gradient(*_: Any) -> None:
    raise NotImplementedError("rocmforge computes no gradients: its operations are for inference")


for _name in ("paged_attention", "merge_states", "gather_blocks"):
    torch.library.register_autograd(f"rocmforge::{_name}", _no_gradient, lib=_library)
