"""The classes that vLLM asks for: a backend, what it plans for a batch, and a layer's attention.

vLLM keeps its scheduler, block manager, model and cache memory; each layer's keys and values are
written by `rocmforge.ops.write_kv` and read by `rocmforge.ops.paged_attention`, which take vLLM's
tensors where they are. A layer's cache is ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``
with the strides of any of vLLM's layouts.

A batch is planned once, not once a layer: all layers have the same lengths, which the CPU
operations recognise.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from rocmforge import ops
from rocmforge.integrations.torch import stream_of

__all__ = ["CPUBackend", "CustomBackend", "Implementation", "Metadata", "MetadataBuilder"]

#: Names that vLLM has for a cache of 8-bit elements, and their type.
_EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
_WIDE = ("auto", "float16", "bfloat16", "float32")


class CPUBackend(AttentionBackend):
    """In the place of vLLM's own backend of its CPU platform, whose name it has to have."""

    # vLLM calls do_kv_cache_update before forward, so that layers can share a cache
    forward_includes_kv_cache_update = False

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*_WIDE, *_EIGHT_BIT]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 8 <= head_size <= 576 and head_size % 8 == 0

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # any strides will do; a head's keys close together are read fastest
        return (
            KVCacheLayout.LBHNC,
            KVCacheLayout.BLHNC,
            KVCacheLayout.LHBNC,
            KVCacheLayout.BHLNC,
            KVCacheLayout.LBNHC,
            KVCacheLayout.BLNHC,
        )

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


class CustomBackend(CPUBackend):
    """On other platforms, where ``--attention-backend CUSTOM`` asks for it."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"


@dataclass
class Metadata(AttentionMetadata):
    """What all layers of a group read in one step. The names are vLLM's, for its other readers."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: Tensor  # int32 [num_seqs + 1]
    seq_lens: Tensor  # int32 [num_seqs], the new tokens included
    block_table: Tensor  # int32 [num_seqs, max_blocks]
    slot_mapping: Tensor  # int64 [num_actual_tokens]
    causal: bool


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Makes `Metadata` of what vLLM knows about a batch: once a step for each group of layers."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type == "cpu":
            _use_threads_of_torch()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        common = common_attn_metadata
        if not isinstance(common.causal, bool):
            raise NotImplementedError(
                "rocmforge attends causally or not for a whole batch: vLLM asks for it request by "
                "request, as diffusion models do"
            )
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )


class Implementation(AttentionImpl[Metadata]):
    """The attention of one layer, with the heads that this rank has."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"rocmforge serves attention of decoders to their paged cache, and this model has "
                f"a layer of type {str(attn_type)!r}: run it with ROCMFORGE_VLLM=0"
            )
        if kv_cache_dtype not in _WIDE and kv_cache_dtype not in _EIGHT_BIT:
            raise NotImplementedError(
                f"--kv-cache-dtype must be one of {', '.join([*_WIDE, *_EIGHT_BIT])} with "
                f"rocmforge, got {kv_cache_dtype}"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.sliding_window = sliding_window
        # vLLM counts the query's own token, the operation the tokens before it
        self._window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._cache: Tensor | None = None  # the one that the two views are of
        self._keys = self._values = torch.empty(0)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write the new tokens' keys and values, ``[num_tokens, num_kv_heads, head_size]``."""
        num_tokens = slot_mapping.shape[0]
        if key.shape[0] != num_tokens:  # padded
            key, value = key[:num_tokens], value[:num_tokens]
        if kv_cache is not self._cache:
            self._divide(kv_cache)
        k_scale, v_scale = self._scales(layer)
        ops.write_kv(
            key,
            value,
            self._keys,
            self._values,
            slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
            stream=stream_of(key),
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``query [num_tokens, num_heads, head_size]`` to the cache, into `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("rocmforge does not quantise the output of attention")
        if attn_metadata is None:  # a warm-up: there is no batch and no cache
            return output
        meta = attn_metadata
        num_tokens = meta.num_actual_tokens
        out = output
        if query.shape[0] != num_tokens:  # padded
            query, out = query[:num_tokens], output[:num_tokens]
        if kv_cache is not self._cache:
            self._divide(kv_cache)
        k_scale, v_scale = self._scales(layer)
        window = self._window
        if not meta.causal and window[0] >= 0:  # as many tokens after it
            window = (window[0], window[0])
        ops.paged_attention(
            query,
            self._keys,
            self._values,
            meta.block_table,
            meta.seq_lens,
            meta.query_start_loc,
            scale=self.scale,
            causal=meta.causal,
            window_size=window,
            softcap=self.logits_soft_cap,
            alibi_slopes=self._on(self.alibi_slopes, query),
            sinks=self._on(self.sinks, query),
            k_scale=k_scale,
            v_scale=v_scale,
            max_seqlen_q=meta.max_query_len,
            max_seq_len=meta.max_seq_len,
            out=out,
            stream=stream_of(query),
        )
        return output

    def _divide(self, kv_cache: Tensor) -> None:
        """Take the keys and the values of a layer's cache, as views that later steps use too.

        Where a head's tokens lie together, its keys come first and then its values, as vLLM's own
        backend for CPUs has it: reading long contexts from memory takes a tenth less than with
        keys and values in turn.
        """
        cache = kv_cache
        if self.kv_cache_dtype in _EIGHT_BIT:
            cache = cache.view(_EIGHT_BIT[self.kv_cache_dtype])
        num_blocks, num_kv_heads, block_size, width = cache.shape
        if width == 2 * self.head_size and cache.stride(2) == width:
            halves = cache.view(num_blocks, num_kv_heads, 2 * block_size, self.head_size)
            self._keys, self._values = halves[:, :, :block_size], halves[:, :, block_size:]
        else:
            self._keys, self._values = cache[..., : self.head_size], cache[..., self.head_size :]
        self._cache = kv_cache

    def _scales(self, layer: Any) -> tuple[float | None, float | None]:
        if self.kv_cache_dtype in _EIGHT_BIT:
            return layer._k_scale_float, layer._v_scale_float
        return None, None

    @staticmethod
    def _on(numbers: Tensor | None, query: Tensor) -> Tensor | None:
        """A number a head, as float32 where the query is; read late, for weights may be loaded."""
        if numbers is None:
            return None
        return numbers.detach().to(query.device, torch.float32)


def _use_threads_of_torch() -> None:
    """Run where vLLM lets this worker run.

    vLLM binds each OpenMP thread of PyTorch to a processor of its own, the thread that calls us
    among them; threads that this one starts would all be bound to its processor.
    """
    number = ops.get_num_threads()
    if not os.environ.get("ROCMFORGE_NUM_THREADS"):
        number = torch.get_num_threads()
    torch.zeros(1 << 20).add_(1)  # starts PyTorch's threads
    processors: set[int] = set()
    with contextlib.suppress(OSError):  # a thread may just have ended
        for thread in os.listdir("/proc/self/task"):
            processors |= os.sched_getaffinity(int(thread))
    ops.set_num_threads(number, processors=processors)
