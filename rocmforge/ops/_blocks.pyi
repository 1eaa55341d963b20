from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

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
    stream: Any = None,
) -> None: ...
def calibrate(
    key: Any, value: Any, dtype: npt.DTypeLike, *, stream: Any = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]: ...
def copy_blocks(caches: Any | Sequence[Any], copies: Any, *, stream: Any = None) -> None: ...
def gather_blocks(
    caches: Any | Sequence[Any], block_ids: Any, out: Any = None, *, stream: Any = None
) -> Any: ...
def scatter_blocks(
    caches: Any | Sequence[Any], block_ids: Any, data: Any, *, stream: Any = None
) -> None: ...
def block_table_from_csr(
    kv_indptr: Any,
    kv_indices: Any,
    kv_last_page_len: Any,
    block_size: SupportsIndex,
    *,
    out: Any = None,
) -> tuple[Any, npt.NDArray[np.int32]]: ...
