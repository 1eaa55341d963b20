"""Small models of several architectures, and what the tests of Transformers have in common."""

import copy
import gc
import importlib
import inspect

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.masking_utils import eager_mask

from rocmforge import ops
from rocmforge.integrations.transformers import register

register()
torch.set_num_threads(1)  # small models: threads would wait for each other
# the keyword's name: a newer one since some release of Transformers 5
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "gemma2": (  # soft cap and windows
        transformers.Gemma2Config,
        {"sliding_window": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {"sliding_window": 8, "layer_types": LAYERS}),
    "gpt_oss": (  # sinks and windows
        transformers.GptOssConfig,
        {
            "sliding_window": 8,
            "layer_types": LAYERS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 8}),
    "qwen3": (transformers.Qwen3Config, {}),
}
_models = {}
_code = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in MODELS]
_eager = {module.__name__: module.eager_attention_forward for module in _code}


def model_of(name):
    """A small model of random weights, large enough that its attention decides what comes."""
    if name not in _models:
        kind, more = MODELS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**SMALL | more)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 or parameter.numel() == SMALL["num_attention_heads"]:
                parameter.data = 0.3 * torch.randn_like(parameter)
        _models[name] = model
    return _models[name]


class Calls:
    """Our operation, counted."""

    def __init__(self, monkeypatch):
        self.number = 0
        original = ops.paged_attention

        def counted(*args, **kwargs):
            self.number += 1
            return original(*args, **kwargs)

        def raising(*_, **__):
            raise AssertionError("another attention was called")

        monkeypatch.setattr(ops, "paged_attention", counted)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", raising)
        for module in _code:
            monkeypatch.setattr(module, "eager_attention_forward", raising)


def ours(model, function):
    """Run a function with our attention, and no other, in the model: its result and the calls.

    Each forward pass of the model that ends must have called it once for each layer.
    """
    before = model.config._attn_implementation
    begun = []

    def check(*_):
        assert calls.number - begun[-1] == model.config.num_hidden_layers

    hooks = [
        model.register_forward_pre_hook(lambda *_: begun.append(calls.number)),
        model.register_forward_hook(check),
    ]
    model.set_attn_implementation("rocmforge")
    try:
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch)
            return function(), calls.number
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


AttentionInterface.register(
    "draft",
    lambda module, *args, **kwargs: _eager[type(module).__module__](module, *args, **kwargs),
)
AttentionMaskInterface.register("draft", eager_mask)


def draft_of(model):
    """A copy of a model to draft with, whose attention is its own: `ours` stops the model's."""
    draft = copy.deepcopy(model)
    draft.set_attn_implementation("draft")
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.assistant_confidence_threshold = 0
    return draft


def assert_assisted(model, draft, inputs, cache, number):
    """The same tokens with drafts, of which some are right, so that steps are few, and some not."""
    want = generate(model, inputs, number=number)
    removed = []
    crop = cache.crop

    def counted(tokens):
        removed.append(-tokens)
        crop(tokens)

    cache.crop = counted
    got, calls = ours(model, lambda: generate(model, inputs, cache, number, assistant_model=draft))
    del cache.crop
    assert torch.equal(got, want)
    assert sum(removed) > 0
    layers, drafts = model.config.num_hidden_layers, draft.generation_config.num_assistant_tokens
    assert calls % layers == 0
    assert number <= calls // layers * (1 + drafts) < number * (1 + drafts)
    assert_paged(cache)


def generate(model, inputs, cache=None, number=12, **options):
    if cache is not None:
        options[CACHE] = cache
    options = {"max_new_tokens": number, "min_new_tokens": number, "do_sample": False} | options
    return model.generate(**inputs, **options)


def assert_paged(cache):
    """No key and no value outside of the blocks, and the blocks are in order."""
    for layer in cache.layers:
        assert layer.keys is None
        assert layer.values is None
    seen, todo = set(), [cache]
    while todo:  # whatever the cache refers to, but for the blocks, types and modules
        thing = todo.pop()
        if id(thing) in seen or thing is cache.kv_cache or isinstance(thing, type):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, torch.Tensor) or thing.ndim < 2
        if isinstance(thing, (dict, list, tuple)) or type(thing).__module__.startswith("rocmforge"):
            todo += gc.get_referents(thing)
    cache.kv_cache.check_integrity()
