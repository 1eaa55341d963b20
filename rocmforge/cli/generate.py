"""Several questions answered in one batch, whose system prompt is computed once and shared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt

import rocmforge
from rocmforge import KVCache
from rocmforge.cli.console import CommandError
from rocmforge.cli.llama import Clock, Llama
from rocmforge.stats import CacheStats

__all__ = ["Answer", "Generation", "Sampling", "generate"]

Matrix = npt.NDArray[np.float32]

SYSTEM = 0  # the sequence id of the system prompt; the questions are 1, 2, ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: at temperature 0 the likeliest, else at random by `seed`."""

    temperature: float = 0.0
    seed: int = 0


@dataclass
class Answer:
    """One sequence: what it was given, what it produced."""

    sequence_id: int
    prompt: list[int]  # the whole prompt, the shared part included
    tokens: list[int] = field(default_factory=list)
    logits: list[Matrix] = field(default_factory=list)  # one [vocab_size] a token, if asked for
    finished: bool = False


@dataclass
class Generation:
    """What a run did and what it cost."""

    answers: list[Answer]
    shared_tokens: int  # length of the system prompt, computed once
    prefill: Clock
    prefill_tokens: int
    decode: Clock
    step_seconds: list[float]  # of each decode step
    step_widths: list[int]  # sequences in each decode step
    stats: CacheStats  # at the end, before any sequence is freed
    block_bytes: int  # keys and values of one block, all layers
    context_length: int  # longest sequence of the model, in tokens


def generate(
    model: Llama,
    system: Sequence[int],
    questions: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    block_size: int,
    dtype: str,
    device: str = "cpu",
    sampling: Sampling,
    keep_logits: bool = False,
    on_token: Callable[[int, int], None] = lambda index, token: None,
    on_end: Callable[[int], None] = lambda index: None,
) -> Generation:
    """Answer all questions in one batch.

    The system prompt is computed once, in a sequence of its own. Each question's sequence is a fork
    of it: the full blocks stay shared, and the partly filled last one is copied on the first write.

    Parameters
    ----------
    model : Llama
        The model.
    system : sequence of int
        Tokens that every prompt starts with; may be empty, then nothing is shared.
    questions : sequence of sequence of int
        Tokens of each question, which follow those of `system`.
    max_new_tokens : int
        Length at which an answer is cut.
    stop_ids : frozenset of int
        Tokens that end an answer.
    block_size : int
        Tokens a block.
    dtype : str
        Type of keys and values.
    device : str
        Where the cache is; the rest of the forward pass is NumPy.
    sampling : Sampling
        How tokens are chosen.
    keep_logits : bool
        Keep the logits of every token, for a check.
    on_token, on_end : callable
        Told of each token ``(index of the question, token)``, and of the end of each answer.

    Raises
    ------
    CommandError
        The model's sizes are ones that the cache does not take.
    """
    cache = _make_cache(
        model,
        _blocks_needed(len(system), list(map(len, questions)), max_new_tokens, block_size),
        block_size,
        dtype,
        device,
    )
    answers = [Answer(1 + i, [*system, *tokens]) for i, tokens in enumerate(questions)]
    generators = [np.random.default_rng((sampling.seed, i)) for i in range(len(answers))]

    def choose(index: int, logits: Matrix) -> None:
        answer = answers[index]
        token = _choose(logits, sampling.temperature, generators[index])
        answer.tokens.append(token)
        if keep_logits:
            answer.logits.append(logits)
        answer.finished = token in stop_ids or len(answer.tokens) == max_new_tokens

    def report(index: int) -> None:
        if (token := answers[index].tokens[-1]) not in stop_ids:
            on_token(index, token)
        if answers[index].finished:
            on_end(index)

    prefill = Clock()
    if system:
        cache.add_sequence(SYSTEM)
        batch = cache.append([SYSTEM], len(system))
        prefill.lap("cache")
        model.forward(np.asarray(system, np.int64), cache, batch, prefill)
    for answer in answers:
        if system:
            cache.fork(SYSTEM, answer.sequence_id)
        else:
            cache.add_sequence(answer.sequence_id)
    batch = cache.append([a.sequence_id for a in answers], [len(tokens) for tokens in questions])
    prefill.lap("cache")
    flat = np.concatenate([np.asarray(tokens, np.int64) for tokens in questions])
    logits = model.forward(flat, cache, batch, prefill)
    for i in range(len(answers)):
        choose(i, logits[i])
    prefill.lap("sampling")
    for i in range(len(answers)):
        report(i)

    decode = Clock()
    step_seconds: list[float] = []
    step_widths: list[int] = []
    while active := [i for i, answer in enumerate(answers) if not answer.finished]:
        start = perf_counter()
        decode.start()
        batch = cache.append([answers[i].sequence_id for i in active], 1)
        decode.lap("cache")
        newest = np.asarray([answers[i].tokens[-1] for i in active], np.int64)
        logits = model.forward(newest, cache, batch, decode)
        for row, i in enumerate(active):
            choose(i, logits[row])
        decode.lap("sampling")
        for i in active:
            report(i)
        decode.lap("rest")
        step_seconds.append(perf_counter() - start)
        step_widths.append(len(active))

    stats = cache.stats()
    for answer in answers:
        cache.free(answer.sequence_id)
    if system:
        cache.free(SYSTEM)
    return Generation(
        answers=answers,
        shared_tokens=len(system),
        prefill=prefill,
        prefill_tokens=len(system) + len(flat),
        decode=decode,
        step_seconds=step_seconds,
        step_widths=step_widths,
        stats=stats,
        block_bytes=cache.block_nbytes,
        context_length=model.config.context_length,
    )


def _blocks_needed(
    system: int, questions: Sequence[int], max_new_tokens: int, block_size: int
) -> int:
    """Count the blocks that a run can need at most, from the lengths of its prompts in tokens."""
    blocks = -(-system // block_size)  # the system prompt's own
    shared = system // block_size  # of those, the full ones, which the questions do not repeat
    for length in questions:
        # the last token that is chosen never enters the cache
        longest = system + length + max_new_tokens - 1
        blocks += -(-longest // block_size) - shared
    return blocks


def _make_cache(model: Llama, num_blocks: int, block_size: int, dtype: str, device: str) -> KVCache:
    config = model.config
    try:
        return rocmforge.KVCache(
            config.num_layers,
            num_blocks,
            config.num_kv_heads,
            config.head_dim,
            block_size=block_size,
            dtype=dtype,
            device=device,
        )
    except (ValueError, MemoryError) as error:
        raise CommandError(f"the cache does not take this model: {error}") from error


def _choose(logits: Matrix, temperature: float, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    cumulative = np.exp(scaled).cumsum()
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
