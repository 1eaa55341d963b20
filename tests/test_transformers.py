"""Transformers on a paged cache: the tokens of its own attention, from our operation alone."""

import copy
import gc

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rocmforge.errors import OutOfBlocksError  # noqa: E402
from rocmforge.integrations.transformers import PagedCache, attention, register  # noqa: E402
from transformers_cases import (  # noqa: E402
    CACHE,
    MODELS,
    SMALL,
    assert_assisted,
    assert_paged,
    draft_of,
    generate,
    model_of,
    ours,
)


@pytest.fixture(params=MODELS)
def model(request):
    return model_of(request.param)


@pytest.fixture
def llama():
    return model_of("llama")


def prompts(rows, length, padding=()):
    generator = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(2, 128, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, number in enumerate(padding):
        ids[row, :number], mask[row, :number] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def cache_of(model, num_blocks=128, **options):
    return PagedCache(model.config, num_blocks, **{"block_size": 4} | options)


# ---- the same tokens ----


@pytest.mark.parametrize("length", [5, 30])
@pytest.mark.parametrize("padding", [(0,), (0, 3), (0, 3, 1, 0, 2, 4, 1, 3)], ids=len)
def test_left_padded_rows(model, length, padding):
    """One prompt, two and eight, shorter and longer than the window."""
    inputs = prompts(len(padding), length, padding)
    want = generate(model, inputs)
    cache = cache_of(model)
    got, calls = ours(model, lambda: generate(model, inputs, cache))
    assert torch.equal(got, want)
    assert len(set(got[0, length:].tolist())) > 3  # it is no constant that agrees
    assert calls == 3 * 12
    assert cache.get_seq_length() == length + 11
    assert_paged(cache)


def test_logits(model):
    """Of all tokens of a prompt, in each layer beyond its window, and of chunks that follow."""
    inputs = prompts(2, 40, padding=(0, 7))
    mask = inputs["attention_mask"]
    real = mask.bool()
    with torch.no_grad():
        want = model(**inputs).logits

        def chunks():
            cache, parts = cache_of(model), []
            for begin, end in ((0, 30), (30, 31), (31, 40)):
                part = model(
                    input_ids=inputs["input_ids"][:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, begin:end],
                    **{CACHE: cache},
                )
                parts.append(part.logits)
            assert_paged(cache)
            return torch.cat(parts, dim=1)

        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        want = model(**inputs, **positions).logits
        got, _ = ours(model, chunks)
    torch.testing.assert_close(got[real], want[real], rtol=2e-4, atol=2e-4)


def test_beams(model):
    inputs = prompts(2, 9, padding=(0, 2))
    options = {"num_beams": 3, "number": 10}
    want = generate(model, inputs, **options)
    cache = cache_of(model)
    got, calls = ours(model, lambda: generate(model, inputs, cache, **options))
    assert torch.equal(got, want)
    assert calls == 3 * 10
    assert_paged(cache)


def test_assisted_decoding_takes_drafts_back(model):
    """The drafts are of a model that often errs."""
    draft = draft_of(model)
    for parameter in draft.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    assert_assisted(model, draft, prompts(1, 11), cache_of(model, block_size=8), 20)


def test_several_calls_on_one_cache(model):
    first = prompts(1, 9)
    whole = generate(model, first, number=6)
    again = torch.cat([whole, prompts(1, 5)["input_ids"]], dim=1)
    want = generate(model, {"input_ids": again}, number=6)
    cache = cache_of(model)

    def run():
        return (
            generate(model, first, cache, number=6),
            generate(model, {"input_ids": again}, cache, number=6),
        )

    got, calls = ours(model, run)
    assert torch.equal(got[0], whole)
    assert torch.equal(got[1], want)
    assert calls == 3 * 12
    assert_paged(cache)
    cache.reset()
    assert cache.kv_cache.num_free_blocks == cache.kv_cache.num_blocks
    got, _ = ours(model, lambda: generate(model, first, cache, number=6))
    assert torch.equal(got, whole)


# ---- sharing ----


def test_a_prefix_is_computed_once(model):
    """`start` finds what another cache of the pool has computed."""
    prefix = prompts(1, 24)["input_ids"]
    inputs = [{"input_ids": torch.cat([prefix, prompts(1, n)["input_ids"]], dim=1)} for n in (4, 6)]
    want = [generate(model, each) for each in inputs]
    first = cache_of(model)
    others = [first, first.new()]
    found = []

    def run():
        results = []
        for cache, each in zip(others, inputs, strict=True):
            found.append(cache.start(each["input_ids"]))
            assert cache.get_seq_length() == found[-1]
            results.append(generate(model, each, cache))
        return results

    got, calls = ours(model, run)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert found == [0, 24]
    assert calls == 3 * 2 * 12
    for cache in others:
        assert_paged(cache)
    assert first.new().start(inputs[0]["input_ids"], salt="another tenant") == 0


def test_rows_of_a_batch_find_different_amounts(llama):
    """With padding on the left: what all rows have is taken, the rest computed again."""
    known = prompts(1, 20)["input_ids"]
    rows = torch.cat([known, prompts(1, 6)["input_ids"]], dim=1)
    inputs = {"input_ids": rows.repeat(2, 1), "attention_mask": torch.ones(2, 26, dtype=torch.long)}
    inputs["input_ids"][1, :3], inputs["attention_mask"][1, :3] = 0, 0
    inputs["input_ids"][1, 3:15] = known[0, :12]
    want = generate(llama, inputs)
    cache = cache_of(llama)

    def run():
        other = cache.new()
        other.start(known)
        generate(llama, {"input_ids": known}, other, number=1)
        found = cache.start(**inputs)
        return found, generate(llama, inputs, cache)

    (found, got), _ = ours(llama, run)
    assert found == 15  # 12 tokens behind 3 of padding; the other row has 20
    assert torch.equal(got, want)
    assert_paged(cache)


def test_copies_and_repeated_rows_share_blocks(llama):
    prefix = prompts(1, 16)
    tails = [prompts(1, n)["input_ids"] for n in (3, 4)]
    inputs = [{"input_ids": torch.cat([prefix["input_ids"], tail], dim=1)} for tail in tails]
    want = [generate(llama, each) for each in inputs]
    four = torch.cat([prefix["input_ids"].repeat(4, 1), prompts(4, 2)["input_ids"]], dim=1)
    want_four = generate(llama, {"input_ids": four})
    cache = cache_of(llama)

    def run():
        with torch.no_grad():
            llama(**prefix, **{CACHE: cache})
        used = cache.kv_cache.num_blocks - cache.kv_cache.num_free_blocks
        copies = [copy.deepcopy(cache) for _ in inputs]
        rows = copy.deepcopy(cache)
        rows.batch_repeat_interleave(4)
        assert cache.kv_cache.num_blocks - cache.kv_cache.num_free_blocks == used
        results = [generate(llama, each, one) for each, one in zip(inputs, copies, strict=True)]
        results.append(generate(llama, {"input_ids": four}, rows))
        rows.batch_select_indices(torch.tensor([0, 3]))
        assert len(rows.kv_cache) == 1 + 2 + 2
        return results

    got, _ = ours(llama, run)
    for a, b in zip(got, [*want, want_four], strict=True):
        assert torch.equal(a, b)
    assert cache.get_seq_length() == 16
    gc.collect()
    assert len(cache.kv_cache) == 1  # the copies are gone, and with them their rows
    assert_paged(cache)


def test_blocks_are_free_when_the_cache_is_gone(llama):
    caches = [cache_of(llama)]
    ours(llama, lambda: generate(llama, prompts(2, 5), caches[0]))
    blocks = caches[0].kv_cache
    assert len(blocks) == 2
    gc.disable()
    try:
        caches.clear()
        assert len(blocks) == 0
    finally:
        gc.enable()


def test_eight_bit_blocks(llama):
    """Not the same numbers, but near: the first tokens agree."""
    inputs = prompts(1, 20)
    with torch.no_grad():
        want = llama(**inputs).logits
        cache = cache_of(llama, dtype="int8")
        got, _ = ours(llama, lambda: llama(**inputs, **{CACHE: cache}).logits)
    assert cache.kv_cache.dtype.name == "int8"
    assert (got - want).abs().max() < 0.1 * want.abs().max()


# ---- what goes wrong ----


def test_a_forward_pass_that_fails_leaves_nothing(llama):
    inputs = prompts(2, 7, padding=(0, 2))
    want = generate(llama, inputs)
    cache = cache_of(llama)
    handle = llama.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)

    def run():
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            llama(**inputs, **{CACHE: cache})
        handle.remove()
        assert cache.get_seq_length() == 0
        return generate(llama, inputs, cache)

    got, _ = ours(llama, run)
    assert torch.equal(got, want)
    assert_paged(cache)


def test_a_pool_that_is_full(llama):
    cache = cache_of(llama, 4)

    def run():
        with pytest.raises(OutOfBlocksError):
            generate(llama, prompts(1, 10), cache)
        length = cache.get_seq_length()
        assert 10 <= length <= 16
        cache.crop(-(length - 9))
        return generate(llama, {"input_ids": prompts(1, 10)["input_ids"]}, cache, number=3)

    got, _ = ours(llama, run)
    assert torch.equal(got, generate(llama, prompts(1, 10), number=3))


def test_refusals(llama):
    inputs = prompts(2, 6, padding=(0, 2))

    def run():
        cache = cache_of(llama)
        with pytest.raises(ValueError, match="needs a PagedCache"):
            generate(llama, inputs)
        with pytest.raises(RuntimeError, match=r"no gradient: run the model in torch\.no_grad"):
            llama(**inputs, **{CACHE: cache})
        with torch.no_grad():
            llama(**inputs, **{CACHE: cache})
            one = {"input_ids": inputs["input_ids"][:, :1], CACHE: cache}
            with pytest.raises(ValueError, match="expected the mask that the cached tokens had"):
                llama(**one)
            mask = torch.ones(2, 7)
            mask[0, 0] = 0
            with pytest.raises(ValueError, match="differs from what it was"):
                llama(**one, attention_mask=mask)
            with pytest.raises(NotImplementedError, match=r"attention_mask: expected \[2, 7\]"):
                llama(**one, attention_mask=torch.zeros(2, 1, 1, 7))
            with pytest.raises(ValueError, match="holds 2 rows, the model was called with 1"):
                llama(input_ids=inputs["input_ids"][:1, :1], **{CACHE: cache})
        with pytest.raises(ValueError, match="start: the cache has rows already"):
            cache.start(**inputs)
        assert cache.get_seq_length() == 6
        assert_paged(cache)

    ours(llama, run)


def test_what_the_attention_is_asked_for(llama):
    """Of a layer's call: what is not causal attention for inference."""
    cache = cache_of(llama)
    states = torch.zeros(1, 2, 3, 16)
    key, value = cache.layers[0].update(states, states)
    module = llama.model.layers[0].self_attn

    def call(**options):
        query = torch.zeros(1, 4, 3, 16)
        return attention(module, query, key, value, None, **options)

    with pytest.raises(NotImplementedError, match="it was asked for dropout"):
        call(dropout=0.1)
    with pytest.raises(NotImplementedError, match="it was asked for a position bias"):
        call(position_bias=torch.zeros(1, 4, 3, 3))
    for options in ({"is_causal": False}, {"is_causal": False, "dropout": 0.1}):
        with pytest.raises(NotImplementedError, match="asked for attention that is not causal"):
            call(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_causal", False)
        with pytest.raises(NotImplementedError, match="asked for attention that is not causal"):
            call()
        with pytest.raises(NotImplementedError, match="asked for dropout"):
            call(is_causal=True, dropout=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.layers[0], "window", 4)
        with pytest.raises(
            ValueError, match="layer 0 has a window of 8 tokens, the cache one of 4"
        ):
            call(sliding_window=8)
    assert len(cache.kv_cache) == 0
    out, weights = call()
    assert out.shape == (1, 3, 4, 16)
    assert weights is None


@pytest.mark.parametrize("model", ["mistral", "gemma2", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("hole", [slice(5, 6), slice(7, 9)], ids=["inside", "on the right"])
def test_windows_take_padding_on_the_left_alone(model, hole):
    """A window counts what is between, also what is padding there."""
    inputs = prompts(2, 9, padding=(0, 2))
    inputs["attention_mask"][1, hole] = 0
    cache = cache_of(model)

    def run():
        with (
            torch.no_grad(),
            pytest.raises(NotImplementedError, match="takes padding on the left alone"),
        ):
            model(**inputs, **{CACHE: cache})
        assert len(cache.kv_cache) == 0
        inputs["attention_mask"][1, hole] = 1
        return generate(model, inputs, cache)

    got, _ = ours(model, run)
    assert torch.equal(got, generate(model, inputs))


def test_a_hole_where_there_are_no_windows(llama):
    """Is left out, as the model's own attention leaves it out."""
    inputs = prompts(2, 9, padding=(0, 2))
    inputs["attention_mask"][1, 5] = 0
    with torch.no_grad():
        want = llama(**inputs).logits
        got, _ = ours(llama, lambda: llama(**inputs, **{CACHE: cache_of(llama)}).logits)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=2e-4, atol=2e-4)


def test_a_cache_on_a_gpu_has_the_stream_of_the_model(llama, monkeypatch):
    """PyTorch's current one, unless another is asked for."""
    made = []

    class Made(Exception):
        pass

    def kv_cache(**options):
        made.append((options["device"], options["stream"]))
        raise Made

    monkeypatch.setattr("rocmforge.integrations.transformers.KVCache", kv_cache)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    for options in ({}, {"stream": 7}):
        with pytest.raises(Made):
            cache_of(llama, device="cuda:1", **options)
    assert made == [("hip:1", "current of cuda:1"), ("hip:1", 7)]


def test_windows_bound_what_can_be_taken_back():
    model = model_of("mistral")
    cache = cache_of(model)
    ours(model, lambda: generate(model, prompts(1, 20), cache))
    with pytest.raises(ValueError, match="at most block_size tokens, 4, can be taken back"):
        cache.crop(-9)
    assert cache.get_seq_length() == 31
    cache.crop(-3)
    assert cache.get_seq_length() == 28
    cache.crop(27)  # as older releases say it: what to keep
    assert cache.get_seq_length() == 27


def test_masks_of_another_shape_are_refused():
    """Gemma 3 that looks both ways, and layers that keep something else."""
    kind, more = MODELS["gemma3"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**SMALL | more, use_bidirectional_attention=True)
    ).eval()

    def run():
        with torch.no_grad(), pytest.raises(NotImplementedError, match="causal and sliding-window"):
            model(**prompts(1, 5), **{CACHE: cache_of(model)})

    ours(model, run)
    config = transformers.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64)
    with pytest.raises(NotImplementedError, match="layer 0 of the model keeps a"):
        PagedCache(config)


def test_continuous_batching_refuses_the_name(llama):
    """`generate_batch` has a paged cache of its own, and refuses names that it does not know."""
    before = llama.config._attn_implementation
    llama.set_attn_implementation("rocmforge")
    try:
        with pytest.raises(ValueError, match="rocmforge is not supported for continuous batching"):
            llama.generate_batch([[1, 2, 3]])
    finally:
        llama.set_attn_implementation(before)


def test_one_version_is_known(monkeypatch):
    name = "rocmforge.integrations.transformers.transformers.__version__"
    monkeypatch.setattr(name, "4.57.0")  # of the module that is asked: tests may load it again
    with pytest.raises(ImportError, match=r"needs Transformers 5, 4\.57\.0 is installed"):
        register()
