"""A plugin of vLLM's for tests: its own CPU attention raises, and calls of ours are counted.

`vllm_server` puts it beside the server. Each process has a file of its own in the folder that
VLLM_COUNTS names, with int64 counts: writes, attentions, and query tokens attended, of all layers.
"""

import os

import numpy as np


def refuse(*_, **__):
    raise AssertionError("vLLM's own attention was called")


def register():
    folder = os.environ.get("VLLM_COUNTS")
    if not folder:
        return
    from vllm import _custom_ops

    own = [name for name in dir(_custom_ops) if name.startswith(("cpu_attn_", "cpu_attention_"))]
    assert len(own) >= 3, own
    for name in own:
        setattr(_custom_ops, name, refuse)

    from rocmforge.integrations.vllm.backend import Implementation

    counts = np.memmap(f"{folder}/{os.getpid()}", np.int64, "w+", shape=(3,))
    write, attend = Implementation.do_kv_cache_update, Implementation.forward

    def counted_write(self, *arguments):
        counts[0] += 1
        return write(self, *arguments)

    def counted_attend(self, layer, query, key, value, kv_cache, meta, **options):
        if meta is not None:
            counts[1] += 1
            counts[2] += meta.num_actual_tokens
        return attend(self, layer, query, key, value, kv_cache, meta, **options)

    Implementation.do_kv_cache_update, Implementation.forward = counted_write, counted_attend
