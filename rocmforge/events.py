"""What happens to cached blocks, in the shape of vLLM's events, for routers and other tiers.

Field names, their meaning and the block hashes are those of ``vllm/distributed/kv_events.py`` with
``sha256_cbor``, so that a subscriber written for vLLM reads them when they are encoded as it
expects. How they are sent is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "KVCacheEvent"]


@dataclass(slots=True)
class BlockStored:
    """Blocks, each behind the one before, can be found by others from now on."""

    block_hashes: list[bytes]
    """32 bytes a block, as `rocmforge.block_hashes.block_hashes` computes them."""
    parent_block_hash: bytes | None
    """Hash of the block before the first; None at the start of a sequence."""
    token_ids: list[int]
    """Tokens of all the blocks."""
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    """Not filled in: a salt is part of the hashes, and nobody else's business."""
    group_idx: int | None = None
    """The layer group."""


@dataclass(slots=True)
class BlockRemoved:
    """Blocks can no longer be found: they were evicted, or are written to."""

    block_hashes: list[bytes]
    medium: str | None = None
    group_idx: int | None = None


@dataclass(slots=True)
class AllBlocksCleared:
    """The prefix cache was reset."""


KVCacheEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared
