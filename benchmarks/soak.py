"""A soak: random traffic for minutes, with everything checked, and memory that stays flat.

    python benchmarks/soak.py [--minutes M] [--seed N] [--quick]

Rounds of caches of random shapes: steps, forks, truncations, shared prefixes, salts, pins, resets,
calls that must fail, allocations that fail, suspended sequences, inserted prefixes, events,
pickles, and snapshots from which the traffic goes on. After each stretch every committed key and
value is compared with what its tokens say it must be, and every structure is proved sound. Resident
memory is looked at once all kinds of caches were there, and at the end.
"""

import argparse
import gc
import pickle
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from _bench import machine, resident_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cache_traffic import CacheTraffic, small_cache
from rocmforge import KVCache
from rocmforge.errors import OutOfBlocksError
from rocmforge.page_table import _fail_allocation
from traffic import logical_state, random_manager

WARM_UP_ROUNDS = 40
MAX_GROWTH = 4e6  # bytes, in all: what the interpreter's own allocator may keep more of


def failing_allocations(traffic: CacheTraffic, rng: np.random.Generator) -> int:
    """Calls during which memory runs out once; how many it hit."""
    hits = 0
    for _ in range(5):
        _fail_allocation(int(rng.integers(1, 6)))
        try:
            traffic.run(3)
        except MemoryError as error:
            if not str(error).startswith("no memory for"):
                raise
            # what the traffic was about to note is not known: it begins with what there is
            hits += 1
            _fail_allocation(0)
            cache = traffic.cache
            alive = cache.page_table.sequence_ids().tolist()
            for sequence in alive:
                if sequence not in traffic.tokens:
                    cache.free(sequence)
            traffic.alive = [i for i in traffic.alive if i in cache and i in traffic.tokens]
            for sequence in cache.page_table.sequence_ids().tolist():
                if sequence not in traffic.alive:
                    cache.free(sequence)
            for sequence in traffic.alive:
                keep = cache.committed_len(sequence)
                cache.truncate(sequence, keep)
                del traffic.tokens[sequence][keep + 1 :]
        finally:
            _fail_allocation(0)
    return hits


def one_round(seed: int, path: Path, counts: Counter[str]) -> None:
    rng = np.random.default_rng(seed)
    cache = small_cache(seed, device="cpu")
    if rng.random() < 0.3:
        cache.enable_events(int(rng.integers(1, 500)))
    traffic = CacheTraffic(cache, seed)
    for _ in range(12):
        traffic.run(40)
        counts["tokens compared"] += traffic.check()
        cache.check_integrity()
        counts["events"] += len(cache.take_events())
        if traffic.alive:
            sequence = traffic.pick()
            buffer = cache.suspend(sequence)
            try:
                cache.resume(sequence, buffer)
                counts["resumed"] += 1
            except OutOfBlocksError:
                traffic.alive.remove(sequence)
        if rng.random() < 0.3:
            rows = cache.read_blocks(rng.integers(0, cache.num_blocks, 3))
            try:
                cache.insert_prefix([9000 + int(rng.integers(9))] * 3 * cache.block_size, rows)
                counts["inserted"] += 1
            except OutOfBlocksError:
                pass
        if rng.random() < 0.3:
            cache.save(path)
            loaded = KVCache.load(path, device="cpu")
            loaded.check_integrity()
            assert logical_state(loaded) == logical_state(cache)
            counts["tokens compared"] += traffic.check(loaded)
            cache = traffic.cache = traffic.manager = loaded  # and it goes on from there
            traffic.forget_batches()
            counts["snapshots"] += 1
    counts["failed allocations"] += failing_allocations(traffic, rng)
    cache.check_integrity()
    counts.update({f"calls: {name}": number for name, number in traffic.counts.items()})
    counts["calls"] += sum(traffic.counts.values())

    manager, driver = random_manager(seed)
    other = pickle.loads(pickle.dumps(manager))
    assert logical_state(other) == logical_state(manager)
    other.check_integrity()
    driver.run(100)
    manager.check_integrity()
    counts["calls"] += sum(driver.counts.values())
    counts["pickles"] += 1
    counts["rounds"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--seed", type=int, help="the first round's seed; each next is one more")
    parser.add_argument("--quick", action="store_true", help="a few rounds: does it work at all")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"{machine()}; seed {seed}")
    end = time.monotonic() + (5 if options.quick else 60 * options.minutes)
    counts: Counter[str] = Counter()
    at_first = 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            try:
                one_round(seed + counts["rounds"], Path(folder) / "cache", counts)
            except BaseException:
                print(f"in the round of seed {seed + counts['rounds']}", file=sys.stderr)
                raise
            if counts["rounds"] == WARM_UP_ROUNDS:
                gc.collect()
                at_first = resident_bytes()
    gc.collect()
    at_last = resident_bytes()
    for name, number in sorted(counts.items(), key=lambda item: (":" in item[0], -item[1])):
        print(f"{number:>12,}  {name}")
    if at_first:
        print(f"resident: {at_first / 1e6:.1f} MB after {WARM_UP_ROUNDS} rounds, "
              f"{at_last / 1e6:.1f} MB after {counts['rounds']:,}")  # fmt: skip
        assert at_last - at_first < MAX_GROWTH, "memory grew"


if __name__ == "__main__":
    main()
