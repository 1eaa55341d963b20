"""Attention of a batch whose sequences begin with the same blocks, which are read once for all.

Known as cascade attention: the queries of all sequences attend to the common prefix as if they were
one sequence, each sequence attends to the rest of its own, and `merge_states` makes one result of
both. https://flashinfer.ai/2024/02/02/cascade-inference.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rocmforge import ops
from rocmforge.batch import Batch

__all__ = ["CommonPrefix", "attend_with_prefix", "is_worthwhile"]

Array = npt.NDArray[Any]

# Measured on a Zen 4 with two threads by benchmarks/prefix_attention.py: from here on a decode step
# took 1.03 to 1.21 times as long without. Below, two passes and a merge may cost more than they
# save. GPUs take the same bounds: nobody has measured there yet.
MIN_SEQUENCES = 4
MIN_TOKENS = 1024


def is_worthwhile(
    prefix_len: int, batch: Batch, window_size: tuple[int, int], alibi_slopes: Array | None
) -> bool:
    """Whether reading a prefix once is possible and faster."""
    return (
        prefix_len >= MIN_TOKENS
        and len(batch) >= MIN_SEQUENCES
        # the prefix's queries are one sequence, in which positions mean nothing
        and window_size == (-1, -1)
        and alibi_slopes is None
        and prefix_len >= batch.num_tokens
    )


@dataclass(frozen=True, slots=True)
class CommonPrefix:
    """What the two parts of a batch's attention need beside its own arrays, all int32."""

    num_blocks: int
    num_tokens: int
    row: int
    """Of the block table: any sequence's."""
    rest_lens: Any
    """``[num_seqs]``: tokens of each sequence behind the prefix."""
    length: Any
    """``[1]``: the prefix as one sequence, of whom all query tokens are."""
    cu_seqlens_q: Any
    """``[2]``"""

    @classmethod
    def of(cls, batch: Batch, num_blocks: int, block_size: int) -> CommonPrefix:
        """That of a batch whose sequences share so many blocks, for arrays in host memory."""
        length = num_blocks * block_size
        return cls(
            num_blocks,
            length,
            int(batch.rows[0]),
            batch.seq_lens - np.int32(length),
            np.array([length], np.int32),
            np.array([0, batch.num_tokens], np.int32),
        )


def attend_with_prefix(
    prefix: CommonPrefix,
    query: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    cu_seqlens_q: Array,
    *,
    rows: Array,
    softcap: float,
    sinks: Array | None,
    mask: Array | None,
    max_seqlen_q: int,
    max_seq_len: int,
    out: Array | None,
    return_lse: bool,
    stream: Any = None,
    **options: Any,
) -> Any:
    """`paged_attention` of sequences that share their first blocks, none of which has a new token.

    Positions must not matter: no window, no ALiBi. `scale` and the rest are as there.
    """
    # The sinks go into one of the parts, and the mask is over new tokens, which the second one has.
    result, lse = ops.paged_attention(
        query,
        k_cache,
        v_cache,
        block_table[:, prefix.num_blocks :],
        prefix.rest_lens,
        cu_seqlens_q,
        rows=rows,
        softcap=softcap,
        sinks=sinks,
        mask=mask,
        max_seqlen_q=max_seqlen_q,
        max_seq_len=max_seq_len - prefix.num_tokens,
        out=out,
        return_lse=True,
        stream=stream,
        **options,
    )
    shared, shared_lse = ops.paged_attention(
        query,
        k_cache,
        v_cache,
        block_table[prefix.row : prefix.row + 1, : prefix.num_blocks],
        prefix.length,
        prefix.cu_seqlens_q,
        softcap=softcap,
        causal=False,
        return_lse=True,
        stream=stream,
        **options,
    )
    ops.merge_states(result, lse, shared, shared_lse, out=result, lse=lse, stream=stream)
    return (result, lse) if return_lse else result
