"""What `rocmforge replay` must find, by other means: dictionaries, one LRU list, no library.

It takes a trace whose contents are as long as its blocks, and knows only the meaning of a replay as
the command's help and documentation give it.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass


class Block:
    def __init__(self):
        self.holders = 0
        self.content = None  # the path of contents that others find it by


@dataclass
class Counts:
    prompt_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    preemptions: int = 0
    rejected: int = 0
    steps: int = 0
    peak_blocks: int = 0


class Simulator:
    """Requests are (prompt tokens, output tokens, contents)."""

    def __init__(self, requests, num_blocks, block_size, max_running):
        self.requests, self.block_size, self.max_running = requests, block_size, max_running
        self.num_blocks = num_blocks
        self.unused = [Block() for _ in range(num_blocks)]
        self.kept = OrderedDict()  # blocks that nobody holds, the oldest first
        self.known = {}  # path of contents -> block
        self.held = {}  # request -> its blocks
        self.done = [0] * len(requests)  # tokens generated
        self.counts = Counts()

    def run(self):
        queue, running, first_time = deque(range(len(self.requests))), [], set(self.all)
        while queue or running:
            while queue and len(running) < self.max_running:
                if not self.admit(queue[0], first_time):
                    if running:
                        break
                    self.counts.rejected += 1
                    queue.popleft()
                    continue
                running.append(queue.popleft())
                self.end(running)  # one without output
            if not running:
                continue
            while running and not self.grow(running):
                youngest = running.pop()
                self.release(youngest)
                if running:
                    queue.appendleft(youngest)
                    self.counts.preemptions += 1
                else:
                    self.counts.rejected += 1
            for request in running:
                self.done[request] += 1
            self.counts.steps += 1
            self.see_use()
            self.end(running)
        return self.counts

    @property
    def all(self):
        return range(len(self.requests))

    def see_use(self):
        used = self.num_blocks - len(self.unused) - len(self.kept)
        self.counts.peak_blocks = max(self.counts.peak_blocks, used)

    def blocks(self, tokens):
        return -(-tokens // self.block_size)

    def admit(self, request, first_time):
        prompt, output, contents = self.requests[request]
        if self.blocks(prompt + output) > self.num_blocks:
            return False
        paths = [tuple(contents[: i + 1]) for i in range(prompt // self.block_size)]
        found = []
        for path in paths[: max(prompt - 1, 0) // self.block_size]:
            if path not in self.known:
                break
            found.append(self.known[path])
        new = self.blocks(prompt + self.done[request]) - len(found)
        revived = sum(block.holders == 0 for block in found)
        if new > len(self.unused) + len(self.kept) - revived:
            return False
        for block in found:
            block.holders += 1
            self.kept.pop(block, None)
        self.held[request] = found + [self.take() for _ in range(new)]
        for block, path in zip(self.held[request], paths, strict=False):
            if path not in self.known:
                self.known[path], block.content = block, path
        self.see_use()
        if request in first_time:
            first_time.remove(request)
            self.counts.prompt_tokens += prompt
            self.counts.hit_tokens += len(found) * self.block_size
        return True

    def take(self):
        if self.unused:
            block = self.unused.pop()
        else:
            block, _ = self.kept.popitem(last=False)
            del self.known[block.content]
            block.content = None
            self.counts.evictions += 1
        block.holders = 1
        return block

    def grow(self, running):
        lengths = [self.requests[r][0] + self.done[r] for r in running]
        full = [
            r for r, length in zip(running, lengths, strict=True) if not length % self.block_size
        ]
        if len(full) > len(self.unused) + len(self.kept):
            return False
        for request in full:
            self.held[request].append(self.take())
        return True

    def release(self, request):
        for block in reversed(self.held.pop(request)):  # a tail is older than its head
            block.holders -= 1
            if block.holders == 0:
                if block.content is None:
                    self.unused.append(block)
                else:
                    self.kept[block] = None

    def end(self, running):
        for request in sorted(running):
            if self.done[request] == self.requests[request][1]:
                self.release(request)
                running.remove(request)
