"""A Llama-architecture model from a GGUF file: its numbers, and its weights in float32.

What the names mean is fixed by the GGUF specification and by llama.cpp's ``llama`` architecture.
One thing is easy to get wrong: conversion to GGUF permutes the rows of the query and key matrices,
so that the two dimensions RoPE turns together are neighbours (0 and 1, 2 and 3, ...), not half a
head apart as in the checkpoints of Hugging Face. The weights here stay in the file's order, and
``rocmforge.cli.llama`` turns neighbours; the attention only sees scalar products, which do not
change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rocmforge.cli.console import CommandError
from rocmforge.cli.gguf_file import GGUFFile

__all__ = ["Layer", "LlamaConfig", "LlamaWeights", "load_llama"]

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # longest sequence the model was trained for, in tokens
    norm_eps: float

    @property
    def query_size(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key heads, or of all value heads, of one token."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Layer:
    """One layer's weights. Matrices are ``[out, in]``; those with the same input are one matrix."""

    attn_norm: Matrix
    qkv: Matrix  # query rows, then key rows, then value rows
    attn_out: Matrix
    ffn_norm: Matrix
    gate_up: Matrix  # gate rows, then up rows
    down: Matrix


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model in float32."""

    config: LlamaConfig
    embedding: Matrix  # [vocab_size, hidden_size]
    layers: tuple[Layer, ...]
    final_norm: Matrix
    head: Matrix  # [vocab_size, hidden_size]; the same array as `embedding` in a tied model
    inverse_frequencies: npt.NDArray[np.float64]  # of RoPE, radians a position, one per turned pair

    def matrices(self) -> list[Matrix]:
        """List what one decode step reads from memory once (the embedding's few rows aside)."""
        found = [self.head]
        for layer in self.layers:
            found += [layer.qkv, layer.attn_out, layer.gate_up, layer.down]
        return found


def load_llama(file: GGUFFile, on_layer: Callable[[int], None] = lambda done: None) -> LlamaWeights:
    """Read and dequantise a Llama-architecture model.

    Parameters
    ----------
    file : GGUFFile
        The open file.
    on_layer : callable
        Called with the number of layers that are loaded, for a progress bar.

    Raises
    ------
    CommandError
        The file holds another architecture, a variant that this forward pass does not compute, or
        tensors that contradict its metadata.
    """
    config = _config(file)
    hidden, ffn = config.hidden_size, config.ffn_size
    query, kv = config.query_size, config.kv_size
    used = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}

    def tensor(name: str, *shape: int) -> Matrix:
        used.add(name)
        return file.tensor(name, shape)

    embedding = tensor("token_embd.weight", config.vocab_size, hidden)
    tied = "output.weight" not in file.tensor_names
    head = embedding if tied else tensor("output.weight", config.vocab_size, hidden)
    layers = []
    for i in range(config.num_layers):
        prefix = f"blk.{i}."
        qkv = np.empty((query + 2 * kv, hidden), np.float32)
        qkv[:query] = tensor(prefix + "attn_q.weight", query, hidden)
        qkv[query : query + kv] = tensor(prefix + "attn_k.weight", kv, hidden)
        qkv[query + kv :] = tensor(prefix + "attn_v.weight", kv, hidden)
        gate_up = np.empty((2 * ffn, hidden), np.float32)
        gate_up[:ffn] = tensor(prefix + "ffn_gate.weight", ffn, hidden)
        gate_up[ffn:] = tensor(prefix + "ffn_up.weight", ffn, hidden)
        layers.append(
            Layer(
                attn_norm=tensor(prefix + "attn_norm.weight", hidden),
                qkv=qkv,
                attn_out=tensor(prefix + "attn_output.weight", hidden, query),
                ffn_norm=tensor(prefix + "ffn_norm.weight", hidden),
                gate_up=gate_up,
                down=tensor(prefix + "ffn_down.weight", hidden, ffn),
            )
        )
        on_layer(i + 1)
    final_norm = tensor("output_norm.weight", hidden)
    # A bias or an expert that went unread would give fluent, wrong text.
    if unknown := sorted(file.tensor_names - used):
        raise CommandError(
            f"{file.path} has tensors that this forward pass does not compute: "
            + ", ".join(unknown[:4])
            + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        )
    frequencies = _inverse_frequencies(file, config)
    return LlamaWeights(config, embedding, tuple(layers), final_norm, head, frequencies)


def _config(file: GGUFFile) -> LlamaConfig:
    architecture = file.text("general.architecture")
    if architecture != "llama":
        raise CommandError(
            f"{file.path} holds a model of architecture {architecture!r}; the demo runs "
            "'llama' only (Llama, SmolLM, TinyLlama, Mistral, ...)"
        )
    if file.integer("llama.expert_count", 0):
        raise CommandError(f"{file.path} is a mixture of experts, which the demo does not compute")
    num_heads = file.integer("llama.attention.head_count")
    hidden = file.integer("llama.embedding_length")
    head_dim = file.integer("llama.attention.key_length", hidden // max(num_heads, 1))
    config = LlamaConfig(
        name=file.text("general.name", file.path.stem),
        num_layers=file.integer("llama.block_count"),
        hidden_size=hidden,
        ffn_size=file.integer("llama.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=file.integer("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=len(file.array("tokenizer.ggml.tokens")),
        context_length=file.integer("llama.context_length"),
        norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
    )
    sizes = {key: value for key, value in vars(config).items() if isinstance(value, int)}
    if bad := [f"{key} = {value}" for key, value in sizes.items() if value < 1]:
        raise CommandError(f"{file.path}: impossible model size: {', '.join(bad)}")
    if num_heads % config.num_kv_heads:
        raise CommandError(
            f"{file.path}: {num_heads} query heads do not divide over "
            f"{config.num_kv_heads} key/value heads"
        )
    if file.integer("llama.attention.value_length", head_dim) != head_dim:
        raise CommandError(f"{file.path}: keys and values of different sizes are not supported")
    return config


def _inverse_frequencies(file: GGUFFile, config: LlamaConfig) -> npt.NDArray[np.float64]:
    """Angles of RoPE for one position, a pair of dimensions each.

    Su et al., RoFormer (arXiv:2104.09864); Llama 3.1's stretched frequencies come as the tensor
    ``rope_freqs.weight`` that divides them, linear position interpolation as one factor.
    """
    turned = file.integer("llama.rope.dimension_count", config.head_dim)
    if not 0 < turned <= config.head_dim or turned % 2:
        raise CommandError(
            f"{file.path}: RoPE cannot turn {turned} of {config.head_dim} dimensions"
        )
    base = file.number("llama.rope.freq_base", 10000.0)
    exponents = np.arange(0, turned, 2, dtype=np.float64) / turned
    frequencies = base**-exponents
    if "rope_freqs.weight" in file.tensor_names:
        frequencies /= file.tensor("rope_freqs.weight", (turned // 2,))
    scaling = file.text("llama.rope.scaling.type", "none")
    if scaling == "linear":
        frequencies /= file.number("llama.rope.scaling.factor")
    elif scaling == "none":
        frequencies /= file.number("llama.rope.scale_linear", 1.0)  # the key of older files
    else:
        raise CommandError(f"{file.path}: RoPE scaling {scaling!r} is not supported")
    return np.asarray(frequencies, dtype=np.float64)
