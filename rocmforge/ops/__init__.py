"""Operations on a paged key/value cache: tensors in, tensors out; they know no sequence.

Arrays come as NumPy (bfloat16 as ``ml_dtypes.bfloat16``) or from any library that speaks DLPack.
Every argument and every index is checked before anything is written.
"""

from rocmforge.ops._cpu import (
    copy_blocks,
    get_num_threads,
    paged_attention,
    set_num_threads,
    write_kv,
)

__all__ = ["copy_blocks", "get_num_threads", "paged_attention", "set_num_threads", "write_kv"]
