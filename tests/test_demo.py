"""``rocmforge demo`` from the command line, on a tiny random model."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import rocmforge
from rocmforge.cli import main
from rocmforge.cli.dense_check import LIMITS, check
from rocmforge.cli.generate import Sampling, generate
from rocmforge.cli.gguf_file import GGUFFile
from rocmforge.cli.gguf_llama import load_llama
from rocmforge.cli.linear import Threads
from rocmforge.cli.llama import Llama
from tiny_gguf import TinyModel

SYSTEM = "hello world, use hello."  # some forty tokens with the frame around it


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return TinyModel().write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(model_path):
    threads = Threads(1)
    yield Llama(load_llama(GGUFFile(model_path)), threads)
    threads.close()


@pytest.fixture
def demo(model_path, capsys):
    """Run the command on the tiny model; give its exit status, output and errors."""

    def run(*arguments):
        status = main(["demo", "--model", str(model_path), "--system", SYSTEM, *arguments])
        return status, *capsys.readouterr()

    return run


def questions(count, rng):
    return [rng.integers(3, 259, 5 + 4 * i).tolist() for i in range(count)]


def settings(**changes):
    return {
        "max_new_tokens": 12,
        "stop_ids": frozenset(),
        "block_size": 16,
        "dtype": "float32",
        "sampling": Sampling(),
    } | changes


def test_answers_then_a_table(demo):
    status, out, err = demo("--max-new-tokens", "9")
    assert status == 0
    assert out.startswith("tiny: 4 questions in one batch\n\n> Why is the sky blue?\n")
    assert out.count("\n> ") == 4
    assert re.search(r"^prefill +\d+ tokens in [\d.]+ s, [\d.]+ tokens/s; the \d+ of", out, re.M)
    assert re.search(r"^decode +32 tokens in [\d.]+ s, [\d.]+ tokens/s; 8 steps", out, re.M)
    assert re.search(r"^step +[\d.]+ ms with 4 in the batch \(median\): [\d.]+ x", out, re.M)
    for name in ("weights", "attention", "cache", "sampling", "rest"):
        assert re.search(rf"^ +{name} +[\d.]+ ms a step +[\d.]+%", out, re.M), name
    assert re.search(r"^blocks +\d+ of 16 tokens in use, [1-9]\d* of them shared;", out, re.M)
    assert re.search(r"of bfloat16 keys and values\n +4 dense caches: .* model's 512", out)
    assert "\x1b" not in out + err
    assert err == "loading tiny.gguf ...\n"


@pytest.mark.parametrize("block_size", ["1", "7", "16", "256"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_check_passes(demo, dtype, block_size):
    status, out, _ = demo(
        "--check", "--dtype", dtype, "--block-size", block_size, "--max-new-tokens", "40"
    )
    assert "passed" in out
    assert status == 0
    found = float(re.search(r"largest difference of a logit ([\d.e-]+)", out)[1])
    assert 0 < found <= LIMITS[dtype] / 2
    assert f"limit for {dtype} {LIMITS[dtype]:g}" in out


def test_check_is_float32_unless_a_dtype_is_given(demo):
    status, out, _ = demo("--check", "--max-new-tokens", "3")
    assert status == 0
    assert "limit for float32" in out
    assert "of float32 keys and values" in out


class CorruptingCache(rocmforge.KVCache):
    """Damages one slot of the pool, once, after it was written."""

    target = "key"
    amount = 1.0

    def write(self, layer, key, value, batch):
        super().write(layer, key, value, batch)
        if layer == 0 and batch.max_seq_len > 1 and not hasattr(self, "slot"):
            self.slot = int(batch.slot_mapping[3])
            block, offset = divmod(self.slot, self.block_size)
            pool = self.k_cache(0) if self.target == "key" else self.v_cache(0)
            pool[block, :, offset] += self.amount


@pytest.mark.parametrize("target", ["key", "value"])
@pytest.mark.parametrize(("dtype", "amount"), [("float32", 1), ("float16", 4), ("bfloat16", 30)])
def test_check_sees_one_corrupted_slot(demo, monkeypatch, target, dtype, amount):
    monkeypatch.setattr(rocmforge, "KVCache", CorruptingCache)
    monkeypatch.setattr(CorruptingCache, "target", target)
    monkeypatch.setattr(CorruptingCache, "amount", amount)
    status, out, _ = demo("--check", "--dtype", dtype, "--max-new-tokens", "20")
    assert "FAILED" in out
    assert status == 1


def test_check_sees_a_slot_that_is_not_a_number(demo, monkeypatch):
    monkeypatch.setattr(rocmforge, "KVCache", CorruptingCache)
    monkeypatch.setattr(CorruptingCache, "amount", float("nan"))
    status, out, _ = demo("--check", "--max-new-tokens", "2")
    assert "largest difference of a logit nan" in out
    assert status == 1


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_a_token_may_differ_only_at_a_tie_and_not_in_float32(model, shift):
    """A reference whose best two tokens all but tie, and logits that choose the other one."""
    run = generate(model, [], [[5, 6, 7]], **settings(max_new_tokens=1, keep_logits=True))
    (answer,) = run.answers
    logits = answer.logits[0].copy()
    first, second = np.argsort(logits)[:-3:-1]
    logits[second] = logits[first] + shift
    logits[first] -= shift
    answer.logits = [logits]
    gap = float(run.answers[0].logits[0][second]) - logits[first]
    accepted = check(model.weights, run.answers, "bfloat16")
    assert accepted.num_tokens == 1
    if accepted.largest_difference <= accepted.limit:
        assert accepted.passed, gap
        assert accepted.num_equal + accepted.num_close == 1
    strict = check(model.weights, run.answers, "float32")
    assert not strict.passed


def test_forks_share_the_system_prompt(model):
    rng = np.random.default_rng(0)
    system = rng.integers(3, 259, 37).tolist()
    asked = questions(3, rng)
    shared = generate(model, system, asked, **settings())
    # 37 tokens are two full blocks, held by the system's sequence and three forks
    assert shared.stats.shared_blocks == 2
    assert shared.stats.references - shared.stats.used_blocks == 2 * 3
    assert shared.stats.used_blocks == shared.stats.num_blocks  # no more were made than needed
    assert shared.prefill_tokens == 37 + sum(map(len, asked))
    assert shared.shared_tokens == 37
    alone = [
        generate(model, [], [system + tokens], **settings()).answers[0].tokens for tokens in asked
    ]
    assert [answer.tokens for answer in shared.answers] == alone


def test_without_a_system_prompt_nothing_is_shared(model, demo):
    run = generate(model, [], questions(2, np.random.default_rng(1)), **settings())
    assert run.stats.shared_blocks == 0
    assert run.prefill_tokens == 5 + 9
    status, out, _ = demo("--system", "", "--prompt", "hello", "--max-new-tokens", "1")
    assert status == 0
    assert "0 of them shared" in out
    assert "decode" not in out  # the prefill chose the only token


def test_answers_end_at_a_stop_token(model):
    asked = questions(3, np.random.default_rng(2))
    free = generate(model, [1, 2], asked, **settings())
    stop = free.answers[0].tokens[4]
    seen, ended = [], []
    run = generate(
        model,
        [1, 2],
        asked,
        **settings(stop_ids=frozenset({stop})),
        on_token=lambda index, token: seen.append((index, token)),
        on_end=ended.append,
    )
    for index, (answer, whole) in enumerate(zip(run.answers, free.answers, strict=True)):
        cut = whole.tokens.index(stop) + 1 if stop in whole.tokens else len(whole.tokens)
        assert answer.tokens == whole.tokens[:cut]
        assert [token for i, token in seen if i == index] == [t for t in answer.tokens if t != stop]
    assert sorted(ended) == [0, 1, 2]
    assert min(run.step_widths) < 3 or len(run.step_widths) < 11


def test_sampling_follows_the_seed_alone(model):
    asked = questions(3, np.random.default_rng(3))

    def tokens(seed, prompts=asked, temperature=1.5):
        sampling = Sampling(temperature, seed)
        run = generate(model, [1], prompts, **settings(sampling=sampling))
        return [answer.tokens for answer in run.answers]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(7)[:2] == tokens(7, asked[:2])  # whatever else is in the batch
    assert tokens(7, temperature=1e-6) == tokens(0, temperature=0.0)


def test_seed_and_temperature_options(demo):
    def answers(*arguments):
        status, out, _ = demo("--max-new-tokens", "12", *arguments)
        assert status == 0
        return out.partition("prefill")[0]

    greedy = answers()
    assert answers("--temperature", "0", "--seed", "3") == greedy
    assert answers("--seed", "3") == answers("--seed", "3", "--temperature", "0.7") != greedy
    assert answers("--temperature", "2") == answers("--temperature", "2", "--seed", "0") != greedy
    assert demo("--check", "--seed", "3", "--max-new-tokens", "5")[0] == 0


def test_prompts_are_asked_in_order(demo):
    status, out, _ = demo("--prompt", "hello", "--prompt", "use world", "--max-new-tokens", "2")
    assert status == 0
    assert re.findall(r"^> (.*)$", out, re.M)[:2] == ["hello", "use world"]
    assert "2 questions" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: an integer from 1 up is needed, not '0'"),
        (["--max-new-tokens", "x"], "an integer from 1 up is needed, not 'x'"),
        (["--block-size", "-3"], "--block-size: an integer from 1 up is needed, not '-3'"),
        (["--block-size", "3000000000"], "--block-size: an integer from 1 up"),
        (["--seed", "-1"], "--seed: an integer from 0 up is needed, not '-1'"),
        (["--temperature", "nan"], "--temperature: a number from 0 up is needed, not 'nan'"),
        (["--temperature", "hot"], "a number from 0 up is needed, not 'hot'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--prompt", " "], "--prompt: an empty prompt cannot be answered"),
    ],
)
def test_bad_options(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        demo(*arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_does_not_fit(demo):
    status, out, err = demo("--max-new-tokens", "500")
    assert status == 1
    assert out == ""
    assert re.search(r"--max-new-tokens 500 make \d+ tokens; the model takes 512", err)


def test_a_model_that_the_cache_does_not_take(tmp_path, capsys):
    path = TinyModel(head_dim=12, hidden=48).write(tmp_path / "tiny.gguf")
    assert main(["demo", "--model", str(path)]) == 1
    assert "the cache does not take this model: head_dim" in capsys.readouterr().err


def test_a_truncated_model(tmp_path, model_path, capsys):
    path = tmp_path / "cut.gguf"
    path.write_bytes(model_path.read_bytes()[:20000])
    assert main(["demo", "--model", str(path)]) == 1
    err = capsys.readouterr().err
    assert f"rocmforge: {path} is damaged or cut short" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_missing_extra(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo"]) == 1
    err = capsys.readouterr().err
    assert f"needs the package '{package}'" in err
    assert 'pip install "rocmforge[demo]"' in err


def test_text_streams_into_a_pipe(model_path):
    """Output arrives while the command runs, and a reader that leaves ends it quietly."""
    command = [sys.executable, "-P", "-m", "rocmforge", "demo", "--model", str(model_path)]
    command += ["--system", SYSTEM, "--max-new-tokens", "450", "--prompt", "hello"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        shown = b""
        while shown.count(b"\n") < 3:
            more = os.read(process.stdout.fileno(), 100)
            assert more, process.stderr.read()
            shown += more
        assert process.poll() is None
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "Broken" not in err
