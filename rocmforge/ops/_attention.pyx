# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Attention, and merging its results."""

cimport numpy as cnp
from libc.math cimport INFINITY
from libc.stdint cimport int64_t

from rocmforge.ops cimport _cpu
from rocmforge.ops._arguments cimport (
    as_scale, read_attention, read_batch, read_logits, read_mask, read_merge,
    read_merged)
from rocmforge.ops._arrays cimport (
    apart, as_array, as_bound, as_flag, as_vectors, dtype_named, hip_operations, host_only,
    host_result, is_nhd, same_dtype, shape3, shape_text, writable)
from rocmforge.ops._params cimport RF_F32, rf_attention_params, rf_merge_params

cnp.import_array()


cdef cnp.ndarray _optional(object x, str name):
    return None if x is None else as_array(x, name)


cdef int _workspace(object workspace) except -1:
    cdef cnp.ndarray a
    if workspace is None:
        return 0
    a = as_array(workspace, "workspace")
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_TYPE(a) != cnp.NPY_UINT8:
        raise ValueError(f"workspace must be uint8 [num_bytes], got {a.dtype} {shape_text(a)}")
    writable(a, "workspace")
    return 0


def paged_attention(query, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q=None, *, rows=None,
                    scale=None, causal=True, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                    sinks=None, mask=None, k_scale=None, v_scale=None, kv_dtype=None,
                    max_seqlen_q=None, max_seq_len=None, num_splits=None, deterministic=True,
                    layout="HND", out=None, return_lse=False, workspace=None, stream=None):
    """Attention of new tokens to the paged context of their sequences.

    Decode (one query token a sequence), verification (a few), prefill (many), and all of them in
    one ragged batch. Synchronous on the CPU. Softmax and sums are float32. The bits of a
    sequence's result depend only on its own query tokens, keys, values and length: not on the rest
    of the batch, the order of its blocks, or the number of threads.

    A logit is ``scale * q.k``, then capped, then biased by ALiBi, then masked: `causal`,
    `window_size` and `mask` all must let a key through. Positions count from the sequence's first
    token; its last query token is at position ``seq_len - 1``.

    Parameters
    ----------
    query : array [num_tokens, num_heads, head_dim]
        float32, float16 or bfloat16; head_dim 8 to 576 in steps of 8.
    k_cache, v_cache : array [num_blocks, num_kv_heads, block_size, head_dim]
        One layer's blocks, or ``[num_blocks, block_size, num_kv_heads, head_dim]`` with
        ``layout="NHD"``; the dtype of query, or float8_e4m3fn, float8_e4m3fnuz or int8; any strides
        with a contiguous last dimension. The last dimension of v_cache, v_head_dim, may differ. A
        latent cache has no values of its own: v_cache is ``k_cache[..., :latent_dim]``.
        num_kv_heads divides num_heads: query head h reads head ``h // (num_heads / num_kv_heads)``.
    block_table : array int32 [num_rows, max_blocks]
        Block ids of each sequence. Entries past its end are not read; the positions of a negative
        entry inside it are masked.
    seq_lens : array int32 [num_seqs]
        Tokens in the cache, the new ones included. 0 gives zeros.
    cu_seqlens_q : array int32 [num_seqs + 1], optional
        Sequence i owns the query tokens ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1] - 1``. Without
        it each sequence owns one. Rows of the output past the last entry are left as they are.
    rows : array int32 [num_seqs], optional
        Which row of block_table each sequence uses; by default row i.
    scale : float, optional
        Factor of the logits; ``1 / sqrt(head_dim)`` by default. A latent cache needs it: it comes
        from the head_dim of the model.
    causal : bool
        A query token sees no later token.
    window_size : (int, int)
        The query at position p sees the positions p - left to p + right; -1 is no bound.
    softcap : float
        Logits become ``softcap * tanh(logit / softcap)``; 0 is off.
    alibi_slopes : array float32 [num_heads], optional
        ``slope * (key position - query position)`` is added to the logits.
    sinks : array float32 [num_heads], optional
        A logit a head that takes part in the softmax's sum but has no value.
    mask : array uint8 or bool [num_tokens, max_seqlen_q], optional
        0 in column j hides the j-th new token of the query token's own sequence, as a tree of
        drafts needs; it may be wider. Tokens that were cached before stay visible.
    k_scale, v_scale : float, array float32 [num_kv_heads], or float32 pool, optional
        Factors of an 8-bit cache's elements, which it must have; a pool is
        ``[num_blocks, num_kv_heads, block_size]``. A latent cache's v_scale is its k_scale.
    kv_dtype : str, type or numpy.dtype, optional
        float8_e4m3fn or float8_e4m3fnuz: what caches hold that come as uint8, as from libraries
        that cannot export float8. Where one of the two is float8, it decides for the other.
    max_seqlen_q, max_seq_len : int, optional
        Bounds of query tokens a sequence and of seq_lens, checked here; a GPU launch needs them.
    num_splits : int, optional
        On a GPU, into how many pieces contexts are split. Ignored on the CPU.
    deterministic : bool
        False allows a split that depends on the batch. On the CPU bits never depend on it.
    layout : {"HND", "NHD"}
        The order of the caches' two middle dimensions.
    out : array [num_tokens, num_heads, v_head_dim], optional
        Where to write, of the query's dtype; must overlap no other argument.
    return_lse : bool
        Also return the natural logarithm of the softmax's sum, sink included.
    workspace : array uint8 [num_bytes], optional
        Scratch memory of a GPU call, whatever it holds. Ignored on the CPU.
    stream : optional
        Of a GPU call; None on the CPU.

    Returns
    -------
    out : array [num_tokens, num_heads, v_head_dim]
        ``out``, or a new array of the query's dtype and library (NumPy's where the query's does not
        offer DLPack's exchange API). Zeros where nothing is visible.
    lse : array float32 [num_tokens, num_heads]
        With ``return_lse``. -inf, or the sink, where nothing is visible.

    Raises
    ------
    ValueError
        A dtype, shape, stride or index that does not fit, with what was expected and what came.
    TypeError
        An argument of a wrong kind.
    MemoryError
        No scratch memory. After any error nothing was written.

    Notes
    -----
    Online softmax over tiles [1]_ of a paged cache [2]_.

    .. [1] Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135
    .. [2] Kwon et al., "Efficient Memory Management for Large Language Model Serving with
       PagedAttention", https://arxiv.org/abs/2309.06180
    """
    hip = hip_operations(query)
    if hip is not None:
        return hip.paged_attention(
            query, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, rows=rows, scale=scale,
            causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
            sinks=sinks, mask=mask, k_scale=k_scale, v_scale=v_scale, kv_dtype=kv_dtype,
            max_seqlen_q=max_seqlen_q, max_seq_len=max_seq_len, num_splits=num_splits,
            deterministic=deterministic, layout=layout, out=out, return_lse=return_lse,
            workspace=workspace, stream=stream)
    cdef rf_attention_params p
    cdef bint nhd = is_nhd(layout), with_lse
    cdef cnp.ndarray q = as_array(query, "query")
    cdef cnp.ndarray k = as_array(k_cache, "k_cache")
    cdef cnp.ndarray v = as_array(v_cache, "v_cache")
    cdef cnp.ndarray table = as_array(block_table, "block_table")
    cdef cnp.ndarray lens = as_array(seq_lens, "seq_lens")
    cdef cnp.ndarray cu = _optional(cu_seqlens_q, "cu_seqlens_q")
    cdef cnp.ndarray row_array = _optional(rows, "rows")
    cdef cnp.ndarray slopes = _optional(alibi_slopes, "alibi_slopes")
    cdef cnp.ndarray sink_array = _optional(sinks, "sinks")
    cdef cnp.ndarray mask_array = _optional(mask, "mask")
    cdef cnp.ndarray o, lse
    cdef cnp.npy_intp dims[3]
    cdef int64_t max_q, max_len, mask_width, work, owned

    k_scale = as_scale(k_scale, "k_scale")
    v_scale = as_scale(v_scale, "v_scale")
    read_attention(&p, q, k, v, k_scale, v_scale, nhd, kv_dtype)
    read_batch(&p, table, lens, cu, row_array)
    read_logits(&p, scale, causal, window_size, softcap, slopes, sink_array)
    mask_width = read_mask(&p, mask_array)
    max_q = as_bound(max_seqlen_q, "max_seqlen_q", 0)
    max_len = as_bound(max_seq_len, "max_seq_len", 0)
    as_bound(num_splits, "num_splits", 1)
    as_flag(deterministic, "deterministic")
    with_lse = as_flag(return_lse, "return_lse")
    _workspace(workspace)
    host_only(stream)

    dims[0], dims[1], dims[2] = p.num_tokens, p.num_heads, p.v_head_dim
    if out is None:
        result, o = host_result(query, dtype_named(p.dtype), 3, dims)
    else:
        result = out
        o = as_array(out, "out")
        if not shape3(o, dims[0], dims[1], dims[2]):
            raise ValueError(f"out must have shape [{p.num_tokens}, {p.num_heads}, "
                             f"{p.v_head_dim}], got {shape_text(o)}")
        same_dtype(o, "out", q, "query")
        writable(o, "out")
        apart(o, "out", q, "query")
        apart(o, "out", k, "k_cache")
        apart(o, "out", v, "v_cache")
        apart(o, "out", table, "block_table")
        apart(o, "out", lens, "seq_lens")
        apart(o, "out", cu, "cu_seqlens_q")
        apart(o, "out", row_array, "rows")
        apart(o, "out", slopes, "alibi_slopes")
        apart(o, "out", sink_array, "sinks")
        apart(o, "out", mask_array, "mask")
        if p.k_scale.data != NULL:
            apart(o, "out", k_scale, "k_scale")
        if p.v_scale.data != NULL and v_scale is not None:
            apart(o, "out", v_scale, "v_scale")
    as_vectors(o, "out", &p.out)
    p.lse = NULL
    if with_lse:
        sums, lse = host_result(query, dtype_named(RF_F32), 2, dims)
        p.lse = <float *>cnp.PyArray_DATA(lse)

    work = _cpu.check_attention(&p, max_q, max_len, mask_width)
    owned = p.num_tokens if cu is None else p.cu_seqlens_q[p.num_seqs]
    if owned < p.num_tokens:  # rows of nobody: what is new must hold something
        if out is None:
            o[owned:] = 0
        if with_lse:
            lse[owned:] = -INFINITY
    _cpu.attention(&p, work)
    return (result, sums) if with_lse else result


def merge_states(out_a, lse_a, out_b, lse_b, *, out=None, lse=None, stream=None):
    """Attention over two parts of the keys, from the result over each.

    Exact for parts that share no key: the cached prefix of many sequences and what follows it
    (cascade attention), or the context of one on several devices. At most one part may have had
    the sinks. Synchronous on the CPU.

    Parameters
    ----------
    out_a, out_b : array [num_tokens, num_heads, v_head_dim]
        Results of `paged_attention`: float32, float16 or bfloat16, both the same.
    lse_a, lse_b : array float32 [num_tokens, num_heads]
        Their log-sum-exps. Where one is -inf that part saw no key, and its out is not read.
    out, lse : array, optional
        Where to write; may be one of the parts, and else must overlap no other argument.
    stream : optional
        Of a GPU call; None on the CPU.

    Returns
    -------
    out : array [num_tokens, num_heads, v_head_dim]
        ``out``, or a new array, of out_a's library as by `paged_attention`. Zeros where neither
        part saw a key.
    lse : array float32 [num_tokens, num_heads]
        ``lse``, or a new array likewise.

    Raises
    ------
    ValueError
        A dtype, shape or stride that does not fit, with what was expected and what came.
    TypeError
        An argument of a wrong kind. After any error nothing was written.

    Examples
    --------
    >>> import numpy as np
    >>> one, two = np.ones((1, 1, 8), np.float32), np.full((1, 1, 8), 2, np.float32)
    >>> lse = np.zeros((1, 1), np.float32)
    >>> out, lse = merge_states(one, lse, two, lse)  # as many keys, as visible
    >>> float(out[0, 0, 0]), float(lse[0, 0])
    (1.5, 0.6931471824645996)
    """
    hip = hip_operations(out_a)
    if hip is not None:
        return hip.merge_states(out_a, lse_a, out_b, lse_b, out=out, lse=lse, stream=stream)
    cdef rf_merge_params p
    cdef cnp.ndarray a = as_array(out_a, "out_a")
    cdef cnp.ndarray la = as_array(lse_a, "lse_a")
    cdef cnp.ndarray b = as_array(out_b, "out_b")
    cdef cnp.ndarray lb = as_array(lse_b, "lse_b")
    cdef cnp.ndarray o = _optional(out, "out")
    cdef cnp.ndarray l = _optional(lse, "lse")
    host_only(stream)
    read_merge(&p, a, la, b, lb)
    if o is None:
        out, o = host_result(out_a, dtype_named(p.dtype), 3, cnp.PyArray_DIMS(a))
    if l is None:
        lse, l = host_result(out_a, dtype_named(RF_F32), 2, cnp.PyArray_DIMS(a))
    read_merged(&p, a, la, b, lb, o, l)
    _cpu.merge_states(&p)
    return out, lse
