"""Plain Python models of the metadata: what the structures must answer, said as simply as can be.

A model never chooses a block, as that is the library's business: it is told which were given
(`took`, `appended`) and objects to those that the rules forbid. What a call must refuse is asked
before it (`..._error`), so that a new rule of a state machine is a method of the model, or two.
"""

from collections import Counter
from dataclasses import dataclass, field

from rocmforge.errors import InvalidBlockError, OutOfBlocksError, UnknownSequenceError


class PageTableModel:
    """A dictionary of lists."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.blocks = {}

    def position(self, sequence_id, position):
        blocks = self.blocks.get(sequence_id, [])
        index, offset = divmod(position, self.block_size)
        return (blocks[index], offset) if index < len(blocks) else None

    def slot(self, sequence_id, position):
        if position < 0:
            return -1
        block, offset = self.position(sequence_id, position)
        return block * self.block_size + offset


class AllocatorModel:
    """Reference counts, and the kept blocks from the one released longest ago to the newest."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.references = Counter()
        self.kept = []
        self.evicted = []

    @property
    def free(self):
        return set(range(self.num_blocks)) - self.used - set(self.kept)

    @property
    def used(self):
        return {block for block, count in self.references.items() if count}

    def take_error(self, n):
        return OutOfBlocksError if n > self.num_blocks - len(self.used) else None

    def took(self, ids):
        """Free blocks in any order, then the oldest of the kept."""
        assert len(set(ids)) == len(ids)
        num_free = len(self.free)
        assert set(ids[:num_free]) <= self.free
        evicted = list(ids[num_free:])
        assert evicted == self.kept[: len(evicted)]
        del self.kept[: len(evicted)]
        self.evicted += [block for block in evicted if block not in self.evicted]
        self.references.update(ids)

    def ref_error(self, block):
        known = block in self.kept or self.references[block] > 0
        return None if known else InvalidBlockError

    def ref(self, block):
        if block in self.kept:
            self.kept.remove(block)
        self.references[block] += 1

    def release_error(self, ids):
        held = all(self.references[block] > 0 for block in ids)
        return None if held and len(set(ids)) == len(ids) else InvalidBlockError

    def release(self, ids, keep=False):
        for block in ids:
            self.references[block] -= 1
            if keep and not self.references[block]:
                self.kept.append(block)


@dataclass
class SequenceModel:
    """`version` changes when a batch made before it can no longer be written or committed."""

    version: int
    blocks: list = field(default_factory=list)
    length: int = 0
    committed: int = 0


@dataclass
class BatchModel:
    """`items` are (sequence id, its version, tokens before, new tokens)."""

    items: list
    committed: bool = False


class ManagerModel:
    """Sequences that own lists of blocks; a block lives as long as a list names it."""

    def __init__(self, num_blocks, block_size, max_sequences=None, max_seq_len=None):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_sequences = float("inf") if max_sequences is None else max_sequences
        self.max_seq_len = float("inf") if max_seq_len is None else max_seq_len
        self.sequences = {}
        self.versions = 0

    @property
    def holders(self):
        return Counter(block for s in self.sequences.values() for block in s.blocks)

    @property
    def free(self):
        return set(range(self.num_blocks)) - set(self.holders)

    def new_version(self):
        self.versions += 1
        return self.versions

    # ---- sequences ----

    def add_error(self, sequence_id, parent=None):
        if parent is not None and parent not in self.sequences:
            return UnknownSequenceError
        full = len(self.sequences) >= self.max_sequences
        return ValueError if full or sequence_id in self.sequences else None

    def add(self, sequence_id):
        self.sequences[sequence_id] = SequenceModel(self.new_version())

    def fork(self, parent, child):
        of = self.sequences[parent]
        self.sequences[child] = SequenceModel(
            self.new_version(), list(of.blocks), of.length, of.committed
        )

    def known_error(self, sequence_id):
        return None if sequence_id in self.sequences else UnknownSequenceError

    def remove(self, sequence_id):
        del self.sequences[sequence_id]

    # ---- steps ----

    def copied(self, ids):
        """Of the sequences of a batch, those whose next token goes to a block others hold too."""
        holders, copied = self.holders, []
        for sequence_id in ids:
            sequence = self.sequences[sequence_id]
            index, offset = divmod(sequence.length, self.block_size)
            if offset and holders[sequence.blocks[index]] > 1:
                holders[sequence.blocks[index]] -= 1
                copied.append(sequence_id)
        return copied

    def num_new_blocks(self, sequence_id, num_tokens):
        sequence = self.sequences[sequence_id]
        return -(-(sequence.length + num_tokens) // self.block_size) - len(sequence.blocks)

    def append_error(self, ids, counts):
        for i, (sequence_id, num_tokens) in enumerate(zip(ids, counts, strict=True)):
            if sequence_id not in self.sequences:
                return UnknownSequenceError
            if sequence_id in ids[:i]:
                return ValueError
            if self.sequences[sequence_id].length + num_tokens > self.max_seq_len:
                return ValueError
        needed = len(self.copied(ids)) + sum(map(self.num_new_blocks, ids, counts))
        return OutOfBlocksError if needed > len(self.free) else None

    def appended(self, ids, counts, blocks, copies):
        """Take over an append: the lists of blocks, and the (source, destination) copies."""
        free, copied, given, expected_copies = self.free, self.copied(ids), [], []
        items = []
        for sequence_id, num_tokens, now in zip(ids, counts, blocks, strict=True):
            sequence = self.sequences[sequence_id]
            kept = len(sequence.blocks)
            assert len(now) == kept + self.num_new_blocks(sequence_id, num_tokens)
            given += now[kept:]
            before = list(sequence.blocks)
            if sequence_id in copied:
                last = sequence.length // self.block_size
                expected_copies.append((before[last], now[last]))
                given.append(now[last])
                before[last] = now[last]
                if sequence.committed < sequence.length:
                    sequence.version = self.new_version()
            assert now[:kept] == before
            items.append((sequence_id, sequence.version, sequence.length, num_tokens))
            sequence.blocks = list(now)
            sequence.length += num_tokens
        assert copies == expected_copies
        assert len(set(given)) == len(given)
        assert set(given) <= free
        return BatchModel(items)

    def commit_error(self, batch):
        for sequence_id, version, start, _ in batch.items:
            sequence = self.sequences.get(sequence_id)
            if sequence is None or sequence.version != version or sequence.committed != start:
                return ValueError
        return ValueError if batch.committed else None

    def commit(self, batch):
        batch.committed = True
        for sequence_id, _, start, num_tokens in batch.items:
            self.sequences[sequence_id].committed = start + num_tokens
