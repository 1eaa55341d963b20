"""Warm restart: a server ends, the next one begins with the prefix cache that it left.

python examples/warm_restart.py          (needs: pip install "rocmforge[snapshots]")
"""

import os
import subprocess
import sys
import tempfile

import numpy as np

from rocmforge import KVCache

LAYERS, KV_HEADS, DIM = 4, 2, 32
system = np.random.default_rng(0).integers(0, 32_000, 512, dtype=np.int32)


def serve(cache: KVCache, sequence_id: int, question: list[int]) -> np.ndarray:
    """Compute what is not cached of a request, and give the attention of its last token."""
    prompt = np.concatenate([system, np.array(question, np.int32)])
    found = cache.add_sequence(sequence_id, prompt)
    batch = cache.append([sequence_id], len(prompt) - found)
    print(f"  pid {os.getpid()}: {found:3} tokens found, {batch.num_tokens:3} computed")
    for layer in range(LAYERS):  # a model's projections; here any function of the token will do
        x = np.sin(prompt[found:, None] * (layer + 1.0 + np.arange(KV_HEADS * DIM)))
        key = value = x.reshape(-1, KV_HEADS, DIM).astype(np.float32)
        cache.write(layer, key, value, batch)
        out = cache.attend(layer, key, batch)
    cache.free(sequence_id)
    return out[-1]


def first_server(path: str) -> None:
    cache = KVCache(num_layers=LAYERS, num_blocks=64, num_kv_heads=KV_HEADS, head_dim=DIM,
                    dtype="float32", device="cpu")  # fmt: skip
    print("a server begins with nothing")
    serve(cache, 0, [1, 2, 3])
    serve(cache, 1, [4, 5, 6])
    cache.save(path, sequences=[])  # the prefix cache alone: requests ended with their connections
    print(f"  saved {os.path.getsize(path):,} bytes, in place of what was there, or not at all")


def second_server(path: str) -> None:
    cache = KVCache.load(path, num_blocks=128, device="cpu")  # with more memory than before
    print("the next begins where it ended")
    warm = serve(cache, 0, [7, 8, 9])
    cache.reset_prefix_cache()
    cold = serve(cache, 1, [7, 8, 9])
    assert np.array_equal(warm, cold)
    print("  what was read back gives the same bits as what is computed anew")


if len(sys.argv) == 3:
    {"first": first_server, "second": second_server}[sys.argv[1]](sys.argv[2])
else:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cache.safetensors")
        for server in ("first", "second"):  # two processes
            subprocess.run([sys.executable, __file__, server, path], check=True)
