from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rocmforge.hip._array import DeviceArray
from rocmforge.hip._driver import _DeviceLike, _Stream

def to_host(x: Any, name: str, stream: _Stream = None) -> npt.NDArray[Any]: ...
def by_matrix(yes: bool) -> None: ...
def merge_by_last(last: bool | None) -> None: ...
def attention_workspace_size(
    *,
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    v_head_dim: int | None = None,
    max_seqlen_q: int = 1,
    num_splits: int | None = None,
    deterministic: bool = True,
    device: _DeviceLike = 0,
) -> int: ...
def paged_attention(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    cu_seqlens_q: Any = None,
    *,
    rows: Any = None,
    scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    mask: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_dtype: Any = None,
    max_seqlen_q: int | None = None,
    max_seq_len: int | None = None,
    num_splits: int | None = None,
    deterministic: bool = True,
    layout: str = "HND",
    out: Any = None,
    return_lse: bool = False,
    workspace: Any = None,
    stream: _Stream = None,
) -> Any: ...
def write_kv(
    key: Any,
    value: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_dtype: Any = None,
    layout: str = "HND",
    stream: _Stream = None,
) -> None: ...
def merge_states(
    out_a: Any,
    lse_a: Any,
    out_b: Any,
    lse_b: Any,
    *,
    out: Any = None,
    lse: Any = None,
    stream: _Stream = None,
) -> tuple[Any, Any]: ...
def copy_blocks(caches: Any | Sequence[Any], copies: Any, *, stream: _Stream = None) -> None: ...
def gather_blocks(
    caches: Any | Sequence[Any], block_ids: Any, out: Any = None, *, stream: _Stream = None
) -> Any: ...
def scatter_blocks(
    caches: Any | Sequence[Any], block_ids: Any, data: Any, *, stream: _Stream = None
) -> None: ...
def update_table(
    table: DeviceArray,
    row: npt.NDArray[np.int32],
    column: npt.NDArray[np.int32],
    value: npt.NDArray[np.int32],
    *,
    stream: _Stream = None,
) -> None: ...
