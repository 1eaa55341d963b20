"""A library of arrays that offers DLPack's exchange API, as PyTorch does: in ctypes, over NumPy."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
ML_CODES = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e4m3fnuz": 11}
DTYPES = {
    (code, bits): np.dtype(dtype)
    for code, bits, dtype in [
        (0, 8, "i1"),
        (0, 32, "i4"),
        (0, 64, "i8"),
        (1, 8, "u1"),
        (2, 16, "f2"),
        (2, 32, "f4"),
        (4, 16, ml_dtypes.bfloat16),
    ]
}


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


SetError = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
Allocate = ctypes.PYFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(Tensor),
    ctypes.POINTER(ctypes.POINTER(Versioned)),
    ctypes.c_void_p,
    SetError,
)
Export = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
Import = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Versioned), ctypes.POINTER(ctypes.c_void_p))
Describe = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
Stream = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class Exchange(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", Allocate),
        ("export", Export),
        ("import_", Import),
        ("describe", Describe),
        ("current_stream", Stream),
    ]


def capsule(table: Exchange) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return new(ctypes.addressof(table), b"dlpack_exchange_api", None)


class Exchanged:
    """An array of that library, in the memory of a NumPy array or what looks like one."""

    device = (1, 0)
    stream = 0
    room = True  # for results
    described = 0

    def __init__(self, array: Any) -> None:
        self.array = array
        n = array.ndim
        self.shape = (ctypes.c_int64 * n)(*array.shape)
        self.strides = (ctypes.c_int64 * n)(*(s // array.dtype.itemsize for s in array.strides))

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: Any) -> Exchanged:
        return cls(np.empty(shape, dtype))

    # Python's way, which must not be taken where the functions below are there

    def __dlpack_device__(self) -> tuple[int, int]:
        raise AssertionError("asked for the device in Python")

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("asked for a capsule")


def offer(cls: type[Exchanged], **changes: Any) -> Exchange:
    """Make a type offer its functions; the table must be kept."""
    made: list[Any] = []

    def describe(this: Exchanged, out: Any) -> int:
        t = out[0]
        t.data, t.byte_offset = this.address, 0
        t.device_type, t.device_id = cls.device
        t.ndim, t.shape, t.strides = this.array.ndim, this.shape, this.strides
        dtype = this.array.dtype
        t.code = ML_CODES.get(dtype.name, CODES.get(dtype.kind))
        t.bits, t.lanes = 8 * dtype.itemsize, 1
        cls.described += 1
        return 0

    def allocate(like: Any, out: Any, context: Any, set_error: Any) -> int:
        if not cls.room:
            set_error(context, b"MemoryError", b"there is no room")
            return -1
        t = like[0]
        assert (t.device_type, t.device_id) == cls.device
        result = cls.make(tuple(t.shape[: t.ndim]), DTYPES[t.code, t.bits])
        managed = Versioned(major=1)
        made.append((managed, result))
        out[0] = ctypes.pointer(managed)
        return 0

    def take(managed: Any, out: Any) -> int:
        address = ctypes.addressof(managed[0])
        (found,) = [entry for entry in made if ctypes.addressof(entry[0]) == address]
        made.remove(found)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(found[1]))
        out[0] = id(found[1])
        return 0

    def current_stream(kind: int, index: int, out: Any) -> int:
        assert (kind, index) == cls.device
        out[0] = cls.stream or None
        return 0

    table = Exchange(
        **{
            "major": 1,
            "minor": 2,
            "allocate": Allocate(allocate),
            "import_": Import(take),
            "describe": Describe(describe),
            "current_stream": Stream(current_stream),
        }
        | changes
    )
    cls.__dlpack_c_exchange_api__ = capsule(table)  # type: ignore[attr-defined]
    return table
