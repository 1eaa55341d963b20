"""``rocmforge info``: what is installed, and what it can use on this machine."""

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

PACKAGES = ("numpy", "ml_dtypes", "hip-python", "gguf", "tokenizers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Run the command; give its exit status."""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, found in facts["versions"].items():
        _row(name, found or "not installed")
    cpu, hip = facts["cpu"], facts["hip"]
    _row("CPU", cpu["model"])
    _row("  in use", f"{cpu['isa']} kernels, {cpu['threads']} threads")
    if hip["devices"]:
        for device in hip["devices"]:
            _row(f"HIP device {device['index']}", f"{device['name']} ({device['architecture']})")
            _row("  code object", device["code_object"])
    else:
        _row("HIP devices", f"none: {hip['reason']}")
    _row("code objects", ", ".join(facts["code_objects"]) or "none built")
    _row('device="auto"', facts["auto"])
    return 0


def _row(name: str, text: str) -> None:
    print(f"{name:<14} {text}")


def collect() -> dict[str, Any]:
    """Gather everything that the command shows."""
    import rocmforge
    from rocmforge.ops import _cpu, get_num_threads

    versions: dict[str, str | None] = {
        "rocmforge": rocmforge.__version__,
        "python": f"{platform.python_version()} ({sys.implementation.name}, {sys.platform} "
        f"{platform.machine()})",
    }
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    devices, reason = hip_devices()
    return {
        "versions": versions,
        "cpu": {"model": cpu_model(), "isa": _cpu.isa(), "threads": get_num_threads()},
        "hip": {"devices": devices, "reason": reason},
        "code_objects": code_objects(),
        "auto": automatic(),
    }


def automatic() -> str:
    """Say what ``device="auto"`` takes, and why."""
    from rocmforge import hip

    device, reason = hip.default_device()
    return str(device) if device is not None else f"cpu ({reason})"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Give the processor's name, from the kernel's list where there is one."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def hip_devices() -> tuple[list[dict[str, Any]], str | None]:
    """Give the HIP devices, and if there are none, why."""
    from rocmforge import hip
    from rocmforge.errors import DeviceError

    try:
        count = hip.device_count()
        devices = []
        for index in range(count):
            device = hip.get_device(index)
            try:
                runs = device.code_object()
            except DeviceError as error:
                runs = str(error)
            devices.append(
                {
                    "index": index,
                    "name": device.name,
                    "architecture": device.architecture,
                    "compute_units": device.compute_units,
                    "code_object": runs,
                }
            )
    except DeviceError as error:
        return [], str(error)
    return devices, None if devices else "the HIP runtime sees no device"


def code_objects() -> list[str]:
    """List the architectures that GPU code objects were built for in this installation."""
    from rocmforge import hip

    return hip.built_architectures()
