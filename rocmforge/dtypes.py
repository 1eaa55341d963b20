"""Element types of a cache, by name or as NumPy dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["EIGHT_BIT", "NAMES", "largest_element", "resolve"]

_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "int8": np.dtype(np.int8),
}

#: Names that :func:`resolve` knows.
NAMES: tuple[str, ...] = tuple(_TYPES)

#: Those whose elements stand for their value times a scale.
EIGHT_BIT: tuple[str, ...] = NAMES[3:]

_LARGEST = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 240.0, "int8": 127.0}


def resolve(dtype: object, name: str = "dtype") -> np.dtype[Any]:
    """Return the NumPy dtype of a cache's elements.

    Parameters
    ----------
    dtype : str, type or numpy.dtype
        One of `NAMES`, or the NumPy or ml_dtypes type or dtype of that name, in native byte order.
    name : str
        The argument that errors name.

    Returns
    -------
    numpy.dtype

    Raises
    ------
    ValueError
        It is a type, but none that a cache can hold.
    TypeError
        It is no type at all.

    Examples
    --------
    >>> from rocmforge.dtypes import resolve
    >>> resolve("float16"), resolve("bfloat16").itemsize
    (dtype('float16'), 2)
    """
    if isinstance(dtype, str):
        known = _TYPES.get(dtype)
        if known is not None:
            return known
    elif dtype is None:  # NumPy would take it for float64
        raise TypeError(f"{name} must be one of {', '.join(NAMES)}, got None")
    try:
        found = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        if isinstance(dtype, str):
            raise ValueError(f"{name} must be one of {', '.join(NAMES)}, got {dtype!r}") from None
        raise TypeError(f"{name} must be one of {', '.join(NAMES)}, got {dtype!r}") from None
    for known in _TYPES.values():
        if found == known:
            return known
    shown = found.name if found.isnative else found.str
    raise ValueError(f"{name} must be one of {', '.join(NAMES)}, got {shown}")


def largest_element(dtype: np.dtype[Any]) -> float:
    """Return the largest element of an 8-bit type, that a scale maps the largest value to.

    Examples
    --------
    >>> [largest_element(resolve(name)) for name in EIGHT_BIT]
    [448.0, 240.0, 127.0]
    """
    return _LARGEST[dtype.name]
