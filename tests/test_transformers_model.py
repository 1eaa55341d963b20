"""SmolLM2-135M, as the demo has it, in Transformers: the float32 tokens of its sdpa attention.

Skipped where the demo's weights were never fetched: this downloads nothing.
"""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from rocmforge.cli.model_files import SMOLLM2, cache_folder  # noqa: E402
from rocmforge.integrations.transformers import PagedCache  # noqa: E402
from transformers_cases import assert_assisted, assert_paged, draft_of, generate, ours  # noqa: E402

FOLDER = cache_folder()
pytestmark = [
    pytest.mark.skipif(
        not (FOLDER / SMOLLM2.name).is_file(), reason="the demo's weights are not here"
    ),
    pytest.mark.uninstrumented,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a land far away, there lived",
    "def fibonacci(n):",
    "List three primary colours:",
    "Water boils at",
    "My name is",
    "In 1969, humans first",
    "The quick brown fox jumps over the lazy dog, and then it",
]
SYSTEM = "You are a helpful assistant who answers briefly and never invents what is not known. "


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(2)
    made = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=SMOLLM2.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    yield made
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    made = transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=SMOLLM2.name)
    made.padding_side = "left"
    made.pad_token = made.eos_token
    return made


def cache_of(model):
    return PagedCache(model.config, 128)


@pytest.mark.parametrize(
    ("rows", "number", "options"),
    [(1, 24, {}), (8, 12, {}), (1, 12, {"num_beams": 4}), (1, 24, {"prompt_lookup_num_tokens": 5})],
    ids=["one prompt", "left-padded batch of 8", "beam search", "drafts from the prompt"],
)
def test_the_same_tokens(model, tokenizer, rows, number, options):
    inputs = tokenizer(PROMPTS[:rows], return_tensors="pt", padding=True)
    want = generate(model, inputs, number=number, **options)
    cache = cache_of(model)
    got, calls = ours(model, lambda: generate(model, inputs, cache, number, **options))
    assert torch.equal(got, want)
    if "prompt_lookup_num_tokens" in options:
        assert calls % 30 == 0
        assert calls < 30 * number  # some drafts were right
    else:
        assert calls == 30 * number
    assert_paged(cache)


def test_assisted_decoding(model, tokenizer):
    """A model of the first layers drafts, and often errs."""
    draft = draft_of(model)
    draft.model.layers = draft.model.layers[:28]
    draft.config.num_hidden_layers = 28
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")
    assert_assisted(model, draft, inputs, cache_of(model), 20)


def test_several_calls_and_a_shared_prefix(model, tokenizer):
    inputs = [tokenizer(SYSTEM + PROMPTS[i], return_tensors="pt") for i in (0, 4)]
    want = [generate(model, each, number=8) for each in inputs]
    more = torch.cat([want[0], tokenizer(" And", return_tensors="pt")["input_ids"]], dim=1)
    want.append(generate(model, {"input_ids": more}, number=8))
    first = cache_of(model)
    second = first.new()

    def run():
        results, found = [], []
        for cache, each in ((first, inputs[0]), (second, inputs[1])):
            found.append(cache.start(**each))
            results.append(generate(model, each, cache, 8))
        results.append(generate(model, {"input_ids": more}, first, 8))
        return results, found

    (got, found), calls = ours(model, run)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert found == [0, 16]  # the system prompt has 17 tokens: one block
    assert calls == 30 * 3 * 8
    for cache in (first, second):
        assert_paged(cache)
