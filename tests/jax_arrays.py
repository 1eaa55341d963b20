"""Arrays of JAX through the operations; a process of its own, for its threads and its warnings.

Each check prints its name when it has passed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rocmforge import KVCache, copy_blocks, merge_states, paged_attention, write_kv

WIDE = (np.float32, np.float16, ml_dtypes.bfloat16)
EIGHT_BIT = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, np.int8)
RNG = np.random.default_rng(8)
TABLE = np.array([[3, 1, -1], [0, 2, 4]], np.int32)
LENS = np.array([11, 19], np.int32)
CU = np.array([0, 1, 4], np.int32)


def random(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    scale = 20 if dtype is np.int8 else 1
    return (scale * RNG.standard_normal(shape, np.float32)).astype(dtype)


def as_jax(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def attention_inputs(dtype: type, kv_dtype: type) -> dict[str, np.ndarray]:
    inputs = {
        "query": random((4, 4, 32), dtype),
        "k_cache": random((5, 2, 8, 32), kv_dtype),
        "v_cache": random((5, 2, 8, 24), kv_dtype),
        "block_table": TABLE, "seq_lens": LENS, "cu_seqlens_q": CU,
        "rows": np.array([1, 0], np.int32),
        "sinks": random((4,), np.float32), "alibi_slopes": random((4,), np.float32),
        "mask": np.tril(np.ones((4, 3), bool)),
    }  # fmt: skip
    if kv_dtype not in WIDE:
        inputs["k_scale"] = np.array([0.5, 0.25], np.float32)
        inputs["v_scale"] = np.abs(random((5, 2, 8), np.float32)) + 0.1
    inputs["seq_lens"] = LENS[inputs["rows"]]
    return inputs


def same_bits(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == expected.dtype
    assert ours.tobytes() == expected.tobytes()


def check_attention_reads_arrays_of_jax() -> None:
    for dtype in WIDE:
        for kv_dtype in (dtype, *EIGHT_BIT):
            inputs = attention_inputs(dtype, kv_dtype)
            expected = paged_attention(**inputs, return_lse=True)
            for ours, array in zip(
                paged_attention(**as_jax(inputs), return_lse=True), expected, strict=True
            ):
                same_bits(ours, array)


def check_results_go_back_to_jax() -> None:
    for dtype in WIDE:
        out = paged_attention(**as_jax(attention_inputs(dtype, dtype)))
        back = jnp.asarray(out)
        assert back.dtype == dtype
        same_bits(np.asarray(back), out)


def check_values_computed_by_jax_are_waited_for() -> None:
    inputs = attention_inputs(np.float32, np.float32)
    base = jnp.asarray(RNG.standard_normal((1024, 1024), np.float32))
    for _ in range(5):  # a query that is still being computed when it is handed over
        product = base @ base @ base @ base
        query = product[:4, :128].reshape(4, 4, 32)
        late = paged_attention(**{**inputs, "query": query})
        same_bits(late, paged_attention(**{**inputs, "query": np.asarray(query)}))


def check_writes_take_keys_of_jax() -> None:
    slots = np.array([9, -1, 30, 17], np.int64)
    for dtype in WIDE:
        for kv_dtype in (dtype, *EIGHT_BIT):
            key, value = random((4, 2, 32), dtype), random((4, 2, 24), dtype)
            scales = {} if kv_dtype is dtype else {"k_scale": 0.5, "v_scale": 0.25}
            pools = [
                [np.zeros((5, 2, 8, 32), kv_dtype), np.zeros((5, 2, 8, 24), kv_dtype)]
                for _ in range(2)
            ]
            write_kv(key, value, *pools[0], slots, **scales)
            with jax.enable_x64(True):
                arrays = jnp.asarray(key), jnp.asarray(value), jnp.asarray(slots)
            assert arrays[2].dtype == np.int64
            write_kv(*arrays[:2], *pools[1], arrays[2], **scales)
            for ours, expected in zip(pools[1], pools[0], strict=True):
                same_bits(ours, expected)


def check_a_cache_takes_arrays_of_jax() -> None:
    results = []
    for wrap in (np.asarray, jnp.asarray):
        rng = np.random.default_rng(1)
        cache = KVCache(1, 8, 2, 32, dtype="bfloat16", device="cpu")
        cache.add_sequence(5)
        batch = cache.append([5], 20)
        key, value = rng.standard_normal((2, 20, 2, 32)).astype(ml_dtypes.bfloat16)
        cache.write(0, wrap(key), wrap(value), batch)
        query = rng.standard_normal((20, 4, 32)).astype(ml_dtypes.bfloat16)
        results.append(cache.attend(0, wrap(query), batch))
    same_bits(*results)


def refused(call: Callable[[], object], name: str, array: jax.Array) -> None:
    before = np.asarray(array).tobytes()
    message = (
        f"^{name} must be writable, got a read-only array of another library .JAX's always are"
    )
    with pytest.raises(ValueError, match=message):
        call()
    assert np.asarray(array).tobytes() == before


def check_arrays_of_jax_are_never_written_to() -> None:
    inputs = attention_inputs(np.float32, np.float32)
    out = jnp.zeros((4, 4, 24))
    refused(lambda: paged_attention(**inputs, out=out), "out", out)
    pool, other = jnp.zeros((5, 2, 8, 32)), np.zeros((5, 2, 8, 32), np.float32)
    key, slots = random((2, 2, 32), np.float32), np.array([0, 1])
    refused(lambda: write_kv(key, key, pool, other, slots), "k_cache", pool)
    refused(lambda: write_kv(key, key, other, pool, slots), "v_cache", pool)
    assert not other.any()
    one, lse = random((2, 2, 32), np.float32), random((2, 2), np.float32)
    place = jnp.zeros((2, 2, 32))
    refused(lambda: merge_states(one, lse, one, lse, out=place), "out", place)
    copies = np.array([[0, 1]], np.int32)
    refused(lambda: copy_blocks([other, pool], copies), r"caches\[1\]", pool)


def check_merging_takes_arrays_of_jax() -> None:
    for dtype in WIDE:
        lse_a, lse_b = random((3, 2), np.float32), random((3, 2), np.float32)
        out_a, out_b = random((3, 2, 16), dtype), random((3, 2, 16), dtype)
        parts = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
        for ours, expected in zip(
            merge_states(**as_jax(parts)), merge_states(**parts), strict=True
        ):
            same_bits(ours, expected)


def main() -> None:
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)


if __name__ == "__main__":
    main()
