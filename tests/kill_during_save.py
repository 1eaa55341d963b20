"""Kill processes that save the same file over and over, at random moments.

python kill_during_save.py FILE KILLS: after each kill the file is loaded, and must be one that was
saved whole. Prints the kills, how many different saves were found, and how often the process died
in the middle of one.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from rocmforge import KVCache

BLOCK_SIZE, HEADS, DIM = 4, 2, 64


def make(generation: int) -> KVCache:
    """A cache all of which tells its generation: token, contents, and how many sequences."""
    cache = KVCache(2, 64, HEADS, DIM, block_size=BLOCK_SIZE, dtype="float32", device="cpu")
    for sequence in range(generation % 4 + 1):
        cache.add_sequence(sequence, [generation] * 30)
        batch = cache.append([sequence], 30 - cache.seq_len(sequence))
        data = np.full((batch.num_tokens, HEADS, DIM), generation, np.float32)
        for layer in range(2):
            cache.write(layer, data, data, batch)
    return cache


def check(path: Path) -> int:
    """The generation of the snapshot, all of which must be of it."""
    cache = KVCache.load(path, device="cpu")
    cache.check_integrity()
    generation = int(cache.k_cache(0)[0, 0, 0, 0])
    assert len(cache) == generation % 4 + 1
    assert cache.match_prefix([generation] * 30) == 28
    for sequence in range(len(cache)):
        slots = cache.page_table.slot_mapping([sequence], [0], num_tokens=30)
        for layer in range(2):
            for pool in (cache.k_cache(layer), cache.v_cache(layer)):
                assert (pool[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] == generation).all()
    return generation


def main() -> None:
    path, kills = Path(sys.argv[1]), int(sys.argv[2])
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}", file=sys.stderr)
    rng = random.Random(seed)
    make(0).save(path)
    last, found, drafts = 0, set(), 0
    for _ in range(kills):
        caches = [make(last + i + 1) for i in range(40)]
        child = os.fork()
        if child == 0:
            for cache in caches:
                cache.save(path)
            os._exit(0)
        time.sleep(rng.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        generation = check(path)
        assert last <= generation <= last + 40, (last, generation)
        last = generation
        found.add(generation)
        drafts += path.with_name(f".{path.name}.saving").exists()
        assert len(os.listdir(path.parent)) <= 2
    print(kills, len(found), drafts)


if __name__ == "__main__":
    main()
