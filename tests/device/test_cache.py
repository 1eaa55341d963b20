"""KVCache on a device: the same steps as on the CPU give the same results."""

from __future__ import annotations

import gc
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rocmforge import KVCache, LayerGroup, hip
from rocmforge.errors import DeviceError

SHAPE = {"num_layers": 2, "num_blocks": 40, "num_kv_heads": 2, "head_dim": 64, "block_size": 4}


def caches(device, stream=None, **kwargs):
    arguments = {**SHAPE, "dtype": "float32", **kwargs}
    host = KVCache(**arguments, device="cpu")
    return host, KVCache(**arguments, device=str(device), stream=stream)


def step(rng, both, ids, counts, on_device=False):
    """One step of both caches with the same keys, values and queries; compares what it gives."""
    cpu, gpu = both
    batches = [cache.append(ids, counts) for cache in both]
    for layer in range(2):
        tokens = batches[0].num_tokens
        key, value = rng.standard_normal((2, tokens, 2, 64), np.float32)
        query = rng.standard_normal((tokens, 4, 64), np.float32)
        cpu.write(layer, key, value, batches[0])
        want = cpu.attend(layer, query, batches[0])
        if on_device:
            place = gpu.device
            key, value, query = (hip.from_numpy(x, place) for x in (key, value, query))
        gpu.write(layer, key, value, batches[1])
        got = gpu.attend(layer, query, batches[1])
        got = got.numpy(gpu.stream) if on_device else got
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)
    gpu.check_integrity()
    np.testing.assert_array_equal(gpu._mirror.tables[0].numpy(gpu.stream), gpu.block_table)


KINDS = {
    "int8, a scale a token": {"dtype": "int8"},
    "float8, a scale a head": {"dtype": "float8_e4m3fnuz", "scales": [(0.02, 0.03)] * 2},
    "another value size": {"v_head_dim": 40, "dtype": "bfloat16"},
    "kernel blocks": {"kernel_block_size": 2},
    "a window": {
        "num_blocks": None,
        "groups": [
            LayerGroup(num_blocks=40, layers=[0]),
            LayerGroup(num_blocks=40, layers=[1], window=6),
        ],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache(device, rng, kind):
    both = caches(device, **KINDS[kind])
    cpu = both[0]
    wide = np.float32 if cpu.dtype.itemsize == 1 else cpu.dtype
    for cache in both:
        cache.add_sequence(1)
        cache.add_sequence(2)
    for counts in ([9, 3], [1, 1], [4, 2]):
        batches = [cache.append([1, 2], counts) for cache in both]
        tokens = sum(counts)
        for layer in range(2):
            key = rng.standard_normal((tokens, 2, 64)).astype(wide)
            value = rng.standard_normal((tokens, 2, cpu.v_head_dim)).astype(wide)
            query = rng.standard_normal((tokens, 4, 64)).astype(wide)
            results = []
            for cache, batch in zip(both, batches, strict=True):
                cache.write(layer, key, value, batch)
                results.append(cache.attend(layer, query, batch, softcap=4.0, return_lse=True))
            (want, want_lse), (got, lse) = results
            tolerance = 2e-2 if wide != np.float32 else 4e-6
            np.testing.assert_allclose(
                got.astype(float), want.astype(float), atol=tolerance, rtol=tolerance
            )
            np.testing.assert_allclose(lse, want_lse, atol=1e-5 if wide == np.float32 else 2e-2)


def test_a_latent_cache(device, rng):
    arguments = {"num_layers": 1, "num_blocks": 20, "num_kv_heads": 1, "head_dim": 72}
    both = [
        KVCache(**arguments, latent_dim=64, dtype="float32", device=name)
        for name in ("cpu", str(device))
    ]
    key = rng.standard_normal((9, 1, 72), np.float32)
    query = rng.standard_normal((9, 8, 72), np.float32)
    results = []
    for cache in both:
        cache.add_sequence(1)
        batch = cache.append([1], 9)
        cache.write(0, key, None, batch)
        results.append(cache.attend(0, query, batch, scale=0.1))
    np.testing.assert_allclose(results[1], results[0], atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("on_device", [False, True])
def test_steps_with_forks_growth_and_copies(device, rng, layout, on_device):
    both = caches(device, layout=layout)
    for cache in both:
        assert cache.device in ("cpu", str(device))
        cache.add_sequence(1)
        cache.add_sequence(2)
    step(rng, both, [1, 2], [10, 3], on_device)
    for cache in both:
        cache.fork(1, 3)  # shares the block that both write on
    step(rng, both, [1, 2, 3], 1, on_device)
    for n in range(4, 20):  # the table grows
        for cache in both:
            cache.add_sequence(n)
    step(rng, both, [3, 19, 7, 1], [1, 5, 2, 6], on_device)
    for cache in both:
        cache.free([1, 19])
        cache.truncate(3, 5)
    step(rng, both, [2, 3, 7], [2, 4, 1], on_device)
    for layer in range(2):
        for name in ("k_cache", "v_cache"):
            want = getattr(both[0], name)(layer)
            got = getattr(both[1], name)(layer).numpy()
            used = np.unique(both[0].block_table[both[0].block_table >= 0])
            np.testing.assert_array_equal(got[used[:1]], want[used[:1]])


def test_a_stream_of_the_caller(device, rng):
    stream = hip.Stream(device)
    both = caches(device, stream=None)
    gpu = KVCache(**SHAPE, dtype="float32", device=str(device), stream=stream)
    for cache in (both[0], gpu):
        cache.add_sequence(1)
    step(rng, (both[0], gpu), [1], 9)
    with pytest.raises(ValueError, match="stream: expected None"):
        KVCache(**SHAPE, device="cpu", stream=stream)


def test_devices_and_streams_in_threads():
    """Caches on two streams of each device, each used by a thread of its own at the same time."""

    def work(number):
        device = hip.get_device(number % hip.device_count())
        rng, stream = np.random.default_rng(number), hip.Stream(device)
        both = caches(device, stream=stream, dtype="float32")
        for turn in range(3):
            for cache in both:
                cache.add_sequence(turn)
            step(rng, both, list(range(turn + 1)), 3 + number, on_device=bool(turn % 2))
        return both[1].device, both[1].num_free_blocks

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(2 * hip.device_count())))
    assert len(set(found)) == len(found)


def test_addresses_stay_for_graphs(device, rng):
    """A decode step captured once serves later ones: table and batch arrays keep their places."""
    arguments = {**SHAPE, "dtype": "float32", "max_sequences": 8, "max_seq_len": 64}
    stream = hip.Stream(device)
    cpu = KVCache(**arguments, device="cpu")
    gpu = KVCache(**arguments, device=str(device), stream=stream)
    both = (cpu, gpu)
    for cache in both:
        cache.add_sequence(1)
        cache.add_sequence(2)
    step(rng, both, [1, 2], [9, 3])
    key, query, out = (hip.empty((2, heads, 64), np.float32, device) for heads in (2, 4, 4))
    graph = None
    for _ in range(5):
        keys, queries = rng.standard_normal((2, 2, 64)), rng.standard_normal((2, 4, 64))
        keys, queries = keys.astype(np.float32), queries.astype(np.float32)
        batches = [cache.append([1, 2], 1) for cache in both]
        for layer in range(2):
            cpu.write(layer, keys, keys, batches[0])
        want = cpu.attend(1, queries, batches[0])
        key.copy_from(keys, stream)
        query.copy_from(queries, stream)
        if graph is None:
            stream.synchronize()
            stream.begin_capture()
            for layer in range(2):
                gpu.write(layer, key, key, batches[1])
            gpu.attend(1, query, batches[1], out=out)
            graph = stream.end_capture()
        else:
            gpu.commit(batches[1])
        graph.launch(stream)
        np.testing.assert_allclose(out.numpy(stream), want, atol=2e-6, rtol=2e-6)


def sharing(device, rng, **kwargs):
    """Both caches with five sequences that begin with the same 37 tokens."""
    both = caches(device, **kwargs)
    key = rng.standard_normal((37, 2, 64)).astype(both[0].dtype)
    for cache in both:
        cache.add_sequence(0)
        batch = cache.append([0], 37)
        for layer in range(2):
            cache.write(layer, key, key, batch)
        for i in range(1, 5):
            cache.fork(0, i)
    return both


def attend_both(rng, both, counts, deterministic=False, **options):
    batches = [cache.append(range(5), counts) for cache in both]
    tokens, kind = batches[0].num_tokens, both[0].dtype
    for layer in range(2):
        key = rng.standard_normal((tokens, 2, 64)).astype(kind)
        query = rng.standard_normal((tokens, 4, 64)).astype(kind)
        results = []
        for cache, batch in zip(both, batches, strict=True):
            cache.write(layer, key, key, batch)
            choice = deterministic if cache is both[1] else True
            results.append(
                cache.attend(layer, query, batch, return_lse=True, deterministic=choice, **options)
            )
        tolerance = 4e-6 if kind == np.float32 else 2e-2
        for want, got in zip(*results, strict=True):
            np.testing.assert_allclose(
                got.astype(np.float32), want.astype(np.float32), atol=tolerance, rtol=tolerance
            )


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_common_prefix_is_read_once(device, rng, prefixes, layout, dtype):
    both = sharing(device, rng, layout=layout, dtype=dtype)
    sinks = np.array([1, -1, 0, 2], np.float32)
    attend_both(rng, both, 1, True, softcap=4.0, sinks=sinks)
    assert not prefixes
    attend_both(rng, both, 1, softcap=4.0, sinks=sinks)
    attend_both(rng, both, [3, 1, 5, 2, 1])
    assert prefixes == [9] * 4  # 36 tokens in blocks of four, two layers of two steps
    attend_both(rng, both, 1, alibi_slopes=np.ones(4, np.float32))
    assert len(prefixes) == 4


def test_a_common_prefix_stays_out_of_graphs(device, rng, prefixes):
    """A graph serves later batches, which may have less in common."""
    stream = hip.Stream(device)
    _, cache = sharing(device, rng, stream=stream)
    key, out = (hip.zeros((5, 2, 64), np.float32, device, stream) for _ in range(2))
    batch = cache.append(range(5), 1)
    for layer in range(2):
        cache.write(layer, key, key, batch)
        cache.attend(layer, key, batch, deterministic=False)
    assert prefixes == [9] * 2
    batch = cache.append(range(5), 1)
    stream.synchronize()
    stream.begin_capture()
    cache.write(0, key, key, batch)
    cache.attend(0, key, batch, deterministic=False, out=out)
    stream.end_capture().launch(stream)
    assert len(prefixes) == 2
    again = cache.attend(0, key, batch, deterministic=False)
    np.testing.assert_allclose(out.numpy(stream), again.numpy(stream), atol=4e-6)
    assert len(prefixes) == 3


def test_devices_that_are_not_there():
    with pytest.raises(DeviceError, match="hip:77 is not there"):
        KVCache(**SHAPE, device="hip:77")
    with pytest.raises(DeviceError, match="expected"):
        KVCache(**SHAPE, device="cuda:0")
    with pytest.raises(TypeError, match="device: expected a str"):
        KVCache(**SHAPE, device=0)


def test_auto_takes_the_device_and_says_so(monkeypatch, tmp_path):
    assert KVCache(**SHAPE).device == "hip:0"
    hip.get_device(0).release()
    for index in range(hip.device_count()):
        hip.get_device(index).release()
    monkeypatch.setenv("ROCMFORGE_CODE_OBJECTS", str(tmp_path))
    assert KVCache(**SHAPE).device == "cpu"
    assert "no code object" in hip.default_device()[1]
    with pytest.raises(DeviceError, match="no code object"):
        KVCache(**SHAPE, device="hip:0")


def test_pools_that_do_not_fit(sim, device):
    gc.collect()
    live = sim.live()
    with pytest.raises(DeviceError, match=r"hipMalloc: \d+ bytes of device memory"):
        KVCache(**{**SHAPE, "num_layers": 30, "num_blocks": 20_000}, device=str(device))
    gc.collect()
    assert sim.live() == live


def test_memory_runs_out_in_a_step(sim, device, rng):
    """Sizes are told, nothing leaks, and with memory again the step goes on where it stopped."""
    arguments = {"num_layers": 1, "num_blocks": 200}
    key, value = rng.standard_normal((2, 600, 2, 64), np.float32)
    query = rng.standard_normal((2, 4, 64), np.float32)

    def prepare():
        both = caches(device, **arguments)
        for cache in both:
            cache.add_sequence(1)
            cache.write(0, key, value, cache.append([1], 600))
            cache.fork(1, 2)
        return both

    cpu, gpu = prepare()
    batch = cpu.append([1, 2], 1)
    cpu.write(0, key[:2], value[:2], batch)
    want = cpu.attend(0, query, batch)
    del cpu, gpu
    messages = set()
    for room in [0, 1 << 10, 1 << 11, 1 << 12, 1 << 16]:
        device.release()
        gc.collect()
        live = sim.live()
        gpu = prepare()[1]
        device.release()  # scratch memory that is there would do
        free, total = device.memory_info()
        batch = gpu.append([1, 2], 1)
        for call in (
            lambda gpu=gpu, batch=batch: gpu.write(0, key[:2], value[:2], batch),
            lambda gpu=gpu, batch=batch: gpu.attend(0, query, batch),
        ):
            sim.set_memory(total - free + room)
            try:
                got = call()
            except DeviceError as error:
                messages.add(str(error))
                gpu.check_integrity()
                sim.set_memory(1 << 30)
                got = call()
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)
        sim.set_memory(1 << 30)
        del gpu, batch, call
        device.release()
        gc.collect()
        assert sim.live() == live
    assert len(messages) >= 4
    for message in messages:
        assert re.match(r"hipMalloc: \d+ bytes of device memory on hip:\d \(\d+ of \d+", message)


def test_every_call_of_a_step_may_fail(sim, device, rng):
    """After any failure the cache is whole; the same call then succeeds, with the same result."""
    key, value = rng.standard_normal((2, 2, 2, 64), np.float32)
    query = rng.standard_normal((2, 4, 64), np.float32)

    def prepare():
        both = caches(device, num_layers=1)
        for cache in both:
            cache.add_sequence(1)
            batch = cache.append([1], 6)
            cache.write(0, np.ones((6, 2, 64), np.float32), np.ones((6, 2, 64), np.float32), batch)
            cache.fork(1, 2)
        return both

    def again(function, *arguments):
        try:
            return function(*arguments), 0
        except DeviceError:
            cpu_or_gpu.check_integrity()
            return function(*arguments), 1

    cpu, cpu_or_gpu = prepare()
    batch = cpu.append([1, 2], 1)
    cpu.write(0, key, value, batch)
    want = cpu.attend(0, query, batch)
    for _ in range(2):  # the first time kernels are loaded
        _, cpu_or_gpu = prepare()
        sim.set_device(0)
        before = sim.calls()
        batch = cpu_or_gpu.append([1, 2], 1)
        appended = sim.calls() - before
        cpu_or_gpu.write(0, key, value, batch)
        cpu_or_gpu.attend(0, query, batch)
        total = sim.calls() - before
    assert total > appended > 5
    for n in range(total):
        sim.set_device(0)
        _, cpu_or_gpu = prepare()
        sim.set_device(0)
        sim.fail(n)
        batch = cpu_or_gpu.append([1, 2], 1)
        _, failed = again(cpu_or_gpu.write, 0, key, value, batch)
        got, also = again(cpu_or_gpu.attend, 0, query, batch)
        sim.fail(-1)
        assert failed + also == (n >= appended), n
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)
        cpu_or_gpu.check_integrity()
        cpu_or_gpu.free([1, 2])
        assert cpu_or_gpu.num_free_blocks == 40
