"""What a cache says about itself."""

from dataclasses import dataclass

__all__ = ["CacheStats"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The state of a cache at one moment; blocks are those of all layer groups together."""

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
