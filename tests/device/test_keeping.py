"""What leaves a cache on a device and comes back: snapshots, other tiers, suspended sequences.

A cache in host memory that gets the same calls decides what is right: both must write the same
file, byte by byte.
"""

from __future__ import annotations

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from cache_traffic import CacheTraffic, small_cache
from rocmforge import KVCache, LayerGroup, hip, ops
from rocmforge.errors import DeviceError, OutOfBlocksError, SnapshotError
from rocmforge.hip import mover
from traffic import logical_state

pytest.importorskip("safetensors")
pytest.importorskip("xxhash")

TOKENS = list(range(100, 121))  # 21 of them: five blocks of four, and one more
FLAT = {"num_layers": 2, "num_blocks": 24, "num_kv_heads": 2, "head_dim": 16, "block_size": 4}
KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16, another layout": {"layout": "NHD", "v_head_dim": 8},
    "int8, a scale a token": {"dtype": "int8"},
    "float8, a scale a head": {"dtype": "float8_e4m3fnuz", "scales": [(0.02, [0.03, 0.01])] * 2},
    "kernel blocks": {"kernel_block_size": 2, "dtype": "float16"},
    "a latent cache": {"latent_dim": 8, "num_kv_heads": 1, "dtype": "float32"},
    "a window": {
        "num_blocks": None,
        "dtype": "float32",
        "groups": [
            LayerGroup(num_blocks=24, layers=[0]),
            LayerGroup(num_blocks=20, layers=[1], window=6, head_dim=8),
        ],
    },
}


def twins(device, **options):
    """A cache in host memory and one on the device."""
    arguments = {**FLAT, **options}
    return [KVCache(**arguments, device=name) for name in ("cpu", str(device))]


def compute(caches, sequence, tokens, seed=0):
    """Compute tokens in all caches; a layer's keys and values are random."""
    for cache in caches:
        rng = np.random.default_rng(seed)
        found = cache.add_sequence(sequence, tokens)
        batch = cache.append([sequence], len(tokens) - found)
        for layer, pools in enumerate(cache._layers):
            shape = cache._shapes[pools.group]
            wide = np.float32 if shape.dtype.itemsize == 1 else shape.dtype
            key, value = (
                rng.standard_normal((batch.num_tokens, shape.num_kv_heads, dim)).astype(wide)
                for dim in (shape.head_dim, shape.v_head_dim)
            )
            cache.write(layer, key, None if shape.latent else value, batch)


def saved(cache, tmp_path, **options):
    cache.save(tmp_path / "saved", **options)
    return (tmp_path / "saved").read_bytes()


def same(caches, tmp_path):
    host, there = (saved(cache, tmp_path) for cache in caches)
    assert host == there


@pytest.fixture(params=["one chunk", "chunks of two blocks"])
def chunks(request, monkeypatch):
    """Bytes of a transfer's buffers: all at once, or so few that they must be used again."""
    if request.param != "one chunk":
        monkeypatch.setattr(mover, "CHUNK", 2 * 512)


# ---- snapshots ----


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_are_the_same_file_wherever_the_cache_is(device, kind, chunks, tmp_path):
    host, there = caches = twins(device, **KINDS[kind])
    compute(caches, 1, TOKENS)
    compute(caches, 2, [*TOKENS[:9], 5, 6, 7], seed=1)
    for cache in caches:
        cache.free(1)
    same(caches, tmp_path)
    assert there.stats() == host.stats()
    loaded = {name: KVCache.load(tmp_path / "saved", device=name) for name in ("cpu", str(device))}
    for name, cache in loaded.items():
        assert cache.device == name
        cache.check_integrity()
        assert logical_state(cache) == logical_state(there)
        assert cache.add_sequence(3, TOKENS) == 20
        cache.free(3)
    same(loaded.values(), tmp_path)
    assert {c.add_sequence(3, TOKENS) for c in caches} == {20}
    same(caches, tmp_path)


def test_a_loaded_cache_goes_on(device, tmp_path, rng):
    """Of more blocks, with another stream, and what attention reads is what was written."""
    caches = twins(device, dtype="float32")
    compute(caches, 1, TOKENS)
    caches[1].save(tmp_path / "a")
    stream = hip.Stream(device)
    loaded = KVCache.load(tmp_path / "a", device=str(device), stream=stream, num_blocks=40)
    assert loaded.stream is stream
    assert loaded.num_blocks == 40
    key, value = rng.standard_normal((2, 1, 2, 16), np.float32)
    query = rng.standard_normal((1, 4, 16), np.float32)
    results = []
    for cache in (caches[0], loaded):
        batch = cache.append([1], 1)
        for layer in range(2):
            cache.write(layer, key, value, batch)
        results.append(cache.attend(1, query, batch))
    np.testing.assert_allclose(results[1], results[0], atol=2e-6, rtol=2e-6)


def test_without_data_and_the_default_device(device, tmp_path):
    host, there = caches = twins(device)
    compute(caches, 1, TOKENS)
    assert saved(host, tmp_path, with_data=False) == saved(there, tmp_path, with_data=False)
    loaded = KVCache.load(tmp_path / "saved", with_data=False)
    assert loaded.device == "hip:0"  # "auto", as for a new one
    assert not any(pool.numpy().any() for _, pool, _ in loaded._pools())


def test_damaged_files_are_refused(device, tmp_path):
    _, there = caches = twins(device)
    compute(caches, 1, TOKENS)
    content = bytearray(saved(there, tmp_path))
    content[-3] ^= 1
    (tmp_path / "saved").write_bytes(content)
    with pytest.raises(SnapshotError, match="damaged, the checksum differs"):
        KVCache.load(tmp_path / "saved", device=str(device))


def test_scales_that_were_calibrated_there(device, tmp_path, rng):
    host, there = caches = twins(device, dtype="int8", scales="head")
    key, value = rng.standard_normal((2, 9, 2, 16), np.float32)
    fused = hip.from_numpy(np.concatenate([key, value], axis=2), there.device)
    for layer in range(2):
        host.calibrate(layer, key, value)
        there.calibrate(layer, fused[..., :16], fused[..., 16:])
        for mine, theirs in zip(host.scales(layer), there.scales(layer), strict=True):
            np.testing.assert_array_equal(theirs.numpy(), mine)
    compute(caches, 1, TOKENS)
    same(caches, tmp_path)
    with pytest.raises(ValueError, match="layer 0 was written to"):
        there.calibrate(0, fused[..., :16], fused[..., 16:])


def test_calibrating_refuses_what_it_must(device, rng):
    key = rng.standard_normal((9, 2, 16), np.float32)
    there = hip.from_numpy(key, device)
    got, none = ops.calibrate(there, None, "float8_e4m3fn")
    assert none is None
    np.testing.assert_array_equal(got, ops.calibrate(key, None, "float8_e4m3fn")[0])
    with pytest.raises(ValueError, match="value must be on a HIP device"):
        ops.calibrate(there, key, "int8")
    with pytest.raises(ValueError, match="must be in host memory"):
        ops.calibrate(key, there, "int8")
    with pytest.raises(ValueError, match="stream must be None"):
        ops.calibrate(key, key, "int8", stream=0)
    key[0, 1, 0] = np.nan
    damaged = hip.from_numpy(key.astype(ml_dtypes.bfloat16), device)
    with pytest.raises(ValueError, match="key must be finite, head 1"):
        ops.calibrate(damaged, None, "int8")


# ---- other tiers ----


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_leave_and_come_back(device, kind, chunks, tmp_path):
    host, there = caches = twins(device, **KINDS[kind])
    compute(caches, 1, TOKENS)
    for group, part in enumerate(host.groups):
        ids = part.page_table.block_ids(1)
        ids = ids[ids >= 0]
        rows = host.read_blocks(ids, group=group)
        np.testing.assert_array_equal(there.read_blocks(ids, group=group), rows)
        wide = np.zeros((2 * len(ids), rows.shape[1], 3), np.uint8)
        out = wide[::2, :, 1]
        assert there.read_blocks(ids, out, group=group) is out
        np.testing.assert_array_equal(out, rows)
        assert not wide[..., 0].any()
    if len(host.groups) > 1:
        return
    rows = host.read_blocks(host.page_table.block_ids(1)[:5])
    ways = [rows, rows.tobytes(), iter(rows), np.repeat(rows, 2, axis=1)[:, ::2]]
    for way, other in zip(ways, [twins(device, **KINDS[kind])[1] for _ in ways], strict=True):
        assert other.insert_prefix(TOKENS, way) == 20
        other.check_integrity()
        assert other.add_sequence(1, TOKENS) == 20
        np.testing.assert_array_equal(other.read_blocks(other.page_table.block_ids(1)), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_suspended_sequences_move_between_devices(device, kind, chunks, tmp_path):
    caches = twins(device, **KINDS[kind])
    compute(caches, 1, TOKENS)
    buffers = [pickle.loads(pickle.dumps(cache.suspend(1))) for cache in caches]
    for mine, theirs in zip(buffers[0].data, buffers[1].data, strict=True):
        np.testing.assert_array_equal(theirs, mine)
    compute(caches, 2, [7] * 60)  # takes the blocks
    for cache in caches:
        cache.free(2)
    for cache, buffer in zip(caches, reversed(buffers), strict=True):
        assert cache.resume(1, buffer) == 0
        cache.check_integrity()
    same(caches, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic(device, seed, tmp_path):
    """Random calls on both caches, sequences suspended and resumed, then the same file."""
    traffics = [
        CacheTraffic(small_cache(seed, device=name, num_blocks=60), seed)
        for name in ("cpu", str(device))
    ]
    for turn in range(6):
        for traffic in traffics:
            traffic.run(25)
            if not traffic.alive:
                continue
            sequence = traffic.alive.pop(0)
            buffer = traffic.cache.suspend(sequence)
            if turn % 2:
                traffic.run(5)
            try:
                traffic.log.append(traffic.cache.resume(sequence, buffer))
                traffic.alive.append(sequence)
            except OutOfBlocksError:
                traffic.log.append("refused")
        assert traffics[1].log == traffics[0].log
    same([traffic.cache for traffic in traffics], tmp_path)
    loaded = KVCache.load(tmp_path / "saved", device="cpu")
    traffics[1].check(loaded)


def test_blocks_that_could_not_be_copied_at_first(sim, device, tmp_path):
    """A copy-on-write whose launch failed is made good before anybody reads or fills blocks."""
    caches = twins(device, dtype="float32")
    compute(caches, 1, TOKENS)
    for cache in caches:
        cache.fork(1, 2)
    sim.set_device(0)
    sim.fail(0)
    batches = [cache.append([1], 1) for cache in caches]
    sim.fail(-1)
    assert len(batches[1].copies) == 1
    for cache in caches:
        cache.truncate(1, 21)
    sim.set_device(0)
    same(caches, tmp_path)


def test_several_threads(device):
    """Threads that suspend, resume, read and save, on one device cache."""
    cache = small_cache(1, num_layers=2, block_size=4, num_blocks=80, dtype="float32",
                        device=str(device))  # fmt: skip

    def work(number: int) -> None:
        tokens = [number] * 13
        rows = None
        for turn in range(6):
            cache.add_sequence(number, tokens)
            count = len(tokens) - cache.seq_len(number)
            batch = cache.append([number], count)
            key = np.full((count, cache.num_kv_heads, 8), 100 * number + turn, np.float32)
            for layer in range(2):
                cache.write(layer, key, -key, batch)
            buffer = cache.suspend(number)
            cache.reset_prefix_cache()
            cache.resume(number, buffer)
            again = cache.read_blocks(cache.page_table.block_ids(number)[:3])
            np.testing.assert_array_equal(again, buffer.data[0][:3])
            assert rows is None or (rows != again).any()
            rows = again
            cache.free(number)
            cache.reset_prefix_cache()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(1, 5)))
    cache.check_integrity()


# ---- what may fail ----


def test_memory_for_transfers_is_bounded_and_kept(sim, device, monkeypatch, tmp_path):
    """Two pinned buffers and two on the device, however much is moved."""
    monkeypatch.setattr(mover, "CHUNK", 1024)
    _, there = caches = twins(device, dtype="float32")
    compute(caches, 1, [7] * 90)
    gc.collect()
    before = sim.live()
    for _ in range(3):
        there.save(tmp_path / "a")
        there.read_blocks(there.page_table.block_ids(1))
        there.resume(1, there.suspend(1))
        grown = {name: count - before[name] for name, count in sim.live().items()}
        assert grown == {**dict.fromkeys(before, 0), "device memory": 2, "pinned memory": 2,
                         "events": 2}  # fmt: skip
    del there, caches
    gc.collect()
    assert all(count <= before[name] for name, count in sim.live().items())


def attempts(sim, prepare, function):
    """Let each HIP call of a function fail in turn; gives what it was called with, each time."""
    for _ in range(2):  # the first time kernels are loaded
        sim.set_device(0)
        prepared = prepare()
        sim.set_device(0)
        before = sim.calls()
        function(prepared)
        total = sim.calls() - before
    assert total > 4
    for n in range(total):
        sim.set_device(0)
        prepared = prepare()
        sim.set_device(0)
        sim.fail(n)
        failed = False
        try:
            function(prepared)
        except DeviceError as error:
            failed = "hipErrorLaunchFailure" in str(error)
        sim.fail(-1)
        sim.set_device(0)
        assert failed, n
        yield prepared


@pytest.mark.parametrize("what", ["save", "read_blocks", "insert_prefix", "suspend", "resume"])
def test_every_call_may_fail(sim, device, what, monkeypatch, tmp_path):
    """The cache is what it was, and the same call then succeeds."""
    monkeypatch.setattr(mover, "CHUNK", 1024)
    host = twins(device, num_layers=1)[0]
    compute([host], 1, TOKENS[:13])
    rows = host.read_blocks(host.page_table.block_ids(1)[:3])
    host.save(tmp_path / "host")
    buffer = host.suspend(1)

    def prepare():
        cache = twins(device, num_layers=1)[1]
        if what not in ("insert_prefix", "resume"):
            compute([cache], 1, TOKENS[:13])
        return cache

    def function(cache):
        if what == "save":
            cache.save(tmp_path / "there")
            assert (tmp_path / "there").read_bytes() == (tmp_path / "host").read_bytes()
        elif what == "read_blocks":
            np.testing.assert_array_equal(cache.read_blocks([0, 1, 2]), rows)
        elif what == "insert_prefix":
            assert cache.insert_prefix(TOKENS[:13], iter(rows)) == 12
            np.testing.assert_array_equal(cache.read_blocks([0, 1, 2]), rows)
        elif what == "suspend":
            found = cache.suspend(1)
            np.testing.assert_array_equal(found.data[0], buffer.data[0])
            assert len(cache) == 0
        else:
            cache.resume(1, buffer)
            assert cache.committed_len(1) == 13
            np.testing.assert_array_equal(cache.read_blocks([0, 1, 2]), rows)

    done = 0
    for cache in attempts(sim, prepare, function):
        cache.check_integrity()
        assert not (tmp_path / ".there.saving").exists()
        if what == "resume" and 1 in cache:  # what failed is the check behind it
            done += 1
            continue
        if what in ("insert_prefix", "resume"):
            assert len(cache) == 0
            assert cache.num_free_blocks == 24
        else:
            assert cache.committed_len(1) == 13
        function(cache)
        cache.check_integrity()
    assert done < 40


def test_every_call_of_a_load_may_fail(sim, device, monkeypatch, tmp_path):
    monkeypatch.setattr(mover.DeviceMover, "workers", 1)  # the same calls each time
    host = twins(device, num_layers=1)[0]
    compute([host], 1, TOKENS)
    content = saved(host, tmp_path)
    gc.collect()
    live = sim.live()

    def load(_):
        loaded.append(KVCache.load(tmp_path / "saved", device=str(device)))

    loaded = []
    for _ in attempts(sim, lambda: None, load):
        loaded.clear()
        gc.collect()
        assert sim.live() == live
    load(None)
    assert saved(loaded.pop(), tmp_path) == content
