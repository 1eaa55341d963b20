from collections.abc import Sequence
from typing import Any

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
    max_seqlen_q: int | None = None,
    max_seq_len: int | None = None,
    layout: str = "HND",
    out: Any = None,
) -> Any: ...
def write_kv(
    key: Any,
    value: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    *,
    layout: str = "HND",
) -> None: ...
def copy_blocks(caches: Any | Sequence[Any], copies: Any) -> None: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def isa() -> str: ...
def available_isas() -> tuple[str, ...]: ...
def _set_isa(name: str) -> None: ...
