"""Reading a GGUF file: its metadata with types checked, its tensors as float32.

The format is read by the ``gguf`` package (the reader that llama.cpp's project publishes). It
trusts its input, so a foreign or truncated file surfaces there as whatever exception comes first;
here every such case becomes one message that names the file.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rocmforge.cli.console import CommandError

__all__ = ["GGUFFile"]


class GGUFFile:
    """An open GGUF file.

    Parameters
    ----------
    path : Path
        The file. It is mapped, not read: tensors are brought in one by one.

    Raises
    ------
    CommandError
        The file cannot be read, is not GGUF, or ends early.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise CommandError(f"cannot read {path}: {error.strerror}") from error
        if magic != b"GGUF":
            raise CommandError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:
            raise CommandError(
                f"{path} is damaged or cut short: its GGUF header asks for more than the "
                f"{path.stat().st_size} bytes it has, or makes no sense ({error})"
            ) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors in the file."""
        return frozenset(self._tensors)

    def _value(self, key: str) -> Any:
        field = self._fields.get(key)
        if field is None:
            raise CommandError(f"{self.path} has no metadata {key!r}")
        return field.contents()

    def has(self, key: str) -> bool:
        """Tell whether the file has metadata `key`."""
        return key in self._fields

    def integer(self, key: str, default: int | None = None) -> int:
        """Give the integer (or truth value) `key`; without it `default`, or an error."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if not isinstance(value, int):
            raise CommandError(f"{self.path}: metadata {key!r} is not one integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Give the number `key`; without it `default`, or an error."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if not isinstance(value, int | float):
            raise CommandError(f"{self.path}: metadata {key!r} is not one number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Give the string `key`; without it `default`, or an error."""
        if default is not None and not self.has(key):
            return default
        value = self._value(key)
        if not isinstance(value, str):
            raise CommandError(f"{self.path}: metadata {key!r} is not a string")
        return value

    def array(self, key: str) -> list[Any]:
        """Give the array `key` as a list, or an error."""
        value = self._value(key)
        if not isinstance(value, list):
            raise CommandError(f"{self.path}: metadata {key!r} is not an array")
        return value

    def tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Give tensor `name` dequantised to float32, its shape checked.

        `shape` is in NumPy's order, outermost first: ``[out, in]`` for a matrix.
        """
        from gguf.quants import dequantize

        tensor = self._tensors.get(name)
        if tensor is None:
            raise CommandError(f"{self.path} has no tensor {name!r}")
        found = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        if found != shape:
            raise CommandError(
                f"{self.path}: tensor {name!r} has shape {found}, but the metadata ask for {shape}"
            )
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CommandError(
                f"{self.path}: tensor {name!r} is stored as {tensor.tensor_type.name}, which the "
                "gguf package cannot dequantise"
            ) from error
        return np.asarray(values, dtype=np.float32).reshape(shape)
