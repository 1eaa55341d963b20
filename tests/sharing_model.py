"""A plain Python model of `KVCacheManager` with everything: prefix cache, salts, windows, pins.

It keeps its own idea of what each block holds and of which block is found for which tokens, and it
is told only which blocks were given; it objects to those that the rules forbid. Beside it,
`Memory` plays the pools: what the forward pass would have written where. So a hit is compared
twice: with what the rules say, and with what the block really holds.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from rocmforge.errors import OutOfBlocksError, UnknownSequenceError

NUM_PRIORITIES = 8
NO_SPACE_YET = object()  # no token was given, so that the sequence belongs to no salt
WITHDRAWN = object()  # the prefix cache was reset while it ran: it publishes nothing


class Group:
    """Blocks of one pool. A content is (salt, all tokens up to the end of the block)."""

    def __init__(self, num_blocks, window, block_size):
        self.num_blocks, self.window, self.block_size = num_blocks, window, block_size
        self.references = Counter()  # sequences and pins
        self.pins = Counter()
        self.priority = {}
        self.kept = [[] for _ in range(NUM_PRIORITIES)]  # from the one released longest ago on
        self.block_of = {}  # content -> block
        self.content_of = {}  # block -> content

    @property
    def num_kept(self):
        return sum(map(len, self.kept))

    @property
    def available(self):
        return self.num_blocks - sum(count > 0 for count in self.references.values())

    def first_needed(self, length):
        """The first block that the token at position `length` looks at."""
        if self.window is None:
            return 0
        return max(0, length - self.window + 1) // self.block_size

    def took(self, blocks):
        """Blocks that hold nothing first, then of the lowest priority the one kept longest."""
        for block in blocks:
            assert self.references[block] == 0
            if self.available > self.num_kept:
                assert block not in self.content_of
            else:
                oldest = next(level for level in self.kept if level)
                assert block == oldest.pop(0)
                self.forget(block)
            self.references[block] = 1
            self.priority[block] = 0

    def forget(self, block):
        del self.block_of[self.content_of.pop(block)]

    def hold(self, block):
        for level in self.kept:
            if block in level:
                level.remove(block)
        self.references[block] += 1

    def drop(self, blocks, priority=0):
        for block in reversed(blocks):  # the tail is older than the head
            if block is not None:
                self.priority[block] = max(self.priority[block], priority)
                self.references[block] -= 1
                if self.references[block] == 0 and block in self.content_of:
                    self.kept[self.priority[block]].append(block)


@dataclass
class Sequence:
    """Token positions count from 0; `blocks` is a list for each group, None where released."""

    version: int
    space: object
    priority: int
    blocks: list
    known: list = field(default_factory=list)
    length: int = 0
    committed: int = 0
    published: int = 0  # blocks
    started: bool = False
    cells: list = field(default_factory=list)  # what its positions hold, as it believes


@dataclass
class Step:
    """A batch: (sequence id, its version, tokens before, new tokens) of each sequence."""

    items: list
    slots: list  # of each group
    cells: list  # what the forward pass computes for each token
    written: bool = False
    committed: bool = False


class Memory:
    """What the slots of each group's pool hold."""

    def __init__(self, num_groups):
        self.cells = [{} for _ in range(num_groups)]

    def write(self, step):
        for cells, slots in zip(self.cells, step.slots, strict=True):
            cells.update(zip(slots, step.cells, strict=True))

    def copy(self, g, source, destination, block_size):
        for offset in range(block_size):
            cell = self.cells[g].get(source * block_size + offset)
            self.cells[g][destination * block_size + offset] = cell


class SharingModel:
    def __init__(self, groups, block_size, watermark, max_pinned_blocks, prefix_caching=True):
        self.block_size, self.watermark = block_size, watermark
        self.max_pinned_blocks = max_pinned_blocks
        self.prefix_caching = prefix_caching
        self.groups = [Group(n, window, block_size) for n, window in groups]
        self.memory = Memory(len(groups))
        self.sequences = {}
        self.versions = 0
        self.weights = 0  # of the model: other ones after each reset
        self.unknown = 0

    def new_version(self):
        self.versions += 1
        return self.versions

    # ---- the prefix cache ----

    def cell(self, salt, tokens):
        """What the model computes at the last of these tokens."""
        return (self.weights, salt, tuple(tokens))

    def match(self, salt, tokens, limit):
        """Blocks of the longest prefix that every group has as far as it needs it."""
        best = 0
        for n in range(1, limit + 1):
            have = [
                [
                    (salt, tuple(tokens[: (i + 1) * self.block_size])) in group.block_of
                    for i in range(n)
                ]
                for group in self.groups
            ]
            if all(
                all(row[group.first_needed(n * self.block_size) :])
                for group, row in zip(self.groups, have, strict=True)
            ):
                best = n
        return best

    def found(self, tokens, salt):
        """A token is left to compute."""
        if not self.prefix_caching or not tokens:
            return 0
        return self.match(salt, tokens, (len(tokens) - 1) // self.block_size)

    def publish(self, sequence):
        if sequence.space is WITHDRAWN or sequence.space is NO_SPACE_YET:
            return
        full = min(sequence.committed, len(sequence.known)) // self.block_size
        for i in range(sequence.published, full):
            content = (sequence.space, tuple(sequence.known[: (i + 1) * self.block_size]))
            for group, blocks in zip(self.groups, sequence.blocks, strict=True):
                block = blocks[i]
                if block is None or content in group.block_of or block in group.content_of:
                    continue
                group.block_of[content] = block
                group.content_of[block] = content
            sequence.published = i + 1

    def prefix_blocks(self, tokens, salt, n):
        """(group, block) of the first n blocks of tokens, as far as windows look at them."""
        for i in range(n):
            content = (salt, tuple(tokens[: (i + 1) * self.block_size]))
            for group in self.groups:
                if i >= group.first_needed(n * self.block_size):
                    yield group, group.block_of[content]

    def pin_error(self, tokens, salt):
        n = self.match(salt, tokens, len(tokens) // self.block_size)
        new = sum(not g.pins[block] for g, block in self.prefix_blocks(tokens, salt, n))
        pinned = sum(count > 0 for g in self.groups for count in g.pins.values())
        return ValueError if pinned + new > self.max_pinned_blocks else None

    def pin(self, tokens, salt):
        n = self.match(salt, tokens, len(tokens) // self.block_size)
        for group, block in list(self.prefix_blocks(tokens, salt, n)):
            group.hold(block)
            group.pins[block] += 1
        return n * self.block_size

    def pinned(self, tokens, salt):
        """For each block of the tokens, the (group, block) that are pinned."""
        contents = [
            (salt, tuple(tokens[: (i + 1) * self.block_size]))
            for i in range(len(tokens) // self.block_size)
        ]
        found = [
            [(g, g.block_of[c]) for g in self.groups if g.pins[g.block_of.get(c)] > 0]
            for c in contents
        ]
        return [pairs for pairs in found if pairs]

    def unpin(self, tokens, salt):
        pinned = self.pinned(tokens, salt)
        for pairs in reversed(pinned):
            for group, block in pairs:
                group.pins[block] -= 1
                group.drop([block])
        return len(pinned) * self.block_size

    def reset(self):
        count = sum(len(group.content_of) for group in self.groups)
        for group in self.groups:
            group.references -= group.pins
            group.pins.clear()
            group.block_of.clear()
            group.content_of.clear()
            group.kept = [[] for _ in range(NUM_PRIORITIES)]
        for sequence in self.sequences.values():
            if sequence.length:
                sequence.space, sequence.published = WITHDRAWN, 0
        self.weights += 1
        return count

    # ---- sequences ----

    def add_error(self, sequence_id):
        return ValueError if sequence_id in self.sequences else None

    def add(self, sequence_id, tokens, salt, priority):
        n = self.found(tokens or [], salt)
        space = salt if self.prefix_caching and (tokens or salt is not None) else NO_SPACE_YET
        length = n * self.block_size
        blocks = [[None] * n for _ in self.groups]
        for i in range(n):
            content = (salt, tuple(tokens[: (i + 1) * self.block_size]))
            for group, own in zip(self.groups, blocks, strict=True):
                if i >= group.first_needed(length):
                    own[i] = group.block_of[content]
                    group.hold(own[i])
        self.sequences[sequence_id] = Sequence(
            self.new_version(),
            space,
            priority,
            blocks,
            known=list(tokens or []),
            length=length,
            committed=length,
            published=n,
            cells=[self.cell(salt, tokens[: p + 1]) for p in range(length)],
        )
        return length

    def fork_error(self, parent, child):
        if parent not in self.sequences:
            return UnknownSequenceError
        return ValueError if child in self.sequences else None

    def fork(self, parent, child):
        of = self.sequences[parent]
        for group, blocks in zip(self.groups, of.blocks, strict=True):
            for block in blocks:
                if block is not None:
                    group.hold(block)
        self.sequences[child] = replace(
            of,
            version=self.new_version(),
            blocks=[list(blocks) for blocks in of.blocks],
            known=list(of.known),
            cells=list(of.cells),
        )

    def free_error(self, ids):
        for i, sequence_id in enumerate(ids):
            if sequence_id not in self.sequences:
                return UnknownSequenceError
            if sequence_id in ids[:i]:
                return ValueError
        return None

    def free(self, ids):
        for sequence_id in ids:
            sequence = self.sequences.pop(sequence_id)
            for group, blocks in zip(self.groups, sequence.blocks, strict=True):
                group.drop(blocks, sequence.priority)

    def truncate_error(self, sequence_id, length):
        if sequence_id not in self.sequences:
            return UnknownSequenceError
        sequence = self.sequences[sequence_id]
        if length > sequence.length:
            return ValueError
        keep = -(-length // self.block_size)
        for group, blocks in zip(self.groups, sequence.blocks, strict=True):
            if length < sequence.length and None in blocks[group.first_needed(length) : keep]:
                return ValueError
        return None

    def truncate(self, sequence_id, length):
        sequence = self.sequences[sequence_id]
        if length == sequence.length:
            return
        keep = -(-length // self.block_size)
        for group, blocks in zip(self.groups, sequence.blocks, strict=True):
            for block in blocks[length // self.block_size :]:
                # what only this sequence holds and has published is withdrawn
                if group.references[block] == 1 and block in group.content_of:
                    group.forget(block)
            group.drop(blocks[keep:], sequence.priority)
            del blocks[keep:]
        sequence.published = min(sequence.published, length // self.block_size)
        sequence.length = length
        sequence.committed = min(sequence.committed, length)
        del sequence.known[length:]
        del sequence.cells[length:]
        sequence.version = self.new_version()

    # ---- steps ----

    def copied(self, group, blocks_of, ids):
        """Of the sequences of a batch, those whose next token goes to a block others hold too."""
        references, copied = Counter(group.references), []
        for sequence_id in ids:
            sequence = self.sequences[sequence_id]
            index, offset = divmod(sequence.length, self.block_size)
            if offset and references[blocks_of(sequence)[index]] > 1:
                references[blocks_of(sequence)[index]] -= 1
                copied.append(sequence_id)
        return copied

    def append_error(self, ids, counts, tokens=None):
        start = 0
        for i, (sequence_id, count) in enumerate(zip(ids, counts, strict=True)):
            if sequence_id not in self.sequences:
                return UnknownSequenceError
            sequence = self.sequences[sequence_id]
            if sequence_id in ids[:i]:
                return ValueError
            if tokens is not None:
                again = sequence.known[sequence.length :][:count]
                if again != tokens[start : start + len(again)]:
                    return ValueError
            start += count
        fresh = any(not self.sequences[i].started for i in ids)
        for g, group in enumerate(self.groups):
            needed = len(self.copied(group, lambda s, g=g: s.blocks[g], ids))
            for sequence_id, count in zip(ids, counts, strict=True):
                sequence = self.sequences[sequence_id]
                needed += -(-(sequence.length + count) // self.block_size)
                needed -= len(sequence.blocks[g])
            if needed and needed > group.available - (self.watermark if fresh else 0):
                return OutOfBlocksError
        return None

    def appended(self, ids, counts, tokens, now, copies):
        """Take over an append: each group's lists of blocks by sequence, and its copies."""
        touched = set()  # sequences that left a block with slots not yet committed
        for g, group in enumerate(self.groups):
            copied = self.copied(group, lambda s, g=g: s.blocks[g], ids)
            expected = []
            for sequence_id, count, blocks in zip(ids, counts, now[g], strict=True):
                sequence = self.sequences[sequence_id]
                before, own = len(sequence.blocks[g]), sequence.blocks[g]
                index = sequence.length // self.block_size
                if sequence_id in copied:
                    group.took([blocks[index]])
                    group.drop([own[index]])
                    expected.append((own[index], blocks[index]))
                    own[index] = blocks[index]
                    if sequence.committed < sequence.length:
                        touched.add(sequence_id)
                elif sequence.length % self.block_size and own[index] in group.content_of:
                    group.forget(own[index])  # what follows overwrites what it was known for
                assert blocks[:before] == own
                assert len(blocks) == -(-(sequence.length + count) // self.block_size)
                group.took(blocks[before:])
                sequence.blocks[g] = list(blocks)
            assert copies[g] == expected
            for source, destination in expected:
                self.memory.copy(g, source, destination, self.block_size)
        items, cells, slots = [], [], [[] for _ in self.groups]
        given = 0
        for sequence_id, count in zip(ids, counts, strict=True):
            sequence = self.sequences[sequence_id]
            if sequence_id in touched:
                sequence.version = self.new_version()
            start, end = sequence.length, sequence.length + count
            items.append((sequence_id, sequence.version, start, count))
            if tokens is not None:
                if sequence.space is NO_SPACE_YET and self.prefix_caching:
                    sequence.space = None
                known = len(sequence.known)
                if start <= known < end:
                    sequence.known += tokens[given + known - start : given + count]
                given += count
            for p in range(start, end):
                if p < len(sequence.known):
                    cell = self.cell(sequence.space, sequence.known[: p + 1])
                else:
                    self.unknown += 1
                    cell = ("unknown", self.unknown)
                sequence.cells.append(cell)
                cells.append(cell)
                for own, of_group in zip(slots, sequence.blocks, strict=True):
                    block = of_group[p // self.block_size]
                    own.append(block * self.block_size + p % self.block_size)
            sequence.length = end
            sequence.started = True
        return Step(items, slots, cells)

    def commit_error(self, step):
        for sequence_id, version, start, _ in step.items:
            sequence = self.sequences.get(sequence_id)
            if sequence is None or sequence.version != version or sequence.committed != start:
                return ValueError
        return ValueError if step.committed else None

    def commit(self, step):
        step.committed = True
        for sequence_id, _, start, count in step.items:
            sequence = self.sequences[sequence_id]
            sequence.committed = start + count
            self.publish(sequence)
            for group, blocks in zip(self.groups, sequence.blocks, strict=True):
                # a block's worth of tokens may be taken back by a truncate
                end = group.first_needed(max(0, sequence.committed - self.block_size))
                first = end
                while first > 0 and blocks[first - 1] is not None:
                    first -= 1
                group.drop(blocks[first:end], sequence.priority)
                blocks[first:end] = [None] * (end - first)
