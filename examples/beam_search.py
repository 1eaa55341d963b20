"""Beam search by fork and free: beams share all blocks but those where they differ.

python examples/beam_search.py
"""

import itertools

import numpy as np

from rocmforge import KVCacheManager

WIDTH, BLOCK_SIZE = 4, 16
rng = np.random.default_rng(2)
manager = KVCacheManager(num_blocks=128, block_size=BLOCK_SIZE)
fresh = itertools.count()

first = next(fresh)
manager.add_sequence(first, rng.integers(0, 32_000, 200, dtype=np.int32))
manager.commit(manager.append([first], 200))
beams, scores = [first], np.zeros(1)
num_copies = 0

for _ in range(40):
    # Two candidates a beam, and the best of all go on.
    candidates = (scores[:, None] + np.log(rng.random((len(beams), 2)))).ravel()
    best = np.argsort(candidates)[::-1][:WIDTH]
    children = []
    for candidate in best:
        children.append(next(fresh))
        manager.fork(beams[candidate // 2], children[-1])
    manager.free(beams)  # what no child shares is free again
    beams, scores = children, candidates[best]
    batch = manager.append(beams, 1)
    num_copies += len(batch.copies)  # one copy_blocks call does them before anything is written
    manager.commit(batch)

length = manager.seq_len(beams[0])
stats = manager.stats()
alone = WIDTH * -(-length // BLOCK_SIZE)
print(f"{WIDTH} beams of {length} tokens hold {stats.used_blocks} blocks, {alone} without sharing")
print(f"{batch.num_common_blocks} blocks are common to all beams")
print(f"{num_copies} blocks were copied in 40 steps")
manager.free(beams)
print(f"all beams freed: {manager.num_free_blocks} of {manager.num_blocks} blocks can be had")
