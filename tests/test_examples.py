"""Every example runs by itself, with NumPy and the installed package only."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# what each must say, so that an example that runs but no longer shows its point fails
SAYS = {
    "beam_search": ["4 beams of 240 tokens", "without sharing", "128 of 128 blocks can be had"],
    "prefix_sharing": [
        "alice: request 1 found 256 tokens",
        "bob: request 2 found   0 tokens",
        "without a salt: 0 tokens",
        "alice finds 256",
        "bob finds 0",
    ],
    "sliding_window": ["windowed layers", "finds 992 of 1000 tokens", "finds 0 tokens"],
    "speculative_decoding": ["of 4 accepted", "another request with this text would find"],
}

# the long form of the checks serves with vLLM, by its command
NOT_RUN = {"vllm_serve"}


def test_all_examples_are_here():
    assert {*SAYS, *NOT_RUN} == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, tmp_path):
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
