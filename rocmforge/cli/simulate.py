"""A serving engine without a model: the requests of a trace through a `KVCacheManager`."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from rocmforge import Batch, KVCacheManager
from rocmforge.cli.trace import Trace
from rocmforge.errors import OutOfBlocksError

__all__ = ["Outcome", "Sample", "simulate"]

MAX_SAMPLES = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """What the pool was used for at one step, in blocks."""

    step: int
    shared: int
    own: int
    cached: int
    free: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trace."""

    requests: int
    rejected: int
    """Requests that do not fit in the pool, whatever else runs."""
    prompt_tokens: int
    """Tokens of the prompts that were let in; each counts once, however often it was preempted."""
    hit_tokens: int
    output_tokens: int
    evictions: int
    preemptions: int
    steps: int
    peak_running: int
    num_blocks: int
    peak_blocks: int
    mean_utilization: float
    """Used blocks as a fraction of the pool, over all steps."""
    mean_fragmentation: float
    """Slots of used blocks that hold no token, as a fraction, over the samples."""
    step_ns: npt.NDArray[np.int64]
    """Time in the manager, of each step."""
    request_ns: npt.NDArray[np.int64]
    """Time in the manager that a request took besides the steps: admission and end."""
    samples: list[Sample]

    @property
    def hit_rate(self) -> float:
        """Prompt tokens found, as a fraction of all."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class _Engine:
    def __init__(
        self, trace: Trace, manager: KVCacheManager, max_running: int, chunk_size: int | None
    ) -> None:
        self.trace, self.manager = trace, manager
        self.max_running, self.chunk_size = max_running, chunk_size
        self.waiting = deque(range(len(trace.requests)))
        self.running: list[int] = []  # the youngest last
        self.generated = [0] * len(trace.requests)  # tokens before the last admission
        self.admitted_at = [-1] * len(trace.requests)  # step of the last admission
        self.ending: defaultdict[int, list[int]] = defaultdict(list)  # step -> who may end then
        self.seen = [False] * len(trace.requests)  # admitted once
        self.step = 0
        self.batch: Batch | None = None
        self.prompt_tokens = self.hit_tokens = self.output_tokens = 0
        self.rejected = self.preemptions = 0
        self.peak_running = self.peak_blocks = 0
        self.step_ns: list[int] = []
        self.request_ns = [0] * len(trace.requests)
        sizes = [(group.allocator.num_blocks, group.window) for group in manager.groups]
        self.num_blocks = sum(size for size, _ in sizes)
        # a sequence can have no more blocks than its pools; of a windowed one it gives some back
        self.largest = min((size for size, window in sizes if not window), default=2**31)

    def used_blocks(self) -> int:
        return self.num_blocks - sum(group.num_free_blocks for group in self.manager.groups)

    def admit(self) -> None:
        """Let in who comes next, as long as there is room."""
        while self.waiting and len(self.running) < self.max_running:
            index = self.waiting[0]
            begin = perf_counter_ns()
            is_in = self.admit_one(index)
            self.request_ns[index] += perf_counter_ns() - begin
            if is_in:
                self.waiting.popleft()
                self.end()  # it may be without output
            elif self.running:
                break  # until one of them ends
            else:
                self.reject(self.waiting.popleft())

    def admit_one(self, index: int) -> bool:
        manager, request = self.manager, self.trace.requests[index]
        tokens = self.trace.tokens(request)
        length = request.prompt_tokens + self.generated[index]
        if -(-(request.prompt_tokens + request.output_tokens) // manager.block_size) > self.largest:
            return False
        chunk = self.chunk_size or max(length, 1)
        first = min(length, chunk)
        if self.chunk_size:
            first = min(length, manager.match_prefix(tokens) + chunk)
        if not manager.can_add(tokens, length=first):
            return False
        found = manager.add_sequence(index, tokens)
        try:
            for start in range(found, length, chunk):
                manager.commit(manager.append([index], min(chunk, length - start)))
        except OutOfBlocksError:  # in a later chunk
            manager.free(index)
            return False
        self.peak_blocks = max(self.peak_blocks, self.used_blocks())
        if not self.seen[index]:
            self.seen[index] = True
            self.prompt_tokens += request.prompt_tokens
            self.hit_tokens += found
        self.admitted_at[index] = self.step
        self.running.append(index)
        self.ending[self.step + request.output_tokens - self.generated[index]].append(index)
        return True

    def reject(self, index: int) -> None:
        self.rejected += 1
        if self.seen[index]:  # its output is what did not fit
            self.generated[index] = 0

    def preempt(self) -> None:
        """Free the youngest; it is the first to come in again."""
        index = self.running.pop()
        self.generated[index] += self.step - self.admitted_at[index]
        self.manager.free(index)
        if self.running:
            self.preemptions += 1
            self.waiting.appendleft(index)
        else:
            self.reject(index)

    def decode(self) -> None:
        """Add a token to each running sequence."""
        begin = perf_counter_ns()
        while self.running:
            try:
                self.batch = self.manager.append(self.running, 1, out=self.batch)
            except OutOfBlocksError:
                self.preempt()
                continue
            self.manager.commit(self.batch)
            break
        self.step_ns.append(perf_counter_ns() - begin)
        self.step += 1
        self.output_tokens += len(self.running)
        self.peak_running = max(self.peak_running, len(self.running))

    def end(self) -> bool:
        """Free those that have all their tokens; False if there were none."""
        done = {
            index
            for index in self.ending.pop(self.step, ())
            if index in self.running  # else it was preempted since
            and self.generated[index] + self.step - self.admitted_at[index]
            == self.trace.requests[index].output_tokens
        }
        if not done:
            return False
        begin = perf_counter_ns()
        self.manager.free(sorted(done))
        each = (perf_counter_ns() - begin) // len(done)
        for index in done:
            self.request_ns[index] += each
        self.running = [index for index in self.running if index not in done]
        return True


def simulate(
    trace: Trace,
    manager: KVCacheManager,
    *,
    max_running: int = 256,
    chunk_size: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Outcome:
    """Replay a trace.

    In order of arrival, requests are let in while fewer than `max_running` run and blocks suffice.
    A prompt is appended and committed before the next is matched. A step adds one token to each
    running sequence. Out of blocks, the youngest is freed, and comes in first again, with the
    tokens that it had generated appended to its prompt. What a sequence generates the trace does
    not tell: those blocks are never cached.

    Parameters
    ----------
    trace : Trace
        The requests.
    manager : KVCacheManager
        An empty one.
    max_running : int
        Sequences that run at one time, from 1 up.
    chunk_size : int, optional
        Append and commit a prompt in pieces of so many tokens, so that windowed groups can give
        back blocks in between.
    progress : callable
        Is told now and then how many requests are done.
    """
    engine = _Engine(trace, manager, max_running, chunk_size)
    samples: list[Sample] = []
    fragmentation: list[float] = []
    used_blocks = 0
    # No fewer steps than this will be needed; where there are many more, samples are thinned.
    stride = max(1, trace.output_tokens // max_running // MAX_SAMPLES)
    freed = True
    while engine.waiting or engine.running:
        preemptions = engine.preemptions
        if freed:  # nothing else makes room
            engine.admit()
        if not engine.running:
            break
        engine.decode()
        used = engine.used_blocks()
        used_blocks += used
        engine.peak_blocks = max(engine.peak_blocks, used)
        if engine.step % stride == 0:
            stats = manager.stats()
            samples.append(
                Sample(
                    engine.step,
                    stats.shared_blocks,
                    stats.used_blocks - stats.shared_blocks,
                    stats.cached_blocks,
                    stats.free_blocks - stats.cached_blocks,
                )
            )
            fragmentation.append(stats.internal_fragmentation)
            progress(len(trace.requests) - len(engine.waiting) - len(engine.running))
            if len(samples) == 2 * MAX_SAMPLES:
                stride *= 2
                del samples[::2], fragmentation[::2]
        freed = engine.end() or engine.preemptions > preemptions
    steps = max(engine.step, 1)
    return Outcome(
        requests=len(trace.requests),
        rejected=engine.rejected,
        prompt_tokens=engine.prompt_tokens,
        hit_tokens=engine.hit_tokens,
        output_tokens=engine.output_tokens,
        evictions=manager.stats().evictions,
        preemptions=engine.preemptions,
        steps=engine.step,
        peak_running=engine.peak_running,
        num_blocks=engine.num_blocks,
        peak_blocks=engine.peak_blocks,
        mean_utilization=used_blocks / steps / engine.num_blocks if engine.num_blocks else 0.0,
        mean_fragmentation=sum(fragmentation) / max(len(fragmentation), 1),
        step_ns=np.array(engine.step_ns, np.int64),
        request_ns=np.array(engine.request_ns, np.int64),
        samples=samples,
    )
