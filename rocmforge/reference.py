"""What each operation computes, in float64 NumPy, one token at a time.

Written to be read and to be compared with: no speed, no tricks, no validation, no import but NumPy.
Arguments mean what they mean in :mod:`rocmforge.ops`; results are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["copy_blocks", "paged_attention", "softmax", "write_kv"]

Array = npt.NDArray[Any]


def _head_first(cache: Array, layout: str) -> Array:
    """View a cache as [num_blocks, num_kv_heads, block_size, head_dim]."""
    return cache if layout == "HND" else cache.swapaxes(1, 2)


def softmax(logits: Array) -> Array:
    """Softmax over the last axis; a row that is all -inf (nothing is visible) gives zeros."""
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    result: Array = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
    return result


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
    layout: str = "HND",
) -> Array:
    """Attention of query tokens to the paged context of their sequences, in float64.

    Returns
    -------
    numpy.ndarray, float64 [num_tokens, num_heads, v_head_dim]
        Zeros for a token that sees nothing or belongs to no sequence.
    """
    k_cache, v_cache = _head_first(k_cache, layout), _head_first(v_cache, layout)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    if scale is None:
        scale = 1.0 / np.sqrt(head_dim)
    out = np.zeros((num_tokens, num_heads, v_cache.shape[3]))
    for sequence, length in enumerate(seq_lens.tolist()):
        row = sequence if rows is None else int(rows[sequence])
        if cu_seqlens_q is None:
            start, stop = sequence, sequence + 1
        else:
            start, stop = int(cu_seqlens_q[sequence]), int(cu_seqlens_q[sequence + 1])
        # The context's positions that have a block, and the keys and values in their slots.
        positions = np.arange(length)
        blocks = block_table[row, positions // block_size]
        positions, blocks = positions[blocks >= 0], blocks[blocks >= 0]
        keys = k_cache[blocks, :, positions % block_size].astype(np.float64)
        values = v_cache[blocks, :, positions % block_size].astype(np.float64)
        for token in range(start, stop):
            own = length - stop + token  # the query token's own position: the last one is the last
            visible = positions <= own if causal else np.ones(len(positions), bool)
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                logits = scale * (keys[visible, kv_head] @ query[token, head].astype(np.float64))
                out[token, head] = softmax(logits) @ values[visible, kv_head]
    return out


def write_kv(
    key: Array,
    value: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    layout: str = "HND",
) -> None:
    """Write each token's key and value into its slot, in place; a negative slot is skipped."""
    k_cache, v_cache = _head_first(k_cache, layout), _head_first(v_cache, layout)
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = key[token]
            v_cache[slot // block_size, :, slot % block_size] = value[token]


def copy_blocks(caches: Array | Sequence[Array], copies: Array) -> None:
    """Copy block ``copies[i, 0]`` to block ``copies[i, 1]`` in each cache, in place."""
    for cache in [caches] if isinstance(caches, np.ndarray) else caches:
        for source, destination in copies.tolist():
            cache[destination] = cache[source]
