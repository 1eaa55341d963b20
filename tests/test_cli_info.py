"""``rocmforge info`` and the command line around it."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import rocmforge
from rocmforge import hip
from rocmforge.cli import info, main
from rocmforge.errors import DeviceError
from rocmforge.ops import _cpu


class FakeDevice:
    """What info asks of a device."""

    name, architecture, compute_units = "Radeon", "gfx1100", 96

    def __init__(self, index: int) -> None:
        self.index = index

    def code_object(self) -> str:
        if self.index:
            raise DeviceError("no code object for gfx1100")
        return "gfx1100"


def fake_hip(monkeypatch: pytest.MonkeyPatch, count: object) -> None:
    """A machine whose HIP runtime has `count` devices, or raises it."""

    def device_count() -> object:
        if isinstance(count, Exception):
            raise count
        return count

    monkeypatch.setattr(hip, "device_count", device_count)
    monkeypatch.setattr(hip, "get_device", FakeDevice)


def test_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hip(monkeypatch, 2)
    devices, reason = info.hip_devices()
    assert reason is None
    assert [device["index"] for device in devices] == [0, 1]
    assert [device["code_object"] for device in devices] == [
        "gfx1100",
        "no code object for gfx1100",
    ]


def test_devices_in_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_hip(monkeypatch, 1)
    assert main(["info"]) == 0
    assert "Radeon (gfx1100)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (DeviceError("failed to dlopen 'libamdhip64.so'"), "failed to dlopen 'libamdhip64.so'"),
        (0, "the HIP runtime sees no device"),
    ],
)
def test_why_there_are_no_devices(
    monkeypatch: pytest.MonkeyPatch, count: object, reason: str
) -> None:
    fake_hip(monkeypatch, count)
    assert info.hip_devices() == ([], reason)


def test_the_installed_hip_python_is_found() -> None:
    """Whatever this machine has, an installed hip-python is never called missing."""
    pytest.importorskip("hip")
    devices, reason = info.hip_devices()
    assert devices or "hip-python is not installed" not in reason


def test_without_hip_python() -> None:
    program = (
        "import sys; sys.modules['hip'] = sys.modules['rocm'] = None\n"
        "from rocmforge.cli import info; print(info.hip_devices()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.startswith("hip-python is not installed: pip install hip-python")


def test_info_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (rocmforge.__version__, _cpu.isa(), "HIP device", "code objects"):
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
