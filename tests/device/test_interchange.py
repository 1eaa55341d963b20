"""Tensors of other libraries on a device, by DLPack: what is taken, and what is refused."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest

from device_cases import attend, on, up
from exchange import Exchanged, offer
from foreign import CPU, CUDA, READ_ONLY, ROCM, ROCM_HOST, Foreign, cut, foreign
from ops_cases import BFLOAT16, FLOAT8, FLOAT8UZ, FLOAT32, INT8, bits, make
from rocmforge import KVCache, hip, ops, reference
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


def as_bytes(problem, *names):
    return problem.but(**{name: getattr(problem, name).view(np.uint8) for name in names})


@pytest.mark.parametrize(
    "form", [up, lambda x, device: Foreign(up(x, device))], ids=["ours", "foreign"]
)
@pytest.mark.parametrize("kv_dtype", [FLOAT8, FLOAT8UZ], ids=str)
def test_float8_that_comes_as_bytes(device, kv_dtype, form):
    """What `kv_dtype` says of both caches, or what one of them is."""
    for scales, queries in (("token", [2, 1]), ("head", None), ("scalar", [9, 1])):
        problem = make(FLOAT32, [40, 7], queries, heads=(4, 2), kv_dtype=kv_dtype, scales=scales)
        want = problem.call(reference.paged_attention)
        moved = on(problem, device)
        for plain, how in ((("k_cache", "v_cache"), kv_dtype.name), (("v_cache",), None)):
            raw = as_bytes(problem, *plain)
            caches = {name: form(getattr(raw, name), device) for name in plain}
            got = moved.but(**caches).call(ops.paged_attention, kv_dtype=how)
            np.testing.assert_allclose(got.numpy(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kv_dtype", [FLOAT8, FLOAT8UZ], ids=str)
def test_float8_is_written_to_bytes(device, rng, kv_dtype):
    key, value = rng.standard_normal((2, 9, 2, 24), np.float32)
    slots = rng.permutation(48)[:9].astype(np.int64)
    want = np.zeros((2, 3, 2, 16, 24), kv_dtype)
    scale = np.array([0.01, 0.03], np.float32)
    reference.write_kv(key, value, *want, slots, k_scale=scale, v_scale=0.5)
    there = [up(x, device) for x in (key, value, slots)]
    for how in (kv_dtype, None):  # None: the keys' cache decides
        pools = [hip.zeros(want.shape[1:], np.uint8, device) for _ in range(2)]
        k, v = (Foreign(pool) for pool in pools)
        if how is None:
            k = pools[0].view(kv_dtype)
        ops.write_kv(
            *there[:2], k, v, there[2], k_scale=up(scale, device), v_scale=0.5, kv_dtype=how
        )
        for pool, expected in zip(pools, want, strict=True):
            np.testing.assert_array_equal(pool.numpy(), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e4m3fnuz", "int8"])
def test_pools_of_an_8_bit_cache_are_read_by_others(device, rng, dtype):
    """Through DLPack as bytes, as a library without float8 has them, with the cache's own table."""
    arguments = {"num_layers": 1, "num_blocks": 9, "num_kv_heads": 2, "head_dim": 16,
                 "block_size": 4, "dtype": dtype}  # fmt: skip
    host, cache = (KVCache(**arguments, device=name) for name in ("cpu", str(device)))
    key, value = rng.standard_normal((2, 11, 2, 16), np.float32)
    query = rng.standard_normal((11, 4, 16), np.float32)
    for one in (host, cache):
        one.add_sequence(1)
        batch = one.append([1], 11)
        one.write(0, key, value, batch)
        found = one.attend(0, query, batch)
    pools = [cache.k_cache(0), cache.v_cache(0)]
    options = dict(zip(("k_scale", "v_scale"), cache.scales(0), strict=True))
    if dtype != "int8":
        pools = [Foreign(pool.view(np.uint8)) for pool in pools]
        options["kv_dtype"] = dtype
    table, lens = up(cache.block_table, device), up(np.array([11], np.int32), device)
    cu = up(np.array([0, 11], np.int32), device)
    got = ops.paged_attention(up(query, device), *pools, table, lens, cu, **options)
    np.testing.assert_array_equal(got.numpy(), found)
    options = dict(zip(("k_scale", "v_scale"), host.scales(0), strict=True))
    want = reference.paged_attention(
        *(query, host.k_cache(0), host.v_cache(0), host.block_table),
        *(np.array([11], np.int32), np.array([0, 11], np.int32)),
        **options,
    )
    np.testing.assert_allclose(found, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("stored", "kv_dtype", "message"),
    [
        (FLOAT8, None, "k_cache must have the dtype of .*, float32, .* got uint8; kv_dtype says"),
        (FLOAT8, "int8", "kv_dtype must be float8_e4m3fn or float8_e4m3fnuz, .* got int8"),
        (FLOAT8, "float7", "kv_dtype must be one of float32, .* got 'float7'"),
        (FLOAT8, "float8_e5m2", "kv_dtype must be one of float32, .* got float8_e5m2"),
        (INT8, "float8_e4m3fn", "v_cache must be float8_e4m3fn, as kv_dtype says, .* got int8"),
        (FLOAT8UZ, FLOAT8, "v_cache must be float8_e4m3fn, as kv_dtype says, .* got .*fnuz"),
    ],
)
def test_what_bytes_cannot_be(device, stored, kv_dtype, message):
    """The keys come as bytes; the values too where no type is said, else typed."""
    problem = make(FLOAT32, [40], heads=(4, 2), kv_dtype=stored, scales="scalar")
    names = ("k_cache",) if stored != FLOAT8 else ("k_cache", "v_cache")
    moved = on(as_bytes(problem, *names), device)
    before = [cache.numpy() for cache in (moved.k_cache, moved.v_cache)]
    with pytest.raises(ValueError, match=message):
        moved.call(ops.paged_attention, kv_dtype=kv_dtype)
    key, slots = up(np.ones((1, 2, 64), np.float32), device), up(np.zeros(1, np.int64), device)
    with pytest.raises(ValueError, match=message):
        ops.write_kv(
            *(key, key, moved.k_cache, moved.v_cache, slots),
            k_scale=1.0, v_scale=1.0, kv_dtype=kv_dtype,
        )  # fmt: skip
    for cache, was in zip((moved.k_cache, moved.v_cache), before, strict=True):
        np.testing.assert_array_equal(bits(cache.numpy()), bits(was))


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
