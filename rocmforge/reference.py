"""What each operation computes, in float64 NumPy, one token at a time.

Written to be read and to be compared with: no speed, no tricks, no validation, no import but NumPy.
Arguments mean what they mean in :mod:`rocmforge.ops`; results are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "calibrate",
    "copy_blocks",
    "dequantise",
    "gather_blocks",
    "merge_states",
    "paged_attention",
    "quantise",
    "scatter_blocks",
    "softmax",
    "token_scales",
    "write_kv",
]

Array = npt.NDArray[Any]
Scale = float | Array | None

#: The largest element of each 8-bit type.
LARGEST = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 240.0, "int8": 127.0}

# The smallest scale: the smallest normal float32, so that its reciprocal is finite.
SMALLEST_SCALE = np.float32(2.0**-126)


def _head_first(cache: Array, layout: str) -> Array:
    """View a cache as [num_blocks, num_kv_heads, block_size, head_dim]."""
    return cache if layout == "HND" else cache.swapaxes(1, 2)


# ---------------------------------------------------------------- attention


def softmax(logits: Array, sinks: Array | None = None) -> tuple[Array, Array]:
    """Softmax over the last axis, with a sink per row that takes part in the sum alone.

    Returns
    -------
    weights : numpy.ndarray, of the shape of logits
        All zero in a row where nothing is visible: no logit, or -inf alone.
    lse : numpy.ndarray, without the last axis
        Logarithm of the sum, sink included; -inf where there is nothing to add up.
    """
    if sinks is None:
        sinks = np.full(logits.shape[:-1], -np.inf)
    top = np.maximum(logits.max(axis=-1, initial=-np.inf), sinks)
    shift = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(logits - shift[..., None])
    total = weights.sum(axis=-1) + np.exp(sinks - shift)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + shift
    return weights / np.where(total == 0, 1.0, total)[..., None], lse


def paged_attention(
    query: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array | None = None,
    *,
    rows: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    mask: Array | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    layout: str = "HND",
    return_lse: bool = False,
) -> Any:
    """Attention of query tokens to the paged context of their sequences, in float64.

    Returns
    -------
    out : numpy.ndarray, float64 [num_tokens, num_heads, v_head_dim]
        Zeros for a token that sees nothing or belongs to no sequence.
    lse : numpy.ndarray, float64 [num_tokens, num_heads]
        With ``return_lse``: the logarithm of the softmax's denominator.
    """
    k_cache, v_cache = _head_first(k_cache, layout), _head_first(v_cache, layout)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    if scale is None:
        scale = 1.0 / np.sqrt(head_dim)
    if v_scale is None:  # a latent cache, whose values are elements of its keys; or no scales
        v_scale = k_scale
    out = np.zeros((num_tokens, num_heads, v_cache.shape[3]))
    lse = np.full((num_tokens, num_heads), -np.inf)
    for sequence, length in enumerate(seq_lens.tolist()):
        row = sequence if rows is None else int(rows[sequence])
        if cu_seqlens_q is None:
            start, stop = sequence, sequence + 1
        else:
            start, stop = int(cu_seqlens_q[sequence]), int(cu_seqlens_q[sequence + 1])
        first = length - (stop - start)  # position of the first new token: the last is the last
        # The context's positions that have a block, and the keys and values in their slots.
        positions = np.arange(length)
        blocks = block_table[row, positions // block_size]
        positions, blocks = positions[blocks >= 0], blocks[blocks >= 0]
        keys = dequantise(k_cache, k_scale, blocks, positions % block_size)
        values = dequantise(v_cache, v_scale, blocks, positions % block_size)
        for token in range(start, stop):
            own = first + token - start
            distance = positions - own
            visible = np.ones(len(positions), bool)
            if causal:
                visible &= distance <= 0
            if window_size[0] >= 0:
                visible &= distance >= -window_size[0]
            if window_size[1] >= 0:
                visible &= distance <= window_size[1]
            if mask is not None:
                new = positions >= first
                visible[new] &= mask[token, positions[new] - first] != 0
            for kv_head in range(num_kv_heads):
                heads = slice(kv_head * group, (kv_head + 1) * group)
                logits = query[token, heads].astype(np.float64) @ keys[visible, kv_head].T
                logits = logits * scale
                if softcap > 0:
                    logits = softcap * np.tanh(logits / softcap)
                if alibi_slopes is not None:
                    logits = logits + alibi_slopes[heads, None] * distance[visible]
                head_sinks = None if sinks is None else sinks[heads].astype(np.float64)
                weights, lse[token, heads] = softmax(logits, head_sinks)
                out[token, heads] = weights @ values[visible, kv_head]
    return (out, lse) if return_lse else out


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Attention over the keys of two parts, from the result over each.

    Returns
    -------
    out : numpy.ndarray, float64 [num_tokens, num_heads, v_head_dim]
        Zeros where neither part saw a key.
    lse : numpy.ndarray, float64 [num_tokens, num_heads]
    """
    lse_a, lse_b = lse_a.astype(np.float64), lse_b.astype(np.float64)
    lse = np.logaddexp(lse_a, lse_b)
    out = np.zeros(out_a.shape)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        seen = ~np.isneginf(part_lse)  # else what the part's out holds is not read
        weights = np.exp(part_lse[seen] - lse[seen])
        out[seen] += weights[:, None] * part[seen].astype(np.float64)
    return out, lse


# ---------------------------------------------------------------- 8-bit elements


def dequantise(cache: Array, scale: Scale, blocks: Array, offsets: Array) -> Array:
    """Read vectors of a cache [num_blocks, num_kv_heads, block_size, dim]: element times scale.

    Parameters
    ----------
    scale : float, array [num_kv_heads], array [num_blocks, num_kv_heads, block_size], or None
    blocks, offsets : array [n]

    Returns
    -------
    numpy.ndarray, float64 [n, num_kv_heads, dim]
    """
    vectors = cache[blocks, :, offsets].astype(np.float64)
    if scale is None:
        return vectors
    factors = np.asarray(scale, np.float32).astype(np.float64)
    if factors.ndim == 3:
        factors = factors[blocks, :, offsets]
    result: Array = vectors * factors[..., None]
    return result


def quantise(x: Array, scale: Array, dtype: np.dtype[Any]) -> Array:
    """Give x / scale as elements of an 8-bit type: the nearest, ties to even, saturated.

    The products are float32, by the reciprocal of the scale, as the operations compute them. NaN
    stays NaN in float8 and is 0 in int8.
    """
    with np.errstate(all="ignore"):
        quotient = x.astype(np.float32) * (np.float32(1) / np.asarray(scale, np.float32))
        quotient = np.clip(quotient, -LARGEST[dtype.name], LARGEST[dtype.name])
        if dtype == np.int8:
            quotient = np.where(np.isnan(quotient), 0, np.rint(quotient))
        elements: Array = quotient.astype(dtype)
    return elements


def token_scales(x: Array, dtype: np.dtype[Any]) -> Array:
    """Scale of each vector along the last axis, that which makes its largest element fit.

    1 for a vector of zeros; NaN where an element is not finite, so that all of it reads as NaN.
    """
    x = x.astype(np.float32)
    top = np.abs(x).max(axis=-1)
    scale = np.maximum(top / np.float32(LARGEST[dtype.name]), SMALLEST_SCALE)
    scale[top == 0] = 1
    scale[~np.isfinite(x).all(axis=-1)] = np.nan
    result: Array = scale
    return result


def calibrate(key: Array, value: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Scale of each head, [num_kv_heads], that makes the largest element of all its tokens fit."""
    k_scale, v_scale = (
        token_scales(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1), dtype) for x in (key, value)
    )
    return k_scale, v_scale


# ---------------------------------------------------------------- writing and copying


def write_kv(
    key: Array,
    value: Array | None,
    k_cache: Array,
    v_cache: Array | None,
    slot_mapping: Array,
    *,
    k_scale: Scale = None,
    v_scale: Scale = None,
    layout: str = "HND",
) -> None:
    """Write each token's key and value into its slot, in place; a negative slot is skipped.

    An 8-bit cache gets elements divided by their scale. A scale of shape [num_blocks, num_kv_heads,
    block_size] is written as well: each token's own.
    """
    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        if new is None or cache is None:  # a latent cache has keys alone
            continue
        blocks = _head_first(cache, layout)
        block_size = blocks.shape[2]
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            block, offset = slot // block_size, slot % block_size
            vectors = new[token]
            if scale is not None:
                factor = np.asarray(scale, np.float32)
                if factor.ndim == 3:
                    factor[block, :, offset] = token_scales(vectors, cache.dtype)
                    factor = factor[block, :, offset]
                vectors = quantise(vectors, factor[..., None], cache.dtype)
            blocks[block, :, offset] = vectors


def _each(caches: Array | Sequence[Array]) -> Sequence[Array]:
    return [caches] if isinstance(caches, np.ndarray) else caches


def copy_blocks(caches: Array | Sequence[Array], copies: Array) -> None:
    """Copy block ``copies[i, 0]`` to block ``copies[i, 1]`` in each cache, in place."""
    for cache in _each(caches):
        for source, destination in copies.tolist():
            cache[destination] = cache[source]


def gather_blocks(caches: Array | Sequence[Array], block_ids: Array) -> Array:
    """Give the bytes of blocks: uint8 [n, bytes of a block in all caches], cache after cache."""
    rows = [
        np.concatenate(
            [
                np.ascontiguousarray(cache[block]).reshape(-1).view(np.uint8)
                for cache in _each(caches)
            ]
        )
        for block in block_ids.tolist()
    ]
    size = sum(cache[0].nbytes for cache in _each(caches))
    return np.stack(rows) if rows else np.zeros((0, size), np.uint8)


def scatter_blocks(caches: Array | Sequence[Array], block_ids: Array, data: Array) -> None:
    """Set blocks from the bytes that `gather_blocks` gave, in place."""
    for block, row in zip(block_ids.tolist(), data, strict=True):
        begin = 0
        for cache in _each(caches):
            end = begin + cache[block].nbytes
            cache[block] = row[begin:end].view(cache.dtype).reshape(cache.shape[1:])
            begin = end
