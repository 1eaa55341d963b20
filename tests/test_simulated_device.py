"""Builds the simulated HIP device and runs tests/device on it, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEVICE = Path(__file__).parent / "device"
DEVICES = "gfx1100,gfx942:sramecc+:xnack-"  # waves of 32 and of 64 lanes

pytestmark = [
    pytest.mark.untraced,  # CI measures the coverage of these tests by running them directly
    pytest.mark.uninstrumented,  # and runs them under the address sanitizer in a step of its own
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and c++"
    ),
]


@pytest.fixture(scope="module")
def simulated(pytestconfig: pytest.Config) -> Path:
    """The build folder, kept from run to run, or that which CI has made."""
    if "RF_SIMULATED_BUILD" in os.environ:
        return Path(os.environ["RF_SIMULATED_BUILD"])
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("simulated_device")
    for command in (
        ["cmake", "-S", str(DEVICE), "-B", str(folder)],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> str:
    pytest.importorskip("hip")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=DEVICE.parent.parent,
        env={
            **os.environ,
            "RF_SIMULATED": str(folder),
            "RF_SIM_DEVICES": DEVICES,
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_operations_and_runtime(simulated: Path) -> None:
    assert " passed" in run(simulated, "tests/device")


def test_lanes_and_workgroups_in_random_order(simulated: Path) -> None:
    run(
        simulated,
        *(f"tests/device/test_{name}.py" for name in ("attention", "blocks", "matrix")),
        *(
            "-k",
            "not random and (ragged or features or split or write or merge or gather or holes)",
        ),
        RF_SIM_SEED="7",
    )


def test_every_kind_of_matrix_unit(simulated: Path) -> None:
    """And chips that have none; the tests above have the units of gfx1100 and gfx942."""
    chips = "gfx90a,gfx950,gfx1201,gfx1030,gfx906"
    assert " passed" in run(simulated, "tests/device/test_matrix.py", RF_SIM_DEVICES=chips)


def test_a_chip_with_few_registers(simulated: Path) -> None:
    assert " passed" in run(simulated, "tests/device/test_attention.py", RF_SIM_DEVICES="gfx906")


def test_without_the_c_functions_of_hip_python(simulated: Path) -> None:
    run(simulated, "tests/device/test_runtime.py", ROCMFORGE_HIP_NO_CAPSULES="1")
