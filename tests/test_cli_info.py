"""``rocmforge info`` and the command line around it."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import rocmforge
from rocmforge.cli import info, main
from rocmforge.ops import _cpu


def fake_hip(monkeypatch: pytest.MonkeyPatch, count: object) -> None:
    """A stand-in for hip-python whose hipGetDeviceCount gives `count`, or raises it."""

    def device_count() -> object:
        if isinstance(count, Exception):
            raise count
        return count

    def properties(target: SimpleNamespace, index: int) -> tuple[int]:
        target.name, target.gcnArchName = b"Radeon %d" % index, b"gfx1100"
        return (0,)

    package = ModuleType("hip")
    package.hip = SimpleNamespace(  # type: ignore[attr-defined]
        hipGetDeviceCount=device_count,
        hipDeviceProp_t=SimpleNamespace,
        hipGetDeviceProperties=properties,
    )
    monkeypatch.setitem(sys.modules, "hip", package)


def test_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hip(monkeypatch, (0, 2))
    devices, reason = info.hip_devices()
    assert reason is None
    assert [device["name"] for device in devices] == ["Radeon 0", "Radeon 1"]
    assert {device["architecture"] for device in devices} == {"gfx1100"}


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (RuntimeError("failed to dlopen\n 'libamdhip64.so'"), "failed to dlopen 'libamdhip64.so'"),
        ((100, 0), "HIP status 100"),
    ],
)
def test_why_there_are_no_devices(
    monkeypatch: pytest.MonkeyPatch, count: object, reason: str
) -> None:
    fake_hip(monkeypatch, count)
    assert info.hip_devices() == ([], reason)


def test_without_hip_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hip", None)
    assert info.hip_devices() == ([], "hip-python is not installed")


def test_the_installed_hip_python_is_found() -> None:
    """Whatever this machine has, an installed hip-python is never called missing."""
    pytest.importorskip("hip")
    devices, reason = info.hip_devices()
    assert devices or reason != "hip-python is not installed"


def test_info_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (rocmforge.__version__, _cpu.isa(), "HIP devices", "code objects"):
        assert expected in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["rocmforge"] == rocmforge.__version__
    assert found["cpu"]["isa"] == _cpu.isa()


SCRIPT = str(Path(sysconfig.get_path("scripts"), "rocmforge"))


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-P", "-m", "rocmforge"]])
def test_the_script_and_the_module_are_the_same(command: list[str]) -> None:
    done = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout == f"rocmforge {rocmforge.__version__}\n"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
