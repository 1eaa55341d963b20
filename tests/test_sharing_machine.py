"""Random calls on a `KVCacheManager` with everything turned on, beside `SharingModel`.

After each step the manager agrees with the model and passes `check_integrity`, and every committed
position of every sequence holds what the forward pass computed for it: shared, copied, or own.
"""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from metadata_state import raises_unchanged
from rocmforge import KVCacheManager, LayerGroup
from rocmforge.errors import OutOfBlocksError
from sharing_model import SharingModel

IDS = range(8)
SALTS = [None, None, None, b"a", "a", b"b", "", b"\xff"]
DOCUMENTS = [[0] * 24, [0] * 6 + [1] * 18, [0, 1] * 12, [1, 0, 0] * 8]

sequence_ids = st.sampled_from(IDS)
salts = st.sampled_from(SALTS)
choices = st.integers(0, 99)
prompts = st.builds(
    lambda document, n, tail: document[:n] + tail,
    st.sampled_from(DOCUMENTS),
    st.integers(0, 20),
    st.lists(st.integers(0, 2), max_size=2),
)


def key(salt):
    return salt.encode() if isinstance(salt, str) else salt


class SharingMachine(RuleBasedStateMachine):
    @initialize(
        sizes=st.lists(
            st.tuples(st.integers(3, 24), st.sampled_from([None, None, 1, 3, 6])),
            min_size=1,
            max_size=3,
        ),
        block_size=st.sampled_from([1, 2, 4, 4]),
        ratio=st.sampled_from([1, 1, 2]),
        watermark=st.sampled_from([0, 0, 2]),
        max_pinned_blocks=st.integers(0, 12),
        prefix_caching=st.sampled_from([True] * 7 + [False]),
        colliding=st.booleans(),
    )
    def create(
        self,
        sizes,
        block_size,
        ratio,
        watermark,
        max_pinned_blocks,
        prefix_caching,
        colliding,
    ):
        if {window for _, window in sizes} == {1}:
            sizes[0] = sizes[0][0], None  # else a prefix would need no block at all to be a hit
        self.ratio = ratio if block_size % ratio == 0 else 1
        self.manager = KVCacheManager(
            groups=[LayerGroup(n, window) for n, window in sizes],
            block_size=block_size,
            kernel_block_size=block_size // self.ratio,
            watermark=watermark,
            max_pinned_blocks=max_pinned_blocks,
            prefix_caching=prefix_caching,
        )
        if colliding:
            self.manager._constant_hash()
        self.model = SharingModel(sizes, block_size, watermark, max_pinned_blocks, prefix_caching)
        self.tables = [{} for _ in sizes]  # as a device would hold them: updated by deltas alone
        self.steps = []
        self.spare = None  # a batch that is given back

    def choose(self, choice):
        """Mostly a sequence that is there, else any."""
        known = sorted(self.model.sequences)
        return known[choice % len(known)] if known and choice < 90 else choice % len(IDS)

    def expect(self, error, call):
        """Run a call that must raise `error` and change nothing; None: it must succeed."""
        if error is None:
            return call()
        with raises_unchanged(self.manager, error):
            call()
        return None

    # ---- prompts ----

    @rule(
        sequence_id=sequence_ids, tokens=prompts, salt=salts, priority=st.sampled_from([0, 0, 3, 7])
    )
    def add_sequence(self, sequence_id, tokens, salt, priority):
        manager, model = self.manager, self.model
        expected = model.found(tokens, key(salt))
        assert manager.match_prefix(tokens, salt) == expected * model.block_size
        error = model.add_error(sequence_id)
        found = self.expect(
            error, lambda: manager.add_sequence(sequence_id, tokens, salt, priority=priority)
        )
        if error is None:
            assert found == model.add(sequence_id, tokens, key(salt), priority)

    @rule(sequence_id=sequence_ids)
    def add_sequence_without_tokens(self, sequence_id):
        error = self.model.add_error(sequence_id)
        self.expect(error, lambda: self.manager.add_sequence(sequence_id))
        if error is None:
            self.model.add(sequence_id, None, None, 0)

    @rule(sequence_id=sequence_ids, tokens=prompts, salt=salts, finish=st.booleans())
    def serve(self, sequence_id, tokens, salt, finish):
        """What an engine does most: a prompt, computed and committed; perhaps that was all."""
        if sequence_id in self.model.sequences:
            self.free([sequence_id])
        self.add_sequence(sequence_id, tokens, salt, 0)
        rest = len(tokens) - self.model.sequences[sequence_id].length
        if rest:
            self.append([sequence_id], [rest], None, write=True)
            self.commit(0)
        if finish:
            self.free([sequence_id])

    @rule(tokens=prompts, salt=salts)
    def pin(self, tokens, salt):
        error = self.model.pin_error(tokens, key(salt))
        pinned = self.expect(error, lambda: self.manager.pin(tokens, salt))
        if error is None:
            assert pinned == self.model.pin(tokens, key(salt))

    @rule(tokens=prompts, salt=salts)
    def unpin(self, tokens, salt):
        error = None if self.model.pinned(tokens, key(salt)) else ValueError
        unpinned = self.expect(error, lambda: self.manager.unpin(tokens, salt))
        if error is None:
            assert unpinned == self.model.unpin(tokens, key(salt))

    @rule(often=st.integers(0, 9))
    def reset_prefix_cache(self, often):
        if often == 0:
            assert self.manager.reset_prefix_cache() == self.model.reset()

    # ---- sequences ----

    @rule(choice=choices, child=sequence_ids)
    def fork(self, choice, child):
        parent = self.choose(choice)
        error = self.model.fork_error(parent, child)
        self.expect(error, lambda: self.manager.fork(parent, child))
        if error is None:
            self.model.fork(parent, child)

    def free(self, ids):
        error = self.model.free_error(ids)
        self.expect(error, lambda: self.manager.free(ids))
        if error is None:
            self.model.free(ids)

    @rule(some=st.lists(choices, max_size=3))
    def free_some(self, some):
        self.free([self.choose(choice) for choice in some])

    @rule(choice=choices, back=st.integers(-1, 9))
    def truncate(self, choice, back):
        sequence_id = self.choose(choice)
        sequence = self.model.sequences.get(sequence_id)
        length = max(0, sequence.length - back) if sequence else 0
        error = self.model.truncate_error(sequence_id, length)
        self.expect(error, lambda: self.manager.truncate(sequence_id, length))
        if error is None:
            self.model.truncate(sequence_id, length)

    # ---- steps ----

    def append(self, ids, counts, tokens, write):
        manager, model = self.manager, self.model
        error = model.append_error(ids, counts, tokens)
        if error in (None, OutOfBlocksError):
            without = model.append_error(ids, counts)
            assert manager.can_append(ids, counts) is (without is None)
        out, self.spare = self.spare, None
        batch = self.expect(error, lambda: manager.append(ids, counts, tokens, out=out))
        if error is not None:
            return
        now = [
            [[None if b == -1 else b for b in group.page_table.block_ids(i).tolist()] for i in ids]
            for group in manager.groups
        ]
        copies = [self.whole_blocks(part.copies.tolist()) for part in batch.groups]
        step = model.appended(ids, counts, tokens, now, copies)
        self.check_batch(batch, step)
        if write:
            model.memory.write(step)
            step.written = True
        self.steps = [(batch, step), *self.steps[:5]]

    def whole_blocks(self, copies):
        """Copies of blocks, of those of kernel blocks."""
        r = self.ratio
        blocks = [(source // r, destination // r) for source, destination in copies[::r]]
        assert copies == [[s * r + k, d * r + k] for s, d in blocks for k in range(r)]
        return blocks

    def check_batch(self, batch, step):
        model, r = self.model, self.ratio
        sequences = [model.sequences[i] for i, *_ in step.items]
        assert batch.seq_lens.tolist() == [s.length for s in sequences]
        assert batch.positions.tolist() == [
            p for _, _, start, n in step.items for p in range(start, start + n)
        ]
        page = model.block_size // r
        for g, part in enumerate(batch.groups):
            assert part.slot_mapping.tolist() == step.slots[g]
            for row, column, block in part.table_delta.tolist():
                self.tables[g][row, column] = block
            kernel_blocks = [
                [-1 if b is None else b * r + k for b in s.blocks[g] for k in range(r)]
                for s in sequences
            ]
            for row, expected, s in zip(batch.rows.tolist(), kernel_blocks, sequences, strict=True):
                assert part.block_table[row, : len(expected)].tolist() == expected
                # released entries stay in the device's table; nobody looks at them
                for column in range(model.groups[g].first_needed(s.length) * r, len(expected)):
                    assert self.tables[g][row, column] == expected[column]
            pages = [-(-s.length // page) for s in sequences]
            assert part.kv_indptr.tolist() == [0, *np.cumsum(pages, dtype=int).tolist()]
            assert part.kv_indices.tolist() == [
                b for row, n in zip(kernel_blocks, pages, strict=True) for b in row[:n]
            ]
            assert part.kv_last_page_len.tolist() == [(s.length - 1) % page + 1 for s in sequences]
            if g == 0:
                whole = [start // page for _, _, start, _ in step.items]
                same = [len(set(column)) == 1 for column in zip(*kernel_blocks, strict=False)]
                common = (same.index(False) if False in same else len(same)) if same else 0
                assert batch.num_common_blocks == min([common, *whole])

    @rule(
        data=st.data(),
        number=st.integers(1, 4),
        tell=st.booleans(),
        write=st.sampled_from([True, True, False]),
    )
    def step(self, data, number, tell, write):
        """Some tokens of some sequences. Not written at once: the step may fail, and never be."""
        ids = data.draw(st.permutations(sorted(self.model.sequences)))[:number]
        counts = data.draw(st.lists(st.integers(1, 7), min_size=len(ids), max_size=len(ids)))
        tokens = None
        if tell:
            tokens = []
            for sequence_id, n in zip(ids, counts, strict=True):
                sequence = self.model.sequences[sequence_id]
                known = sequence.known[sequence.length :][:n]
                tokens += known + [n % 2 for n in range(n - len(known))]
        self.append(ids, counts, tokens, write)

    @rule(choice=choices, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def step_of_any(self, choice, tokens):
        """Tokens that may contradict what is known, of a sequence that may not be there."""
        self.append([self.choose(choice)], [len(tokens)], tokens, write=True)

    @rule(age=st.integers(0, 5))
    def commit(self, age):
        for batch, step in self.steps[age : age + 1]:
            error = self.model.commit_error(step)
            if error is None and not step.written:
                self.model.memory.write(step)
                step.written = True
            self.expect(error, lambda batch=batch: self.manager.commit(batch))
            if error is None:
                self.model.commit(step)
            assert batch.committed is step.committed

    @rule()
    def commit_all(self):
        for age in reversed(range(len(self.steps))):
            self.commit(age)

    @rule()
    def give_back(self):
        if self.steps:
            self.spare = self.steps.pop()[0]

    # ---- always ----

    @invariant()
    def agrees(self):
        manager, model = self.manager, self.model
        manager.check_integrity()
        assert len(manager) == len(model.sequences)
        for sequence_id, sequence in model.sequences.items():
            assert manager.seq_len(sequence_id) == sequence.length
            assert manager.committed_len(sequence_id) == sequence.committed
        for g, group in enumerate(model.groups):
            face = manager.groups[g]
            for sequence_id, sequence in model.sequences.items():
                blocks = [-1 if block is None else block for block in sequence.blocks[g]]
                assert face.page_table.block_ids(sequence_id).tolist() == blocks
            for block in range(group.num_blocks):
                assert face.allocator.get_block(block).ref_count == group.references[block]
            assert face.allocator.num_kept == group.num_kept
        stats = manager.stats()
        assert stats.free_blocks == sum(group.available for group in model.groups)
        assert stats.pinned_blocks == sum(
            count > 0 for group in model.groups for count in group.pins.values()
        )

    @invariant()
    def memory_is_right(self):
        """No sequence's committed keys and values were ever overwritten, or not copied."""
        model = self.model
        for sequence in model.sequences.values():
            for cells, blocks in zip(model.memory.cells, sequence.blocks, strict=True):
                for p in range(sequence.committed):
                    block = blocks[p // model.block_size]
                    if block is not None:
                        slot = block * model.block_size + p % model.block_size
                        assert cells[slot] == sequence.cells[p]


TestSharing = SharingMachine.TestCase
TestSharing.settings = settings(
    max_examples=4 * settings().max_examples, suppress_health_check=list(HealthCheck)
)
