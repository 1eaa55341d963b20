"""Moving what blocks hold between a cache's pools and host memory: one seam for all who do.

Snapshots go through `outgoing` and `incoming`, which give memory to write from or to read into, a
piece at a time; other tiers through `read` and `write`, of a row of bytes a block. `HostMover` is
for pools in host memory, whose pieces are the blocks themselves; that for pools on a GPU is
`rocmforge.hip.mover.DeviceMover`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rocmforge import ops

__all__ = ["HostMover", "Mover", "entry_nbytes"]

Array = npt.NDArray[Any]

CHUNK = 1 << 20  # bytes at a time, so that a checksum finds them in the processor's cache
MAX_PIECES = 512  # buffers at a time; Linux takes 1024
MAX_ROWS = 64  # at a time where rows must be made contiguous


def entry_nbytes(pools: Sequence[Any]) -> int:
    """Bytes of a block in all of some pools, which have an entry a block."""
    return sum(pool.nbytes // max(len(pool), 1) for pool in pools)


class Mover(Protocol):
    """Moves blocks of pools ``[num_blocks, ...]`` that are contiguous; ids are integers ``[n]``."""

    workers: int
    """Threads that may share the work on one cache."""

    def read(self, pools: Sequence[Any], ids: Array, out: Array) -> None:
        """Copy blocks to uint8 ``[n, nbytes]``, in a row all pools' parts, and wait for it."""

    def write(self, pools: Sequence[Any], ids: Array, rows: Array) -> None:
        """Copy such rows to different blocks; `rows` may be changed afterwards."""

    def outgoing(self, pool: Any, ids: Array) -> Iterator[list[memoryview]]:
        """Give the bytes of blocks with ascending ids, to be used before the next are asked for."""

    def incoming(self, pool: Any, ids: Array) -> Iterator[list[memoryview]]:
        """Give memory for the bytes of such blocks, to be filled before the next is asked for."""

    def finish(self) -> None:
        """Wait until all that was moved is where it belongs."""


class HostMover:
    """Moves blocks of pools in host memory."""

    # what takes long is the system's copying and its clearing of new memory
    workers = 4

    def read(self, pools: Sequence[Array], ids: Array, out: Array) -> None:
        """See `Mover`."""
        ids = np.ascontiguousarray(ids, np.int32)
        if out.strides[1] == 1:
            ops.gather_blocks(pools, ids, out)
            return
        for begin in range(0, len(ids), MAX_ROWS):
            some = slice(begin, begin + MAX_ROWS)
            out[some] = ops.gather_blocks(pools, ids[some])

    def write(self, pools: Sequence[Array], ids: Array, rows: Array) -> None:
        """See `Mover`."""
        ids = np.ascontiguousarray(ids, np.int32)
        if rows.strides[1] == 1:
            ops.scatter_blocks(pools, ids, rows)
            return
        for begin in range(0, len(ids), MAX_ROWS):
            some = slice(begin, begin + MAX_ROWS)
            ops.scatter_blocks(pools, ids[some], np.ascontiguousarray(rows[some]))

    def outgoing(self, pool: Array, ids: Array) -> Iterator[list[memoryview]]:
        """See `Mover`. Nothing is copied: the pieces are the blocks, neighbours together."""
        if not pool.flags.c_contiguous:
            raise ValueError("expected a pool whose blocks are contiguous")
        memory = pool.reshape(-1).view(np.uint8).data
        return _pieces(memory, entry_nbytes([pool]), ids)

    incoming = outgoing

    def finish(self) -> None:
        """See `Mover`."""


def _pieces(memory: memoryview, entry: int, ids: Array) -> Iterator[list[memoryview]]:
    """The entries of some ids, ascending, of `entry` bytes each: what goes in one call each."""
    if not len(ids) or not entry:
        return
    begins = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)  # neighbours go together
    begins = ids[begins] * entry
    ends = (ids[np.append(np.flatnonzero(np.diff(ids) != 1), len(ids) - 1)] + 1) * entry
    counts = -(-(ends - begins) // CHUNK)  # long runs go in pieces
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(begins, counts) + steps * CHUNK
    ends = np.minimum(begins + CHUNK, np.repeat(ends, counts))
    # a batch ends where the next piece would make it too large
    sizes = np.cumsum(ends - begins)
    begins, ends, first = begins.tolist(), ends.tolist(), 0
    while first < len(begins):
        before = int(sizes[first - 1]) if first else 0
        last = int(np.searchsorted(sizes, before + CHUNK, "right"))
        last = min(max(last, first + 1), first + MAX_PIECES)
        yield [memory[i:j] for i, j in zip(begins[first:last], ends[first:last], strict=True)]
        first = last
