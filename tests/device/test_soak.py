"""A longer run of a cache on a device, and the commands that users run there."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from rocmforge import KVCache, ops
from rocmforge.cli import main
from rocmforge.errors import OutOfBlocksError

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "attention_hip.py"


def test_soak(device, rng):
    """Random sequences come, grow, fork, shrink and go; every result is the CPU's."""
    arguments = {"num_layers": 1, "num_blocks": 60, "num_kv_heads": 2, "head_dim": 16}
    both = [
        KVCache(**arguments, block_size=4, dtype="float32", device=name)
        for name in ("cpu", str(device))
    ]
    alive: list[int] = []
    for turn in range(120):
        choice = rng.integers(0, 10)
        if choice < 3 or not alive:
            for cache in both:
                cache.add_sequence(turn)
            alive.append(turn)
        elif choice == 3 and len(alive) > 1:
            gone = alive.pop(int(rng.integers(len(alive))))
            for cache in both:
                cache.free([gone])
        elif choice == 4:
            parent = alive[int(rng.integers(len(alive)))]
            for cache in both:
                cache.fork(parent, turn)
            alive.append(turn)
        elif choice == 5:
            one = alive[int(rng.integers(len(alive)))]
            length = int(rng.integers(0, both[0].seq_len(one) + 1))
            for cache in both:
                cache.truncate(one, length)
        ids = [int(i) for i in rng.permutation(alive)[: rng.integers(1, 5)]]
        counts = [int(n) for n in rng.integers(1, 9, len(ids))]
        batches = []
        for cache in both:
            try:
                batches.append(cache.append(ids, counts))
            except OutOfBlocksError:
                cache.free(ids)
        if not batches:
            alive = [i for i in alive if i not in ids]
            continue
        tokens = batches[0].num_tokens
        key, value = rng.standard_normal((2, tokens, 2, 16), np.float32)
        query = rng.standard_normal((tokens, 4, 16), np.float32)
        results = []
        for cache, batch in zip(both, batches, strict=True):
            cache.write(0, key, value, batch)
            results.append(cache.attend(0, query, batch))
        np.testing.assert_allclose(results[1], results[0], atol=4e-6, rtol=4e-6)
        both[1].check_integrity()


def test_selftest(device, capsys):
    assert main(["selftest", "--device", str(device)]) == 0
    assert "everything passed" in capsys.readouterr().out


def test_selftest_tells_what_failed(capsys, monkeypatch):
    monkeypatch.setattr(ops, "merge_states", lambda *_: (_ for _ in ()).throw(ValueError("oh")))
    assert main(["selftest"]) == 1
    text = capsys.readouterr().out
    assert "merge of states          FAILED  ValueError: oh" in text
    assert "1 of 12 failed" in text
    assert main(["selftest", "--device", "cpu"]) == 1
    assert "of HIP devices" in capsys.readouterr().err


def test_info_lists_the_devices(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "HIP device 0" in text
    assert "hip:0" in text.splitlines()[-1]


def test_demo_on_a_device(capsys, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    from tiny_gguf import TinyModel

    path = TinyModel().write(tmp_path / "tiny.gguf")
    arguments = ["demo", "--model", str(path), "--prompt", "a b", "--max-new-tokens", "4"]
    assert main([*arguments, "--check", "--device", "hip:0"]) == 0
    assert "passed" in capsys.readouterr().out


def test_benchmark(capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--quick"])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[3:]
    assert {row.partition(",")[0] for row in rows} == {"decode", "prefill", "write"}
