"""Breaks the kernels in ways that real mistakes do, and tells which tests notice.

    python tests/device/mutations.py BUILD

BUILD is where tests/device/CMakeLists.txt was built, unbroken. For each mutation the kernels'
sources are copied, changed, built for the simulated device and tested. The table that it prints
names the first test that turned red; the exit status is 1 when some mutation passed all of them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "src_c"
TESTS = {
    "attention": "test_attention.py",
    "matrix": "test_matrix.py",
    "write": "test_blocks.py",
    "copy": "test_blocks.py",
    "merge": "test_blocks.py",
}

RED = "red:"

# What is broken; family; the text that is replaced (once, in one file) and by what.
MUTATIONS = [
    ("barrier dropped", "attention", "attention.hip", "        barrier();\n", ""),
    (
        "softmax maximum left out",
        "attention",
        "attention.hip",
        "float base = m[r] == -INF ? 0.0f : m[r];\n            RF_UNROLL",
        "float base = 0.0f;\n            RF_UNROLL",
    ),
    (
        "sums not rescaled to a new maximum",
        "attention",
        "attention.hip",
        "sums[r][c][i] *= lower;",
        "sums[r][c][i] *= 1.0f;",
    ),
    (
        "causal bound off by one",
        "attention",
        "attention.h",
        "high = smaller(high, position + 1);",
        "high = smaller(high, position + 2);",
    ),
    (
        "window off by one",
        "attention",
        "attention.h",
        "low = position - p.window_left;",
        "low = position - p.window_left + 1;",
    ),
    (
        "block table index off by one",
        "attention",
        "attention.hip",
        "rf_quotient((uint32_t)inside, a.block_size));",
        "rf_quotient((uint32_t)inside + 1, a.block_size));",
    ),
    (
        "values by the keys' token stride",
        "attention",
        "attention.hip",
        "(uint32_t)offset[t] * pool.token_stride) * SIZE;",
        "(uint32_t)offset[t] * a.p.k.token_stride) * SIZE;",
    ),
    (
        "heads by the token stride",
        "attention",
        "attention.hip",
        "head * p.k.head_stride +\n",
        "head * p.k.token_stride +\n",
    ),
    ("wrong wave size", "attention", "WAVE", "", ""),
    (
        "lanes past a vector leave their sums too",
        "attention",
        "attention.hip",
        "if (LANES * CHUNKS > VECTOR && part + c * LANES >= VECTOR) continue;",
        "",
    ),
    (
        "hidden keys weighed with 0 only",
        "attention",
        "attention.hip",
        "if (GUARDED && weight[r][t] == 0) continue;",
        "",
    ),
    (
        "hidden values of pairs weighed with 0 only",
        "attention",
        "attention.hip",
        "GUARDED ? h.odd & seen[r] : h.odd",
        "h.odd",
    ),
    (
        "halves of a pair exchanged",
        "attention",
        "attention.hip",
        "Halves h = {halves<false>(x, y), halves<true>(x, y)};",
        "Halves h = {halves<true>(x, y), halves<false>(x, y)};",
    ),
    (
        "the other key's probability",
        "attention",
        "attention.hip",
        "pair<PAIR>(weight[r][t], weight[r][t + 1])",
        "pair<PAIR>(weight[r][t + 1], weight[r][t])",
    ),
    (
        "query in the order of memory, pairs of keys in that of bytes",
        "attention",
        "attention.h",
        "q[c][i] = halves<false>(x, y), q[c][i + 1] = halves<true>(x, y);",
        "(void)x, (void)y;",
    ),
    (
        "row's power of two not undone",
        "attention",
        "attention.hip",
        "multiple[r] *= narrow_query<",
        "narrow_query<",
    ),
    (
        "sum of probabilities weighed by the values' scales, of pairs",
        "attention",
        "attention.hip",
        "weight[r][t] * unweighed[t]",
        "weight[r][t]",
    ),
    (
        "NaN of float8 in a key taken for a number",
        "attention",
        "attention.hip",
        "!= 0 ? NAN_F16 : x[0]",
        "!= 0 ? x[0] : x[0]",
    ),
    (
        "last split dropped",
        "attention",
        "attention.h",
        "for (int i = 0; i < splits; i++) {\n            float m",
        "for (int i = 0; i < splits - 1; i++) {\n            float m",
    ),
    (
        "arrivals not cleared",
        "attention",
        "attention.h",
        "if (thread() == 0) store(arrivals, 0u);",
        "",
    ),
    (
        "last but one merges",
        "attention",
        "attention.h",
        "if ((int)lds != splits - 1) return;",
        "if ((int)lds != splits - 2) return;",
    ),
    (
        "arrives before what the wave stored is released",
        "attention",
        "attention.h",
        "release();\n    barrier();",
        "barrier();",
    ),
    (
        "merges before it acquires",
        "matrix",
        "attention.h",
        "acquire();\n    if (thread()",
        "if (thread()",
    ),
    (
        "arrives before its part is stored",
        "matrix",
        "matrix.hip",
        "run(wave() % apart, apart);\n        merge_if_last",
        "for (int i = 0; i < 2; i++)\n if (i) run(wave() % apart, apart);\n else merge_if_last",
    ),
    (
        "one counter for all tiles",
        "attention",
        "attention.h",
        "a.arrivals + group_x()",
        "a.arrivals",
    ),
    (
        "sink left out",
        "attention",
        "attention.h",
        "exp2(sink - base)",
        "0.0f",
    ),
    (
        "scale of values left out",
        "attention",
        "attention.hip",
        "SCALED ? weight[r][t] * v_scale[t] : weight[r][t]",
        "weight[r][t]",
    ),
    (
        "halves of 16 bytes go to the wrong neighbour",
        "attention",
        "attention.hip",
        "to[t][c].w[i] = odd ? other : mine;",
        "to[t][c].w[i] = odd ? mine : other;",
    ),
    (
        "values scaled as keys are",
        "write",
        "write.hip",
        "int read = scales.per_token ? end : 0;",
        "int read = a.p.k_scale.per_token ? end : 0;",
    ),
    (
        "probabilities too small for float16",
        "matrix",
        "matrix.hip",
        "LIFT = 11",
        "LIFT = 0",
    ),
    (
        "rows of gfx11's operand in the order of others",
        "matrix",
        "matrix.h",
        "WHOLE ? column() % 2 * 8 + column() / 2 : column()",
        "column()",
    ),
    (
        "sums of a group lie apart",
        "matrix",
        "matrix.h",
        "WHOLE ? 0 : PER * group()",
        "WHOLE ? 0 : group()",
    ),
    (
        "halves of a word exchanged",
        "matrix",
        "matrix.hip",
        "Halves{halves<false>(x, y), halves<true>(x, y)}",
        "Halves{halves<true>(x, y), halves<false>(x, y)}",
    ),
    (
        "gfx11's other half not exchanged",
        "matrix",
        "matrix.h",
        "(unsigned)shuffle_xor_bits<16>((int)mine)",
        "mine",
    ),
    (
        "a lane's elements of a key are those of another group",
        "matrix",
        "matrix.h",
        "WHOLE ? 0 : 8 * group()",
        "WHOLE ? 0 : 8 * (GROUPS - 1 - group())",
    ),
    (
        "query overwritten while it is read",
        "matrix",
        "matrix.hip",
        "barrier(); /* nobody needs what is there",
        "/* nobody needs what is there",
    ),
    (
        "values of hidden tokens not set to zero",
        "matrix",
        "matrix.hip",
        "block < 0 ? 0 : values.w[i][j]",
        "values.w[i][j]",
    ),
    (
        "query past the head's end not 0",
        "matrix",
        "matrix.hip",
        "if (at && 8 * chunk < p.head_dim)",
        "if (at)",
    ),
    (
        "keys read past the head's end",
        "matrix",
        "matrix.hip",
        "smaller(on, room)",
        "on",
    ),
    (
        "maximum replaced without rescaling",
        "matrix",
        "matrix.hip",
        "sums[t].x[i] *= scale;",
        "sums[t].x[i] *= 1.0f;",
    ),
    (
        "query in the order of memory, keys of 8 bits in that of bytes",
        "matrix",
        "attention.h",
        "q[c][i] = halves<false>(x, y), q[c][i + 1] = halves<true>(x, y);",
        "(void)x, (void)y;",
    ),
    (
        "NaN of float8 taken for a number",
        "matrix",
        "matrix.hip",
        "nan = any(bytes != 0);",
        "(void)bytes;",
    ),
    (
        "sum of probabilities weighed by the values' scales",
        "matrix",
        "matrix.hip",
        "scaled ? exp2(seen[s].x[i] - base) : x[s].x[i]",
        "x[s].x[i]",
    ),
    (
        "padding slot not skipped",
        "write",
        "write.hip",
        "if (v.slot < 0 || v.slot >=",
        "if (v.slot >=",
    ),
    (
        "values to the keys' pool",
        "write",
        "write.hip",
        "const rf_paged &pool = v.value ? a.p.v : a.p.k;\n    const char",
        "const rf_paged &pool = a.p.k;\n    const char",
    ),
    (
        "float8 rounded half up",
        "write",
        "element.h",
        "magnitude += 0x7ffff + (magnitude >> 20 & 1);",
        "magnitude += 0x80000;",
    ),
    (
        "destination and source exchanged",
        "copy",
        "copy.hip",
        "const char *from = pool.data + ids[0] *",
        "const char *from = pool.data + ids[per_copy - 1] *",
    ),
    ("a part that saw no key is read", "merge", "merge.hip", "if (x != -INF)\n", "if (true)\n"),
]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def red_tests(base: Path, name: str, family: str, file: str, old: str, new: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        sources, build = Path(folder, "src_c"), Path(folder, "build")
        shutil.copytree(SOURCES, sources)
        definition = ""
        if file == "WAVE":
            definition = "RF_MUTATE_WAVE=16"
        else:
            path = sources / "hip" / file
            pattern = r"\s*".join(map(re.escape, old.split()))  # however it is broken into lines
            text, count = re.subn(pattern, lambda _: new, path.read_text())
            assert count >= 1, f"{name}: {file} does not have the text to change"
            path.write_text(text)
        run(
            "cmake",
            "-S",
            str(HERE),
            "-B",
            str(build),
            f"-DRF_SOURCES={sources}",
            f"-DRF_MUTATION={definition}",
            "-DRF_WERROR=OFF",
        )
        chips = ("gfx1100", "gfx942")
        if family == "matrix":
            chips += ("gfx90a", "gfx950", "gfx1201")
        if family == "attention":
            chips += ("gfx906",)
        targets = [f"{family}_{arch.replace('gfx906', 'gfx9-generic')}" for arch in chips]
        done = run("cmake", "--build", str(build), "--parallel", "2", "--target", *targets)
        if done.returncode:
            return "does not compile: " + done.stdout[-800:] + done.stderr[-800:]
        for source in (base / "code_objects").iterdir():
            target = build / "code_objects" / source.name
            if not target.exists():
                shutil.copy(source, target)
        shutil.copy(base / "libamdhip64.so", build)
        done = run(
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            "--hypothesis-profile=short",
            str(HERE / TESTS[family]),
            RF_SIMULATED=str(build),
            RF_SIM_DEVICES=",".join(chips),
        )
        if done.returncode < 0:
            return f"{RED} the process ended by signal {-done.returncode}"
        if done.returncode == 0:
            return "no test noticed"
        found = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.M)
        return f"{RED} {found[1]}" if found else "no result: " + done.stdout[-500:]


def main() -> int:
    base = Path(sys.argv[1]).resolve()
    missed = 0
    for mutation in MUTATIONS:
        if len(sys.argv) > 2 and mutation[0] not in sys.argv[2:]:
            continue
        result = red_tests(base, *mutation)
        missed += not result.startswith(RED)
        print(f"{mutation[0]:38} {mutation[1]:10} {result}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
