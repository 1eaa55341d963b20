"""The plugin for vLLM: when it registers, and its attention beside the float64 oracle.

With vLLM where it is installed, else with just enough of its names for our classes to be made.
"""

import enum
import importlib
import os
import sys
import threading
import types
import warnings
from importlib.metadata import entry_points, version

import numpy as np
import pytest

from ops_cases import BFLOAT16, FLOAT16, FLOAT32, ROUNDING, assert_close
from rocmforge import ops, reference
from rocmforge.integrations import vllm as plugin

SWITCHES = ("ROCMFORGE_VLLM", "VLLM_PLUGINS")


# ---- registration


class Registry:
    """Stands for vLLM as far as `register` looks at it."""

    def __init__(self, monkeypatch, version="0.32.0", cpu=True):
        self.registered = []
        names = enum.Enum("AttentionBackendEnum", ["CPU_ATTN", "CUSTOM"])
        registry = types.SimpleNamespace(
            AttentionBackendEnum=names,
            register_backend=lambda name, path: self.registered.append((name.name, path)),
        )
        platform = types.SimpleNamespace(is_cpu=lambda: cpu)
        modules = {
            "vllm": types.SimpleNamespace(__version__=version),
            "vllm.platforms": types.SimpleNamespace(current_platform=platform),
            "vllm.v1": types.SimpleNamespace(),
            "vllm.v1.attention": types.SimpleNamespace(),
            "vllm.v1.attention.backends": types.SimpleNamespace(),
            "vllm.v1.attention.backends.registry": registry,
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def no_switch(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"ROCMFORGE_VLLM": ""}, False),
        ({"ROCMFORGE_VLLM": "0"}, False),
        ({"ROCMFORGE_VLLM": "1"}, True),
        ({"VLLM_PLUGINS": "lora_filesystem_resolver"}, False),
        ({"VLLM_PLUGINS": "lora_filesystem_resolver,rocmforge"}, True),
        ({"VLLM_PLUGINS": "rocmforge", "ROCMFORGE_VLLM": "0"}, False),
    ],
)
def test_registers_only_when_asked(monkeypatch, environment, wanted):
    vllm = Registry(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert plugin.is_wanted() == wanted
    plugin.register()
    plugin.register()  # vLLM may do so
    path = "rocmforge.integrations.vllm.backend.CPUBackend"
    assert set(vllm.registered) == ({("CPU_ATTN", path)} if wanted else set())


def test_registers_as_custom_elsewhere(monkeypatch):
    vllm = Registry(monkeypatch, cpu=False)
    monkeypatch.setenv("ROCMFORGE_VLLM", "1")
    plugin.register()
    assert vllm.registered == [("CUSTOM", "rocmforge.integrations.vllm.backend.CustomBackend")]


@pytest.mark.parametrize("good", ["0.32.0", "0.32.7", "0.32.1rc2", "0.32.0+cpu", "0.32.0.dev3"])
def test_versions_that_are_supported(monkeypatch, good):
    vllm = Registry(monkeypatch, good)
    monkeypatch.setenv("ROCMFORGE_VLLM", "1")
    plugin.register()
    assert vllm.registered


@pytest.mark.parametrize("bad", ["0.31.9", "0.33.0", "1.0", "0.9.2", "dev", "unknown"])
def test_versions_that_are_not(monkeypatch, bad):
    vllm = Registry(monkeypatch, bad)
    monkeypatch.setenv("ROCMFORGE_VLLM", "1")
    with pytest.raises(ImportError, match=rf"vLLM 0\.32\.0 or newer, below 0\.33\.0, and {bad} is"):
        plugin.register()
    assert not vllm.registered
    monkeypatch.setenv("ROCMFORGE_VLLM", "0")
    plugin.register()  # whoever does not want it is not bothered


def test_vllm_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("ROCMFORGE_VLLM", "1")
    with pytest.raises(ImportError, match=r"cannot be imported .*rocmforge\[vllm\]"):
        plugin.register()


def test_a_switch_that_is_neither(monkeypatch):
    monkeypatch.setenv("ROCMFORGE_VLLM", "yes")
    with pytest.raises(ValueError, match="ROCMFORGE_VLLM must be 0 or 1, got 'yes'"):
        plugin.register()


def test_the_entry_point_is_installed():
    (found,) = {p for p in entry_points(group="vllm.general_plugins") if p.name == "rocmforge"}
    assert found.load() is plugin.register
    assert version("rocmforge")


# ---- attention


def stand_in():
    """Modules with the names of vLLM's that our classes are made from."""
    interface = types.ModuleType("vllm.v1.attention.backend")

    class Base:
        def __class_getitem__(cls, _):
            return cls

        def __init__(self, *_):
            pass

    for name in ("AttentionBackend", "AttentionImpl", "AttentionMetadataBuilder"):
        setattr(interface, name, type(name, (Base,), {}))
    for name in ("AttentionMetadata", "CommonAttentionMetadata"):
        setattr(interface, name, type(name, (), {}))
    interface.MultipleOf = type("MultipleOf", (), {"__init__": lambda self, base: None})
    kinds = {"DECODER": "decoder", "ENCODER_ONLY": "encoder_only"}
    interface.AttentionType = enum.Enum("AttentionType", kinds, type=str)
    layouts = types.ModuleType("vllm.v1.kv_cache_interface")
    names = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
    layouts.KVCacheLayout = enum.Enum("KVCacheLayout", names)
    modules = {"vllm": None, "vllm.v1": None, "vllm.v1.attention": None}
    modules = {name: types.ModuleType(name) for name in modules}
    return modules | {interface.__name__: interface, layouts.__name__: layouts}


@pytest.fixture(scope="module")
def backend():
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module("vllm.v1.attention.backend")
        except ImportError:
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        name = "rocmforge.integrations.vllm.backend"
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name, None)


HEADS, KV_HEADS, DIM = 6, 2, 64

# (layer, block, head, token) from the outermost in memory to the innermost: vLLM's layouts
ORDERS = {
    "LBHNC": (0, 1, 2, 3),
    "LBNHC": (0, 1, 3, 2),
    "BLHNC": (1, 0, 2, 3),
    "LHBNC": (0, 2, 1, 3),
}


class Layer:
    """One layer of three, and the batches that come to it."""

    def __init__(self, backend, dtype="float32", block_size=16, layout="LBHNC", **options):
        import torch

        self.torch, self.backend = torch, backend
        self.dtype, self.block_size = getattr(torch, dtype), block_size
        self.random = np.random.default_rng(1)
        self.kv_type = options.pop("kv_type", self.dtype)
        self._k_scale_float, self._v_scale_float = options.pop("kv_scales", (1.0, 1.0))
        self.impl = backend.Implementation(HEADS, DIM, 0.11, KV_HEADS, **options)
        order = ORDERS[layout]
        shape = np.array([3, 40, KV_HEADS, block_size])
        kept = torch.zeros([*shape[list(order)], 2 * DIM], dtype=self.kv_type)
        self.kv_cache = kept.permute(*np.argsort(order), 4)[1]
        assert self.kv_cache.shape == (40, KV_HEADS, block_size, 2 * DIM)
        self.table = self.random.permutation(40).astype(np.int32).reshape(4, 10)
        self.lens = np.zeros(4, np.int32)

    def step(self, counts, padding=0, **changes):
        """Some new tokens for each sequence: the output, its oracle's, and what is not a result."""
        torch = self.torch
        counts = np.array(counts, np.int32)
        num_tokens = int(counts.sum())
        self.lens += counts
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        slots = []
        for row, n, end in zip(self.table, counts, self.lens, strict=True):
            block, offset = np.divmod(np.arange(end - n, end), self.block_size)
            slots.extend(row[block].astype(np.int64) * self.block_size + offset)
        slots = np.array(slots)
        width = (HEADS + 2 * KV_HEADS) * DIM
        fused = torch.tensor(self.random.standard_normal((num_tokens + padding, width)))
        fused = fused.to(self.dtype)
        parts = fused.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
        query, key, value = (part.view(num_tokens + padding, -1, DIM) for part in parts)
        assert not query.is_contiguous()
        # a batch has its rows of larger arrays
        meta = self.backend.Metadata(
            num_actual_tokens=num_tokens,
            max_query_len=int(counts.max()),
            max_seq_len=self.table.shape[1] * self.block_size,
            query_start_loc=torch.tensor(starts),
            seq_lens=torch.tensor(self.lens.copy()),
            block_table=torch.tensor(self.table),
            slot_mapping=torch.tensor(slots),
            causal=True,
        )
        for name, change in changes.items():
            setattr(meta, name, change)
        out = torch.full((num_tokens + padding, HEADS, DIM), 7.0, dtype=self.dtype)
        self.impl.do_kv_cache_update(self, key, value, self.kv_cache, meta.slot_mapping)
        given = self.impl.forward(self, query, key, value, self.kv_cache, meta, output=out)
        assert given is out
        assert (out[num_tokens:] == 7).all()
        self.written = slots, key[:num_tokens], value[:num_tokens]
        return query[:num_tokens], out[:num_tokens], meta

    def halves(self):
        """Keys and values: a head's, one after the other, where its tokens lie together."""
        if self.kv_cache.stride(2) > 2 * DIM:
            return self.kv_cache.split(DIM, -1)
        whole = self.kv_cache.view(40, KV_HEADS, 2 * self.block_size, DIM)
        return whole.split(self.block_size, 2)

    def expected(self, query, meta, **options):
        """The oracle's output, and how much rounding probabilities may move it."""
        keys, values = (part.float().numpy() for part in self.halves())
        keys, values = keys * self._k_scale_float, values * self._v_scale_float
        rest = (self.table, meta.seq_lens.numpy(), meta.query_start_loc.numpy())
        options = {"scale": 0.11, "causal": meta.causal} | options
        query = query.float().numpy()
        want, _ = reference.paged_attention(query, keys, values, *rest, return_lse=True, **options)
        bound, _ = reference.paged_attention(
            query, keys, np.abs(values), *rest, return_lse=True, **options
        )
        return want, ROUNDING * bound if self.dtype == self.torch.bfloat16 else 0.0

    def check(self, counts, *, meta=None, **options):
        query, out, meta = self.step(counts, **(meta or {}))
        want, bound = self.expected(query, meta, **options)
        dtype = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
        assert_close(out.float().numpy().astype(dtype[str(self.dtype)[6:]]), want, bound)
        return meta


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ragged_batches(backend, dtype, block_size, layout):
    layer = Layer(backend, dtype, block_size, layout)
    layer.check([37, 1, 60, 5])  # prompts, one of them a single token
    layer.check([1, 1, 33, 1])  # a chunk of a prompt between decodes
    layer.check([1, 1, 1, 1], meta={"padding": 3})
    slots, key, value = layer.written
    for at, slot in enumerate(slots):
        block, offset = divmod(slot, block_size)
        keys, values = layer.halves()
        assert (keys[block, :, offset] == key[at]).all()
        assert (values[block, :, offset] == value[at]).all()


def test_features(backend):
    torch = pytest.importorskip("torch")
    slopes = [2.0**-i for i in range(HEADS)]
    layer = Layer(backend, alibi_slopes=slopes, logits_soft_cap=3.0)
    layer.check([30, 70, 1, 16], softcap=3.0, alibi_slopes=np.array(slopes, np.float32))
    layer = Layer(backend, sliding_window=20)
    layer.check([30, 70, 1, 16], window_size=(19, 0))
    layer.check([1, 1, 9, 1], window_size=(19, 0))
    layer.check([1, 9, 1, 1], meta={"causal": False}, window_size=(19, 19))
    sinks = torch.nn.Parameter(torch.linspace(-1, 2, HEADS).bfloat16(), requires_grad=False)
    layer = Layer(backend, "bfloat16", sinks=sinks)
    layer.check([30, 70, 1, 16], sinks=sinks.float().numpy())
    sinks += 1  # weights may be loaded after the layer was made
    layer.check([1, 1, 1, 1], sinks=sinks.float().numpy())
    layer = Layer(backend)
    layer.check([30, 2, 1, 16], meta={"causal": False})


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "uint8"])
def test_a_cache_of_8_bits(backend, stored):
    torch = pytest.importorskip("torch")
    options = {"kv_cache_dtype": "fp8", "kv_scales": (0.013, 0.021)}
    layer = Layer(backend, kv_type=getattr(torch, stored), **options)
    query, out, meta = layer.step([37, 1, 60, 5])
    layer.kv_cache = layer.kv_cache.view(torch.float8_e4m3fn)
    want, _ = layer.expected(query, meta)
    assert_close(out.numpy(), want, 3e-6)
    slots, key, _ = layer.written
    kept = layer.halves()[0][slots // 16, :, slots % 16].float() * 0.013
    assert ((kept - key).abs() <= key.abs() / 16 + 1e-4).all()  # three bits after the first


def test_a_warm_up_touches_nothing(backend):
    torch = pytest.importorskip("torch")
    layer = Layer(backend)
    q, kv = torch.ones(4, HEADS, DIM), torch.ones(4, KV_HEADS, DIM)
    out = torch.full((4, HEADS, DIM), 7.0)
    assert layer.impl.forward(layer, q, kv, kv, torch.tensor([]), None, output=out) is out
    assert (out == 7).all()


def test_the_stream_is_that_of_torch(backend, monkeypatch):
    """And is asked for when a batch comes: here one that arrays in host memory do not take."""
    torch = pytest.importorskip("torch")
    layer = Layer(backend)
    query, out, meta = layer.step([3, 4, 5, 6])
    monkeypatch.setattr(backend, "stream_of", lambda tensor: f"stream of {len(tensor)} tokens")
    with pytest.raises(ValueError, match="stream must be None for arrays in host memory, got str"):
        layer.impl.forward(layer, query, query, query, layer.kv_cache, meta, output=out)
    slots, key, value = layer.written
    with pytest.raises(ValueError, match="stream must be None for arrays in host memory, got str"):
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, torch.tensor(slots))


def test_another_cache_is_noticed(backend):
    layer = Layer(backend)
    layer.check([3, 4, 5, 6])
    layer.kv_cache = layer.kv_cache.clone()
    layer.check([1, 1, 1, 1])


def test_what_is_refused(backend):
    torch = pytest.importorskip("torch")
    make = backend.Implementation
    with pytest.raises(NotImplementedError, match="layer of type 'encoder_only'"):
        make(6, 64, 0.1, 2, attn_type="encoder_only")
    with pytest.raises(NotImplementedError, match=r"kv-cache-dtype must be one of .*got fp8_e5m2"):
        make(6, 64, 0.1, 2, kv_cache_dtype="fp8_e5m2")
    layer = Layer(backend)
    q = torch.ones(1, HEADS, DIM)
    scale = torch.ones(1)
    with pytest.raises(NotImplementedError, match="quantise the output"):
        layer.impl.forward(layer, q, q, q, q, None, output=q, output_scale=scale)
    query, _, meta = layer.step([1, 1, 1, 1])
    meta.seq_lens = meta.seq_lens + 10**6
    out = torch.full_like(query, 7)
    with pytest.raises(ValueError, match="seq_lens must be 0 to"):
        layer.impl.forward(layer, query, query, query, layer.kv_cache, meta, output=out)
    assert (out == 7).all()


def test_the_backend(backend):
    assert backend.CPUBackend.get_name() == "CPU_ATTN"
    assert backend.CustomBackend.get_name() == "CUSTOM"
    for kind in (backend.CPUBackend, backend.CustomBackend):
        assert kind.get_impl_cls() is backend.Implementation
        assert kind.get_builder_cls() is backend.MetadataBuilder
        assert not kind.forward_includes_kv_cache_update
        assert [size for size in (4, 64, 80, 100, 576, 584) if kind.supports_head_size(size)] == [
            *(64, 80, 576)
        ]
        assert kind.supports_sink()
        assert kind.supports_sliding_window()
        assert len(kind.supported_kv_cache_layouts()) == 6


def test_threads_go_where_those_of_torch_are(backend, monkeypatch):
    """vLLM binds the thread that calls us to one processor, and PyTorch's others to others."""
    torch = pytest.importorskip("torch")
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two processors")
    torch.zeros(1 << 20).add_(1)  # PyTorch's threads exist, and are not bound by this test
    before, asked = ops.get_num_threads(), []
    monkeypatch.setattr(ops, "set_num_threads", lambda n, processors: asked.append(processors))
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        os.sched_setaffinity(0, {min(allowed)})
        backend.MetadataBuilder(None, ["layer"], None, torch.device("cpu"))
    finally:
        os.sched_setaffinity(0, allowed)
        done.set()
        other.join()
    assert asked == [allowed]
    assert ops.get_num_threads() == before


def test_the_builder(backend, monkeypatch):
    torch = pytest.importorskip("torch")
    before = ops.get_num_threads()
    try:
        monkeypatch.delenv("ROCMFORGE_NUM_THREADS", raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        builder = backend.MetadataBuilder(None, ["layer"], None, torch.device("cpu"))
        assert ops.get_num_threads() == 3
        monkeypatch.setenv("ROCMFORGE_NUM_THREADS", "2")
        ops.set_num_threads(2)
        backend.MetadataBuilder(None, ["layer"], None, torch.device("cpu"))
        assert ops.get_num_threads() == 2
    finally:
        ops.set_num_threads(before)
    common = types.SimpleNamespace(
        num_actual_tokens=5,
        max_query_len=3,
        max_seq_len=9,
        query_start_loc=torch.tensor([0, 3, 5]),
        seq_lens=torch.tensor([9, 2]),
        block_table_tensor=torch.zeros(2, 4),
        slot_mapping=torch.arange(5),
        causal=True,
    )
    meta = builder.build(0, common)
    assert meta.block_table is common.block_table_tensor
    assert (meta.num_actual_tokens, meta.max_query_len, meta.max_seq_len) == (5, 3, 9)
    common.causal = torch.ones(2, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="request by request"):
        builder.build(0, common)
