"""What a cache on a device needs there beside its pools: block table and the batch's arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rocmforge.hip import _ops
from rocmforge.hip._array import DeviceArray, empty, from_numpy, zeros
from rocmforge.hip._driver import Device, is_capturing
from rocmforge.hip.mover import DeviceMover, Staging
from rocmforge.prefix_attention import CommonPrefix

if TYPE_CHECKING:
    from rocmforge.batch import Batch
    from rocmforge.cache_group import CacheGroup

__all__ = ["Mirror"]

Array: TypeAlias = npt.NDArray[Any]

# More changed entries than this are not worth as many launches: the whole table is copied.
MAX_DELTA = 16384
# Pinned buffers in turn: a batch's arrays are copied from one while the next batch fills another.
RING = 3
# Parts of the buffer for a batch's arrays, after seq_lens, cu_seqlens_q and rows.
PREFIX, SLOTS = 3, 4


class Mirror:
    """The block table and the newest batch's arrays on a device, at addresses that stay.

    All work goes to one stream. Whatever fails is tried again before the next batch is used: copies
    of blocks that were planned are kept until they were enqueued.

    Attributes
    ----------
    tables : list of DeviceArray int32 [num_rows, max_blocks]
        Of each layer group.
    lock : threading.Lock
        Held from `update` until what uses the arrays was enqueued.
    mover : DeviceMover
        Of the pools' contents.
    """

    def __init__(self, device: Device, stream: Any, num_groups: int) -> None:
        self.device = device
        self.stream = stream
        self.lock = threading.Lock()
        self.mover = DeviceMover(device, stream)
        self.tables: list[DeviceArray] = [empty((0, 0), np.int32, device)] * num_groups
        self._epochs = [-1] * num_groups
        self._copies: list[list[Array]] = [[] for _ in range(num_groups)]
        self._deltas: list[list[Array]] = [[] for _ in range(num_groups)]
        self._batch: Batch | None = None
        self._ring: list[Staging] = []
        self._turn = 0
        self._buffer: DeviceArray | None = None
        self._offsets: tuple[int, ...] = ()
        self._capacity = (0, 0)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """A pool."""
        return zeros(shape, dtype, self.device, self.stream)

    def on_device(self, array: Any) -> Any:
        """Copy a NumPy array to the device; anything else is there, or its operation says so."""
        if isinstance(array, np.ndarray):
            return from_numpy(array, self.device, self.stream)
        return array

    def on_host(self, array: DeviceArray, out: Array | None = None) -> Array:
        """Wait for an array, and copy it to a new one or to `out`."""
        result = array.numpy(self.stream)
        if out is None:
            return result
        out[...] = result
        return out

    def note(self, batch: Batch) -> None:
        """Remember what a new batch changes; `update` does it."""
        self._batch = None
        for part, copies, deltas in zip(batch.groups, self._copies, self._deltas, strict=True):
            if len(part.copies):
                copies.append(part.copies)
            if len(part.table_delta):
                deltas.append(part.table_delta)

    def update(
        self,
        groups: Sequence[CacheGroup],
        batch: Batch,
        pools_of: Callable[[int], list[DeviceArray]],
    ) -> None:
        """Enqueue everything that the device must know before the batch is used."""
        self.copy_blocks(pools_of)
        for index, group in enumerate(groups):
            self._update_table(index, group)
        if self._batch is not batch:
            self._upload(batch)
            self._batch = batch

    def copy_blocks(self, pools_of: Callable[[int], list[DeviceArray]]) -> None:
        """Enqueue the planned copies, without which blocks do not hold what they should."""
        for index, copies in enumerate(self._copies):
            while copies:
                _ops.copy_blocks(pools_of(index), copies[0], stream=self.stream)
                del copies[0]

    def _update_table(self, index: int, group: CacheGroup) -> None:
        deltas, table = self._deltas[index], group.block_table
        grown = self.tables[index].shape != table.shape
        if grown or group.table_epoch != self._epochs[index] or sum(map(len, deltas)) > MAX_DELTA:
            self._epochs[index] = -1
            if grown:
                self.tables[index] = from_numpy(table, self.device, self.stream)
            else:
                self.tables[index].copy_from(np.ascontiguousarray(table), self.stream)
            self._epochs[index] = group.table_epoch
            deltas.clear()
        while deltas:
            row, column, value = np.ascontiguousarray(deltas[0].T)
            _ops.update_table(self.tables[index], row, column, value, stream=self.stream)
            del deltas[0]

    def _reserve(self, sequences: int, tokens: int) -> None:
        """Room for a batch; grows in powers of two, and only then do addresses change."""
        if sequences <= self._capacity[0] and tokens <= self._capacity[1]:
            return
        sequences = max(1 << (sequences - 1).bit_length(), self._capacity[0], 16)
        tokens = max(1 << (tokens - 1).bit_length(), self._capacity[1], 16)
        sizes = (
            4 * sequences,
            4 * (sequences + 1),
            4 * sequences,
            4 * (sequences + 3),
            *[8 * tokens] * len(self.tables),
        )
        offsets = np.cumsum([0, *(-(-size // 256) * 256 for size in sizes)])
        buffer = empty((int(offsets[-1]),), np.uint8, self.device)
        ring = [Staging(self.device, int(offsets[-1])) for _ in range(RING)]
        self._buffer, self._ring, self._turn = buffer, ring, 0
        self._offsets = tuple(int(offset) for offset in offsets)
        self._capacity = (sequences, tokens)

    def _upload(self, batch: Batch) -> None:
        self._reserve(max(len(batch), 1), max(batch.num_tokens, 1))
        slots = [part.slot_mapping for part in batch.groups]
        arrays = dict(enumerate([batch.seq_lens, batch.cu_seqlens_q, batch.rows]))
        self._send(arrays | dict(enumerate(slots, SLOTS)))

    def _send(self, arrays: dict[int, Array]) -> None:
        """Copy arrays to their parts of the buffer on the device, from the first one's on."""
        assert self._buffer is not None
        staging = self._ring[self._turn]
        self._turn = (self._turn + 1) % RING
        staging.wait()
        first = end = self._offsets[min(arrays)]
        for index, array in arrays.items():
            begin = self._offsets[index] - first
            staging.host[begin : begin + array.nbytes] = array.view(np.uint8)
            end = max(end, begin + first + array.nbytes)
        staging.send(self._buffer.address + first, end - first, self.stream)

    def _part(self, index: int, count: int, dtype: type) -> DeviceArray:
        assert self._buffer is not None
        begin = self._offsets[index]
        return self._buffer[begin : begin + count * np.dtype(dtype).itemsize].view(dtype)

    def seq_lens(self, batch: Batch) -> DeviceArray:
        """The batch's lengths, int32 [num_seqs], on the device."""
        return self._part(0, len(batch), np.int32)

    def cu_seqlens_q(self, batch: Batch) -> DeviceArray:
        """Where its sequences' query tokens start, int32 [num_seqs + 1]."""
        return self._part(1, len(batch) + 1, np.int32)

    def rows(self, batch: Batch) -> DeviceArray:
        """Its sequences' rows of the tables, int32 [num_seqs]."""
        return self._part(2, len(batch), np.int32)

    def common_prefix(self, prefix: CommonPrefix) -> CommonPrefix:
        """Copy its arrays to the device, where the next batch's take their place."""
        arrays = (prefix.rest_lens, prefix.length, prefix.cu_seqlens_q)
        numbers = np.concatenate(arrays)
        self._send({PREFIX: numbers})
        there = self._part(PREFIX, len(numbers), np.int32)
        n = len(prefix.rest_lens)
        return replace(
            prefix, rest_lens=there[:n], length=there[n : n + 1], cu_seqlens_q=there[n + 1 :]
        )

    def is_capturing(self) -> bool:
        """Whether what is enqueued now will be replayed, for other batches too."""
        return is_capturing(self.stream)

    def slot_mapping(self, batch: Batch, group: int) -> DeviceArray:
        """Its slots in a layer group's pools, int64 [num_tokens]."""
        return self._part(SLOTS + group, batch.num_tokens, np.int64)
