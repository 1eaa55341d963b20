"""A tiny random Llama-architecture model as a GGUF file, so that no test needs a download.

The weights are made in the order of a Hugging Face checkpoint and permuted on writing, as
conversion to GGUF does. A test so computes with the plain ones, and only our loader meets the
permutation.
"""

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "u s", "us e")


def byte_characters():
    """GPT-2's stand-in characters, in the order of their bytes."""
    keep = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    shifted = iter(range(256, 512))
    return [chr(byte if byte in keep else next(shifted)) for byte in range(256)]


@dataclass
class TinyModel:
    """Sizes and weights; ``write`` makes the file."""

    hidden: int = 32
    ffn: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    context: int = 512
    eps: float = 1e-5
    rope_base: float = 10000.0
    tied: bool = True
    quantised: bool = False
    seed: int = 0
    weights: dict = field(default_factory=dict)

    def __post_init__(self):
        self.tokens = [*SPECIAL, *byte_characters(), *(m.replace(" ", "") for m in MERGES)]
        rng = np.random.default_rng(self.seed)
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"token_embd": (len(self.tokens), self.hidden), "output_norm": (self.hidden,)}
        if not self.tied:
            shapes["output"] = (len(self.tokens), self.hidden)
        for i in range(self.layers):
            shapes |= {
                f"blk.{i}.attn_norm": (self.hidden,),
                f"blk.{i}.attn_q": (query, self.hidden),
                f"blk.{i}.attn_k": (kv, self.hidden),
                f"blk.{i}.attn_v": (kv, self.hidden),
                f"blk.{i}.attn_output": (self.hidden, query),
                f"blk.{i}.ffn_norm": (self.hidden,),
                f"blk.{i}.ffn_gate": (self.ffn, self.hidden),
                f"blk.{i}.ffn_up": (self.ffn, self.hidden),
                f"blk.{i}.ffn_down": (self.hidden, self.ffn),
            }
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1:
                values = 1 + values / 4
            elif name.startswith("blk"):
                values *= 1.5 / np.sqrt(shape[1])
            if self.quantised and len(shape) == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            self.weights[name] = values

    def permuted(self, name):
        """The weight in the order in which GGUF stores it."""
        values = self.weights[name]
        heads = {"attn_q": self.heads, "attn_k": self.kv_heads}.get(name.rpartition(".")[2])
        if heads is None:
            return values
        return values.reshape(heads, 2, self.head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)

    def write(self, path, *, metadata=(), drop=(), tensors=(), architecture="llama"):
        """Write the file; `metadata` and `tensors` add or replace, `drop` leaves a key out."""
        fields = {
            "general.name": "tiny",
            "llama.context_length": self.context,
            "llama.embedding_length": self.hidden,
            "llama.block_count": self.layers,
            "llama.feed_forward_length": self.ffn,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.attention.layer_norm_rms_epsilon": self.eps,
            "llama.rope.freq_base": self.rope_base,
            "llama.rope.dimension_count": self.head_dim,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(self.tokens) - 3),
            "tokenizer.ggml.merges": list(MERGES),
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": CHATML,
        } | dict(metadata)
        if self.head_dim * self.heads != self.hidden:
            fields["llama.attention.key_length"] = self.head_dim
            fields["llama.attention.value_length"] = self.head_dim
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in fields.items():
            if key in drop:
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        stored = {f"{name}.weight": self.permuted(name) for name in self.weights} | dict(tensors)
        for name, values in stored.items():
            if name in drop:
                continue
            if self.quantised and values.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(path)

    def logits(self, token_ids):
        """Logits of one sequence ``[tokens, vocab]``, in float64 and the checkpoint's own order."""
        w = {name: values.astype(np.float64) for name, values in self.weights.items()}
        n, half = len(token_ids), self.head_dim // 2

        def norm(x, weight):
            return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.eps) * weight

        angle = np.outer(np.arange(n), self.rope_base ** (-np.arange(half) / half))
        cos, sin = (np.tile(f(angle), 2)[None] for f in (np.cos, np.sin))

        def rotate(x):  # halves of a head, as in the checkpoints of Hugging Face
            return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin

        def heads(x):
            return x.reshape(n, -1, self.head_dim).transpose(1, 0, 2)

        hidden = w["token_embd"][list(token_ids)]
        for i in range(self.layers):
            p = f"blk.{i}."
            x = norm(hidden, w[p + "attn_norm"])
            q = rotate(heads(x @ w[p + "attn_q"].T))
            k, v = rotate(heads(x @ w[p + "attn_k"].T)), heads(x @ w[p + "attn_v"].T)
            k, v = (np.repeat(a, self.heads // self.kv_heads, axis=0) for a in (k, v))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(self.head_dim)
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
            p_ = np.exp(scores - scores.max(-1, keepdims=True))
            out = (p_ / p_.sum(-1, keepdims=True)) @ v
            hidden = hidden + out.transpose(1, 0, 2).reshape(n, -1) @ w[p + "attn_output"].T
            x = norm(hidden, w[p + "ffn_norm"])
            gate, up = x @ w[p + "ffn_gate"].T, x @ w[p + "ffn_up"].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ w[p + "ffn_down"].T
        head = w["token_embd"] if self.tied else w["output"]
        return norm(hidden, w["output_norm"]) @ head.T
