"""Events of cached blocks: a picture made of them is the cache, with hashes that others compute."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import numpy as np
import pytest

from rocmforge import KVCacheManager
from rocmforge.block_hashes import block_hashes
from rocmforge.events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from rocmforge.saved_state import dump
from traffic import Traffic, random_manager

pytest.importorskip("cbor2")


def run(manager: KVCacheManager, sequence: int, tokens: list[int], salt: Any = None) -> None:
    found = manager.add_sequence(sequence, tokens, salt)
    manager.commit(manager.append([sequence], len(tokens) - found))


def cached(manager: KVCacheManager, seed: str = "0") -> set[tuple[int, bytes]]:
    """(group, hash) of every cached block, by the tokens of its node's path."""
    numbers, arrays = dump(manager)
    parents, tokens = arrays["nodes.parents"].tolist(), arrays["nodes.tokens"]
    digests: list[bytes] = []
    found = set()
    for node, parent in enumerate(parents):
        if parent < 0:
            digests.append(b"")
            continue
        salt = numbers["salts"][parent] if not digests[parent] else None
        (digest,) = block_hashes(
            tokens[node],
            manager.block_size,
            seed=seed,
            salt=None if salt is None else bytes.fromhex(salt).decode(),
            parent=digests[parent] or None,
        )
        digests.append(digest)
        blocks = arrays["nodes.blocks"][node]
        found |= {(group, digest) for group, block in enumerate(blocks) if block >= 0}
    return found


class Picture:
    """What a router keeps: which blocks of which group are cached; it trusts no event."""

    def __init__(self, manager: KVCacheManager, seed: str = "0") -> None:
        self.blocks: set[tuple[int, bytes]] = set()
        self.size, self.seed = manager.block_size, seed

    def see(self, events: list[KVCacheEvent]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                assert event.block_size == self.size
                assert len(event.token_ids) == self.size * len(event.block_hashes)
                if event.parent_block_hash is not None:
                    assert event.block_hashes == block_hashes(
                        event.token_ids, self.size, parent=event.parent_block_hash
                    )
                new = {(event.group_idx, name) for name in event.block_hashes}
                assert not new & self.blocks
                self.blocks |= new  # type: ignore[arg-type]
            elif isinstance(event, BlockRemoved):
                gone = {(event.group_idx, name) for name in event.block_hashes}
                assert gone <= self.blocks
                self.blocks -= gone  # type: ignore[arg-type]
            else:
                assert type(event) is AllBlocksCleared
                self.blocks.clear()


@pytest.mark.parametrize("seed", range(30))
def test_a_picture_made_of_events_is_the_cache(seed: int) -> None:
    manager, traffic = random_manager(seed)
    manager.enable_events(seed="7")
    picture = Picture(manager)
    for _ in range(12):
        traffic.run(25)
        if seed % 2:
            picture.see(manager.take_events())
            assert picture.blocks == cached(manager, "7")
    picture.see(manager.take_events())
    assert picture.blocks == cached(manager, "7")
    assert manager.take_events() == []
    assert manager.lost_events == 0


def test_hashes_are_those_of_block_hashes() -> None:
    manager = KVCacheManager(32, block_size=4)
    manager.enable_events(medium="GPU")
    tokens = [0, 23, 24, 255, 256, 65535, 65536, 2**31 - 1, -1, -24, -25, -(2**31), 5]
    run(manager, 0, tokens)
    (event,) = manager.take_events()
    assert event == BlockStored(
        block_hashes(tokens, 4), None, tokens[:12], 4, medium="GPU", group_idx=0
    )
    run(manager, 1, [*tokens[:4], 1, 2, 3, 4, 5])
    (event,) = manager.take_events()
    assert event.parent_block_hash == block_hashes(tokens[:4], 4)[0]
    assert event.block_hashes == block_hashes([*tokens[:4], 1, 2, 3, 4], 4)[1:]
    for salt in ("tenant", "ü" * 300, ""):
        run(manager, 2, tokens, salt)
        (event,) = manager.take_events()
        assert event.block_hashes == block_hashes(tokens, 4, salt=salt)
        manager.free(2)
    run(manager, 3, tokens, b"\xff\xfe")  # no text: hashed as bytes
    (event,) = manager.take_events()
    import cbor2

    seed = hashlib.sha256(cbor2.dumps("0", canonical=True)).digest()
    first = cbor2.dumps((seed, tuple(tokens[:4]), (("cache_salt", b"\xff\xfe"),)), canonical=True)
    assert event.block_hashes[0] == hashlib.sha256(first).digest()


def test_evicted_overwritten_and_cleared() -> None:
    manager = KVCacheManager(4, block_size=4)
    manager.enable_events()
    run(manager, 0, list(range(9)))
    hashes = block_hashes(range(8), 4)
    manager.truncate(0, 6)  # withdraws the second block
    stored, removed = manager.take_events()
    assert (stored.block_hashes, removed) == (hashes, BlockRemoved(hashes[1:], group_idx=0))
    manager.free(0)
    run(manager, 1, [7] * 16)
    removed, stored = manager.take_events()
    assert removed == BlockRemoved(hashes[:1], group_idx=0)
    assert len(stored.block_hashes) == 4
    manager.reset_prefix_cache()
    assert manager.take_events() == [AllBlocksCleared()]


def test_the_oldest_are_lost_and_counted() -> None:
    manager = KVCacheManager(32, block_size=1)
    manager.enable_events(capacity=3)
    run(manager, 0, [1, 2, 3, 4, 5])
    assert manager.lost_events == 2
    (event,) = manager.take_events()
    assert event.token_ids == [3, 4, 5]
    assert event.block_hashes == block_hashes([1, 2, 3, 4, 5], 1)[2:]
    run(manager, 1, [9])
    assert [event.token_ids for event in manager.take_events()] == [[9]]
    assert manager.lost_events == 2
    manager.enable_events(capacity=3)  # anew: what is cached counts as stored
    assert manager.lost_events == 3
    manager.enable_events()
    assert sum(len(event.block_hashes) for event in manager.take_events()) == 6


def test_two_groups() -> None:
    from rocmforge import LayerGroup

    manager = KVCacheManager(block_size=4, groups=[LayerGroup(32), LayerGroup(32, window=4)])
    manager.enable_events()
    run(manager, 0, list(range(16)))
    events = manager.take_events()
    assert {event.group_idx for event in events} == {0, 1}
    picture = Picture(manager)
    picture.see(events)
    assert picture.blocks == cached(manager)


def test_nobody_asked() -> None:
    manager = KVCacheManager(8, block_size=4)
    run(manager, 0, [1] * 9)
    assert manager.take_events() == []
    assert manager.lost_events == 0


def test_a_copy_has_no_events_until_it_is_asked() -> None:
    manager = KVCacheManager(8, block_size=4)
    manager.enable_events()
    run(manager, 0, list(range(9)))
    other = pickle.loads(pickle.dumps(manager))
    assert other.take_events() == []
    other.enable_events()
    assert other.take_events() == manager.take_events()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity: expected 1"),
        ({"capacity": 2**31}, ValueError, "capacity: expected 1"),
        ({"capacity": 1.5}, TypeError, "capacity: expected an integer"),
        ({"seed": 0}, TypeError, "seed: expected a str"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    manager = KVCacheManager(8)
    with pytest.raises(error, match=message):
        manager.enable_events(**arguments)
    assert manager.take_events() == []
    with pytest.raises(ValueError, match="without prefix_caching"):
        KVCacheManager(8, prefix_caching=False).enable_events()


def test_the_same_events_by_the_same_calls() -> None:
    """Whatever the hash keys of the prefix index are."""

    def events() -> list[KVCacheEvent]:
        manager = KVCacheManager(40, block_size=4)
        manager.enable_events()
        Traffic(manager, 5).run(300)
        return manager.take_events()

    assert events() == events() != []


def test_many_tokens_a_block() -> None:
    manager = KVCacheManager(4, block_size=300)
    manager.enable_events()
    tokens = np.arange(70_000, 70_601, dtype=np.int32)
    run(manager, 0, tokens.tolist())
    (event,) = manager.take_events()
    assert event.block_hashes == block_hashes(tokens, 300)
