"""AMD GPUs through the HIP runtime. Nothing is loaded before something here is used."""

from rocmforge.hip._array import DeviceArray, empty, from_dlpack, from_numpy, zeros
from rocmforge.hip._driver import (
    Device,
    Event,
    Graph,
    Memory,
    Stream,
    built_architectures,
    default_device,
    device_count,
    get_device,
    synchronize,
)

__all__ = [
    "Device",
    "DeviceArray",
    "Event",
    "Graph",
    "Memory",
    "Stream",
    "built_architectures",
    "default_device",
    "device_count",
    "empty",
    "from_dlpack",
    "from_numpy",
    "get_device",
    "synchronize",
    "zeros",
]
