"""Paged problems for the tests of the operations: random, permuted, poisoned."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from rocmforge import reference
from rocmforge.ops import _cpu

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8UZ = np.dtype(ml_dtypes.float8_e4m3fnuz)
INT8 = np.dtype(np.int8)
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
EIGHT_BIT = (FLOAT8, FLOAT8UZ, INT8)

# Largest error allowed, absolute and relative to the result, for inputs of magnitude 1 and up to
# 256 elements a head (for more, so many times more). Softmax and sums are float32, over up to some
# thousand terms; the 16-bit types add their final rounding, half a unit in the last place: 2^-11
# and 2^-8.
TOLERANCE = {
    FLOAT32: (2e-6, 2e-6),
    FLOAT16: (2e-6, 2.0**-11 + 2e-6),
    BFLOAT16: (2e-6, 2.0**-8 + 2e-6),
}
# Of the log-sum-exp, which is float32 always.
LSE_TOLERANCE = (4e-6, 2e-6)
# Variants whose products of probabilities and values take bfloat16, so that with a bfloat16 query
# each probability is rounded: that moves a result by up to this part of sum(p * |v|) / sum(p).
ROUNDING_VARIANTS = ("avx512bf16", "amx")
ROUNDING = 2.0**-8


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
    k_scale: Any = None
    v_scale: Any = None
    layout: str = "HND"
    options: dict[str, Any] = field(default_factory=dict)  # the other keyword arguments

    def call(self, function, **kwargs):
        return function(
            self.query,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.seq_lens,
            self.cu_seqlens_q,
            rows=self.rows,
            mask=self.mask,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            layout=self.layout,
            **self.options | kwargs,
        )

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
            mask=None if self.mask is None else self.mask[start:stop],
        )

    def expected(self, **kwargs):
        """The oracle's output and log-sum-exp, and how much rounding probabilities may move it."""
        out, lse = self.call(reference.paged_attention, return_lse=True, **kwargs)
        bound = np.zeros_like(out)
        if self.query.dtype == BFLOAT16:
            magnitudes = self.but(v_cache=np.abs(self.v_cache.astype(np.float32)))
            bound = ROUNDING * magnitudes.call(reference.paged_attention, **kwargs)
        return out, lse, bound


def make(
    dtype,
    contexts,
    queries=None,
    *,
    heads=(4, 2),
    head_dim=64,
    v_head_dim=None,
    latent=False,
    kv_dtype=None,
    scales="token",
    block_size=16,
    layout="HND",
    holes=0.0,
    seed=0,
):
    """Make a random problem.

    Blocks are in random order. Slots that no sequence uses hold NaN and Inf, as do their scales,
    and table entries past a sequence's end are far out of range.

    kv_dtype : of the caches, if another one; then scales is "token", "head" or "scalar".
    latent : whether values are the first v_head_dim elements of the keys.
    holes : the share of table entries that are negative.
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
    v_head_dim = v_head_dim or head_dim
    caches, factors = [], []
    for dim, poison in ((head_dim, np.nan), (v_head_dim, -np.inf)):
        cache = rng.standard_normal((num_blocks, block_size, num_kv_heads, dim), np.float32)
        cache, factor = _stored(cache, used, poison, kv_dtype or dtype, scales)
        factors.append(factor)
        caches.append(cache if layout == "NHD" else np.ascontiguousarray(cache.swapaxes(1, 2)))
    if latent:
        caches[1], factors[1] = caches[0][..., :v_head_dim], None
    cu = None if queries is None else np.cumsum([0, *queries], dtype=np.int32)
    num_tokens = len(contexts) if queries is None else sum(queries)
    query = rng.standard_normal((num_tokens, num_heads, head_dim), np.float32).astype(dtype)
    lens = np.array(contexts, np.int32)
    problem = Problem(query, *caches, table, lens, cu, layout=layout)
    if kv_dtype in EIGHT_BIT:
        problem = problem.but(k_scale=factors[0], v_scale=factors[1])
    return problem.but(options={"scale": 1 / np.sqrt(head_dim)}) if latent else problem


def _stored(cache, used, poison, dtype, scales):
    """Elements of a cache [blocks, tokens, heads, dim] and their scales."""
    if dtype not in EIGHT_BIT:
        cache[~used] = poison
        return cache.astype(dtype), None
    if scales == "token":
        factor = reference.token_scales(cache, dtype)
        stored = reference.quantise(cache, factor[..., None], dtype)
        factor[~used] = poison
        factor = np.ascontiguousarray(factor.swapaxes(1, 2))
    else:
        factor = reference.token_scales(cache.swapaxes(0, 2).reshape(cache.shape[2], -1), dtype)
        factor = factor if scales == "head" else float(factor.max())
        stored = reference.quantise(cache, np.expand_dims(factor, -1), dtype)
    stored.view(np.uint8)[~used] = 0x80 if dtype != FLOAT8 else 0xFF  # NaN, or the unused -128
    return stored, factor


def tree_mask(problem, seed=0):
    """A mask in which a new token sees itself and about half of the others; wider than needed."""
    rng = np.random.default_rng(seed)
    starts = problem.cu_seqlens_q
    starts = np.arange(len(problem.query) + 1) if starts is None else starts
    width = int(np.diff(starts).max(initial=0)) + 3
    mask = rng.integers(0, 2, (len(problem.query), width), np.uint8)
    for start, stop in itertools.pairwise(starts):
        mask[np.arange(start, stop), np.arange(stop - start)] = 255
    return mask


def pairwise(seed=0, **parameters):
    """Rows in which every two values of two parameters occur together: a small covering array."""
    rng = np.random.default_rng(seed)
    names = list(parameters)
    sizes = [len(parameters[name]) for name in names]
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    rows = []
    while missing:
        best = None
        for _ in range(30):  # of random rows that hold a missing pair, the one with the most
            i, a, j, b = sorted(missing)[rng.integers(len(missing))]
            row = [int(rng.integers(size)) for size in sizes]
            row[i], row[j] = a, b
            covered = {
                (i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(names)), 2)
            } & missing
            if best is None or len(covered) > len(best[1]):
                best = row, covered
        missing -= best[1]
        rows.append({name: parameters[name][x] for name, x in zip(names, best[0], strict=True)})
    return rows


def assert_close(got, want, bound=0.0, head_dim=0, *, rounds=None):
    """Compare a result with the float64 oracle's by the tolerance of its dtype.

    bound : what rounding probabilities may add, where the variant in use does that.
    rounds : whether it does; by default, what the variant of the CPU in use does.
    """
    atol, rtol = TOLERANCE[got.dtype]
    atol *= max(1, head_dim / 256)
    if _cpu.isa() in ROUNDING_VARIANTS if rounds is None else rounds:
        atol = atol + bound
    error = np.abs(got.astype(np.float64) - want)
    allowed = atol + rtol * np.abs(want)
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} are off, the first at {np.argwhere(wrong)[0]}: "
        f"{got[wrong][0]} for {want[wrong][0]}; at most {(error / allowed)[wrong].max():.3g} times "
        "what is allowed"
    )


def assert_lse_close(got, want):
    """Compare log-sum-exps, -inf among them."""
    assert got.dtype == FLOAT32
    np.testing.assert_allclose(got, want, atol=LSE_TOLERANCE[0], rtol=LSE_TOLERANCE[1])


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
