"""Continuous batching in a hundred lines: requests join and leave at any step, as room permits.

python examples/continuous_batching.py
"""

import numpy as np

from rocmforge import Batch, KVCache

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM = 500, 64, 4, 2, 16
BUDGET = 48  # tokens a step: long prompts are computed in chunks beside what is decoding

# one layer of a transformer with random weights: enough to tell right from wrong
shapes = [(VOCABULARY, WIDTH), (WIDTH, HEADS * DIM), (WIDTH, 2 * KV_HEADS * DIM)]
EMBED, Q, KV = map(np.float32, map(np.random.default_rng(0).standard_normal, shapes))


def next_tokens(cache: KVCache, batch: Batch, tokens: list[int]) -> list[int]:
    """Compute a batch, and give the most likely token behind each of its sequences."""
    x = EMBED[tokens] + 0.1 * np.sin(batch.positions)[:, None].astype(np.float32)
    key, value = (x @ KV).reshape(-1, 2, KV_HEADS, DIM).swapaxes(0, 1)
    cache.write(0, key, value, batch)  # the only layer: this commits the batch
    out = cache.attend(0, (x @ Q).reshape(-1, HEADS, DIM), batch)
    last = out.reshape(-1, WIDTH)[batch.cu_seqlens_q[1:] - 1]
    return (last @ EMBED.T).argmax(axis=1).tolist()


class Engine:
    """First come, first served; who came last gives way when blocks run out."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = KVCache(
            1, num_blocks, KV_HEADS, DIM, dtype="float32", block_size=8, device="cpu", watermark=2
        )
        self.requests: list[int] = []  # in order; those who run have a sequence in the cache
        self.texts: dict[int, list[int]] = {}  # by request: the prompt, and what is generated
        self.lengths: dict[int, int] = {}  # that the texts shall have
        self.preemptions = 0

    def add(self, request: int, prompt: list[int], max_length: int) -> None:
        """Take a request; its number is that of its sequence in the cache."""
        self.requests.append(request)
        self.texts[request], self.lengths[request] = prompt.copy(), max_length

    def schedule(self) -> dict[int, int]:
        """How many tokens of which requests to compute now."""
        counts: dict[int, int] = {}
        for request in self.requests:
            if request not in self.cache:
                if not self.cache.can_add(self.texts[request]):
                    break
                self.cache.add_sequence(request, self.texts[request])  # finds what is cached of it
            missing = len(self.texts[request]) - self.cache.seq_len(request)
            counts[request] = min(missing, BUDGET - sum(counts.values()))
            while not self.cache.can_append(list(counts), list(counts.values())):
                last = next(r for r in reversed(self.requests) if r in self.cache)
                self.cache.free(last)  # its blocks stay cached until somebody takes them
                self.preemptions += 1
                if last == request:
                    del counts[request]
                    return counts
            if sum(counts.values()) == BUDGET:
                break
        return counts

    def step(self) -> None:
        """Compute one batch."""
        counts, tokens, length = self.schedule(), [], self.cache.seq_len
        for request, count in counts.items():
            tokens += self.texts[request][length(request) :][:count]
        batch = self.cache.append(list(counts), list(counts.values()), tokens)
        for request, token in zip(counts, next_tokens(self.cache, batch, tokens), strict=True):
            if length(request) == len(self.texts[request]):  # the prompt is done
                self.texts[request].append(token)
            if len(self.texts[request]) == self.lengths[request]:
                self.cache.free(request)
                self.requests.remove(request)


rng = np.random.default_rng(1)
system = rng.integers(0, VOCABULARY, 40).tolist()  # two thirds begin with the same instructions
prompts = [rng.integers(0, VOCABULARY, rng.integers(10, 50)).tolist() for _ in range(30)]
prompts = [system + prompt if i % 3 else prompt for i, prompt in enumerate(prompts)]
engine, steps = Engine(num_blocks=60), 0
while engine.requests or steps < 2 * len(prompts):
    i, rest = divmod(steps, 2)
    if i < len(prompts) and not rest:  # one more request every other step
        engine.add(i, prompts[i], len(prompts[i]) + 20 + i)
    engine.step()
    steps += 1
for i, prompt in enumerate(prompts):  # the same alone, in an engine with room for everything
    alone = Engine(num_blocks=1000)
    alone.add(i, prompt, engine.lengths[i])
    while alone.requests:
        alone.step()
    assert engine.texts[i] == alone.texts[i]
print(f"{len(prompts)} requests in {steps} steps, each with the tokens that it gets alone")
print(f"{engine.preemptions} times one gave way and went on later")
print(f"{engine.cache.stats().hit_rate:.0%} of what was admitted was found in the cache")
print(f"all done: {engine.cache.num_free_blocks} of {engine.cache.num_blocks} blocks can be had")
