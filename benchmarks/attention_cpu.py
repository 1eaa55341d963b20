"""Attention and cache writes on the CPU, beside the machine's limits and PyTorch.

    python benchmarks/attention_cpu.py [--quick] [--threads 1 2] [--dtypes bfloat16 ...]

Each result is checked against the float64 oracle before it is timed. Problems rotate through more
memory than the caches hold, in random order of blocks. Bare reads of the same blocks ("paged"),
reads from end to end ("sequential") and the peers are timed in turn with ours, because a shared
machine's bandwidth changes from second to second; every number is the median of its turns, and of
the ways to read the fastest counts. Peers are optional: PyTorch, which gathers the blocks and calls
scaled_dot_product_attention.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from _bench import machine, median_seconds, print_table
from _probe import Probe, aligned_zeros
from rocmforge import reference
from rocmforge.dtypes import resolve
from rocmforge.ops import _cpu, paged_attention, set_num_threads, write_kv

try:
    import torch
except ImportError:
    torch = None

# Gets the block table of its turn; may return the seconds itself, else the whole call counts.
Run = Callable[[np.ndarray], object]

TOLERANCE = {"float32": 2e-5, "float16": 1.1e-3, "bfloat16": 8.5e-3}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


class Pool:
    """Keys and values of one layer, larger than the caches, and blocks in random order."""

    def __init__(self, dtype: str, block_size: int, layout: str, nbytes: int) -> None:
        self.dtype, self.layout, self.block_size = resolve(dtype), layout, block_size
        inner = (KV_HEADS, block_size) if layout == "HND" else (block_size, KV_HEADS)
        block_bytes = KV_HEADS * block_size * HEAD_DIM * self.dtype.itemsize
        num_blocks = nbytes // (2 * block_bytes)
        rng = np.random.default_rng(0)
        some = rng.standard_normal(4 << 20, np.float32).astype(self.dtype).view(np.uint8)
        self.caches = []
        for _ in range(2):
            memory = aligned_zeros(num_blocks * block_bytes)
            for start in range(0, memory.size, some.size):
                memory[start : start + some.size] = some[: memory.size - start]
            self.caches.append(memory.view(self.dtype).reshape(num_blocks, *inner, HEAD_DIM))
        self.order = rng.permutation(num_blocks).astype(np.int32)
        self.next = 0

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
        if self.next + nbytes > self.bytes.size:
            self.next = 0
        self.next += nbytes
        return self.bytes[self.next - nbytes : self.next]


class Problem:
    """Sequences of equal length with the same number of query tokens."""

    def __init__(self, pool: Pool, batch: int, context: int, queries: int = 1) -> None:
        self.pool, self.batch, self.context, self.queries = pool, batch, context, queries
        self.blocks = -(-context // pool.block_size)
        rng = np.random.default_rng(1)
        shape = (batch * queries, HEADS, HEAD_DIM)
        self.query = rng.standard_normal(shape, np.float32).astype(pool.dtype)
        self.out = np.empty_like(self.query)
        self.lens = np.full(batch, context, np.int32)
        self.cu = np.arange(batch + 1, dtype=np.int32) * queries if queries > 1 else None
        self.nbytes = 2 * batch * context * KV_HEADS * HEAD_DIM * pool.dtype.itemsize
        seen = sum(context - queries + i + 1 for i in range(queries))
        self.flops = 4.0 * batch * seen * HEADS * HEAD_DIM

    def table(self) -> np.ndarray:
        return self.pool.take(self.batch * self.blocks).reshape(self.batch, self.blocks)

    def ours(self, table: np.ndarray) -> None:
        paged_attention(
            self.query,
            *self.pool.caches,
            table,
            self.lens,
            self.cu,
            layout=self.pool.layout,
            out=self.out,
        )

    def check(self) -> None:
        """The first and the last sequence against the oracle."""
        table = self.table()
        self.ours(table)
        for i in {0, self.batch - 1}:
            rows = slice(i * self.queries, (i + 1) * self.queries)
            tokens = slice(rows.stop - min(self.queries, 4), rows.stop)  # the oracle is slow
            want = reference.paged_attention(
                self.query[tokens],
                *self.pool.caches,
                table[i : i + 1],
                self.lens[:1],
                np.array([0, tokens.stop - tokens.start], np.int32),
                layout=self.pool.layout,
            )
            error = np.abs(self.out[tokens].astype(np.float64) - want).max()
            if not error <= TOLERANCE[self.pool.dtype.name]:
                raise SystemExit(
                    f"wrong by {error} for {self.pool.dtype}, {self.batch} x {self.context}"
                )


def torch_tensor(array: np.ndarray) -> "torch.Tensor":
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_attention(problem: Problem, *, rows_as_tokens: bool) -> Run:
    """Gather the blocks, then scaled_dot_product_attention; plain, or the faster way for decode."""
    query = torch_tensor(problem.query)
    caches = [torch_tensor(cache) for cache in problem.pool.caches]
    attend = torch.nn.functional.scaled_dot_product_attention
    group, queries = HEADS // KV_HEADS, problem.queries
    mask = None
    if queries > 1:
        mask = torch.ones(queries, problem.context, dtype=torch.bool)
        mask = mask.tril(problem.context - queries)

    def run(table: np.ndarray) -> "torch.Tensor":
        index = torch.from_numpy(table).long()
        gathered = []
        for cache in caches:
            blocks = cache[index]  # [batch, blocks, heads, tokens, dim] in HND
            if problem.pool.layout == "HND":
                blocks = blocks.transpose(2, 3)
            flat = blocks.reshape(problem.batch, -1, KV_HEADS, HEAD_DIM)[:, : problem.context]
            gathered.append(flat.transpose(1, 2))
        if rows_as_tokens:  # the query heads of a key/value head as so many query tokens
            rows = query.view(problem.batch, KV_HEADS, group, HEAD_DIM)
            return attend(rows, *gathered)
        rows = query.view(problem.batch, queries, HEADS, HEAD_DIM).transpose(1, 2)
        return attend(rows, *gathered, attn_mask=mask, enable_gqa=True)

    table = problem.table()
    problem.ours(table)
    got = run(table)
    got = got.reshape(problem.query.shape) if rows_as_tokens else got.transpose(1, 2)
    want = torch_tensor(problem.out).reshape(got.shape)
    if not torch.allclose(got.float(), want.float(), atol=2e-2, rtol=2e-2):
        raise SystemExit("PyTorch and we disagree")
    return run


def in_turn(problem: Problem, runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other, each on other blocks."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            table = problem.table()
            time.sleep(0.01)  # until the threads of who came before have stopped polling
            start = time.perf_counter()
            seconds = run(table)
            wall = time.perf_counter() - start
            taken[name].append(seconds if isinstance(seconds, float) else wall)
    return {name: statistics.median(times[1:] or times) for name, times in taken.items()}


def decode(args: argparse.Namespace, probe: Probe, memory: Memory) -> None:
    rows = []
    for dtype in args.dtypes:
        nbytes = args.pool_bytes * (2 if dtype == "float32" else 1)
        pool = Pool(dtype, args.block_size, args.layout, nbytes)
        for threads in args.threads:
            set_num_threads(threads)
            if torch:
                torch.set_num_threads(threads)
            for batch, context, queries in args.decode:
                problem = Problem(pool, batch, context, queries)
                problem.check()
                runs: dict[str, Run] = {"ours": problem.ours}
                for how in range(len(probe.PAGED)):
                    runs[f"paged {how}"] = lambda table, p=problem, n=threads, h=how: probe.paged(
                        *p.pool.caches, table, n, h
                    )
                for how in range(len(probe.SEQUENTIAL)):
                    runs[f"sequential {how}"] = lambda _, p=problem, n=threads, h=how: (
                        probe.sequential(memory.take(p.nbytes), n, h)
                    )
                if torch and not args.no_peers:
                    runs["torch"] = torch_attention(problem, rows_as_tokens=False)
                    if queries == 1:
                        runs["torch best"] = torch_attention(problem, rows_as_tokens=True)
                repeats = max(3, min(args.repeats, int(args.repeats * 3e8 / problem.nbytes)))
                seconds = in_turn(problem, runs, repeats + 1)
                ours = seconds["ours"]
                best = {
                    kind: min(
                        (s for name, s in seconds.items() if name.startswith(kind)), default=None
                    )
                    for kind in ("paged", "sequential", "torch")
                }
                name = f"decode {batch} x {context}"
                if queries > 1:
                    name = f"{queries} tokens, {batch} x {context}"
                rows.append(
                    [
                        name,
                        dtype,
                        threads,
                        f"{ours * 1e3:.2f}",
                        f"{problem.nbytes / ours / 1e9:.1f}",
                        f"{problem.nbytes / best['paged'] / 1e9:.1f}",
                        f"{problem.nbytes / best['sequential'] / 1e9:.1f}",
                        f"{best['paged'] / ours:.2f}",
                        f"{best['sequential'] / ours:.2f}",
                        f"{best['torch'] * 1e3:.1f}" if best["torch"] else "-",
                    ]
                )
    print(f"\nDecode, block {args.block_size}, {args.layout}, cold caches")
    header = "problem dtype threads ms GB/s paged sequential of_paged of_seq. torch_ms"
    print_table([word.replace("_", " ") for word in header.split()], rows)


def prefill(args: argparse.Namespace, probe: Probe) -> None:
    rows = []
    for dtype in args.dtypes:
        pool = Pool(dtype, args.block_size, args.layout, args.pool_bytes // 8)
        for threads in args.threads:
            set_num_threads(threads)
            if torch:
                torch.set_num_threads(threads)
            for batch, new, cached in args.prefill:
                problem = Problem(pool, batch, cached + new, new)
                problem.check()

                def peak(_: np.ndarray, p: Problem = problem, n: int = threads) -> float:
                    return p.flops / probe.multiply_add(n)

                runs = {"ours": problem.ours, "peak": peak}
                if torch and not args.no_peers:
                    runs["torch"] = torch_attention(problem, rows_as_tokens=False)
                seconds = in_turn(problem, runs, max(2, args.repeats // 3) + 1)
                ours = seconds["ours"]
                rows.append(
                    [
                        f"prefill {batch} x {new} over {cached}",
                        dtype,
                        threads,
                        f"{ours * 1e3:.1f}",
                        f"{problem.flops / ours / 1e9:.0f}",
                        f"{problem.flops / seconds['peak'] / 1e9:.0f}",
                        f"{seconds['peak'] / ours:.2f}",
                        f"{seconds['torch'] * 1e3:.1f}" if "torch" in seconds else "-",
                    ]
                )
    print("\nPrefill; peak is float32 multiply-adds")
    header = "problem dtype threads ms GFLOP/s peak of_peak torch_ms"
    print_table([word.replace("_", " ") for word in header.split()], rows)


def write(args: argparse.Namespace, probe: Probe) -> None:
    rows = []
    dtype = "bfloat16" if "bfloat16" in args.dtypes else args.dtypes[0]
    pool = Pool(dtype, args.block_size, args.layout, args.pool_bytes)
    rng = np.random.default_rng(2)
    for tokens in args.write:
        new = [
            rng.standard_normal((tokens, KV_HEADS, HEAD_DIM), np.float32).astype(pool.dtype)
            for _ in range(2)
        ]
        capacity = pool.order.size * pool.block_size
        if tokens > capacity:
            continue
        slots = [rng.permutation(capacity)[:tokens] for _ in range(2)]
        for slot in slots:  # tokens of a prompt are neighbours in their blocks
            blocks = rng.permutation(pool.order.size)[: -(-tokens // pool.block_size)]
            slot[:] = (blocks[:, None] * pool.block_size + np.arange(pool.block_size)).ravel()[
                :tokens
            ]
        want = [cache.copy() for cache in pool.caches] if tokens <= 32 else None
        write_kv(*new, *pool.caches, slots[0], layout=args.layout)
        if want:
            reference.write_kv(*new, *want, slots[0], layout=args.layout)
            for got, expected in zip(pool.caches, want, strict=True):
                if not np.array_equal(got.view(np.uint16), expected.view(np.uint16)):
                    raise SystemExit("write_kv is wrong")
        nbytes = 2 * new[0].nbytes
        source, target = (np.frombuffer(aligned_zeros(nbytes), np.uint8) for _ in range(2))
        for threads in args.threads:
            set_num_threads(threads)
            ours = median_seconds(
                lambda n=new, s=slots: [
                    write_kv(*n, *pool.caches, x, layout=args.layout) for x in s
                ],
                repeats=args.repeats,
                seconds=0.02,
            )
            ours /= len(slots)
            copy = statistics.median(nbytes / probe.copy(source, target, threads) for _ in range(5))
            rows.append(
                [
                    f"write {tokens}",
                    dtype,
                    threads,
                    f"{ours * 1e6:.1f}",
                    f"{nbytes / ours / 1e9:.1f}",
                ]
                + ([f"{copy / ours:.2f}"] if tokens >= 2048 else ["-"])
            )
    print("\nwrite_kv from Python; copy is the best of memcpy and streaming stores")
    print_table(["problem", "dtype", "threads", "us", "GB/s", "of copy"], rows)


def calls(args: argparse.Namespace) -> None:
    """Short calls, hot: what a step pays besides its work."""
    rows = []
    for dtype in args.dtypes:
        pool = Pool(dtype, args.block_size, args.layout, 8 << 20)
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
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--layout", choices=["HND", "NHD"], default="HND")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--decode",
        type=numbers,
        nargs="*",
        metavar="BATCHxCONTEXTxQUERIES",
        default=[(1, 512, 1), (1, 8192, 1), (8, 2048, 1), (32, 2048, 1), (32, 2048, 4)],
    )
    parser.add_argument(
        "--prefill",
        type=numbers,
        nargs="*",
        metavar="BATCHxNEWxCACHED",
        default=[(1, 2048, 1024), (4, 512, 1024)],
    )
    parser.add_argument("--write", type=int, nargs="*", default=[1, 32, 2048, 65536])
    args = parser.parse_args()
    args.pool_bytes = 1 << 30
    if args.quick:
        args.pool_bytes, args.repeats = 64 << 20, 3
        args.decode, args.prefill, args.write = [(1, 64, 1), (4, 512, 1)], [(1, 64, 32)], [1, 2048]
    probe = Probe()
    memory = Memory(args.pool_bytes)
    print(machine())
    variants = ", ".join(_cpu.available_isas())
    print(f"{_cpu.isa()} of {variants}; {HEADS}/{KV_HEADS} heads of {HEAD_DIM}")
    calls(args)
    if args.decode:
        decode(args, probe, memory)
    if args.prefill:
        prefill(args, probe)
    if args.write:
        write(args, probe)


if __name__ == "__main__":
    main()
