"""The table at the end of the demo: speed, where the time went, blocks and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from rocmforge.cli.console import format_bytes
from rocmforge.cli.generate import Generation
from rocmforge.cli.linear import Threads
from rocmforge.cli.llama import Clock

__all__ = ["Reading", "format_report", "measure_reading"]


@dataclass(frozen=True)
class Reading:
    """What it costs to read the weights once."""

    num_bytes: int
    seconds: float


def measure_reading(
    matrices: Sequence[npt.NDArray[np.float32]], threads: Threads, repeats: int = 5
) -> Reading:
    """Read every weight once, with all threads and nothing else to do; the fastest of some tries.

    The largest element of a matrix needs one pass over it, and NumPy finds it at the speed of
    memory.
    """

    def read(part: int) -> None:
        for matrix in matrices:
            flat = matrix.reshape(-1)
            size = flat.size
            mine = flat[size * part // threads.count : size * (part + 1) // threads.count]
            if mine.size:
                mine.max()

    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        threads.run(read)
        seconds.append(perf_counter() - start)
    return Reading(sum(matrix.nbytes for matrix in matrices), min(seconds))


def format_report(run: Generation, reading: Reading, dtype: str) -> str:
    """Give the table of a run as text."""
    shared = f"; the {run.shared_tokens} of the system prompt once" if run.shared_tokens else ""
    lines = [f"prefill   {_speed(run.prefill_tokens, run.prefill)}{shared}"]
    if run.step_widths:
        lines += _decode_lines(run, reading)
    stats, count = run.stats, len(run.answers)
    longest = max(len(answer.prompt) + len(answer.tokens) - 1 for answer in run.answers)
    dense = count * run.block_bytes // stats.block_size  # bytes a position
    lines += [
        f"blocks    {stats.used_blocks} of {stats.block_size} tokens in use, {stats.shared_blocks} "
        f"of them shared; {stats.references} without sharing",
        f"memory    {format_bytes(stats.used_blocks * run.block_bytes)} of {dtype} keys and values",
        f"          {count} dense caches: {format_bytes(longest * dense)} for the {longest} tokens "
        f"of the longest, {format_bytes(run.context_length * dense)} for the model's "
        f"{run.context_length}",
    ]
    return "\n".join(lines)


def _decode_lines(run: Generation, reading: Reading) -> list[str]:
    # Steps narrow as answers end; those of full width are the ones that are alike.
    widest = max(run.step_widths)
    widths = zip(run.step_seconds, run.step_widths, strict=True)
    step = median(seconds for seconds, width in widths if width == widest)
    steps = len(run.step_seconds)
    lines = [
        f"decode    {_speed(sum(run.step_widths), run.decode)}; {steps} steps",
        f"step      {1e3 * step:.1f} ms with {widest} in the batch (median): "
        f"{step / reading.seconds:.2f} x reading the weights once",
        f"          ({format_bytes(reading.num_bytes)} in {1e3 * reading.seconds:.1f} ms, "
        f"{reading.num_bytes / reading.seconds / 1e9:.1f} GB/s)",
    ]
    for name, seconds in run.decode.seconds.items():
        share = seconds / run.decode.total
        note = "   norms, RoPE, SwiGLU, text" if name == "rest" else ""
        lines.append(
            f"          {name:<9} {1e3 * seconds / steps:6.2f} ms a step {share:6.1%}{note}"
        )
    return lines


def _speed(tokens: int, clock: Clock) -> str:
    return f"{tokens} tokens in {clock.total:.2f} s, {tokens / clock.total:.1f} tokens/s"
