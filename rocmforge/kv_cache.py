"""A manager of sequences plus the pools that hold their keys and values."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rocmforge import ops
from rocmforge.batch import Batch
from rocmforge.dtypes import resolve
from rocmforge.errors import DeviceError
from rocmforge.kv_cache_manager import KVCacheManager

__all__ = ["KVCache"]

Array = npt.NDArray[Any]


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    number = value.__index__()
    if number < 1:
        raise ValueError(f"{name}: expected 1 or more, got {number}")
    return number


class KVCache(KVCacheManager):
    """The keys and values of a model's layers in fixed-size blocks, and who holds which.

    It is a `KVCacheManager` (sequences, sharing, batches) with one pool of keys and one of values
    for each layer. A step is: ``append`` reserves slots, then each layer does ``write`` and
    ``attend``. When the last layer is written the batch is committed.

    Parameters
    ----------
    num_layers : int
        Layers of the model.
    num_blocks : int
        Blocks of the pool; a block holds `block_size` tokens of all layers.
    num_kv_heads, head_dim : int
        Key/value heads of a layer, and elements of a head: 8 .. 512 in steps of 8.
    block_size : int
        Tokens a block, from 1 up.
    dtype : str or numpy.dtype
        float32, float16 or bfloat16, by name or as a NumPy or ml_dtypes type.
    layout : {"HND", "NHD"}
        Order of heads and tokens within a block: ``[num_kv_heads, block_size, head_dim]`` or
        ``[block_size, num_kv_heads, head_dim]``.
    device : str
        "cpu", or "auto", which takes the best device at hand: in this version the CPU.
    max_sequences, max_seq_len, prefix_caching, watermark, max_pinned_blocks
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
    dtype: np.dtype[Any]
    layout: Literal["HND", "NHD"]
    device: str
    _keys: list[Array]
    _values: list[Array]

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        dtype: npt.DTypeLike = "bfloat16",
        layout: Literal["HND", "NHD"] = "HND",
        device: str = "auto",
        max_sequences: int | None = None,
        max_seq_len: int | None = None,
        prefix_caching: bool = True,
        watermark: int = 0,
        max_pinned_blocks: int | None = None,
    ) -> None:
        num_layers = _positive("num_layers", num_layers)
        num_kv_heads = _positive("num_kv_heads", num_kv_heads)
        head_dim = _positive("head_dim", head_dim)
        if head_dim % 8 or head_dim > 512:
            raise ValueError(f"head_dim: expected 8 .. 512 in steps of 8, got {head_dim}")
        if layout not in ("HND", "NHD"):
            raise ValueError(f'layout: expected "HND" or "NHD", got {layout!r}')
        if device not in ("auto", "cpu"):
            raise DeviceError(f'device: expected "auto" or "cpu", got {device!r}')
        storage = resolve(dtype)
        super().__init__(
            num_blocks,
            block_size=block_size,
            max_sequences=max_sequences,
            max_seq_len=max_seq_len,
            prefix_caching=prefix_caching,
            watermark=watermark,
            max_pinned_blocks=max_pinned_blocks,
        )
        heads_and_tokens = (num_kv_heads, self.block_size)
        shape = (self.num_blocks, *heads_and_tokens[:: 1 if layout == "HND" else -1], head_dim)
        # zeros, not empty: the operating system then hands out the pages as they are first written
        self._keys = [np.zeros(shape, storage) for _ in range(num_layers)]
        self._values = [np.zeros(shape, storage) for _ in range(num_layers)]
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = storage
        self.layout = layout
        self.device = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of all pools; pages that were never written may not be resident."""
        return sum(pool.nbytes for pool in (*self._keys, *self._values))

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in all layers, keys and values."""
        return (
            2
            * self.num_layers
            * self.num_kv_heads
            * self.block_size
            * self.head_dim
            * self.dtype.itemsize
        )

    def _layer(self, layer: int) -> int:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"layer: expected an integer, got {type(layer).__name__}")
        index = layer.__index__()
        if not 0 <= index < self.num_layers:
            raise ValueError(f"layer: expected 0 .. {self.num_layers - 1}, got {index}")
        return index

    def k_cache(self, layer: int) -> Array:
        """The keys of a layer: ``[num_blocks, num_kv_heads, block_size, head_dim]`` in layout HND.

        A view, for as long as the cache lives. In layout NHD the second and third dimension change
        places.
        """
        return self._keys[self._layer(layer)]

    def v_cache(self, layer: int) -> Array:
        """The values of a layer, as `k_cache`."""
        return self._values[self._layer(layer)]

    def block_data(self, layer: int, block_id: int) -> tuple[Array, Array]:
        """The keys and values of one block of a layer: two views of the shape of a block.

        Raises
        ------
        InvalidBlockError
            If the block id is out of range.
        """
        index = self._layer(layer)
        block = self.allocator.get_block(block_id).id
        return self._keys[index][block], self._values[index][block]

    def append(
        self, sequence_ids: Any, num_tokens: Any, token_ids: Any = None, *, out: Batch | None = None
    ) -> Batch:
        """Reserve slots as `KVCacheManager.append`, and copy the shared blocks it will write to."""
        batch = super().append(sequence_ids, num_tokens, token_ids, out=out)
        if len(batch.copies):
            ops.copy_blocks([*self._keys, *self._values], batch.copies)
        return batch

    def write(self, layer: int, key: Array, value: Array, batch: Batch) -> None:
        """Store the keys and values of a batch's new tokens in one layer.

        When all layers of a batch are written, it is committed, provided that the tokens before
        it are.

        Parameters
        ----------
        layer : int
            Index of the model's layer.
        key, value : array ``[num_tokens, num_kv_heads, head_dim]``
            In the cache's dtype and in the batch's order.
        batch : Batch
            Made by `append` of this cache, not committed yet.

        Raises
        ------
        ValueError, TypeError
            If a shape or dtype differs, or the batch is stale, committed or of another cache.
        """
        index = self._layer(layer)
        self._check_writable_batch(batch)
        ops.write_kv(
            key,
            value,
            self._keys[index],
            self._values[index],
            batch.slot_mapping,
            layout=self.layout,
        )
        self._mark_written(batch, index, self.num_layers)

    def attend(self, layer: int, query: Array, batch: Batch, out: Array | None = None) -> Array:
        """Causal attention of a batch's new tokens over all tokens of their sequences.

        Parameters
        ----------
        layer : int
            Index of the model's layer.
        query : array ``[num_tokens, num_heads, head_dim]``
            In the cache's dtype; `num_heads` is a multiple of `num_kv_heads`.
        batch : Batch
            The batch whose keys and values of this layer were written.
        out : array, optional
            Of the query's shape and dtype.

        Returns
        -------
        array ``[num_tokens, num_heads, head_dim]``
            `out`, or a new array.

        Raises
        ------
        ValueError, TypeError
            If a shape or dtype differs, or the batch is stale or of another cache.
        """
        index = self._layer(layer)
        self._check_batch(batch)
        result: Array = ops.paged_attention(
            query,
            self._keys[index],
            self._values[index],
            self.block_table,
            batch.seq_lens,
            batch.cu_seqlens_q,
            rows=batch.rows,
            max_seqlen_q=batch.max_seqlen_q,
            max_seq_len=batch.max_seq_len,
            layout=self.layout,
            out=out,
        )
        return result
