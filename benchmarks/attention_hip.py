"""Attention, writes and block copies on a HIP device, as parts of its own copy bandwidth.

Results are compared with the float64 oracle before anything is timed. Times are of many calls on
one stream with one wait at the end; keys and values rotate through more memory than a last-level
cache holds. Copy bandwidth is that of `copy_blocks`, in the same run: no figure of a data sheet.

Has not been run on a GPU yet: this file is what the first one will be measured with.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from _bench import print_table
from rocmforge import hip, ops, reference
from rocmforge.dtypes import resolve

CASES = [  # sequences, context, query heads, key/value heads, head_dim
    (32, 2048, 32, 8, 128),
    (1, 16384, 32, 8, 128),
    (64, 1024, 16, 16, 64),
    (32, 2048, 16, 1, 576),
]


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


def decode(case: tuple[int, ...], device: hip.Device, stream: hip.Stream, repeats: int) -> float:
    """Seconds of a decode step of one layer, checked at a small size first."""
    sequences, context, heads, kv_heads, dim = case
    rng = np.random.default_rng(0)
    dtype = resolve("bfloat16")

    def make(count: int, length: int, copies: int) -> list[list[hip.DeviceArray]]:
        width = -(-length // 16)
        table = rng.permutation(count * width).astype(np.int32).reshape(count, width)
        query = rng.standard_normal((count, heads, dim), np.float32).astype(dtype)
        pool = rng.standard_normal((count * width, kv_heads, 16, dim), np.float32).astype(dtype)
        host = [query, pool, pool, table, np.full(count, length, np.int32)]
        if copies == 1:
            got = ops.paged_attention(*[hip.from_numpy(a, device) for a in host]).numpy()
            want = reference.paged_attention(*host)
            np.testing.assert_allclose(got.astype(float), want, atol=2e-2, rtol=2e-2)
        shared = [hip.from_numpy(a, device) for a in (query, table, host[4])]
        return [
            [shared[0], *(hip.from_numpy(pool, device) for _ in range(2)), *shared[1:]]
            for _ in range(copies)
        ]

    make(2, 80, 1)
    nbytes = 2 * sequences * context * kv_heads * dim * 2
    arrays = make(sequences, context, max(2, min(8, -(-(600 << 20) // nbytes))))
    out = hip.empty(arrays[0][0].shape, dtype, device)
    turn = iter(range(1 << 60))

    def call() -> None:
        ops.paged_attention(
            *arrays[next(turn) % len(arrays)], out=out, max_seq_len=context, stream=stream
        )

    return seconds(call, stream, repeats)


def main() -> None:
    """Print the table."""
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
        sequences, context, heads, kv_heads, dim = case
        time_of_call = decode(case, device, stream, repeats)
        read = 2 * sequences * context * kv_heads * dim * 2
        rows.append(
            (
                f"{sequences} x {context:,}, {heads}/{kv_heads} x {dim}",
                f"{time_of_call * 1e6:.0f}",
                f"{read / time_of_call / bandwidth:.2f}",
            )
        )
    print_table(["decode, bfloat16", "us", "of copy"], rows)


if __name__ == "__main__":
    main()
