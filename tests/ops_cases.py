"""Paged problems for the tests of the operations: random, permuted, poisoned."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)

# Largest error allowed, absolute and relative to the result, for inputs of magnitude 1. Softmax and
# sums are float32, over up to some thousand terms; the 16-bit types add their final rounding, half
# a unit in the last place: 2^-11 and 2^-8.
TOLERANCE = {
    FLOAT32: (2e-6, 2e-6),
    FLOAT16: (2e-6, 2.0**-11 + 2e-6),
    BFLOAT16: (2.0**-8, 2.0**-8 + 2e-6),
}


@dataclass(frozen=True)
class Problem:
    """One call of paged_attention."""

    query: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    block_table: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens_q: np.ndarray | None = None
    rows: np.ndarray | None = None
    mask: np.ndarray | None = None
    layout: str = "HND"

    def call(self, function, **kwargs):
        return function(
            self.query,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.seq_lens,
            self.cu_seqlens_q,
            rows=self.rows,
            layout=self.layout,
            **self._optional(),
            **kwargs,
        )

    def _optional(self):
        return {} if self.mask is None else {"mask": self.mask}

    def but(self, **changes):
        return replace(self, **changes)

    def only(self, sequence):
        """The same sequence, alone."""
        start, stop = sequence, sequence + 1
        if self.cu_seqlens_q is not None:
            start, stop = self.cu_seqlens_q[sequence : sequence + 2]
        row = sequence if self.rows is None else self.rows[sequence]
        return self.but(
            query=self.query[start:stop],
            block_table=self.block_table[row : row + 1],
            seq_lens=self.seq_lens[sequence : sequence + 1],
            cu_seqlens_q=None if self.cu_seqlens_q is None else np.array([0, stop - start], "i4"),
            rows=None,
        )


def make(
    dtype,
    contexts,
    queries=None,
    *,
    heads=(4, 2),
    head_dim=64,
    v_head_dim=None,
    block_size=16,
    layout="HND",
    holes=0.0,
    seed=0,
):
    """Make a random problem.

    Blocks are in random order. Slots that no sequence uses hold NaN and Inf, and table entries past
    a sequence's end are far out of range. `holes` is the share of table entries that are negative.
    """
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = heads
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 2
    order = rng.permutation(num_blocks).astype(np.int32)
    table = np.full((len(contexts), max([*counts, 1]) + 1), 2**30, np.int32)
    used = np.zeros((num_blocks, block_size), bool)
    for i, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        mine, order = order[:count], order[count:]
        table[i, :count] = mine
        flat = np.zeros(count * block_size, bool)
        flat[:context] = True
        used[mine] = flat.reshape(count, block_size)
        hole = rng.random(count) < holes
        used[mine[hole]] = False
        table[i, :count][hole] = -rng.integers(1, 2**31, hole.sum())
    caches = []
    for dim, poison in ((head_dim, np.nan), (v_head_dim or head_dim, -np.inf)):
        cache = rng.standard_normal((num_blocks, block_size, num_kv_heads, dim), np.float32)
        cache[~used] = poison
        cache = cache.astype(dtype)
        caches.append(cache if layout == "NHD" else np.ascontiguousarray(cache.swapaxes(1, 2)))
    cu = None if queries is None else np.cumsum([0, *queries], dtype=np.int32)
    num_tokens = len(contexts) if queries is None else sum(queries)
    query = rng.standard_normal((num_tokens, num_heads, head_dim), np.float32).astype(dtype)
    lens = np.array(contexts, np.int32)
    return Problem(query, *caches, table, lens, cu, layout=layout)


def assert_close(got, want):
    """Compare a result with the float64 oracle's by the tolerance of its dtype."""
    atol, rtol = TOLERANCE[got.dtype]
    np.testing.assert_allclose(got.astype(np.float64), want, atol=atol, rtol=rtol)


def bits(array):
    """The array as integers, so that equality means the same bits (and NaN equals itself)."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def guarded(array):
    """Copy an array to the end of its own pages, before one that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    buffer = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(buffer, np.uint8, array.nbytes, size - array.nbytes)
    copy = copy.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
