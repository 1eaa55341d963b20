"""``rocmforge selftest``: each operation on a device against the CPU; for bug reports."""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rocmforge.cli import info
from rocmforge.cli.console import CommandError
from rocmforge.dtypes import EIGHT_BIT, resolve

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="hip:0, ...: which device to test (auto)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; give its exit status."""
    from rocmforge import hip

    device, reason = hip.default_device()
    if options.device != "auto":
        if not options.device.startswith("hip"):
            raise CommandError(f"the self-test is of HIP devices, not of {options.device}")
        device = hip.get_device(options.device)
    if device is None:
        raise CommandError(f"there is no HIP device to test: {reason}")
    for name, version in info.collect()["versions"].items():
        print(f"{name:<14} {version or 'not installed'}")
    print(f"{'device':<14} {device} {device.name} ({device.architecture})")
    print(f"{'code object':<14} {device.code_object()}")
    failed = 0
    for name, test in TESTS.items():
        begin = time.perf_counter()
        try:
            error = test(device)
            passed, text = error <= 1, f"largest error {error:.2g} of what is allowed"
        except Exception as problem:  # a bug report wants all of them
            passed, text = False, f"{type(problem).__name__}: {problem}"
        failed += not passed
        seconds = time.perf_counter() - begin
        print(f"{name:<24} {'passed' if passed else 'FAILED'}  {text}, {seconds:.2f} s")
    print("everything passed" if not failed else f"{failed} of {len(TESTS)} failed")
    return min(failed, 1)


def _problem(dtype: str, lengths: list[int], queries: list[int], head_dim: int) -> list[Any]:
    rng = np.random.default_rng(0)
    width = -(-max(lengths) // 16)
    table = rng.permutation(len(lengths) * width).astype(np.int32).reshape(len(lengths), width)
    pool = (len(lengths) * width, 2, 16, head_dim)
    query = rng.standard_normal((sum(queries), 8, head_dim), np.float32)
    caches = [rng.standard_normal(pool, np.float32).astype(resolve(dtype)) for _ in range(2)]
    cu = np.cumsum([0, *queries], dtype=np.int32)
    return [query.astype(resolve(dtype)), *caches, table, np.array(lengths, np.int32), cu]


def _attention(
    dtype: str, lengths: list[int], queries: list[int], head_dim: int, **kwargs: Any
) -> Callable[[Any], float]:
    def test(device: Any) -> float:
        from rocmforge import hip, ops

        arrays = _problem(dtype, lengths, queries, head_dim)
        want = ops.paged_attention(*arrays, **kwargs).astype(np.float64)
        moved = [hip.from_numpy(array, device) for array in arrays]
        got = ops.paged_attention(*moved, **kwargs).numpy().astype(np.float64)
        allowed = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
        return float(np.abs(got - want).max() / allowed)

    return test


def _same(pairs: Iterable[tuple[Any, np.ndarray[Any, Any]]]) -> float:
    """Compare arrays on the device with those of the CPU, bit by bit."""
    for got, want in pairs:
        if not np.array_equal(got.numpy().view(np.uint8), want.view(np.uint8)):
            return float("inf")
    return 0.0


def _write(dtype: str) -> Callable[[Any], float]:
    """Write, quantised if the elements have 8 bits, and attend to what was written."""

    def test(device: Any) -> float:
        from rocmforge import hip, ops

        rng = np.random.default_rng(0)
        key, value = rng.standard_normal((2, 100, 2, 64), np.float32)
        slots = rng.permutation(128)[:100].astype(np.int64)
        arrays = [np.zeros((8, 2, 16, 64), resolve(dtype)) for _ in range(2)]
        if dtype in EIGHT_BIT:
            arrays += [np.ones((8, 2, 16), np.float32) for _ in range(2)]
        query = rng.standard_normal((1, 8, 64), np.float32)
        batch = [np.arange(8, dtype=np.int32)[None], np.array([128], np.int32)]

        def results(place: Callable[[Any], Any]) -> tuple[list[Any], Any]:
            pools = [place(array) for array in arrays]
            scales = dict(zip(("k_scale", "v_scale"), pools[2:], strict=False))
            keys, values = pools[:2]
            ops.write_kv(place(key), place(value), keys, values, place(slots), **scales)
            table, lengths = (place(array) for array in batch)
            return pools, ops.paged_attention(place(query), keys, values, table, lengths, **scales)

        want, attended = results(np.copy)
        got, attended_there = results(lambda array: hip.from_numpy(array, device))
        error = float(np.abs(attended_there.numpy() - attended).max() / 4e-6)
        return max(error, _same(zip(got, want, strict=True)))

    return test


def _merge(device: Any) -> float:
    from rocmforge import hip, ops

    rng = np.random.default_rng(0)
    states = [rng.standard_normal((9, 3, *dim), np.float32) for dim in ((64,), (), (64,), ())]
    want, _ = ops.merge_states(*states)
    got, _ = ops.merge_states(*(hip.from_numpy(array, device) for array in states))
    return float(np.abs(got.numpy() - want).max() / 4e-6)


def _copy(device: Any) -> float:
    from rocmforge import hip, ops

    pool = np.random.default_rng(0).standard_normal((16, 2, 16, 64), np.float32)
    moved = hip.from_numpy(pool, device)
    pairs = np.array([[0, 9], [3, 12]], np.int32)
    there = [moved, ops.gather_blocks(moved, pairs[0])]
    here = [pool, ops.gather_blocks(pool, pairs[0])]
    for pools, rows in (there, here):
        ops.copy_blocks(pools, pairs)
        ops.scatter_blocks(pools, pairs[1], rows)
    return _same(zip(there, here, strict=True))


TESTS: dict[str, Callable[[Any], float]] = {
    **{f"write, {dtype}": _write(dtype) for dtype in ("float32", *EIGHT_BIT)},
    "merge of states": _merge,
    "copies of blocks": _copy,
    "decode, float32": _attention("float32", [300, 17, 1], [1, 1, 1], 64),
    "decode, float16": _attention("float16", [300, 17, 1], [1, 1, 1], 128),
    "decode, bfloat16": _attention("bfloat16", [900, 17, 1], [1, 1, 1], 128),
    "decode, head_dim 576": _attention("bfloat16", [70, 17, 1], [1, 1, 1], 576),
    "ragged prefill, float32": _attention("float32", [90, 17, 40], [90, 1, 7], 64),
    "window and soft cap": _attention(
        "float32", [90, 17, 40], [90, 1, 7], 128, window_size=(20, 0), softcap=5.0
    ),
}
