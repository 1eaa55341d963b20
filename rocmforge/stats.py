"""What a cache says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CacheStats", "Distribution"]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Some numbers in short; of none, all are zero."""

    count: int
    mean: float
    min: int
    p50: int
    """Half of the numbers are at most this; it is one of them, as are the other percentiles."""
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, numbers: npt.NDArray[np.integer[Any]]) -> Distribution:
        """Summarise integers ``[n]``."""
        n = len(numbers)
        if n == 0:
            return cls(0, 0.0, 0, 0, 0, 0, 0)
        ranks = [0, *(-(-n * percent // 100) - 1 for percent in (50, 90, 99)), n - 1]
        ordered = np.partition(numbers, ranks)
        return cls(n, float(numbers.mean()), *(int(ordered[rank]) for rank in ranks))


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The state of a cache at one moment; blocks are those of all layer groups together.

    The counts of what happened (`prompt_tokens` to `copied_blocks`) go on for the cache's life.
    """

    block_size: int
    """Tokens a block."""
    num_blocks: int
    """Size of the pool."""
    used_blocks: int
    """Blocks that a sequence holds; a shared one counts once."""
    free_blocks: int
    """Blocks that an allocation can have, the cached ones included."""
    cached_blocks: int
    """Free blocks whose contents are kept for sequences that begin with the same tokens."""
    pinned_blocks: int
    """Used blocks that a pin holds."""
    shared_blocks: int
    """Used blocks that more than one sequence holds."""
    references: int
    """Blocks of all sequences together; a shared one counts for each."""
    num_sequences: int
    num_tokens: int
    """Lengths of all sequences together."""
    num_slots: int
    """Tokens that the blocks of those lengths could hold."""
    prompt_tokens: int
    """Tokens that `add_sequence` was given so far."""
    hit_tokens: int
    """Of those, the ones whose keys and values it found."""
    evictions: int
    """Cached blocks whose contents were given up for others, so far."""
    copied_blocks: int
    """Shared blocks that were copied before a write, so far."""
    sequence_lengths: Distribution
    """Tokens of each sequence."""
    cached_block_ages: Distribution
    """How long ago the cached blocks were last used, in calls that took or gave blocks.

    The cache knows no time. In seconds, a block stays cached for `cached_blocks` divided by the
    evictions a second, on average.
    """

    @property
    def hit_rate(self) -> float:
        """Prompt tokens found, as a fraction of all so far."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def utilization(self) -> float:
        """Used blocks as a fraction of the pool."""
        return self.used_blocks / self.num_blocks if self.num_blocks else 0.0

    @property
    def internal_fragmentation(self) -> float:
        """Slots of the sequences' blocks that hold no token, as a fraction of those slots."""
        return 1.0 - self.num_tokens / self.num_slots if self.num_slots else 0.0

    @property
    def blocks_saved(self) -> int:
        """Blocks that sharing saves: what the sequences would hold alone, less what they hold."""
        return self.references - self.used_blocks
