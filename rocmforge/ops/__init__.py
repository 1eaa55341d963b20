"""Operations on a paged key/value cache: tensors in, tensors out; they know no sequence.

Arrays come as NumPy (bfloat16 and float8 as ``ml_dtypes``) or from any library that speaks DLPack.
Every argument and every index is checked before anything is written.
"""

from rocmforge.hip._ops import attention_workspace_size
from rocmforge.ops._attention import merge_states, paged_attention
from rocmforge.ops._blocks import (
    block_table_from_csr,
    calibrate,
    copy_blocks,
    gather_blocks,
    scatter_blocks,
    write_kv,
)
from rocmforge.ops._cpu import get_num_threads, set_num_threads

__all__ = [
    "attention_workspace_size",
    "block_table_from_csr",
    "calibrate",
    "copy_blocks",
    "gather_blocks",
    "get_num_threads",
    "merge_states",
    "paged_attention",
    "scatter_blocks",
    "set_num_threads",
    "write_kv",
]
