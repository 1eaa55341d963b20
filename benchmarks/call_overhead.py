"""What a call costs with PyTorch's tensors, against the same call with NumPy arrays.

python benchmarks/call_overhead.py [--quick]

Small calls, whose time is reading arguments and making results: a decode step of four sequences of
up to 16 tokens, and its write. Each way computes the same, which is checked first. Rounds take
turns, so that what else the machine does hits all of them; shown are medians of rounds.

What was learnt (two cores of a Zen 4, PyTorch 2.13): through `__dlpack__` each tensor costs 4 us
and asking for its device 3 us, both Python in PyTorch, and a decode step has five. DLPack's
exchange API, a table of C functions on the type, brings a tensor below 0.2 us and makes the result
in PyTorch's memory. What remains of attention's 3.5 us over NumPy (two cores of a Xeon with AMX,
4.5 before types were looked up in a table and arguments in one pass): 2.1 in reading five tensors
and making the result, of which PyTorch's empty tensor is 0.7; 0.6 in looking for gradients and
subclasses; the rest two Python calls. An operator of torch.library goes through PyTorch's
dispatcher, which only graphs need: the last row of each table is an operator of the same arguments
that does nothing, and so what of the row above is PyTorch's. A kernel for gradients
(`torch.library.register_autograd`) is called first, in Python too, also where none is wanted:
without it the operator for attention took 14 us instead of 22 (two cores of a Xeon with AMX).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rocmforge import ops, set_num_threads

try:
    import torch
except ModuleNotFoundError:
    print("nothing to measure: PyTorch is not installed (extra torch)")
    raise SystemExit(0) from None

from rocmforge.integrations import torch as integration

LIBRARY = torch.library.Library("rocmforge_idle", "DEF")


def rounds(calls: dict[str, Callable[[], Any]], number: int, repeats: int) -> dict[str, float]:
    """Microseconds a call, the median of rounds that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(number):
                call()
            times[name].append((time.perf_counter() - begin) / number * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def idle(name: str, result: Any) -> Any:
    """An operator with the arguments of one of ours, which gives a result that is there."""
    schema = str(getattr(torch.ops.rocmforge, name).default._schema)
    LIBRARY.define(schema.removeprefix("rocmforge::"))
    LIBRARY.impl(name, lambda *_, **__: result, "CompositeExplicitAutograd")
    return getattr(torch.ops.rocmforge_idle, name)


def show(what: str, times: dict[str, float]) -> None:
    base = times["NumPy"]
    print(f"{what}: NumPy {base:.2f} us")
    for name, value in times.items():
        if name != "NumPy":
            print(f"  {name:36} {value:6.2f} us, {value - base:+.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="check it and time a little")
    quick = parser.parse_args().quick
    number, repeats = (50, 3) if quick else (2000, 15)
    set_num_threads(1)

    rng = np.random.default_rng(0)
    query = rng.standard_normal((4, 8, 64), np.float32)
    key, value = rng.standard_normal((2, 4, 2, 64), np.float32)
    k_cache, v_cache = rng.standard_normal((2, 8, 2, 16, 64), np.float32)
    table = np.arange(4, dtype=np.int32)[:, None]
    lens = np.array([3, 4, 5, 16], np.int32)
    slots = np.array([2, 19, 36, 63])
    arrays = (query, k_cache, v_cache, table, lens)
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    written = (key, value, k_cache, v_cache, slots)
    written_tensors = tuple(torch.from_numpy(array) for array in written)

    attention: dict[str, Callable[[], Any]] = {
        "NumPy": lambda: ops.paged_attention(*arrays),
        "rocmforge.ops": lambda: ops.paged_attention(*tensors),
        "rocmforge.integrations.torch": lambda: integration.paged_attention(*tensors),
        "torch.ops.rocmforge": lambda: torch.ops.rocmforge.paged_attention(*tensors)[0],
    }
    write: dict[str, Callable[[], Any]] = {
        "NumPy": lambda: ops.write_kv(*written),
        "rocmforge.ops": lambda: ops.write_kv(*written_tensors),
        "rocmforge.integrations.torch": lambda: integration.write_kv(*written_tensors),
        "torch.ops.rocmforge": lambda: torch.ops.rocmforge.write_kv(*written_tensors),
    }
    want = attention["NumPy"]()
    for call in attention.values():
        np.testing.assert_array_equal(np.asarray(call()), want)
    for call in write.values():
        k_cache[:] = 0
        call()
        np.testing.assert_array_equal(k_cache[0, :, 2], key[0])
    result = torch.ops.rocmforge.paged_attention(*tensors)
    nothing, nothing_written = idle("paged_attention", result), idle("write_kv", None)
    attention["an operator that does nothing"] = lambda: nothing(*tensors)[0]
    write["an operator that does nothing"] = lambda: nothing_written(*written_tensors)
    show("paged_attention", rounds(attention, number, repeats))
    show("write_kv", rounds(write, number, repeats))


if __name__ == "__main__":
    main()
