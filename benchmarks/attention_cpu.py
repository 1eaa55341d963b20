"""Attention and cache writes on the CPU, beside the machine's limits and PyTorch.

    python benchmarks/attention_cpu.py [--quick] [--threads 1 2] [--dtypes bfloat16 ...]

Each result is checked against the float64 oracle before it is timed. Problems rotate through more
memory than the caches hold, in random order of blocks. Bare reads of the same blocks ("paged"),
reads from end to end ("sequential") and the peers are timed in turn with ours, because a shared
machine's bandwidth changes from second to second; every number is the median of its turns, and of
the ways to read the fastest counts. All run with each thread on a processor of its own: a scheduler
that leaves virtual processors idle made two threads take turns on one, and what takes 5 ms took as
long with two threads as with one, every other time. Peers are optional: PyTorch, which gathers the
blocks and calls scaled_dot_product_attention, vLLM's CPU attention and write, and OpenVINO's
PagedAttention (blocks of 32, HND, float32 and bfloat16).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import _peers
from _bench import machine, median_seconds, print_table, threads_apart
from _probe import Probe, aligned_zeros
from rocmforge import KVCache, reference
from rocmforge.dtypes import NAMES, resolve
from rocmforge.ops import _cpu, paged_attention, set_num_threads, write_kv

# Gets the block table of its turn; may return the seconds itself, else the whole call counts.
Run = Callable[[np.ndarray], object]

# Of float32 queries; 16-bit ones round the result, and bfloat16 may round the probabilities too.
TOLERANCE = {"float32": 2e-5, "float16": 1.1e-3, "bfloat16": 1.2e-2}
EIGHT_BIT = ("int8", "float8_e4m3fn", "float8_e4m3fnuz")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PEERS = ("torch", "vllm", "openvino")
PEER_COLUMNS = [f"{peer} ms" for peer in PEERS]


class Pool:
    """Keys and values of one layer, larger than the caches, and blocks in random order.

    8-bit ones have a scale for each block, head and token.
    """

    def __init__(self, dtype: str, block_size: int, layout: str, nbytes: int) -> None:
        self.dtype, self.layout, self.block_size = resolve(dtype), layout, block_size
        self.kv_heads, self.head_dim = KV_HEADS, HEAD_DIM
        inner = (KV_HEADS, block_size) if layout == "HND" else (block_size, KV_HEADS)
        block_bytes = KV_HEADS * block_size * HEAD_DIM * self.dtype.itemsize
        num_blocks = nbytes // (2 * block_bytes)
        rng = np.random.default_rng(0)
        some = rng.standard_normal(4 << 20, np.float32)
        if dtype == "int8":
            some = np.clip(some * 40, -127, 127).round()
        some = some.astype(self.dtype).view(np.uint8)
        self.caches = []
        for _ in range(2):
            memory = aligned_zeros(num_blocks * block_bytes)
            for start in range(0, memory.size, some.size):
                memory[start : start + some.size] = some[: memory.size - start]
            self.caches.append(memory.view(self.dtype).reshape(num_blocks, *inner, HEAD_DIM))
        self.scales: dict[str, np.ndarray] = {}
        if dtype in EIGHT_BIT:
            shape = (num_blocks, KV_HEADS, block_size)
            unit = 1 / 40 if dtype == "int8" else 1.0
            for name in ("k_scale", "v_scale"):
                self.scales[name] = (rng.uniform(0.5, 1.5, shape) * unit).astype(np.float32)
        self.order = rng.permutation(num_blocks).astype(np.int32)
        self.next = 0

    @property
    def query_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if self.scales else self.dtype

    def take(self, count: int) -> np.ndarray:
        """The next blocks of the rotation."""
        if self.next + count > self.order.size:
            self.next = 0
        self.next += count
        return self.order[self.next - count : self.next]


class Memory:
    """Bytes to read from end to end, a part at a time."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = aligned_zeros(nbytes)
        self.bytes[:] = 1
        self.next = 0

    def take(self, nbytes: int) -> np.ndarray:
        if nbytes > self.bytes.size:
            raise ValueError(f"{nbytes} bytes of a memory of {self.bytes.size}")
        if self.next + nbytes > self.bytes.size:
            self.next = 0
        self.next += nbytes
        return self.bytes[self.next - nbytes : self.next]


class Problem:
    """Sequences with some query tokens each; numbers, or lists with one for each sequence."""

    def __init__(self, pool: Pool, batch: int, context: int, queries: int = 1) -> None:
        self.pool, self.batch, self.context, self.queries = pool, batch, context, queries
        self.set_lengths([context] * batch, [queries] * batch)

    def set_lengths(self, contexts: list[int], queries: list[int]) -> None:
        rng = np.random.default_rng(1)
        self.counts = [-(-context // self.pool.block_size) for context in contexts]
        shape = (sum(queries), HEADS, HEAD_DIM)
        self.query = rng.standard_normal(shape, np.float32).astype(self.pool.query_dtype)
        self.out = np.empty_like(self.query)
        self.lens = np.array(contexts, np.int32)
        self.cu = np.cumsum([0, *queries], dtype=np.int32) if max(queries) > 1 else None
        elements = 2 * sum(contexts) * KV_HEADS * HEAD_DIM
        self.nbytes = elements * self.pool.dtype.itemsize
        pairs = zip(contexts, queries, strict=True)
        seen = sum(n * (context - n) + n * (n + 1) // 2 for context, n in pairs)
        self.flops = 4.0 * seen * HEADS * HEAD_DIM

    def table(self) -> np.ndarray:
        table = np.zeros((len(self.counts), max(self.counts)), np.int32)
        for row, count in zip(table, self.counts, strict=True):
            row[:count] = self.pool.take(count)
        return table

    def ours(self, table: np.ndarray) -> None:
        paged_attention(
            self.query,
            *self.pool.caches,
            table,
            self.lens,
            self.cu,
            layout=self.pool.layout,
            out=self.out,
            **self.pool.scales,
        )

    def check(self) -> None:
        """The first and the last sequence against the oracle, the last tokens of each."""
        table = self.table()
        self.ours(table)
        starts = np.arange(len(self.lens) + 1) if self.cu is None else self.cu
        for i in {0, len(self.lens) - 1}:
            tokens = slice(max(starts[i], starts[i + 1] - 4), starts[i + 1])
            want = reference.paged_attention(
                self.query[tokens],
                *self.pool.caches,
                table[i : i + 1],
                self.lens[i : i + 1],
                np.array([0, tokens.stop - tokens.start], np.int32),
                layout=self.pool.layout,
                **self.pool.scales,
            )
            error = np.abs(self.out[tokens].astype(np.float64) - want).max()
            if not error <= TOLERANCE[self.query.dtype.name] * max(1.0, np.abs(want).max()):
                raise SystemExit(f"wrong by {error} for {self.pool.dtype}, {self.lens}")


def in_turn(problem: Problem, runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other, each on other blocks."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # starts their threads
        run(problem.table())
    with threads_apart():
        for _, (name, run) in itertools.product(range(repeats), runs.items()):
            table = problem.table()
            time.sleep(0.01)  # until the threads of who came before have stopped polling
            start = time.perf_counter()
            seconds = run(table)
            wall = time.perf_counter() - start
            taken[name].append(seconds if isinstance(seconds, float) else wall)
    return {name: statistics.median(times) for name, times in taken.items()}


def best_of(seconds: dict[str, float], kind: str) -> float | None:
    return min((s for name, s in seconds.items() if name.startswith(kind)), default=None)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def decode(args: argparse.Namespace, probe: Probe) -> None:
    for block_size, layout in [(b, lay) for lay in args.layouts for b in args.block_sizes]:
        rows = []
        for dtype, large in itertools.product(args.dtypes, (False, True)):
            # Two sizes of memory, each read twice before it is used: on a virtual machine the first
            # reads of what was written once came at a tenth of the usual speed, ours and bare ones.
            cases = [case for case in args.decode if (case[0] * case[1] > 1 << 17) == large]
            if not cases:
                continue
            tokens = max(batch * context for batch, context, _ in cases)
            largest = 2 * tokens * KV_HEADS * HEAD_DIM * resolve(dtype).itemsize
            nbytes = args.pool_bytes * (2 if dtype == "float32" else 1)
            pool = Pool(dtype, block_size, layout, max(nbytes, 2 * largest))
            memory = Memory(max(args.pool_bytes, largest))
            for _ in range(2):
                probe.paged(*pool.caches, pool.order, 1, 0)
                probe.sequential(memory.bytes, 1, 0)
            for threads, (batch, context, queries) in itertools.product(args.threads, cases):
                set_num_threads(threads)
                _peers.set_num_threads(threads)
                problem = Problem(pool, batch, context, queries)
                problem.check()
                runs: dict[str, Run] = {"ours": problem.ours}
                for how in range(len(probe.PAGED)):
                    runs[f"paged {how}"] = lambda table, p=problem, n=threads, h=how: probe.paged(
                        *p.pool.caches, table, n, h
                    )
                for how in range(len(probe.SEQUENTIAL)):
                    runs[f"sequential {how}"] = lambda _, m=memory, p=problem, n=threads, h=how: (
                        probe.sequential(m.take(p.nbytes), n, h)
                    )
                if not args.no_peers:
                    runs |= _peers.attention_peers(problem, threads)
                repeats = max(3, min(args.repeats, int(args.repeats * 3e8 / problem.nbytes)))
                seconds = in_turn(problem, runs, repeats)
                ours, paged, sequential, *peers = (
                    best_of(seconds, kind) for kind in ("ours", "paged", "sequential", *PEERS)
                )
                name = f"decode {batch} x {context}"
                if queries > 1:
                    name = f"{queries} tokens, {batch} x {context}"
                rates = [f"{problem.nbytes / s / 1e9:.1f}" for s in (ours, paged, sequential)]
                parts = [f"{paged / ours:.2f}", f"{sequential / ours:.2f}"]
                rows.append(
                    [name, dtype, threads, milliseconds(ours), *rates, *parts]
                    + [milliseconds(peer) for peer in peers]
                )
        print(f"\nDecode, block {block_size}, {layout}, cold caches; GB/s of keys and values")
        header = "problem dtype threads ms GB/s paged sequential of_paged of_seq."
        print_table([word.replace("_", " ") for word in header.split()] + PEER_COLUMNS, rows)


def ragged(args: argparse.Namespace) -> None:
    """One long prompt among decoding sequences: how much of the threads' time is idle."""
    rows = []
    threads = max(args.threads)
    set_num_threads(threads)
    for dtype in args.dtypes:
        pool = Pool(dtype, args.block_sizes[0], args.layouts[0], args.pool_bytes // 4)
        problem = Problem(pool, 1, 16)
        problem.set_lengths([args.ragged] + [args.ragged // 2] * 31, [args.ragged] + [1] * 31)
        problem.check()
        walls, idle = [], []
        for _ in range(args.repeats + 1):
            table = problem.table()
            busy, start = _cpu.busy_seconds(), time.perf_counter()
            problem.ours(table)
            walls.append(time.perf_counter() - start)
            idle.append(1 - (_cpu.busy_seconds() - busy) / (threads * walls[-1]))
        wall, part = statistics.median(walls[1:]), statistics.median(idle[1:])
        rate = f"{problem.flops / wall / 1e9:.0f}"
        shown = f"{part:.1%}" if threads > 1 else "-"  # a thread alone does not time its tasks
        rows.append([f"{args.ragged} + 31", dtype, threads, milliseconds(wall), rate, shown])
    print("\nRagged batch: one prefill among 31 decodes over half its length")
    print_table(["problem", "dtype", "threads", "ms", "GFLOP/s", "idle"], rows)


def prefill(args: argparse.Namespace, probe: Probe) -> None:
    rows = []
    for dtype in args.dtypes:
        pool = Pool(dtype, args.block_sizes[0], args.layouts[0], args.pool_bytes // 8)
        dots = pool.query_dtype == ml_dtypes.bfloat16 and probe.has_dot
        peak_of = probe.dot if dots else probe.multiply_add
        for threads, (batch, new, cached) in itertools.product(args.threads, args.prefill):
            set_num_threads(threads)
            _peers.set_num_threads(threads)
            problem = Problem(pool, batch, cached + new, new)
            problem.check()

            def peak(
                _: np.ndarray, p: Problem = problem, n: int = threads, of: Any = peak_of
            ) -> float:
                return p.flops / of(n)

            runs: dict[str, Run] = {"ours": problem.ours, "peak": peak}
            if not args.no_peers:
                runs |= _peers.attention_peers(problem, threads)
            seconds = in_turn(problem, runs, max(2, args.repeats // 3))
            ours = seconds["ours"]
            rates = [f"{problem.flops / s / 1e9:.0f}" for s in (ours, seconds["peak"])]
            rows.append(
                [f"prefill {batch} x {new} over {cached}", dtype, threads, milliseconds(ours)]
                + [*rates, f"{seconds['peak'] / ours:.2f}", "dot" if dots else "FMA"]
                + [milliseconds(best_of(seconds, peer)) for peer in PEERS]
            )
    print("\nPrefill; peak of float32 multiply-adds (FMA) or bfloat16 dot products (dot)")
    header = "problem dtype threads ms GFLOP/s peak of_peak kind"
    print_table([word.replace("_", " ") for word in header.split()] + PEER_COLUMNS, rows)


def write(args: argparse.Namespace, probe: Probe) -> None:
    rows = []
    dtype = "bfloat16" if "bfloat16" in args.dtypes else args.dtypes[0]
    pool = Pool(dtype, args.block_sizes[0], args.layouts[0], args.pool_bytes)
    memory = Memory(args.pool_bytes)
    rng = np.random.default_rng(2)
    for tokens in args.write:
        new = [
            rng.standard_normal((tokens, KV_HEADS, HEAD_DIM), np.float32).astype(pool.dtype)
            for _ in range(2)
        ]
        if tokens > pool.order.size * pool.block_size:
            continue

        def slots(n: int = tokens) -> np.ndarray:
            """Of the next blocks of the rotation; a prompt's tokens are neighbours in them."""
            blocks = pool.take(-(-n // pool.block_size)).astype(np.int64)
            return (blocks[:, None] * pool.block_size + np.arange(pool.block_size)).ravel()[:n]

        check_write(pool, new, slots())
        nbytes = 2 * new[0].nbytes
        writes: dict[str, Run] = {
            "ours": lambda s, n=new: write_kv(*n, *pool.caches, s, layout=pool.layout)
        }
        if not args.no_peers:
            writes |= _peers.write_peers(pool, new)
        for threads in args.threads:
            set_num_threads(threads)
            _peers.set_num_threads(threads)
            if tokens < 2048:  # hot
                same = slots()
                taken = {
                    name: median_seconds(
                        lambda w=write, s=same: w(s), repeats=args.repeats, seconds=0.02
                    )
                    for name, write in writes.items()
                }
            else:  # to blocks and to memory that were not touched for long, in turn
                source = np.concatenate([x.view(np.uint8).ravel() for x in new])
                taken = write_and_copy(writes, source, slots, probe, memory, threads, args.repeats)
            ours, copy = taken["ours"], taken.get("copy")
            rows.append(
                [
                    f"write {tokens}",
                    dtype,
                    threads,
                    f"{ours * 1e6:.1f}",
                    f"{nbytes / ours / 1e9:.1f}",
                    f"{copy / ours:.2f}" if copy else "-",
                    f"{taken['vllm'] * 1e6:.1f}" if "vllm" in taken else "-",
                ]
            )
    print("\nwrite_kv from Python; copy is the best of memcpy and streaming stores")
    print_table(["problem", "dtype", "threads", "us", "GB/s", "of copy", "vllm us"], rows)


def write_calls(args: argparse.Namespace) -> None:
    """One token, hot: written, skipped as padding (all but the writing), and by a cache."""
    rows = []
    set_num_threads(1)
    for dtype in args.dtypes:
        pool = Pool(dtype, args.block_sizes[0], args.layouts[0], 8 << 20)
        new = np.ones((1, KV_HEADS, HEAD_DIM), pool.query_dtype)
        options = {"layout": pool.layout, **pool.scales}
        cache = KVCache(2, 8, KV_HEADS, HEAD_DIM, block_size=pool.block_size, dtype=dtype)
        cache.add_sequence(0)
        batch = cache.append([0], 1)
        calls = [
            lambda n=new, p=pool, o=options, s=slot: write_kv(n, n, *p.caches, s, **o)
            for slot in (np.array([5]), np.array([-1]))
        ] + [lambda n=new, c=cache, b=batch: c.write(0, n, n, b)]
        seconds = [median_seconds(call, repeats=args.repeats, seconds=0.02) for call in calls]
        rows.append([dtype, *(f"{s * 1e6:.2f}" for s in seconds)])
    print("\nOne token, us a call, one thread; KVCache.write of one of two layers")
    print_table(["dtype", "write_kv", "of padding", "KVCache.write"], rows)


def check_write(pool: Pool, new: list[np.ndarray], slots: np.ndarray) -> None:
    """Every byte that was to be written; for few tokens also that no other was."""
    before = [cache.copy() for cache in pool.caches] if len(slots) <= 32 else None
    write_kv(*new, *pool.caches, slots, layout=pool.layout)
    if before:
        reference.write_kv(*new, *before, slots, layout=pool.layout)
        right = all(map(same_bits, pool.caches, before))
    else:
        blocks, offsets = slots // pool.block_size, slots % pool.block_size
        where = (blocks, slice(None), offsets) if pool.layout == "HND" else (blocks, offsets)
        right = all(same_bits(cache[where], x) for cache, x in zip(pool.caches, new, strict=True))
    if not right:
        raise SystemExit(f"write_kv is wrong for {len(slots)} tokens")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    kind = f"u{a.dtype.itemsize}"
    return np.array_equal(a.view(kind), b.view(kind))


def write_and_copy(
    writes: dict[str, Run],
    source: np.ndarray,
    slots: Callable[[], np.ndarray],
    probe: Probe,
    memory: Memory,
    threads: int,
    repeats: int,
) -> dict[str, float]:
    """Median seconds of each write and of a copy of as many bytes.

    Of each the better of two runs one after the other, the second of which finds its source in the
    cache, as what a layer has just computed is.
    """
    taken: dict[str, list[float]] = {name: [] for name in [*writes, "copy"]}
    for write in writes.values():  # starts their threads
        write(slots())
    with threads_apart():
        for _ in range(repeats):
            for name, write in writes.items():
                seconds = []
                time.sleep(0.01)  # until the threads of who came before have stopped polling
                for some in (slots(), slots()):
                    start = time.perf_counter()
                    write(some)
                    seconds.append(time.perf_counter() - start)
                taken[name].append(min(seconds))
            time.sleep(0.01)
            rate = probe.copy(source, memory.take(source.nbytes), threads)
            taken["copy"].append(source.nbytes / rate)
    return {name: statistics.median(times) for name, times in taken.items()}


def calls(args: argparse.Namespace) -> None:
    """Short calls, hot: what a step pays besides its work."""
    rows = []
    for dtype in args.dtypes:
        pool = Pool(dtype, args.block_sizes[0], args.layouts[0], 8 << 20)
        for threads in args.threads:
            set_num_threads(threads)
            for context in (1, 128, 512):
                problem = Problem(pool, 1, context)
                problem.check()
                table = problem.table()
                seconds = median_seconds(
                    lambda p=problem, t=table: p.ours(t), repeats=args.repeats, seconds=0.01
                )
                rows.append([f"batch 1, context {context}", dtype, threads, f"{seconds * 1e6:.1f}"])
    print("\nShort calls from Python, in the cache")
    print_table(["problem", "dtype", "threads", "us"], rows)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--layouts", choices=["HND", "NHD"], nargs="+", default=["HND"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--decode",
        type=numbers,
        nargs="*",
        metavar="BATCHxCONTEXTxQUERIES",
        default=[
            *((batch, context, 1) for batch in (1, 8, 32) for context in (512, 2048, 8192)),
            (32, 2048, 4),
        ],
    )
    parser.add_argument(
        "--prefill",
        type=numbers,
        nargs="*",
        metavar="BATCHxNEWxCACHED",
        default=[(1, 2048, 1024), (4, 512, 1024)],
    )
    parser.add_argument("--write", type=int, nargs="*", default=[1, 32, 2048, 65536])
    parser.add_argument("--ragged", type=int, default=2000, help="its prompt; 0 leaves it out")
    args = parser.parse_args()
    args.pool_bytes = 1 << 30
    if args.quick:
        args.pool_bytes, args.repeats = 64 << 20, 3
        args.decode, args.prefill, args.write = [(1, 64, 1), (4, 512, 1)], [(1, 64, 32)], [1, 2048]
        args.ragged = 200
    probe = Probe()
    print(machine())
    variants = ", ".join(_cpu.available_isas())
    print(f"{_cpu.isa()} of {variants}; {HEADS}/{KV_HEADS} heads of {HEAD_DIM}")
    calls(args)
    if args.decode:
        decode(args, probe)
    if args.prefill:
        prefill(args, probe)
    if args.ragged:
        ragged(args)
    if args.write:
        write(args, probe)
        write_calls(args)


if __name__ == "__main__":
    main()
