"""``vllm serve`` with this library's attention gives the tokens that vLLM's own gives.

Takes minutes and two cores: only where VLLM_SERVING names a folder for the checkpoint, as the long
form of the checks does.
"""

import os
from pathlib import Path

import pytest

from vllm_server import LAYERS, Server, differences, made_checkpoint, prose

FOLDER = os.environ.get("VLLM_SERVING")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="VLLM_SERVING names no folder"),
    pytest.mark.uninstrumented,
]

# chunks of long prompts between decodes of others; compilation would only take longer here
ARGUMENTS = ["--dtype", "float32", "--max-model-len", 2048, "--max-num-seqs", 32]
ARGUMENTS += ["--max-num-batched-tokens", 256, "--kv-cache-memory-bytes", "1G", "--enforce-eager"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model():
    return made_checkpoint(Path(FOLDER) / "smollm2")


def prompts_of(server):
    """32 prompts: four families of eight, each with its own long beginning."""
    prompts = []
    for family in range(4):
        shared = server.tokens(prose(300 + 170 * family, family))
        for member in range(8):
            prompts.append(shared + server.tokens(prose(5 + 9 * member, 100 * family + member)))
    return prompts


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory):
    """The prompts, and what vLLM's own attention answers, twice. Its blocks are multiples of 32."""
    work = tmp_path_factory.mktemp("stock")
    with Server(model, work, *ARGUMENTS, "--block-size", 32, ours=False) as server:
        prompts = prompts_of(server)
        return prompts, *(server.complete_all(prompts, NEW_TOKENS, margins=True) for _ in range(2))


@pytest.mark.parametrize("block_size", [16, 32])
def test_same_tokens_as_vllm(model, stock, tmp_path, block_size):
    prompts, *runs = stock
    arguments = [*ARGUMENTS, "--block-size", block_size]
    with Server(model, tmp_path, *arguments, ours=True, counted=True) as server:
        ours = server.complete_all(prompts, NEW_TOKENS)
        writes, attentions, tokens = server.counts
        hits = int(server.metric("vllm:prefix_cache_hits_total"))
    found = differences(ours, *runs)
    print(
        f"block size {block_size}: {len(prompts)} requests of {min(map(len, prompts))} to "
        f"{max(map(len, prompts))} tokens, {NEW_TOKENS} new ones each: {len(found)} differ "
        f"{found}; {writes} writes, {attentions} attentions, {hits} tokens found cached"
    )
    assert all(len(one.tokens) == NEW_TOKENS for one in ours)
    assert all(accepted for *_, accepted in found), found
    steps, rest = divmod(attentions, LAYERS)
    assert (writes, rest) == (attentions, 0)
    # computed was each new token but the last, and each prompt token that was not found cached
    computed = sum(map(len, prompts)) + len(prompts) * (NEW_TOKENS - 1) - hits
    assert tokens == LAYERS * computed
    assert steps >= computed / 256 > max(map(len, prompts)) / 256  # prompts came in chunks
    assert hits > 1000  # and found what others began with


def test_two_ranks(tmp_path):
    """Tensor parallel: each rank has half of the heads, and its own calls."""
    model = made_checkpoint(Path(FOLDER) / "divisible", "divisible")
    arguments = [*ARGUMENTS, "--block-size", 32, "--tensor-parallel-size", 2]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    answers = []
    for ours in (False, True):
        work = tmp_path / str(ours)
        with Server(
            model, work, *arguments, ours=ours, counted=ours, environment=environment
        ) as server:
            prompts = prompts_of(server)[::5]
            for _ in range(1 if ours else 2):
                answers.append(server.complete_all(prompts, NEW_TOKENS, margins=True))
            if ours:
                writes, attentions, _ = server.counts
    found = differences(answers[2], *answers[:2])
    print(
        f"two ranks: {len(prompts)} requests: {len(found)} differ {found}; "
        f"{attentions} attentions of both ranks"
    )
    assert all(accepted for *_, accepted in found), found
    assert writes == attentions > 2 * 4 * NEW_TOKENS
