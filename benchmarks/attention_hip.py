"""Attention and writes on a HIP device, as parts of its own copy bandwidth, and beside peers.

Ours is compared with the float64 oracle, and each peer with ours, before anything is timed. Times
are of many calls on one stream with one wait at the end; keys and values rotate through more memory
than a last-level cache holds (256 MB on MI300X). Copy bandwidth is that of `copy_blocks`, in the
same run: no figure of a data sheet. Peers (PyTorch, vLLM's kernel for ROCm, AITER's two) are run
where they can be imported; what a peer does not take is said.

Has not been run on a GPU yet: this file is what the first one will be measured with.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np

from _bench import print_table
from _peers_hip import peers
from rocmforge import hip, ops, reference
from rocmforge.dtypes import resolve

CASES = [  # sequences, context, query heads, key/value heads, head_dim
    (32, 2048, 32, 8, 128),
    (1, 16384, 32, 8, 128),
    (64, 1024, 16, 16, 64),
    (32, 2048, 16, 8, 256),
    (32, 2048, 16, 1, 576),
]
PEERS = ["PyTorch", "vLLM", "AITER", "AITER assembly"]
ROTATED = 600 << 20  # bytes of keys and values, at least

Runs = list[Callable[[], object]]


def seconds(function: Callable[[], object], stream: hip.Stream, repeats: int) -> float:
    """Median over five runs of the seconds of a call."""
    function()
    stream.synchronize()
    runs = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        stream.synchronize()
        runs.append((time.perf_counter() - begin) / repeats)
    return sorted(runs)[2]


def copy_bandwidth(device: hip.Device, stream: hip.Stream, repeats: int) -> float:
    """Bytes a second, read and written, of copies of large blocks."""
    pool = hip.zeros((64, 8 << 20), np.uint8, device)
    pairs = np.stack([np.arange(32), np.arange(32, 64)], axis=1).astype(np.int32)
    once = seconds(lambda: ops.copy_blocks(pool, pairs, stream=stream), stream, repeats)
    return 2 * 32 * (8 << 20) / once


class Problem:
    """A decode step of one layer in bfloat16."""

    block_size = 16

    def __init__(self, case: tuple[int, ...]) -> None:
        sequences, self.context, heads, kv_heads, dim = case
        self.case = case
        rng, dtype = np.random.default_rng(0), resolve("bfloat16")
        width = -(-self.context // self.block_size)
        pool = (sequences * width, kv_heads, self.block_size, dim)
        self.query = rng.standard_normal((sequences, heads, dim), np.float32).astype(dtype)
        self.keys, self.values = (rng.standard_normal(pool, np.float32).astype(dtype) for _ in "kv")
        self.table = rng.permutation(sequences * width).astype(np.int32).reshape(sequences, width)
        self.lens = np.full(sequences, self.context, np.int32)
        self.bytes = self.keys.nbytes + self.values.nbytes
        self.copies = max(2, min(8, -(-ROTATED // self.bytes)))

    def __str__(self) -> str:
        sequences, context, heads, kv_heads, dim = self.case
        return f"{sequences} x {context:,}, {heads}/{kv_heads} x {dim}"

    def ours(self, device: hip.Device, stream: hip.Stream) -> tuple[Runs, np.ndarray]:
        """Calls over each copy, and what they give: that of the first sequence is the oracle's."""
        query, table, lens = (
            hip.from_numpy(a, device) for a in (self.query, self.table, self.lens)
        )
        out = hip.empty(query.shape, query.dtype, device)
        pairs = [
            [hip.from_numpy(a, device) for a in (self.keys, self.values)]
            for _ in range(self.copies)
        ]

        def attend(pair: list[hip.DeviceArray]) -> object:
            return ops.paged_attention(
                query, *pair, table, lens, out=out, max_seq_len=self.context, stream=stream
            )

        attend(pairs[0])
        stream.synchronize()
        got = out.numpy()
        want = reference.paged_attention(
            self.query[:1], self.keys, self.values, self.table[:1], self.lens[:1]
        )
        np.testing.assert_allclose(got[:1].astype(float), want, atol=2e-2, rtol=2e-2)
        return [lambda pair=pair: attend(pair) for pair in pairs], got


def in_turn(runs: Runs) -> Callable[[], object]:
    """Call the next one each time."""
    turn = itertools.cycle(runs)

    def call() -> object:
        return next(turn)()

    return call


def write_seconds(tokens: int, device: hip.Device, stream: hip.Stream, repeats: int) -> float:
    """Seconds to write so many tokens of 8 heads of 128 elements to random slots."""
    rng, dtype = np.random.default_rng(0), resolve("bfloat16")
    new = rng.standard_normal((2, tokens, 8, 128), np.float32).astype(dtype)
    caches = [hip.zeros((tokens // 16, 8, 16, 128), dtype, device) for _ in range(2)]
    slots = rng.permutation(tokens).astype(np.int64)
    arrays = [hip.from_numpy(a, device) for a in new]
    slots_there = hip.from_numpy(slots, device)

    def call() -> None:
        ops.write_kv(*arrays, *caches, slots_there, stream=stream)

    call()
    stream.synchronize()
    for cache, tokens_of in zip(caches, new, strict=True):
        there = cache.numpy().swapaxes(1, 2).reshape(tokens, 8, 128)
        np.testing.assert_array_equal(there[slots].view(np.uint16), tokens_of.view(np.uint16))
    return seconds(call, stream, repeats)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    options = parser.parse_args()
    device, reason = hip.default_device()
    if device is None:
        print(f"no HIP device: {reason}")
        return
    stream = hip.Stream(device)
    repeats = 5 if options.quick else 50
    bandwidth = copy_bandwidth(device, stream, repeats)
    print(f"{device.name} ({device.architecture}), copies at {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for case in CASES[: 1 if options.quick else None]:
        problem = Problem(case)
        runs, got = problem.ours(device, stream)
        time_of_ours = seconds(in_turn(runs), stream, repeats)
        theirs = dict.fromkeys(PEERS, "")
        for name, runs_of in peers(problem, got, stream.__cuda_stream__()[1]):
            theirs[name] = f"{seconds(in_turn(runs_of), stream, repeats) * 1e6:.0f}"
        part = problem.bytes / time_of_ours / bandwidth
        rows.append((str(problem), f"{time_of_ours * 1e6:.0f}", f"{part:.2f}", *theirs.values()))
    print_table(["decode, bfloat16, us", "ours", "of copy", *PEERS], rows)
    rows = []
    for tokens in [2048] if options.quick else [32, 2048, 65536]:
        once = write_seconds(tokens, device, stream, repeats)
        part = 2 * 2 * tokens * 8 * 128 * 2 / once / bandwidth
        rows.append((f"{tokens:,} x 8 x 128", f"{once * 1e6:.1f}", f"{part:.2f}"))
    print_table(["write, bfloat16, us", "ours", "of copy"], rows)


if __name__ == "__main__":
    main()
