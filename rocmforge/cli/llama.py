"""The forward pass of a Llama-architecture model in NumPy, with keys and values in a paged cache.

Everything but the attention is plain arithmetic on the tokens of a batch laid end to end; the cache
alone knows which sequence a token belongs to. Touvron et al., LLaMA (arXiv:2302.13971).
"""

from time import perf_counter

import numpy as np
import numpy.typing as npt

from rocmforge import Batch, KVCache
from rocmforge.cli.gguf_llama import LlamaWeights
from rocmforge.cli.linear import Linear, Threads

__all__ = ["Clock", "Llama"]

Matrix = npt.NDArray[np.float32]


class Clock:
    """Where time goes: each lap charges the time since the last one to a name."""

    NAMES = ("weights", "attention", "cache", "sampling", "rest")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(self.NAMES, 0.0)
        self._last = perf_counter()

    def start(self) -> None:
        """Begin to count now, charging nothing for the time before."""
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        """Charge the time since the last lap to `name`."""
        now = perf_counter()
        self.seconds[name] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """All seconds that were charged."""
        return sum(self.seconds.values())


class Llama:
    """A model that computes in float32; the cache decides the type of keys and values.

    Parameters
    ----------
    weights : LlamaWeights
        The model.
    threads : Threads
        Threads for the products of a decode step.
    """

    def __init__(self, weights: LlamaWeights, threads: Threads) -> None:
        self.config = weights.config
        self.weights = weights
        self._linear = Linear(threads)

    def forward(
        self, token_ids: npt.NDArray[np.int64], cache: KVCache, batch: Batch, clock: Clock
    ) -> Matrix:
        """Compute the new tokens of a batch and write their keys and values into the cache.

        Parameters
        ----------
        token_ids : int64 array ``[batch.num_tokens]``
            The tokens of all sequences, in the batch's order.
        cache : KVCache
            The cache that made `batch`.
        batch : Batch
            Which sequences and positions the tokens belong to.
        clock : Clock
            Charged with the time.

        Returns
        -------
        float32 array ``[num_seqs, vocab_size]``
            Logits after the last token of each sequence.
        """
        config, weights, linear = self.config, self.weights, self._linear
        count = len(token_ids)
        hidden = weights.embedding[token_ids]
        first_key = config.num_heads
        first_value = first_key + config.num_kv_heads
        turns = rope_turns(batch.positions, weights.inverse_frequencies)
        clock.lap("rest")
        for index, layer in enumerate(weights.layers):
            x = rms_norm(hidden, layer.attn_norm, config.norm_eps)
            clock.lap("rest")
            qkv = linear(x, layer.qkv)
            clock.lap("weights")
            heads = qkv.reshape(count, -1, config.head_dim)
            rope(heads[:, :first_value], turns)  # queries and keys
            heads = heads.astype(cache.dtype, copy=False)
            query, key, value = (
                heads[:, :first_key],
                heads[:, first_key:first_value],
                heads[:, first_value:],
            )
            clock.lap("rest")
            cache.write(index, key, value, batch)
            clock.lap("cache")
            attended = cache.attend(index, query, batch)
            clock.lap("attention")
            x = attended.reshape(count, config.query_size).astype(np.float32, copy=False)
            clock.lap("rest")
            hidden += linear(x, layer.attn_out)
            clock.lap("weights")
            x = rms_norm(hidden, layer.ffn_norm, config.norm_eps)
            clock.lap("rest")
            gate_up = linear(x, layer.gate_up)
            clock.lap("weights")
            x = swiglu(gate_up)
            clock.lap("rest")
            hidden += linear(x, layer.down)
            clock.lap("weights")
        last = hidden[batch.cu_seqlens_q[1:] - 1]
        x = rms_norm(last, weights.final_norm, config.norm_eps)
        clock.lap("rest")
        logits = linear(x, weights.head)
        clock.lap("weights")
        return logits


def rms_norm(x: Matrix, weight: Matrix, eps: float) -> Matrix:
    """Scale each row to a root mean square of one, then by `weight` (arXiv:1910.07467)."""
    size = np.vecdot(x, x)
    size /= np.float32(x.shape[1])
    size += np.float32(eps)
    np.sqrt(size, out=size)
    result: Matrix = x / size[:, None]
    result *= weight
    return result


def rope_turns(
    positions: npt.NDArray[np.int64], inverse_frequencies: npt.NDArray[np.float64]
) -> npt.NDArray[np.complex64]:
    """Give the rotation of each position and pair as complex numbers, ``[tokens, 1, pairs]``."""
    angles = positions[:, None] * inverse_frequencies  # in float64: positions reach thousands
    turns: npt.NDArray[np.complex64] = np.exp(1j * angles).astype(np.complex64)[:, None, :]
    return turns


def rope(heads: Matrix, turns: npt.NDArray[np.complex64]) -> None:
    """Turn neighbouring dimensions of ``[tokens, heads, head_dim]`` in place."""
    pairs = heads[..., : 2 * turns.shape[-1]].view(np.complex64)
    pairs *= turns


def swiglu(gate_up: Matrix) -> Matrix:
    """Give SiLU(gate) x up, of rows that hold the gate, then the other half (arXiv:2002.05202)."""
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    with np.errstate(
        over="ignore"
    ):  # exp of a large -gate is infinite, and the result a right zero
        # in place: after a matrix went through the caches, every new array is a miss
        result = np.exp(-gate)
    result += 1.0
    np.divide(gate, result, out=result)
    result *= up
    return result
