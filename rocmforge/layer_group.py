"""How a model's layers share pools of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["LayerGroup"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share a pool of blocks and a block table.

    Full-attention layers and sliding-window layers of one model (Gemma 3, gpt-oss) are two groups:
    the second gives back the blocks that its window has passed. A `KVCacheManager` looks at the
    blocks and the window alone; the rest is for `KVCache`, where what is None is as its own
    argument of that name says.

    Raises
    ------
    ValueError
        By the cache that is made of it, if a number is out of its range.
    """

    num_blocks: int
    """Blocks of the group's pool."""
    window: int | None = None
    """Tokens that a query sees, itself included; None is all."""
    layers: Iterable[int] | None = None
    """Indices of the model's layers, such as ``range(5, 26, 6)``; needed with several groups."""
    num_kv_heads: int | None = None
    """Key/value heads of a layer."""
    head_dim: int | None = None
    """Elements of a key's head."""
    v_head_dim: int | None = None
    """Elements of a value's head."""
    latent_dim: int | None = None
    """Leading elements of a key that are the value: a latent cache, without values of its own."""
    dtype: Any = None
    """Type of the elements."""
