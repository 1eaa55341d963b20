"""Prefix (cascade) attention on the CPU beside plain attention: from where it pays.

A batch of sequences decodes after a common prefix. Plain attention reads the prefix once for each
sequence; with ``attend(deterministic=False)`` it is read once for all, and the two results are
merged. Both are checked against each other before they are timed, in turn, in one process.

    python benchmarks/prefix_attention.py
"""

import argparse
import statistics
import time

import numpy as np

from _bench import machine, print_table
from rocmforge import KVCache
from rocmforge.ops import set_num_threads
from rocmforge.prefix_attention import CommonPrefix, attend_with_prefix, is_worthwhile

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
OWN = 64  # tokens of each sequence behind the prefix


def decoding(batch: int, prefix: int, dtype: str) -> tuple[KVCache, object, np.ndarray]:
    """A cache, a batch of one token a sequence, and its queries."""
    blocks = (prefix + batch * (OWN + BLOCK)) // BLOCK + batch + 2
    cache = KVCache(1, blocks, KV_HEADS, HEAD_DIM, block_size=BLOCK, dtype=dtype, device="cpu")
    rng = np.random.default_rng(0)

    def step(counts: dict[int, int]) -> object:
        made = cache.append(list(counts), list(counts.values()))
        shape = (made.num_tokens, KV_HEADS, HEAD_DIM)
        key, value = (rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
        cache.write(0, key, value, made)
        return made

    cache.add_sequence(0)
    step({0: prefix})
    for i in range(1, batch):
        cache.fork(0, i)
    step(dict.fromkeys(range(batch), OWN - 1))
    made = step(dict.fromkeys(range(batch), 1))
    query = rng.standard_normal((batch, HEADS, HEAD_DIM), np.float32).astype(cache.dtype)
    return cache, made, query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 32])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[64, 128, 256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.quick:
        args.batches, args.prefixes, args.repeats = [4], [256], 3
    rows = []
    for dtype in args.dtypes:
        for threads in args.threads:
            set_num_threads(threads)
            for batch in args.batches:
                for prefix in args.prefixes:
                    rows.append(
                        [
                            f"{batch} x {prefix}",
                            dtype,
                            threads,
                            *compare(batch, prefix, dtype, args.repeats),
                        ]
                    )
    print(machine())
    print(
        f"{HEADS}/{KV_HEADS} heads of {HEAD_DIM}, blocks of {BLOCK}, {OWN} tokens behind the prefix"
    )
    print_table(
        ["sequences x prefix", "dtype", "threads", "plain us", "prefix us", "gain", "taken"], rows
    )


def compare(batch: int, prefix: int, dtype: str, repeats: int) -> list[object]:
    """Microseconds of each, the gain, and whether `attend` would take it."""
    cache, made, query = decoding(batch, prefix, dtype)
    out = np.empty_like(query)
    common = made.num_common_blocks
    arguments = (
        query, cache.k_cache(0), cache.v_cache(0), made.block_table, made.cu_seqlens_q,
    )  # fmt: skip
    options = {
        "rows": made.rows, "softcap": 0.0, "sinks": None, "mask": None, "out": out,
        "max_seqlen_q": 1, "max_seq_len": made.max_seq_len, "return_lse": False, "layout": "HND",
    }  # fmt: skip
    runs = {
        "plain": lambda: cache.attend(0, query, made, out),
        "prefix": lambda: attend_with_prefix(
            CommonPrefix.of(made, common, BLOCK), *arguments, **options
        ),
    }
    results = {name: np.array(run(), np.float64) for name, run in runs.items()}
    if not np.allclose(results["plain"], results["prefix"], atol=2e-2, rtol=2e-2):
        raise SystemExit(
            f"prefix attention differs by {np.abs(results['plain'] - results['prefix']).max()}"
        )
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            calls = 5
            start = time.perf_counter()
            for _ in range(calls):
                run()
            taken[name].append((time.perf_counter() - start) / calls * 1e6)
    plain, shared = (statistics.median(taken[name]) for name in runs)
    worthwhile = is_worthwhile(common * BLOCK, made, (-1, -1), None)
    return [f"{plain:.0f}", f"{shared:.0f}", f"{plain / shared:.2f}", "yes" if worthwhile else "no"]


if __name__ == "__main__":
    main()
