"""Snapshots: what was saved comes back, also in another process, and nothing else is accepted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_traffic import CacheTraffic, contents, random_cache, small_cache
from rocmforge import KVCache, LayerGroup, snapshot
from rocmforge.errors import SnapshotError, UnknownSequenceError
from traffic import logical_state

safetensors_numpy = pytest.importorskip("safetensors.numpy")
xxhash = pytest.importorskip("xxhash")


def same_contents(mine: KVCache, theirs: KVCache) -> None:
    """Compare the blocks that hold something, in all pools."""
    for (name, pool, g), (_, other, _) in zip(mine._pools(), theirs._pools(), strict=True):
        blocks = [
            b.id for b in map(mine.groups[g].allocator.get_block, range(len(pool))) if not b.is_free
        ]
        assert pool[blocks].tobytes() == other[blocks].tobytes(), name


@pytest.mark.parametrize("seed", range(40))
def test_a_loaded_cache_goes_on_as_the_one_saved(seed: int, tmp_path: Path) -> None:
    cache, traffic = random_cache(seed)
    traffic.forget_batches()
    before = logical_state(cache)
    cache.save(tmp_path / "a")
    assert logical_state(cache) == before
    assert os.listdir(tmp_path) == ["a"]
    other = KVCache.load(tmp_path / "a")
    other.check_integrity()
    assert logical_state(other) == before
    same_contents(cache, other)
    assert traffic.check(other) == traffic.check()
    following = copy.copy(traffic)
    following.random, following.tokens = copy.deepcopy((traffic.random, traffic.tokens))
    following.manager = following.cache = other
    following.alive, following.pinned = list(traffic.alive), list(traffic.pinned)
    following.pending, following.log = [], []
    traffic.log.clear()
    traffic.run(80)
    following.run(80)
    assert traffic.log == following.log
    assert logical_state(cache) == logical_state(other)
    assert following.check() == traffic.check()


def filled(tmp_path: Path, name: str = "cache", **options: Any) -> tuple[KVCache, Path]:
    cache, traffic = random_cache(11, **options)
    traffic.run(100)
    path = tmp_path / name
    cache.save(path)
    return cache, path


RESTART = """
import json, sys
import numpy as np
from rocmforge import KVCache
cache = KVCache.load(sys.argv[1], device="cpu")
cache.check_integrity()
tokens = json.loads(sys.argv[2])
found = cache.add_sequence(1, tokens)
ids = cache.page_table.block_ids(1)
keys = cache.k_cache(0)[ids].swapaxes(1, 2).reshape(found, -1)[:, 0]
print(json.dumps([found, keys.astype(float).tolist(), len(cache)]))
"""


def test_another_process_begins_with_a_warm_prefix_cache(tmp_path: Path) -> None:
    cache = KVCache(2, 32, 2, 8, block_size=4, dtype="float32")
    tokens = list(range(21))
    cache.add_sequence(7, tokens)
    batch = cache.append([7], 21)
    for layer in range(2):
        flat = contents(cache, tokens, layer)
        key = np.broadcast_to(flat[:, None, None], (21, 2, 8)).copy()
        cache.write(layer, key, key, batch)
    cache.save(tmp_path / "a", sequences=[])  # the sequence is not kept, what it computed is
    command = [sys.executable, "-P", "-c", RESTART, str(tmp_path / "a"), json.dumps(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, keys, alive = json.loads(done.stdout)
    assert (found, alive) == (20, 1)
    assert keys == contents(cache, tokens, 0)[:20].tolist()


def test_any_reader_of_safetensors_can_read_it(tmp_path: Path) -> None:
    cache, path = filled(tmp_path, dtype="float32")
    tensors = safetensors_numpy.load_file(path)
    blocks = np.flatnonzero(tensors["group0.ref_counts"]).tolist() + tensors["group0.kept"].tolist()
    for name, pool, _ in cache._pools():
        assert (tensors[f"data.{name}"] == pool[sorted(blocks)]).all()
    assert len(tensors["sequences.ids"]) == len(cache)


def test_some_sequences_are_kept_as_if_the_others_were_freed(tmp_path: Path) -> None:
    cache, traffic = random_cache(3, num_blocks=80, block_size=4)
    while len(traffic.alive) < 4:
        traffic.run(10)
    keep = traffic.alive[1:3]
    cache.save(tmp_path / "a", keep)
    cache.save(tmp_path / "b", np.array(keep, np.uint64))  # type: ignore[arg-type]
    others = [i for i in traffic.alive if i not in keep]
    other = KVCache.load(tmp_path / "a")
    other.check_integrity()
    cache.free(others)
    traffic.alive = keep
    assert logical_state(other)["lengths"] == logical_state(cache)["lengths"]
    assert other.stats().cached_blocks == cache.stats().cached_blocks
    assert other.stats().used_blocks == cache.stats().used_blocks
    assert traffic.check(other) == traffic.check()
    with pytest.raises(UnknownSequenceError):
        cache.save(tmp_path / "a", [2**40])
    with pytest.raises(TypeError, match="sequence id"):
        cache.save(tmp_path / "a", ["x"])  # type: ignore[list-item]
    assert (tmp_path / "a").read_bytes()
    KVCache.load(tmp_path / "a")


def test_without_data(tmp_path: Path) -> None:
    cache, path = filled(tmp_path)
    size = path.stat().st_size
    cache.save(path, with_data=False)
    assert path.stat().st_size < size
    with pytest.raises(SnapshotError, match="pass with_data=False"):
        KVCache.load(path)
    other = KVCache.load(path, with_data=False)
    other.check_integrity()
    assert logical_state(other) == logical_state(cache)
    assert not any(pool.any() for _, pool, _ in other._pools())


def test_an_empty_cache(tmp_path: Path) -> None:
    small_cache(0).save(tmp_path / "a")
    other = KVCache.load(tmp_path / "a")
    other.check_integrity()
    assert len(other) == 0


def test_options_that_may_differ(tmp_path: Path) -> None:
    cache, path = filled(tmp_path)
    other = KVCache.load(path, num_blocks=200, watermark=3, max_pinned_blocks=7, device="cpu")
    assert (other.num_blocks, other.watermark, other.max_pinned_blocks) == (200, 3, 7)
    other.check_integrity()
    same_contents(cache, other)
    assert KVCache.load(path, num_blocks=200).max_pinned_blocks == 100
    assert KVCache.load(path, head_dim=8, layout=cache.layout).head_dim == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 16}, "head_dim: 8 when it was saved, 16 asked for"),
        ({"block_size": 2}, "block_size"),
        ({"dtype": "float64"}, "dtype"),
        ({"num_blocks": 3}, "more blocks than the pool has"),
        ({"max_sequences": 1}, "max_sequences"),
        ({"max_seq_len": 1}, "at most 1"),
        ({"num_layers": 9}, "num_layers"),
        ({"nonsense": 9}, "it describes no cache"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    _, path = filled(tmp_path)
    with pytest.raises(SnapshotError, match=message):
        KVCache.load(path, **options)


def test_layer_groups_and_8_bit_pools(tmp_path: Path) -> None:
    """Scales move with the blocks; scales of heads, and that they are fixed, come along."""
    rng = np.random.default_rng(3)
    for scales in ("token", "head"):
        cache = KVCache(
            3, block_size=4, num_kv_heads=2, head_dim=16, dtype="int8", scales=scales,
            groups=[
                LayerGroup(40, layers=[0, 2]),
                LayerGroup(20, window=6, layers=[1], head_dim=8, dtype="float8_e4m3fn"),
            ],
        )  # fmt: skip
        cache.add_sequence(1, list(range(30)))
        for start in range(0, 30, 10):
            batch = cache.append([1], 10)
            for layer, dim in enumerate((16, 8, 16)):
                key = rng.standard_normal((10, 2, dim), np.float32)
                if scales == "head" and not start:
                    cache.calibrate(layer, key * 2, key * 3)
                cache.write(layer, key, key + 1, batch)
        cache.save(tmp_path / "a")
        other = KVCache.load(tmp_path / "a")
        other.check_integrity()
        assert logical_state(other) == logical_state(cache)
        same_contents(cache, other)
        query = rng.standard_normal((1, 4, 16), np.float32)
        steps = []
        for one in (cache, other):
            batch = one.append([1], 1)
            key = np.ones((1, 2, 16), np.float32)
            one.write(0, key, key, batch)
            steps.append(one.attend(0, query, batch))
            if scales == "head":
                with pytest.raises(ValueError, match="written to"):
                    one.set_scales(0, 1.0, 1.0)
        assert (steps[0] == steps[1]).all()
        bigger = KVCache.load(tmp_path / "a", groups=[LayerGroup(60), LayerGroup(30)])
        assert [g.allocator.num_blocks for g in bigger.groups] == [60, 30]
        with pytest.raises(SnapshotError, match="2 groups"):
            KVCache.load(tmp_path / "a", num_blocks=60)
        rows = cache.read_blocks(cache.page_table.block_ids(1)[:2])
        assert rows.shape == (2, cache.block_nbytes)
        buffer = other.suspend(1)
        other.resume(1, buffer)
        same_contents(cache, other)


def test_pickle_points_to_save() -> None:
    with pytest.raises(TypeError, match="use save and load"):
        copy.copy(small_cache(0))


# ---- files that are not what they should be ----


def test_truncated_files(tmp_path: Path) -> None:
    _, path = filled(tmp_path)
    data = path.read_bytes()
    for size in [*range(0, 200, 7), *np.linspace(200, len(data) - 1, 60, dtype=int).tolist()]:
        path.write_bytes(data[:size])
        with pytest.raises(SnapshotError):
            KVCache.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(SnapshotError):
        KVCache.load(path)


def test_any_flipped_bit_is_seen(tmp_path: Path) -> None:
    """In the header, in the state, in the contents: everything but the padding of the header."""
    _, path = filled(tmp_path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    padding = range(len(data[:end].rstrip(b" ")), end)
    rng = np.random.default_rng(1)
    places = [*rng.integers(0, end, 250), *rng.integers(end, len(data), 250), *range(8)]
    for place in places:
        if place in padding:
            continue
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError):
            KVCache.load(path)


def rewrite(path: Path, change: Any) -> None:
    """Change a snapshot and make its checksums right again, as somebody hostile would."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        body = file.read()
    metadata = header.pop("__metadata__")
    tensors = {
        name: [entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]]
        for name, entry in header.items()
    }
    about = {
        key: json.loads(metadata[key]) if key in ("cache", "state") else metadata[key]
        for key in metadata
    }
    change(about, tensors)
    sums = {name: xxhash.xxh3_128(data).hexdigest() for name, (_, _, data) in tensors.items()}
    about.setdefault("checksums", "")
    if about["checksums"] is not None:
        about["checksums"] = json.dumps(sums)
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }
    metadata["checksum"] = snapshot._checksum(metadata, xxhash)
    table, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        table[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]
        }  # fmt: skip
        offset += len(data)
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text, *(data for _, _, data in tensors.values())]
    path.write_bytes(b"".join(parts))


def setting(part: str, name: str, value: Any) -> Any:
    return lambda about, tensors: about[part].__setitem__(name, value)


def grouped(name: str, value: Any) -> Any:
    return lambda about, tensors: about["cache"]["groups"][0].__setitem__(name, value)


def words(name: str, index: int, value: int, dtype: type = np.int32) -> Any:
    def change(about: Any, tensors: Any) -> None:
        array = np.frombuffer(tensors[name][2], dtype).copy()
        array[index] = value
        tensors[name][2] = array.tobytes()

    return change


HOSTILE = {
    "another format": lambda a, t: a.update(format="pt"),
    "a newer version": lambda a, t: a.update(version="2"),
    "no version": lambda a, t: a.update(version="x"),
    "an endless version": lambda a, t: a.update(version="9" * 5000),
    "no state": lambda a, t: a.pop("state"),
    "a state that is a list": lambda a, t: a.update(state=[1]),
    "a state without end": lambda a, t: a.update(state="[" * 100_000),
    "no tensors": lambda a, t: t.clear(),
    "no pools": lambda a, t: t.pop("data.layer0.key"),
    "a pool too many": lambda a, t: t.__setitem__("data.layer99.key", t["data.layer0.key"]),
    "a pool of another type": lambda a, t: t["data.layer0.key"].__setitem__(0, "I16"),
    "bits of another type": lambda a, t: t["group0.kept"].__setitem__(0, "F32"),
    "a strange type": lambda a, t: t["group0.kept"].__setitem__(0, "C64"),
    "a scalar": lambda a, t: t.__setitem__("group0.kept", ["I32", [], b"\0\0\0\0"]),
    "a block past the pool": words("group0.lists", 0, 2**30),
    "a block of nobody": words("group0.ref_counts", 0, 77),
    "more sequences": words("sequences.rows", 0, 5000),
    "an endless sequence": words("sequences.lengths", 0, 2**40, np.int64),
    "a clock that is no list": setting("state", "clocks", 7),
    "a clock of text": setting("state", "clocks", ["7"]),
    "no clocks": lambda a, t: a["state"].pop("clocks"),
    "no salts": lambda a, t: a["state"].pop("salts"),
    "a negative layer": setting("cache", "num_layers", -1),
    "endless layers": setting("cache", "num_layers", 10**9),
    "layers of text": setting("cache", "num_layers", "3"),
    "no layers": lambda a, t: a["cache"].pop("num_layers"),
    "an endless pool": grouped("num_blocks", 2**31 - 1),
    "endless heads": grouped("num_kv_heads", 2**60),
    "a strange dtype": grouped("dtype", "object"),
    "another dtype": grouped("dtype", "float64"),
    "another size": grouped("head_dim", 16),
    "a group whose layers are text": grouped("layers", "abc"),
    "a layer twice": grouped("layers", [0, 0]),
    "a group of nothing": lambda a, t: a["cache"].update(groups=[]),
    "groups of text": lambda a, t: a["cache"].update(groups=["x"]),
    "no groups": lambda a, t: a["cache"].pop("groups"),
    "an argument of a group": grouped("exec", 7),
    "strange scales": lambda a, t: a["cache"].update(scales="x"),
    "layers written": lambda a, t: a["cache"].update(written=[True] * 7),
    "an argument that none has": setting("cache", "exec", "7"),
    "tables without end": lambda a, t: a["cache"].update(max_sequences=2**30, max_seq_len=2**30),
    "one dimension too many": lambda a, t: t["group0.kept"][1].append(1),
    "another block size": setting("cache", "block_size", 3),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_with_right_checksums(tmp_path: Path, name: str) -> None:
    _, path = filled(tmp_path, block_size=4, dtype="float32", num_blocks=60)
    rewrite(path, lambda about, tensors: None)
    KVCache.load(path).check_integrity()  # the rewriting itself leaves it whole
    rewrite(path, HOSTILE[name])
    with pytest.raises(SnapshotError) as caught:
        KVCache.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x" * 1000, b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}"])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(SnapshotError):
        KVCache.load(path)


def test_another_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors_numpy.save_file({"weight": np.ones(5)}, path)
    with pytest.raises(SnapshotError, match="no snapshot of a KVCache"):
        KVCache.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        KVCache.load(tmp_path / "nothing")
    with pytest.raises(SnapshotError, match="no regular file"):
        KVCache.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        small_cache(0).save(tmp_path / "no" / "folder")


# ---- writing ----


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = filled(tmp_path)
    before = path.read_bytes()
    cache.add_sequence(10**6, [1, 2, 3])

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    for call in ("pwritev", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                cache.save(path)
        assert os.listdir(tmp_path) == [path.name]
        assert path.read_bytes() == before
    cache.save(path)
    assert path.read_bytes() != before


def test_short_writes_and_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, path = filled(tmp_path)
    whole = path.read_bytes()
    write, read = os.pwritev, os.preadv

    def some(call: Any) -> Any:
        return lambda file, buffers, offset: call(file, [buffers[0][:977]], offset)

    monkeypatch.setattr(os, "pwritev", some(write))
    monkeypatch.setattr(os, "preadv", some(read))
    cache.save(path)
    assert path.read_bytes() == whole
    same_contents(cache, KVCache.load(path))
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(SnapshotError, match="ends in the middle"):
        KVCache.load(path)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    cache = small_cache(0)
    (tmp_path / "link").symlink_to("real")
    cache.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    KVCache.load(tmp_path / "real")


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    cache = small_cache(0)
    with (
        snapshot._replacing(str(tmp_path / "a")),
        pytest.raises(SnapshotError, match="another process or thread is saving"),
    ):
        cache.save(tmp_path / "a")
    cache.save(tmp_path / "a")


def test_appends_wait_for_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other threads do meanwhile is in the file as a whole or not at all."""
    cache, traffic = random_cache(5, num_blocks=60)
    before = logical_state(cache)
    appended = threading.Event()
    write = os.pwritev
    threads = []

    def append() -> None:
        other.run(200)
        appended.set()

    def slow(*arguments: Any) -> int:
        if not threads:
            threads.append(threading.Thread(target=append))
            threads[0].start()
            assert not appended.wait(0.2)
        return write(*arguments)

    other = CacheTraffic(cache, 1, first_id=10**6, max_alive=8)
    other.WEIGHTS = {"append": 1, "add": 1}  # type: ignore[misc]
    monkeypatch.setattr(os, "pwritev", slow)
    cache.save(tmp_path / "a")
    threads[0].join()
    loaded = KVCache.load(tmp_path / "a")
    loaded.check_integrity()
    assert logical_state(loaded) == before
    traffic.check(loaded)
    other.check()


def test_writes_wait_for_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum is of the bytes that are in the file."""
    cache = small_cache(6, num_layers=1, dtype="float32")
    cache.add_sequence(0)
    batch = cache.append([0], 3)
    ones = np.ones((3, cache.num_kv_heads, cache.head_dim), np.float32)
    writer = threading.Thread(target=cache.write, args=(0, ones, ones, batch))
    write = os.pwritev

    def slow(*arguments: Any) -> int:
        if writer.ident is None:
            writer.start()
            writer.join(0.2)
            assert writer.is_alive()
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", slow)
    cache.save(tmp_path / "a")
    writer.join()
    assert cache.committed_len(0) == 3
    assert KVCache.load(tmp_path / "a").committed_len(0) == 0


def test_progress_is_for_terminals_and_for_what_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = filled(tmp_path)
    KVCache.load(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rocmforge.progress.is_terminal", lambda stream: True)
    cache.save(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rocmforge.progress.monotonic", iter(range(0, 10**6, 2)).__next__)
    cache.save(path)
    KVCache.load(path)
    shown = capsys.readouterr().err
    assert "saving [##########" in shown
    assert "loading [##########" in shown


@pytest.mark.parametrize("missing", ["safetensors", "xxhash"])
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    cache, path = filled(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (lambda: cache.save(path), lambda: KVCache.load(path)):
        with pytest.raises(ImportError, match=rf"{missing}.*rocmforge\[snapshots\]"):
            call()


KILL = Path(__file__).with_name("kill_during_save.py")


@pytest.mark.uninstrumented
def test_killed_during_a_save(tmp_path: Path) -> None:
    """200 processes are killed while they save; each time the old file is there, or the new."""
    command = [sys.executable, "-P", str(KILL), str(tmp_path / "a"), "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills, generations, drafts = map(int, done.stdout.split())
    assert kills == 200
    assert generations > 20  # many were killed behind a save, or two
    assert drafts > 20  # and many in the middle of one
