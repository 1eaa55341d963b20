"""Snapshots: a whole `KVCache` in one file, from which another process goes on.

The file is a `safetensors <https://github.com/huggingface/safetensors>`_ file: small arrays that
are the state of the manager (`rocmforge.saved_state`), then for each pool of the cache the contents
of the blocks that are in use or cached, in the order of their ids. Its metadata hold the version,
the arguments that the cache was made with, and an XXH3 checksum of every tensor and of themselves.

Nothing that is read is trusted: the container is parsed by `safetensors`, checksums are compared,
and every number is checked before anything is built from it. The file is written beside its final
name, synced, and renamed, so that at any moment there is the old one or the new one.

Nothing is gathered in memory: blocks go from their place in the pool to the file, and back, a
piece at a time (`rocmforge.movement`), so that the checksum finds them in the processor's cache.
Pools on a GPU make the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from rocmforge.dtypes import resolve
from rocmforge.errors import RocmForgeError, SnapshotError
from rocmforge.kv_cache_manager import KVCacheManager
from rocmforge.layer_group import LayerGroup
from rocmforge.movement import HostMover, Mover, entry_nbytes
from rocmforge.progress import Progress
from rocmforge.saved_state import dump, restore
from rocmforge.shared_sequences import OPTIONS

if TYPE_CHECKING:
    from rocmforge.kv_cache import KVCache

__all__ = ["load", "save"]

FORMAT = "rocmforge-kv-cache"
VERSION = 1
# What a cache may have otherwise than when it was saved.
LIMITS = {
    "max_sequences", "max_seq_len", "watermark", "max_pinned_blocks", "prefix_caching", "device",
    "stream",
}  # fmt: skip
MAX_LAYERS = 10_000
MAX_TABLE_NBYTES = 1 << 32

TAGS = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "uint8": "U8", "int32": "I32", "int64": "I64", "uint16": "U16",
    "uint64": "U64", "int8": "I8",
}  # fmt: skip

Array = npt.NDArray[Any]
Cache = TypeVar("Cache", bound="KVCache")
# Name; array with an entry for each block, or for whatever else; the entries; who moves them.
_Tensor: TypeAlias = tuple[str, Any, Array, Mover]

HOST = HostMover()


def _packages() -> tuple[Any, Any]:
    try:
        import safetensors
        import xxhash
    except ImportError as error:
        raise ImportError(
            f'snapshots need {error.name}: pip install "rocmforge[snapshots]"'
        ) from error
    return safetensors, xxhash


# ---- what goes between memory and file ----


def _tag(dtype: np.dtype[Any]) -> str:
    return TAGS.get(dtype.name, "U8")  # a type that the format does not know goes as its bytes


def _shape(array: Any) -> list[int]:
    if array.dtype.name in TAGS or not array.ndim:
        return list(array.shape)
    return [*array.shape[:-1], array.shape[-1] * array.dtype.itemsize]


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int],
    file: int,
    buffers: list[memoryview],
    offset: int,
) -> int:
    """Call `os.pwritev` or `os.preadv` until all bytes have gone; returns their number."""
    total = left = sum(map(len, buffers))
    while True:
        count = call(file, buffers, offset + total - left)
        left -= count
        if left == 0:
            return total
        if count == 0:
            raise SnapshotError("the file ends in the middle of a tensor")
        buffers = list(buffers)
        while count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        buffers[0] = buffers[0][count:]


def _saved_blocks(arrays: dict[str, Array], group: int) -> Array:
    """The blocks of a group whose contents are worth keeping, ascending."""
    used = np.flatnonzero(arrays[f"group{group}.ref_counts"])
    return np.sort(np.concatenate([used, arrays[f"group{group}.kept"]]))


# ---- writing ----


def save(
    cache: KVCache,
    path: str | os.PathLike[str],
    sequences: Sequence[int] | None = None,
    with_data: bool = True,
) -> None:
    """Write a snapshot; see `KVCache.save`."""
    _, xxhash = _packages()
    with cache._contents() as mover:  # blocks may be given back, none is taken or written to
        numbers, arrays = dump(cache)
        if sequences is not None:
            numbers, arrays = _only(numbers, arrays, sequences)
        tensors: list[_Tensor] = [
            (name, array, np.arange(len(array)), HOST) for name, array in arrays.items()
        ]
        if with_data:
            for name, pool, group in cache._pools():
                tensors.append((f"data.{name}", pool, _saved_blocks(arrays, group), mover))
        about = {
            "format": FORMAT,
            "version": str(VERSION),
            "cache": json.dumps(cache._construction()),
            "state": json.dumps(numbers),
            "with_data": json.dumps(with_data),
        }
        with _replacing(os.fspath(path)) as file:
            _write(file, about, tensors, xxhash)


def _only(
    numbers: dict[str, Any], arrays: dict[str, Array], sequences: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The state as if all other sequences had been freed."""
    manager = KVCacheManager(
        groups=[LayerGroup(**group) for group in numbers["groups"]],
        **{name: numbers[name] for name in OPTIONS},
    )
    restore(manager, numbers, arrays)
    kept = set()
    for sequence in sequences:
        manager.seq_len(sequence)  # raises where it is none of the cache's
        kept.add(int(sequence))
    manager.free([i for i in arrays["sequences.ids"].tolist() if i not in kept])
    return dump(manager)


def _write(file: int, about: dict[str, str], tensors: list[_Tensor], xxhash: Any) -> None:
    table: dict[str, Any] = {}
    offset = 0
    for name, array, ids, _ in tensors:
        shape = _shape(array)
        shape[0] = len(ids)
        size = len(ids) * entry_nbytes([array])
        table[name] = {
            "dtype": _tag(array.dtype),
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    # The checksums are known when all is written; until then zeros keep their place.
    checksums = dict.fromkeys(table, xxhash.xxh3_128().hexdigest())
    header = _header(about, checksums, table, xxhash)
    begin = len(header)
    with contextlib.suppress(OSError):  # not all file systems can
        os.posix_fallocate(file, 0, begin + offset)
    done = 0
    with Progress("saving", offset, delay=1.0) as progress:
        for name, array, ids, mover in tensors:
            checksum = xxhash.xxh3_128()
            for batch in mover.outgoing(array, ids):
                for piece in batch:
                    checksum.update(piece)
                done += _transfer(os.pwritev, file, batch, begin + done)
                progress.update(done)
            checksums[name] = checksum.hexdigest()
    header = _header(about, checksums, table, xxhash)
    _transfer(os.pwritev, file, [memoryview(header)], 0)


def _header(
    about: dict[str, str], checksums: dict[str, str], table: dict[str, Any], xxhash: Any
) -> bytes:
    """The beginning of the file: its length, then JSON; of the same length for any checksums."""
    metadata = {**about, "checksums": json.dumps(checksums)}
    metadata["checksum"] = _checksum(metadata, xxhash)
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64 + 56)  # the data begin at a multiple of 64
    return len(text).to_bytes(8, "little") + text


def _checksum(metadata: dict[str, str], xxhash: Any) -> str:
    text = json.dumps({k: metadata[k] for k in sorted(metadata) if k != "checksum"})
    digest: str = xxhash.xxh3_128(text.encode()).hexdigest()
    return digest


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[int]:
    """A file that takes the place of another when all is written, and not before.

    Its name is always the same, so that a process that is killed leaves one file at most, which the
    next one writes over. A lock keeps two processes from writing it at once.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}.saving")
    while True:
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(draft)):
                break
        except BlockingIOError as error:
            os.close(file)
            raise SnapshotError(f"{path}: another process or thread is saving to it") from error
        except FileNotFoundError:
            pass
        os.close(file)  # whoever had it has put it in its place meanwhile
    try:
        try:
            os.ftruncate(file, 0)
            yield file
            os.fsync(file)
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
    finally:
        os.close(file)
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)  # the name, too, is on the disk
    finally:
        os.close(parent)


# ---- reading ----


class _Reader:
    """The tensors of a snapshot; closes nothing."""

    def __init__(self, file: int) -> None:
        safetensors, self._xxhash = _packages()
        self._file = file
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise SnapshotError("it is no regular file")
        try:
            # by the descriptor, so that both read the same file whatever the name stands for
            opened = safetensors.safe_open(f"/proc/self/fd/{file}", framework="np")
            with opened as found:
                metadata = found.metadata() or {}
                names = list(found.offset_keys())
                slices = {name: found.get_slice(name) for name in names}
                self.shapes = {name: slices[name].get_shape() for name in names}
                self.tags = {name: slices[name].get_dtype() for name in names}
        except (safetensors.SafetensorError, OverflowError) as error:
            raise SnapshotError(f"it is no safetensors file, or is cut short: {error}") from error
        self.metadata: dict[str, str] = metadata
        self._check_metadata()
        self.checksums = self._json("checksums")
        if set(self.checksums) != set(names):
            raise SnapshotError("the checksums are of other tensors")
        header_size = int.from_bytes(os.pread(file, 8, 0), "little")
        self._offsets, offset = {}, 8 + header_size
        self.sizes = {}
        itemsizes = {tag: int(tag.lstrip("FBIU").split("_")[0]) // 8 for tag in TAGS.values()}
        for name in names:  # safetensors has made sure that one begins where the other ends
            if self.tags[name] not in itemsizes:
                raise SnapshotError(f"{name}: a type that snapshots do not have")
            self._offsets[name] = offset
            self.sizes[name] = (
                int(np.prod(self.shapes[name], dtype=object)) * itemsizes[self.tags[name]]
            )
            offset += self.sizes[name]

    def _check_metadata(self) -> None:
        if self.metadata.get("format") != FORMAT:
            raise SnapshotError("it is no snapshot of a KVCache")
        version = self.metadata.get("version", "")
        if not version.isdecimal() or len(version) > 9:
            raise SnapshotError(f"version: expected a number, got {version[:20]!r}")
        if int(version) > VERSION:
            raise SnapshotError(f"it has version {version}, this release reads up to {VERSION}")
        if self.metadata.get("checksum") != _checksum(self.metadata, self._xxhash):
            raise SnapshotError("its metadata are damaged: the checksum differs")

    def _json(self, name: str) -> Any:
        try:
            found = json.loads(self.metadata[name])
        except (KeyError, ValueError, RecursionError) as error:
            raise SnapshotError(f"{name}: damaged or missing") from error
        if not isinstance(found, dict):
            raise SnapshotError(f"{name}: expected an object")
        return found

    def read(self, name: str, target: Any, ids: Array, mover: Mover = HOST) -> int:
        """Fill the entries `ids` of an array with a tensor of just that type and size.

        Returns the number of bytes. Several threads may read at once.
        """
        expected = _shape(target)
        expected[0] = len(ids)
        if self.tags[name] != _tag(target.dtype) or self.shapes[name] != expected:
            raise SnapshotError(
                f"{name}: expected {_tag(target.dtype)} {expected}, "
                f"got {self.tags[name]} {self.shapes[name]}"
            )
        offset = self._offsets[name]
        checksum = self._xxhash.xxh3_128()
        for batch in mover.incoming(target, ids):
            offset += _transfer(os.preadv, self._file, batch, offset)
            for piece in batch:
                checksum.update(piece)
        if checksum.hexdigest() != self.checksums[name]:
            raise SnapshotError(f"{name}: damaged, the checksum differs")
        return offset - self._offsets[name]

    def state(self) -> dict[str, Array]:
        """The arrays of the manager's state."""
        dtypes = {tag: name for name, tag in TAGS.items()}
        arrays = {}
        for name, shape in self.shapes.items():
            if not name.startswith("data."):
                dtype = dtypes[self.tags[name]]
                if self.tags[name][0] not in "IU" or not shape:
                    raise SnapshotError(f"{name}: it is no part of a state")
                arrays[name] = np.empty(shape, dtype)
                self.read(name, arrays[name], np.arange(shape[0]))
        return arrays


def load(
    cls: type[Cache],
    path: str | os.PathLike[str],
    with_data: bool = True,
    **options: Any,
) -> Cache:
    """Read a snapshot; see `KVCache.load`."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read(cls, _Reader(file), with_data, options)
    except SnapshotError as error:
        raise SnapshotError(f"{os.fspath(path)}: {error}") from error
    finally:
        os.close(file)


def _read(cls: type[Cache], reader: _Reader, with_data: bool, options: dict[str, Any]) -> Cache:
    if with_data and reader.metadata.get("with_data") != "true":
        raise SnapshotError(
            "it was saved without the blocks' contents; pass with_data=False to fill them in "
            "yourself"
        )
    arrays = reader.state()
    numbers = reader._json("state")
    cache = _build(cls, reader._json("cache"), numbers, arrays, options)
    try:
        restore(cache, numbers, arrays)
    except (TypeError, KeyError, OverflowError) as error:
        raise SnapshotError(f"its state is damaged: {error}") from error
    if not with_data:
        return cache
    pools = {f"data.{name}": (pool, group) for name, pool, group in cache._pools()}
    found = {name for name in reader.shapes if name.startswith("data.")}
    if found != set(pools):
        raise SnapshotError("its pools are those of another cache")
    total = sum(reader.sizes[name] for name in pools)
    done = 0
    blocks = [_saved_blocks(arrays, group) for group in range(len(cache.groups))]
    with (
        Progress("loading", total, delay=1.0) as progress,
        cache._contents() as mover,
        ThreadPoolExecutor(min(mover.workers, os.cpu_count() or 1)) as threads,
    ):
        reads = [
            threads.submit(reader.read, name, pool, blocks[group], mover)
            for name, (pool, group) in pools.items()
        ]
        try:
            for read in as_completed(reads):
                done += read.result()
                progress.update(done)
        finally:
            for read in reads:
                read.cancel()
        mover.finish()
    return cache


def construct(cls: type[Cache], construction: dict[str, Any], options: dict[str, Any]) -> Cache:
    """An empty cache as `KVCache._construction` says, but for the options given."""
    arguments, written = _arguments(construction, options)
    arguments["groups"] = [LayerGroup(**group) for group in arguments["groups"]]
    cache = cls(**arguments)
    for layer, pools in enumerate(cache._layers):
        pools.written = written[layer] is True
    return cache


def _arguments(
    construction: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Any], list[bool]]:
    """The constructor's arguments, and which layers were written to."""
    arguments, options = dict(construction), dict(options)
    written, groups = arguments.pop("written"), arguments["groups"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise SnapshotError("groups: expected a list of objects")
    layers = arguments["num_layers"]
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS or len(written) != layers:
        raise SnapshotError(f"num_layers: expected 1 .. {MAX_LAYERS}, got {layers!r}")
    arguments["groups"] = groups = [dict(group) for group in groups]
    sizes = options.pop("groups", None)
    if sizes is not None and len(sizes) != len(groups):
        raise SnapshotError(f"groups: {len(groups)} when it was saved, {len(sizes)} asked for")
    for group, size in zip(groups, sizes or [], strict=False):
        group["num_blocks"] = size.num_blocks
    for name in ("num_blocks", "num_kv_heads", "head_dim", "v_head_dim", "latent_dim", "dtype"):
        value = options.pop(name, None)
        if value is None:
            continue
        if len(groups) > 1:
            raise SnapshotError(f"{name}: the cache has {len(groups)} groups")
        if name == "num_blocks":
            groups[0][name] = value
        elif groups[0][name] != (resolve(value).name if name == "dtype" else value):
            raise SnapshotError(
                f"{name}: {groups[0][name]!r} when it was saved, {value!r} asked for"
            )
    if groups != construction["groups"] and "max_pinned_blocks" not in options:
        arguments["max_pinned_blocks"] = None  # a part of the pool, whose size is another
    for name, value in options.items():
        if name not in LIMITS and arguments.get(name, value) != value:
            raise SnapshotError(
                f"{name}: {arguments[name]!r} when it was saved, {value!r} asked for"
            )
    return arguments | options, written


def _build(
    cls: type[Cache],
    construction: dict[str, Any],
    numbers: dict[str, Any],
    arrays: dict[str, Array],
    options: dict[str, Any],
) -> Cache:
    """The cache of a file; whatever is wrong with what it says is a `SnapshotError`."""
    try:
        _check_table(_arguments(construction, options)[0], numbers, arrays)
        return construct(cls, construction, options)
    except MemoryError as error:
        raise SnapshotError("the cache that it describes does not fit in memory") from error
    except RocmForgeError:
        raise  # said already, or a device that is not there
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise SnapshotError(f"it describes no cache: {error}") from error


def _check_table(
    arguments: dict[str, Any], numbers: dict[str, Any], arrays: dict[str, Array]
) -> None:
    """The block tables that it makes necessary must not be a way to fill the memory."""
    try:
        lengths = arrays["sequences.lengths"]
        rows = max(len(arrays["sequences.ids"]) + len(arrays["free_rows"]),
                   int(arguments.get("max_sequences") or 0))  # fmt: skip
        longest = max(
            int(lengths.max()) if len(lengths) else 0, int(arguments.get("max_seq_len") or 0)
        )
        kernel_size = int(arguments.get("kernel_block_size") or arguments["block_size"])
        size = 4 * rows * (longest // max(kernel_size, 1) + 1) * len(numbers["groups"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"its state is damaged: {error}") from error
    if not 0 <= size <= MAX_TABLE_NBYTES:
        raise SnapshotError(f"its block tables would take {size} bytes")
