"""Replay a serving trace through the block manager: hits, evictions and preemptions of a pool."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocmforge.cli.console import CommandError, Progress, format_bytes, not_negative, positive

if TYPE_CHECKING:
    from rocmforge.cli.simulate import Outcome
    from rocmforge.cli.trace import Trace

__all__ = ["add_arguments", "run"]

SWEEP = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Pool:
    """One ``--group``: blocks, tokens that its layers see (None is all), and its layers."""

    num_blocks: int
    window: int | None = None
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a token takes in a model's cache, where the model was told."""

    pools: list[Pool]
    block_size: int
    layer_nbytes: int | None
    """Bytes of a token's key and value in one layer."""
    layers: int | None

    def nbytes(self, scale: float = 1.0) -> int | None:
        """Bytes of all pools with their blocks times `scale`."""
        if self.layer_nbytes is None:
            return None
        total = 0
        for pool in self.pools:
            layers = pool.layers or self.layers or 0
            total += scaled(pool.num_blocks, scale) * self.block_size * self.layer_nbytes * layers
        return total


def scaled(num_blocks: int, scale: float) -> int:
    """Blocks of a pool in a sweep."""
    return max(1, round(num_blocks * scale))


def _pool(text: str) -> Pool:
    numbers = [positive(part) if part else None for part in text.split(":")]
    if numbers[0] is None or len(numbers) > 3:
        raise argparse.ArgumentTypeError(f"BLOCKS[:WINDOW[:LAYERS]] is needed, not {text!r}")
    return Pool(numbers[0], *numbers[1:])


def _sizes(text: str) -> list[int]:
    return sorted({positive(part) for part in text.split(",")})


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in {".png", ".svg"}:
        raise argparse.ArgumentTypeError(f"a name that ends in .png or .svg is needed, not {text}")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "trace",
        type=Path,
        metavar="TRACE",
        help="Mooncake's JSON lines, or a .csv of arrival, prompt and output length",
    )
    parser.add_argument(
        "--num-blocks", type=positive, metavar="N", help="blocks of the pool (or --group)"
    )
    parser.add_argument(
        "--block-size", type=positive, default=16, metavar="N", help="tokens a block (16)"
    )
    parser.add_argument(
        "--max-running", type=positive, default=256, metavar="N", help="sequences at once (256)"
    )
    parser.add_argument(
        "--group",
        type=_pool,
        action="append",
        metavar="BLOCKS[:WINDOW[:LAYERS]]",
        help="a layer group's pool instead of --num-blocks; give it again for more",
    )
    parser.add_argument(
        "--watermark",
        type=not_negative,
        default=0,
        metavar="N",
        help="blocks of each pool that a new request must leave free (0)",
    )
    parser.add_argument(
        "--chunk-size",
        type=positive,
        metavar="N",
        help="append and commit prompts in pieces of N tokens, as windowed groups need",
    )
    parser.add_argument(
        "--trace-block-size",
        type=positive,
        default=512,
        metavar="N",
        help="tokens that one of the trace's hash_ids stands for (512)",
    )
    parser.add_argument(
        "--sweep",
        type=_sizes,
        nargs="?",
        const=[],
        metavar="N,N,...",
        help="replay with other pool sizes too (of the first pool; default: 1/8 to 8 times it)",
    )
    model = parser.add_argument_group("the model, to show gigabytes")
    model.add_argument("--layers", type=positive, metavar="N")
    model.add_argument("--kv-heads", type=positive, metavar="N")
    model.add_argument("--head-dim", type=positive, metavar="N")
    model.add_argument("--dtype", default="bfloat16", metavar="NAME", help="(bfloat16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw use over time, and the sweep, to a .png or .svg",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; give its exit status."""
    if options.plot:  # before the work, not after it
        from rocmforge.cli.replay_plot import require_matplotlib

        require_matplotlib()
        if not options.plot.parent.is_dir():
            raise CommandError(f"--plot: there is no folder {options.plot.parent}")
    sizes = _read_sizes(options)
    from rocmforge.cli.trace import read_trace

    trace = read_trace(options.trace, options.trace_block_size)
    first = sizes.pools[0].num_blocks
    scales = [1.0]
    if options.sweep is not None:
        scales += [size / first for size in options.sweep] or SWEEP
    scales = sorted(set(scales))
    outcomes: dict[float, Outcome] = {}
    with Progress("replaying", len(scales) * len(trace.requests), delay=1.0) as progress:
        for i, scale in enumerate(scales):
            done = partial(_show, progress, i * len(trace.requests))
            outcomes[scale] = _replay(trace, sizes, scale, options, done)
    ideal = trace.ideal_hits(sizes.block_size) / max(trace.prompt_tokens, 1)
    if options.json:
        found = _facts(trace, sizes, outcomes[1.0], ideal)
        if options.sweep is not None:
            found["sweep"] = [
                _facts(trace, sizes, outcome, ideal, scale) for scale, outcome in outcomes.items()
            ]
        print(json.dumps(found, indent=2))
    else:
        _print_outcome(trace, sizes, options.max_running, outcomes[1.0], ideal)
        if options.sweep is not None:
            _print_sweep(sizes, outcomes, ideal)
    if options.plot:
        from rocmforge.cli.replay_plot import draw

        sweep = outcomes if options.sweep is not None else None
        gigabytes = {scale: (sizes.nbytes(scale) or 0) / 1e9 for scale in outcomes}
        draw(options.plot, trace.name, sizes.block_size, outcomes[1.0], sweep, gigabytes, ideal)
    return 0


def _show(progress: Progress, before: int, done: int) -> None:
    progress.update(before + done)


def _read_sizes(options: argparse.Namespace) -> Sizes:
    if (options.num_blocks is None) == (options.group is None):
        raise CommandError("give --num-blocks, or --group for each layer group")
    pools = options.group or [Pool(options.num_blocks)]
    told = [options.kv_heads, options.head_dim]
    layers_told = [pool.layers or options.layers for pool in pools]
    nbytes = None
    if None not in told and None not in layers_told:
        from rocmforge.dtypes import resolve

        try:
            itemsize = resolve(options.dtype).itemsize
        except ValueError as error:
            raise CommandError(f"--dtype: {error}") from error
        nbytes = 2 * options.kv_heads * options.head_dim * itemsize
    elif any(value is not None for value in [*told, options.layers]):
        raise CommandError("a model is --layers, --kv-heads and --head-dim")
    return Sizes(pools, options.block_size, nbytes, options.layers)


def _replay(
    trace: Trace, sizes: Sizes, scale: float, options: argparse.Namespace, progress: Any
) -> Outcome:
    from rocmforge import KVCacheManager, LayerGroup
    from rocmforge.cli.simulate import simulate

    manager = KVCacheManager(
        block_size=sizes.block_size,
        groups=[LayerGroup(scaled(pool.num_blocks, scale), pool.window) for pool in sizes.pools],
        watermark=options.watermark,
    )
    return simulate(
        trace,
        manager,
        max_running=options.max_running,
        chunk_size=options.chunk_size,
        progress=progress,
    )


def _percentiles(nanoseconds: Any) -> tuple[float, float]:
    import numpy as np

    if not len(nanoseconds):
        return 0.0, 0.0
    p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1e3
    return float(p50), float(p99)


def _facts(
    trace: Trace, sizes: Sizes, outcome: Outcome, ideal: float, scale: float = 1.0
) -> dict[str, Any]:
    step, request = _percentiles(outcome.step_ns), _percentiles(outcome.request_ns)
    return {
        "trace": trace.name,
        "block_size": sizes.block_size,
        "num_blocks": outcome.num_blocks,
        "pool_bytes": sizes.nbytes(scale),
        "requests": outcome.requests,
        "rejected": outcome.rejected,
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "hit_tokens": outcome.hit_tokens,
        "hit_rate": outcome.hit_rate,
        "ideal_hit_rate": ideal,
        "evictions": outcome.evictions,
        "preemptions": outcome.preemptions,
        "steps": outcome.steps,
        "peak_running": outcome.peak_running,
        "peak_blocks": outcome.peak_blocks,
        "peak_utilization": outcome.peak_blocks / outcome.num_blocks,
        "mean_utilization": outcome.mean_utilization,
        "mean_fragmentation": outcome.mean_fragmentation,
        "manager_us_p50": step[0],
        "manager_us_p99": step[1],
        "manager_us_per_request_p50": request[0],
        "manager_us_per_request_p99": request[1],
        "manager_seconds": float(outcome.step_ns.sum() + outcome.request_ns.sum()) / 1e9,
    }


def _print_outcome(
    trace: Trace, sizes: Sizes, max_running: int, outcome: Outcome, ideal: float
) -> None:
    step, request = _percentiles(outcome.step_ns), _percentiles(outcome.request_ns)
    nbytes = sizes.nbytes()
    memory = f", {format_bytes(nbytes)}" if nbytes else ""
    rejected = f"; {outcome.rejected:,} do not fit and were left out" if outcome.rejected else ""
    rows = [
        ("trace", f"{trace.name}: {outcome.requests:,} requests{rejected}"),
        ("tokens", f"{outcome.prompt_tokens:,} of prompts, {outcome.output_tokens:,} generated"),
        (
            "pool",
            f"{outcome.num_blocks:,} blocks of {sizes.block_size} tokens{memory}; "
            f"at most {max_running:,} running, {outcome.peak_running:,} were",
        ),
        (
            "hits",
            f"{outcome.hit_tokens:,} tokens, {outcome.hit_rate:.2%} of the prompts; "
            f"a cache that forgets nothing: {ideal:.2%}",
        ),
        ("evictions", f"{outcome.evictions:,} blocks"),
        ("preemptions", f"{outcome.preemptions:,}"),
        (
            "use",
            f"peak {outcome.peak_blocks:,} blocks, {outcome.peak_blocks / outcome.num_blocks:.1%}; "
            f"mean {outcome.mean_utilization:.1%} over {outcome.steps:,} steps",
        ),
        ("unfilled", f"{outcome.mean_fragmentation:.2%} of the slots in use"),
        ("manager", f"{step[0]:.1f} us a step, p99 {step[1]:.1f}"),
        ("", f"{request[0]:.1f} us a request, p99 {request[1]:.1f}"),
    ]
    for name, text in rows:
        print(f"{name:<12}{text}")


def _print_sweep(sizes: Sizes, outcomes: dict[float, Outcome], ideal: float) -> None:
    print(
        f"\n{'blocks':>10} {'memory':>9} {'hits':>7} {'of ideal':>8} {'evictions':>11} "
        f"{'preempted':>9} {'mean use':>8} {'rejected':>8}"
    )
    for scale, outcome in outcomes.items():
        nbytes = sizes.nbytes(scale)
        print(
            f"{outcome.num_blocks:>10,} {format_bytes(nbytes) if nbytes else '-':>9} "
            f"{outcome.hit_rate:>7.2%} {outcome.hit_rate / ideal if ideal else 1:>8.1%} "
            f"{outcome.evictions:>11,} {outcome.preemptions:>9,} "
            f"{outcome.mean_utilization:>8.1%} {outcome.rejected:>8,}"
        )
    sys.stdout.flush()
