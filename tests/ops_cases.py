"""Paged problems for the tests of the operations: random, permuted, poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)


@dataclass
class Problem:
    """Arguments of one call; `arguments()` gives them in order."""

    query: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    block_table: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens_q: np.ndarray | None
    layout: str

    def arguments(self):
        return (
            self.query,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.seq_lens,
            self.cu_seqlens_q,
        )


def make(
    dtype,
    *,
    contexts,
    queries=None,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    layout="HND",
    seed=0,
    holes=0.0,
):
    """Random problem: blocks in random order, unused slots NaN or Inf, table entries past the end
    far out of range. `holes` is the share of table entries that are negative."""
    rng = np.random.default_rng(seed)
    blocks = [-(-c // block_size) for c in contexts]
    num_blocks = sum(blocks) + 2
    order = rng.permutation(num_blocks).astype(np.int32)
    table = np.full((len(contexts), max([*blocks, 1]) + 1), 2**30, np.int32)
    used = np.zeros((num_blocks, block_size), bool)
    for i, (context, n) in enumerate(zip(contexts, blocks, strict=True)):
        mine, order = order[:n], order[n:]
        table[i, :n] = mine
        flat = np.zeros(n * block_size, bool)
        flat[:context] = True
        used[mine] = flat.reshape(n, block_size)
        hole = rng.random(n) < holes
        used[mine[hole]] = False
        table[i, :n][hole] = -rng.integers(1, 2**31, hole.sum())
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    caches = []
    for poison in (np.nan, -np.inf):
        cache = rng.standard_normal(shape, np.float32)
        cache[~used] = poison
        cache = cache.astype(dtype)
        caches.append(cache if layout == "NHD" else np.ascontiguousarray(cache.swapaxes(1, 2)))
    cu = None if queries is None else np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    num_tokens = len(contexts) if queries is None else sum(queries)
    query = rng.standard_normal((num_tokens, num_heads, head_dim), np.float32).astype(dtype)
    return Problem(query, *caches, table, np.array(contexts, np.int32), cu, layout)
