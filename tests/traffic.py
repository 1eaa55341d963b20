"""Random traffic on a `KVCacheManager`: every kind of call, also those that must fail.

The same seed makes the same calls on a manager of the same state, and `log` keeps what they gave,
so that two managers can be compared by driving both. Subclasses add the data of a `KVCache`.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any, ClassVar

import numpy as np

from rocmforge import Batch, KVCacheManager
from rocmforge.errors import OutOfBlocksError, RocmForgeError

# What a call may raise that has good arguments but a bad moment.
REFUSALS = (OutOfBlocksError, ValueError)


class Traffic:
    """Calls on a manager, chosen by a random generator; `first_id` keeps threads apart."""

    WEIGHTS: ClassVar[dict[str, float]] = {
        "add": 10, "append": 20, "commit": 18, "fork": 5, "truncate": 5, "free": 7, "free_many": 1,
        "pin": 2, "unpin": 2, "match": 3, "reset": 0.2, "fail": 3, "ask": 1,
    }  # fmt: skip

    def __init__(
        self, manager: KVCacheManager, seed: int, first_id: int = 0, max_alive: int = 12
    ) -> None:
        self.manager, self.random = manager, Random(seed)
        self.next_id, self.max_alive = first_id, max_alive
        self.alive: list[int] = []
        self.pending: list[Batch] = []
        self.pinned: list[tuple[list[int], str | None]] = []
        self.log: list[Any] = []
        self.counts: Counter[str] = Counter()

    def run(self, steps: int) -> None:
        names, weights = list(self.WEIGHTS), list(self.WEIGHTS.values())
        for name in self.random.choices(names, weights, k=steps):
            try:
                self.log.append((name, getattr(self, name)()))
                self.counts[name] += 1
            except REFUSALS as error:
                if isinstance(error, ValueError) and isinstance(error, RocmForgeError):
                    raise  # a block id that is wrong, a state that is damaged
                self.log.append((name, type(error).__name__))
                self.counts["refused"] += 1

    def forget_batches(self) -> None:
        self.pending.clear()

    def pick(self) -> int:
        return self.random.choice(self.alive)

    def prompt(self) -> list[int]:
        """One of a few beginnings, and one of a few ends, so that prompts meet."""
        size = self.manager.block_size
        head = self.random.randrange(3)
        tokens = [head * 1000 + i for i in range(self.random.randrange(4) * size)]
        tail = self.random.randrange(3)
        return tokens + [tail * 7 + i for i in range(self.random.randrange(3 * size))]

    def salt(self) -> str | None:
        return self.random.choice([None, None, None, "a", "b"])

    # ---- calls ----

    def add(self) -> Any:
        if len(self.alive) >= self.max_alive:
            return self.free()
        self.next_id += 1
        priority = self.random.choice([0, 0, 0, 1, 7])
        found = self.manager.add_sequence(
            self.next_id, self.prompt(), self.salt(), priority=priority
        )
        self.alive.append(self.next_id)
        return found

    def append(self) -> Any:
        if not self.alive:
            return None
        ids = self.random.sample(self.alive, self.random.randint(1, min(4, len(self.alive))))
        counts = [self.random.choice([1, 1, 2, 5, 17]) for _ in ids]
        tokens = None
        if self.random.random() < 0.4:
            tokens = [self.random.randrange(5) for _ in range(sum(counts))]
        batch = self.manager.append(ids, counts, tokens)
        self.wrote(batch)
        self.pending.append(batch)
        del self.pending[:-4]
        return batch.slot_mapping.tolist(), batch.copies.tolist(), batch.seq_lens.tolist()

    def wrote(self, batch: Batch) -> None:
        """A batch was made: the place to write its keys and values."""

    def commit(self) -> Any:
        if self.pending:
            self.manager.commit(self.pending.pop(0))
        return None

    def fork(self) -> Any:
        if not self.alive or len(self.alive) >= self.max_alive:
            return None
        parent = self.pick()
        self.next_id += 1
        self.manager.fork(parent, self.next_id)
        self.alive.append(self.next_id)
        return parent

    def truncate(self) -> Any:
        if not self.alive:
            return None
        sequence = self.pick()
        length = self.manager.seq_len(sequence)
        keep = self.random.choice([length, length - 1, self.random.randint(0, length), 0])
        self.manager.truncate(sequence, max(keep, 0))
        return keep

    def free(self) -> Any:
        if not self.alive:
            return None
        sequence = self.alive.pop(self.random.randrange(len(self.alive)))
        self.manager.free(sequence)
        return sequence

    def free_many(self) -> Any:
        ids = self.random.sample(self.alive, len(self.alive) // 2)
        self.manager.free(ids)
        self.alive = [sequence for sequence in self.alive if sequence not in ids]
        return ids

    def pin(self) -> Any:
        prefix = self.prompt(), self.salt()
        found = self.manager.pin(*prefix)
        if found:
            self.pinned.append(prefix)
        return found

    def unpin(self) -> Any:
        if not self.pinned:
            return None
        return self.manager.unpin(*self.pinned.pop(self.random.randrange(len(self.pinned))))

    def match(self) -> Any:
        prompt, salt = self.prompt(), self.salt()
        return self.manager.match_prefix(prompt, salt), self.manager.can_add(prompt, salt)

    def reset(self) -> Any:
        self.pinned.clear()
        return self.manager.reset_prefix_cache()

    def fail(self) -> Any:
        """A call that is wrong whatever the state is."""
        wrong = self.random.choice(
            [
                lambda: self.manager.free(2**64 - 1),
                lambda: self.manager.append([2**64 - 1], 1),
                lambda: self.manager.fork(2**64 - 1, 0),
                lambda: self.manager.add_sequence(-1),
                lambda: self.manager.append([self.pick()] * 2 if self.alive else [-1], 1),
                lambda: self.manager.truncate(self.pick() if self.alive else -1, 2**40),
            ]
        )
        try:
            wrong()
        except (ValueError, KeyError) as error:
            return type(error).__name__
        raise AssertionError("a call with bad arguments succeeded")

    def ask(self) -> Any:
        stats = self.manager.stats()
        assert stats.used_blocks + stats.free_blocks == stats.num_blocks
        return stats.used_blocks, stats.num_tokens, stats.references, stats.evictions


def logical_state(manager: KVCacheManager) -> dict[str, Any]:
    """What a copy must have, too: all but where the block table is and what it shows already."""
    state: dict[str, Any] = {"stats": manager.stats()}
    for g, group in enumerate(manager.groups):
        pool = group.allocator
        state[f"pool {g}"] = [pool.get_block(i) for i in range(pool.num_blocks)]
        state[f"table {g}"] = {
            int(i): group.page_table.block_ids(i).tolist() for i in group.page_table.sequence_ids()
        }
    ids = manager.page_table.sequence_ids().tolist()
    state["lengths"] = {i: (manager.seq_len(i), manager.committed_len(i)) for i in ids}
    return state


def random_manager(seed: int, **options: Any) -> tuple[KVCacheManager, Traffic]:
    """A manager after some traffic, and the traffic without batches of before."""
    from rocmforge import LayerGroup

    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 3, 4, 16]))
    if rng.random() < 0.4:
        options["groups"] = [LayerGroup(90), LayerGroup(60, window=int(rng.integers(1, 3 * size)))]
    else:
        options["num_blocks"] = int(rng.integers(20, 120))
    if rng.random() < 0.3:
        options |= {"max_sequences": 16, "max_seq_len": 300}
    if rng.random() < 0.3:
        options["watermark"] = 2
    manager = KVCacheManager(block_size=size, **options)
    traffic = Traffic(manager, seed)
    traffic.run(int(rng.integers(0, 400)))
    traffic.forget_batches()
    return manager, traffic
