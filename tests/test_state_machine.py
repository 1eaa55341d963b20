"""Random calls on PageTable, BlockAllocator and KVCacheManager beside plain Python models.

After each step the structure must agree with its model and pass `check_integrity`. How long the
search is, --hypothesis-profile says: short, normal or long.
"""

from contextlib import contextmanager

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from metadata_models import AllocatorModel, ManagerModel, PageTableModel
from metadata_state import raises_unchanged, state_of
from rocmforge import BlockAllocator, KVCacheManager, PageTable
from rocmforge.errors import UnknownSequenceError

# few, so that they meet again; of both halves; and what a free row's link could be mistaken for
IDS = [0, 1, 2, 3, 5, 8, 2**31, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
sequence_ids = st.sampled_from(IDS)
choices = st.integers(0, 99)


def choose(choice, known):
    """Mostly one of the known sequence ids, else any."""
    known = sorted(known)
    return known[choice % len(known)] if known and choice < 80 else IDS[choice % len(IDS)]


@contextmanager
def expecting(error, thing):
    """Run a call that must raise `error` and change nothing, or must succeed when it is None."""
    if error is None:
        yield
    else:
        with raises_unchanged(thing, error):
            yield


# ---- PageTable ----


class PageTableMachine(RuleBasedStateMachine):
    @initialize(block_size=st.sampled_from([1, 2, 7, 16]))
    def create(self, block_size):
        self.table, self.model = PageTable(block_size), PageTableModel(block_size)

    @rule(sequence_id=sequence_ids, block=st.integers(0, 2**31 - 1))
    def append_block(self, sequence_id, block):
        blocks = self.model.blocks.setdefault(sequence_id, [])
        assert self.table.append_block(sequence_id, block) == len(blocks)
        blocks.append(block)

    @rule(sequence_id=sequence_ids, ids=st.lists(st.integers(0, 99), max_size=40))
    def append_blocks(self, sequence_id, ids):
        blocks = self.model.blocks.setdefault(sequence_id, [])
        assert self.table.append_blocks(sequence_id, ids) == len(blocks)
        blocks.extend(ids)

    @rule(choice=choices, index=choices, block=st.integers(0, 99))
    def set_block(self, choice, index, block):
        sequence_id = choose(choice, self.model.blocks)
        blocks = self.model.blocks.get(sequence_id)
        index %= len(blocks or []) + 2
        error = UnknownSequenceError if blocks is None else ValueError
        with expecting(None if blocks and index < len(blocks) else error, self.table):
            self.table.set_block(sequence_id, index, block)
            blocks[index] = block

    @rule(choice=choices, keep=choices)
    def truncate(self, choice, keep):
        sequence_id = choose(choice, self.model.blocks)
        blocks = self.model.blocks.get(sequence_id)
        keep %= len(blocks or []) + 2
        error = UnknownSequenceError if blocks is None else ValueError
        possible = blocks is not None and keep <= len(blocks)
        with expecting(None if possible else error, self.table):
            assert self.table.truncate(sequence_id, keep).tolist() == blocks[keep:]
            del blocks[keep:]

    @rule(choice=choices)
    def remove_sequence(self, choice):
        sequence_id = choose(choice, self.model.blocks)
        was_there = self.model.blocks.pop(sequence_id, None) is not None
        assert self.table.remove_sequence(sequence_id) is was_there

    @rule(choice=choices, position=st.integers(0, 999))
    def get_block_for_position(self, choice, position):
        sequence_id = choose(choice, self.model.blocks)
        found = self.table.get_block_for_position(sequence_id, position)
        assert found == self.model.position(sequence_id, position)

    @rule(pairs=st.lists(st.tuples(sequence_ids, st.integers(-2, 300)), max_size=20))
    def slot_mapping(self, pairs):
        ids, positions = [i for i, _ in pairs], [p for _, p in pairs]
        error = None
        for i, position in pairs:
            if i not in self.model.blocks:
                error = UnknownSequenceError
            elif position >= 0 and self.model.position(i, position) is None:
                error = ValueError
            if error:
                break
        out = np.full(len(pairs), 77, np.int64)
        with expecting(error, self.table):
            slots = self.table.slot_mapping(ids, positions, out=out)
            assert slots.tolist() == [self.model.slot(i, position) for i, position in pairs]
        assert error is None or (out == 77).all()

    @rule(data=st.data())
    def slot_mapping_within_the_sequences(self, data):
        positions = [
            (sequence_id, position)
            for sequence_id, blocks in self.model.blocks.items()
            for position in range(len(blocks) * self.model.block_size)[:40]
        ]
        pairs = data.draw(st.lists(st.sampled_from(positions))) if positions else []
        slots = self.table.slot_mapping([i for i, _ in pairs], [p for _, p in pairs])
        assert slots.tolist() == [self.model.slot(i, position) for i, position in pairs]

    @rule()
    def block_table(self):
        blocks = self.model.blocks
        width = max(map(len, blocks.values()), default=0)
        dense = [ids + [-1] * (width - len(ids)) for ids in blocks.values()]
        assert self.table.block_table(blocks).tolist() == dense

    @rule()
    def go_on_with_a_copy(self):
        before = self.table
        self.table = before.copy()
        assert self.table == before
        before.append_block(IDS[0], 1)
        assert self.table != before

    @invariant()
    def agrees(self):
        self.table.check_integrity()
        assert state_of(self.table)["blocks"] == self.model.blocks
        assert len(self.table) == self.table.num_sequences() == len(self.model.blocks)
        for sequence_id in IDS:
            blocks = self.model.blocks.get(sequence_id)
            pairs = None if blocks is None else [(b, i) for i, b in enumerate(blocks)]
            assert self.table.get_sequence_blocks(sequence_id) == pairs
            assert (sequence_id in self.table) is (blocks is not None)


# ---- BlockAllocator ----

block_ids = st.integers(-1, 12)


class BlockAllocatorMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(0, 12))
    def create(self, num_blocks):
        self.allocator, self.model = BlockAllocator(num_blocks), AllocatorModel(num_blocks)

    @rule()
    def allocate_block(self):
        with expecting(self.model.take_error(1), self.allocator):
            self.model.took([self.allocator.allocate_block()])

    @rule(n=st.integers(0, 13))
    def allocate_blocks(self, n):
        with expecting(self.model.take_error(n), self.allocator):
            self.model.took(self.allocator.allocate_blocks(n).tolist())

    @rule(block=block_ids)
    def ref(self, block):
        with expecting(self.model.ref_error(block), self.allocator):
            self.allocator.ref(block)
            self.model.ref(block)

    @rule(block=block_ids, keep=st.booleans())
    def deallocate_block(self, block, keep):
        with expecting(self.model.release_error([block]), self.allocator):
            self.allocator.deallocate_block(block, keep=keep)
            self.model.release([block], keep)

    @rule(ids=st.lists(block_ids, max_size=5), keep=st.booleans())
    def deallocate_blocks(self, ids, keep):
        with expecting(self.model.release_error(ids), self.allocator):
            self.allocator.deallocate_blocks(ids, keep=keep)
            self.model.release(ids, keep)

    @rule(data=st.data(), keep=st.booleans())
    def deallocate_blocks_in_use(self, data, keep):
        ids = data.draw(st.permutations(sorted(self.model.used)))
        ids = ids[: data.draw(st.integers(0, len(ids)))]
        self.allocator.deallocate_blocks(ids, keep=keep)
        self.model.release(ids, keep)

    @rule()
    def take_evicted(self):
        assert self.allocator.take_evicted().tolist() == self.model.evicted
        self.model.evicted = []

    @invariant()
    def agrees(self):
        self.allocator.check_integrity()
        model = self.model
        assert self.allocator.get_free_count() == len(model.free)
        assert self.allocator.num_kept == len(model.kept)
        for i in range(model.num_blocks):
            block = self.allocator.get_block(i)
            assert (block.ref_count, block.is_free) == (model.references[i], i in model.free)


# ---- KVCacheManager ----


class KVCacheManagerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(0, 24),
        block_size=st.sampled_from([1, 2, 3, 4, 16]),
        max_sequences=st.none() | st.integers(1, 6),
        max_seq_len=st.none() | st.integers(1, 40),
    )
    def create(self, **arguments):
        self.manager, self.model = KVCacheManager(**arguments), ManagerModel(**arguments)
        fixed = arguments["max_sequences"] and arguments["max_seq_len"]
        self.batches = []
        self.fixed_table = self.manager.block_table if fixed else None

    @rule(sequence_id=sequence_ids)
    def add_sequence(self, sequence_id):
        with expecting(self.model.add_error(sequence_id), self.manager):
            self.manager.add_sequence(sequence_id)
            self.model.add(sequence_id)

    def fork_from(self, parent, child):
        with expecting(self.model.add_error(child, parent), self.manager):
            self.manager.fork(parent, child)
            self.model.fork(parent, child)

    @rule(choice=choices, child=sequence_ids)
    def fork(self, choice, child):
        self.fork_from(choose(choice, self.model.sequences), child)

    @rule(choice=choices, child=sequence_ids, count=st.integers(1, 3))
    def branch(self, choice, child, count):
        """As a beam search does: some tokens, a fork, then both go on."""
        parent = choose(choice, self.model.sequences)
        self.append_to_any([parent], count)
        self.fork_from(parent, child)
        self.append_to_any([parent, child], count)

    @rule(choice=choices)
    def free(self, choice):
        sequence_id = choose(choice, self.model.sequences)
        with expecting(self.model.known_error(sequence_id), self.manager):
            self.manager.free(sequence_id)
            self.model.remove(sequence_id)

    def append_to(self, ids, counts):
        batch = self.manager.append(ids, counts)
        blocks = [self.manager.page_table.block_ids(i).tolist() for i in ids]
        model = self.model.appended(ids, counts, blocks, [tuple(c) for c in batch.copies.tolist()])
        ends = [self.model.sequences[i].length for i in ids]
        assert batch.sequence_ids.tolist() == ids
        assert batch.seq_lens.tolist() == ends
        assert batch.cu_seqlens_q.tolist() == [0, *np.cumsum(counts, dtype=int).tolist()]
        positions = [p for end, n in zip(ends, counts, strict=True) for p in range(end - n, end)]
        assert batch.positions.tolist() == positions
        size = self.model.block_size
        flat = [b for b, n in zip(blocks, counts, strict=True) for _ in range(n)]
        slots = [b[p // size] * size + p % size for b, p in zip(flat, positions, strict=True)]
        assert batch.slot_mapping.tolist() == slots
        for row, ids_of_row in zip(batch.rows, blocks, strict=True):
            assert batch.block_table[row, : len(ids_of_row)].tolist() == ids_of_row
        self.batches = [*self.batches[-5:], (batch, model)]

    @rule(data=st.data(), number=st.integers(1, 6))
    def append(self, data, number):
        ids = data.draw(st.permutations(sorted(self.model.sequences)))[:number]
        counts = data.draw(st.lists(st.integers(1, 9), min_size=len(ids), max_size=len(ids)))
        with expecting(self.model.append_error(ids, counts), self.manager):
            self.append_to(ids, counts)

    @rule(ids=st.lists(sequence_ids, max_size=4), count=st.integers(1, 5))
    def append_to_any(self, ids, count):
        with expecting(self.model.append_error(ids, [count] * len(ids)), self.manager):
            self.append_to(ids, [count] * len(ids))

    @rule(age=st.integers(0, 5))
    def commit(self, age):
        for batch, model in self.batches[age : age + 1]:
            with expecting(self.model.commit_error(model), self.manager):
                self.manager.commit(batch)
                self.model.commit(model)
            assert batch.committed is model.committed

    @rule()
    def commit_all(self):
        for age in range(len(self.batches)):
            self.commit(age)

    @invariant()
    def agrees(self):
        manager, model = self.manager, self.model
        manager.check_integrity()
        sequences, holders = model.sequences, model.holders
        assert state_of(manager.page_table)["blocks"] == {i: s.blocks for i, s in sequences.items()}
        for sequence_id, sequence in sequences.items():
            assert manager.seq_len(sequence_id) == sequence.length
            assert manager.committed_len(sequence_id) == sequence.committed
        for block in range(model.num_blocks):
            assert manager.allocator.get_block(block).ref_count == holders[block]
        stats = manager.stats()
        assert stats.num_sequences == len(manager) == len(sequences)
        assert stats.num_tokens == sum(s.length for s in sequences.values())
        assert stats.free_blocks == manager.num_free_blocks == len(model.free)
        assert stats.used_blocks == len(holders)
        assert stats.shared_blocks == sum(count > 1 for count in holders.values())
        assert stats.references == holders.total()
        if self.fixed_table is not None:
            assert manager.block_table is self.fixed_table
            assert manager.table_epoch == 0


TestPageTable = PageTableMachine.TestCase
TestBlockAllocator = BlockAllocatorMachine.TestCase
TestKVCacheManager = KVCacheManagerMachine.TestCase
for case, times in ((TestPageTable, 1), (TestBlockAllocator, 1), (TestKVCacheManager, 2)):
    case.settings = settings(
        max_examples=times * settings().max_examples, suppress_health_check=list(HealthCheck)
    )
del case  # it would be collected once more
