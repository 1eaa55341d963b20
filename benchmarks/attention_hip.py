"""Attention, writes and block copies on a HIP device, as parts of its own copy bandwidth.

Ours is compared with the float64 oracle, at a small size, and each peer with ours, before anything
is timed. Peers (PyTorch, vLLM's kernel for ROCm, AITER's two) decode bfloat16 where they can be
imported; what one does not take is said. Times are of many calls on one stream with one wait at the
end; what decode steps read, and what writes of many tokens touch, rotates through more memory than
a last-level cache holds. Copy bandwidth is that of `copy_blocks`, in the same run: no figure of a
data sheet. What counts as moved is what no implementation can avoid: keys and values of a decode
step once, of a write what is read and what is written.

Has not been run on a GPU yet: this file is what the first one will be measured with. Tests run it
with --quick on the simulated device, where its times say nothing.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from _bench import print_table
from _peers_hip import PEERS, Runs, peers
from rocmforge import hip, ops, reference
from rocmforge.dtypes import resolve

DECODE = [  # sequences, context, query heads, key/value heads, head_dim, elements
    (32, 2048, 32, 8, 128, "bfloat16"),
    (1, 16384, 32, 8, 128, "bfloat16"),
    (64, 1024, 16, 16, 64, "bfloat16"),
    (32, 2048, 16, 8, 256, "bfloat16"),
    (32, 2048, 16, 1, 576, "bfloat16"),
    (32, 2048, 32, 8, 128, "float8_e4m3fn"),
    (32, 2048, 32, 8, 128, "float8_e4m3fnuz"),
    (32, 2048, 32, 8, 128, "int8"),
]
PREFILL = [(4, 2048, 32, 8, 128, "bfloat16"), (1, 8192, 32, 8, 128, "bfloat16")]
WRITES = [(8192, 8, 128, "bfloat16"), (8192, 8, 128, "float8_e4m3fn"), (32, 8, 128, "bfloat16")]
CACHED = 600 << 20  # bytes that no cache in front of the memory holds

Case = tuple[int, int, int, int, int, str]


@dataclass(frozen=True)
class Problem:
    """A decode step as the peers take it: arrays on the host, and how often to have the caches."""

    name: str
    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    table: np.ndarray
    lens: np.ndarray
    copies: int
    block_size: int = 16

    def __str__(self) -> str:
        return self.name

    @property
    def context(self) -> int:
        """Tokens of every sequence."""
        return int(self.lens[0])


def in_turn(runs: Runs) -> Callable[[], object]:
    """Call the next one each time."""
    turn = itertools.cycle(runs)

    def call() -> object:
        return next(turn)()

    return call


class Bench:
    """A device, a stream on it, and how much of its time and memory to take."""

    def __init__(self, device: hip.Device, quick: bool) -> None:
        self.device, self.stream, self.quick = device, hip.Stream(device), quick
        self.repeats = 1 if quick else 50
        self.rng = np.random.default_rng(0)
        self.bandwidth = self.copies()

    def up(self, *arrays: np.ndarray) -> list[hip.DeviceArray]:
        moved = [hip.from_numpy(array, self.device, self.stream) for array in arrays]
        self.stream.synchronize()
        return moved

    def seconds(self, function: Callable[[], object]) -> float:
        """Median over five runs of the seconds of a call; one run if it is to be quick."""
        function()
        self.stream.synchronize()
        runs = []
        for _ in range(1 if self.quick else 5):
            begin = time.perf_counter()
            for _ in range(self.repeats):
                function()
            self.stream.synchronize()
            runs.append((time.perf_counter() - begin) / self.repeats)
        return statistics.median(runs)

    def copies(self) -> float:
        """Bytes a second, read and written, of copies of large blocks."""
        block = (8 << 10) if self.quick else (8 << 20)
        pool = hip.zeros((64, block), np.uint8, self.device, self.stream)
        pairs = np.stack([np.arange(32), np.arange(32, 64)], axis=1).astype(np.int32)
        once = self.seconds(lambda: ops.copy_blocks(pool, pairs, stream=self.stream))
        return 2 * 32 * block / once

    def pools(self, shape: tuple[int, ...], dtype: str) -> list[np.ndarray]:
        """Keys and values; quantised ones with a scale of 0.02."""
        kind = resolve(dtype)
        return [
            reference.quantise(x, np.float32(0.02), kind) if kind.itemsize == 1 else x.astype(kind)
            for x in self.rng.standard_normal((2, *shape), np.float32)
        ]

    def attention(self, case: Case, prefill: bool, name: str) -> tuple[float, dict[str, float]]:
        """Seconds of a step of one layer: a new token a sequence, or all of them; and of peers."""
        sequences, context, heads, kv_heads, dim, dtype = case
        scales = {} if dtype == "bfloat16" else {"k_scale": 0.02, "v_scale": 0.02}

        def make(count: int, length: int) -> list[np.ndarray]:
            width = -(-length // 16)
            table = self.rng.permutation(count * width).astype(np.int32).reshape(count, width)
            tokens = length if prefill else 1
            query = self.rng.standard_normal((count * tokens, heads, dim), np.float32)
            pools = self.pools((count * width, kv_heads, 16, dim), dtype)
            lengths = np.full(count, length, np.int32)
            cu = np.arange(count + 1, dtype=np.int32) * tokens
            return [query.astype(resolve("bfloat16")), *pools, table, lengths, cu]

        # long enough to be split, where that does not take minutes
        host = make(2, (20 if self.quick else 300) if prefill else (80 if self.quick else 3000))
        got = ops.paged_attention(*self.up(*host), **scales, stream=self.stream).numpy(self.stream)
        want = reference.paged_attention(*host, **scales)
        np.testing.assert_allclose(got.astype(float), want, atol=2e-2, rtol=2e-2)

        query, *pools, table, lengths, cu = make(sequences, context)
        nbytes = sum(pool.nbytes for pool in pools)
        count = 1 if self.quick or prefill else max(2, min(8, -(-CACHED // nbytes)))
        turn = itertools.cycle([self.up(*pools) for _ in range(count)])
        (query_there, *batch) = self.up(query, table, lengths, cu)
        out = hip.empty(query.shape, resolve("bfloat16"), self.device)
        bounds = {"max_seq_len": context, "max_seqlen_q": context if prefill else 1}
        once = self.seconds(
            lambda: ops.paged_attention(
                query_there, *next(turn), *batch, out=out, **bounds, **scales, stream=self.stream
            )
        )
        if prefill or dtype != "bfloat16":
            return once, {}
        problem = Problem(name, query, *pools, table, lengths, count)
        present = peers(problem, out.numpy(self.stream), self.stream.__cuda_stream__()[1])
        return once, {peer: self.seconds(in_turn(runs)) for peer, runs in present}

    def write(self, tokens: int, heads: int, dim: int, dtype: str, moved: int) -> float:
        """Seconds of a write; quantised caches get a scale of each token."""
        blocks = 2 * -(-tokens // 16) if self.quick else 8192
        count = 2 if self.quick else min(-(-CACHED // moved), blocks * 16 // tokens, 64)
        new = self.rng.standard_normal((count, 2, tokens, heads, dim), np.float32)
        new = new.astype(resolve("bfloat16"))
        slots = self.rng.permutation(blocks * 16)[: count * tokens].astype(np.int64)
        slots = slots.reshape(count, tokens)
        quantised = resolve(dtype).itemsize == 1
        arrays = [np.zeros((blocks, heads, 16, dim), resolve(dtype)) for _ in range(2)]
        if quantised:
            arrays += [np.zeros((blocks, heads, 16), np.float32) for _ in range(2)]
        there = self.up(*arrays)
        sets = [self.up(*pair, where) for pair, where in zip(new, slots, strict=True)]
        turn = itertools.cycle(sets)
        scales = dict(zip(("k_scale", "v_scale"), there[2:], strict=False))

        def call() -> None:
            key, value, where = next(turn)
            ops.write_kv(key, value, *there[:2], where, **scales, stream=self.stream)

        host = dict(zip(scales, arrays[2:], strict=True))
        for pair, where in zip(new, slots, strict=True):
            call()
            reference.write_kv(*pair, *arrays[:2], where, **host)
        for got, want in zip(there, arrays, strict=True):
            got = got.numpy(self.stream)
            np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
        return self.seconds(call)

    def row(
        self,
        name: str,
        once: float,
        moved: float,
        operations: float = 0.0,
        others: Mapping[str, float] = MappingProxyType({}),
    ) -> list[str]:
        """A line of the table; `moved` bytes, 0 where something else than memory decides."""
        rate = [f"{moved / once / 1e9:.3g}", f"{moved / once / self.bandwidth:.2f}"]
        return [
            name,
            f"{once * 1e6:.0f}",
            *(rate if moved else ["", ""]),
            f"{operations / once / 1e12:.3g}" if operations else "",
            *(f"{others[peer] * 1e6:.0f}" if peer in others else "" for peer in PEERS),
        ]

    def rows(self) -> list[list[str]]:
        found = []
        decode, prefill, writes = DECODE, PREFILL, WRITES
        if self.quick:
            decode, prefill = (
                [(2, 20, *case[2:]) for case in cases] for cases in (DECODE, PREFILL)
            )
            writes = [(32, *case[1:]) for case in WRITES]
        for case in decode:
            sequences, context, heads, kv_heads, dim, dtype = case
            name = f"decode, {sequences} x {context:,}, {heads}/{kv_heads} x {dim}, {dtype}"
            read = 2 * sequences * context * kv_heads * dim * resolve(dtype).itemsize
            once, others = self.attention(case, False, name)
            found.append(self.row(name, once, read, others=others))
        for case in prefill:
            sequences, context, heads, kv_heads, dim, dtype = case
            name = f"prefill, {sequences} x {context:,}, {heads}/{kv_heads} x {dim}, {dtype}"
            pairs = sequences * context * (context + 1) // 2  # a causal query and what it sees
            once, _ = self.attention(case, True, name)
            found.append(self.row(name, once, 0, 4 * pairs * heads * dim))
        for tokens, heads, dim, dtype in writes:
            moved = 2 * tokens * heads * dim * (2 + resolve(dtype).itemsize)
            name = f"write, {tokens:,} tokens, {heads} x {dim}, {dtype}"
            found.append(self.row(name, self.write(tokens, heads, dim, dtype, moved), moved))
        return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases: does it work at all")
    options = parser.parse_args()
    device, reason = hip.default_device()
    if device is None:
        print(f"no HIP device: {reason}")
        return
    bench = Bench(device, options.quick)
    print(f"{device.name} ({device.architecture}), copies at {bench.bandwidth / 1e9:.0f} GB/s")
    print_table(["operation", "us", "GB/s", "of copy", "TFLOP/s", *PEERS], bench.rows())


if __name__ == "__main__":
    main()
