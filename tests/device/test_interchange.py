"""Tensors of other libraries on a device, by DLPack: what is taken, and what is refused."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest

from device_cases import attend, on, up
from exchange import Exchanged, offer
from foreign import CPU, CUDA, READ_ONLY, ROCM, ROCM_HOST, Foreign, cut, foreign
from ops_cases import BFLOAT16, FLOAT32, bits, make
from rocmforge import KVCache, hip, ops
from rocmforge.hip import _driver

EVERY = ("query", "k_cache", "v_cache", "block_table", "seq_lens")
FORMS = {
    "versioned": {},
    "a later minor version": {"version": (1, 9)},
    "before version 1": {"version": None},
    "a producer that knows no versions": {"version": None, "legacy": True},
    "no strides": {"strides": False},
    "an offset in bytes": {"offset": 64},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_capsule(device, form):
    problem = make(FLOAT32, [40, 21], heads=(4, 2))
    want = attend(problem, device)
    moved = on(problem, device)
    tensors = foreign(moved, *EVERY, **FORMS[form])
    stream = hip.Stream(device)
    hip.synchronize(None, device)
    got = moved.but(**tensors).call(ops.paged_attention, stream=stream)
    np.testing.assert_array_equal(bits(got.numpy(stream)), bits(want))
    gc.collect()
    for name, tensor in tensors.items():
        assert tensor.given == tensor.taken_back == 1, name
        assert tensor.streams == [_driver.stream_address(stream)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_strided_tensors_are_written_to_and_read(device, rng, dtype):
    """Keys and values in the middle of a fused projection; caches that are views; `out` too."""
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    key, value = rng.standard_normal((2, 5, 2, 16)).astype(kind)
    caches = [hip.zeros((6, 2, 16, 48), kind, device) for _ in range(2)]
    slots = np.array([3, 90, -1, 17, 64])
    wide = [hip.from_numpy(cut(x), device)[:, 2:4] for x in (key, value)]
    views = [cache[..., 16:32] for cache in caches]
    tensors = [Foreign(x) for x in (*wide, *views, hip.from_numpy(slots, device))]
    ops.write_kv(*tensors)
    host = [np.zeros((6, 2, 16, 16), kind) for _ in range(2)]
    ops.write_kv(key, value, *host, slots)
    for cache, want in zip(caches, host, strict=True):
        got = cache.numpy()
        np.testing.assert_array_equal(got[..., 16:32].view(np.uint8), want.view(np.uint8))
        assert not got[..., :16].view(np.uint8).any()
        assert not got[..., 32:].view(np.uint8).any()
    table, lens = np.arange(6, dtype=np.int32)[None], np.array([90], np.int32)
    query = rng.standard_normal((1, 4, 16)).astype(kind)
    out = hip.zeros((1, 12, 16), kind, device)
    target = Foreign(out[:, 4:8])
    there = [Foreign(up(x, device)) for x in (query, table, lens)]
    assert ops.paged_attention(there[0], *tensors[2:4], *there[1:], out=target) is target
    want = ops.paged_attention(query, *host, table, lens)
    got = out.numpy().astype(np.float32)
    tolerance = 2e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(got[:, 4:8], want.astype(np.float32), atol=tolerance)
    assert not got[:, :4].any()
    assert not got[:, 8:].any()


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "int8"])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_8_bit_caches(device, rng, name, as_bytes):
    """By their DLPack type, or as bytes that get their type by a view."""
    kind = np.dtype(getattr(ml_dtypes, name, None) or name)
    key = rng.standard_normal((4, 2, 16), np.float32)
    pool = hip.zeros((2, 2, 16, 16), kind, device)
    cache = Foreign(pool)
    if as_bytes:
        plain = Foreign(pool.view(np.uint8))
        cache = hip.from_dlpack(plain).view(kind)
        assert cache.address == pool.address
    slots = up(np.arange(4), device)
    ops.write_kv(up(key, device), None, cache, None, slots, k_scale=0.02)
    want = np.zeros((2, 2, 16, 16), kind)
    ops.write_kv(key, None, want, None, np.arange(4), k_scale=0.02)
    np.testing.assert_array_equal(pool.numpy().view(np.uint8), want.view(np.uint8))
    del cache
    if as_bytes:
        gc.collect()
        assert plain.given == plain.taken_back == 1


def test_a_cache_takes_them_and_its_pools_go_out(device, rng):
    """KVCache.write and attend with foreign tensors; a pool through DLPack and back."""
    stream = hip.Stream(device)
    cache = KVCache(1, 8, 2, 16, block_size=4, dtype="bfloat16", device=str(device), stream=stream)
    host = KVCache(1, 8, 2, 16, block_size=4, dtype="bfloat16", device="cpu")
    key, value = rng.standard_normal((2, 5, 2, 16)).astype(BFLOAT16)
    query = rng.standard_normal((5, 4, 16)).astype(BFLOAT16)
    results = []
    for one, form in ((host, lambda x: x), (cache, lambda x: Foreign(up(x, device)))):
        one.add_sequence(1)
        batch = one.append([1], 5)
        one.write(0, form(key), form(value), batch)
        results.append(one.attend(0, form(query), batch))
    want, got = results
    assert isinstance(got, hip.DeviceArray)
    np.testing.assert_allclose(
        got.numpy(stream).astype(np.float32), want.astype(np.float32), atol=2e-2
    )
    again = hip.from_dlpack(Foreign(cache.k_cache(0)), stream)
    assert again.address == cache.k_cache(0).address
    np.testing.assert_array_equal(again[:1].numpy(stream), host.k_cache(0)[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "k_cache has a type that no argument can have: .* 64 bits"),
        ({"dtype": "complex64"}, "type code 5"),
        ({"dtype": "int16"}, "16 bits"),
        ({"lanes": 2}, "2 lanes"),
        ({"dtype": "float16"}, "k_cache must have the dtype of query"),
        ({"dtype": "uint8"}, "k_cache must have the dtype of query"),
        ({"version": (2, 0)}, "k_cache came by version 2 of DLPack"),
        ({"device": (CUDA, 0)}, "k_cache must be on hip.* on DLPack device type 2"),
        ({"device": (CPU, 0)}, "k_cache must be on hip.* in host memory"),
        ({"device": (ROCM_HOST, 0)}, "k_cache must be on hip.* in host memory"),
        ({"device": (ROCM, 7)}, "k_cache must be on hip.* on hip:7"),
    ],
)
def test_what_is_refused(device, options, message):
    problem = make(FLOAT32, [40, 21], heads=(4, 2))
    moved = on(problem, device)
    cache = Foreign(moved.k_cache, **options)
    with pytest.raises(ValueError, match=message):
        moved.but(k_cache=cache).call(ops.paged_attention)
    gc.collect()
    assert cache.given == cache.taken_back


def test_capsules_that_are_none(device):
    moved = on(make(FLOAT32, [40], heads=(4, 2)), device)
    used = Foreign(moved.k_cache, name=b"used_dltensor_versioned")
    with pytest.raises(TypeError, match="k_cache must give a DLPack capsule that nobody has used"):
        moved.but(k_cache=used).call(ops.paged_attention)

    class Refuses(Foreign):
        def __dlpack__(self, **_):
            raise BufferError("it requires a gradient")

    with pytest.raises(BufferError, match="requires a gradient"):
        moved.but(k_cache=Refuses(moved.k_cache)).call(ops.paged_attention)
    for array in (np.zeros(3, np.float32), [1.0], Foreign(moved.k_cache, device=(CUDA, 0))):
        with pytest.raises(ValueError, match="array must be on a HIP device"):
            hip.from_dlpack(array)


def test_strides_that_no_kernel_takes(device):
    moved = on(make(FLOAT32, [40], heads=(4, 2)), device)
    wide = hip.zeros((*moved.k_cache.shape[:-1], 128), FLOAT32, device)
    with pytest.raises(ValueError, match="k_cache must be contiguous in its last dimension"):
        moved.but(k_cache=Foreign(wide[..., ::2])).call(ops.paged_attention)


def test_read_only_tensors_are_read_and_not_written_to(device, rng):
    moved = on(make(FLOAT32, [40], heads=(4, 2)), device)
    want = moved.call(ops.paged_attention).numpy()
    shielded = foreign(moved, *EVERY, flags=READ_ONLY)
    got = moved.but(**shielded).call(ops.paged_attention)
    np.testing.assert_array_equal(got.numpy(), want)
    with pytest.raises(ValueError, match="out must be writable"):
        moved.call(ops.paged_attention, out=Foreign(got, flags=READ_ONLY))
    key = up(rng.standard_normal((1, 2, 64), np.float32), device)
    slots = up(np.zeros(1, np.int64), device)
    with pytest.raises(ValueError, match="k_cache must be writable"):
        ops.write_kv(key, key, shielded["k_cache"], moved.v_cache, slots)
    pairs = np.array([[0, 1]], np.int32)
    with pytest.raises(ValueError, match=r"caches\[0\] must be writable"):
        ops.copy_blocks(shielded["k_cache"], pairs)
    array = hip.from_dlpack(shielded["k_cache"])
    with pytest.raises(ValueError, match="the target must be writable"):
        array.copy_from(moved.k_cache)
    with pytest.raises(BufferError, match="read-only"):
        array.__dlpack__()
    again = hip.from_dlpack(array)  # through our own capsule
    with pytest.raises(ValueError, match=r"caches\[0\] must be writable"):
        ops.copy_blocks(again[:, :1], pairs)


def test_the_exchange_api_is_used_on_the_librarys_own_stream(device, rng):
    """No Python of the library runs there; on another stream `__dlpack__` makes them wait."""
    ours, other = hip.Stream(device), hip.Stream(device)

    class Tensor(Exchanged):
        device = (ROCM, 0)
        stream = _driver.stream_address(ours)
        calls: list[str] = []  # noqa: RUF012

        @property
        def address(self):
            return self.array.address

        def __dlpack_device__(self):
            return self.device

        def __dlpack__(self, **keywords):
            self.calls.append("capsule")
            keywords.pop("stream")
            return self.array.__dlpack__(**keywords)

    Tensor.device = (ROCM, device.index)
    table = offer(Tensor)
    problem = make(FLOAT32, [40, 21], heads=(4, 2))
    want = attend(problem, device)
    moved = on(problem, device)
    hip.synchronize(None, device)
    tensors = moved.but(**{name: Tensor(getattr(moved, name)) for name in EVERY})
    for stream, capsules in ((ours, 0), (other, len(EVERY))):
        Tensor.calls.clear()
        got = tensors.call(ops.paged_attention, stream=stream)
        np.testing.assert_array_equal(bits(got.numpy(stream)), bits(want))
        assert len(Tensor.calls) == capsules
    Tensor.device = (ROCM, 7)
    with pytest.raises(ValueError, match=r"k_cache must be on hip.* on hip:7"):
        moved.but(k_cache=tensors.k_cache).call(ops.paged_attention, stream=ours)
    assert table.major == 1
