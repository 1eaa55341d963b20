"""Every bad argument of the operations: the error names it, and nothing was written."""

# ruff: noqa: E501 - tables of cases, one a line

import copy
import ctypes
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from exchange import Tensor, Versioned
from ops_cases import BFLOAT16, DTYPES, EIGHT_BIT, FLOAT8, FLOAT32, INT8, assert_close, bits, make
from rocmforge import reference
from rocmforge.dtypes import NAMES, largest_element, resolve
from rocmforge.ops import (
    _cpu,
    calibrate,
    copy_blocks,
    gather_blocks,
    get_num_threads,
    merge_states,
    paged_attention,
    scatter_blocks,
    set_num_threads,
    write_kv,
)


def i32(*values):
    return np.array(values, np.int32)


def attention_arguments(dtype=np.float32):
    cache = np.ones((5, 2, 16, 64), dtype)
    return {
        "query": np.ones((3, 4, 64), dtype),
        "k_cache": cache,
        "v_cache": cache.copy(),
        "block_table": np.array([[0, 1], [2, 3]], np.int32),
        "seq_lens": i32(20, 32),
        "cu_seqlens_q": i32(0, 2, 3),
        "rows": None,
        "scale": None,
        "causal": True,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "sinks": None,
        "mask": None,
        "k_scale": None,
        "v_scale": None,
        "max_seqlen_q": None,
        "max_seq_len": None,
        "num_splits": None,
        "deterministic": True,
        "layout": "HND",
        "out": np.full((3, 4, 64), 7, dtype),
        "return_lse": False,
        "workspace": None,
        "stream": None,
    }


def eight_bit(dtype, **change):
    """Changes that make the caches 8-bit ones."""
    caches = {
        name: np.ones((5, 2, 16, 64), np.int8).astype(dtype) for name in ("k_cache", "v_cache")
    }
    return caches | {"k_scale": 1.0, "v_scale": 1.0} | change


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def unaligned(shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


def strange_strides(shape):
    """Strides of float32 that are no whole elements."""
    strides = [int(np.prod(shape[i + 1 :])) * 4 for i in range(len(shape))]
    strides[0] += 2
    buffer = np.zeros(shape[0] * strides[0], np.uint8)
    return np.ndarray(shape, np.float32, buffer, strides=strides)


def read_only(array):
    array.flags.writeable = False
    return array


SHARED = ones(400, 4, 64)
SHARED[0, 0, :2] = 1e-44  # as int32: 7

ATTENTION = [
    # query
    ({"query": [[[1.0]]]}, TypeError, "query must be a NumPy array or an object with __dlpack__, got list"),
    ({"query": None}, TypeError, "query must be a NumPy array .* got NoneType"),
    ({"query": ones(3, 4, 64, dtype=np.float64)}, ValueError, "query must be float32, float16 or bfloat16, got float64"),
    ({"query": ones(3, 4, 64, dtype=np.int32)}, ValueError, "query must be float32, .* got int32"),
    ({"query": ones(3, 4, 64).astype(">f4")}, ValueError, "query must be aligned and in native byte order"),
    ({"query": unaligned((3, 4, 64), np.float32)}, ValueError, "query must be aligned"),
    ({"query": ones(3, 256)}, ValueError, r"query must have shape \[num_tokens, num_heads, head_dim\], got \[3, 256\]"),
    ({"query": ones(3, 4, 128)[..., ::2]}, ValueError, "query must be contiguous in its last dimension, got a stride of 8 bytes"),
    ({"query": strange_strides((3, 4, 64))}, ValueError, "query must be aligned"),
    ({"query": ones(3, 5, 64)}, ValueError, "query must have a multiple of the 2 heads of k_cache, got 5"),
    ({"query": ones(3, 0, 64)}, ValueError, "query must have a multiple of the 2 heads of k_cache, got 0"),
    ({"query": ones(3, 4, 60)}, ValueError, r"query must have a head_dim .* of 8 to 576 in steps of 8, got \[3, 4, 60\]"),
    ({"query": ones(3, 4, 584)}, ValueError, "query must have a head_dim"),
    ({"query": ones(3, 4, 0)}, ValueError, "query must have a head_dim"),
    # caches
    ({"k_cache": "cache"}, TypeError, "k_cache must be a NumPy array .* got str"),
    ({"v_cache": 1.0}, TypeError, "v_cache must be a NumPy array .* got float"),
    ({"k_cache": ones(5, 2, 16, 64, dtype=np.float16)}, ValueError, "k_cache must have the dtype of query, float32, or be float8_e4m3fn, float8_e4m3fnuz or int8, got float16"),
    ({"v_cache": ones(5, 2, 16, 64, dtype=BFLOAT16)}, ValueError, "v_cache must have the dtype of query, float32, got bfloat16"),
    ({"k_cache": unaligned((5, 2, 16, 64), np.float32)}, ValueError, "k_cache must be aligned"),
    ({"k_cache": ones(10, 16, 64)}, ValueError, r"k_cache must have shape \[num_blocks, num_kv_heads, block_size, head_dim\], got \[10, 16, 64\]"),
    ({"v_cache": ones(10, 16, 64)}, ValueError, "v_cache must have shape"),
    ({"v_cache": ones(10, 16, 64), "layout": "NHD"}, ValueError, r"v_cache must have shape \[num_blocks, block_size, num_kv_heads, head_dim\]"),
    ({"v_cache": ones(4, 2, 16, 64)}, ValueError, r"v_cache must have the blocks, heads and block size of k_cache, \[5, 2, 16, 64\], got \[4, 2, 16, 64\]"),
    ({"v_cache": ones(5, 2, 8, 64)}, ValueError, "v_cache must have the blocks, heads and block size of k_cache"),
    ({"k_cache": ones(5, 0, 16, 64), "v_cache": ones(5, 0, 16, 64)}, ValueError, "k_cache must have at least one head and one token a block"),
    ({"k_cache": ones(5, 2, 0, 64), "v_cache": ones(5, 2, 0, 64)}, ValueError, "k_cache must have at least one head and one token a block"),
    ({"k_cache": ones(5, 2, 16, 32)}, ValueError, "k_cache must have the head_dim of query, 64"),
    ({"v_cache": ones(5, 2, 16, 63)}, ValueError, "v_cache must have a head_dim"),
    ({"k_cache": ones(5, 2, 16, 128)[..., ::2]}, ValueError, "k_cache must be contiguous in its last dimension"),
    ({"v_cache": ones(5, 2, 64, 16).swapaxes(2, 3)}, ValueError, "v_cache must be contiguous in its last dimension"),
    ({"k_cache": np.broadcast_to(np.float32(0), (2**31, 2, 16, 64)), "v_cache": np.broadcast_to(np.float32(0), (2**31, 2, 16, 64))}, ValueError, r"k_cache must have at most 2\*\*31 - 1 blocks"),
    ({"layout": "HDN"}, ValueError, "layout must be 'HND' or 'NHD', got 'HDN'"),
    ({"layout": 3}, TypeError, "layout must be 'HND' or 'NHD', got int"),
    # tables and lengths
    ({"block_table": [[0, 1], [2, 3]]}, TypeError, "block_table must be a NumPy array .* got list"),
    ({"block_table": np.zeros((2, 2), np.int64)}, ValueError, "block_table must be int32, got int64"),
    ({"block_table": np.zeros((2, 2), ">i4")}, ValueError, "block_table must be aligned and in native byte order"),
    ({"block_table": i32(0, 1)}, ValueError, r"block_table must have shape \[num_rows, max_blocks\], got \[2\]"),
    ({"block_table": np.zeros((2, 4), np.int32)[:, ::2]}, ValueError, "block_table must be contiguous in its last dimension"),
    ({"block_table": np.zeros((1, 2), np.int32)}, ValueError, r"block_table must have a row for each of the 2 sequences, got \[1, 2\]"),
    ({"block_table": np.array([[0, 1], [2, 5]], np.int32)}, ValueError, "block_table must name blocks below 5, got 5 at row 1, column 1"),
    ({"block_table": np.zeros((2, 1), np.int32)}, ValueError, r"seq_lens must be 0 to 16 \(the width of block_table times the block size\), got 20 at index 0"),
    ({"seq_lens": [20, 32]}, TypeError, "seq_lens must be a NumPy array"),
    ({"seq_lens": np.array([20, 32])}, ValueError, "seq_lens must be int32, got int64"),
    ({"seq_lens": i32(20, 32).reshape(1, 2)}, ValueError, r"seq_lens must have shape \[num_seqs\], got \[1, 2\]"),
    ({"seq_lens": i32(20, 0, 32)[::2]}, ValueError, "seq_lens must be contiguous"),
    ({"seq_lens": i32(20, 33)}, ValueError, "seq_lens must be 0 to 32 .* got 33 at index 1"),
    ({"seq_lens": i32(-1, 32)}, ValueError, "seq_lens must be 0 to 32 .* got -1 at index 0"),
    ({"seq_lens": i32(1, 32)}, ValueError, "seq_lens must include the new tokens: sequence 0 has 2 query tokens and a seq_len of 1"),
    ({"cu_seqlens_q": None}, ValueError, "cu_seqlens_q is needed when query and seq_lens differ in length, got 3 tokens and 2 sequences"),
    ({"cu_seqlens_q": [0, 2, 3]}, TypeError, "cu_seqlens_q must be a NumPy array"),
    ({"cu_seqlens_q": np.array([0, 2, 3])}, ValueError, "cu_seqlens_q must be int32, got int64"),
    ({"cu_seqlens_q": i32(0, 3)}, ValueError, r"cu_seqlens_q must have shape \[num_seqs \+ 1\] with 3 entries, got \[2\]"),
    ({"cu_seqlens_q": i32(1, 2, 3)}, ValueError, "cu_seqlens_q must start with 0, got 1"),
    ({"cu_seqlens_q": i32(0, 2, 1)}, ValueError, "cu_seqlens_q must not decrease, got 1 at index 2 after 2"),
    ({"cu_seqlens_q": i32(0, 2, 4)}, ValueError, "cu_seqlens_q must stay within the 3 tokens of query, got 4 at index 2"),
    ({"rows": [0, 1]}, TypeError, "rows must be a NumPy array"),
    ({"rows": np.array([0, 1])}, ValueError, "rows must be int32, got int64"),
    ({"rows": i32(0)}, ValueError, r"rows must have shape \[num_seqs\] with 2 entries, got \[1\]"),
    ({"rows": i32(0, 2)}, ValueError, "rows must name rows of block_table, 0 to 1, got 2 at index 1"),
    ({"rows": i32(-1, 0)}, ValueError, "rows must name rows of block_table, 0 to 1, got -1 at index 0"),
    # numbers
    ({"scale": "big"}, TypeError, "scale must be a float or None, got str"),
    ({"scale": [1.0]}, TypeError, "scale must be a float or None, got list"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"scale": 1e39}, ValueError, "scale must be finite"),
    ({"causal": 1}, TypeError, "causal must be a bool, got int"),
    ({"causal": None}, TypeError, "causal must be a bool, got NoneType"),
    ({"max_seqlen_q": 1.5}, TypeError, "max_seqlen_q must be an integer or None, got float"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must not be negative, got -1"),
    ({"max_seqlen_q": 1}, ValueError, "max_seqlen_q must bound every sequence: it is 1, sequence 0 has 2 query tokens"),
    ({"max_seq_len": "all"}, TypeError, "max_seq_len must be an integer or None, got str"),
    ({"max_seq_len": 31}, ValueError, "max_seq_len must bound every sequence: it is 31, seq_lens has 32 at index 1"),
    # types and scales
    ({"query": ones(3, 4, 64).astype(FLOAT8)}, ValueError, "query must be float32, float16 or bfloat16, got float8_e4m3fn"),
    ({"query": ones(3, 4, 64, dtype=np.int8)} | eight_bit(INT8), ValueError, "query must be float32, float16 or bfloat16, got int8"),
    ({"k_cache": ones(5, 2, 16, 64, dtype=np.uint8)}, ValueError, "k_cache must have the dtype of query, float32, or be float8_e4m3fn, float8_e4m3fnuz or int8, got uint8; kv_dtype says which float8 uint8 holds"),
    ({"kv_dtype": "int8"}, ValueError, "kv_dtype must be float8_e4m3fn or float8_e4m3fnuz, the types that may come as uint8, got int8"),
    ({"kv_dtype": "float7"}, ValueError, "kv_dtype must be one of float32, .* got 'float7'"),
    ({"kv_dtype": FLOAT8}, ValueError, "k_cache must be float8_e4m3fn, as kv_dtype says, or uint8, got float32"),
    (eight_bit(FLOAT8, kv_dtype="float8_e4m3fnuz"), ValueError, "k_cache must be float8_e4m3fnuz, as kv_dtype says, or uint8, got float8_e4m3fn"),
    (eight_bit(INT8, v_cache=ones(5, 2, 16, 64)), ValueError, "v_cache must have the dtype of k_cache, int8, got float32"),
    (eight_bit(INT8, v_cache=ones(5, 2, 16, 64).astype(FLOAT8)), ValueError, "v_cache must have the dtype of k_cache, int8, got float8_e4m3fn"),
    ({"k_scale": 1.0}, ValueError, "k_scale must be None for a cache of float32: only 8-bit elements have scales"),
    ({"v_scale": ones(2)}, ValueError, "v_scale must be None for a cache of float32"),
    (eight_bit(INT8, k_scale=None), ValueError, r"k_scale must be given for a cache of int8: a float, float32 \[num_kv_heads\], or a float32 pool \[num_blocks, num_kv_heads, block_size\]"),
    (eight_bit(FLOAT8, v_scale=None), ValueError, "v_scale must be given for a cache of float8_e4m3fn"),
    (eight_bit(INT8, k_scale="1"), TypeError, "k_scale must be a float, float32 .* got str"),
    (eight_bit(INT8, k_scale=[1.0, 1.0]), TypeError, "k_scale must be a float, float32 .* got list"),
    (eight_bit(INT8, k_scale=0.0), ValueError, "k_scale must be positive and finite in float32, got 0.0"),
    (eight_bit(INT8, k_scale=-1), ValueError, "k_scale must be positive and finite in float32, got -1"),
    (eight_bit(INT8, v_scale=np.nan), ValueError, "v_scale must be positive and finite in float32, got nan"),
    (eight_bit(INT8, v_scale=1e39), ValueError, "v_scale must be positive and finite in float32"),
    (eight_bit(INT8, v_scale=1e-40), ValueError, "v_scale must be positive and finite in float32, got 1e-40"),
    (eight_bit(INT8, v_scale=10**400), ValueError, "v_scale must be finite, got a number beyond every float"),
    (eight_bit(INT8, k_scale=ones(2, dtype=np.float64)), ValueError, "k_scale must be float32, got float64"),
    (eight_bit(INT8, k_scale=ones(3)), ValueError, r"k_scale must have shape \[2\] or \[5, 2, 16\] as k_cache has, got \[3\]"),
    (eight_bit(INT8, v_scale=ones(5, 16, 2)), ValueError, r"v_scale must have shape \[2\] or \[5, 2, 16\] as k_cache has, got \[5, 16, 2\]"),
    (eight_bit(INT8, k_scale=unaligned((2,), np.float32)), ValueError, "k_scale must be aligned"),
    (eight_bit(INT8, k_scale=np.array([1, 0], np.float32)), ValueError, "k_scale must be positive, finite and not subnormal: it is not at index 1"),
    (eight_bit(INT8, v_scale=np.array([np.inf, 1], np.float32)), ValueError, "v_scale must be positive, .* not at index 0"),
    # what happens to logits
    ({"window_size": 5}, TypeError, "window_size must be two integers, got 5"),
    ({"window_size": None}, TypeError, "window_size must be two integers, got None"),
    ({"window_size": (5,)}, TypeError, r"window_size must be two integers, got \(5,\)"),
    ({"window_size": (5, 0.5)}, TypeError, r"window_size must be two integers, got \(5, 0.5\)"),
    ({"window_size": (-2, 0)}, ValueError, r"window_size must be two numbers of tokens, or -1 for no bound, got \(-2, 0\)"),
    ({"window_size": [0, -(2**70)]}, ValueError, "window_size must be two numbers of tokens"),
    ({"softcap": None}, TypeError, "softcap must be a float, got NoneType"),
    ({"softcap": "3"}, TypeError, "softcap must be a float, got str"),
    ({"softcap": -1.0}, ValueError, "softcap must be 0, or positive and finite in float32, got -1.0"),
    ({"softcap": np.inf}, ValueError, "softcap must be 0, or positive and finite in float32, got inf"),
    ({"softcap": 1e-60}, ValueError, "softcap must be 0, or positive and finite in float32, got 1e-60"),
    ({"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, "alibi_slopes must be a NumPy array"),
    ({"alibi_slopes": ones(4, dtype=np.float64)}, ValueError, "alibi_slopes must be float32, got float64"),
    ({"alibi_slopes": ones(2)}, ValueError, r"alibi_slopes must have shape \[num_heads\] with 4 entries, got \[2\]"),
    ({"alibi_slopes": ones(1, 4)}, ValueError, r"alibi_slopes must have shape \[num_heads\], got \[1, 4\]"),
    ({"alibi_slopes": ones(8)[::2]}, ValueError, "alibi_slopes must be contiguous"),
    ({"sinks": 0.0}, TypeError, "sinks must be a NumPy array"),
    ({"sinks": ones(4, dtype=np.float16)}, ValueError, "sinks must be float32, got float16"),
    ({"sinks": ones(5)}, ValueError, r"sinks must have shape \[num_heads\] with 4 entries, got \[5\]"),
    ({"mask": [[1]]}, TypeError, "mask must be a NumPy array"),
    ({"mask": ones(3, 2)}, ValueError, "mask must be uint8 or bool, got float32"),
    ({"mask": ones(3, dtype=np.uint8)}, ValueError, r"mask must have shape \[3, max_seqlen_q\], one row a token of query, got \[3\]"),
    ({"mask": ones(2, 2, dtype=np.uint8)}, ValueError, r"mask must have shape \[3, max_seqlen_q\], .* got \[2, 2\]"),
    ({"mask": ones(3, 1, dtype=np.uint8)}, ValueError, "mask must have a column for each query token of a sequence: it has 1, sequence 0 has 2 query tokens"),
    ({"mask": ones(3, 4, dtype=np.uint8)[:, ::2]}, ValueError, "mask must be contiguous in its last dimension"),
    # what is for other devices
    ({"num_splits": 0}, ValueError, "num_splits must be at least 1, got 0"),
    ({"num_splits": 1.0}, TypeError, "num_splits must be an integer or None, got float"),
    ({"deterministic": 1}, TypeError, "deterministic must be a bool, got int"),
    ({"return_lse": None}, TypeError, "return_lse must be a bool, got NoneType"),
    ({"workspace": 1 << 20}, TypeError, "workspace must be a NumPy array"),
    ({"workspace": ones(64)}, ValueError, r"workspace must be uint8 \[num_bytes\], got float32 \[64\]"),
    ({"workspace": read_only(ones(64, dtype=np.uint8))}, ValueError, "workspace must be writable"),
    ({"stream": 0}, ValueError, "stream must be None for arrays in host memory, got int"),
    # out
    ({"out": [0.0]}, TypeError, "out must be a NumPy array"),
    ({"out": ones(3, 4, 64, dtype=np.float16)}, ValueError, "out must have the dtype of query, float32, got float16"),
    ({"out": ones(2, 4, 64)}, ValueError, r"out must have shape \[3, 4, 64\], got \[2, 4, 64\]"),
    ({"out": ones(3, 4)}, ValueError, r"out must have shape \[3, 4, 64\], got \[3, 4\]"),
    ({"out": read_only(ones(3, 4, 64))}, ValueError, "out must be writable, got a read-only array"),
    ({"out": ones(3, 4, 128)[..., ::2]}, ValueError, "out must be contiguous in its last dimension"),
    ({"query": SHARED[:3], "out": SHARED[:3]}, ValueError, "out must not overlap query in memory"),
    ({"query": SHARED[:3], "out": SHARED[2:5]}, ValueError, "out must not overlap query in memory"),
    ({"k_cache": SHARED[:160].reshape(20, 2, 16, 64), "v_cache": SHARED[160:320].reshape(20, 2, 16, 64), "out": SHARED[3:6]}, ValueError, "out must not overlap k_cache in memory"),
    ({"k_cache": SHARED[:160].reshape(20, 2, 16, 64), "v_cache": SHARED[160:320].reshape(20, 2, 16, 64), "out": SHARED[300:303]}, ValueError, "out must not overlap v_cache in memory"),
    ({"seq_lens": SHARED[0, 0, :2].view(np.int32), "out": SHARED[:3]}, ValueError, "out must not overlap seq_lens"),
    ({"alibi_slopes": SHARED[0, 0, :4], "out": SHARED[:3]}, ValueError, "out must not overlap alibi_slopes"),
    ({"sinks": SHARED[0, 0, :4], "out": SHARED[:3]}, ValueError, "out must not overlap sinks"),
    ({"mask": SHARED[0, 0, :3].view(np.uint8).reshape(3, 4), "out": SHARED[:3]}, ValueError, "out must not overlap mask"),
    (eight_bit(INT8, k_scale=SHARED[0, 0, 2:4], out=SHARED[:3]), ValueError, "out must not overlap k_scale"),
    (eight_bit(INT8, v_scale=SHARED[0, 0, 2:4], out=SHARED[:3]), ValueError, "out must not overlap v_scale"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ATTENTION)
def test_attention_rejects(change, error, message):
    arguments = attention_arguments() | change
    out = arguments["out"]
    before = out.copy() if isinstance(out, np.ndarray) else None
    with pytest.raises(error, match=message):
        paged_attention(**arguments)
    if before is not None:
        np.testing.assert_array_equal(out, before)


def test_attention_accepts_what_the_rejections_start_from():
    arguments = attention_arguments()
    assert paged_attention(**arguments) is arguments["out"]
    np.testing.assert_allclose(arguments["out"], 1, rtol=1e-6)
    bounds = {"max_seqlen_q": np.int64(2), "max_seq_len": 32, "causal": np.True_}
    others = {"num_splits": 3, "deterministic": False, "workspace": ones(64, dtype=np.uint8)}
    mask = ones(3, 4, dtype=bool)[:, :2]
    paged_attention(**arguments | bounds | others)
    paged_attention(**arguments | {"mask": mask, "window_size": [np.int32(3), 2**80]})
    paged_attention(**arguments | eight_bit(INT8, k_scale=np.float64(1), v_scale=np.array(2)))
    out, lse = paged_attention(**arguments | {"return_lse": True})
    assert out is arguments["out"]
    assert lse.shape == (3, 4)


@pytest.mark.parametrize("change", [{"seq_lens": i32(33, 32)}, {"rows": i32(0, 9)}])
def test_a_bad_last_sequence_leaves_out_untouched(change):
    arguments = attention_arguments() | change
    with pytest.raises(ValueError, match="must"):
        paged_attention(**arguments)
    np.testing.assert_array_equal(arguments["out"], 7)


def write_arguments():
    return {
        "key": ones(3, 2, 64),
        "value": ones(3, 2, 64),
        "k_cache": np.full((5, 2, 16, 64), 7, np.float32),
        "v_cache": np.full((5, 2, 16, 64), 7, np.float32),
        "slot_mapping": np.array([0, -1, 79]),
        "layout": "HND",
    }


WRITE = [
    ({"key": [1.0]}, TypeError, "key must be a NumPy array .* got list"),
    ({"value": None}, ValueError, "value must be given with v_cache; both are None for a latent cache"),
    ({"key": ones(3, 2, 64, dtype=np.uint8)}, ValueError, "key must be float32, float16 or bfloat16, got uint8"),
    ({"key": ones(3, 128)}, ValueError, r"key must have shape \[num_tokens, num_kv_heads, head_dim\], got \[3, 128\]"),
    ({"value": ones(3, 128)}, ValueError, r"value must have shape \[num_tokens, num_kv_heads, v_head_dim\], got \[3, 128\]"),
    ({"key": ones(3, 3, 64)}, ValueError, r"key must have shape \[num_tokens, 2, 64\] as k_cache has, got \[3, 3, 64\]"),
    ({"key": ones(3, 2, 32)}, ValueError, r"key must have shape \[num_tokens, 2, 64\] as k_cache has, got \[3, 2, 32\]"),
    ({"value": ones(2, 2, 64)}, ValueError, r"value must have shape \[3, 2, 64\] as key and v_cache have, got \[2, 2, 64\]"),
    ({"value": ones(3, 2, 64, dtype=np.float16)}, ValueError, "value must have the dtype of key, float32, got float16"),
    ({"k_cache": ones(5, 2, 16, 64, dtype=BFLOAT16)}, ValueError, "k_cache must have the dtype of key, float32, or be float8_e4m3fn, float8_e4m3fnuz or int8, got bfloat16"),
    ({"v_cache": ones(5, 2, 16, 64, dtype=np.float16)}, ValueError, "v_cache must have the dtype of key, float32, got float16"),
    ({"v_cache": ones(5, 2, 8, 64)}, ValueError, "v_cache must have the blocks, heads and block size of k_cache"),
    ({"k_cache": ones(5, 2, 16, 12), "key": ones(3, 2, 12)}, ValueError, "k_cache must have a head_dim"),
    ({"v_cache": ones(5, 2, 16, 12), "value": ones(3, 2, 12)}, ValueError, "v_cache must have a head_dim"),
    ({"k_cache": read_only(ones(5, 2, 16, 64))}, ValueError, "k_cache must be writable, got a read-only array"),
    ({"v_cache": read_only(ones(5, 2, 16, 64))}, ValueError, "v_cache must be writable, got a read-only array"),
    ({"key": ones(3, 2, 128)[..., ::2]}, ValueError, "key must be contiguous in its last dimension"),
    ({"v_cache": ones(5, 2, 16, 128)[..., ::2]}, ValueError, "v_cache must be contiguous in its last dimension"),
    ({"v_cache": None}, ValueError, "v_cache must be given with value; both are None for a latent cache"),
    ({"value": None, "v_cache": None, "v_scale": 1.0, "k_cache": ones(5, 2, 16, 64, dtype=np.int8), "k_scale": 1.0}, ValueError, "v_scale must be None when v_cache is"),
    (eight_bit(INT8, v_scale=None), ValueError, "v_scale must be given for a cache of int8"),
    (eight_bit(INT8, k_scale=-1.0), ValueError, "k_scale must be positive and finite"),
    (eight_bit(INT8, k_scale=np.array([1, 1e-39], np.float32)), ValueError, "k_scale must be positive, finite and not subnormal: it is not at index 1"),
    (eight_bit(INT8, v_scale=np.array([np.nan, 1], np.float32)), ValueError, "v_scale must be positive, .* not at index 0"),
    (eight_bit(INT8, v_scale=read_only(ones(5, 2, 16))), ValueError, "v_scale must be writable, got a read-only array"),
    (eight_bit(INT8, k_scale=np.broadcast_to(np.float32(1), (5, 2, 16))), ValueError, "k_scale must be writable, got a read-only array"),
    ({"k_scale": 1.0}, ValueError, "k_scale must be None for a cache of float32"),
    ({"stream": 3}, ValueError, "stream must be None for arrays in host memory"),
    ({"slot_mapping": [0, -1, 79]}, TypeError, "slot_mapping must be a NumPy array .* got list"),
    ({"slot_mapping": i32(0, -1, 79)}, ValueError, "slot_mapping must be int64, got int32"),
    ({"slot_mapping": np.array([0, 1])}, ValueError, r"slot_mapping must have shape \[3\], one slot a token of key, got \[2\]"),
    ({"slot_mapping": np.zeros((3, 1), np.int64)}, ValueError, r"slot_mapping must have shape \[3\]"),
    ({"slot_mapping": np.zeros(6, np.int64)[::2]}, ValueError, "slot_mapping must be contiguous"),
    ({"slot_mapping": np.array([0, -1, 80])}, ValueError, r"slot_mapping must name slots below 80 \(num_blocks times block_size\), got 80 at index 2"),
    ({"slot_mapping": np.array([0, 2**62, 1])}, ValueError, "slot_mapping must name slots below 80 .* got 4611686018427387904 at index 1"),
    ({"layout": "hnd"}, ValueError, "layout must be 'HND' or 'NHD', got 'hnd'"),
    ({"layout": "NHD"}, ValueError, r"key must have shape \[num_tokens, 16, 64\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), WRITE)
def test_write_rejects(change, error, message):
    arguments = write_arguments() | change
    caches = [c for c in (arguments["k_cache"], arguments["v_cache"]) if c is not None]
    before = [cache.copy() for cache in caches]
    with pytest.raises(error, match=message):
        write_kv(**arguments)
    for cache, expected in zip(caches, before, strict=True):
        np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_write_rejects_overlap(name, cache):
    arguments = write_arguments()
    arguments[name] = arguments[cache][1].reshape(16, 2, 64)[:3]
    with pytest.raises(ValueError, match=f"{cache} must not overlap {name} in memory"):
        write_kv(**arguments)


def test_write_rejects_overlap_of_what_it_writes():
    arguments = write_arguments()
    with pytest.raises(ValueError, match="v_cache must not overlap k_cache in memory"):
        write_kv(**arguments | {"v_cache": arguments["k_cache"]})
    pool = ones(5, 2, 16)
    scales = {"k_scale": pool, "v_scale": pool}
    with pytest.raises(ValueError, match="v_scale must not overlap k_scale in memory"):
        write_kv(**arguments | eight_bit(INT8) | scales)
    key = pool.reshape(-1)[:128].reshape(1, 2, 64)
    some = {"key": key, "value": ones(1, 2, 64), "slot_mapping": np.array([3])}
    with pytest.raises(ValueError, match="k_scale must not overlap key in memory"):
        write_kv(**arguments | eight_bit(INT8, k_scale=pool, v_scale=ones(5, 2, 16)) | some)
    np.testing.assert_array_equal(pool, 1)


COPY = [
    (lambda c: ([[0, 1]], i32(0, 1).reshape(1, 2)), TypeError, r"caches\[0\] must be a NumPy array .* got list"),
    (lambda c: (None, i32(0, 1).reshape(1, 2)), TypeError, r"caches\[0\] must be a NumPy array"),
    (lambda c: ([c, np.zeros(())], i32(0, 1).reshape(1, 2)), ValueError, r"caches\[1\] must have shape \[num_blocks, \.\.\.\], got \[\]"),
    (lambda c: ([c, np.zeros((4, 2))], i32(0, 1).reshape(1, 2)), ValueError, r"caches\[1\] must have the 5 blocks of caches\[0\], got \[4, 2\]"),
    (lambda c: ([c, np.full((5, 2), None)], i32(0, 1).reshape(1, 2)), ValueError, r"caches\[1\] must not hold Python objects, got object"),
    (lambda c: ([read_only(c)], i32(0, 1).reshape(1, 2)), ValueError, r"caches\[0\] must be writable"),
    (lambda c: ([ones(5, 2, 2, 2, 16)[..., ::2, ::2, ::2, ::2]], i32(0, 1).reshape(1, 2)), ValueError, r"caches\[0\] must have blocks of at most two strided dimensions"),
    (lambda c: ([c], [[0, 1]]), TypeError, "copies must be a NumPy array"),
    (lambda c: ([c], i32(0, 1)), ValueError, r"copies must have shape \[num_copies, 2\], got \[2\]"),
    (lambda c: ([c], np.array([[0, 1]])), ValueError, "copies must be int32, got int64"),
    (lambda c: ([c], np.zeros((2, 4), np.int32)[:, ::2]), ValueError, "copies must be C-contiguous"),
    (lambda c: ([c], i32(0, 1, 2, 5).reshape(2, 2)), ValueError, "copies must name blocks 0 to 4, got 5 at index 1"),
    (lambda c: ([c], i32(-1, 1).reshape(1, 2)), ValueError, "copies must name blocks 0 to 4, got -1 at index 0"),
    (lambda c: ([c], i32(0, 1, 2, 1).reshape(2, 2)), ValueError, "copies must not depend on their order: block 1"),
    (lambda c: ([c], i32(0, 1, 1, 2).reshape(2, 2)), ValueError, "copies must not depend on their order: block 1"),
    (lambda c: ([c], i32(3, 3).reshape(1, 2)), ValueError, "copies must not depend on their order: block 3"),
    (lambda c: ([c, c.view(np.int32).reshape(5, -1)], c.view(np.int32).reshape(-1, 2)[:1]), ValueError, r"caches\[0\] must not overlap copies"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), COPY)
def test_copy_rejects(arguments, error, message):
    cache = np.arange(40, dtype=np.float32).reshape(5, 8)
    before = cache.copy()
    with pytest.raises(error, match=message):
        copy_blocks(*arguments(cache))
    np.testing.assert_array_equal(cache, before)


def test_many_copies_with_one_repeated():
    cache = np.zeros((300, 4), np.float32)
    copies = np.arange(200, dtype=np.int32).reshape(100, 2)
    copy_blocks(cache, copies)
    copies[99, 1] = 5
    with pytest.raises(ValueError, match="block 5, a destination at index 2"):
        copy_blocks(cache, copies)


def merge_arguments():
    return {
        "out_a": ones(3, 4, 64),
        "lse_a": ones(3, 4),
        "out_b": ones(3, 4, 64),
        "lse_b": ones(3, 4),
        "out": np.full((3, 4, 64), 7, np.float32),
        "lse": np.full((3, 4), 7, np.float32),
        "stream": None,
    }


BUFFER = ones(6, 4, 64)

MERGE = [
    ({"out_a": [1.0]}, TypeError, "out_a must be a NumPy array"),
    ({"lse_b": None}, TypeError, "lse_b must be a NumPy array .* got NoneType"),
    ({"out_a": ones(3, 4)}, ValueError, r"out_a must have shape \[num_tokens, num_heads, v_head_dim\], got \[3, 4\]"),
    ({"out_a": ones(3, 4, 64, dtype=np.int8)}, ValueError, "out_a must be float32, float16 or bfloat16, got int8"),
    ({"out_a": ones(3, 4, 60)}, ValueError, "out_a must have a head_dim"),
    ({"out_a": ones(3, 4, 128)[..., ::2]}, ValueError, "out_a must be contiguous in its last dimension"),
    ({"out_b": ones(3, 4, 32)}, ValueError, r"out_b must have shape \[3, 4, 64\] as out_a has, got \[3, 4, 32\]"),
    ({"out_b": ones(3, 4, 64, dtype=np.float16)}, ValueError, "out_b must have the dtype of out_a, float32, got float16"),
    ({"lse_a": ones(4, 3)}, ValueError, r"lse_a must have shape \[3, 4\] as out_a has, got \[4, 3\]"),
    ({"lse_a": ones(4, 3).T}, ValueError, "lse_a must be C-contiguous"),
    ({"lse_b": ones(3, 4, dtype=np.float64)}, ValueError, "lse_b must be float32, got float64"),
    ({"out": ones(3, 4, 64, dtype=BFLOAT16)}, ValueError, "out must have the dtype of out_a, float32, got bfloat16"),
    ({"out": ones(3, 8, 64)}, ValueError, r"out must have shape \[3, 4, 64\] as out_a has"),
    ({"out": read_only(ones(3, 4, 64))}, ValueError, "out must be writable"),
    ({"lse": read_only(ones(3, 4))}, ValueError, "lse must be writable"),
    ({"lse": ones(3, 5)}, ValueError, r"lse must have shape \[3, 4\] as out_a has, got \[3, 5\]"),
    ({"out_a": BUFFER[:3], "out": BUFFER[1:4]}, ValueError, "out must not overlap out_a in memory"),
    ({"out_b": BUFFER[:3], "out": BUFFER[1:4]}, ValueError, "out must not overlap out_b in memory"),
    ({"lse_a": BUFFER[0, 0, :12].reshape(3, 4), "out": BUFFER[:3]}, ValueError, "out must not overlap lse_a in memory"),
    ({"lse_b": BUFFER[0, 0, :12].reshape(3, 4), "lse": BUFFER[0, 0, 4:16].reshape(3, 4)}, ValueError, "lse must not overlap lse_b in memory"),
    ({"out_b": BUFFER[:3], "lse": BUFFER[0, 0, 4:16].reshape(3, 4)}, ValueError, "lse must not overlap out_b in memory"),
    ({"out": BUFFER[:3], "lse": BUFFER[0, 0, 4:16].reshape(3, 4)}, ValueError, "lse must not overlap out in memory"),
    ({"stream": 1}, ValueError, "stream must be None"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), MERGE)
def test_merge_rejects(change, error, message):
    arguments = merge_arguments() | change
    before = {name: arguments[name].copy() for name in ("out", "lse")}
    with pytest.raises(error, match=message):
        merge_states(**arguments)
    for name, expected in before.items():
        np.testing.assert_array_equal(arguments[name], expected)


def test_merge_accepts_what_the_rejections_start_from():
    arguments = merge_arguments()
    out, lse = merge_states(**arguments)
    assert out is arguments["out"]
    assert lse is arguments["lse"]
    np.testing.assert_array_equal(out, 1)


MOVE = [
    ({"caches": [[1]]}, TypeError, r"caches\[0\] must be a NumPy array"),
    ({"caches": [ones(5, 2), ones(4, 2)]}, ValueError, r"caches\[1\] must have the 5 blocks of caches\[0\]"),
    ({"caches": [np.zeros(())]}, ValueError, r"caches\[0\] must have shape \[num_blocks, \.\.\.\]"),
    ({"block_ids": [0, 1]}, TypeError, "block_ids must be a NumPy array"),
    ({"block_ids": np.array([0, 1])}, ValueError, "block_ids must be int32, got int64"),
    ({"block_ids": i32(0, 1).reshape(1, 2)}, ValueError, r"block_ids must have shape \[n\], got \[1, 2\]"),
    ({"block_ids": i32(0, 0, 1, 1)[::2]}, ValueError, "block_ids must be contiguous"),
    ({"block_ids": i32(0, 5)}, ValueError, "block_ids must name blocks 0 to 4, got 5 at index 1"),
    ({"block_ids": i32(-1, 0)}, ValueError, "block_ids must name blocks 0 to 4, got -1 at index 0"),
    ({"data": ones(2, 8)}, ValueError, "{data} must be uint8, got float32"),
    ({"data": ones(2, 9, dtype=np.uint8)}, ValueError, r"{data} must have shape \[2, 8\], the bytes of a block in all caches for each block id, got \[2, 9\]"),
    ({"data": ones(16, dtype=np.uint8)}, ValueError, r"{data} must have shape \[2, 8\]"),
    ({"data": ones(2, 16, dtype=np.uint8)[:, ::2]}, ValueError, "{data} must be contiguous in its last dimension"),
    ({"data": [[0] * 8] * 2}, TypeError, "{data} must be a NumPy array"),
    ({"stream": 1}, ValueError, "stream must be None"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), MOVE)
@pytest.mark.parametrize("function", [gather_blocks, scatter_blocks])
def test_moves_reject(function, change, error, message):
    name = "out" if function is gather_blocks else "data"
    arguments = {
        "caches": [ones(5, 2)],
        "block_ids": i32(0, 4),
        "data": ones(2, 8, dtype=np.uint8),
    } | change
    before = copy.deepcopy(arguments)
    positional = arguments["caches"], arguments["block_ids"], arguments["data"]
    stream = {"stream": arguments["stream"]} if "stream" in arguments else {}
    with pytest.raises(error, match=message.replace("{data}", name)):
        function(*positional, **stream)
    for name, value in before.items():
        for got, expected in zip(arguments[name], value, strict=True) if name != "stream" else ():
            np.testing.assert_array_equal(got, expected)


def test_moves_reject_overlap_and_what_is_read_only():
    cache, ids = ones(5, 2), i32(0, 4)
    inside = cache.view(np.uint8)[1:3]
    with pytest.raises(ValueError, match=r"caches\[0\] must not overlap out in memory"):
        gather_blocks(cache, ids, inside)
    with pytest.raises(ValueError, match=r"caches\[0\] must not overlap data in memory"):
        scatter_blocks(cache, ids, inside)
    with pytest.raises(ValueError, match="out must be writable"):
        gather_blocks(cache, ids, read_only(np.zeros((2, 8), np.uint8)))
    with pytest.raises(ValueError, match=r"caches\[0\] must be writable"):
        scatter_blocks(read_only(ones(5, 2)), ids, np.zeros((2, 8), np.uint8))
    with pytest.raises(ValueError, match=r"block_ids must not repeat .* got 3 again at index 2"):
        scatter_blocks(cache, i32(3, 0, 3), np.zeros((3, 8), np.uint8))
    many = np.arange(200, dtype=np.int32)
    many[150] = 7
    with pytest.raises(ValueError, match="got 7 again at index 150"):
        scatter_blocks(ones(200), many, np.zeros((200, 4), np.uint8))
    np.testing.assert_array_equal(cache, 1)
    assert gather_blocks(read_only(ones(5, 2)), ids).shape == (2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": "float16"}, ValueError, "dtype must be one of float8_e4m3fn, float8_e4m3fnuz, int8, got float16"),
        ({"dtype": "int4"}, ValueError, "dtype must be one of .* got"),
        ({"key": ones(4, 2)}, ValueError, r"key must have shape \[num_tokens, num_kv_heads, head_dim\] with at least one token, got \[4, 2\]"),
        ({"value": ones(0, 2, 8)}, ValueError, r"value must have shape .* with at least one token, got \[0, 2, 8\]"),
        ({"key": ones(4, 2, 8, dtype=np.int8)}, ValueError, "key must be float32, float16 or bfloat16, got int8"),
        ({"key": ones(4, 2, 8) * np.array([[1], [np.inf]], np.float32)}, ValueError, "key must be finite, head 1 is not"),
        ({"value": ones(4, 2, 8) * np.float32(np.nan)}, ValueError, "value must be finite, head 0 is not"),
        ({"key": None}, TypeError, "key must be a NumPy array"),
    ],
)  # fmt: skip
def test_calibrate_rejects(change, error, message):
    arguments = {"key": ones(4, 2, 8), "value": ones(4, 2, 8), "dtype": "int8"} | change
    with pytest.raises(error, match=message):
        calibrate(**arguments)


# ---------------------------------------------------------------- arrays of other libraries

PyCapsule_New = ctypes.pythonapi.PyCapsule_New
PyCapsule_New.restype = ctypes.py_object
PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Foreign:
    """An array of another library: nothing of NumPy but the memory."""

    def __init__(self, array, *, versioned=True, strided=True, device=1, flags=0, **changes):
        self.array = array
        self.device = device
        self.versioned = versioned
        n = array.ndim
        codes = {"i": 0, "u": 1, "f": 2, "b": 6}
        names = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e4m3fnuz": 11}
        self.shape = (ctypes.c_int64 * n)(*array.shape)
        steps = [s // array.itemsize for s in array.strides]
        self.strides = (ctypes.c_int64 * n)(*steps) if strided else None
        offset = min(64, array.ctypes.data)
        fields = {
            "data": array.ctypes.data - offset,
            "device_type": device,
            "ndim": n,
            "code": names.get(array.dtype.name) or codes[array.dtype.kind],
            "bits": array.itemsize * 8,
            "lanes": 1,
            "shape": self.shape,
            "strides": self.strides,
            "byte_offset": offset,
        }
        tensor = Tensor(**fields | changes)
        self.managed = (
            Versioned(major=1, flags=flags, tensor=tensor) if versioned else Managed(tensor)
        )

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, **kwargs):
        if kwargs and not self.versioned:
            raise TypeError("unexpected keyword argument")
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return PyCapsule_New(ctypes.addressof(self.managed), name, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_foreign_arrays(dtype, versioned, strided):
    problem = make(dtype, [40, 3], [2, 1], heads=(4, 2), head_dim=24)
    changes = {
        name: Foreign(getattr(problem, name), versioned=versioned, strided=strided)
        for name in ("query", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")
    }
    got = problem.but(**changes).call(paged_attention)
    assert got.dtype == dtype
    np.testing.assert_array_equal(bits(got), bits(problem.call(paged_attention)))
    out = Foreign(np.zeros_like(got), versioned=versioned, strided=strided)
    assert problem.but(**changes).call(paged_attention, out=out) is out
    np.testing.assert_array_equal(bits(out.array), bits(got))

    key = np.ones((1, 2, 24), dtype)
    slots = np.array([5])
    write_kv(*map(Foreign, (key, key, problem.k_cache, problem.v_cache, slots)))
    np.testing.assert_array_equal(bits(problem.k_cache[0, :, 5]), bits(key[0]))
    copy_blocks([Foreign(problem.k_cache)], Foreign(i32(0, 1).reshape(1, 2)))
    np.testing.assert_array_equal(bits(problem.k_cache[0]), bits(problem.k_cache[1]))


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT, ids=str)
def test_foreign_8_bit_caches(kv_dtype):
    problem = make(FLOAT32, [40, 3], [2, 1], heads=(4, 2), head_dim=24, kv_dtype=kv_dtype)
    problem = problem.but(
        mask=np.tri(3, dtype=bool), options={"sinks": ones(4), "alibi_slopes": ones(4)}
    )
    names = ("k_cache", "v_cache", "k_scale", "v_scale", "mask")
    foreign = problem.but(
        **{name: Foreign(getattr(problem, name)) for name in names},
        options={name: Foreign(array) for name, array in problem.options.items()},
    )
    got = foreign.call(paged_attention)
    np.testing.assert_array_equal(bits(got), bits(problem.call(paged_attention)))
    for latent in (False, True):
        for wrap in (Foreign, lambda x: x):
            key = ones(1, 2, 24)
            pools = [wrap(getattr(problem, name)) for name in names[:4]]
            k, v, k_scale, v_scale = pools
            if latent:
                write_kv(key, None, k, None, np.array([5]), k_scale=k_scale)
            else:
                write_kv(key, key, k, v, np.array([5]), k_scale=k_scale, v_scale=v_scale)
            assert problem.k_scale[0, 0, 5] == np.float32(1) / np.float32(largest_element(kv_dtype))


def test_foreign_strides():
    problem = make(FLOAT32, [40, 3], heads=(4, 2), head_dim=24)
    swapped = problem.but(
        k_cache=Foreign(problem.k_cache.swapaxes(1, 2)),
        v_cache=Foreign(problem.v_cache.swapaxes(1, 2)),
        layout="NHD",
    )
    assert_close(swapped.call(paged_attention), problem.call(reference.paged_attention))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device": 2}, "query must be in host memory for the CPU operations, got a Foreign on DLPack device type 2"),
        ({"bits": 64}, "query has a type that no argument can have: DLPack type code 2 with 64 bits"),
        ({"code": 1}, "DLPack type code 1 with 32 bits"),
        ({"lanes": 4}, "with 32 bits and 4 lanes"),
        ({"ndim": 9}, "query must have at most 8 dimensions, got 9"),
    ],
)  # fmt: skip
def test_foreign_arrays_that_do_not_fit(kwargs, message):
    arguments = attention_arguments()
    arguments["query"] = Foreign(arguments["query"], **kwargs)
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_attention(**arguments)


def test_foreign_read_only():
    arguments = attention_arguments()
    arguments["out"] = Foreign(arguments["out"], flags=1)
    with pytest.raises(ValueError, match="out must be writable"):
        paged_attention(**arguments)


def test_foreign_memory_is_kept_while_used():
    """The capsule, and with it the producer's memory, lives as long as the array made from it."""
    array = np.ones((3, 4, 64), np.float32)
    count = sys.getrefcount(array)
    arguments = attention_arguments()

    class Producer:
        def __dlpack_device__(self):
            return array.__dlpack_device__()

        def __dlpack__(self, **kwargs):
            return array.__dlpack__(**kwargs)

    paged_attention(**arguments | {"query": Producer()})
    assert sys.getrefcount(array) == count


# ---------------------------------------------------------------- threads, variants, dtypes


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n must be 1 to 4096, got 0"),
        (-3, ValueError, "n must be 1 to 4096, got -3"),
        (10**6, ValueError, "n must be 1 to 4096, got 1000000"),
        (10**30, ValueError, "n must be 1 to 4096"),
        (1.5, TypeError, "n must be an integer, got float"),
        (None, TypeError, "n must be an integer, got NoneType"),
    ],
)
def test_set_num_threads_rejects(n, error, message):
    before = get_num_threads()
    with pytest.raises(error, match=message):
        set_num_threads(n)
    assert get_num_threads() == before


@pytest.mark.parametrize(
    ("processors", "error", "message"),
    [
        ([0, 1024], ValueError, "processors must be 0 to 1023, got 1024"),
        ([-1], ValueError, "processors must be 0 to 1023, got -1"),
        ([0.5], TypeError, "'float' object cannot be interpreted as an integer"),
        (3, TypeError, "not iterable"),
    ],
)
def test_set_num_threads_rejects_processors(processors, error, message):
    before = get_num_threads()
    with pytest.raises(error, match=message):
        set_num_threads(before + 1, processors=processors)
    assert get_num_threads() == before


def test_threads_on_given_processors(threads):
    """Other threads than the caller's are where they are told, whatever they are told."""
    allowed = os.sched_getaffinity(0)
    problem = make(FLOAT32, [3000] * 8, heads=(8, 8))
    want = problem.call(paged_attention)
    for processors in ({min(allowed)}, allowed, {1023}, None):
        threads(3, processors=processors)
        np.testing.assert_array_equal(bits(problem.call(paged_attention)), bits(want))


def test_isas():
    assert _cpu.isa() in _cpu.available_isas()
    assert "portable" in _cpu.available_isas()  # last, but for emulated ones
    with pytest.raises(ValueError, match=r"isa must be one of .*portable.*, got 'mmx'"):
        _cpu._set_isa("mmx")


def python(code, **environment):
    ours = ("ROCMFORGE_CPU_ISA", "ROCMFORGE_NUM_THREADS", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": ":".join(sys.path), **environment},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment():
    code = "from rocmforge.ops import _cpu as c; print(c.isa(), c.get_num_threads())"
    assert (
        python(code, ROCMFORGE_CPU_ISA="portable", OMP_NUM_THREADS="7,2").stdout == "portable 7\n"
    )
    both = python(code, ROCMFORGE_NUM_THREADS="3", OMP_NUM_THREADS="7").stdout
    assert both == f"{_cpu.available_isas()[0]} 3\n"
    assert python(code, ROCMFORGE_NUM_THREADS="lots", OMP_NUM_THREADS="0").returncode == 0
    bad = python(code, ROCMFORGE_CPU_ISA="mmx")
    assert bad.returncode == 1
    assert "ImportError: ROCMFORGE_CPU_ISA must be one of " in bad.stderr
    assert "got 'mmx'" in bad.stderr


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("float32", "float32"),
        (np.float16, "float16"),
        (np.dtype("f4"), "float32"),
        ("bfloat16", "bfloat16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (BFLOAT16, "bfloat16"),
        ("f2", "float16"),
    ],
)
def test_resolve(given, name):
    assert resolve(given) == np.dtype(name if name != "bfloat16" else ml_dtypes.bfloat16)
    assert resolve(given).name == name
    assert name in NAMES


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("float64", ValueError, "dtype must be one of float32, float16, .*, int8, got float64"),
        ("bf16", ValueError, "dtype must be one of float32, .*, int8, got 'bf16'"),
        (np.int32, ValueError, "got int32"),
        (">f4", ValueError, "dtype must be one of .*, got >f4"),
        (None, TypeError, "dtype must be one of .*, got None"),
        (3.5, TypeError, "dtype must be one of .*, got 3.5"),
    ],
)
def test_resolve_rejects(given, error, message):
    with pytest.raises(error, match=message):
        resolve(given)
