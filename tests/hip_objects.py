"""Reads what the compiler says of each kernel in a code object: registers, spills, LDS."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """Read one MessagePack value; code objects use maps, arrays, strings, numbers and booleans."""
    kind = data[at]
    at += 1
    if kind < 0x80:
        return kind, at
    if kind >= 0xE0:
        return kind - 256, at
    if kind in (0xC2, 0xC3):
        return kind == 0xC3, at
    if kind in (0xCC, 0xCD, 0xCE, 0xCF):
        size = 1 << (kind - 0xCC)
        return int.from_bytes(data[at : at + size], "big"), at + size
    if kind & 0xE0 == 0xA0 or kind in (0xD9, 0xDA):
        size = kind & 0x1F
        if kind >= 0xD9:
            width = kind - 0xD8
            size, at = int.from_bytes(data[at : at + width], "big"), at + width
        return data[at : at + size].decode(), at + size
    count, pairs = kind & 0x0F, kind & 0xF0 == 0x80 or kind == 0xDE
    if kind in (0xDC, 0xDE):
        count, at = int.from_bytes(data[at : at + 2], "big"), at + 2
    elif kind & 0xE0 != 0x80:
        raise ValueError(f"MessagePack byte {kind:#x}")
    values = []
    for _ in range(count * (2 if pairs else 1)):
        value, at = _unpack(data, at)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if pairs else values), at


def metadata(path: Path) -> dict[str, Any]:
    """Give the AMDGPU metadata of a code object (an ELF file), from its note of type 32."""
    data = path.read_bytes()
    assert data[:4] == b"\x7fELF", path
    offset, size, count = (
        struct.unpack_from("<Q", data, 32)[0],
        struct.unpack_from("<H", data, 54)[0],
        struct.unpack_from("<H", data, 56)[0],
    )
    for i in range(count):
        kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", data, offset + i * size)
        if kind == 4:  # PT_NOTE
            end = at + length
            while at < end:
                name, description, note = struct.unpack_from("<III", data, at)
                start = at + 12 + (name + 3) // 4 * 4
                if note == 32:
                    found: dict[str, Any] = _unpack(data[start : start + description], 0)[0]
                    return found
                at = start + (description + 3) // 4 * 4
    raise ValueError(f"{path} has no metadata")


@dataclass(frozen=True)
class Kernel:
    """What one kernel of a code object takes."""

    family: str
    arch: str
    name: str
    vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    lds: int
    wave_size: int
    threads: int
    arguments: int

    @property
    def waves(self) -> int:
        """Waves that a SIMD unit can hold at once, by registers and by LDS."""
        total, granule, most = registers_of(self.arch)
        waves = min(most, total // (-(-max(self.vgprs, 1) // granule) * granule))
        # A workgroup's waves lie on the 4 (CDNA, GCN) or 2 (RDNA) SIMDs of a compute unit.
        per_simd = self.threads // self.wave_size // (4 if self.wave_size == 64 else 2)
        if self.lds:
            waves = min(waves, lds_of(self.arch) // self.lds * per_simd)
        return waves


def registers_of(arch: str) -> tuple[int, int, int]:
    """Give vector registers a lane and SIMD, in what steps a wave gets them, and waves at most.

    From LLVM's description of the targets (AMDGPUBaseInfo); generic ones are their smallest member.
    """
    if arch in ("gfx90a", "gfx942", "gfx950", "gfx9-4-generic"):
        return 512, 8, 8
    if arch.startswith("gfx9"):
        return 256, 4, 10
    if arch.startswith("gfx10"):
        return 1024, 8, 16
    if arch in ("gfx1100", "gfx1101", "gfx1151") or arch.startswith("gfx12"):
        return 1536, 24, 16
    return 1024, 16, 16


def lds_of(arch: str) -> int:
    """Bytes of LDS of a compute unit."""
    return 160 << 10 if arch == "gfx950" else 64 << 10


def kernels(folder: Path) -> list[Kernel]:
    """Give every kernel of every code object in a folder."""
    found = []
    for path in sorted(folder.glob("*.hsaco")):
        family, arch = re.fullmatch(r"(\w+)\.([\w-]+)\.hsaco", path.name).groups()  # type: ignore[union-attr]
        facts = metadata(path)
        assert arch in facts["amdhsa.target"], (path, facts["amdhsa.target"])
        for kernel in facts["amdhsa.kernels"]:
            found.append(
                Kernel(
                    family,
                    arch,
                    kernel[".name"],
                    kernel[".vgpr_count"],
                    kernel[".sgpr_count"],
                    kernel[".vgpr_spill_count"],
                    kernel[".sgpr_spill_count"],
                    kernel[".private_segment_fixed_size"],
                    kernel[".group_segment_fixed_size"],
                    kernel[".wavefront_size"],
                    kernel[".max_flat_workgroup_size"],
                    kernel[".args"][0][".size"],
                )
            )
    return found
