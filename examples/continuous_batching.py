"""Continuous batching in a hundred lines: requests join and leave at any step, as room permits.

python examples/continuous_batching.py
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from rocmforge import Batch, KVCache

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM = 500, 64, 4, 2, 16
BUDGET = 48  # tokens a step: long prompts are computed in chunks beside what is decoding


@dataclass
class Request:
    """A prompt that asks for text up to a length."""

    number: int
    tokens: list[int]  # the prompt, and behind it what is generated
    max_length: int
    preemptions: int = 0


class Model:
    """One layer of a transformer with random weights: enough to tell right from wrong."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shapes = [(VOCABULARY, WIDTH), (WIDTH, HEADS * DIM), (WIDTH, 2 * KV_HEADS * DIM)]
        self.embed, self.q, self.kv = (rng.standard_normal(s).astype(np.float32) for s in shapes)

    def next_tokens(self, cache: KVCache, batch: Batch, tokens: list[int]) -> list[int]:
        """Compute a batch, and give the most likely token behind each of its sequences."""
        x = self.embed[tokens] + 0.1 * np.sin(batch.positions)[:, None].astype(np.float32)
        key, value = (x @ self.kv).reshape(-1, 2, KV_HEADS, DIM).swapaxes(0, 1)
        cache.write(0, key, value, batch)  # the only layer: this commits the batch
        out = cache.attend(0, (x @ self.q).reshape(-1, HEADS, DIM), batch)
        last = out.reshape(-1, WIDTH)[batch.cu_seqlens_q[1:] - 1]
        return (last @ self.embed.T).argmax(axis=1).tolist()


class Engine:
    """First come, first served; who came last gives way when blocks run out."""

    def __init__(self, num_blocks: int) -> None:
        self.model = Model()
        self.cache = KVCache(1, num_blocks, KV_HEADS, DIM, dtype="float32", block_size=8,
                             device="cpu", watermark=2)  # fmt: skip
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def schedule(self) -> dict[int, int]:
        """Tokens to compute now, by sequence."""
        counts: dict[int, int] = {}
        fits = self.cache.can_append
        for request in list(self.running):
            missing = len(request.tokens) - self.cache.seq_len(request.number)
            missing = min(missing, BUDGET - sum(counts.values()))
            while missing and not fits([*counts, request.number], [*counts.values(), missing]):
                last = self.running.pop()
                self.cache.free(last.number)  # its blocks stay cached until somebody takes them
                self.waiting.appendleft(last)
                last.preemptions += 1
                if last is request:
                    return counts
            if missing:
                counts[request.number] = missing
            if request is self.running[-1]:
                break
        while self.waiting and sum(counts.values()) < BUDGET:
            request = self.waiting[0]
            if not self.cache.can_add(request.tokens):
                break
            found = self.cache.add_sequence(request.number, request.tokens)
            missing = min(len(request.tokens) - found, BUDGET - sum(counts.values()))
            if not fits([*counts, request.number], [*counts.values(), missing]):
                self.cache.free(request.number)
                break
            self.running.append(self.waiting.popleft())
            counts[request.number] = missing
        return counts

    def step(self) -> list[Request]:
        """Compute one batch, and give the requests that end with it."""
        counts = self.schedule()
        active = [request for request in self.running if request.number in counts]
        tokens: list[int] = []
        for request in active:
            start = self.cache.seq_len(request.number)
            tokens += request.tokens[start : start + counts[request.number]]
        batch = self.cache.append([r.number for r in active], list(counts.values()), tokens)
        sampled = self.model.next_tokens(self.cache, batch, tokens)
        for request, token in zip(active, sampled, strict=True):
            if self.cache.seq_len(request.number) == len(request.tokens):  # the prompt is done
                request.tokens.append(token)
        ended = [request for request in active if len(request.tokens) == request.max_length]
        self.cache.free([request.number for request in ended])
        self.running = [request for request in self.running if request not in ended]
        return ended


def requests() -> list[Request]:
    """Thirty prompts of 10 to 90 tokens, two thirds of them behind the same instructions."""
    rng = np.random.default_rng(1)
    system = rng.integers(0, VOCABULARY, 40).tolist()
    prompts = [rng.integers(0, VOCABULARY, rng.integers(10, 50)).tolist() for _ in range(30)]
    prompts = [system + prompt if i % 3 else prompt for i, prompt in enumerate(prompts)]
    return [Request(i, prompt, len(prompt) + 20 + i) for i, prompt in enumerate(prompts)]


engine, arriving, ended, steps = Engine(num_blocks=60), deque(requests()), [], 0
while arriving or engine.waiting or engine.running:
    if arriving and steps % 2 == 0:  # one more request every other step
        engine.waiting.append(arriving.popleft())
    ended += engine.step()
    steps += 1
for request in requests():  # the same alone, in an engine with room for everything
    alone = Engine(num_blocks=1000)
    alone.waiting.append(request)
    while alone.waiting or alone.running:
        alone.step()
    assert request.tokens == next(r.tokens for r in ended if r.number == request.number)
print(f"{len(ended)} requests in {steps} steps, each with the tokens that it gets alone")
print(f"{sum(r.preemptions for r in ended)} times one gave way and went on later")
print(f"{engine.cache.stats().hit_rate:.0%} of what was admitted was found in the cache")
print(f"all done: {engine.cache.num_free_blocks} of {engine.cache.num_blocks} blocks can be had")
