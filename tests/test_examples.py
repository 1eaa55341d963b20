"""Every example runs by itself, with the installed package and what its extra brings."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from rocmforge.cli.model_files import SMOLLM2, cache_folder

EXAMPLES = Path(__file__).parent.parent / "examples"

# what each must say, so that an example that runs but no longer shows its point fails
SAYS = {
    "beam_search": ["4 beams of 240 tokens", "without sharing", "128 of 128 blocks can be had"],
    "continuous_batching": [
        "30 requests in 156 steps, each with the tokens that it gets alone",
        "25 times one gave way",
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
    "transformers_generate": [
        "batch: ' Paris.",
        "3 blocks for 17 columns of 2 rows",
        "blocks for 4 beams of",
        " tokens were cached: ['",
        "48 of 63 tokens were cached",
    ],
    "speculative_decoding": ["of 4 accepted", "another request with this text would find"],
    "warm_restart": ["512 tokens found,   3 computed", "gives the same bits"],
}
NEEDS = {"transformers_generate": ["transformers"], "warm_restart": ["safetensors", "xxhash"]}

# the long form of the checks serves with vLLM, by its command
NOT_RUN = {"vllm_serve"}


def test_all_examples_are_here():
    assert {*SAYS, *NOT_RUN} == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, tmp_path):
    for module in NEEDS.get(name, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if name == "transformers_generate" and not (cache_folder() / SMOLLM2.name).is_file():
        pytest.skip("the demo's weights are not here")
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in SAYS[name]:
        assert text in done.stdout
