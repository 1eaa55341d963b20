"""Moving what blocks hold between pools on a device and host memory.

Blocks are gathered into a buffer on the device and copied from there to pinned memory in one piece,
or the other way; there are two of each, so that one is copied while the other is used. The memory
that takes is bounded, whatever is moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rocmforge.hip import _ops
from rocmforge.hip._array import DeviceArray, empty
from rocmforge.hip._driver import Device, Event, Memory, copy_async, synchronize
from rocmforge.movement import entry_nbytes

__all__ = ["DeviceMover", "Staging"]

Array = npt.NDArray[Any]

CHUNK = 4 << 20  # bytes of a buffer, or one row where that is more
BUFFERS = 2


class Staging:
    """Pinned memory through which data go to a device and from it, and when it may be used again.

    Attributes
    ----------
    host : numpy.ndarray uint8 [nbytes]
        The memory. Between a copy and `wait` it is the device's.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self._memory = Memory(device, nbytes, pinned=True)
        self._event = Event(device)
        self._used = False
        self.host = self._memory.numpy()

    def wait(self) -> None:
        """Wait for the last copy."""
        if self._used:
            self._event.synchronize()

    def send(self, to: int, nbytes: int, stream: Any) -> None:
        """Enqueue a copy of the first bytes to a device's address."""
        self._copy(to, self._memory.address, nbytes, stream)

    def fetch(self, source: int, nbytes: int, stream: Any) -> None:
        """Enqueue a copy of a device's bytes to here."""
        self._copy(self._memory.address, source, nbytes, stream)

    def _copy(self, to: int, source: int, nbytes: int, stream: Any) -> None:
        copy_async(to, source, nbytes, stream, self._memory.device)
        self._event.record(stream)
        self._used = True


class _Buffers:
    """Pinned memory and memory on the device for the chunks of one transfer, in turn."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self._pairs = [
            (Staging(device, nbytes), empty(nbytes, np.uint8, device)) for _ in range(BUFFERS)
        ]
        self._turn = 0

    def next(self) -> tuple[Staging, DeviceArray]:
        self._turn = (self._turn + 1) % BUFFERS
        return self._pairs[self._turn]


class DeviceMover:
    """Moves blocks of pools on a device, in the order of one stream; see `rocmforge.movement`.

    The buffers of a transfer are kept for the next one. Where a HIP call fails, they are given up:
    nobody knows what still uses them, but freeing them waits for that.
    """

    workers = 2

    def __init__(self, device: Device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._kept: list[_Buffers] = []

    def _take(self, nbytes: int) -> _Buffers:
        try:
            buffers = self._kept.pop()
        except IndexError:
            return _Buffers(self._device, nbytes)
        return buffers if buffers.nbytes >= nbytes else _Buffers(self._device, nbytes)

    def _give_back(self, buffers: _Buffers) -> None:
        if not self._kept:
            self._kept.append(buffers)

    def _out(self, pools: Sequence[DeviceArray], ids: Array) -> Iterator[tuple[slice, Array]]:
        """Which of the ids, and their rows, until the next are asked for."""
        entry, step = _chunks(pools)
        ids = np.ascontiguousarray(ids, np.int32)
        if not len(ids):
            return
        buffers = self._take(entry * step)
        enqueued: deque[tuple[slice, Staging, int]] = deque()
        for begin in range(0, len(ids), step):
            some = ids[begin : begin + step]
            staging, there = buffers.next()
            nbytes = len(some) * entry
            rows = there[:nbytes].reshape(len(some), entry)
            _ops.gather_blocks(pools, some, rows, stream=self._stream)
            staging.fetch(there.address, nbytes, self._stream)
            enqueued.append((slice(begin, begin + len(some)), staging, nbytes))
            if len(enqueued) == BUFFERS:
                yield _arrived(*enqueued.popleft(), entry)
        while enqueued:
            yield _arrived(*enqueued.popleft(), entry)
        self._give_back(buffers)

    def _in(self, pools: Sequence[DeviceArray], ids: Array) -> Iterator[tuple[slice, Array]]:
        """Which of the ids, and memory to fill with their rows before the next is asked for."""
        entry, step = _chunks(pools)
        ids = np.ascontiguousarray(ids, np.int32)
        if not len(ids):
            return
        buffers = self._take(entry * step)
        for begin in range(0, len(ids), step):
            some = ids[begin : begin + step]
            staging, there = buffers.next()
            nbytes = len(some) * entry
            staging.wait()
            yield (
                slice(begin, begin + len(some)),
                staging.host[:nbytes].reshape(len(some), entry),
            )
            staging.send(there.address, nbytes, self._stream)
            rows = there[:nbytes].reshape(len(some), entry)
            _ops.scatter_blocks(pools, some, rows, stream=self._stream)
        self._give_back(buffers)

    def read(self, pools: Sequence[DeviceArray], ids: Array, out: Array) -> None:
        """See `rocmforge.movement.Mover`."""
        for some, rows in self._out(pools, ids):
            out[some] = rows

    def write(self, pools: Sequence[DeviceArray], ids: Array, rows: Array) -> None:
        """See `rocmforge.movement.Mover`. Enqueued."""
        for some, target in self._in(pools, ids):
            target[...] = rows[some]

    def outgoing(self, pool: DeviceArray, ids: Array) -> Iterator[list[memoryview]]:
        """See `rocmforge.movement.Mover`."""
        for _, rows in self._out([pool], ids):
            yield [rows.reshape(-1).data]

    def incoming(self, pool: DeviceArray, ids: Array) -> Iterator[list[memoryview]]:
        """See `rocmforge.movement.Mover`. Enqueued."""
        for _, rows in self._in([pool], ids):
            yield [rows.reshape(-1).data]

    def finish(self) -> None:
        """See `rocmforge.movement.Mover`."""
        synchronize(self._stream, self._device)


def _chunks(pools: Sequence[DeviceArray]) -> tuple[int, int]:
    """Bytes of a row, and rows of a chunk."""
    entry = entry_nbytes(pools)
    return entry, max(CHUNK // entry, 1)


def _arrived(some: slice, staging: Staging, nbytes: int, entry: int) -> tuple[slice, Array]:
    staging.wait()
    return some, staging.host[:nbytes].reshape(-1, entry)
