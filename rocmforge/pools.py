"""The arrays of a cache: keys, values and scales of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rocmforge.dtypes import EIGHT_BIT, resolve
from rocmforge.layer_group import LayerGroup

__all__ = [
    "LayerPools",
    "Shape",
    "as_head_scale",
    "as_integer",
    "as_shape",
    "group_of_layers",
    "make_pools",
    "read_scales",
]

Array = npt.NDArray[Any]

MAX_DIM = 576  # elements of a head that the kernels take
LINE = 64  # bytes: vectors that begin where a cache line does are moved by whole lines


@dataclass(frozen=True, slots=True)
class Shape:
    """What the layers of a group have in common."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    latent: bool
    """Values are the first v_head_dim elements of the keys."""
    dtype: np.dtype[Any]
    window: int | None
    layout: Literal["HND", "NHD"]
    scales: Literal["token", "head"] | None
    """None: elements are not scaled."""


@dataclass(slots=True)
class LayerPools:
    """One layer's arrays, as the operations take them."""

    group: int
    keys: Any
    values: Any
    """None for a latent cache, which has keys alone."""
    read_values: Any
    """What attention reads: `values`, or the part of the keys."""
    k_scale: Any = None
    """None, a pool with a scale for each token and head, or a number or an array a head; also None
    while those are not known yet."""
    v_scale: Any = None
    head_scales: tuple[float | Array, float | Array | None] | None = None
    """The scales of heads in host memory, wherever the pools are."""
    window_size: tuple[int, int] = (-1, -1)
    written: bool = False
    """Whether scales must stay what they are."""

    def each(self) -> Iterator[tuple[str, Any]]:
        """Whatever has one entry a kernel block and moves with it."""
        yield "key", self.keys
        if self.values is not None:
            yield "value", self.values
        for name, scale in (("key_scale", self.k_scale), ("value_scale", self.v_scale)):
            if getattr(scale, "ndim", 0) == 3:
                yield name, scale


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that begins with a cache line.

    Zeros, not empty: the operating system then hands out the pages as they are first written.
    """
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.zeros(nbytes + LINE, np.uint8)
    skip = -memory.ctypes.data % LINE
    return memory[skip : skip + nbytes].view(dtype).reshape(shape)


def make_pools(
    shape: Shape,
    group: int,
    num_blocks: int,
    block_size: int,
    zeros: Callable[[tuple[int, ...], np.dtype[Any]], Any] = zeros,
) -> LayerPools:
    """Make the pools of one layer, in kernel blocks, by a function that makes arrays of zeros.

    Raises
    ------
    MemoryError
        If there is no memory for them.
    """
    inner = (shape.num_kv_heads, block_size)
    outer = (num_blocks, *inner[:: 1 if shape.layout == "HND" else -1])
    keys = zeros((*outer, shape.head_dim), shape.dtype)
    values = None if shape.latent else zeros((*outer, shape.v_head_dim), shape.dtype)
    read_values = keys[..., : shape.v_head_dim] if values is None else values
    pools = LayerPools(group, keys, values, read_values)
    if shape.window is not None:
        pools.window_size = (shape.window - 1, -1)
    if shape.scales == "token":
        pools.k_scale = zeros((num_blocks, *inner), np.dtype(np.float32))
        if not shape.latent:
            pools.v_scale = zeros((num_blocks, *inner), np.dtype(np.float32))
    return pools


# ---- what is asked for ----


def as_integer(name: str, value: object, low: int | None = None) -> int:
    """Check an integer, no bool, from `low` up."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    number = int(value.__index__())
    if low is not None and number < low:
        raise ValueError(f"{name}: expected {low} or more, got {number}")
    return number


def _dimension(name: str, value: object) -> int:
    number = as_integer(name, value, 1)
    if number % 8 or number > MAX_DIM:
        raise ValueError(f"{name}: expected 8 .. {MAX_DIM} in steps of 8, got {number}")
    return number


def as_shape(
    group: LayerGroup,
    flat: LayerGroup,
    scales: Literal["token", "head"] | None,
    layout: Literal["HND", "NHD"],
    prefix: str,
) -> Shape:
    """Check what a group's layers look like.

    flat : what holds where the group says nothing.
    prefix : of names in messages.
    """

    def chosen(name: str) -> Any:
        own = getattr(group, name)
        return getattr(flat, name) if own is None else own

    dtype = resolve(chosen("dtype"))
    num_kv_heads = as_integer(f"{prefix}num_kv_heads", chosen("num_kv_heads"), 1)
    head_dim = _dimension(f"{prefix}head_dim", chosen("head_dim"))
    v_head_dim, latent_dim = chosen("v_head_dim"), chosen("latent_dim")
    if latent_dim is not None:
        latent_dim = _dimension(f"{prefix}latent_dim", latent_dim)
        if latent_dim > head_dim:
            raise ValueError(
                f"{prefix}latent_dim: expected at most the head_dim, {head_dim}, got {latent_dim}"
            )
        if v_head_dim is not None and v_head_dim != latent_dim:
            raise ValueError(
                f"{prefix}v_head_dim: expected None or the latent_dim, {latent_dim}, got "
                f"{v_head_dim}"
            )
        v_head_dim = latent_dim
    elif v_head_dim is None:
        v_head_dim = head_dim
    return Shape(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=_dimension(f"{prefix}v_head_dim", v_head_dim),
        latent=latent_dim is not None,
        dtype=dtype,
        window=group.window,
        layout=layout,
        scales=(scales or "token") if dtype.name in EIGHT_BIT else None,
    )


def group_of_layers(groups: Sequence[LayerGroup], num_layers: int) -> list[int]:
    """Check that each layer is in one group; give which."""
    owners = [-1] * num_layers
    for i, group in enumerate(groups):
        if group.layers is None:
            raise ValueError(f"groups[{i}].layers: expected the indices of its layers, got None")
        for layer in group.layers:
            index = as_integer(f"groups[{i}].layers", layer, 0)
            if index >= num_layers:
                raise ValueError(f"groups[{i}].layers: expected 0 .. {num_layers - 1}, got {index}")
            if owners[index] >= 0:
                raise ValueError(
                    f"groups[{i}].layers: layer {index} is in groups[{owners[index]}] already"
                )
            owners[index] = i
    if -1 in owners:
        raise ValueError(f"groups: layer {owners.index(-1)} is in none of them")
    return owners


def read_scales(
    scales: Any, num_layers: int
) -> tuple[Literal["token", "head"] | None, Sequence[Any]]:
    """The kind of scales, and for each layer the pair that is given, if any is."""
    if scales is None or scales == "token":
        return scales, ()
    if isinstance(scales, str):
        if scales != "head":
            raise ValueError(f'scales: expected "token", "head" or pairs, got {scales!r}')
        return "head", ()
    if not isinstance(scales, (list, tuple)):
        raise TypeError(f"scales: expected a str or a sequence, got {type(scales).__name__}")
    if len(scales) != num_layers:
        raise ValueError(
            f"scales: expected a pair for each of {num_layers} layers, got {len(scales)}"
        )
    for i, pair in enumerate(scales):
        if pair is not None and (not isinstance(pair, (list, tuple)) or len(pair) != 2):
            raise ValueError(f"scales[{i}]: expected a pair, of keys and of values, got {pair!r}")
    return "head", scales


def as_head_scale(scale: object, num_kv_heads: int, name: str) -> float | Array:
    """Check a scale that is given: a number, or one a head."""
    array = np.array(scale, dtype=np.float32)  # a copy: the caller may change theirs
    if array.ndim > 1 or (array.ndim and len(array) != num_kv_heads):
        raise ValueError(
            f"{name}: expected a number or {num_kv_heads} of them, got shape {array.shape}"
        )
    if not (np.isfinite(array).all() and (array >= np.finfo(np.float32).tiny).all()):
        raise ValueError(f"{name}: expected positive, finite and normal numbers, got {scale!r}")
    return array if array.ndim else float(array)
