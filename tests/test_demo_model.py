"""The loader and the forward pass, against a computation that shares nothing with them."""

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from rocmforge import KVCache
from rocmforge.cli.console import CommandError
from rocmforge.cli.dense_check import dense_logits
from rocmforge.cli.generate import Answer
from rocmforge.cli.gguf_file import GGUFFile
from rocmforge.cli.gguf_llama import load_llama
from rocmforge.cli.linear import Linear, Threads
from rocmforge.cli.llama import Clock, Llama, swiglu
from tiny_gguf import TinyModel


@pytest.fixture
def threads():
    threads = Threads(2)
    yield threads
    threads.close()


def load(path):
    return load_llama(GGUFFile(path))


MODELS = {
    "plain": TinyModel(),
    "untied": TinyModel(tied=False, seed=1),
    "quantised": TinyModel(quantised=True, seed=2),
    "multi-head, wide heads": TinyModel(kv_heads=4, head_dim=16, rope_base=500.0, seed=3),
    "multi-query, three layers": TinyModel(kv_heads=1, layers=3, seed=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_is_that_of_the_checkpoint(name, tmp_path, threads):
    model = MODELS[name]
    weights = load(model.write(tmp_path / "tiny.gguf"))
    config = weights.config
    llama = Llama(weights, threads)
    cache = KVCache(
        config.num_layers, 32, config.num_kv_heads, config.head_dim, block_size=5, dtype="float32"
    )
    rng = np.random.default_rng(5)
    sequences = {11: rng.integers(0, 260, 23), 12: rng.integers(0, 260, 9)}
    expected = {key: model.logits(tokens) for key, tokens in sequences.items()}
    for key in sequences:
        cache.add_sequence(key)
    # prefill and decode mixed in one batch, in uneven steps
    for steps in ([(11, 7)], [(12, 4), (11, 1)], [(11, 12), (12, 1)], [(11, 1), (12, 1)]):
        batch = cache.append([key for key, _ in steps], [count for _, count in steps])
        tokens = np.concatenate(
            [
                sequences[key][end - count : end]
                for (key, count), end in zip(steps, batch.seq_lens, strict=True)
            ]
        )
        logits = llama.forward(tokens, cache, batch, Clock())
        assert logits.dtype == np.float32
        for row, (key, _) in enumerate(steps):
            wanted = expected[key][batch.seq_lens[row] - 1]
            np.testing.assert_allclose(logits[row], wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_reference_is_that_of_the_checkpoint(name, tmp_path):
    model = MODELS[name]
    weights = load(model.write(tmp_path / "tiny.gguf"))
    answers = [Answer(1, [5, 9, 200, 7], [8, 9, 10]), Answer(2, [77], [3])]
    for answer, found in zip(answers, dense_logits(weights, answers), strict=True):
        expected = model.logits(answer.prompt + answer.tokens[:-1])[len(answer.prompt) - 1 :]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # eps is stored in float32


def test_swiglu_of_large_negative_gates_is_zero():
    assert swiglu(np.float32([[-1000, 0, 2, 3]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 17, 40])
@pytest.mark.parametrize("shape", [(7, 5), (200, 576), (1500, 560), (2048, 384), (96, 9000)])
def test_linear(shape, rows, num_threads):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, shape[1]), dtype=np.float32)
    weight = rng.standard_normal(shape, dtype=np.float32)
    threads = Threads(num_threads)
    try:
        found = Linear(threads)(x, weight)
    finally:
        threads.close()
    assert found.dtype == np.float32
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.sqrt(shape[1]))


def test_linear_gives_the_same_bits_on_any_number_of_threads():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 600), dtype=np.float32)
    weight = rng.standard_normal((1400, 600), dtype=np.float32)
    results = []
    for count in (1, 2, 3):
        threads = Threads(count)
        results.append(Linear(threads)(x, weight))
        threads.close()
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_an_error_in_a_thread_reaches_the_caller():
    threads = Threads(2)

    def fail(part):
        if part == 1:
            raise MemoryError("in a thread")

    with pytest.raises(MemoryError, match="in a thread"):
        threads.run(fail)
    done = []
    threads.run(done.append)  # and they go on
    assert sorted(done) == [0, 1]
    threads.close()
    threads.close()


def test_rope_variants(tmp_path):
    model = TinyModel()
    base = load(model.write(tmp_path / "base.gguf")).inverse_frequencies
    np.testing.assert_allclose(base, 10000.0 ** -(np.arange(4) / 4))
    factors = np.float32([1, 2, 4, 8])
    path = model.write(tmp_path / "factors.gguf", tensors={"rope_freqs.weight": factors})
    np.testing.assert_allclose(load(path).inverse_frequencies, base / factors)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = model.write(tmp_path / "linear.gguf", metadata=scaling)
    np.testing.assert_allclose(load(path).inverse_frequencies, base / 4)
    path = model.write(tmp_path / "part.gguf", metadata={"llama.rope.dimension_count": 4})
    np.testing.assert_allclose(load(path).inverse_frequencies, 10000.0 ** -(np.arange(2) / 2))


EXTRA = np.zeros(32, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; the demo runs 'llama' only"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "4 query heads do not divide over 3"),
        ({"metadata": {"llama.attention.value_length": 16}}, "different sizes"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "'yarn' is not supported"),
        ({"metadata": {"llama.rope.dimension_count": 7}}, "cannot turn 7 of 8"),
        ({"metadata": {"llama.block_count": 3}}, "no tensor 'blk.2.attn_q.weight'"),
        ({"metadata": {"llama.block_count": 0}}, "impossible model size: num_layers = 0"),
        ({"metadata": {"llama.feed_forward_length": 32}}, r"shape \(64, 32\), but .* \(32, 32\)"),
        ({"metadata": {"llama.block_count": "two"}}, "'llama.block_count' is not one integer"),
        ({"metadata": {"llama.rope.freq_base": "ten"}}, "'llama.rope.freq_base' is not one number"),
        ({"metadata": {"general.name": 3}}, "'general.name' is not a string"),
        ({"metadata": {"tokenizer.ggml.tokens": 3}}, "'tokenizer.ggml.tokens' is not an array"),
        ({"drop": ["llama.context_length"]}, "no metadata 'llama.context_length'"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "no tensor 'blk.1.ffn_up.weight'"),
        ({"tensors": {"blk.0.attn_q.bias": EXTRA}}, "does not compute: blk.0.attn_q.bias$"),
        (
            {"tensors": {f"blk.0.extra{i}": EXTRA for i in range(6)}},
            "extra0, blk.0.extra1, blk.0.extra2, blk.0.extra3 and 2 more",
        ),
    ],
)
def test_models_that_cannot_be_computed_are_refused(changes, message, tmp_path):
    path = TinyModel().write(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(CommandError, match=message):
        load(path)


def test_a_type_that_cannot_be_dequantised(tmp_path):
    model = TinyModel()
    norm = model.weights["output_norm"].astype(np.int32)
    path = model.write(tmp_path / "tiny.gguf", tensors={"output_norm.weight": norm})
    with pytest.raises(CommandError, match="stored as I32, which the gguf package cannot"):
        load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(CommandError, match=r"cannot read .*x\.gguf: No such file"):
        GGUFFile(path)
    with pytest.raises(CommandError, match="Is a directory"):
        GGUFFile(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(CommandError, match="not a GGUF file"):
        GGUFFile(path)
    path.write_bytes(b"PK\3\4 a zip")
    with pytest.raises(CommandError, match="not a GGUF file: it starts with"):
        GGUFFile(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = TinyModel().write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [4, 8, 20, 24, 40, *range(100, len(whole) - 64, len(whole) // 60)]:
        path.write_bytes(whole[:size])
        with pytest.raises(CommandError, match="damaged or cut short"):
            GGUFFile(path)
