"""Writes, merges, copies and table updates on a device against the oracle: bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from device_cases import up
from ops_cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32
from rocmforge import hip, ops, reference
from rocmforge.hip import _ops as hip_ops

EIGHT_BIT = [np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, np.int8)]


def same(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def write(device, key, value, k, v, slots, **kwargs):
    """Write on the device and by the oracle; compare caches and scales."""
    moved = {name: up(x, device) for name, x in kwargs.items()}
    arrays = [None if a is None else up(a, device) for a in (key, value, k, v, slots)]
    ops.write_kv(*arrays, **moved)
    host = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in kwargs.items()}
    k, v = k.copy(), None if v is None else v.copy()
    slots = (
        np.where(slots < k.shape[0] * k.shape[2], slots, -1) if "layout" not in kwargs else slots
    )
    reference.write_kv(key, value, k, v, slots, **host)
    same(arrays[2].numpy(), k)
    if v is not None:
        same(arrays[3].numpy(), v)
    for name in ("k_scale", "v_scale"):
        if isinstance(host.get(name), np.ndarray):
            np.testing.assert_array_equal(moved[name].numpy(), host[name])


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "v_head_dim"), [(2, 64, 64), (3, 8, 24), (1, 576, 8)]
)
def test_write(device, rng, dtype, heads, head_dim, v_head_dim, layout):
    key = rng.standard_normal((37, heads, head_dim)).astype(dtype)
    value = rng.standard_normal((37, heads, v_head_dim)).astype(dtype)
    inner = (heads, 16) if layout == "HND" else (16, heads)
    k, v = (np.ones((4, *inner, n), dtype) for n in (head_dim, v_head_dim))
    slots = rng.permutation(64)[:37].astype(np.int64)
    slots[5] = slots[9] = -1
    write(device, key, value, k, v, slots, layout=layout)


def test_write_skips_slots_past_the_pool(device, rng):
    key = rng.standard_normal((3, 2, 64)).astype(FLOAT16)
    k = np.zeros((2, 2, 16, 64), FLOAT16)
    write(device, key, key, k, k.copy(), np.array([32, 5, 2**40], np.int64))


def test_write_to_a_latent_cache(device, rng):
    key = rng.standard_normal((9, 1, 576)).astype(BFLOAT16)
    write(device, key, None, np.zeros((2, 1, 16, 576), BFLOAT16), None, np.arange(9))


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("k_form", "v_form"),
    [(form, form) for form in ("float", "heads", "pool")]
    + [("pool", "float"), ("heads", "pool"), ("float", "heads")],
)
def test_quantising_write(device, rng, dtype, source, k_form, v_form):
    key, value = rng.standard_normal((2, 40, 2, 72), np.float32) * 3
    key[3, 0, 5], key[4], key[5, 1, 0], key[6] = np.nan, 0, np.inf, 1e-40
    key[7, 0, 0], key[8, 0, 1] = -np.inf, 1e30
    k = np.zeros((6, 2, 16, 72), dtype)
    slots = rng.permutation(96)[:40].astype(np.int64)
    slots[0] = -1
    scales = {
        "float": (0.013, 0.021),
        "heads": (np.array([0.01, 0.03], np.float32), np.array([0.02, 0.05], np.float32)),
        "pool": (np.full((6, 2, 16), 7, np.float32), np.full((6, 2, 16), 7, np.float32)),
    }
    with np.errstate(over="ignore"):
        key, value = key.astype(source), value.astype(source)
    write(
        *(device, key, value, k, k.copy(), slots),
        k_scale=scales[k_form][0],
        v_scale=scales[v_form][1],
    )


@pytest.mark.parametrize("dtype", EIGHT_BIT[:2], ids=str)
def test_every_float16_is_quantised_as_the_oracle_does(device, dtype):
    """All 65,536 of them; scale 1."""
    key = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 1, 64)
    k = np.zeros((64, 1, 16, 64), dtype)
    write(device, key, None, k, None, np.arange(1024), k_scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 72, 256])
def test_merge(device, rng, dtype, head_dim):
    a, b = rng.standard_normal((2, 11, 3, head_dim)).astype(dtype)
    la, lb = rng.standard_normal((2, 11, 3), np.float32) * 10
    la[2], lb[3], la[4], lb[4] = -np.inf, -np.inf, -np.inf, -np.inf
    a[2], b[3] = np.nan, np.nan
    out, lse = ops.merge_states(*(up(x, device) for x in (a, la, b, lb)))
    want, want_lse = reference.merge_states(a, la, b, lb)
    tolerance = {FLOAT32: 2e-6, FLOAT16: 2.0**-10, BFLOAT16: 2.0**-7}[dtype]
    np.testing.assert_allclose(out.numpy().astype(float), want, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse.numpy(), want_lse, atol=2e-6, rtol=2e-6)
    in_place, lse_in_place = (up(x, device) for x in (a, la))
    ops.merge_states(
        in_place, lse_in_place, up(b, device), up(lb, device), out=in_place, lse=lse_in_place
    )
    same(in_place.numpy(), out.numpy())
    same(lse_in_place.numpy(), lse.numpy())


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5, 200])
def test_copy_blocks(device, rng, count, on_host):
    """More pairs and more pools than one launch takes."""
    pools = [
        rng.integers(0, 255, (420, *shape)).astype(np.uint8)
        for shape in [(2, 3, 16)] * 25 + [(7,), (1, 5, 3), (4, 32)]
    ]
    order = rng.permutation(420).astype(np.int32)
    pairs = np.stack([order[:count], order[200 : 200 + count]], axis=1)
    moved = [up(pool, device) for pool in pools]
    ops.copy_blocks(moved, pairs if on_host else up(pairs, device))
    reference.copy_blocks(pools, pairs)
    for got, want in zip(moved, pools, strict=True):
        same(got.numpy(), want)


def test_copies_on_the_device_that_are_out_of_range_are_skipped(device, rng):
    pool = rng.integers(0, 255, (8, 32)).astype(np.uint8)
    moved = up(pool, device)
    pairs = np.array([[0, 1], [2, 99], [-1, 3], [4, 5]], np.int32)
    ops.copy_blocks(moved, up(pairs, device))
    reference.copy_blocks(pool, pairs[[0, 3]])
    same(moved.numpy(), pool)
    with pytest.raises(ValueError, match="copies must name blocks"):
        ops.copy_blocks(moved, pairs)


@pytest.mark.parametrize("on_host", [True, False])
def test_gather_and_scatter(device, rng, on_host):
    fused = rng.integers(0, 255, (300, 2, 2, 5, 24)).astype(np.uint8)
    plain = rng.standard_normal((300, 3, 4, 8)).astype(np.float32)
    ids = rng.permutation(300)[:210].astype(np.int32)
    moved_fused, moved_plain = up(fused, device), up(plain, device)
    caches = [moved_fused[:, 0, :, :, :16], moved_plain, moved_fused[:, 1, :, :, 3:10]]
    host = [fused[:, 0, :, :, :16], plain, fused[:, 1, :, :, 3:10]]
    rows = ops.gather_blocks(caches, ids if on_host else up(ids, device))
    same(rows.numpy(), reference.gather_blocks(host, ids))
    to = rng.permutation(300)[:210].astype(np.int32)
    ops.scatter_blocks(caches, to if on_host else up(to, device), rows)
    reference.scatter_blocks(host, to, rows.numpy())
    same(moved_fused.numpy(), fused)
    same(moved_plain.numpy(), plain)


def test_table_updates(device, rng):
    table = rng.integers(0, 99, (50, 40)).astype(np.int32)
    moved = up(table, device)
    cells = rng.permutation(2000)[:700]
    row, column = (x.astype(np.int32) for x in np.divmod(cells, 40))
    value = rng.integers(0, 99, 700).astype(np.int32)
    hip_ops.update_table(moved, row, column, value)
    table[row, column] = value
    same(moved.numpy(), table)
    with pytest.raises(ValueError, match=r"column must have shape \[n\] with 700 entries"):
        hip_ops.update_table(moved, row, column[:3], value)


def test_arrays(device, rng):
    host = rng.standard_normal((4, 6, 8)).astype(np.float32)
    array = hip.from_numpy(host, device)
    same(array.numpy(), host)
    same(array[1:3, ::2].numpy(), np.ascontiguousarray(host[1:3, ::2]))
    same(array[..., 2, 3].numpy(), np.ascontiguousarray(host[..., 2, 3]))
    assert array[1, 2, 3].numpy() == host[1, 2, 3]
    same(array.reshape(8, 24).numpy(), host.reshape(8, 24))
    assert array.shape == (4, 6, 8)
    assert len(array) == 4
    assert not hip.zeros(10, np.int32, device).numpy().any()
    with pytest.raises(TypeError, match="integers, slices"):
        array[np.array([1])]
    with pytest.raises(ValueError, match="copy_from"):
        array.copy_from(host[:2])
    with pytest.raises(TypeError, match="made by empty"):
        hip.DeviceArray()
