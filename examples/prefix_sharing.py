"""Two tenants whose prompts begin with the same system prompt: shared within each, never between.

python examples/prefix_sharing.py
"""

import numpy as np

from rocmforge import KVCacheManager

rng = np.random.default_rng(0)
system = rng.integers(0, 32_000, 256, dtype=np.int32)
manager = KVCacheManager(num_blocks=64, block_size=16)


def serve(sequence_id: int, tenant: str) -> None:
    """Admit one request, compute what is not cached, and end it."""
    prompt = np.concatenate([system, rng.integers(0, 32_000, 20, dtype=np.int32)])
    found = manager.add_sequence(sequence_id, prompt, salt=tenant)
    batch = manager.append([sequence_id], len(prompt) - found)
    # ... the model writes keys and values to batch.slot_mapping ...
    manager.commit(batch)  # only now can others find them
    print(f"{tenant}: request {sequence_id} found {found:3} tokens, computed {batch.num_tokens:3}")
    manager.free(sequence_id)  # its full blocks stay cached while there is room


for sequence_id, tenant in enumerate(["alice", "alice", "bob", "alice", "bob"]):
    serve(sequence_id, tenant)

print("asked before admission:", manager.match_prefix([*system, 1], salt="bob"), "tokens")
print("without a salt:", manager.match_prefix([*system, 1]), "tokens")

manager.pin(system, salt="alice")  # nothing evicts alice's system prompt from here on
manager.add_sequence(99)
manager.append([99], manager.num_free_blocks * 16)  # a long request takes all other blocks
for tenant in ("alice", "bob"):
    print(f"after a long request, {tenant} finds", manager.match_prefix([*system, 1], salt=tenant))
