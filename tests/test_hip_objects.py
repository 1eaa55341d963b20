"""What the compilers made of the HIP kernels: no spills, no scratch, LDS within bounds.

Looks at the installed code objects, or at those in the folder that ROCMFORGE_CODE_OBJECTS names.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from hip_objects import Kernel, kernels

FOLDER = Path(os.environ.get("ROCMFORGE_CODE_OBJECTS", str(files("rocmforge") / "code_objects")))
SOURCE = Path(__file__).parent.parent / "src_c"
ATTENTION = {
    f"paged_attention_{storage}_d{size}"
    for storage in (
        *("f32", "f16", "bf16", "e4m3fn", "e4m3fnuz", "i8"),
        *("narrow_e4m3fn", "narrow_e4m3fnuz", "narrow_i8"),
    )
    for size in (64, 128, 256, 512, 576)
} | {"paged_attention_reduce_r4", "paged_attention_reduce_r2"}
MATRIX = {
    f"paged_attention_matrix_{storage}_d{size}"
    for storage in ("f16", "bf16", "e4m3fn", "e4m3fnuz", "i8")
    for size in (64, 128, 256)
} | {"paged_attention_matrix_reduce"}
WITH_MATRIX = re.compile("gfx(90a|94|95|11|12)")
FAMILIES = {
    "attention": ATTENTION,
    "write": {f"write_kv_{s}" for s in ("f32", "f16", "bf16", "e4m3fn", "e4m3fnuz", "i8")},
    "merge": {"merge_states"},
    "copy": {"copy_blocks", "table_delta"},
}
ARGUMENTS = {"attention": 440, "matrix": 440, "write": 272, "merge": 136}


@pytest.fixture(scope="module")
def found() -> list[Kernel]:
    result = kernels(FOLDER) if FOLDER.is_dir() else []
    if not result:
        pytest.skip("no code objects were built: ROCMFORGE_HIP_ARCHS=all pip install .")
    return result


def test_every_object_has_its_whole_family(found: list[Kernel]) -> None:
    names: dict[tuple[str, str], set[str]] = {}
    for kernel in found:
        names.setdefault((kernel.arch, kernel.family), set()).add(kernel.name)
    for arch in {kernel.arch for kernel in found}:
        assert {family: names[arch, family] for family in FAMILIES} == FAMILIES, arch
        assert names.get((arch, "matrix")) == (MATRIX if WITH_MATRIX.match(arch) else None), arch


def table(found: list[Kernel]) -> str:
    """Per architecture and kind of kernel the most that any of its element types takes."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in found:
        kind = re.sub(r"_(f32|f16|bf16|e4m3fn|e4m3fnuz|i8)(?=_|$)", "", kernel.name)
        groups.setdefault((kernel.arch, kind), []).append(kernel)
    lines = [f"{'architecture':16} {'kernels':29} VGPR SGPR spills scratch   LDS waves/SIMD"]
    for (arch, kind), kernels_of in sorted(groups.items()):
        lines.append(
            f"{arch:16} {kind + ' x' + str(len(kernels_of)):29}"
            f" {max(k.vgprs for k in kernels_of):4} {max(k.sgprs for k in kernels_of):4}"
            f" {max(k.vgpr_spills + k.sgpr_spills for k in kernels_of):6}"
            f" {max(k.scratch for k in kernels_of):7} {max(k.lds for k in kernels_of):5}"
            f" {min(k.waves for k in kernels_of):10}"
        )
    return "\n".join(lines)


def test_nothing_spills_and_lds_fits(found: list[Kernel], capsys: pytest.CaptureFixture) -> None:
    with capsys.disabled():
        print("\n" + table(found))
    bad = [k for k in found if k.vgpr_spills or k.sgpr_spills or k.scratch or k.lds > 65536]
    assert not bad
    assert min(kernel.waves for kernel in found) >= 2


def test_a_workgroup_is_four_waves_of_its_chip(found: list[Kernel]) -> None:
    for kernel in found:
        assert kernel.wave_size == (64 if kernel.arch.startswith("gfx9") else 32)
        assert kernel.threads == 4 * kernel.wave_size


def test_arguments_are_packed_as_the_host_packs_them(found: list[Kernel]) -> None:
    for kernel in found:
        assert kernel.arguments == ARGUMENTS.get(kernel.family, kernel.arguments)
        assert kernel.arguments <= 4096
    assert Counter(k.arguments for k in found if k.family == "copy").keys() == {2336, 3104}


def test_no_short_conversion_of_registers_that_it_cannot_name(found: list[Kernel]) -> None:
    """gfx12: v_cvt_pk_f32_fp8_e32 of v128 and above, as clang 19 makes it."""
    for arch in {kernel.arch for kernel in found if kernel.arch.startswith("gfx12")}:
        data = (FOLDER / f"attention.{arch}.hsaco").read_bytes()
        words = (word for (word,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4]))
        # VOP1, its destination (8 bits), number 110, a source (9 bits) of 256 + 128 or more.
        assert not [hex(word) for word in words if word & 0xFE01FF80 == 0x7E00DD80], arch


def test_kernels_do_not_look_where_they_run() -> None:
    """device.h alone knows AMD from the host and from CUDA."""
    paths = [p for p in (SOURCE / "hip").iterdir() if p.suffix in (".h", ".hip")]
    for path in paths:
        if path.name == "device.h":
            continue
        text = re.sub("#ifndef RF_HIP_[A-Z]+_H", "", path.read_text())
        assert not re.search(r"^\s*#\s*(if|elif|ifdef|ifndef)\b", text, re.M), path
        assert "__builtin_amdgcn" not in text


def test_zig_compiles_while_pip_isolates_the_build(tmp_path: Path) -> None:
    """Pip's sitecustomize hides what is installed from every Python below it, ziglang too."""
    zig, cmake = shutil.which("python-zig"), shutil.which("cmake")
    if not (zig and cmake):
        pytest.skip("needs cmake, and ziglang: pip install rocmforge[hip-compiler]")
    site = tmp_path / "pip-build-env-x" / "site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text("import sys; sys.modules['ziglang'] = None")
    variables = {"COMPILER": zig, "ARCH": "gfx1100", "OBJECT": str(tmp_path / "x.hsaco"),
                 "SOURCE": str(SOURCE / "hip" / "probe.hip")}  # fmt: skip
    done = subprocess.run(
        [cmake, *(f"-D{name}={value}" for name, value in variables.items()), "-P",
         str(SOURCE / "hip" / "compile.cmake")],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.hsaco").read_bytes()[:4] == b"\x7fELF"
