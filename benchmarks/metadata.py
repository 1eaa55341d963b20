"""Costs of the metadata: allocation, page table, and the steps of a manager.

    python benchmarks/metadata.py [--quick]

The baseline is the block manager as engines write it in Python: a deque of free blocks, a list of
reference counts, a list of block ids for each sequence, NumPy arrays made from them. Both are
checked against each other before anything is timed. Numbers are medians of several runs.
"""

import argparse
import gc
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from _bench import machine, median_once, median_seconds, print_table, resident_bytes
from rocmforge import BlockAllocator, KVCacheManager, PageTable

BLOCK_SIZE = 16
STEPS = 64  # decode steps that are timed together


class PlainManager:
    """The baseline: everything a decode step needs, in Python objects."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self.free_blocks = deque(range(num_blocks))
        self.ref_counts = [0] * num_blocks
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def allocate_block(self) -> int:
        block = self.free_blocks.popleft()
        self.ref_counts[block] = 1
        return block

    def deallocate_block(self, block: int) -> None:
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self.free_blocks.append(block)

    def add_sequence(self, sequence_id: int) -> None:
        self.tables[sequence_id] = []
        self.lengths[sequence_id] = 0

    def fork(self, parent: int, child: int) -> None:
        self.tables[child] = list(self.tables[parent])
        self.lengths[child] = self.lengths[parent]
        for block in self.tables[child]:
            self.ref_counts[block] += 1

    def free(self, sequence_id: int) -> None:
        for block in self.tables.pop(sequence_id):
            self.deallocate_block(block)
        del self.lengths[sequence_id]

    def append(self, sequence_ids: list[int], num_tokens: int) -> dict[str, object]:
        positions: list[int] = []
        slots: list[int] = []
        copies: list[tuple[int, int]] = []
        for sequence_id in sequence_ids:
            table, start = self.tables[sequence_id], self.lengths[sequence_id]
            end = start + num_tokens
            if start % self.block_size and self.ref_counts[table[-1]] > 1:
                block = self.allocate_block()
                copies.append((table[-1], block))
                self.deallocate_block(table[-1])
                table[-1] = block
            while len(table) * self.block_size < end:
                table.append(self.allocate_block())
            for position in range(start, end):
                block = table[position // self.block_size]
                positions.append(position)
                slots.append(block * self.block_size + position % self.block_size)
            self.lengths[sequence_id] = end
        return {
            "positions": np.array(positions, np.int64),
            "slot_mapping": np.array(slots, np.int64),
            "seq_lens": np.array([self.lengths[s] for s in sequence_ids], np.int32),
            "block_table": self.block_table(sequence_ids),
            "copies": copies,
        }

    def block_table(self, sequence_ids: list[int]) -> npt.NDArray[np.int32]:
        tables = [self.tables[sequence_id] for sequence_id in sequence_ids]
        width = max(len(table) for table in tables)
        return np.array([table + [-1] * (width - len(table)) for table in tables], np.int32)

    def slot_mapping(self, sequence_ids: list[int], positions: list[int]) -> npt.NDArray[np.int64]:
        size = self.block_size
        return np.array(
            [
                self.tables[s][p // size] * size + p % size
                for s, p in zip(sequence_ids, positions, strict=True)
            ],
            np.int64,
        )


def validate() -> None:
    """Both managers, through the same steps, must use the same number of blocks in the same way."""
    ours, plain = KVCacheManager(4096, block_size=BLOCK_SIZE), PlainManager(4096)
    rng = np.random.default_rng(1)
    alive: list[int] = []
    for step in range(200):
        if len(alive) < 8 or step % 5 == 0:
            if alive and step % 2:
                ours.fork(alive[0], step)
                plain.fork(alive[0], step)
            else:
                ours.add_sequence(step)
                plain.add_sequence(step)
            alive.append(step)
        if step % 7 == 6:
            gone = alive.pop(int(rng.integers(len(alive))))
            ours.free(gone)
            plain.free(gone)
        n = int(rng.integers(1, 40))
        batch, other = ours.append(alive, n), plain.append(alive, n)
        ours.commit(batch)
        for name in ("positions", "seq_lens"):
            np.testing.assert_array_equal(getattr(batch, name), other[name])
        assert len(batch.copies) == len(other["copies"])
        assert ours.num_free_blocks == len(plain.free_blocks)
        # the ids differ, as the order of reuse does; slots must follow from each one's own table
        ids = np.repeat(np.array(alive, np.uint64), n)
        np.testing.assert_array_equal(
            batch.slot_mapping, ours.page_table.slot_mapping(ids, batch.positions)
        )
        for sequence_id, row in zip(alive, batch.rows, strict=True):
            blocks = ours.page_table.block_ids(sequence_id)
            np.testing.assert_array_equal(batch.block_table[row, : len(blocks)], blocks)
            assert len(blocks) == len(plain.tables[sequence_id])
    ours.check_integrity()


# ---- the operations, each as (ours, plain): a callable without arguments ----

Pair = tuple[Callable[[], object], Callable[[], object]]


def bulk(n: int) -> Pair:
    allocator, plain = BlockAllocator(2 * n), PlainManager(2 * n)

    def run_plain() -> None:
        for block in [plain.allocate_block() for _ in range(n)]:
            plain.deallocate_block(block)

    return lambda: allocator.deallocate_blocks(allocator.allocate_blocks(n)), run_plain


def one_block() -> Pair:
    allocator, plain = BlockAllocator(64), PlainManager(64)
    return (
        lambda: allocator.deallocate_block(allocator.allocate_block()),
        lambda: plain.deallocate_block(plain.allocate_block()),
    )


def decode_steps(num_sequences: int, context: int) -> Pair:
    """STEPS times one token more for each sequence."""
    ids = list(range(num_sequences))
    num_blocks = num_sequences * ((context + STEPS) // BLOCK_SIZE + 1)
    ours, plain = KVCacheManager(num_blocks), PlainManager(num_blocks)
    for manager in (ours, plain):
        for sequence_id in ids:
            manager.add_sequence(sequence_id)
        manager.append(ids, context)
    array = np.array(ids, np.uint64)

    def run(append: Callable[[], object]) -> None:
        for _ in range(STEPS):
            append()

    return lambda: run(lambda: ours.append(array, 1)), lambda: run(lambda: plain.append(ids, 1))


def filled(num_sequences: int, blocks_each: int) -> tuple[PageTable, PlainManager]:
    table, plain = PageTable(BLOCK_SIZE), PlainManager(num_sequences * blocks_each)
    for sequence_id in range(num_sequences):
        blocks = [plain.allocate_block() for _ in range(blocks_each)]
        plain.tables[sequence_id] = blocks
        table.append_blocks(sequence_id, blocks)
    return table, plain


def slots(num_sequences: int, tokens_each: int) -> Pair:
    table, plain = filled(num_sequences, tokens_each // BLOCK_SIZE)
    ids = np.repeat(np.arange(num_sequences, dtype=np.uint64), tokens_each)
    positions = np.tile(np.arange(tokens_each), num_sequences)
    out = np.empty(len(ids), np.int64)
    id_list, position_list = ids.tolist(), positions.tolist()
    np.testing.assert_array_equal(
        table.slot_mapping(ids, positions), plain.slot_mapping(id_list, position_list)
    )
    return (
        lambda: table.slot_mapping(ids, positions, out=out),
        lambda: plain.slot_mapping(id_list, position_list),
    )


def tables(num_sequences: int, blocks_each: int) -> Pair:
    table, plain = filled(num_sequences, blocks_each)
    ids = list(range(num_sequences))
    out = np.empty((num_sequences, blocks_each), np.int32)
    np.testing.assert_array_equal(table.block_table(ids), plain.block_table(ids))
    return lambda: table.block_table(ids, out=out), lambda: plain.block_table(ids)


def fork_and_free(context: int) -> Pair:
    ours, plain = KVCacheManager(4096), PlainManager(4096)
    for manager in (ours, plain):
        manager.add_sequence(0)
        manager.append([0], context)

    def cycle(manager: KVCacheManager | PlainManager) -> None:
        manager.fork(0, 1)
        manager.free(1)

    return lambda: cycle(ours), lambda: cycle(plain)


def build_ours(num_blocks: int) -> object:
    allocator, table = BlockAllocator(num_blocks), PageTable(BLOCK_SIZE)
    for sequence_id in range(num_blocks // 100):
        table.append_blocks(sequence_id, allocator.allocate_blocks(100))
    return allocator, table


def build_plain(num_blocks: int) -> object:
    plain = PlainManager(num_blocks)
    for sequence_id in range(num_blocks // 100):
        plain.tables[sequence_id] = [plain.allocate_block() for _ in range(100)]
    return plain


def bytes_per_block(build: Callable[[int], object], num_blocks: int) -> float:
    """Growth of the process, measured in one of its own."""
    build(1000)
    gc.collect()
    before = resident_bytes()
    kept = build(num_blocks)
    grown = resident_bytes() - before
    del kept
    return grown / num_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of the metadata, medians of several runs")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows only that it runs")
    quick = parser.parse_args().quick
    validate()
    print(machine())
    print("validated: the manager and the plain Python baseline agree over 200 random steps\n")

    repeats, seconds = (3, 0.002) if quick else (9, 0.05)
    num_blocks = 20_000 if quick else 1_000_000
    num_sequences, context = (16, 64) if quick else (256, 2048)
    rows: list[tuple[str, str, str, str]] = []

    def add(name: str, unit: str, scale: float, ours: float, plain: float) -> None:
        cells = [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (ours * scale, plain * scale)]
        rows.append((f"{name} ({unit})", *cells, f"{plain / ours:,.1f}x"))

    def measure(name: str, unit: str, scale: float, pair: Pair) -> None:
        times = [median_seconds(call, repeats=repeats, seconds=seconds) for call in pair]
        add(name, unit, scale, *times)

    measure("allocate + free 1,000 blocks at once", "ns/block", 1e6, bulk(1000))
    measure("allocate + free one block", "us", 1e6, one_block())
    add(
        f"decode step, {num_sequences} sequences x 1 token",
        "us",
        1e6 / STEPS,
        *(
            median_once(lambda i=i: decode_steps(num_sequences, context)[i], repeats=repeats)
            for i in (0, 1)
        ),
    )
    measure(
        f"slot mapping, {num_sequences} x {context} tokens",
        "us",
        1e6,
        slots(num_sequences, context),
    )
    measure(
        f"block table, {num_sequences} x {context // BLOCK_SIZE} blocks",
        "us",
        1e6,
        tables(num_sequences, context // BLOCK_SIZE),
    )
    measure(f"fork + free, {context} tokens", "us", 1e6, fork_and_free(context))
    builds = [
        median_once(lambda build=build: lambda: build(num_blocks), repeats=3)
        for build in (build_ours, build_plain)
    ]
    add(f"build {num_blocks:,} blocks", "ms", 1e3, *builds)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        sizes = [
            pool.submit(bytes_per_block, build, num_blocks).result()
            for build in (build_ours, build_plain)
        ]
    add("memory, allocator and table", "bytes/block", 1, *sizes)
    print_table(("operation", "rocmforge", "plain Python", "ratio"), rows)


if __name__ == "__main__":
    main()
