"""Tensors of a library that is not ours, made by hand: what may arrive through DLPack.

The structures are those of its specification, https://dmlc.github.io/dlpack/latest/c_api.html.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from exchange import Tensor, Versioned

ROCM, CUDA, CPU, ROCM_HOST = 10, 2, 1, 11
READ_ONLY = 1
CODES = {
    "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "float8_e4m3fn": (10, 8),
    "float8_e4m3fnuz": (11, 8), "int8": (0, 8), "int32": (0, 32), "int64": (0, 64),
    "uint8": (1, 8), "bool": (6, 8), "float64": (2, 64), "complex64": (5, 64), "int16": (0, 16),
}  # fmt: skip


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Plain(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Foreign:
    """A view of a DeviceArray as another library would export it.

    Parameters are what a producer may say: any of them may be wrong. `given` and `taken_back`
    count capsules and calls of their deleters; `streams` are what the consumer asked for.
    """

    def __init__(
        self, array: Any, *, version: tuple[int, int] | None = (1, 0), legacy: bool = False,
        dtype: str | None = None, device: tuple[int, int] | None = None, flags: int = 0,
        lanes: int = 1, strides: bool = True, offset: int = 0, name: bytes | None = None,
    ) -> None:  # fmt: skip
        self.array, self.version, self.legacy = array, version, legacy
        self.device = device or (ROCM, array.device.index)
        self.code, self.bits = CODES[dtype or array.dtype.name]
        self.flags, self.lanes, self.with_strides = flags, lanes, strides
        self.offset, self.name = offset, name
        self.given = self.taken_back = 0
        self.streams: list[Any] = []
        self._alive: list[Any] = []

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **keywords: Any) -> object:
        if self.legacy and "max_version" in keywords:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.streams.append(keywords["stream"])
        kind = _Plain if self.version is None else Versioned
        managed = kind()
        tensor = managed.tensor
        tensor.data = self.array.address - self.offset
        tensor.byte_offset = self.offset
        tensor.device_type, tensor.device_id = self.device
        tensor.ndim = self.array.ndim
        tensor.code, tensor.bits, tensor.lanes = self.code, self.bits, self.lanes
        numbers = ctypes.c_int64 * max(self.array.ndim, 1)
        shape = numbers(*self.array.shape)
        steps = numbers(*(n // self.array.dtype.itemsize for n in self.array.strides))
        tensor.shape = shape
        if self.with_strides:
            tensor.strides = steps

        def take_back(_: int) -> None:
            self.taken_back += 1

        deleter = _Deleter(take_back)
        managed.deleter = ctypes.cast(deleter, ctypes.c_void_p)
        if self.version is not None:
            managed.major, managed.minor = self.version
            managed.flags = self.flags
        usual = b"dltensor" if self.version is None else b"dltensor_versioned"
        name = ctypes.create_string_buffer(self.name or usual)

        self._alive += [managed, shape, steps, name, deleter]
        self.given += 1
        # without a destructor: whoever takes it is who gives it back
        return _new(ctypes.addressof(managed), ctypes.cast(name, ctypes.c_char_p), None)


def foreign(problem: Any, *names: str, **options: Any) -> dict[str, Foreign]:
    """Some arrays of a problem on a device as another library's."""
    return {name: Foreign(getattr(problem, name), **options) for name in names}


def cut(array: np.ndarray) -> np.ndarray:
    """An array in the middle of a wider one, as keys are in a fused projection."""
    wide = np.zeros((*array.shape[:-2], 3 * array.shape[-2], array.shape[-1]), array.dtype)
    wide[..., array.shape[-2] : 2 * array.shape[-2], :] = array
    return wide
