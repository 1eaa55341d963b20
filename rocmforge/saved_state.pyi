from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rocmforge.block_allocator import BlockAllocator
from rocmforge.page_table import PageTable
from rocmforge.shared_sequences import SharedSequences

def dump(
    manager: SharedSequences,
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]: ...
def restore(
    manager: SharedSequences, numbers: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]
) -> None: ...
def dump_allocator(allocator: BlockAllocator) -> tuple[int, int, int, dict[str, Any]]: ...
def load_allocator(
    num_blocks: int, clock: int, total_evictions: int, arrays: Mapping[str, Any]
) -> BlockAllocator: ...
def dump_page_table(
    table: PageTable,
) -> tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int32]]: ...
def load_page_table(
    block_size: int,
    ids: npt.NDArray[np.uint64],
    counts: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int32],
) -> PageTable: ...
