"""A manager of sequences plus the pools that hold their keys and values."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from rocmforge import ops, snapshot, tiers
from rocmforge.batch import Batch
from rocmforge.errors import DeviceError
from rocmforge.kv_cache_manager import KVCacheManager
from rocmforge.layer_group import LayerGroup
from rocmforge.movement import HostMover, Mover
from rocmforge.pools import (
    LayerPools,
    Shape,
    as_head_scale,
    as_integer,
    as_shape,
    group_of_layers,
    make_pools,
    read_scales,
    zeros,
)
from rocmforge.prefix_attention import CommonPrefix, attend_with_prefix, is_worthwhile

if TYPE_CHECKING:
    from rocmforge.hip import Device
    from rocmforge.hip.mirror import Mirror

__all__ = ["KVCache"]

Array = Any  # NumPy's, or what `rocmforge.ops` takes of other libraries


def _place(device: str) -> Device | None:
    """The HIP device of that name; None: the CPU."""
    if not isinstance(device, str):
        raise TypeError(f"device: expected a str, got {type(device).__name__}")
    if device == "cpu":
        return None
    from rocmforge import hip

    if device == "auto":
        return hip.default_device()[0]
    if device.partition(":")[0] != "hip":
        raise DeviceError(f'device: expected "auto", "cpu" or "hip:0", got {device!r}')
    found = hip.get_device(device)
    found.code_object()  # or says what is missing, before anything is allocated
    return found


class KVCache(KVCacheManager):
    """The keys and values of a model's layers in fixed-size blocks, and who holds which.

    It is a `KVCacheManager` (sequences, sharing, batches) with one pool of keys and one of values
    for each layer. A step is: ``append`` reserves slots, then each layer does ``write`` and
    ``attend``. When the last layer is written the batch is committed.

    Parameters
    ----------
    num_layers : int
        Layers of the model.
    num_blocks : int, optional
        Blocks of the pool; a block holds `block_size` tokens of all layers. Not with `groups`.
    num_kv_heads, head_dim : int, optional
        Key/value heads of a layer, and elements of a head: 8 .. 576 in steps of 8. May be missing
        where each of the groups has its own.
    v_head_dim : int, optional
        Elements of a value's head, if not `head_dim`.
    latent_dim : int, optional
        A latent cache: the value is the first `latent_dim` elements of the key, and no values are
        kept. ``head_dim=576, latent_dim=512`` and one head for multi-head latent attention.
    block_size : int
        Tokens a block, from 1 up.
    dtype : str or numpy.dtype
        float32, float16, bfloat16, float8_e4m3fn, float8_e4m3fnuz or int8, by name or as a NumPy or
        ml_dtypes type. Keys, values and queries of an 8-bit cache are of any of the first three.
    scales : {"token", "head"} or sequence, optional
        Of an 8-bit cache. "token", the default: each token's head has its own, computed by `write`,
        in pools of float32 that move with the blocks. "head": one for each head of a layer, from
        `calibrate` or `set_scales` before the layer is first written; or they are given here, for
        each layer a pair (of keys, of values) of numbers or lists of a number a head.
    layout : {"HND", "NHD"}
        Order of heads and tokens within a block: ``[num_kv_heads, block_size, head_dim]`` or
        ``[block_size, num_kv_heads, head_dim]``.
    device : str
        "cpu", "hip" or "hip:1" (a HIP device by its index), or "auto": the first HIP device that a
        code object was built for, else the CPU.
    stream : optional
        The HIP stream that all the cache's work goes to, in any form that `rocmforge.ops` takes;
        the device's default stream if None. With a device cache, arrays on the device are used
        where they are; NumPy arrays are copied there, and results back.
    groups : sequence of LayerGroup, optional
        Layers that differ in their window, heads or type, each group with blocks of its own.
        Together their `layers` must be all of the model's.
    kernel_block_size, max_sequences, max_seq_len, prefix_caching, watermark, max_pinned_blocks
        As in `KVCacheManager`.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of a wrong type.
    DeviceError
        If the device is not there.
    MemoryError
        If there is no memory for the pools.

    Examples
    --------
    >>> import numpy as np
    >>> cache = KVCache(num_layers=1, num_blocks=8, num_kv_heads=2, head_dim=8, dtype="float32")
    >>> cache.add_sequence(0)
    0
    >>> batch = cache.append([0], 3)
    >>> key = value = np.ones((3, 2, 8), np.float32)
    >>> cache.write(0, key, value, batch)
    >>> cache.attend(0, np.ones((3, 4, 8), np.float32), batch).shape
    (3, 4, 8)
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    latent_dim: int | None
    dtype: np.dtype[Any]
    layout: Literal["HND", "NHD"]
    device: str
    stream: Any
    _mirror: Mirror | None
    _layers: list[LayerPools]
    _shapes: list[Shape]
    _common: int | None  # blocks that the newest batch shares in each group without a window
    _common_prefix: CommonPrefix | None  # of the newest batch, once it was needed
    _moving: threading.RLock  # held while contents move: no block is taken or written meanwhile

    def __init__(
        self,
        num_layers: int,
        num_blocks: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        v_head_dim: int | None = None,
        latent_dim: int | None = None,
        block_size: int = 16,
        dtype: npt.DTypeLike = "bfloat16",
        scales: Any = None,
        layout: Literal["HND", "NHD"] = "HND",
        device: str = "auto",
        stream: Any = None,
        groups: Sequence[LayerGroup] | None = None,
        kernel_block_size: int | None = None,
        max_sequences: int | None = None,
        max_seq_len: int | None = None,
        prefix_caching: bool = True,
        watermark: int = 0,
        max_pinned_blocks: int | None = None,
    ) -> None:
        num_layers = as_integer("num_layers", num_layers, 1)
        if layout not in ("HND", "NHD"):
            raise ValueError(f'layout: expected "HND" or "NHD", got {layout!r}')
        place = _place(device)
        if place is None and stream is not None:
            raise ValueError(f"stream: expected None for a cache in host memory, got {stream!r}")
        kind, given = read_scales(scales, num_layers)
        super().__init__(
            num_blocks,
            groups=groups,
            block_size=block_size,
            kernel_block_size=kernel_block_size,
            max_sequences=max_sequences,
            max_seq_len=max_seq_len,
            prefix_caching=prefix_caching,
            watermark=watermark,
            max_pinned_blocks=max_pinned_blocks,
        )
        flat = LayerGroup(
            num_blocks=self.num_blocks,
            layers=range(num_layers),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            latent_dim=latent_dim,
            dtype=dtype,
        )
        prefixes = [""] if groups is None else [f"groups[{i}]." for i in range(len(groups))]
        groups = [flat] if groups is None else groups
        shapes = [
            as_shape(group, flat, kind, layout, prefix)
            for group, prefix in zip(groups, prefixes, strict=True)
        ]
        if kind is not None and not any(shape.scales for shape in shapes):
            raise ValueError(
                f"scales: expected None for {shapes[0].dtype.name}, whose elements have none, got "
                f"{scales!r}"
            )
        owners = group_of_layers(groups, num_layers)
        ratio = self.block_size // self.kernel_block_size
        self._mirror = None
        if place is not None:
            from rocmforge.hip.mirror import Mirror

            self._mirror = Mirror(place, stream, len(self.groups))
        self._layers = [
            make_pools(
                shapes[owner],
                owner,
                self.groups[owner].allocator.num_blocks * ratio,
                self.kernel_block_size,
                zeros if self._mirror is None else self._mirror.zeros,
            )
            for owner in owners
        ]
        self._shapes = shapes
        self._common = self._common_prefix = None
        self._moving = threading.RLock()
        first = shapes[0]
        self.num_layers = num_layers
        self.num_kv_heads = first.num_kv_heads
        self.head_dim = first.head_dim
        self.v_head_dim = first.v_head_dim
        self.latent_dim = first.v_head_dim if first.latent else None
        self.dtype = first.dtype
        self.layout = layout
        self.device = "cpu" if place is None else str(place)
        self.stream = stream
        for layer, pair in enumerate(given):
            if pair is not None:
                self.set_scales(layer, *pair)

    # ---- arrays ----

    @property
    def nbytes(self) -> int:
        """Bytes of all pools; pages that were never written may not be resident."""
        return sum(pool.nbytes for layer in self._layers for _, pool in layer.each())

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in all layers of the first group: keys, values and scales."""
        return sum(pool.nbytes // len(pool) for _, pool, group in self._pools() if group == 0)

    def _layer(self, layer: int) -> LayerPools:
        try:
            if layer >= 0 and layer is not True and layer is not False:
                return self._layers[layer]
        except (IndexError, TypeError):
            pass
        index = as_integer("layer", layer)
        raise ValueError(f"layer: expected 0 .. {self.num_layers - 1}, got {index}")

    def _pools(self) -> list[tuple[str, Array, int]]:
        """Whatever moves with the blocks: name, array with an entry a block, layer group."""
        ratio = self.block_size // self.kernel_block_size
        pools = []
        for layer, arrays in enumerate(self._layers):
            for name, pool in arrays.each():
                if ratio > 1:
                    pool = pool.reshape(len(pool) // ratio, ratio, *pool.shape[1:])
                pools.append((f"layer{layer}.{name}", pool, arrays.group))
        return pools

    @contextlib.contextmanager
    def _contents(self) -> Iterator[Mover]:
        """Hold still what the blocks hold, for who moves it: none is taken or written meanwhile."""
        with self._moving:
            if self._mirror is None:
                yield HostMover()
                return
            with self._mirror.lock:
                self._mirror.copy_blocks(self._pools_of)
            yield self._mirror.mover

    def _construction(self) -> dict[str, Any]:
        """What `snapshot.construct` makes such a cache of; JSON can hold it."""
        groups = [
            {
                "num_blocks": group.allocator.num_blocks,
                "window": shape.window,
                "layers": [i for i, layer in enumerate(self._layers) if layer.group == number],
                "num_kv_heads": shape.num_kv_heads,
                "head_dim": shape.head_dim,
                "v_head_dim": None if shape.latent else shape.v_head_dim,
                "latent_dim": shape.v_head_dim if shape.latent else None,
                "dtype": shape.dtype.name,
            }
            for number, (group, shape) in enumerate(zip(self.groups, self._shapes, strict=True))
        ]
        scales: Any = next((shape.scales for shape in self._shapes if shape.scales), None)
        if scales == "head":
            scales = [
                None if pair is None else [np.asarray(scale).tolist() for scale in pair]
                for pair in (layer.head_scales for layer in self._layers)
            ]
        return {
            "num_layers": self.num_layers,
            "groups": groups,
            "scales": scales,
            "written": [layer.written for layer in self._layers],
            "layout": self.layout,
            "block_size": self.block_size,
            "kernel_block_size": self.kernel_block_size,
            "max_sequences": self.max_sequences,
            "max_seq_len": self.max_seq_len,
            "prefix_caching": self.prefix_caching,
            "watermark": self.watermark,
            "max_pinned_blocks": self.max_pinned_blocks,
        }

    def k_cache(self, layer: int) -> Any:
        """The keys of a layer: ``[num_blocks, num_kv_heads, block_size, head_dim]`` in layout HND.

        A view, for as long as the cache lives. In layout NHD the second and third dimension change
        places. Blocks are kernel blocks.
        """
        return self._layer(layer).keys

    def v_cache(self, layer: int) -> Any:
        """The values of a layer, as `k_cache`; in a latent cache a part of the keys."""
        return self._layer(layer).read_values

    def scales(self, layer: int) -> tuple[Any, Any]:
        """The scales of a layer's keys and values, as `rocmforge.ops` takes them; None for none.

        Pools are float32 ``[num_blocks, num_kv_heads, block_size]``, views as `k_cache`.
        """
        pools = self._layer(layer)
        return pools.k_scale, pools.v_scale

    def set_scales(self, layer: int, k_scale: Any, v_scale: Any = None) -> None:
        """Set the scales of a layer whose scales are a head's, before anything is written to it.

        Parameters
        ----------
        layer : int
            Index of the model's layer.
        k_scale, v_scale : float or array ``[num_kv_heads]``
            An element stands for its value times the scale. None for the values of a latent cache.

        Raises
        ------
        ValueError, TypeError
            If a number is not positive and finite, there are too many, the layer's scales are of
            another kind, or it was written to, so that what it holds would change.
        """
        pools = self._layer(layer)
        shape = self._shapes[pools.group]
        if shape.scales != "head":
            raise ValueError(f'scales: layer {layer} has none that can be set; see scales="head"')
        if pools.written:
            raise ValueError(f"scales: layer {layer} was written to with those that it has")
        if shape.latent != (v_scale is None):
            raise ValueError(
                f"v_scale: expected {'None' if shape.latent else 'a scale'}, got {v_scale!r}"
            )
        k_scale = as_head_scale(k_scale, shape.num_kv_heads, "k_scale")
        if not shape.latent:
            v_scale = as_head_scale(v_scale, shape.num_kv_heads, "v_scale")
        pair = (k_scale, v_scale)
        if self._mirror is not None:
            k_scale, v_scale = self._mirror.on_device(k_scale), self._mirror.on_device(v_scale)
        pools.head_scales, pools.k_scale, pools.v_scale = pair, k_scale, v_scale

    def calibrate(self, layer: int, key: Array, value: Array | None) -> None:
        """Set the scales of a layer so that the largest element of these tokens is the type's.

        Parameters
        ----------
        layer : int
            Index of the model's layer.
        key, value : array ``[num_tokens, num_kv_heads, head_dim]``
            Some typical tokens, as for `write`; larger elements are saturated later. Of arrays on a
            device the result is waited for.

        Raises
        ------
        ValueError, TypeError
            As `set_scales` and `rocmforge.ops.calibrate`.
        """
        dtype = self._shapes[self._layer(layer).group].dtype
        self.set_scales(layer, *ops.calibrate(key, value, dtype, stream=self._stream_of(key)))

    def _stream_of(self, array: Any) -> Any:
        """The stream for an operation on an array that may be in host memory."""
        return None if isinstance(array, np.ndarray) else self.stream

    def block_data(self, layer: int, block_id: int) -> tuple[Any, Any]:
        """The keys and values of one block of a layer: two views of the shape of a block.

        With a smaller kernel block they have one dimension more: the kernel blocks.

        Raises
        ------
        InvalidBlockError
            If the block id is out of range.
        """
        pools = self._layer(layer)
        block = self.groups[pools.group].allocator.get_block(block_id).id
        ratio = self.block_size // self.kernel_block_size
        if ratio == 1:
            return pools.keys[block], pools.read_values[block]
        some = slice(block * ratio, (block + 1) * ratio)
        return pools.keys[some], pools.read_values[some]

    # ---- steps ----

    def append(
        self, sequence_ids: Any, num_tokens: Any, token_ids: Any = None, *, out: Batch | None = None
    ) -> Batch:
        """Reserve slots as `KVCacheManager.append`, and copy the shared blocks it will write to.

        On a device those copies, the table's changes and the batch's arrays are enqueued; should
        that fail, the batch's first use tries again, and raises if it must.
        """
        with self._moving:
            batch = super().append(sequence_ids, num_tokens, token_ids, out=out)
            self._common = self._common_prefix = None
            if self._mirror is not None:
                with self._mirror.lock, contextlib.suppress(DeviceError):
                    self._mirror.note(batch)
                    self._mirror.update(self.groups, batch, self._pools_of)
                return batch
            for group, part in enumerate(batch.groups):
                if len(part.copies):
                    ops.copy_blocks(self._pools_of(group), part.copies)
        return batch

    def _pools_of(self, group: int) -> list[Any]:
        """Whatever moves with a group's kernel blocks."""
        return [pool for layer in self._layers if layer.group == group for _, pool in layer.each()]

    def write(self, layer: int, key: Array, value: Array | None, batch: Batch) -> None:
        """Store the keys and values of a batch's new tokens in one layer.

        When all layers of a batch are written, it is committed, provided that the tokens before
        it are.

        Parameters
        ----------
        layer : int
            Index of the model's layer.
        key, value : array ``[num_tokens, num_kv_heads, head_dim]``
            In the batch's order and the cache's dtype, or for an 8-bit cache float32, float16 or
            bfloat16; values have ``v_head_dim`` elements. value is None for a latent cache.
        batch : Batch
            Made by `append` of this cache, not committed yet.

        Raises
        ------
        ValueError, TypeError
            If a shape or dtype differs, the batch is stale, committed or of another cache, or a
            layer's scales are not known yet.
        """
        pools = self._layer(layer)
        options = {
            "k_scale": pools.k_scale,
            "v_scale": pools.v_scale,
            "layout": self.layout,
            "stream": self.stream,
        }
        mirror = self._mirror
        with self._moving:
            self._check_writable_batch(batch)
            if mirror is None:
                slots: Any = batch.groups[pools.group].slot_mapping
                ops.write_kv(key, value, pools.keys, pools.values, slots, **options)
            else:
                key, value = mirror.on_device(key), mirror.on_device(value)
                with mirror.lock:
                    mirror.update(self.groups, batch, self._pools_of)
                    slots = mirror.slot_mapping(batch, pools.group)
                    ops.write_kv(key, value, pools.keys, pools.values, slots, **options)
            pools.written = True
            self._mark_written(batch, layer, self.num_layers)

    def attend(
        self,
        layer: int,
        query: Array,
        batch: Batch,
        out: Array | None = None,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        mask: Array | None = None,
        return_lse: bool = False,
        deterministic: bool = True,
    ) -> Any:
        """Causal attention of a batch's new tokens over all tokens of their sequences.

        Parameters
        ----------
        layer : int
            Index of the model's layer. Its group's window holds.
        query : array ``[num_tokens, num_heads, head_dim]``
            In the cache's dtype, or for an 8-bit cache float32, float16 or bfloat16; `num_heads` is
            a multiple of `num_kv_heads`.
        batch : Batch
            The batch whose keys and values of this layer were written.
        out : array, optional
            ``[num_tokens, num_heads, v_head_dim]`` of the query's dtype.
        scale, softcap, alibi_slopes, sinks, mask, return_lse
            As in `rocmforge.ops.paged_attention`; a latent cache needs `scale`.
        deterministic : bool
            True: a sequence's result is the same to the bit, whatever else is in the batch. False
            allows what is faster: keys and values that the whole batch shares are read once for
            all sequences, where that pays.

        Returns
        -------
        out : array ``[num_tokens, num_heads, v_head_dim]``
            `out`, or a new array.
        lse : array float32 ``[num_tokens, num_heads]``
            With `return_lse`: the logarithm of the softmax's sum.

        Raises
        ------
        ValueError, TypeError
            If a shape or dtype differs, or the batch is stale or of another cache.
        """
        pools = self._layer(layer)
        self._check_batch(batch)
        options: dict[str, Any] = {
            "scale": scale,
            "window_size": pools.window_size,
            "softcap": softcap,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "mask": mask,
            "k_scale": pools.k_scale,
            "v_scale": pools.v_scale,
            "max_seqlen_q": batch.max_seqlen_q,
            "max_seq_len": batch.max_seq_len,
            "deterministic": deterministic,
            "layout": self.layout,
            "return_lse": return_lse,
            "stream": self.stream,
        }
        if self._mirror is not None:
            return self._attend_there(self._mirror, pools, query, batch, out, options)
        table = batch.groups[pools.group].block_table
        options |= {"rows": batch.rows, "out": out}
        return self._attend(batch, pools, query, table, batch.seq_lens, batch.cu_seqlens_q, options)

    def _attend(
        self,
        batch: Batch,
        pools: LayerPools,
        query: Any,
        table: Any,
        seq_lens: Any,
        cu_seqlens_q: Any,
        options: dict[str, Any],
    ) -> Any:
        """Attention, in two parts where that is allowed and pays."""
        caches = (pools.keys, pools.read_values)
        prefix = None
        if not options["deterministic"]:
            prefix = self._worthwhile_prefix(batch, pools, options["alibi_slopes"])
        if prefix is not None:
            return attend_with_prefix(prefix, query, *caches, table, cu_seqlens_q, **options)
        return ops.paged_attention(query, *caches, table, seq_lens, cu_seqlens_q, **options)

    def _worthwhile_prefix(
        self, batch: Batch, pools: LayerPools, alibi_slopes: Any
    ) -> CommonPrefix | None:
        """What all sequences of the newest batch share, if reading it once pays."""
        if self._mirror is not None and self._mirror.is_capturing():
            return None  # the graph serves batches that share less, too
        if self._common is None:
            counts = [
                part.num_common_blocks
                for part, group in zip(batch.groups, self.groups, strict=True)
                if not group.window
            ]
            self._common = min(counts, default=0)
        size = self.kernel_block_size
        if not is_worthwhile(self._common * size, batch, pools.window_size, alibi_slopes):
            return None
        if self._common_prefix is None:
            prefix = CommonPrefix.of(batch, self._common, size)
            if self._mirror is not None:
                prefix = self._mirror.common_prefix(prefix)
            self._common_prefix = prefix
        return self._common_prefix

    def _attend_there(
        self,
        mirror: Mirror,
        pools: LayerPools,
        query: Any,
        batch: Batch,
        out: Any,
        options: dict[str, Any],
    ) -> Any:
        """`attend` on a device, whose arrays take the places of the batch's own."""
        on_host = isinstance(query, np.ndarray)
        for name in ("alibi_slopes", "sinks", "mask"):
            options[name] = mirror.on_device(options[name])
        query = mirror.on_device(query)
        with mirror.lock:
            mirror.update(self.groups, batch, self._pools_of)
            options |= {"rows": mirror.rows(batch), "out": None if on_host else out}
            result = self._attend(
                batch,
                pools,
                query,
                mirror.tables[pools.group],
                mirror.seq_lens(batch),
                mirror.cu_seqlens_q(batch),
                options,
            )
        if not on_host:
            return result
        if options["return_lse"]:
            return mirror.on_host(result[0], out), mirror.on_host(result[1])
        return mirror.on_host(result, out)

    # ---- keeping ----

    def save(
        self,
        path: str | os.PathLike[str],
        sequences: Sequence[int] | None = None,
        with_data: bool = True,
    ) -> None:
        """Write the cache to a file: sequences, prefix cache, and what the blocks hold.

        Tokens that have a slot but were not committed come along as such: their batch does not, so
        that `truncate` to `committed_len` is the way to go on.

        Parameters
        ----------
        path : path
            The file, which is replaced at once when all is written and synced: there is the old
            one or the new one at any moment.
        sequences : sequence of int, optional
            Those to keep; all when not given. The others are left out as if they had been freed:
            their full committed blocks stay cached. With none, only the prefix cache is kept.
        with_data : bool
            Without the blocks' contents where those are kept elsewhere; ids stay the same.

        Raises
        ------
        UnknownSequenceError
            If a sequence is not in the cache.
        OSError
            If the file cannot be written; the old one stays.
        SnapshotError
            If the file is being saved by somebody else.
        ImportError
            If ``safetensors`` or ``xxhash`` is not installed (extra ``snapshots``).

        Notes
        -----
        While it runs, appends and writes of other threads wait. On a terminal a progress bar
        appears after a second.
        """
        snapshot.save(self, path, sequences, with_data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, with_data: bool = True, **options: Any) -> Self:
        """Make a cache from a file that `save` wrote.

        Parameters
        ----------
        path : path
            The file.
        with_data : bool
            Read the blocks' contents. Without, they are zeros and yours to fill in.
        options
            Arguments of the constructor that shall be others than they were: a larger
            `num_blocks`, limits. One that tells what the blocks look like must be as it was.
            `device` and `stream` are those of the new cache, whatever the saved one was on.

        Returns
        -------
        KVCache

        Raises
        ------
        SnapshotError
            If the file is cut short, damaged, not a snapshot, of a newer version, hostile, or of
            a cache that differs from what `options` say.
        DeviceError
            If the device is not there, has too little memory, or fails.
        OSError
            If it cannot be read.
        ImportError
            As `save`.
        """
        return snapshot.load(cls, path, with_data, **options)

    def read_blocks(self, ids: Any, out: Array | None = None, *, group: int = 0) -> Array:
        """Copy blocks to a buffer, a row of bytes each: all layers of a block are contiguous.

        Parameters
        ----------
        ids : sequence of int, or integer array ``[n]``
            Blocks of the group, held by a sequence or pinned, so that nobody else gets them.
        out : array, optional
            uint8 ``[n, nbytes]``, writable, any strides.
        group : int
            The layer group. With one group ``nbytes`` is `block_nbytes`.

        Returns
        -------
        array
            uint8 ``[n, nbytes]``: `out`, or a new one.

        Raises
        ------
        InvalidBlockError
            If an id is out of range.
        ValueError, TypeError
            If another argument is wrong.
        """
        return tiers.read_blocks(self, ids, out, group)

    def insert_prefix(
        self, token_ids: Any, data: Any, salt: bytes | str | None = None, *, priority: int = 0
    ) -> int:
        """Put computed blocks of a prefix into the prefix cache, from a buffer.

        Blocks that are cached already stay as they are. The others are taken, filled, and found by
        others when all of them are: where `data` fails on the way, nothing is published.

        Parameters
        ----------
        token_ids : sequence of int, or int32 or int64 array ``[num_tokens]``
            The tokens from the start of a sequence on; whole blocks of them count.
        data : array, bytes, or iterable of buffers
            uint8 ``[num_tokens // block_size, nbytes]``, or an iterable that gives a buffer of
            `nbytes` for each block, so that they can come one after the other. A row has the
            layout of `read_blocks`; with several layer groups, their rows one after the other, of
            which those that a window has passed are not read.
        salt, priority
            As in `add_sequence`.

        Returns
        -------
        int
            Tokens of the prefix that are cached now.

        Raises
        ------
        OutOfBlocksError
            If there are too few blocks, or the reserve (`watermark`) would be taken.
        ValueError, TypeError
            If `data` has another size, a number is out of range, or there is no place for one
            sequence more, which holds the blocks meanwhile (`max_sequences`).
        """
        return tiers.insert_prefix(self, token_ids, data, salt, priority)

    def suspend(self, sequence_id: int) -> tiers.SuspendedSequence:
        """Move a sequence to host memory, to make room for others; `resume` brings it back.

        Its blocks are given up as by `free`. Its batches are stale.

        Raises
        ------
        UnknownSequenceError
            If the sequence is not in the cache.
        """
        return tiers.suspend(self, sequence_id)

    def resume(self, sequence_id: int, buffer: tiers.SuspendedSequence) -> int:
        """Bring a suspended sequence back, under this id, as it was.

        What of its prefix is still cached is shared, the rest is copied. After a
        `reset_prefix_cache`, and in another cache than it was suspended in, it shares nothing, as
        the model's weights may be others.

        Returns
        -------
        int
            Tokens that were found in the cache.

        Raises
        ------
        OutOfBlocksError
            If there are too few blocks.
        ValueError, TypeError
            If the id is in use, `max_sequences` are there already, or `buffer` is no sequence of
            such a cache.
        """
        return tiers.resume(self, sequence_id, buffer)

    def __reduce__(self) -> Any:
        """Refuse: the contents belong in a file of their own."""
        raise TypeError(f"cannot pickle {type(self).__name__}: use save and load")
