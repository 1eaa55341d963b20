"""Element types of a cache, by name or as NumPy dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["NAMES", "resolve"]

_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: Names that :func:`resolve` knows.
NAMES: tuple[str, ...] = tuple(_TYPES)


def resolve(dtype: object) -> np.dtype[Any]:
    """Return the NumPy dtype of a cache's elements.

    Parameters
    ----------
    dtype : str, type or numpy.dtype
        ``"float32"``, ``"float16"``, ``"bfloat16"``, or the NumPy or ml_dtypes type or dtype of
        that name, in native byte order.

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
        raise TypeError(f"dtype must be one of {', '.join(NAMES)}, got None")
    try:
        found = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        if isinstance(dtype, str):
            raise ValueError(f"dtype must be one of {', '.join(NAMES)}, got {dtype!r}") from None
        raise TypeError(f"dtype must be one of {', '.join(NAMES)}, got {dtype!r}") from None
    for known in _TYPES.values():
        if found == known:
            return known
    shown = found.name if found.isnative else found.str
    raise ValueError(f"dtype must be one of {', '.join(NAMES)}, got {shown}")
