"""KVCache: what is written is attended to, for every kind of cache, against dense attention."""

import numpy as np
import pytest

from ops_cases import (
    BFLOAT16,
    DTYPES,
    EIGHT_BIT,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    INT8,
    assert_close,
    assert_lse_close,
    bits,
)
from rocmforge import KVCache, LayerGroup, ops, reference
from rocmforge.errors import DeviceError, InvalidBlockError
from rocmforge.ops import calibrate


class Model:
    """Random keys and values of some layers, and for each sequence all that it was given."""

    def __init__(self, cache, new_dtype=None, seed=0):
        self.cache = cache
        self.rng = np.random.default_rng(seed)
        self.new_dtype = new_dtype
        self.tokens = {}  # sequence -> for each layer (keys, values)

    def shape(self, layer):
        return self.cache._shapes[self.cache._layers[layer].group]

    def random(self, *shape, layer):
        dtype = self.new_dtype or self.shape(layer).dtype
        return self.rng.standard_normal(shape, np.float32).astype(dtype)

    def add(self, sequence, parent=None):
        if parent is None:
            self.cache.add_sequence(sequence)
            self.tokens[sequence] = [([], []) for _ in range(self.cache.num_layers)]
        else:
            self.cache.fork(parent, sequence)
            self.tokens[sequence] = [(list(k), list(v)) for k, v in self.tokens[parent]]

    def step(self, counts, num_heads=4, **options):
        """Append so many tokens to each sequence, write and attend in all layers, and compare."""
        cache = self.cache
        batch = cache.append(list(counts), list(counts.values()))
        # the parts that are merged then were rounded, which errs as rounded probabilities may
        rounds = None if options.get("deterministic", True) else True
        for layer in range(cache.num_layers):
            shape = self.shape(layer)
            n = batch.num_tokens
            key = self.random(n, shape.num_kv_heads, shape.head_dim, layer=layer)
            value = None
            if not shape.latent:
                value = self.random(n, shape.num_kv_heads, shape.v_head_dim, layer=layer)
            query = self.random(n, num_heads, shape.head_dim, layer=layer)
            start = 0
            for sequence, count in counts.items():
                keys, values = self.tokens[sequence][layer]
                keys.extend(key[start : start + count])
                values.extend(() if value is None else value[start : start + count])
                start += count
            cache.write(layer, key, value, batch)
            want, want_lse, bound = self.expected(layer, query, counts, **options)
            got, lse = cache.attend(layer, query, batch, return_lse=True, **options)
            assert_close(got, want, bound, rounds=rounds)
            assert_lse_close(lse, want_lse)
        assert batch.committed
        return batch

    def expected(self, layer, query, counts, *, deterministic=True, mask=None, **options):
        """Each sequence alone, in one block that is as long as it is."""
        shape, scales = self.shape(layer), self.cache.scales(layer)
        parts, start = [], 0
        if shape.latent:
            options.setdefault("scale", 1.0)
        for sequence, count in counts.items():
            keys, values = (np.array(x) for x in self.tokens[sequence][layer])
            length = len(keys)
            caches, factors = [], []
            for new, scale in zip((keys, values), scales, strict=True):
                if not len(new):
                    continue
                pool = np.zeros((1, *new.swapaxes(0, 1).shape), shape.dtype)
                if isinstance(scale, np.ndarray) and scale.ndim == 3:
                    scale = np.zeros(pool.shape[:3], np.float32)
                reference.write_kv(new, None, pool, None, np.arange(length), k_scale=scale)
                caches.append(pool)
                factors.append(scale)
            if shape.latent:
                caches.append(caches[0][..., : shape.v_head_dim])
                factors.append(factors[0])
            rows = slice(start, start + count)
            arguments = (
                query[rows],
                *caches,
                np.zeros((1, 1), np.int32),
                np.array([length], np.int32),
                np.array([0, count], np.int32),
            )
            kwargs = {
                "window_size": (-1 if shape.window is None else shape.window - 1, -1),
                "k_scale": factors[0],
                "v_scale": factors[1],
                "mask": None if mask is None else mask[rows],
                **options,
            }
            out, lse = reference.paged_attention(*arguments, return_lse=True, **kwargs)
            bound = np.zeros_like(out)
            if query.dtype == BFLOAT16:
                positive = (*arguments[:2], np.abs(caches[1].astype(np.float32)), *arguments[3:])
                bound = 2.0**-8 * reference.paged_attention(*positive, **kwargs)
            parts.append((out, lse, bound))
            start += count
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


def run(cache, new_dtype=None, **options):
    """Prefill, decode, fork, copy-on-write and chunks."""
    model = Model(cache, new_dtype)
    model.add(1)
    model.add(2)
    model.step({1: 13, 2: 5}, **options)
    model.add(3, parent=1)
    model.step({3: 1, 1: 2, 2: 1}, **options)
    model.add(4, parent=3)
    model.step({4: 20, 3: 1}, **options)
    model.step({1: 1, 2: 1, 3: 1, 4: 1}, **options)
    cache.check_integrity()


ONE = {"num_layers": 2, "num_blocks": 40, "num_kv_heads": 2, "head_dim": 16, "block_size": 4}


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [*DTYPES, *EIGHT_BIT], ids=str)
def test_types(dtype, layout):
    cache = KVCache(**ONE, dtype=dtype, layout=layout, v_head_dim=24)
    assert cache.dtype == dtype
    for new_dtype in DTYPES if dtype in EIGHT_BIT else [None]:
        run(KVCache(**ONE, dtype=dtype, layout=layout, v_head_dim=24), new_dtype)


@pytest.mark.parametrize("kernel_block_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FLOAT32, INT8], ids=str)
def test_kernel_blocks(kernel_block_size, dtype):
    cache = KVCache(**ONE, dtype=dtype, kernel_block_size=kernel_block_size)
    assert cache.k_cache(0).shape == (40 * 4 // kernel_block_size, 2, kernel_block_size, 16)
    run(cache, FLOAT32)
    for _, pool, _ in cache._pools():
        assert len(pool) == 40


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT8], ids=str)
def test_latent(dtype):
    one = ONE | {"num_kv_heads": 1, "head_dim": 48}
    cache = KVCache(**one, dtype=dtype, latent_dim=32)
    assert (cache.v_head_dim, cache.latent_dim) == (32, 32)
    assert np.shares_memory(cache.v_cache(0), cache.k_cache(0))
    assert cache.block_nbytes == 2 * 4 * (48 * dtype.itemsize + (4 if dtype == FLOAT8 else 0))
    new_dtype = BFLOAT16 if dtype == FLOAT8 else None
    run(cache, new_dtype, scale=0.2)
    model = Model(cache, new_dtype)
    model.add(9)
    with pytest.raises(ValueError, match="scale must be given"):
        model.step({9: 1})


def test_features():
    slopes = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    sinks = np.array([1, -1, 0, 2], np.float32)
    run(KVCache(**ONE, dtype="float32"), softcap=3.0, alibi_slopes=slopes, sinks=sinks, scale=0.5)
    model = Model(KVCache(**ONE, dtype="float16"))
    model.add(1)
    model.step({1: 9})
    mask = np.tri(4, dtype=np.uint8)
    mask[3, 1] = 0
    model.step({1: 4}, mask=mask)


GROUPS = [
    LayerGroup(40, layers=[0, 3], num_kv_heads=1, head_dim=32),
    LayerGroup(20, window=6, layers=(1, 2), v_head_dim=8),
    LayerGroup(40, layers=range(4, 5), num_kv_heads=4, latent_dim=16, dtype="int8"),
]


def test_layer_groups():
    cache = KVCache(5, num_kv_heads=2, head_dim=16, block_size=4, dtype="float32", groups=GROUPS)
    assert [cache.k_cache(i).shape for i in range(5)] == [
        (40, 1, 4, 32), (20, 2, 4, 16), (20, 2, 4, 16), (40, 1, 4, 32), (40, 4, 4, 16)
    ]  # fmt: skip
    assert cache.v_cache(1).shape == (20, 2, 4, 8)
    assert {(name, group) for name, _, group in cache._pools()} == {
        ("layer0.key", 0), ("layer0.value", 0), ("layer3.key", 0), ("layer3.value", 0),
        ("layer1.key", 1), ("layer1.value", 1), ("layer2.key", 1), ("layer2.value", 1),
        ("layer4.key", 2), ("layer4.key_scale", 2),
    }  # fmt: skip
    model = Model(cache, FLOAT32)
    model.add(1)
    model.add(2)
    model.step({1: 13, 2: 5}, scale=0.4)
    model.add(3, parent=1)
    for _ in range(20):
        model.step({3: 1, 1: 2, 2: 1}, scale=0.4)
    assert cache.groups[1].num_free_blocks > 5  # the window has passed most of 53 tokens
    cache.check_integrity()


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_scales_by_head(dtype):
    cache = KVCache(**ONE, dtype=dtype, scales="head")
    assert cache.scales(0) == (None, None)
    assert {name for name, _, _ in cache._pools()} == {
        "layer0.key", "layer0.value", "layer1.key", "layer1.value"
    }  # fmt: skip
    model = Model(cache, BFLOAT16)
    model.add(1)
    with pytest.raises(ValueError, match=f"k_scale must be given for a cache of {dtype.name}"):
        model.step({1: 3})
    cache.free(1)
    model.add(1)
    key, value = (model.random(50, 2, 16, layer=0) for _ in range(2))
    cache.calibrate(0, key, value)
    for scale, want in zip(cache.scales(0), calibrate(key, value, dtype), strict=True):
        np.testing.assert_array_equal(scale, want)
    cache.set_scales(1, 0.03, [0.02, 0.04])
    assert cache.scales(1)[0] == np.float32(0.03)
    model.step({1: 13})
    model.step({1: 1})
    with pytest.raises(ValueError, match="layer 1 was written to with those that it has"):
        cache.set_scales(1, 1.0, 1.0)


def test_scales_that_are_given():
    scales = [(0.5, [0.25, 0.5]), (1, 2)]
    cache = KVCache(**ONE, dtype="float8_e4m3fn", scales=scales)
    np.testing.assert_array_equal(cache.scales(0)[1], np.float32([0.25, 0.5]))
    assert cache.scales(1) == (1.0, 2.0)
    run(cache, FLOAT32)
    partly = KVCache(**ONE, dtype="int8", scales=[None, (1, 2)])
    assert partly.scales(0) == (None, None)


def test_scales_by_token_are_written():
    cache = KVCache(**ONE, dtype="int8")
    k_scale, v_scale = cache.scales(1)
    assert k_scale.shape == v_scale.shape == (40, 2, 4)
    assert not k_scale.any()
    run(cache, FLOAT16)
    assert k_scale.any()


@pytest.mark.parametrize(
    ("arguments", "change", "error", "message"),
    [
        ({}, (0, 1.0, 1.0), ValueError, 'layer 0 has none that can be set; see scales="head"'),
        ({"scales": "head"}, (0, -1.0, 1.0), ValueError, "k_scale: expected positive"),
        ({"scales": "head"}, (0, 1.0, np.inf), ValueError, "v_scale: expected positive"),
        ({"scales": "head"}, (0, 1.0, [1, 2, 3]), ValueError, "v_scale: expected a number or 2 of"),
        ({"scales": "head"}, (0, 1.0), ValueError, "v_scale: expected a scale, got None"),
        ({"scales": "head"}, (2, 1.0, 1.0), ValueError, r"layer: expected 0 \.\. 1, got 2"),
        (
            {"scales": "head", "latent_dim": 8},
            (0, 1.0, 1.0),
            ValueError,
            "v_scale: expected None, got 1.0",
        ),
    ],
)
def test_set_scales_rejects(arguments, change, error, message):
    cache = KVCache(**ONE, dtype="int8", **arguments)
    before = cache.scales(0)
    with pytest.raises(error, match=message):
        cache.set_scales(*change)
    for scale, expected in zip(cache.scales(0), before, strict=True):
        assert scale is expected


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers: expected 1 or more, got 0"),
        ({"num_layers": True}, TypeError, "num_layers: expected an integer, got bool"),
        ({"num_blocks": None}, ValueError, "num_blocks: expected either num_blocks or groups"),
        ({"groups": [LayerGroup(3)]}, ValueError, "num_blocks: expected either num_blocks or grou"),
        ({"num_kv_heads": None}, TypeError, "num_kv_heads: expected an integer, got NoneType"),
        ({"head_dim": 12}, ValueError, r"head_dim: expected 8 \.\. 576 in steps of 8, got 12"),
        ({"head_dim": 584}, ValueError, r"head_dim: expected 8 \.\. 576 in steps of 8, got 584"),
        ({"v_head_dim": 4}, ValueError, r"v_head_dim: expected 8 \.\. 576 in steps of 8, got 4"),
        ({"latent_dim": 24}, ValueError, "latent_dim: expected at most the head_dim, 16, got 24"),
        (
            {"latent_dim": 8, "v_head_dim": 16},
            ValueError,
            "v_head_dim: expected None or the latent_dim, 8, got 16",
        ),
        ({"dtype": "float64"}, ValueError, "dtype must be one of .* got float64"),
        ({"layout": "DHN"}, ValueError, 'layout: expected "HND" or "NHD", got \'DHN\''),
        ({"device": "cuda:7"}, DeviceError, "device: expected"),
        ({"device": "hip:7"}, DeviceError, "(?i)hip"),  # not there, or no HIP at all
        ({"device": "cpu", "stream": 1}, ValueError, "stream: expected None"),
        ({"scales": "token"}, ValueError, "scales: expected None for bfloat16"),
        ({"scales": "heads", "dtype": "int8"}, ValueError, 'scales: expected "token", "head"'),
        ({"scales": 1.0, "dtype": "int8"}, TypeError, "scales: expected a str or a sequence"),
        ({"scales": [(1, 1)], "dtype": "int8"}, ValueError, "a pair for each of 2 layers, got 1"),
        ({"scales": [1, 1], "dtype": "int8"}, ValueError, r"scales\[0\]: expected a pair"),
        ({"kernel_block_size": 3}, ValueError, "kernel_block_size: expected a divisor"),
    ],
)
def test_constructor_rejects(change, error, message):
    with pytest.raises(error, match=message):
        KVCache(**ONE | change)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([LayerGroup(3)], r"groups\[0\].layers: expected the indices of its layers, got None"),
        ([LayerGroup(3, layers=[0])], "groups: layer 1 is in none of them"),
        ([LayerGroup(3, layers=[0, 2])], r"groups\[0\].layers: expected 0 \.\. 1, got 2"),
        ([LayerGroup(3, layers=[0, -1])], r"groups\[0\].layers: expected 0 or more, got -1"),
        (
            [LayerGroup(3, layers=[0]), LayerGroup(3, layers=[1, 0])],
            r"groups\[1\].layers: layer 0 is in groups\[0\] already",
        ),
        ([LayerGroup(3, layers=[0, 1], head_dim=9)], r"groups\[0\].head_dim: expected 8 \.\. 576"),
        ([], "groups: expected 1"),
    ],
)
def test_groups_rejects(groups, message):
    with pytest.raises(ValueError, match=message):
        KVCache(2, num_kv_heads=2, head_dim=16, groups=groups)


def test_layers_that_do_not_exist():
    cache = KVCache(**ONE)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"layer: expected 0 \.\. 1, got {layer}"):
            cache.k_cache(layer)
    for layer in (True, "0", 1.0):
        with pytest.raises(TypeError, match="layer: expected an integer, got "):
            cache.v_cache(layer)
    assert cache.k_cache(np.int64(1)) is cache.k_cache(1)
    with pytest.raises(InvalidBlockError):
        cache.block_data(0, 40)


def test_pools_begin_with_a_cache_line():
    cache = KVCache(**ONE, dtype="int8")
    assert all(pool.ctypes.data % 64 == 0 for _, pool, _ in cache._pools())
    assert cache.nbytes == sum(pool.nbytes for _, pool, _ in cache._pools())
    assert cache.nbytes == 40 * cache.block_nbytes
    assert not any(pool.any() for _, pool, _ in cache._pools())


# ---------------------------------------------------------------- a common prefix


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT8], ids=str)
def test_common_prefix(dtype, prefixes):
    """Six sequences from one prompt: read once if that is allowed, with the same result."""
    model = Model(
        KVCache(**ONE | {"num_blocks": 300}, dtype=dtype), BFLOAT16 if dtype == FLOAT8 else None
    )
    model.add(0)
    model.step({0: 301})
    for i in range(1, 6):
        model.add(i, parent=0)
    sinks = np.array([1, -1, 0, 2], np.float32)
    options = {"softcap": 4.0, "sinks": sinks}
    model.step(dict.fromkeys(range(6), 1), **options)
    assert not prefixes
    model.step(dict.fromkeys(range(6), 1), deterministic=False, **options)
    model.step({i: i + 1 for i in range(6)}, deterministic=False, **options)
    assert prefixes == [75] * 4  # 300 tokens in 75 blocks, twice in two layers
    slopes = np.ones(4, np.float32)
    model.step(dict.fromkeys(range(6), 1), deterministic=False, alibi_slopes=slopes)
    model.step({0: 1}, deterministic=False)
    assert len(prefixes) == 4


@pytest.mark.parametrize("full", [(), (0,), (1,), (0, 1)], ids=str)
def test_a_common_prefix_leaves_out_windows(prefixes, full):
    """Whichever layers have one, and whatever the order of their groups."""
    groups = [
        LayerGroup(300, window=None if layer in full else 300, layers=[layer]) for layer in (0, 1)
    ]
    model = Model(
        KVCache(2, num_kv_heads=2, head_dim=16, block_size=4, dtype="float32", groups=groups)
    )
    model.add(0)
    model.step({0: 301})
    for i in range(1, 6):
        model.add(i, parent=0)
    model.step(dict.fromkeys(range(6), 1), deterministic=False)
    assert prefixes == [75] * len(full)


def test_out_and_bits_by_default(prefixes):
    """A sequence's result is the same bits, alone and in a batch with a common prefix."""
    cache = KVCache(**ONE | {"num_blocks": 300}, dtype="float32")
    model = Model(cache)
    model.add(0)
    model.step({0: 301})
    for i in range(1, 5):
        model.add(i, parent=0)
    batch = cache.append(range(5), 1)
    query = np.repeat(model.random(1, 4, 16, layer=0), 5, axis=0)
    key = np.repeat(model.random(1, 2, 16, layer=0), 5, axis=0)
    for layer in range(2):
        cache.write(layer, key, key, batch)
    out = np.empty_like(query)
    assert cache.attend(0, query, batch, out) is out
    for row in out[1:]:
        np.testing.assert_array_equal(bits(row), bits(out[0]))
    alone = cache.attend(0, query, batch)
    np.testing.assert_array_equal(bits(alone), bits(out))
    assert not prefixes
    result = cache.attend(0, query, batch, out, deterministic=False)
    assert result is out
    assert prefixes == [75]
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-6)


def test_the_layer_that_is_written_last_sees_its_whole_window():
    """Its write commits the batch, and the window gives up blocks that earlier queries see."""
    rng = np.random.default_rng(0)
    key, value, query = rng.standard_normal((3, 60, 2, 8), np.float32)
    results = []
    for window in (6, None):
        cache = KVCache(
            num_layers=1,
            num_kv_heads=2,
            head_dim=8,
            dtype="float32",
            block_size=4,
            device="cpu",
            groups=[LayerGroup(num_blocks=64, window=window, layers=[0])],
        )
        cache.add_sequence(0)
        batch = cache.append([0], 60)
        cache.write(0, key, value, batch)
        assert batch.committed
        results.append((cache, batch, cache.attend(0, query, batch)))
    cache, batch, _ = results[1]
    want = ops.paged_attention(
        query,
        cache.k_cache(0),
        cache.v_cache(0),
        batch.block_table,
        batch.seq_lens,
        batch.cu_seqlens_q,
        window_size=(5, -1),
    )
    np.testing.assert_array_equal(results[0][2], want)
    cache = results[0][0]
    batch = cache.append([0], 1)
    assert (batch.block_table[0, :12] == -1).all()  # hidden with the next batch
    cache.check_integrity()
