"""The picture of a replay: what the pool was used for, and what other sizes would give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rocmforge.cli.console import CommandError

if TYPE_CHECKING:
    from rocmforge.cli.simulate import Outcome

__all__ = ["draw", "require_matplotlib"]

# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart.
KINDS = (
    ("shared", "#0072b2", "held by several sequences"),
    ("own", "#56b4e9", "held by one"),
    ("cached", "#e69f00", "cached, held by none"),
    ("free", "#e8e8e8", "free"),
)
HITS, PREEMPTIONS = "#009e73", "#d55e00"


def require_matplotlib() -> None:
    """Say how to get it where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError(
            '--plot needs matplotlib; install it with: pip install "rocmforge[plot]"'
        ) from error


def draw(
    path: Path,
    name: str,
    block_size: int,
    outcome: Outcome,
    sweep: Mapping[float, Outcome] | None,
    gigabytes: Mapping[float, float],
    ideal: float,
) -> None:
    """Write the picture to a file, whose suffix says what kind of file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8 if sweep else 4.2), layout="constrained")
    axes = figure.subplots(2 if sweep else 1, squeeze=False)[:, 0]
    _draw_use(axes[0], name, block_size, outcome)
    if sweep:
        _draw_sweep(axes[1], sweep, gigabytes, ideal)
    try:
        figure.savefig(path, dpi=144)
    except OSError as error:
        raise CommandError(f"--plot: {path}: {error.strerror or error}") from error


def _draw_use(axes: Any, name: str, block_size: int, outcome: Outcome) -> None:
    steps = [sample.step for sample in outcome.samples]
    layers = [[getattr(sample, kind) for sample in outcome.samples] for kind, _, _ in KINDS]
    axes.stackplot(
        steps,
        *layers,
        labels=[label for _, _, label in KINDS],
        colors=[colour for _, colour, _ in KINDS],
        linewidth=0,
    )
    axes.set_title(
        f"{name}: {outcome.requests:,} requests, {outcome.num_blocks:,} blocks of {block_size} "
        f"tokens, {outcome.hit_rate:.1%} hits",
        loc="left",
        fontsize="medium",
    )
    axes.set_xlabel("step (a token for each running sequence)")
    axes.set_ylabel("blocks")
    axes.margins(0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )  # in the order in which they are stacked, beside them


def _draw_sweep(
    axes: Any, sweep: Mapping[float, Outcome], gigabytes: Mapping[float, float], ideal: float
) -> None:
    has_memory = any(gigabytes.values())
    where = [
        gigabytes[scale] if has_memory else outcome.num_blocks for scale, outcome in sweep.items()
    ]
    (hits,) = axes.plot(
        where,
        [100 * outcome.hit_rate for outcome in sweep.values()],
        marker="o",
        color=HITS,
        label="hits",
    )
    limit = axes.axhline(100 * ideal, color=HITS, linestyle=":", label="hits, nothing forgotten")
    axes.set_title("other sizes of the pool", loc="left", fontsize="medium")
    axes.set_xscale("log")
    axes.set_xticks(where, [f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in where])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("pool, GB" if has_memory else "blocks in the pool")
    axes.set_ylabel("hits, % of prompt tokens")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    right = axes.twinx()
    (preemptions,) = right.plot(
        where,
        [outcome.preemptions for outcome in sweep.values()],
        marker="s",
        color=PREEMPTIONS,
        label="preemptions (right)",
    )
    right.set_ylabel("preemptions")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter("{x:,.0f}")
    lines = [hits, limit, preemptions]
    axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.1, 1.0), frameon=False)
