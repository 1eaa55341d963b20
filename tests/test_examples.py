"""Every example runs by itself, with the installed package and what its extra brings."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# what each must say, so that an example that runs but no longer shows its point fails
SAYS = {
    "beam_search": ["4 beams of 240 tokens", "without sharing", "128 of 128 blocks can be had"],
    "continuous_batching": [
        "30 requests in 156 steps, each with the tokens that it gets alone",
        "17 times one gave way",
        "60 of 60 blocks can be had",
    ],
    "prefix_sharing": [
        "alice: request 1 found 256 tokens",
        "bob: request 2 found   0 tokens",
        "without a salt: 0 tokens",
        "alice finds 256",
        "bob finds 0",
    ],
    "sliding_window": ["windowed layers", "finds 992 of 1000 tokens", "finds 0 tokens"],
    "speculative_decoding": ["of 4 accepted", "another request with this text would find"],
    "warm_restart": ["512 tokens found,   3 computed", "gives the same bits"],
}
NEEDS = {"warm_restart": ["safetensors", "xxhash"]}


def test_all_examples_are_here():
    assert sorted(SAYS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, tmp_path):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in SAYS[name]:
        assert text in done.stdout
