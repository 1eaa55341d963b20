"""A model of full and sliding-window layers: two groups of blocks, one manager.

python examples/sliding_window.py
"""

import numpy as np

from rocmforge import KVCacheManager, LayerGroup

manager = KVCacheManager(
    groups=[LayerGroup(num_blocks=256), LayerGroup(num_blocks=32, window=64)], block_size=16
)
prompt = np.random.default_rng(3).integers(0, 32_000, 1000, dtype=np.int32)


def held(group: int) -> int:
    """Blocks that sequence 0 holds in a group."""
    return int((manager.groups[group].page_table.block_ids(0) >= 0).sum())


manager.add_sequence(0, prompt)
while (left := len(prompt) - manager.seq_len(0)) > 0:  # prefill in chunks
    batch = manager.append([0], min(left, 128))
    manager.commit(batch)  # the windowed group gives back what its window has passed
    if manager.seq_len(0) % 256 == 0 or left <= 128:
        print(
            f"{manager.seq_len(0):4} tokens: full layers hold {held(0):2} blocks, "
            f"windowed layers {held(1)}"
        )

full, windowed = batch.groups
print(
    "the last token's slot:",
    full.slot_mapping[-1],
    "in the full layers,",
    windowed.slot_mapping[-1],
    "in the windowed ones",
)

manager.free(0)
# A hit needs all blocks in the full group, but only the last window's in the other.
print("the same prompt again finds", manager.add_sequence(1, prompt), "of", len(prompt), "tokens")
print(
    "a prompt that leaves it after 300 finds",
    manager.match_prefix(prompt[:300]),
    "tokens: its window is gone",
)
