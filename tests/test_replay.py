"""``rocmforge replay``: traces, the replay beside an independent simulator, what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import pytest

from lru_simulator import Simulator
from rocmforge import KVCacheManager, LayerGroup
from rocmforge.cli import main
from rocmforge.cli.console import CommandError
from rocmforge.cli.simulate import MAX_SAMPLES, simulate
from rocmforge.cli.trace import Trace, read_trace

CONVERSATION = Path(__file__).parents[2] / "shared" / "data" / "mooncake_conversation_trace.jsonl"
needs_conversation = pytest.mark.skipif(
    not CONVERSATION.exists(), reason="the conversation trace is not beside the repository"
)


def conversations(num_requests: int, seed: int = 1) -> list[dict[str, object]]:
    """Turns of some conversations that begin alike and grow; contents of 8 tokens."""
    random = Random(seed)
    next_id, open_talks, rows = 100, [], []
    for time in range(num_requests):
        if not open_talks or random.random() < 0.3:
            open_talks.append([0, 1, random.randrange(2, 5)])
        talk = random.choice(open_talks)
        for _ in range(random.randrange(1, 5)):
            talk.append(next_id)
            next_id += 1
        length = len(talk) * 8
        partial = random.randrange(8) if random.random() < 0.7 else 0
        ids = talk + [next_id] * bool(partial)
        next_id += 1
        output = random.choice([0, 1, 5, 20, 40])
        rows.append(
            {
                "timestamp": time // 3 * 1000,
                "input_length": length + partial,
                "output_length": output,
                "hash_ids": ids,
            }
        )
        if len(open_talks) > 6:
            open_talks.pop(0)
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    return write(tmp_path / "talks.jsonl", conversations(300))


def plain(trace: Trace) -> list[tuple[int, int, list[int]]]:
    return [(r.prompt_tokens, r.output_tokens, r.contents.tolist()) for r in trace.requests]


def compare_with_simulator(trace: Trace, num_blocks: int, max_running: int) -> None:
    manager = KVCacheManager(num_blocks, block_size=trace.content_size)
    found = simulate(trace, manager, max_running=max_running)
    expected = Simulator(plain(trace), num_blocks, trace.content_size, max_running).run()
    manager.check_integrity()
    assert len(manager) == 0
    for name in vars(expected):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.evictions > 0


@pytest.mark.parametrize("max_running", [3, 16])
@pytest.mark.parametrize("num_blocks", [40, 90, 200])
def test_small_pools_agree_with_the_simulator(
    trace_file: Path, num_blocks: int, max_running: int
) -> None:
    compare_with_simulator(read_trace(trace_file, 8), num_blocks, max_running)


def test_the_simulator_sees_preemptions_and_rejections(trace_file: Path) -> None:
    """Else the test above would compare zeros."""
    trace = read_trace(trace_file, 8)
    counts = Simulator(plain(trace), 40, 8, 16).run()
    assert counts.preemptions > 10
    assert counts.rejected > 0
    assert Simulator(plain(trace), 200, 8, 16).run().hit_tokens > counts.hit_tokens > 0


@needs_conversation
@pytest.mark.untraced
@pytest.mark.parametrize("num_blocks", [1000, 3000, 6000])
def test_the_conversation_trace_agrees_with_the_simulator(num_blocks: int) -> None:
    compare_with_simulator(read_trace(CONVERSATION), num_blocks, 256)


@needs_conversation
@pytest.mark.untraced
def test_a_large_pool_hits_the_ideal_of_the_conversation_trace() -> None:
    trace = read_trace(CONVERSATION)
    assert (len(trace.requests), trace.prompt_tokens) == (12_031, 144_793_823)
    found = simulate(trace, KVCacheManager(300_000, block_size=512))
    assert found.hit_tokens == trace.ideal_hits(512)
    assert round(found.hit_rate, 4) == 0.3734
    assert (found.evictions, found.preemptions) == (0, 0)


@pytest.mark.parametrize("block_size", [1, 3, 4, 8, 16, 100])
def test_a_large_pool_hits_the_ideal(trace_file: Path, block_size: int) -> None:
    """At any block size, also one that the trace's contents are no multiple of."""
    trace = read_trace(trace_file, 8)
    found = simulate(trace, KVCacheManager(100_000, block_size=block_size), max_running=16)
    assert found.hit_tokens == trace.ideal_hits(block_size)
    assert found.prompt_tokens == trace.prompt_tokens
    assert found.output_tokens == trace.output_tokens
    assert (found.evictions, found.preemptions, found.rejected) == (0, 0, 0)
    assert found.hit_tokens > 0 or block_size == 100


def test_the_ideal_is_the_longest_common_beginning(trace_file: Path) -> None:
    trace = read_trace(trace_file, 8)
    before: list[list[int]] = []
    hits = 0
    for request in trace.requests:
        tokens = trace.tokens(request).tolist()
        assert len(tokens) == request.prompt_tokens
        longest = 0
        for other in before:
            n = 0
            while n < min(len(tokens) - 1, len(other)) and tokens[n] == other[n]:
                n += 1
            longest = max(longest, n)
        hits += longest // 4 * 4
        before.append(tokens)
    assert trace.ideal_hits(4) == hits


def test_windowed_groups_give_blocks_back(trace_file: Path) -> None:
    trace = read_trace(trace_file, 8)

    def windowed(size: int) -> KVCacheManager:
        return KVCacheManager(block_size=4, groups=[LayerGroup(2000), LayerGroup(size, window=16)])

    large = simulate(trace, windowed(2000), max_running=8)
    small = simulate(trace, windowed(200), max_running=8, chunk_size=16)
    assert large.output_tokens == small.output_tokens == trace.output_tokens
    assert small.rejected == large.rejected == 0
    assert 0 < small.hit_tokens <= large.hit_tokens == trace.ideal_hits(4)
    assert simulate(trace, windowed(5), max_running=8, chunk_size=16).rejected == 300


def test_samples_are_thinned(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1, "output_length": 5000, "hash_ids": [0]},
    ]
    trace = read_trace(write(tmp_path / "long.jsonl", rows))
    found = simulate(trace, KVCacheManager(1000), max_running=64)
    assert found.steps == 5000
    assert MAX_SAMPLES // 2 <= len(found.samples) <= 2 * MAX_SAMPLES
    for sample in found.samples:
        assert sample.shared + sample.own + sample.cached + sample.free == 1000
        assert sample.own == -(-(sample.step + 1) // 16)
    assert found.peak_blocks == 313
    assert found.mean_utilization == pytest.approx(0.157, abs=0.001)


# ---- reading ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "expected an object"),
        ("7", "expected an object"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "hash_ids is missing"),
        ('{"timestamp": "x", "input_length": 5, "output_length": 1, "hash_ids": [1]}', "timestamp"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "timestamp"),
        (
            '{"timestamp": 1, "input_length": -5, "output_length": 1, "hash_ids": []}',
            "input_length",
        ),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": 1.5, "hash_ids": [1]}',
            "output_len",
        ),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": true, "hash_ids": [1]}',
            "output_le",
        ),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": 7}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [[]]}', "hash_ids"),
        (
            '{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
            "hash_ids: 1 of them, 513 tokens have 2 blocks of 512",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1]}'
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(CommandError) as caught:
        read_trace(path)
    assert f"{path}:3: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2", "expected arrival, prompt length and output length, got 2 fields"),
        ("1,2,3,4", "got 4 fields"),
        ("1,2,x", "output length"),
        ("1,-2,3", "prompt length"),
        ("1,2.5,3", "prompt length"),
        ("1,²,3", "prompt length"),
        ("x,2,3", "arrival"),
        ("nan,2,3", "arrival"),
        ("1,2,99999999999", "output length"),
    ],
)
def test_a_malformed_line_of_a_csv_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"arrival,prompt,output\n1,2,3\n{line}\n", encoding="utf-8")
    with pytest.raises(CommandError) as caught:
        read_trace(path)
    assert f"{path}:3: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("headings", ["", "TIMESTAMP,ContextTokens,GeneratedTokens\n"])
def test_a_csv_has_no_common_prompts(tmp_path: Path, headings: str) -> None:
    path = tmp_path / "azure.CSV"
    path.write_text(
        f"{headings}2023-11-16 18:17:03.979960,374,44\n2023-11-16 18:15:46.680590,396,109\n\n"
        "2023-11-16 18:15:50.995130,0,55\n"
    )
    trace = read_trace(path)
    assert [r.prompt_tokens for r in trace.requests] == [396, 0, 374]  # in order of arrival
    assert [r.output_tokens for r in trace.requests] == [109, 55, 44]
    assert [len(trace.tokens(r)) for r in trace.requests] == [396, 0, 374]
    found = simulate(trace, KVCacheManager(100))
    assert (found.hit_tokens, trace.ideal_hits(16), found.output_tokens) == (0, 0, 208)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "it has no requests"), (b"\xff\xfe\xff", "it is no text")],
)
def test_no_trace(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert main(["replay", str(path), "--num-blocks", "10"]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


# ---- the command ----

KEYS = {
    "requests", "prompt_tokens", "hit_tokens", "hit_rate", "ideal_hit_rate", "evictions",
    "preemptions", "peak_blocks", "manager_us_p50", "manager_us_p99",
}  # fmt: skip
MODEL = ["--layers", "4", "--kv-heads", "2", "--head-dim", "64"]


def replay(*arguments: object) -> int:
    return main(["replay", *map(str, arguments), "--trace-block-size", "8", "--block-size", "8"])


def test_json(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(trace_file, "--num-blocks", 90, "--max-running", 16, "--json", *MODEL) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""  # no terminal, no progress
    assert set(found) >= KEYS
    trace = read_trace(trace_file, 8)
    expected = Simulator(plain(trace), 90, 8, 16).run()
    for name in ("prompt_tokens", "hit_tokens", "evictions", "preemptions", "peak_blocks"):
        assert found[name] == getattr(expected, name)
    assert found["requests"] == 300
    assert found["hit_rate"] == found["hit_tokens"] / found["prompt_tokens"]
    assert found["ideal_hit_rate"] == trace.ideal_hits(8) / trace.prompt_tokens
    assert 0 < found["manager_us_p50"] <= found["manager_us_p99"]
    assert found["pool_bytes"] == 90 * 8 * 4 * 2 * 2 * 64 * 2
    assert 0 < found["mean_utilization"] <= found["peak_utilization"] <= 1
    assert 0 < found["mean_fragmentation"] < 1


def test_the_table_and_the_sweep(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [trace_file, "--num-blocks", 200, "--max-running", 16, *MODEL]
    assert replay(*arguments, "--sweep", "100,200,400") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trace       talks: 300 requests")
    assert "200 blocks of 8 tokens, 3.28 MB; at most 16 running" in lines[2]
    table = [line.split() for line in lines[-3:]]
    assert [row[0] for row in table] == ["100", "200", "400"]
    assert [row[1] for row in table] == ["1.64", "3.28", "6.55"]
    hits = [float(row[3].rstrip("%")) for row in table]
    assert hits == sorted(hits)
    preemptions = [int(row[6]) for row in table]
    assert preemptions == sorted(preemptions, reverse=True)
    assert replay(*arguments, "--sweep", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["num_blocks"] for row in found["sweep"]] == [25, 50, 100, 200, 400, 800, 1600]
    assert found["sweep"][3]["hit_tokens"] == found["hit_tokens"]


def test_groups(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = ["--group", "2000::6", "--group", "500:16:30", "--chunk-size", 16]
    arguments = [*groups, "--kv-heads", 2, "--head-dim", 64, "--dtype", "float32"]
    assert replay(trace_file, *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_blocks"] == 2500
    assert found["pool_bytes"] == (2000 * 6 + 500 * 30) * 8 * 2 * 2 * 64 * 4
    assert found["hit_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --num-blocks, or --group"),
        (["--num-blocks", 5, "--group", "5"], "give --num-blocks, or --group"),
        (["--num-blocks", 5, "--layers", 3], "a model is --layers, --kv-heads and --head-dim"),
        (["--num-blocks", 5, *MODEL, "--dtype", "int3"], "--dtype: dtype must be one of"),
        (["--num-blocks", 5, "--plot", "/nowhere/at/all.png"], "--plot: there is no folder"),
    ],
)
def test_bad_usage(
    trace_file: Path,
    arguments: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert replay(trace_file, *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--num-blocks", "0"], ["--group", "5:6:7:8"], ["--group", ":6"],
                  ["--num-blocks", "5", "--plot", "a.pdf"], ["--num-blocks", "5", "--sweep", "0"]]
)  # fmt: skip
def test_bad_options(trace_file: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        replay(trace_file, *arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["use.png", "use.svg"])
@pytest.mark.parametrize("sweep", [[], ["--sweep", "100,200"]])
def test_plot(trace_file: Path, tmp_path: Path, name: str, sweep: list[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    assert replay(trace_file, "--num-blocks", 90, *sweep, "--plot", path) == 0
    data = path.read_bytes()
    if name.endswith(".png"):
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    else:
        assert b"<svg" in data
        assert data.count(b"<path") > 10


def test_plot_without_matplotlib(
    trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert replay(trace_file, "--num-blocks", 90, "--plot", "a.png") == 1
    assert 'pip install "rocmforge[plot]"' in capsys.readouterr().err
