# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Writing new tokens into the cache, moving whole blocks, and block tables of compressed rows."""

cimport numpy as cnp
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport INT32_MAX, int32_t, int64_t
from libc.string cimport memcpy

from rocmforge.ops cimport _cpu
from rocmforge.ops._arguments cimport as_scale, read_blocks, read_write
from rocmforge.ops._arrays cimport (
    apart, as_array, as_bound, as_int32s, bad_shape, behaved, contiguous_rows, hip_operations,
    host_only, host_result, is_nhd, like_library, shape_text, stride_of, wide_dtype, writable)
from rocmforge.ops._params cimport rf_copy_params, rf_write_params

import numpy as np

from rocmforge import dtypes as _dtypes

cnp.import_array()


def write_kv(key, value, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None,
             kv_dtype=None, layout="HND", stream=None):
    """Write the keys and values of new tokens into their slots of the paged cache.

    Synchronous on the CPU. A slot must not be named twice: threads would write to it at once, and
    what it then holds is unspecified.

    An 8-bit cache gets ``x / scale``, rounded to the nearest element, ties to even, and saturated:
    the product of x and the scale's reciprocal, in float32. NaN stays NaN in float8 and becomes 0
    in int8. A scale pool is written too: the scale of each vector is that which makes its largest
    element the type's largest, 1 for a vector of zeros, and NaN for one that is not finite, so that
    all of it reads as NaN.

    Parameters
    ----------
    key : array [num_tokens, num_kv_heads, head_dim]
        float32, float16 or bfloat16, any strides with a contiguous last dimension.
    value : array [num_tokens, num_kv_heads, v_head_dim], or None
        As key; v_head_dim is the last dimension of v_cache. None, as v_cache, for a latent cache.
    k_cache, v_cache : array [num_blocks, num_kv_heads, block_size, head_dim]
        One layer's blocks, or ``[num_blocks, block_size, num_kv_heads, head_dim]`` with
        ``layout="NHD"``; the dtype of key, or float8_e4m3fn, float8_e4m3fnuz or int8; written in
        place.
    slot_mapping : array int64 [num_tokens]
        Slot of each token: block id x block_size + offset. A negative one is padding and skipped.
    k_scale, v_scale : float, array float32 [num_kv_heads], or float32 pool, optional
        Of an 8-bit cache, which must have them: given numbers (`calibrate` gives good ones), or a
        pool ``[num_blocks, num_kv_heads, block_size]`` that gets the scale of each token and head.
    kv_dtype : str, type or numpy.dtype, optional
        float8_e4m3fn or float8_e4m3fnuz: what caches hold that come as uint8. Where one of the two
        is float8, it decides for the other.
    layout : {"HND", "NHD"}
        The order of the caches' two middle dimensions.
    stream : optional
        Of a GPU call; None on the CPU.

    Raises
    ------
    ValueError
        A dtype, shape, stride or slot that does not fit, with what was expected and what came.
    TypeError
        An argument of a wrong kind. After any error nothing was written.
    """
    hip = hip_operations(key)
    if hip is not None:
        return hip.write_kv(key, value, k_cache, v_cache, slot_mapping, k_scale=k_scale,
                            v_scale=v_scale, kv_dtype=kv_dtype, layout=layout, stream=stream)
    cdef rf_write_params p
    cdef bint nhd = is_nhd(layout)
    cdef cnp.ndarray kk = as_array(key, "key"), vv = None
    cdef cnp.ndarray k = as_array(k_cache, "k_cache"), v = None
    cdef cnp.ndarray slots = as_array(slot_mapping, "slot_mapping")
    if value is not None:
        vv = as_array(value, "value")
    if v_cache is not None:
        v = as_array(v_cache, "v_cache")
    k_scale = as_scale(k_scale, "k_scale")
    v_scale = as_scale(v_scale, "v_scale")
    host_only(stream)
    read_write(&p, kk, vv, k, v, slots, k_scale, v_scale, nhd, kv_dtype)
    apart(k, "k_cache", kk, "key")
    apart(k, "k_cache", vv, "value")
    apart(k, "k_cache", slots, "slot_mapping")
    apart(v, "v_cache", kk, "key")
    apart(v, "v_cache", vv, "value")
    apart(v, "v_cache", k, "k_cache")
    apart(v, "v_cache", slots, "slot_mapping")
    if p.k_scale.data != NULL:
        _scales_apart(k_scale, "k_scale", kk, vv, k, v, slots)
    if p.v_scale.data != NULL and v is not None:
        _scales_apart(v_scale, "v_scale", kk, vv, k, v, slots)
        if p.k_scale.per_token or p.v_scale.per_token:
            if p.k_scale.data != NULL:
                apart(v_scale, "v_scale", k_scale, "k_scale")
    _cpu.check_write(&p)
    _cpu.write_kv(&p)


cdef int _scales_apart(cnp.ndarray scale, str name, cnp.ndarray key, cnp.ndarray value,
                       cnp.ndarray k, cnp.ndarray v, cnp.ndarray slots) except -1:
    apart(scale, name, key, "key")
    apart(scale, name, value, "value")
    apart(scale, name, k, "k_cache")
    apart(scale, name, v, "v_cache")
    apart(scale, name, slots, "slot_mapping")
    return 0


def calibrate(key, value, dtype, *, stream=None):
    """Scales, one a head, that make the largest element of these tokens the type's largest.

    Compute them from some typical tokens before the first `write_kv`: what is written later and is
    larger is saturated.

    Parameters
    ----------
    key, value : array [num_tokens, num_kv_heads, head_dim]
        float32, float16 or bfloat16, of at least one token and finite. value is None for a latent
        cache.
    dtype : str, type or numpy.dtype
        float8_e4m3fn, float8_e4m3fnuz or int8.
    stream : optional
        Of arrays on a GPU, whose earlier work is waited for; None on the CPU.

    Returns
    -------
    k_scale, v_scale : array float32 [num_kv_heads]
        Of key's library, as by `paged_attention`. 1 for a head of zeros. v_scale is None where
        value is.

    Raises
    ------
    ValueError
        A dtype or shape that does not fit, or elements that are not finite.
    TypeError
        An argument of a wrong kind.

    Examples
    --------
    >>> import numpy as np
    >>> key = np.array([[[1, -2.54, 0, 0, 0, 0, 0, 0]]], np.float32)
    >>> k_scale, v_scale = calibrate(key, None, "int8")
    >>> k_scale
    array([0.02], dtype=float32)
    """
    kind = _dtypes.resolve(dtype)
    if kind.name not in _dtypes.EIGHT_BIT:
        raise ValueError(f"dtype must be one of {', '.join(_dtypes.EIGHT_BIT)}, got {kind.name}")
    hip = hip_operations(key)
    if hip is not None:
        key = hip.to_host(key, "key", stream)
        value = None if value is None else hip.to_host(value, "value", stream)
    else:
        host_only(stream)
    k_scale = _head_scales(as_array(key, "key"), "key", kind)
    k_scale = like_library(k_scale, key)
    if value is None:
        return k_scale, None
    return k_scale, like_library(_head_scales(as_array(value, "value"), "value", kind), key)


cdef object _head_scales(cnp.ndarray a, str name, object kind):
    if cnp.PyArray_NDIM(a) != 3 or not cnp.PyArray_SIZE(a):
        bad_shape(a, name, "[num_tokens, num_kv_heads, head_dim] with at least one token")
    wide_dtype(a, name)
    top = np.maximum(np.max(a, axis=(0, 2)), -np.min(a, axis=(0, 2))).astype(np.float32)
    if not np.isfinite(top).all():
        raise ValueError(f"{name} must be finite, head {int(np.argmin(np.isfinite(top)))} is not")
    scale = np.maximum(top / _dtypes.largest_element(kind), np.finfo(np.float32).tiny)
    return np.where(top == 0, np.float32(1), scale)


# ---------------------------------------------------------------- whole blocks

cdef class _Pools:
    """Arrays that have one entry a block, as the kernels see them."""
    cdef list arrays
    cdef rf_copy_params *data
    cdef object memory
    cdef int64_t num, num_blocks, block_bytes

    def __init__(self, caches, bint written):
        cdef cnp.ndarray a
        if not isinstance(caches, (list, tuple)):
            caches = (caches,)
        self.num = len(caches)
        self.arrays = []
        self.memory = bytearray(sizeof(rf_copy_params) * max(self.num, 1))
        self.data = <rf_copy_params *>PyByteArray_AS_STRING(self.memory)
        for i, cache in enumerate(caches):
            name = f"caches[{i}]"
            a = as_array(cache, name)
            if (<object>a).dtype.hasobject:
                raise ValueError(f"{name} must not hold Python objects, got {a.dtype}")
            if written:
                writable(a, name)
            read_blocks(&self.data[<Py_ssize_t>i], a, name)
            if i == 0:
                self.num_blocks = cnp.PyArray_DIM(a, 0)
            elif cnp.PyArray_DIM(a, 0) != self.num_blocks:
                raise ValueError(f"{name} must have the {self.num_blocks} blocks of caches[0], "
                                 f"got {shape_text(a)}")
            self.arrays.append(a)
        self.block_bytes = _cpu.block_bytes(self.data, self.num)

    cdef int keep_apart(self, cnp.ndarray other, str other_name) except -1:
        for i, a in enumerate(self.arrays):
            apart(a, f"caches[{i}]", other, other_name)
        return 0


cdef object _first(object caches):
    """The array that says where all of them are."""
    if isinstance(caches, (list, tuple)):
        return caches[0] if len(caches) else None
    return caches


def copy_blocks(caches, copies, *, stream=None):
    """Copy whole blocks within each cache, as copy-on-write needs.

    Synchronous on the CPU. The copies have no order: no block may be written twice, or written and
    read.

    Parameters
    ----------
    caches : array [num_blocks, ...], or sequence of such arrays
        Anything with one entry a block: keys, values and scales of all layers in one call. Any
        dtypes but Python objects, any inner shapes; all with the same num_blocks.
    copies : array int32 [num_copies, 2]
        Source and destination block of each copy.
    stream : optional
        Of a GPU call; None on the CPU.

    Raises
    ------
    ValueError
        A shape, dtype or block id that does not fit, named with what was expected and what came.
    TypeError
        An argument of a wrong kind. After any error nothing was written.
    """
    hip = hip_operations(_first(caches))
    if hip is not None:
        return hip.copy_blocks(caches, copies, stream=stream)
    cdef cnp.ndarray pairs = as_array(copies, "copies")
    cdef const int32_t *data = <const int32_t *>cnp.PyArray_DATA(pairs)
    cdef int64_t n
    if cnp.PyArray_NDIM(pairs) != 2 or cnp.PyArray_DIM(pairs, 1) != 2:
        bad_shape(pairs, "copies", "[num_copies, 2]")
    if cnp.PyArray_TYPE(pairs) != cnp.NPY_INT32:
        raise ValueError(f"copies must be int32, got {pairs.dtype}")
    if not cnp.PyArray_ISCARRAY_RO(pairs):
        raise ValueError("copies must be C-contiguous, aligned and in native byte order")
    host_only(stream)
    cdef _Pools pools = _Pools(caches, True)
    pools.keep_apart(pairs, "copies")
    n = cnp.PyArray_DIM(pairs, 0)
    if n == 0 or pools.num == 0:
        return
    _cpu.check_copies(data, n, pools.num_blocks)
    _cpu.copy_blocks(pools.data, pools.num, data, n)


cdef int _rows(cnp.ndarray a, str name, int64_t n, int64_t width) except -1:
    """Bytes of blocks on the host."""
    if (cnp.PyArray_NDIM(a) != 2 or cnp.PyArray_DIM(a, 0) != n or cnp.PyArray_DIM(a, 1) != width):
        bad_shape(a, name, f"[{n}, {width}], the bytes of a block in all caches for each block id")
    if cnp.PyArray_TYPE(a) != cnp.NPY_UINT8:
        raise ValueError(f"{name} must be uint8, got {a.dtype}")
    if width > 1 and n and cnp.PyArray_STRIDE(a, 1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got a stride of "
                         f"{cnp.PyArray_STRIDE(a, 1)} bytes for elements of 1")
    return 0


def gather_blocks(caches, block_ids, out=None, *, stream=None):
    """Copy blocks out of the caches into one buffer of bytes, to keep or to send them.

    Synchronous on the CPU.

    Parameters
    ----------
    caches : array [num_blocks, ...], or sequence of such arrays
        As in `copy_blocks`.
    block_ids : array int32 [n]
        Blocks to copy; one may be there twice.
    out : array uint8 [n, bytes of a block in all caches], optional
        Where to write.
    stream : optional
        Of a GPU call; None on the CPU.

    Returns
    -------
    array uint8 [n, bytes of a block in all caches]
        ``out``, or a new array of the first cache's library, as by `paged_attention`: in each row
        the block of the first cache in the order of its dimensions, whatever its strides, then that
        of the second.

    Raises
    ------
    ValueError
        A shape, dtype or block id that does not fit, named with what was expected and what came.
    TypeError
        An argument of a wrong kind. After any error nothing was written.

    See Also
    --------
    scatter_blocks : The reverse.
    """
    hip = hip_operations(_first(caches))
    if hip is not None:
        return hip.gather_blocks(caches, block_ids, out, stream=stream)
    cdef cnp.ndarray ids = as_array(block_ids, "block_ids"), rows
    cdef const int32_t *data = as_int32s(ids, "block_ids", "[n]", -1)
    cdef int64_t n = cnp.PyArray_DIM(ids, 0)
    host_only(stream)
    cdef _Pools pools = _Pools(caches, False)
    cdef cnp.npy_intp[2] dims
    if out is None:
        dims[0], dims[1] = n, pools.block_bytes
        out, rows = host_result(_first(caches), np.dtype(np.uint8), 2, dims)
    else:
        rows = as_array(out, "out")
    _rows(rows, "out", n, pools.block_bytes)
    writable(rows, "out")
    pools.keep_apart(rows, "out")
    apart(rows, "out", ids, "block_ids")
    _cpu.check_blocks(data, n, pools.num_blocks, False)
    if n and pools.block_bytes:
        _cpu.gather_blocks(pools.data, pools.num, data, n, <char *>cnp.PyArray_DATA(rows),
                           cnp.PyArray_STRIDE(rows, 0))
    return out


def scatter_blocks(caches, block_ids, data, *, stream=None):
    """Copy blocks that `gather_blocks` gave back into the caches, at any place.

    Synchronous on the CPU.

    Parameters
    ----------
    caches : array [num_blocks, ...], or sequence of such arrays
        As in `copy_blocks`: of the shapes and dtypes that were gathered from.
    block_ids : array int32 [n]
        Where each row of data goes; none may be there twice.
    data : array uint8 [n, bytes of a block in all caches]
        What to write.
    stream : optional
        Of a GPU call; None on the CPU.

    Raises
    ------
    ValueError
        A shape, dtype or block id that does not fit, named with what was expected and what came.
    TypeError
        An argument of a wrong kind. After any error nothing was written.

    Examples
    --------
    >>> import numpy as np
    >>> cache = np.arange(6, dtype=np.float32).reshape(3, 2)
    >>> data = gather_blocks(cache, np.array([2, 0], np.int32))
    >>> data.shape
    (2, 8)
    >>> scatter_blocks(cache, np.array([1, 2], np.int32), data)
    >>> cache
    array([[0., 1.],
           [4., 5.],
           [0., 1.]], dtype=float32)
    """
    hip = hip_operations(_first(caches))
    if hip is not None:
        return hip.scatter_blocks(caches, block_ids, data, stream=stream)
    cdef cnp.ndarray ids = as_array(block_ids, "block_ids"), rows = as_array(data, "data")
    cdef const int32_t *indices = as_int32s(ids, "block_ids", "[n]", -1)
    cdef int64_t n = cnp.PyArray_DIM(ids, 0)
    host_only(stream)
    cdef _Pools pools = _Pools(caches, True)
    _rows(rows, "data", n, pools.block_bytes)
    pools.keep_apart(rows, "data")
    pools.keep_apart(ids, "block_ids")
    _cpu.check_blocks(indices, n, pools.num_blocks, True)
    if n and pools.block_bytes:
        _cpu.scatter_blocks(pools.data, pools.num, indices, n, <char *>cnp.PyArray_DATA(rows),
                            cnp.PyArray_STRIDE(rows, 0))


def block_table_from_csr(kv_indptr, kv_indices, kv_last_page_len, block_size, *, out=None):
    """The block table and lengths of sequences whose blocks come as compressed rows.

    So FlashInfer and AITER describe a batch; `Batch.kv_indptr` and its fellows are the other
    direction. In host memory.

    Parameters
    ----------
    kv_indptr : array int32 [num_seqs + 1]
        Sequence i has the blocks ``kv_indices[kv_indptr[i]:kv_indptr[i + 1]]``; from 0 up.
    kv_indices : array int32 [nnz]
        Block ids; there may be more than ``kv_indptr[-1]``, which are not read.
    kv_last_page_len : array int32 [num_seqs]
        Tokens in the last block of each sequence, 1 .. `block_size`; not read where it has none.
    block_size : int
        Tokens a block.
    out : array int32 [num_rows, max_blocks], optional
        Where to write, of at least as many rows as sequences and as many columns as the longest
        has blocks. What is behind a sequence's end is left as it is, as nobody reads it.

    Returns
    -------
    block_table : array int32 [num_seqs, max_blocks]
        ``out``, or a new NumPy array with -1 behind each sequence's end.
    seq_lens : array int32 [num_seqs]
        Tokens of each sequence.

    Raises
    ------
    ValueError
        A dtype, shape or entry that does not fit, with what was expected and what came.
    TypeError
        An argument of a wrong kind. After any error nothing was written.

    Examples
    --------
    >>> import numpy as np
    >>> indptr, indices = np.array([0, 2, 3], np.int32), np.array([5, 1, 4], np.int32)
    >>> block_table_from_csr(indptr, indices, np.array([3, 16], np.int32), 16)
    (array([[ 5,  1],
           [ 4, -1]], dtype=int32), array([19, 16], dtype=int32))
    """
    cdef cnp.ndarray starts = as_array(kv_indptr, "kv_indptr")
    cdef cnp.ndarray ids = as_array(kv_indices, "kv_indices")
    cdef cnp.ndarray last = as_array(kv_last_page_len, "kv_last_page_len"), table, lengths
    cdef int64_t size, i, n, used, stride, longest = 0
    cdef int32_t *row
    if block_size is None:
        raise TypeError("block_size must be an integer, got NoneType")
    size = as_bound(block_size, "block_size", 1)
    cdef const int32_t *indptr = as_int32s(starts, "kv_indptr", "[num_seqs + 1]", -1)
    n = cnp.PyArray_DIM(starts, 0) - 1
    if n < 0:
        bad_shape(starts, "kv_indptr", "[num_seqs + 1]")
    cdef const int32_t *indices = as_int32s(ids, "kv_indices", "[nnz]", -1)
    cdef const int32_t *filled = as_int32s(last, "kv_last_page_len", "[num_seqs]", n)
    if indptr[0] != 0:
        raise ValueError(f"kv_indptr must begin with 0, got {indptr[0]}")
    for i in range(n):
        used = <int64_t>indptr[i + 1] - indptr[i]
        if used < 0:
            raise ValueError(f"kv_indptr must not decrease, got {indptr[i]} and then "
                             f"{indptr[i + 1]} at entry {i + 1}")
        if used and not 1 <= filled[i] <= size:
            raise ValueError(f"kv_last_page_len must be 1 to block_size, {size}, got {filled[i]} "
                             f"for sequence {i}")
        if used and (used - 1) * <double>size + filled[i] > INT32_MAX:
            raise ValueError(f"kv_indptr must give sequences of less than 2**31 tokens, got {used} "
                             f"blocks of {size} for sequence {i}")
        longest = max(longest, used)
    if indptr[n] > cnp.PyArray_DIM(ids, 0):
        raise ValueError(f"kv_indices must have the {indptr[n]} entries that kv_indptr ends with, "
                         f"got {shape_text(ids)}")
    lengths = np.zeros(n, np.int32)
    if out is None:
        out = table = np.full((n, longest), -1, np.int32)
    else:
        table = as_array(out, "out")
        if (cnp.PyArray_NDIM(table) != 2 or cnp.PyArray_DIM(table, 0) < n
                or cnp.PyArray_DIM(table, 1) < longest):
            bad_shape(table, "out", f"[{n}, {longest}] or larger")
        if cnp.PyArray_TYPE(table) != cnp.NPY_INT32:
            raise ValueError(f"out must be int32, got {table.dtype}")
        behaved(table, "out")
        contiguous_rows(table, "out")
        writable(table, "out")
        apart(table, "out", starts, "kv_indptr")
        apart(table, "out", ids, "kv_indices")
        apart(table, "out", last, "kv_last_page_len")
    stride = stride_of(table, 0)
    row = <int32_t *>cnp.PyArray_DATA(table)
    for i in range(n):
        used = indptr[i + 1] - indptr[i]
        if used:
            memcpy(row, indices + indptr[i], used * sizeof(int32_t))
            (<int32_t *>cnp.PyArray_DATA(lengths))[i] = <int32_t>((used - 1) * size + filled[i])
        row += stride
    return out, lengths
