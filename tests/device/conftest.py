"""The operations on HIP devices: real ones where there are any, else simulated ones.

These tests run in a process of their own for the simulated device (tests/test_simulated_device.py
starts it), because hip-python loads one HIP library a process: `RF_SIMULATED` names the folder that
tests/device/CMakeLists.txt was built in, whose library is loaded before hip-python asks for one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

SIMULATED = os.environ.get("RF_SIMULATED")
if SIMULATED:
    # By its SONAME the dynamic linker gives this one to whoever asks for libamdhip64.so.
    LIBRARY = ctypes.CDLL(str(Path(SIMULATED, "libamdhip64.so")))
    os.environ["ROCMFORGE_CODE_OBJECTS"] = str(Path(SIMULATED, "code_objects"))

from rocmforge import hip  # noqa: E402
from rocmforge.errors import DeviceError  # noqa: E402
from rocmforge.hip import _ops  # noqa: E402


def count_devices() -> int:
    if not SIMULATED and not Path("/dev/kfd").exists():
        return 0
    try:
        return hip.device_count()
    except DeviceError:
        return 0


COUNT = count_devices()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            if not SIMULATED:
                item.add_marker(pytest.mark.gpu)
            if COUNT == 0:
                item.add_marker(pytest.mark.skip("no HIP device: test_simulated_device.py has one"))


@pytest.fixture(params=range(max(COUNT, 1)), ids=lambda index: f"hip:{index}")
def device(request: pytest.FixtureRequest) -> hip.Device:
    return hip.get_device(request.param)


class Simulator:
    """The stand-in library's own functions."""

    NAMES = ("device memory", "pinned memory", "streams", "events", "modules", "graphs")

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("rf_sim_calls", "rf_sim_launches"):
            getattr(library, name).restype = ctypes.c_int64

    def calls(self) -> int:
        return int(self._library.rf_sim_calls())

    def launches(self) -> int:
        return int(self._library.rf_sim_launches())

    def last_split(self) -> int:
        """Index along z of the workgroup that ran last."""
        return int(self._library.rf_sim_last_split())

    def fail(self, from_now: int, error: int = 719) -> None:
        """Make the call that many calls from now fail once; a negative number: none."""
        self._library.rf_sim_fail(ctypes.c_int64(from_now), error)

    def set_device(self, index: int) -> None:
        assert self._library.hipSetDevice(index) == 0

    def set_seed(self, seed: int) -> None:
        self._library.rf_sim_set_seed(ctypes.c_uint64(seed))

    def set_memory(self, nbytes: int) -> None:
        self._library.rf_sim_set_memory(ctypes.c_size_t(nbytes))

    def live(self) -> dict[str, int]:
        numbers = (ctypes.c_int64 * 6)()
        self._library.rf_sim_live(numbers)
        return dict(zip(self.NAMES, numbers, strict=True))

    def forget_errors(self) -> None:
        self._library.rf_sim_reset_error()


@pytest.fixture
def sim() -> Iterator[Simulator]:
    if not SIMULATED:
        pytest.skip("of the simulated device only")
    simulator = Simulator(LIBRARY)
    simulator.set_device(0)
    yield simulator
    simulator.fail(-1)
    simulator.forget_errors()
    simulator.set_device(0)
    simulator.set_seed(int(os.environ.get("RF_SIM_SEED", "0")))
    simulator.set_memory(1 << 30)


@pytest.fixture
def vector_kernels() -> Iterator[None]:
    """No kernel with matrix instructions."""
    _ops.by_matrix(False)
    yield
    _ops.by_matrix(True)


@pytest.fixture
def merge_by_last() -> Iterator[Callable[[bool | None], None]]:
    """Chooses who merges splits: True, the last workgroup; False, a second kernel."""
    yield _ops.merge_by_last
    _ops.merge_by_last(None)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
