"""The seam for other tiers: blocks leave a `KVCache` for a buffer, and come back from one.

In a buffer a block is one row of bytes: its entries of all the pools, one after the other, in the
order of the cache's layers. Such rows are what LMCache, Mooncake or a plain array in host memory
keep.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rocmforge.errors import InvalidBlockError
from rocmforge.movement import entry_nbytes
from rocmforge.placement import describe, is_placed, num_resets, place, publish

if TYPE_CHECKING:
    from rocmforge.kv_cache import KVCache

__all__ = ["SuspendedSequence", "insert_prefix", "read_blocks", "resume", "suspend"]

FILLING = 0xF111ED << 40  # sequences that hold blocks while they are filled have ids from here on

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class SuspendedSequence:
    """A sequence in host memory, made by `KVCache.suspend`; it pickles."""

    token_ids: npt.NDArray[np.int32]
    """The tokens known."""
    length: int
    committed: int
    priority: int
    salt: bytes | None
    data: tuple[npt.NDArray[np.uint8], ...]
    """For each layer group a row of bytes a block."""
    firsts: tuple[int, ...]
    """For each layer group the first block that `data` has: its window has passed those before."""
    started: bool
    kind: tuple[Any, ...]
    """What the blocks look like: a cache that differs refuses them."""
    generation: tuple[bytes, int] | None
    """The cache and its resets: in another generation its blocks are no one else's."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(rows.nbytes for rows in self.data)


def _pools(cache: KVCache, group: int) -> list[Any]:
    """The pools of a group, in the order of a row."""
    return [pool for _, pool, owner in cache._pools() if owner == group]


def _kind(cache: KVCache) -> tuple[Any, ...]:
    pools = [(pool.dtype.name, pool.shape[1:], group) for _, pool, group in cache._pools()]
    return (cache.block_size, tuple(group.window for group in cache.groups), tuple(pools))


def _generation(cache: KVCache, resets: int) -> tuple[bytes, int]:
    """What changes when the model's weights may have: with the process, and with a reset."""
    identity: bytes = cache.__dict__.setdefault("_identity", os.urandom(8))
    return identity, resets


def read_blocks(cache: KVCache, ids: Any, out: Array | None = None, group: int = 0) -> Array:
    """See `KVCache.read_blocks`."""
    if not 0 <= group < len(cache.groups):
        raise ValueError(f"group: expected 0 .. {len(cache.groups) - 1}, got {group}")
    blocks = np.asarray(ids)
    if blocks.size == 0:
        blocks = blocks.astype(np.int64)
    if blocks.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got dtype {blocks.dtype}")
    if blocks.ndim != 1:
        raise ValueError(f"ids: expected one dimension, got shape {blocks.shape}")
    num_blocks = cache.groups[group].allocator.num_blocks
    for block in blocks[(blocks < 0) | (blocks >= num_blocks)]:
        raise InvalidBlockError(f"block {block}: expected 0 .. {num_blocks - 1}")
    pools = _pools(cache, group)
    shape = (len(blocks), entry_nbytes(pools))
    if out is None:
        out = np.empty(shape, np.uint8)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}")
    elif out.dtype != np.uint8 or out.shape != shape:
        raise ValueError(f"out: expected uint8 {shape}, got {out.dtype} {out.shape}")
    elif not out.flags.writeable:
        raise ValueError("out: expected a writable array")
    with cache._contents() as mover:
        mover.read(pools, blocks, out)
    return out


def _as_row(data: Any, nbytes: int, index: int) -> Array:
    """One block's bytes of whatever has a buffer."""
    try:
        row = np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(f"data[{index}]: expected a buffer of bytes: {error}") from error
    if row.size != nbytes:
        raise ValueError(f"data[{index}]: expected {nbytes} bytes, got {row.size}")
    return row


def _as_blocks(data: Any, count: int, nbytes: int) -> Iterator[Array]:
    """Exactly `count` blocks' bytes, as they come: some ``[n, nbytes]`` at a time."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.shape != (count, nbytes):
            raise ValueError(
                f"data: expected uint8 {(count, nbytes)}, got {data.dtype} {data.shape}"
            )
        return iter([data])
    if isinstance(data, bytes | bytearray | memoryview):
        flat = _as_row(data, count * nbytes, 0)
        return iter([flat.reshape(count, nbytes)])
    if not isinstance(data, Iterable):
        raise TypeError(f"data: expected an array or buffers, got {type(data).__name__}")
    return _each(iter(data), count, nbytes)


def _each(data: Iterator[Any], count: int, nbytes: int) -> Iterator[Array]:
    for i in range(count):
        try:
            item = next(data)
        except StopIteration:
            raise ValueError(f"data: expected {count} blocks, got {i}") from None
        yield _as_row(item, nbytes, i)[None]


def insert_prefix(
    cache: KVCache, token_ids: Any, data: Any, salt: bytes | str | None = None, priority: int = 0
) -> int:
    """See `KVCache.insert_prefix`."""
    pools = [_pools(cache, group) for group in range(len(cache.groups))]
    sizes = [entry_nbytes(some) for some in pools]
    tokens = np.asarray(token_ids)
    count = tokens.size // cache.block_size
    length = count * cache.block_size
    blocks = _as_blocks(data, count, sum(sizes))
    if count == 0 or not cache.prefix_caching:
        return 0
    # A window needs its last blocks only.
    firsts = [
        max(0, length - group.window + 1) // cache.block_size if group.window else 0
        for group in cache.groups
    ]
    with cache._moving:
        sequence = next(i for i in range(FILLING, 2**64) if i not in cache)
        found, lists, version = place(
            cache, sequence, tokens[:length], salt, priority, length, length, firsts, True, False
        )
    try:
        i = 0
        for rows in blocks:  # the caller's code may run here: no lock is held
            with cache._contents() as mover:
                if not is_placed(cache, sequence, version):
                    raise ValueError("token_ids: the blocks were freed while they were filled")
                begin, end = 0, i + len(rows)
                for group, size in enumerate(sizes):
                    new = max(i, found, firsts[group])  # those before are there, or not needed
                    if new < end:
                        some = rows[new - i :, begin : begin + size]
                        mover.write(pools[group], lists[group][new:end], some)
                    begin += size
                i = end
        publish(cache, sequence, version)
    finally:
        if is_placed(cache, sequence, version):
            cache.free(sequence)
    return length


def suspend(cache: KVCache, sequence_id: int) -> SuspendedSequence:
    """See `KVCache.suspend`."""
    with cache._contents():
        found = describe(cache, sequence_id)
        firsts, data = [], []
        for group, blocks in enumerate(found["blocks"]):
            held = blocks >= 0
            firsts.append(int(held.argmax()) if held.any() else len(blocks))
            data.append(read_blocks(cache, blocks[firsts[-1] :], group=group))
        cache.free(sequence_id)
    return SuspendedSequence(
        token_ids=found["token_ids"],
        length=found["length"],
        committed=found["committed"],
        priority=found["priority"],
        salt=found["salt"],
        data=tuple(data),
        firsts=tuple(firsts),
        started=found["started"],
        kind=_kind(cache),
        generation=_generation(cache, found["resets"]) if found["shares"] else None,
    )


def resume(cache: KVCache, sequence_id: int, buffer: SuspendedSequence) -> int:
    """See `KVCache.resume`."""
    if not isinstance(buffer, SuspendedSequence):
        raise TypeError(f"buffer: expected a SuspendedSequence, got {type(buffer).__name__}")
    if buffer.kind != _kind(cache):
        raise ValueError("buffer: it was suspended by a cache whose blocks are others")
    count = -(-buffer.length // cache.block_size)
    for group, rows in enumerate(buffer.data):
        shape = (count - buffer.firsts[group], entry_nbytes(_pools(cache, group)))
        if rows.shape != shape or rows.dtype != np.uint8:
            raise ValueError(f"buffer: expected uint8 {shape}, got {rows.dtype} {rows.shape}")
    with cache._contents() as mover:
        shares = buffer.generation == _generation(cache, num_resets(cache))
        found, lists, version = place(
            cache,
            sequence_id,
            buffer.token_ids,
            buffer.salt,
            buffer.priority,
            buffer.length,
            buffer.committed,
            list(buffer.firsts),
            shares,
            buffer.started,
        )
        try:
            for group, rows in enumerate(buffer.data):
                new = max(found, buffer.firsts[group])
                rows = rows[new - buffer.firsts[group] :]
                mover.write(_pools(cache, group), lists[group][new:], rows)
        except BaseException:  # a device that fails: nobody shall find what is not there
            cache.free(sequence_id)
            raise
        publish(cache, sequence_id, version)
    return found * cache.block_size
