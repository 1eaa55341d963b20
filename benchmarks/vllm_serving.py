"""vLLM serving with this library's attention beside its own, over HTTP, on its CPU platform.

Two servers of the demo's model run side by side, of which one works at a time: each run sends the
same requests at once to one and then to the other, with prefix caching off so that every run
computes everything. The figure is prompt and new tokens a second; both servers give greedy tokens.

    pip install rocmforge[vllm,demo] accelerate
    python benchmarks/vllm_serving.py --model FOLDER

The checkpoint is made in FOLDER from the demo's weights, if it is not there.
"""

import argparse
import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _bench import machine, print_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from vllm_server import Completion, Server, made_checkpoint, prose

#: What the runs of a load take place in: on a machine that is shared, a lock.
turn = contextlib.nullcontext

LOADS = {"short": (245, 8), "long": (1800, 2)}  # prompt tokens, requests at once
NEW_TOKENS = 32


def server(model: Path, work: Path, dtype: str, ours: bool, block: int, bind: str) -> Server:
    """Start one, with memory for a cache of 16,384 float32 tokens."""
    arguments = ["--dtype", dtype, "--block-size", block, "--max-model-len", 2048]
    arguments += ["--kv-cache-memory-bytes", "800M", "--no-enable-prefix-caching"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": bind}
    return Server(model, work, *arguments, ours=ours, environment=environment)


def tokens_per_second(one: Server, prompts: list[list[int]]) -> tuple[float, list[Completion]]:
    """Answer all prompts at once."""
    begin = time.perf_counter()
    answers = one.complete_all(prompts, NEW_TOKENS)
    seconds = time.perf_counter() - begin
    return sum(len(prompt) + NEW_TOKENS for prompt in prompts) / seconds, answers


def alternate(pair: Sequence[Server], prompts: list[list[int]], runs: int) -> list[str]:
    """Cells of the table: vLLM's and ours in turn, each first as often as it can be."""
    for one in pair:  # memory is touched, caches and clocks are warm
        tokens_per_second(one, prompts[: len(prompts) // 4 + 1])
    figures: tuple[list[float], list[float]] = ([], [])
    same = 0
    for i in range(runs):
        answers = {}
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            speed, answers[j] = tokens_per_second(pair[j], prompts)
            figures[j].append(speed)
        same = sum(a == b for a, b in zip(answers[0], answers[1], strict=True))
    stock, ours = map(statistics.median, figures)
    cells = [f"{statistics.median(f):.0f} ({min(f):.0f} - {max(f):.0f})" for f in figures]
    return [*cells, f"{ours / stock:.3f}", f"{same} of {len(prompts)}"]


def compare(args: argparse.Namespace, model: Path, dtype: str) -> list[list[str]]:
    """Rows of the table for one element type."""
    rows = []
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as work:
        pair = [
            stack.enter_context(
                server(model, Path(work) / str(ours), dtype, ours, block, args.bind)
            )
            for ours, block in ((False, args.stock_block), (True, args.block))
        ]
        text = pair[0].tokens(prose(4000, 0))
        for load in args.loads:
            length, requests = LOADS[load]
            prompts = [text[17 * i : 17 * i + length] for i in range(requests)]
            with turn():
                cells = alternate(pair, prompts, args.runs)
            rows.append([f"{dtype}, {requests} x {length}", *cells])
            print(*rows[-1], sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only look whether vLLM is there")
    parser.add_argument("--model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--stock-block", type=int, default=128, help="block size of vLLM's own")
    parser.add_argument("--block", type=int, default=16, help="block size of ours")
    parser.add_argument("--bind", default="auto", help="processors, as vLLM takes them")
    args = parser.parse_args()
    if args.quick or importlib.util.find_spec("vllm") is None:
        print("serving by vLLM takes minutes, and the extra [vllm]: not measured here")
        return
    if args.model is None:
        parser.error("--model is needed")
    model = made_checkpoint(args.model)
    rows = [row for dtype in args.dtypes for row in compare(args, model, dtype)]
    print(machine())
    print(
        f"tokens a second, median (least - most) of {args.runs} runs in turn; blocks of "
        f"{args.stock_block} (vLLM's) and {args.block} (ours); processors: {args.bind}"
    )
    print_table(["load", "vLLM's", "ours", "ratio", "same tokens"], rows)


if __name__ == "__main__":
    main()
