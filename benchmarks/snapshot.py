"""Saving and loading a cache beside one `write` or `read` call of as many bytes.

    python benchmarks/snapshot.py [--quick] [--folder FOLDER]

The peer writes the snapshot's bytes from one buffer to a file of its own, and syncs it as a save
does; it reads them into a new buffer, as a load fills new pools. Both in turn, the file in the page
cache when it is read; medians. Every load is compared with the cache that was saved before it is
timed.

What was learnt:
- Pieces of a megabyte let the checksum (XXH3, some 20 GB/s) find in the processor's cache what the
  copy to or from the kernel has just touched.
- `writev` and `readv` on the blocks where they lie: scattered blocks cost no copy to gather them.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from _bench import machine, print_table
from rocmforge import KVCache

BLOCK_SIZE = 16


def make(num_blocks: int, scattered: bool) -> KVCache:
    """A cache with all blocks in use, or every second one."""
    cache = KVCache(8, num_blocks, 8, 128, block_size=BLOCK_SIZE, dtype="bfloat16", device="cpu")
    for sequence in range(num_blocks // 2):
        cache.add_sequence(sequence, [sequence] * 2 * BLOCK_SIZE)
        cache.append([sequence], BLOCK_SIZE)
    for sequence in range(num_blocks // 2):
        cache.append([sequence], BLOCK_SIZE)
    if scattered:
        rng = np.random.default_rng(0)
        cache.free(rng.permutation(num_blocks // 2)[: num_blocks // 4])
    bits = np.arange(num_blocks * BLOCK_SIZE * 8 * 128, dtype=np.uint16)
    for layer in range(8):
        for pool in (cache.k_cache(layer), cache.v_cache(layer)):
            pool.reshape(-1).view(np.uint16)[:] = bits + layer
    return cache


def check(cache: KVCache, path: Path) -> None:
    other = KVCache.load(path, device="cpu")
    other.check_integrity()
    assert other.stats() == cache.stats()
    for sequence in cache.page_table.sequence_ids():
        ids = cache.page_table.block_ids(sequence)
        assert (other.page_table.block_ids(sequence) == ids).all()
        for mine, theirs in zip(cache._pools(), other._pools(), strict=True):
            assert (mine[1][ids].view(np.uint16) == theirs[1][ids].view(np.uint16)).all()


def plain_write(path: Path, data: bytes) -> None:
    """One call, as long as it takes all: Linux writes at most 2 GB at once."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    assert os.write(file, data) == len(data)
    os.fsync(file)
    os.close(file)


def plain_read(path: Path, size: int) -> None:
    file = os.open(path, os.O_RDONLY)
    assert os.readv(file, [np.empty(size, np.uint8)]) == size  # in huge pages, as pools are
    os.close(file)


def seconds(function: object, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start


def measure(folder: Path, num_blocks: int, scattered: bool, repeats: int) -> list[list[str]]:
    cache = make(num_blocks, scattered)
    ours, plain = folder / "cache.safetensors", folder / "plain"
    cache.save(ours)
    check(cache, ours)
    data = ours.read_bytes()
    times: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": []}
    for turn in range(repeats + 1):
        for path in (ours, plain):  # new files both: to write over an old one's pages is another
            path.unlink(missing_ok=True)
        times["write"].append(seconds(plain_write, plain, data))
        times["save"].append(seconds(cache.save, ours))
        times["read"].append(seconds(plain_read, plain, len(data)))
        times["load"].append(seconds(lambda: KVCache.load(ours, device="cpu")))
        if turn == 0:  # in a virtual machine, memory that nobody had before comes slowly
            for taken in times.values():
                taken.clear()
    blocks = "scattered" if scattered else "all in use"
    rows = []
    for mine, peer in (("save", "write"), ("load", "read")):
        a, b = (len(data) / statistics.median(times[name]) / 1e9 for name in (mine, peer))
        rows.append([f"{mine}, {blocks}", f"{len(data) / 1e6:.0f}", f"{a:.2f}", f"{b:.2f}",
                     f"{a / b:.2f}"])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few bytes: does it work at all")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    options = parser.parse_args()
    print(machine())
    num_blocks, repeats = (64, 1) if options.quick else (1536, 7)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for scattered in (False, True):
            rows += measure(Path(name), num_blocks, scattered, repeats)
    print_table(["operation", "MB", "GB/s", "one call, GB/s", "ratio"], rows)


if __name__ == "__main__":
    main()
