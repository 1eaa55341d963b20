"""Random traffic on a `KVCache`, with keys and values that say which token they are of.

What is written for a token depends on all tokens up to it, so that a block found by the wrong
prefix or moved to the wrong place is seen by `check`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rocmforge import Batch, KVCache
from rocmforge.errors import OutOfBlocksError
from traffic import Traffic


def contents(cache: KVCache, tokens: list[int], layer: int) -> np.ndarray:
    """What the key of each token is, float32 ``[num_tokens]``: a hash of the tokens up to it."""
    found, state = np.empty(len(tokens), np.float32), layer + 1
    for i, token in enumerate(tokens):
        state = (state * 31 + token + 7) % 2039
        found[i] = state
    return found


class CacheTraffic(Traffic):
    """Keeps what each sequence's tokens are, and writes layer by layer."""

    def __init__(self, cache: KVCache, *arguments: Any, **options: Any) -> None:
        super().__init__(cache, *arguments, **options)
        self.cache = cache
        self.tokens: dict[int, list[int]] = {}

    def add(self) -> Any:
        if len(self.alive) >= self.max_alive:
            return self.free()
        self.next_id += 1
        prompt = self.prompt()
        salt = self.salt()
        found = self.cache.add_sequence(self.next_id, prompt, salt)
        self.alive.append(self.next_id)
        # of another salt's tokens the contents are others, too
        self.tokens[self.next_id] = self.seeded(salt) + prompt
        return found

    @staticmethod
    def seeded(salt: str | None) -> list[int]:
        return [0 if salt is None else ord(salt)]

    def append(self) -> Any:
        if not self.alive:
            return None
        ids = self.random.sample(self.alive, self.random.randint(1, min(3, len(self.alive))))
        counts, tokens = [], []
        for sequence in ids:
            count = self.random.choice([1, 2, 5, 17])
            length, known = self.cache.seq_len(sequence), self.tokens[sequence]
            new = [self.random.randrange(5) for _ in range(max(0, length + count + 1 - len(known)))]
            counts.append(count)
            tokens.append((known + new)[length + 1 : length + 1 + count])
        batch = self.cache.append(ids, counts, [t for some in tokens for t in some])
        for sequence, some in zip(ids, tokens, strict=True):
            known = self.tokens[sequence]
            begin = self.cache.seq_len(sequence) - len(some) + 1
            known[begin : begin + len(some)] = some
        self.wrote(batch)
        return batch.seq_lens.tolist()

    def suspend_and_resume(self) -> None:
        """One sequence, which is gone where its blocks were taken meanwhile."""
        sequence = self.pick()
        buffer = self.cache.suspend(sequence)
        try:
            self.cache.resume(sequence, buffer)
        except OutOfBlocksError:
            self.alive.remove(sequence)

    def wrote(self, batch: Batch) -> None:
        cache = self.cache
        if self.random.random() < 0.1:  # the step failed: its tokens are taken back
            for sequence in batch.sequence_ids.tolist():
                keep = cache.committed_len(sequence)
                cache.truncate(sequence, keep)
                del self.tokens[sequence][keep + 1 :]
            return
        for layer in range(cache.num_layers):
            values = []
            for i, sequence in enumerate(batch.sequence_ids.tolist()):
                end = int(batch.seq_lens[i])
                count = int(batch.cu_seqlens_q[i + 1] - batch.cu_seqlens_q[i])
                all_of_it = contents(cache, self.tokens[sequence][: end + 1], layer)
                values.append(all_of_it[end + 1 - count :])
            flat = np.concatenate(values)
            shape = (len(flat), cache.num_kv_heads, cache.head_dim)
            key = np.broadcast_to(flat[:, None, None], shape).astype(cache.dtype)
            cache.write(layer, key, -key, batch)

    def commit(self) -> Any:
        return None  # the last layer commits

    def fork(self) -> Any:
        parent = super().fork()
        if parent is not None:
            self.tokens[self.next_id] = list(self.tokens[parent])
        return parent

    def truncate(self) -> Any:
        if not self.alive:
            return None
        sequence = self.pick()
        committed = self.cache.committed_len(sequence)
        keep = self.random.choice([committed, self.random.randint(0, committed)])
        self.cache.truncate(sequence, keep)
        del self.tokens[sequence][keep + 1 :]
        return keep

    def check(self, cache: KVCache | None = None) -> int:
        """Compare every committed token of every sequence; how many there were."""
        cache = cache or self.cache
        seen = 0
        for sequence in self.alive:
            length = cache.committed_len(sequence)
            if not length:
                continue
            slots = cache.page_table.slot_mapping([sequence], [0], num_tokens=length)
            blocks, offsets = np.divmod(slots[slots >= 0], cache.block_size)
            for layer in range(cache.num_layers):
                expected = contents(cache, self.tokens[sequence][: length + 1], layer)[1:]
                expected = expected.astype(cache.dtype).astype(np.float32)[slots >= 0]
                keys, values = cache.k_cache(layer), cache.v_cache(layer)
                if cache.layout == "HND":
                    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
                found = keys[blocks, offsets].astype(np.float32)
                assert (found == expected[:, None, None]).all(), (sequence, layer)
                found = values[blocks, offsets].astype(np.float32)
                assert (found == -expected[:, None, None]).all(), (sequence, layer)
            seen += length
        return seen


def small_cache(seed: int, **options: Any) -> KVCache:
    rng = np.random.default_rng(seed)
    settings = {
        "num_layers": int(rng.integers(1, 4)),
        "num_blocks": int(rng.integers(20, 90)),
        "num_kv_heads": int(rng.integers(1, 3)),
        "head_dim": 8,
        "block_size": int(rng.choice([1, 4, 16])),
        "dtype": str(rng.choice(["float32", "bfloat16", "float16"])),
        "layout": str(rng.choice(["HND", "NHD"])),
    } | options
    return KVCache(**settings)


def random_cache(seed: int, steps: int = 150, **options: Any) -> tuple[KVCache, CacheTraffic]:
    cache = small_cache(seed, **options)
    traffic = CacheTraffic(cache, seed)
    traffic.run(steps)
    return cache, traffic
