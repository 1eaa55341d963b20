"""ROCmForge: a paged key/value cache for large language models, on AMD GPUs and on CPUs."""

__version__ = "0.1.0"

try:
    from rocmforge.batch import Batch
    from rocmforge.block_allocator import BlockAllocator
    from rocmforge.errors import RocmForgeError
    from rocmforge.kv_cache import KVCache
    from rocmforge.kv_cache_manager import KVCacheManager
    from rocmforge.layer_group import LayerGroup
    from rocmforge.ops import (
        copy_blocks,
        merge_states,
        paged_attention,
        set_num_threads,
        write_kv,
    )
    from rocmforge.page_table import PageTable
except ModuleNotFoundError as _error:
    if _error.name is None or not _error.name.startswith("rocmforge."):
        raise
    raise ImportError(
        f"{_error.name} is not built: this is ROCmForge's source tree, not an installed package. "
        "Run `pip install .` (or `pip install -e .`) in it, and start Python elsewhere or with "
        "`pytest --import-mode=importlib`."
    ) from _error

__all__ = [
    "Batch",
    "BlockAllocator",
    "KVCache",
    "KVCacheManager",
    "LayerGroup",
    "PageTable",
    "RocmForgeError",
    "copy_blocks",
    "merge_states",
    "paged_attention",
    "set_num_threads",
    "write_kv",
]
