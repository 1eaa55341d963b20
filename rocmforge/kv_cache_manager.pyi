from typing import SupportsIndex

from rocmforge.batch import Batch
from rocmforge.page_table import _Ints
from rocmforge.shared_sequences import SharedSequences

class KVCacheManager(SharedSequences):
    def append(
        self,
        sequence_ids: _Ints,
        num_tokens: SupportsIndex | _Ints,
        token_ids: _Ints | None = None,
        *,
        out: Batch | None = None,
    ) -> Batch: ...
    def can_append(self, sequence_ids: _Ints, num_tokens: SupportsIndex | _Ints) -> bool: ...
    def commit(self, batch: Batch) -> None: ...
    # For KVCache, which is written in Python.
    def _check_batch(self, batch: object) -> None: ...
    def _check_writable_batch(self, batch: object) -> None: ...
    def _mark_written(self, batch: Batch, layer: int, num_layers: int) -> None: ...
