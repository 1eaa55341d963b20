"""Builds the stand-in HIP library over the CUDA driver, and runs tests/device on an NVIDIA GPU.

Without such a GPU its build is tested, and that it says that there is no device.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NVIDIA = Path("/dev/nvidiactl").exists()

pytestmark = [
    pytest.mark.untraced,
    pytest.mark.uninstrumented,
    pytest.mark.skipif(
        not all(map(shutil.which, ("cmake", "c++", "nvcc"))), reason="needs cmake, c++ and nvcc"
    ),
]


def build(folder: Path, *options: str) -> Path:
    for command in (
        ["cmake", "-S", str(HERE / "cuda"), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def built(pytestconfig: pytest.Config) -> Path:
    """The build folder, kept from run to run. All kernels take minutes: only where they can run."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("cuda_device")
    return build(folder, f"-DRF_FAMILIES={'attention;write;merge;copy' if NVIDIA else 'merge'}")


def test_every_call_of_the_runtime_is_there(built: Path) -> None:
    source = (HERE.parent / "rocmforge" / "hip" / "_driver.pyx").read_text()
    table = source.partition("_SIGNATURES = {")[2].partition("\n}")[0]
    names = re.findall(r'^    "(hip\w+)":', table, re.MULTILINE)
    assert len(names) > 30
    library = ctypes.CDLL(str(built / "libamdhip64.so"))
    renamed = {"hipGetDeviceProperties": "hipGetDevicePropertiesR0600"}
    missing = [name for name in names if not hasattr(library, renamed.get(name, name))]
    assert not missing


def test_kernels_are_those_of_the_source(built: Path) -> None:
    """By name in the object: what hipModuleGetFunction looks for."""
    data = (built / "code_objects" / "merge.sm_90.hsaco").read_bytes()
    assert data[:4] == b"\x7fELF"
    assert b"\0merge_states\0" in data


def first_of(folder: Path, variable: str) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get(variable)])])


def run(built: Path, *command: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("hip")
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parent,
        env={
            **os.environ,
            "RF_SIMULATED": str(built),
            "ROCMFORGE_CODE_OBJECTS": str(built / "code_objects"),
            "LD_LIBRARY_PATH": first_of(built, "LD_LIBRARY_PATH"),
            "PYTHONPATH": first_of(HERE / "cuda", "PYTHONPATH"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(NVIDIA, reason="there is one")
def test_there_is_no_device_without_a_driver(built: Path) -> None:
    """The library loads in ROCm's place, and its errors get through."""
    script = (
        "import ctypes; from rocmforge import hip; library = ctypes.CDLL('libamdhip64.so');"
        "library.hipGetErrorName.restype = ctypes.c_char_p;"
        "print(hip.device_count(), library.hipGetDeviceCount(ctypes.byref(ctypes.c_int())),"
        "library.hipGetErrorName(100).decode())"
    )
    done = run(built, "-P", "-c", script)
    assert done.stdout.split() == ["0", "100", "CUDA_ERROR_NO_DEVICE"], done.stderr


@pytest.mark.skipif(not NVIDIA, reason="needs an NVIDIA GPU")
def test_generic_kernels(built: Path) -> None:
    files = [f"tests/device/test_{name}.py" for name in ("attention", "blocks", "cache")]
    done = run(
        *(built, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "without_simulator"), *files
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
