"""Hugging Face Transformers on a paged cache: an attention implementation and a cache.

``register()`` makes ``attn_implementation="rocmforge"`` known, and a `PagedCache` goes to the model
as its cache. For decoder models with grouped heads, sliding windows, soft caps and sinks; inference
only.

How it fits together. Transformers gives the attention function no cache, and the cache no mask. So
`PagedCache.update` stores nothing: it hands the layer's new keys back with itself attached, and the
attention function, which has keys and mask both, writes and attends. Padding has no place in the
cache: a row is a sequence of its real tokens alone, so the mask is read to tell which those are.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import torch
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DummyLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
    from transformers.masking_utils import (
        causal_mask_function,
        sliding_window_causal_mask_function,
    )
except ImportError as _error:
    raise ModuleNotFoundError(
        "rocmforge.integrations.transformers needs Transformers 5 and PyTorch: "
        f"pip install 'rocmforge[transformers]' ({_error})",
        name=_error.name,
    ) from _error
from torch import Tensor

from rocmforge.batch import Batch
from rocmforge.kv_cache import KVCache
from rocmforge.layer_group import LayerGroup

__all__ = ["PagedCache", "register"]

NAME = "rocmforge"

Flags = npt.NDArray[np.bool_]


def register() -> None:
    """Make ``attn_implementation="rocmforge"`` known to Transformers; again does no harm.

    Raises
    ------
    ImportError
        If the version of Transformers is not 5.
    """
    if not transformers.__version__.startswith("5."):
        raise ImportError(
            f"rocmforge.integrations.transformers needs Transformers 5, {transformers.__version__} "
            "is installed"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


# ---- what the models call ----


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_: Any,
) -> Tensor | None:
    """What `attention` gets as its mask: which tokens are real, ``[batch_size, kv_length]``.

    None: all are. The shape of the mask, causal and perhaps windowed, is known to the attention.
    """
    expected: Callable[..., Any] = causal_mask_function
    if local_size is not None:
        expected = sliding_window_causal_mask_function(local_size)
    if not _same_function(mask_function, expected):
        raise NotImplementedError(
            f'attn_implementation="{NAME}" takes causal and sliding-window masks, this model wants '
            "another (chunked, bidirectional, packed or of its own)"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    missing = kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, :kv_length]


def _same_function(one: Any, other: Any) -> bool:
    """Whether two functions are the same code over the same values."""
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(_same_function, one, other))
    if not hasattr(one, "__code__") or not hasattr(other, "__code__"):
        return bool(type(one) is type(other) is int and one == other)
    cells = [
        tuple(cell.cell_contents for cell in function.__closure__ or ())
        for function in (one, other)
    ]
    return one.__code__ is other.__code__ and _same_function(*cells)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the new keys and values of a layer, and attend to the whole context.

    Parameters
    ----------
    module : torch.nn.Module
        The model's attention layer.
    query : Tensor ``[batch_size, num_heads, n, head_dim]``
        Of the n new tokens of each row.
    key, value : Tensor ``[batch_size, num_kv_heads, n, head_dim]``
        What `PagedCache.update` gave.
    attention_mask : Tensor or None
        What `padding_mask` gave.

    Returns
    -------
    out : Tensor ``[batch_size, n, num_heads, head_dim]``
        Zeros where the token is padding.
    None
        There are no weights to give.
    """
    origin: tuple[PagedCache, int] | None = getattr(key, "_paged", None)
    if origin is None:
        raise ValueError(
            f'attn_implementation="{NAME}" needs a PagedCache: '
            "model.generate(..., past_key_values=PagedCache(model.config, ...))"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if position_bias is not None or not is_causal or dropout:
        what = "a position bias" if position_bias is not None else "dropout"
        raise NotImplementedError(
            f'attn_implementation="{NAME}" is causal attention for inference, it was asked for '
            f"{what if is_causal else 'attention that is not causal'}"
        )
    if query.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f'attn_implementation="{NAME}" has no gradient: run the model in torch.no_grad()'
        )
    cache, layer = origin
    window = cache.layers[layer].window
    if sliding_window is not None and window is not None and sliding_window != window:
        raise ValueError(
            f"layer {layer} has a window of {sliding_window} tokens, the cache one of {window}"
        )
    sinks = None if s_aux is None else s_aux.detach().float()
    return (
        cache._attend(layer, query, key, value, attention_mask, scaling, softcap or 0.0, sinks),
        None,
    )


# ---- the cache ----


class PagedLayer(CacheLayerMixin):
    """A layer of a `PagedCache`, as Transformers sees it: it has no keys and values of its own."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: PagedCache, index: int, window: int | None) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # no cycle: blocks are free as soon as the cache is gone
        self._index = index
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is to be done: the pools are there."""

    def _owner(self) -> PagedCache:
        cache = self._cache()
        assert cache is not None
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are, for `attention` to store."""
        attached: Any = key_states.view(key_states.shape)  # an object of its own
        attached._paged = (self._owner(), self._index)
        return attached, value_states

    def get_seq_length(self) -> int:
        """Tokens a row, padding included."""
        return self._owner()._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the mask is over: everything, also behind a window."""
        return self._owner()._length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: what there is room for depends on the pool."""
        return -1


class _Pool:
    """The blocks that several caches may share, and how a model's layers lie in them."""

    def __init__(self, kv_cache: KVCache, windows: Sequence[int | None], layers: list[int]) -> None:
        self.kv_cache = kv_cache
        self.windows = windows
        """By layer of the model."""
        self.layers = layers
        """Index in the cache by layer of the model; -1: the layer keeps nothing."""
        self.ids = itertools.count()
        self.has_windows = any(window is not None for window in windows)


class _Step:
    """One forward pass: the tokens that are written and attend, and the layers that did."""

    def __init__(self, batch: Batch, shape: tuple[int, int], kept: Flags | None) -> None:
        self.batch = batch
        self.shape = shape  # rows, tokens a row
        self.kept = kept
        self.index: Tensor | None = None
        self.keys: dict[int, weakref.ref[Tensor]] = {}

    def tokens(self, x: Tensor) -> Tensor:
        """``[rows, heads, n, dim]`` as the operations take it: ``[num_tokens, heads, dim]``."""
        rows, n = self.shape
        flat = x.transpose(1, 2).reshape(rows * n, x.shape[1], x.shape[3])
        return flat if self.kept is None else flat[self._index(x.device)]

    def padded(self, out: Tensor) -> Tensor:
        """``[num_tokens, heads, dim]`` as the model takes it: ``[rows, n, heads, dim]``."""
        if self.kept is not None:
            flat = out.new_zeros((self.kept.size, *out.shape[1:]))
            flat[self._index(out.device)] = out
            out = flat
        return out.view(*self.shape, *out.shape[1:])

    def _index(self, device: torch.device) -> Tensor:
        if self.index is None:
            assert self.kept is not None
            self.index = torch.from_numpy(np.flatnonzero(self.kept)).to(device)
        return self.index


def _free(kv_cache: KVCache, rows: list[int]) -> None:
    kv_cache.free(rows)
    rows.clear()


class PagedCache(Cache):
    """Keys and values of a batch of rows in the blocks of a `rocmforge.KVCache`.

    Give it to a model loaded with ``attn_implementation="rocmforge"``, as ``past_key_values`` of
    ``generate`` or of the model itself. Rows share blocks: beams what they have in common, copies
    of a cache (``copy.deepcopy``, which copies nothing) and rows of `batch_repeat_interleave` their
    past, and caches of one pool (`new`) the prompts that `start` tells.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's: its layers, their heads and windows.
    num_blocks : int
        Blocks of the pool; a block holds `block_size` tokens of all layers. Models with sliding
        windows have so many for the windowed layers as well.
    block_size : int
        Tokens a block. In a model with sliding windows no more than so many tokens can be taken
        back at once, as assisted decoding does with rejected drafts.
    dtype : torch.dtype or str, optional
        Of the keys and values: the model's, which is taken from `config` by default, or an 8-bit
        type of `rocmforge.KVCache`.
    device : torch.device or str
        Where the model is.
    options
        Further arguments of `rocmforge.KVCache`. `stream` is PyTorch's current one by default.

    Attributes
    ----------
    kv_cache : rocmforge.KVCache
        The blocks.

    Raises
    ------
    NotImplementedError
        If a layer of the model is neither full nor sliding-window attention.
    ValueError, TypeError, MemoryError
        As `rocmforge.KVCache`.
    """

    layers: list[Any]
    kv_cache: KVCache

    def __init__(
        self,
        config: Any,
        num_blocks: int = 1024,
        *,
        block_size: int = 16,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self._use(_make_pool(config, num_blocks, block_size, dtype, device, options))

    def _use(self, pool: _Pool) -> None:
        self._pool = pool
        self.kv_cache = pool.kv_cache
        self._rows: list[int] = []  # ids of the rows' sequences
        self._length = 0  # tokens a row, padding included
        self._kept: Flags | None = None  # [rows, length]: which are real; None: all
        self._prompts: list[npt.NDArray[np.int64]] | None = None  # real tokens, as far as known
        self._step: _Step | None = None
        layers: list[Any] = [
            DummyLayer() if index < 0 else PagedLayer(self, layer, window)
            for layer, (index, window) in enumerate(zip(pool.layers, pool.windows, strict=True))
        ]
        super().__init__(layers=layers)
        weakref.finalize(self, _free, self.kv_cache, self._rows)

    # ---- rows and the blocks that they share ----

    def new(self) -> PagedCache:
        """Another cache over the same blocks, without rows."""
        other = type(self).__new__(type(self))
        other._use(self._pool)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A cache that shares all blocks, until one of both writes on."""
        self._settle()
        other = memo[id(self)] = self.new()
        for row in self._rows:
            child = next(self._pool.ids)
            self.kv_cache.fork(row, child)
            other._rows.append(child)
        other._length, other._kept, other._prompts = self._length, self._kept, self._prompts
        return other

    def start(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        salt: bytes | str | None = None,
    ) -> int:
        """Tell the prompts of an empty cache, so that what is cached of them need not be computed.

        Whatever rows of caches of this pool had as their prompts is found, block by block. Then
        call ``generate`` with the same prompts: it computes the rest.

        Parameters
        ----------
        input_ids : Tensor ``[rows, length]``
            As for ``generate``. For beam search or several sequences a prompt call
            `batch_repeat_interleave` afterwards.
        attention_mask : Tensor ``[rows, length]``, optional
            As for ``generate``.
        salt : bytes or str, optional
            Prompts share within a salt alone.

        Returns
        -------
        int
            Leading columns of `input_ids` that were found in all rows: the new `get_seq_length`.
        """
        if self._rows:
            raise ValueError("start: the cache has rows already; see reset and new")
        ids = np.asarray(input_ids.cpu(), np.int64)
        kept = np.ones(ids.shape, np.bool_)
        if attention_mask is not None:
            kept = np.asarray(attention_mask.cpu(), np.bool_)
        if ids.ndim != 2 or not len(ids) or kept.shape != ids.shape:
            raise ValueError(
                "start: expected input_ids and attention_mask [rows, length], got "
                f"{list(ids.shape)} and {list(kept.shape)}"
            )
        prompts = [row[flags] for row, flags in zip(ids, kept, strict=True)]
        found = []
        for tokens, flags in zip(prompts, kept, strict=True):
            number = self.kv_cache.match_prefix(tokens, salt)
            found.append(int(np.flatnonzero(flags)[number]) if number else int(flags.argmax()))
        # The columns that all rows have; at least one is left to compute.
        length = min(found)
        rows = [next(self._pool.ids) for _ in prompts]
        try:
            for row, tokens, flags in zip(rows, prompts, kept, strict=True):
                self.kv_cache.add_sequence(row, tokens, salt)
                self._rows.append(row)
                self.kv_cache.truncate(row, int(flags[:length].sum()))
        except BaseException:
            self.reset()
            raise
        self._length = length
        self._kept = None if kept[:, :length].all() else kept[:, :length]
        self._prompts = prompts
        return length

    def reset(self) -> None:
        """Give all rows up; their full committed blocks stay cached while there is room."""
        _free(self.kv_cache, self._rows)
        self._length, self._kept, self._prompts, self._step = 0, None, None, None

    def _select(self, parents: Iterable[int]) -> None:
        """Make row i a continuation of row parents[i]."""
        self._settle()
        parents = list(parents)
        used: set[int] = set()
        rows = []
        for parent in parents:
            row = self._rows[parent]
            if parent in used:
                child = next(self._pool.ids)
                self.kv_cache.fork(row, child)
                row = child
            used.add(parent)
            rows.append(row)
        self.kv_cache.free([row for i, row in enumerate(self._rows) if i not in used])
        self._rows[:] = rows
        if self._kept is not None:
            self._kept = self._kept[parents]
        if self._prompts is not None:
            self._prompts = [self._prompts[parent] for parent in parents]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i go on from where row ``beam_idx[i]`` is: a fork, no key or value is copied."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make `repeats` rows of each, one after the other, that share their past."""
        self._select(i for i in range(len(self._rows)) for _ in range(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select(torch.arange(len(self._rows))[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens of all rows back.

        Parameters
        ----------
        tokens_to_remove : int
            Minus their number, padding included; or the length to keep, if it is positive.

        Raises
        ------
        ValueError
            If a sliding window has passed blocks that would be needed again: those of the last
            `block_size` tokens it keeps.
        """
        self._settle()
        if tokens_to_remove > 0:
            tokens_to_remove -= self._length
        number = min(max(-tokens_to_remove, 0), self._length)
        if number == 0:
            return
        length = self._length - number
        kept = [
            length if self._kept is None else int(self._kept[i, :length].sum())
            for i in range(len(self._rows))
        ]
        for row, tokens in zip(self._rows, kept, strict=True):  # before any is truncated
            self._check_windows(row, tokens)
        for row, tokens in zip(self._rows, kept, strict=True):
            self.kv_cache.truncate(row, tokens)
        self._length = length
        if self._kept is not None:
            self._kept = self._kept[:, :length]

    def _check_windows(self, row: int, tokens: int) -> None:
        size = self.kv_cache.block_size
        for group in self.kv_cache.groups:
            if group.window is None or tokens == 0:
                continue
            held = group.page_table.block_ids(row)
            first = max(tokens - group.window + 1, 0) // size  # that the next token needs
            if first < -(-tokens // size) and held[first] < 0:
                raise ValueError(
                    f"crop: a window of {group.window} tokens has given blocks back that would be "
                    f"needed again; at most block_size tokens, {size}, can be taken back: make the "
                    "cache with a larger block_size"
                )

    # ---- steps ----

    def _settle(self) -> None:
        """Take back what a forward pass reserved that did not reach its last layer."""
        step, self._step = self._step, None
        if step is None or step.batch.committed:
            return
        for i, row in enumerate(self._rows):
            kept = self._length if self._kept is None else int(self._kept[i].sum())
            if self.kv_cache.seq_len(row) > kept:
                self.kv_cache.truncate(row, kept)

    def _begin(self, key: Tensor, mask: Tensor | None) -> _Step:
        """Reserve the slots of a forward pass's real tokens."""
        self._settle()
        rows, n = key.shape[0], key.shape[2]
        if self._rows and len(self._rows) != rows:
            raise ValueError(
                f"the cache holds {len(self._rows)} rows, the model was called with {rows}: see "
                "batch_repeat_interleave, batch_select_indices and reset"
            )
        new = self._new_tokens(rows, n, mask)
        made = [] if self._rows else [next(self._pool.ids) for _ in range(rows)]
        ids = made or self._rows
        counts = np.full(rows, n) if new is None else new.sum(axis=1)
        some = np.flatnonzero(counts)
        try:
            for row in made:
                self.kv_cache.add_sequence(row)
            batch = self.kv_cache.append(
                [ids[i] for i in some], counts[some], self._known(ids, some, counts)
            )
        except BaseException:
            self.kv_cache.free([row for row in made if row in self.kv_cache])
            raise
        self._rows += made
        self._step = _Step(batch, (rows, n), new)
        return self._step

    def _new_tokens(self, rows: int, n: int, mask: Tensor | None) -> Flags | None:
        """Which of the new tokens are real, ``[rows, n]``; None: all."""
        length = self._length
        if mask is None:
            if self._kept is not None:
                raise ValueError(
                    "attention_mask: expected the mask that the cached tokens had, got none"
                )
            return None
        if mask.ndim != 2 or tuple(mask.shape) != (rows, length + n):
            raise NotImplementedError(
                f"attention_mask: expected [{rows}, {length + n}], got {list(mask.shape)}"
            )
        kept: Flags = np.asarray(mask.cpu(), np.bool_)
        past = kept[:, :length]
        if not (past.all() if self._kept is None else np.array_equal(past, self._kept)):
            raise ValueError(
                "attention_mask: it differs from what it was for the tokens that are cached"
            )
        if self._pool.has_windows and (kept[:, 1:] < kept[:, :-1]).any():
            raise NotImplementedError(
                "attention_mask: a model with sliding windows takes padding on the left alone, "
                "as the windows count what is between"
            )
        new = kept[:, length:]
        return None if new.all() else new

    def _known(
        self, ids: list[int], some: npt.NDArray[np.intp], counts: npt.NDArray[Any]
    ) -> npt.NDArray[np.int64] | None:
        """The tokens of a step, if `start` told them all."""
        if self._prompts is None:
            return None
        parts = []
        for i in some:
            begin = self.kv_cache.seq_len(ids[i])
            parts.append(self._prompts[i][begin : begin + counts[i]])
            if len(parts[-1]) < counts[i]:
                return None
        return np.concatenate(parts)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """`attention` of one layer; the first of a forward pass begins a step."""
        step = self._step
        index = self._pool.layers[layer]
        written = None if step is None else step.keys.get(layer)
        # Layers that share their keys with an earlier one come with the very same.
        if step is None or written is None or written() is not key:
            if step is None or written is not None or step.batch.committed:
                step = self._begin(key, mask)
            elif step.shape != (key.shape[0], key.shape[2]):
                raise ValueError(
                    f"layer {layer} has {key.shape[0]} rows of {key.shape[2]} tokens, the layers "
                    f"before it {step.shape[0]} of {step.shape[1]}"
                )
            self.kv_cache.write(index, step.tokens(key), step.tokens(value), step.batch)
            step.keys[layer] = weakref.ref(key)
            if step.batch.committed:
                self._done(step)
        tokens = step.tokens(query)
        out = tokens.new_empty((*tokens.shape[:2], value.shape[3]))
        self.kv_cache.attend(
            index, tokens, step.batch, out, scale=scale, softcap=softcap, sinks=sinks
        )
        return step.padded(out)

    def _done(self, step: _Step) -> None:
        """All layers were written."""
        rows, n = step.shape
        if self._kept is not None or step.kept is not None:
            past = np.ones((rows, self._length), np.bool_) if self._kept is None else self._kept
            new = np.ones((rows, n), np.bool_) if step.kept is None else step.kept
            self._kept = np.concatenate([past, new], axis=1)
        self._length += n


# ---- pools from configurations ----


def _make_pool(
    config: Any,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    options: dict[str, Any],
) -> _Pool:
    config = config.get_text_config(decoder=True)
    if torch.device(device).type == "cuda":  # where the model works, unless another is asked for
        options = {"stream": torch.cuda.current_stream(device)} | options
    # What Transformers itself would keep for each layer.
    kinds = DynamicCache(config=config).layers
    windows: list[int | None] = []
    layers: list[int] = []
    groups: dict[tuple[Any, ...], list[int]] = {}
    count = itertools.count()
    configs = getattr(config, "per_layer_config", None) or [config] * len(kinds)
    for i, (kind, own) in enumerate(zip(kinds, configs, strict=True)):
        if isinstance(kind, DummyLayer):
            windows.append(None)
            layers.append(-1)
            continue
        window = getattr(kind, "sliding_window", None)
        if type(kind) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(
                f"layer {i} of the model keeps a {type(kind).__name__}; a PagedCache has full and "
                "sliding-window attention"
            )
        heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        windows.append(window)
        layers.append(next(count))
        groups.setdefault((window, heads, head_dim), []).append(layers[-1])
    kv_cache = KVCache(
        num_layers=next(count),
        block_size=block_size,
        dtype=_dtype_name(dtype or config.dtype or torch.float32),
        device=_device_name(device),
        groups=[
            LayerGroup(
                num_blocks=num_blocks,
                window=window,
                layers=members,
                num_kv_heads=heads,
                head_dim=head_dim,
            )
            for (window, heads, head_dim), members in groups.items()
        ],
        **options,
    )
    return _Pool(kv_cache, windows, layers)


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device | str) -> str:
    """PyTorch calls AMD GPUs cuda."""
    return str(device).replace("cuda", "hip")
