"""Speculative decoding: slots for a draft's guesses, and back to where the target disagreed.

python examples/speculative_decoding.py
"""

import numpy as np

from rocmforge import KVCacheManager

NUM_GUESSES = 4
rng = np.random.default_rng(1)
prompt = rng.integers(0, 32_000, 30, dtype=np.int32)

manager = KVCacheManager(num_blocks=32, block_size=8)
manager.add_sequence(0, prompt)
manager.commit(manager.append([0], len(prompt)))
text = [*prompt.tolist(), 17]  # the last token was sampled, its key is not in the cache yet

for step in range(6):
    start = manager.seq_len(0)
    guesses = rng.integers(0, 32_000, NUM_GUESSES).tolist()
    # One step of the target computes the sampled token and all guesses.
    batch = manager.append([0], 1 + NUM_GUESSES)
    accepted = int(rng.integers(0, NUM_GUESSES + 1))  # what the target would say
    manager.truncate(0, start)  # the batch is stale: nothing of it can be found by others
    tokens = [text[-1], *guesses[:accepted]]
    # The same slots again, this time for the tokens that stay.
    kept = manager.append([0], len(tokens), token_ids=tokens, out=None)
    assert kept.slot_mapping.tolist() == batch.slot_mapping[: len(tokens)].tolist()
    manager.commit(kept)
    text += [*guesses[:accepted], int(rng.integers(0, 32_000))]
    blocks = len(manager.page_table.block_ids(0))
    print(
        f"step {step}: {accepted} of {NUM_GUESSES} accepted, {manager.seq_len(0)} tokens in "
        f"{blocks} blocks"
    )

found = manager.match_prefix(text)
print(f"another request with this text would find {found} of its {len(text)} tokens")
