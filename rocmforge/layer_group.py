"""How a model's layers share pools of blocks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerGroup"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share a pool of blocks and a block table.

    Full-attention layers and sliding-window layers of one model (Gemma 3, gpt-oss) are two groups:
    the second gives back the blocks that its window has passed.

    Raises
    ------
    ValueError
        By the cache that is made of it, if a number is out of its range.
    """

    num_blocks: int
    """Blocks of the group's pool."""
    window: int | None = None
    """Tokens that a query sees, itself included; None is all."""
