"""``--check``: the same tokens once more, with dense attention in float64 and no cache at all.

The whole forward pass is repeated in float64 for each sequence by itself, its system prompt
included: keys and values come from this pass and never from the pool. It shares nothing with
``rocmforge.cli.llama`` but the weights. The tokens that the paged run produced are given to it
(teacher forcing), so every position can be compared, also after a first difference.

Two things are demanded at each position where a token was chosen:

- no logit differs by more than the limit of the cache's type;
- the likeliest token is the same. With keys and values in float32 this is strict. In float16 and
  bfloat16 they, the queries and the attention's output are rounded to 11 and 8 bits, so two tokens
  whose logits lie closer together than the error may rightly change places: another token is
  accepted only where the reference holds it less than twice the limit below its own best, which is
  all that two errors of the size of the limit can do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rocmforge.cli.generate import Answer
from rocmforge.cli.gguf_llama import Layer, LlamaConfig, LlamaWeights

__all__ = ["LIMITS", "CheckResult", "check", "dense_logits"]

Array = npt.NDArray[np.float64]

# The largest difference of a logit that is accepted, by the type of keys and values. Logits of
# these models spread over some 30. See docs/demo.md for what was measured.
LIMITS = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}


@dataclass(frozen=True)
class CheckResult:
    """What the comparison found."""

    dtype: str
    limit: float
    largest_difference: float
    num_tokens: int
    num_equal: int  # positions whose likeliest token is the reference's
    num_close: int  # positions where it is not, and the reference all but ties

    @property
    def passed(self) -> bool:
        """Whether every token and every logit is as it must be."""
        accepted = self.num_equal + (0 if self.dtype == "float32" else self.num_close)
        # written so that a NaN fails
        return accepted == self.num_tokens and self.largest_difference <= self.limit


def check(weights: LlamaWeights, answers: Sequence[Answer], dtype: str) -> CheckResult:
    """Compare the logits that a paged run kept with those of dense attention in float64."""
    limit = LIMITS[dtype]
    largest = 0.0
    total = equal = close = 0
    for answer, expected in zip(answers, dense_logits(weights, answers), strict=True):
        found = np.stack(answer.logits).astype(np.float64)
        difference = float(np.abs(found - expected).max())
        largest = difference if np.isnan(difference) else max(largest, difference)
        ours, theirs = found.argmax(axis=1), expected.argmax(axis=1)
        positions = np.arange(len(ours))
        margins = expected[positions, theirs] - expected[positions, ours]
        total += len(ours)
        equal += int((ours == theirs).sum())
        close += int(((ours != theirs) & (margins <= 2 * limit)).sum())
        if np.isnan(largest):
            break
    return CheckResult(dtype, limit, largest, total, equal, close)


def dense_logits(weights: LlamaWeights, answers: Sequence[Answer]) -> Iterator[Array]:
    """Give for each answer the logits that chose its tokens, float64 ``[tokens, vocab_size]``."""
    config = weights.config
    inputs = [answer.prompt + answer.tokens[:-1] for answer in answers]
    bounds = np.cumsum([0] + [len(tokens) for tokens in inputs])
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    # Laid end to end only to convert each matrix to float64 once; no sequence sees another.
    hidden = weights.embedding[np.concatenate(inputs)].astype(np.float64)
    for layer in weights.layers:
        hidden += _attention(_normalised(hidden, layer.attn_norm, config), layer, weights, spans)
        x = _normalised(hidden, layer.ffn_norm, config)
        gate, up = np.split(x @ layer.gate_up.T.astype(np.float64), 2, axis=1)
        with np.errstate(over="ignore"):
            hidden += (gate / (1 + np.exp(-gate)) * up) @ layer.down.T.astype(np.float64)
    hidden = _normalised(hidden, weights.final_norm, config)
    head = weights.head.T.astype(np.float64)
    for answer, span in zip(answers, spans, strict=True):
        yield hidden[span][len(answer.prompt) - 1 :] @ head


def _normalised(x: Array, weight: npt.NDArray[np.float32], config: LlamaConfig) -> Array:
    scaled: Array = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + config.norm_eps) * weight
    return scaled


def _attention(x: Array, layer: Layer, weights: LlamaWeights, spans: Sequence[slice]) -> Array:
    config = weights.config
    qkv = x @ layer.qkv.T.astype(np.float64)
    cuts = (config.query_size, config.query_size + config.kv_size)
    query, key, value = (
        part.reshape(len(x), -1, config.head_dim) for part in np.split(qkv, cuts, axis=1)
    )
    out = np.empty_like(query)
    group = config.num_heads // config.num_kv_heads
    for span in spans:
        k = _rotated(key[span], weights.inverse_frequencies)
        q = _rotated(query[span], weights.inverse_frequencies)
        length = len(k)
        hidden_from = np.triu(np.ones((length, length), np.bool_), k=1)  # later tokens
        for head in range(config.num_heads):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(config.head_dim)
            scores[hidden_from] = -np.inf
            weight = np.exp(scores - scores.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            out[span, head] = weight @ value[span, head // group]
    result: Array = out.reshape(len(x), -1) @ layer.attn_out.T.astype(np.float64)
    return result


def _rotated(heads: Array, inverse_frequencies: Array) -> Array:
    """Turn dimensions 0 and 1, 2 and 3, ... of positions 0, 1, 2, ... (RoPE in GGUF's order)."""
    angles = np.arange(len(heads))[:, None, None] * inverse_frequencies
    turned = 2 * len(inverse_frequencies)
    even, odd = heads[..., 0:turned:2], heads[..., 1:turned:2]
    out = heads.copy()
    out[..., 0:turned:2] = even * np.cos(angles) - odd * np.sin(angles)
    out[..., 1:turned:2] = even * np.sin(angles) + odd * np.cos(angles)
    return out
