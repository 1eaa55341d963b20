"""What bounds decode on each GPU: published rates, and the inner loop of the code object itself.

For each chip and shape: bytes and operations, the floor in microseconds from the chip's bandwidth
and matrix rate, and from the disassembly of the kernel that serves the shape the instructions of
its inner loop by kind, per 1,024 bytes of keys and values. Two claims are checked:

issue    cycles that a SIMD unit needs to issue one round of the loop (LLVM's scheduling model:
         llvm-mca, the reciprocal throughput), or that its matrix instructions take at the
         published rate if that is more, over cycles that memory needs for the round's bytes.
         Below 1, arithmetic hides behind memory.
flight   half of the bytes of a round (a wave waits for its keys, or for its values) in all waves
         that a compute unit holds, over bandwidth x latency. Above 1, enough is under way.

Where waves of a workgroup have different rows, they read the same keys and values: memory gives
them once, and each wave counts for its part of them alone. The last column says which claim a row
misses, and which kind of instruction most of its loop is.

The loop is the cheapest way around it: no mask, no soft cap, no rescaling. Latency is an assumption
(--latency), not a published figure. Nothing here ran on a GPU.

A write of new tokens into the cache aims at 0.8 of the bandwidth of a copy, which reads and writes
the same bytes. Its loop goes around once or twice a vector, so that what comes before it counts:
the third table takes the cheapest way through the whole kernel, its `issue` in cycles of all of it
over those that memory needs for what a wave reads and writes at that 0.8, and its `flight` is what
all waves of a compute unit read and write, over bandwidth x latency x the times that a wave waits
for vector loads, one after the other. (8-bit caches are left out: the cheapest way through their
kernels is one that no wave can take.)

Needs code objects (ROCMFORGE_HIP_ARCHS=all), llvm-objdump and llvm-mca of LLVM 19 or newer (22 for
gfx950); prints the floors alone without them.

The vector kernels of gfx906 are those of the generic object of its family.

Sources, as found by search in 2026-11, mostly in pages that quote AMD's own: compute units, highest
clock and bandwidth of AMD's product pages and data sheets (Instinct MI50; MI250X, of which one die
is half; MI300X; MI355X; Radeon RX 6900 XT, 7900 XTX, 9060 XT, 9070 XT; Ryzen AI Max+ 395).
Operations of a compute unit in a cycle, float16 matrix and dense, are those of the architectures
(CDNA 2: 1,024, CDNA 3: 2,048, CDNA 4: 4,096, RDNA 3: 512, RDNA 4: 1,024; GCN 5 and RDNA 2 have no
matrix unit and 128 of float32), checked by units x clock x operations, which give the peaks that
are published: 13.4, 191.5 (a die), 1,307, 2,517, 23.0, 123, 103 and 195 TFLOP/s.
"""

import argparse
import heapq
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from _bench import print_table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hip_objects import Kernel, kernels


@dataclass(frozen=True)
class Chip:
    """Published figures."""

    name: str
    units: int  # compute units
    clock: float  # GHz
    bandwidth: float  # GB/s
    operations: int  # of a compute unit in a cycle
    simds: int = 2  # of a compute unit; a wave of 64 is issued over 4 cycles on 4 of them

    @property
    def rate(self) -> float:
        """TFLOP/s."""
        return self.units * self.clock * self.operations / 1e3


CHIPS = {
    "gfx906": Chip("MI50", 60, 1.746, 1024, 128, 4),
    "gfx90a": Chip("MI250X, one die", 110, 1.7, 1638.4, 1024, 4),
    "gfx942": Chip("MI300X", 304, 2.1, 5300, 2048, 4),
    "gfx950": Chip("MI355X", 256, 2.4, 8000, 4096, 4),
    "gfx1030": Chip("RX 6900 XT", 80, 2.25, 512, 128),
    "gfx1100": Chip("RX 7900 XTX", 96, 2.5, 960, 512),
    "gfx1151": Chip("Ryzen AI Max+ 395", 40, 2.9, 256, 512),
    "gfx1200": Chip("RX 9060 XT", 32, 3.13, 320, 1024),
    "gfx1201": Chip("RX 9070 XT", 64, 2.97, 640, 1024),
}
NO_MATRIX = ("gfx906", "gfx1030")
OBJECTS = {"gfx906": "gfx9-generic"}  # of which architecture, if not its own


@dataclass(frozen=True)
class Shape:
    """A decode step of one layer: every sequence has `tokens` query tokens."""

    sequences: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    element: str = "bf16"
    tokens: int = 1

    @property
    def size(self) -> int:
        """Bytes of an element of the cache."""
        return 2 if self.element in ("bf16", "f16") else 1

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are read."""
        return 2 * self.sequences * self.context * self.kv_heads * self.head_dim * self.size

    @property
    def bytes(self) -> int:
        """Bytes that any kernel moves: those, queries, outputs and the table (blocks of 16)."""
        vectors = 2 * self.sequences * self.tokens * self.heads * self.head_dim * 2
        return self.cache_bytes + vectors + self.sequences * self.context // 16 * 4

    @property
    def operations(self) -> int:
        """Multiplications and additions of the two products."""
        return 4 * self.sequences * self.tokens * self.context * self.heads * self.head_dim

    def __str__(self) -> str:
        rows = f" x {self.tokens} tokens" if self.tokens > 1 else ""
        return (
            f"{self.sequences} x {self.context:,}{rows}, {self.heads}/{self.kv_heads} x "
            f"{self.head_dim} {self.element}"
        )


SIZES = (64, 128, 256, 512, 576)  # RF_SIZE_INSTANCES
SHAPES = [
    Shape(32, 2048, 32, 8, 128),
    Shape(32, 2048, 32, 8, 128, "f16"),
    Shape(32, 2048, 32, 8, 128, tokens=4),
    Shape(32, 2048, 32, 8, 128, "f16", tokens=4),
    Shape(32, 2048, 64, 8, 64),
    Shape(32, 2048, 16, 8, 256),
    Shape(32, 2048, 32, 8, 128, "e4m3fn"),
    Shape(32, 2048, 32, 8, 96, "f16"),
    Shape(32, 2048, 32, 8, 96),
    Shape(32, 2048, 32, 8, 192),
    Shape(32, 2048, 32, 8, 192, "e4m3fn"),
]


# ---------------------------------------------------------------- the inner loop


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    text: str
    target: int | None  # of a branch

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def kind(self) -> str:
        """Loads, stores, waits, LDS, matrix, vector, scalar."""
        for pattern, kind in KINDS:
            if re.match(pattern, self.name):
                return kind
        return "scalar"

    @property
    def products(self) -> int:
        """Multiplications of a lane that are added to something."""
        return sum(2 if "dot2" in name else 1 for name in re.findall(MULTIPLY_ADD, self.text))

    def moved(self, way: str) -> int:
        """Bytes of keys or values that a lane loads or stores; narrower ones are other things."""
        found = re.match(rf"global_{way}_(dwordx4|b128|dwordx2|b64)\b", self.name)
        return 0 if found is None else 16 if found[1] in ("dwordx4", "b128") else 8


MULTIPLY_ADD = r"v_(?:dual_)?(?:fmac|fma|fma_mix|mac|mad|mad_mix|dot2\w*?)_f32\w*"
KINDS = [
    (r"(global|flat|buffer)_load", "loads"),
    (r"(global|flat|buffer)_store", "stores"),
    (r"s_wait|s_delay_alu|s_nop|s_clause", "waits"),
    (r"ds_", "LDS"),
    (r"v_(smfmac|mfma|wmma|swmmac)", "matrix"),
    (r"v_", "vector"),
]


def disassemble(tool: str, path: Path, kernel: str) -> dict[int, Instruction]:
    """Instructions of a kernel by address."""
    text = subprocess.run(
        [tool, "-d", f"--disassemble-symbols={kernel}", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    start, found = 0, {}
    for line in text.splitlines():
        head = re.match(r"([0-9a-f]+) <" + kernel + ">:", line)
        if head:
            start = int(head[1], 16)
        body = re.match(r"\s+(\S.*?)\s*// ([0-9A-F]+): (.*)", line)
        if body:
            offset = re.search(r"<" + kernel + r"(?:\+0x([0-9a-f]+))?>", body[3])
            target = start + int(offset[1] or "0", 16) if offset else None
            found[int(body[2], 16)] = Instruction(body[1], target)
    return found


def cheapest_way(
    code: dict[int, Instruction], begin: int, end: int, way: str, nbytes: int, products: int = 0
) -> list[Instruction]:
    """Instructions of the cheapest way from one address to another that moves so many bytes a lane.

    Branches depend on each other, so the cheapest way of all may be none that a wave can take: it
    also makes at least so many products.
    """
    following = dict(itertools.pairwise(sorted(code)))
    start = (begin, code[begin].moved(way), min(products, code[begin].products))
    best, before, queue = {start: 0}, {}, [(0, start)]
    while queue:
        cost, state = heapq.heappop(queue)
        if state == (end, nbytes, products):
            path = [state]
            while path[-1] != start:
                path.append(before[path[-1]])
            return [code[at] for at, *_ in reversed(path)]
        at, moved, made = state
        here, steps = code[at], []
        if here.target is not None and begin <= here.target <= end:
            steps.append(here.target)
        if not here.name.startswith(("s_branch", "s_endpgm", "s_setpc")) and at in following:
            steps.append(following[at])
        for step in steps:
            now = code[step]
            to = (step, moved + now.moved(way), min(products, made + now.products))
            if step <= end and to[1] <= nbytes and cost + 1 < best.get(to, sys.maxsize):
                best[to], before[to] = cost + 1, state
                heapq.heappush(queue, (cost + 1, to))
    return []


def inner_loop(code: dict[int, Instruction], nbytes: int, products: int) -> list[Instruction]:
    """The cheapest way around a loop that loads so many bytes a lane and makes those products.

    What follows the workgroup's arrival, by an atomic instruction, merges splits.
    """
    arrival = next((at for at, i in code.items() if "_atomic_" in i.name), sys.maxsize)
    ways = (
        cheapest_way(code, i.target, at, "load", nbytes, products)
        for at, i in code.items()
        if i.target and i.target <= at and i.target < arrival
    )
    return min(filter(None, ways), key=len, default=[])


def whole_kernel(code: dict[int, Instruction], nbytes: int) -> list[Instruction]:
    """The cheapest way from a kernel's begin to an end that stores so many bytes a lane."""
    ends = [at for at, i in code.items() if i.name == "s_endpgm"]
    ways = (cheapest_way(code, min(code), end, "store", nbytes) for end in ends)
    return min(filter(None, ways), key=len, default=[])


def waits_for_loads(way: list[Instruction]) -> int:
    """How often a wave waits for vector loads that it has not waited for before."""
    times, pending = 0, False
    for i in way:
        if i.name.startswith("global_load"):
            pending = True
        elif pending and re.match(r"s_wait_loadcnt|s_waitcnt (.* )?vmcnt", i.text):
            times, pending = times + 1, False
    return times


def issue_cycles(tool: str, arch: str, loop: list[Instruction]) -> tuple[float, float]:
    """Cycles to issue a round among other waves' rounds, and of a round alone."""
    body = [i.text for i in loop if not i.name.startswith(("s_cbranch", "s_branch", "s_setpc"))]
    source = "\n".join(re.sub(r"s_wait\w* .*|s_delay_alu .*", "s_nop 0", line) for line in body)
    try:
        done = subprocess.run(
            [tool, "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-iterations=10"],
            input=source,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError("no end after 60 s") from None
    throughput = re.search(r"Block RThroughput:\s*([\d.]+)", done.stdout)
    total = re.search(r"Total Cycles:\s*(\d+)", done.stdout)
    if throughput is None or total is None:
        raise RuntimeError(done.stderr[:300])
    scale = 4 if arch.startswith("gfx9") else 1  # LLVM counts passes of a wave of 64 there
    return float(throughput[1]) * scale, int(total[1]) / 10 * scale


# ---------------------------------------------------------------- tables


def kernel_name(shape: Shape, arch: str) -> tuple[str, str]:
    """Family and name of the kernel that serves the shape."""
    matrix = arch not in NO_MATRIX and shape.head_dim <= 256
    prefix = "paged_attention_matrix" if matrix else "paged_attention"
    narrow = "narrow_" if shape.size == 1 and not matrix else ""
    family = "matrix" if matrix else "attention"
    return family, f"{prefix}_{narrow}{shape.element}_d{kernel_size(shape)}"


def kernel_size(shape: Shape) -> int:
    """Elements of a head that the kernel is built for: so many it has the work of."""
    return min(size for size in SIZES if shape.head_dim <= size)


def round_bytes(shape: Shape, family: str, arch: str, wave_size: int) -> int:
    """Keys and values that a wave loads in a round of the inner loop, some twice in smaller heads.

    matrix.hip: 32 tokens (waves of 64) or 16; attention.hip: 4 x 8 elements a lane, half where
    registers are few.
    """
    if family == "matrix":
        return 2 * wave_size // 2 * kernel_size(shape) * shape.size
    return 2 * wave_size * (2 if arch in OBJECTS else 4) * 8 * shape.size


def round_products(shape: Shape, family: str, nbytes: int, wave_size: int) -> int:
    """Products that a lane makes in a round, where it makes them by itself."""
    return (
        0 if family == "matrix" else nbytes // wave_size // shape.size * rows_of_wave(shape, family)
    )


def rows_of_wave(shape: Shape, family: str) -> int:
    """Query rows that a wave has at most: RF_MATRIX_ROWS / 4, RF_ROWS_OF."""
    return 16 if family == "matrix" else 4 if shape.head_dim <= 256 else 2


def sharing_waves(shape: Shape, family: str) -> int:
    """Waves of a workgroup that read the same keys and values, as they have different rows."""
    rows = shape.tokens * shape.heads // shape.kv_heads
    of_a_wave = rows_of_wave(shape, family)
    return 1 if rows <= of_a_wave else 2 if rows <= 2 * of_a_wave else 4


def floors(shapes: list[Shape]) -> None:
    """Print what no kernel can beat."""
    rows = []
    for shape in shapes:
        for arch, chip in CHIPS.items():
            memory = shape.bytes / chip.bandwidth / 1e3
            arithmetic = shape.operations / chip.rate / 1e6
            rows.append(
                (
                    str(shape),
                    f"{arch} {chip.name}",
                    f"{shape.bytes / 1e6:.0f}",
                    f"{shape.operations / 1e9:.1f}",
                    f"{memory:.0f}",
                    f"{arithmetic:.1f}",
                    f"{max(memory, arithmetic) / 0.85:.0f}",
                )
            )
    print_table(
        ["decode", "chip", "MB", "GFLOP", "memory us", "arithmetic us", "floor / 0.85 us"], rows
    )


def loops(
    shapes: list[Shape], folder: Path, tools: tuple[str, str], latency: float, found: list[Kernel]
) -> None:
    """Print what the inner loops issue and have under way."""
    by_name = {(k.arch, k.name): k for k in found}
    rows, kinds = [], ("loads", "waits", "LDS", "matrix", "vector", "scalar")
    for shape in shapes:
        for arch, chip in CHIPS.items():
            family, name = kernel_name(shape, arch)
            kernel = by_name.get((OBJECTS.get(arch, arch), name))
            if kernel is None:
                continue
            nbytes = round_bytes(shape, family, arch, kernel.wave_size)
            # gfx11's operands are the same in both halves of a wave.
            twice = 2 if family == "matrix" and arch.startswith("gfx11") else 1
            try:
                code = disassemble(tools[0], folder / f"{family}.{kernel.arch}.hsaco", name)
            except subprocess.CalledProcessError:
                print(f"{arch}: {tools[0]} does not know it")
                continue
            loop = inner_loop(
                code,
                nbytes * twice // kernel.wave_size,
                round_products(shape, family, nbytes, kernel.wave_size),
            )
            if not loop:
                print(f"{arch} {name}: no loop found that reads {nbytes} bytes a round")
                continue
            count = Counter(i.kind for i in loop)
            try:
                issue, alone = issue_cycles(tools[1], arch, loop)
            except RuntimeError as error:
                print(f"{arch}: llvm-mca: {error}")
                continue
            shapes_of = [
                re.search(r"_(\d+)x(\d+)x(\d+)", i.name) for i in loop if i.kind == "matrix"
            ]
            matrix_operations = sum(2 * int(m[1]) * int(m[2]) * int(m[3]) for m in shapes_of if m)
            issue = max(issue, matrix_operations * chip.simds / chip.operations)
            a_simd = chip.bandwidth / chip.units / chip.simds / chip.clock  # bytes a cycle
            waves = kernel.waves * chip.simds
            its_bytes = nbytes * shape.head_dim / kernel_size(shape) / sharing_waves(shape, family)
            of_memory = issue * a_simd / its_bytes
            flight = its_bytes / 2 * waves / (chip.bandwidth / chip.units * latency)
            missed = ["issue"] * (of_memory >= 1) + ["flight"] * (flight < 1)
            most, times = count.most_common(1)[0]
            why = f"{' and '.join(missed)}: {times} of {len(loop)} are {most}" if missed else ""
            rows.append(
                (
                    str(shape),
                    f"{arch} {name.removeprefix('paged_attention_')}",
                    f"{nbytes}",
                    *(f"{count[kind] * 1024 / nbytes:.1f}" for kind in kinds),
                    f"{issue:.0f}",
                    f"{alone:.0f}",
                    f"{its_bytes / a_simd:.0f}",
                    f"{of_memory:.2f}",
                    f"{waves}",
                    f"{flight:.1f}",
                    why,
                )
            )
    print_table(
        [
            *("decode", "kernel", "bytes", *kinds),
            *("issue", "alone", "memory", "issue/memory", "waves", "flight", "misses"),
        ],
        rows,
    )


WRITE_TOKENS, WRITE_HEADS, WRITE_DIM = 8192, 8, 128
WRITE_LANES = 8  # RF_WRITE_LANES: lanes of a vector


def writes(folder: Path, tools: tuple[str, str], latency: float, found: list[Kernel]) -> None:
    """Print what writing new keys and values into the cache takes."""
    by_name = {(k.arch, k.name): k for k in found}
    rows, kinds = [], ("loads", "stores", "waits", "vector", "scalar")
    name, vector = "write_kv_bf16", WRITE_DIM * 2  # bytes
    for arch, chip in CHIPS.items():
        kernel = by_name.get((OBJECTS.get(arch, arch), name))
        if kernel is None:
            continue
        try:
            code = disassemble(tools[0], folder / f"write.{kernel.arch}.hsaco", name)
            way = whole_kernel(code, vector // WRITE_LANES)
            issue, _ = issue_cycles(tools[1], arch, way)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            print(f"{arch} {name}: {error}")
            continue
        count = Counter(i.kind for i in way)
        its_bytes = 2 * kernel.wave_size // WRITE_LANES * vector
        memory = its_bytes / (chip.bandwidth / chip.units / chip.simds / chip.clock) / 0.8
        waits, waves = waits_for_loads(way), kernel.waves * chip.simds
        flight = its_bytes * waves / (0.8 * chip.bandwidth / chip.units * latency * waits)
        missed = ["issue"] * (issue >= memory) + ["flight"] * (flight < 1)
        rows.append(
            (
                f"{arch} {chip.name}",
                f"{2 * 2 * WRITE_TOKENS * WRITE_HEADS * vector / chip.bandwidth / 1e3 / 0.8:.0f}",
                f"{its_bytes}",
                *(f"{count[kind]}" for kind in kinds),
                f"{issue:.0f}",
                f"{memory:.0f}",
                f"{issue / memory:.2f}",
                f"{waits}",
                f"{waves}",
                f"{flight:.1f}",
                " and ".join(missed),
            )
        )
    print(f"write of {WRITE_TOKENS:,} tokens, {WRITE_HEADS} heads x {WRITE_DIM} bf16")
    print_table(
        [
            *("chip", "copy / 0.8 us", "bytes", *kinds),
            *("issue", "memory", "issue/memory", "latencies", "waves", "flight", "misses"),
        ],
        rows,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first shape alone")
    parser.add_argument("--objects", type=Path, help="a folder of code objects")
    parser.add_argument("--latency", type=float, default=800.0, help="of memory, in ns (800)")
    options = parser.parse_args()
    shapes = SHAPES[: 1 if options.quick else None]
    floors(shapes)
    folder = options.objects or Path(
        os.environ.get("ROCMFORGE_CODE_OBJECTS", str(files("rocmforge") / "code_objects"))
    )
    tools = []
    for name in ("llvm-objdump", "llvm-mca"):
        versions = (shutil.which(f"{name}{suffix}") for suffix in ("-22", "-21", "-20", "-19", ""))
        tools.append(next((tool for tool in versions if tool), None))
    found = kernels(folder) if folder.is_dir() else []
    if not found or None in tools:
        print("\nno inner loops: they need code objects, llvm-objdump and llvm-mca")
        return
    print()
    names = str(tools[0]), str(tools[1])
    loops(shapes, folder, names, options.latency, found)
    print()
    writes(folder, names, options.latency, found)


if __name__ == "__main__":
    main()
