"""What the benchmarks share: a timer that takes medians, a table, and a line about the machine."""

import contextlib
import gc
import os
import pathlib
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def median_seconds(
    function: Callable[[], object], *, repeats: int = 9, seconds: float = 0.05
) -> float:
    """Median over `repeats` runs of the seconds a call takes.

    A run calls the function as often as fills `seconds`, so that the clock's resolution and the
    loop do not count. The first calls, which warm caches up, are not measured.
    """
    function()
    start = time.perf_counter()
    function()
    calls = max(1, int(seconds / max(time.perf_counter() - start, 1e-9)))
    runs = []
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            runs.append((time.perf_counter() - start) / calls)
    finally:
        if collects:
            gc.enable()
    return statistics.median(runs)


def median_once(prepare: Callable[[], Callable[[], object]], *, repeats: int = 5) -> float:
    """Median seconds of a call that can run only once: `prepare` makes the next one, untimed."""
    runs = []
    for _ in range(repeats):
        function = prepare()
        gc.collect()
        start = time.perf_counter()
        function()
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


@contextlib.contextmanager
def threads_apart() -> Iterator[None]:
    """Within it, this thread has the first processor, and those that there are have the others.

    Where the scheduler wakes a thread on the processor of who woke it, the two take turns: a read
    that takes as long as a time slice or two then gets what one thread gets, now and then.
    """
    tasks = pathlib.Path("/proc/self/task")
    before: dict[int, set[int]] = {}
    if tasks.exists() and len(os.sched_getaffinity(0)) > 1:
        first, *others = sorted(os.sched_getaffinity(0))
        for thread in map(int, os.listdir(tasks)):
            with contextlib.suppress(OSError):  # it has ended
                before[thread] = os.sched_getaffinity(thread)
                here = {first} if thread == threading.get_native_id() else set(others)
                os.sched_setaffinity(thread, here)
    try:
        yield
    finally:
        for thread, processors in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, processors)


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header; the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        aligned = [row[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(aligned).rstrip())


def machine() -> str:
    """CPU, cores and versions: what a reader needs to compare numbers."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, NumPy {np.__version__}"
