# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The operations on the CPU: every argument is checked here, then C does the work."""

cimport numpy as cnp
from cpython.bool cimport PyBool_Check
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.ref cimport Py_INCREF
from libc.math cimport INFINITY, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memset

import os

import ml_dtypes
import numpy as np

cnp.import_array()

cdef extern from "rf/status.h" nogil:
    enum: RF_OK
    enum: RF_ERR_NO_MEMORY

cdef extern from "rf/layout.h" nogil:
    enum: RF_F32
    enum: RF_F16
    enum: RF_BF16
    ctypedef struct rf_paged:
        void *data
        int64_t block_stride
        int64_t head_stride
        int64_t token_stride
    ctypedef struct rf_rows:
        void *data
        int64_t token_stride
        int64_t head_stride

cdef extern from "rf/params.h" nogil:
    ctypedef struct rf_attention_params:
        rf_rows query
        rf_rows out
        rf_paged k
        rf_paged v
        const int32_t *block_table
        const int32_t *rows
        const int32_t *seq_lens
        const int32_t *cu_seqlens_q
        int64_t table_stride
        int64_t num_tokens
        int64_t num_blocks
        int64_t num_rows
        int64_t table_width
        int32_t num_seqs
        int32_t num_heads
        int32_t num_kv_heads
        int32_t head_dim
        int32_t v_head_dim
        int32_t block_size
        int32_t dtype
        int32_t kv_dtype
        int32_t causal
        int32_t window_left
        int32_t window_right
        float scale
        int32_t reserved
    ctypedef struct rf_write_params:
        rf_rows key
        rf_rows value
        rf_paged k
        rf_paged v
        const int64_t *slot_mapping
        int64_t num_tokens
        int64_t num_blocks
        int32_t num_kv_heads
        int32_t head_dim
        int32_t v_head_dim
        int32_t block_size
        int32_t dtype
        int32_t kv_dtype

cdef extern from "rf/cpu.h" nogil:
    ctypedef struct rf_cpu:
        pass
    enum rf_fault_code:
        RF_FAULT_SEQ_LEN
        RF_FAULT_ROW
        RF_FAULT_CU_START
        RF_FAULT_CU_ORDER
        RF_FAULT_CU_END
        RF_FAULT_QUERY_LONGER
        RF_FAULT_MAX_QUERY
        RF_FAULT_MAX_SEQ
        RF_FAULT_BLOCK
        RF_FAULT_SLOT
        RF_FAULT_COPY_RANGE
        RF_FAULT_COPY_REPEATED
    ctypedef struct rf_fault:
        int64_t index
        int64_t index2
        int64_t value
        int64_t limit
        int32_t code
    ctypedef struct rf_copy_params:
        char *data
        int64_t block_stride
        int64_t outer_stride
        int64_t middle_stride
        int64_t outer
        int64_t middle
        int64_t inner
    int rf_cpu_create(const char *isa, int threads, rf_cpu **out)
    int rf_cpu_set_threads(rf_cpu *cpu, int threads)
    int rf_cpu_get_threads(const rf_cpu *cpu)
    int rf_cpu_online()
    const char *rf_cpu_isa_name(int i)
    int rf_cpu_isa_available(const char *isa)
    const char *rf_cpu_isa(const rf_cpu *cpu)
    int rf_cpu_set_isa(rf_cpu *cpu, const char *isa)
    int rf_cpu_check_attention(const rf_attention_params *p, int64_t max_seqlen_q,
                               int64_t max_seq_len, int64_t *work, rf_fault *fault)
    int rf_cpu_check_write(const rf_write_params *p, rf_fault *fault)
    int rf_cpu_check_copy(const int32_t *copies, int64_t num_copies, int64_t num_blocks,
                          rf_fault *fault)
    int rf_cpu_attention(rf_cpu *cpu, const rf_attention_params *p)
    int rf_cpu_write_kv(rf_cpu *cpu, const rf_write_params *p)
    int rf_cpu_copy_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                           const int32_t *copies, int64_t num_copies)

cdef extern from "rf/dlpack.h" nogil:
    enum: RF_DL_CPU
    enum: RF_DL_CUDA_HOST
    enum: RF_DL_ROCM_HOST
    enum: RF_DL_INT
    enum: RF_DL_FLOAT
    enum: RF_DL_BFLOAT
    uint64_t RF_DL_READ_ONLY
    ctypedef struct rf_dl_tensor:
        void *data
        int32_t device_type
        int32_t device_id
        int32_t ndim
        uint8_t code
        uint8_t bits
        uint16_t lanes
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset
    ctypedef struct rf_dl_managed:
        rf_dl_tensor tensor
    ctypedef struct rf_dl_versioned:
        uint64_t flags
        rf_dl_tensor tensor

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(type subtype, cnp.dtype descr, int nd, const cnp.npy_intp *dims,
                                const cnp.npy_intp *strides, void *data, int flags, object obj)

cdef cnp.dtype _BF16 = np.dtype(ml_dtypes.bfloat16)
cdef cnp.dtype _F32 = np.dtype(np.float32)
cdef cnp.dtype _F16 = np.dtype(np.float16)
cdef int _BF16_NUM = _BF16.num, _F16_NUM = _F16.num
cdef object _shares_memory = np.shares_memory
cdef object _index = __import__("operator").index

# Releasing the GIL costs more than it gives below this many bytes of keys and values, about 5 us.
cdef int64_t _HOLD_GIL_BYTES = 65536

cdef int64_t _MAX_BLOCKS = 2147483647
cdef int _MIN_DIM = 8, _MAX_DIM = 512

cdef rf_cpu *_cpu = NULL


# ---------------------------------------------------------------- arrays

cdef object _import_dlpack(object x, str name):
    """An array of another library as a NumPy array over the same memory."""
    device = x.__dlpack_device__()
    cdef int kind = int(device[0])
    if kind not in (RF_DL_CPU, RF_DL_CUDA_HOST, RF_DL_ROCM_HOST):
        raise ValueError(f"{name} must be in host memory for the CPU operations, got a "
                         f"{type(x).__name__} on DLPack device type {kind}")
    try:
        capsule = x.__dlpack__(max_version=(1, 0))
    except TypeError:  # a producer from before DLPack 1.0
        capsule = x.__dlpack__()
    cdef rf_dl_tensor *t
    cdef rf_dl_versioned *managed
    cdef int flags = cnp.NPY_ARRAY_WRITEABLE
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        managed = <rf_dl_versioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")
        if managed.flags & RF_DL_READ_ONLY:
            flags = 0
        t = &managed.tensor
    else:
        t = &(<rf_dl_managed *>PyCapsule_GetPointer(capsule, "dltensor")).tensor
    cdef cnp.dtype descr
    if t.lanes == 1 and t.code == RF_DL_BFLOAT and t.bits == 16:
        descr = _BF16
    elif t.lanes == 1 and t.code == RF_DL_FLOAT and t.bits == 32:
        descr = _F32
    elif t.lanes == 1 and t.code == RF_DL_FLOAT and t.bits == 16:
        descr = _F16
    elif t.lanes == 1 and t.code == RF_DL_INT and t.bits in (32, 64):
        descr = np.dtype(np.int32 if t.bits == 32 else np.int64)
    else:
        raise ValueError(f"{name} must be float32, float16, bfloat16, int32 or int64, got DLPack "
                         f"type code {t.code} with {t.bits} bits and {t.lanes} lanes")
    if t.ndim > 8:
        raise ValueError(f"{name} must have at most 8 dimensions, got {t.ndim}")
    cdef cnp.npy_intp dims[8]
    cdef cnp.npy_intp strides[8]
    cdef int i
    cdef cnp.npy_intp step = descr.itemsize
    for i in range(t.ndim - 1, -1, -1):
        dims[i] = t.shape[i]
        strides[i] = t.strides[i] * descr.itemsize if t.strides != NULL else step
        step *= dims[i]
    Py_INCREF(descr)  # the constructor steals it
    a = PyArray_NewFromDescr(cnp.ndarray, descr, t.ndim, dims, strides,
                             <char *>t.data + t.byte_offset, flags, None)
    cnp.set_array_base(a, capsule)  # its destructor gives the memory back to the producer
    return a


cdef cnp.ndarray _array(object x, str name):
    if isinstance(x, cnp.ndarray):
        return <cnp.ndarray>x
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _import_dlpack(x, name)
    raise TypeError(f"{name} must be a NumPy array or an object with __dlpack__, got "
                    f"{type(x).__name__}")


cdef str _shape(cnp.ndarray a):
    return "[" + ", ".join([str(n) for n in (<object>a).shape]) + "]"


cdef int _bad_rank(cnp.ndarray a, str name, str what) except -1:
    raise ValueError(f"{name} must have shape {what}, got {_shape(a)}")


cdef int _dtype(cnp.ndarray a, str name) except -1:
    """The type of an array of vectors; also that its elements are aligned and native."""
    cdef int num = cnp.PyArray_TYPE(a), code
    if num == cnp.NPY_FLOAT:
        code = RF_F32
    elif num == _F16_NUM:
        code = RF_F16
    elif num == _BF16_NUM:
        code = RF_BF16
    else:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {a.dtype}")
    _behaved(a, name)
    return code


cdef int _behaved(cnp.ndarray a, str name) except -1:
    if not (cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISNOTSWAPPED(a)):
        raise ValueError(f"{name} must be aligned and in native byte order")
    return 0


cdef int _same_dtype(cnp.ndarray a, str name, cnp.ndarray like, str other) except -1:
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(like):
        raise ValueError(f"{name} must have the dtype of {other}, {like.dtype}, got {a.dtype}")
    _behaved(a, name)
    return 0


cdef int _writable(cnp.ndarray a, str name) except -1:
    if not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name} must be writable, got a read-only array")
    return 0


cdef int64_t _stride(cnp.ndarray a, int axis, Py_ssize_t item) noexcept:
    """Elements from one index of an axis to the next; 0 where there is only one index.

    An aligned array's strides are whole elements: no type here is larger than its alignment.
    """
    if cnp.PyArray_DIM(a, axis) <= 1:
        return 0
    return cnp.PyArray_STRIDE(a, axis) // item


cdef int _contiguous(cnp.ndarray a, str name, Py_ssize_t item) except -1:
    """The last dimension must be contiguous."""
    cdef int last = cnp.PyArray_NDIM(a) - 1
    if (cnp.PyArray_DIM(a, last) > 1 and cnp.PyArray_STRIDE(a, last) != item
            and cnp.PyArray_SIZE(a)):
        raise ValueError(f"{name} must be contiguous in its last dimension, got a stride of "
                         f"{cnp.PyArray_STRIDE(a, last)} bytes for elements of {item}")
    return 0


cdef int _head_dim(int64_t dim, cnp.ndarray a, str name) except -1:
    if dim < _MIN_DIM or dim > _MAX_DIM or dim % 8:
        raise ValueError(f"{name} must have a head_dim (its last dimension) of {_MIN_DIM} to "
                         f"{_MAX_DIM} in steps of 8, got {_shape(a)}")
    return 0


cdef int _vectors(cnp.ndarray a, str name, rf_rows *out) except -1:
    """[tokens, heads, dim] with a contiguous last dimension."""
    cdef Py_ssize_t item = cnp.PyArray_ITEMSIZE(a)
    _contiguous(a, name, item)
    out.data = cnp.PyArray_DATA(a)
    out.token_stride = _stride(a, 0, item)
    out.head_stride = _stride(a, 1, item)
    return 0


cdef int _pool(cnp.ndarray a, str name, bint nhd, rf_paged *out) except -1:
    cdef Py_ssize_t item = cnp.PyArray_ITEMSIZE(a)
    _contiguous(a, name, item)
    out.data = cnp.PyArray_DATA(a)
    out.block_stride = _stride(a, 0, item)
    out.head_stride = _stride(a, 2 if nhd else 1, item)
    out.token_stride = _stride(a, 1 if nhd else 2, item)
    return 0


cdef str _pool_shape(bint nhd):
    return ("[num_blocks, block_size, num_kv_heads, head_dim]" if nhd
            else "[num_blocks, num_kv_heads, block_size, head_dim]")


cdef int _pools(cnp.ndarray k, cnp.ndarray v, bint nhd) except -1:
    """What k_cache and v_cache have in common."""
    cdef int i
    if cnp.PyArray_NDIM(k) != 4:
        _bad_rank(k, "k_cache", _pool_shape(nhd))
    if cnp.PyArray_NDIM(v) != 4:
        _bad_rank(v, "v_cache", _pool_shape(nhd))
    for i in range(3):
        if cnp.PyArray_DIM(k, i) != cnp.PyArray_DIM(v, i):
            raise ValueError(f"v_cache must have the blocks, heads and block size of k_cache, "
                             f"{_shape(k)}, got {_shape(v)}")
    if cnp.PyArray_DIM(k, 1) < 1 or cnp.PyArray_DIM(k, 2) < 1:
        raise ValueError(f"k_cache must have at least one head and one token a block, "
                         f"{_pool_shape(nhd)}, got {_shape(k)}")
    if cnp.PyArray_DIM(k, 0) > _MAX_BLOCKS or cnp.PyArray_DIM(k, 2) > _MAX_BLOCKS or \
            cnp.PyArray_DIM(k, 1) > _MAX_BLOCKS:
        raise ValueError(f"k_cache must have at most 2**31 - 1 blocks, got {_shape(k)}")
    return 0


cdef bint _is_nhd(object layout) except *:
    if layout == "HND":
        return False
    if layout == "NHD":
        return True
    if not isinstance(layout, str):
        raise TypeError(f"layout must be 'HND' or 'NHD', got {type(layout).__name__}")
    raise ValueError(f"layout must be 'HND' or 'NHD', got {layout!r}")


cdef const int32_t *_int32s(cnp.ndarray a, str name, str what, int64_t n) except? NULL:
    """Data of a contiguous int32 [n]; n < 0 is any length."""
    if cnp.PyArray_NDIM(a) != 1:
        _bad_rank(a, name, what)
    if cnp.PyArray_TYPE(a) != cnp.NPY_INT32:
        raise ValueError(f"{name} must be int32, got {a.dtype}")
    _behaved(a, name)
    if n >= 0 and cnp.PyArray_DIM(a, 0) != n:
        raise ValueError(f"{name} must have shape {what} with {n} entries, got {_shape(a)}")
    _contiguous(a, name, sizeof(int32_t))
    return <const int32_t *>cnp.PyArray_DATA(a)


cdef int64_t _bound(object n, str name) except -2:
    """A host integer or None, as -1."""
    if n is None:
        return -1
    cdef int64_t i
    try:
        i = _index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer or None, got {type(n).__name__}") from None
    if i < 0:
        raise ValueError(f"{name} must not be negative, got {i}")
    return i


cdef struct _Extent:
    size_t low
    size_t high


cdef _Extent _extent(cnp.ndarray a) noexcept:
    """First byte and one past the last that the array can touch."""
    cdef _Extent e
    cdef int i
    cdef cnp.npy_intp n, span
    e.low = e.high = <size_t>cnp.PyArray_DATA(a)
    for i in range(cnp.PyArray_NDIM(a)):
        n = cnp.PyArray_DIM(a, i)
        if n == 0:
            e.high = e.low
            return e
        span = (n - 1) * cnp.PyArray_STRIDE(a, i)
        if span > 0:
            e.high += <size_t>span
        else:
            e.low -= <size_t>-span
    e.high += <size_t>cnp.PyArray_ITEMSIZE(a)
    return e


cdef int _apart(cnp.ndarray a, str name, cnp.ndarray b, str other) except -1:
    cdef _Extent x = _extent(a), y = _extent(b)
    if x.low >= y.high or y.low >= x.high:
        return 0
    # Extents may interleave without sharing a byte (one fused buffer): the exact answer.
    if _shares_memory(a, b):
        raise ValueError(f"{name} must not overlap {other} in memory")
    return 0


# ---------------------------------------------------------------- faults

cdef int _raise(rf_fault *f) except -1:
    cdef int64_t i = f.index, value = f.value, limit = f.limit
    if f.code == RF_FAULT_SEQ_LEN:
        raise ValueError(f"seq_lens must be 0 to {limit} (the width of block_table times the block "
                         f"size), got {value} at index {i}")
    if f.code == RF_FAULT_ROW:
        raise ValueError(f"rows must name rows of block_table, 0 to {limit - 1}, got {value} at "
                         f"index {i}")
    if f.code == RF_FAULT_CU_START:
        raise ValueError(f"cu_seqlens_q must start with 0, got {value}")
    if f.code == RF_FAULT_CU_ORDER:
        raise ValueError(f"cu_seqlens_q must not decrease, got {value} at index {i} after {limit}")
    if f.code == RF_FAULT_CU_END:
        raise ValueError(f"cu_seqlens_q must stay within the {limit} tokens of query, got {value} "
                         f"at index {i}")
    if f.code == RF_FAULT_QUERY_LONGER:
        raise ValueError(f"seq_lens must include the new tokens: sequence {i} has {value} query "
                         f"tokens and a seq_len of {limit}")
    if f.code == RF_FAULT_MAX_QUERY:
        raise ValueError(f"max_seqlen_q must bound every sequence: it is {limit}, sequence {i} has "
                         f"{value} query tokens")
    if f.code == RF_FAULT_MAX_SEQ:
        raise ValueError(f"max_seq_len must bound every sequence: it is {limit}, seq_lens has "
                         f"{value} at index {i}")
    if f.code == RF_FAULT_BLOCK:
        raise ValueError(f"block_table must name blocks below {limit}, got {value} at row {i}, "
                         f"column {f.index2}")
    if f.code == RF_FAULT_SLOT:
        raise ValueError(f"slot_mapping must name slots below {limit} (num_blocks times "
                         f"block_size), got {value} at index {i}")
    if f.code == RF_FAULT_COPY_RANGE:
        raise ValueError(f"copies must name blocks 0 to {limit - 1}, got {value} at index {i}")
    raise ValueError(f"copies must not depend on their order: block {value}, a destination at "
                     f"index {i}, is a source or destination of another copy")


# ---------------------------------------------------------------- operations

def paged_attention(query, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q=None, *, rows=None,
                    scale=None, causal=True, max_seqlen_q=None, max_seq_len=None, layout="HND",
                    out=None):
    """Attention of new tokens to the paged context of their sequences.

    Decode (one query token a sequence), prefill (many) and both in one ragged batch. Synchronous.
    Softmax and sums are float32. The bits of a sequence's result depend only on its own query
    tokens, keys, values and length: not on the rest of the batch, the order of its blocks, or the
    number of threads.

    Parameters
    ----------
    query : array [num_tokens, num_heads, head_dim]
        float32, float16 or bfloat16; head_dim 8 to 512 in steps of 8.
    k_cache, v_cache : array [num_blocks, num_kv_heads, block_size, head_dim]
        One layer's blocks, or ``[num_blocks, block_size, num_kv_heads, head_dim]`` with
        ``layout="NHD"``; the dtype of query; any strides with a contiguous last dimension.
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
        Factor of the logits; ``1 / sqrt(head_dim)`` by default.
    causal : bool
        A query token sees no later token; aligned so that the last sees the last of the context.
    max_seqlen_q, max_seq_len : int, optional
        Bounds of query tokens a sequence and of seq_lens, checked here; a GPU launch needs them.
    layout : {"HND", "NHD"}
        The order of the caches' two middle dimensions.
    out : array like query, optional
        Where to write; must overlap no other argument. [num_tokens, num_heads, v_head_dim].

    Returns
    -------
    array [num_tokens, num_heads, v_head_dim]
        ``out``, or a new NumPy array of the query's dtype.

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
    cdef rf_attention_params p
    cdef rf_fault fault
    cdef int64_t work, bytes_read, max_q, max_len
    cdef int status
    cdef bint nhd = _is_nhd(layout)
    cdef cnp.ndarray q = _array(query, "query")
    cdef cnp.ndarray k = _array(k_cache, "k_cache")
    cdef cnp.ndarray v = _array(v_cache, "v_cache")
    cdef cnp.ndarray table = _array(block_table, "block_table")
    cdef cnp.ndarray lens = _array(seq_lens, "seq_lens")
    cdef cnp.ndarray cu = None, row_array = None, o
    cdef cnp.dtype descr
    cdef cnp.npy_intp dims[3]

    memset(&p, 0, sizeof(p))
    p.window_left = p.window_right = -1
    if cnp.PyArray_NDIM(q) != 3:
        _bad_rank(q, "query", "[num_tokens, num_heads, head_dim]")
    p.dtype = p.kv_dtype = _dtype(q, "query")
    _same_dtype(k, "k_cache", q, "query")
    _same_dtype(v, "v_cache", q, "query")
    _pools(k, v, nhd)
    p.num_tokens = cnp.PyArray_DIM(q, 0)
    if p.num_tokens > _MAX_BLOCKS or cnp.PyArray_DIM(q, 1) > _MAX_BLOCKS:
        raise ValueError(f"query must have less than 2**31 tokens and heads, got {_shape(q)}")
    p.num_heads = <int32_t>cnp.PyArray_DIM(q, 1)
    p.num_blocks = cnp.PyArray_DIM(k, 0)
    p.num_kv_heads = <int32_t>cnp.PyArray_DIM(k, 2 if nhd else 1)
    p.block_size = <int32_t>cnp.PyArray_DIM(k, 1 if nhd else 2)
    _head_dim(cnp.PyArray_DIM(q, 2), q, "query")
    _head_dim(cnp.PyArray_DIM(v, 3), v, "v_cache")
    p.head_dim = <int32_t>cnp.PyArray_DIM(q, 2)
    p.v_head_dim = <int32_t>cnp.PyArray_DIM(v, 3)
    if cnp.PyArray_DIM(k, 3) != p.head_dim:
        raise ValueError(f"k_cache must have the head_dim of query, {p.head_dim}, got {_shape(k)}")
    if p.num_heads < 1 or p.num_heads % p.num_kv_heads:
        raise ValueError(f"query must have a multiple of the {p.num_kv_heads} heads of k_cache, "
                         f"got {p.num_heads} heads")
    _vectors(q, "query", &p.query)
    _pool(k, "k_cache", nhd, &p.k)
    _pool(v, "v_cache", nhd, &p.v)

    if cnp.PyArray_NDIM(table) != 2:
        _bad_rank(table, "block_table", "[num_rows, max_blocks]")
    if cnp.PyArray_TYPE(table) != cnp.NPY_INT32:
        raise ValueError(f"block_table must be int32, got {table.dtype}")
    _behaved(table, "block_table")
    _contiguous(table, "block_table", sizeof(int32_t))
    p.block_table = <const int32_t *>cnp.PyArray_DATA(table)
    p.table_stride = _stride(table, 0, sizeof(int32_t))
    p.num_rows = cnp.PyArray_DIM(table, 0)
    p.table_width = cnp.PyArray_DIM(table, 1)
    p.seq_lens = _int32s(lens, "seq_lens", "[num_seqs]", -1)
    if cnp.PyArray_DIM(lens, 0) > _MAX_BLOCKS:
        raise ValueError(f"seq_lens must have less than 2**31 entries, got {_shape(lens)}")
    p.num_seqs = <int32_t>cnp.PyArray_DIM(lens, 0)
    p.cu_seqlens_q = NULL
    if cu_seqlens_q is not None:
        cu = _array(cu_seqlens_q, "cu_seqlens_q")
        p.cu_seqlens_q = _int32s(cu, "cu_seqlens_q", "[num_seqs + 1]", <int64_t>p.num_seqs + 1)
    elif p.num_tokens != p.num_seqs:
        raise ValueError(f"cu_seqlens_q is needed when query and seq_lens differ in length, got "
                         f"{p.num_tokens} tokens and {p.num_seqs} sequences")
    p.rows = NULL
    if rows is not None:
        row_array = _array(rows, "rows")
        p.rows = _int32s(row_array, "rows", "[num_seqs]", p.num_seqs)
    elif p.num_rows < p.num_seqs:
        raise ValueError(f"block_table must have a row for each of the {p.num_seqs} sequences, got "
                         f"{_shape(table)}")

    if not PyBool_Check(causal) and not isinstance(causal, np.bool_):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    p.causal = 1 if causal else 0
    if scale is None:
        p.scale = <float>(1.0 / sqrt(<double>p.head_dim))
    else:
        try:
            p.scale = <float>float(scale)
        except (TypeError, ValueError):
            raise TypeError(f"scale must be a float or None, got {type(scale).__name__}") from None
        if not (-INFINITY < p.scale < INFINITY):
            raise ValueError(f"scale must be finite, got {scale}")
    p.reserved = 0
    max_q = _bound(max_seqlen_q, "max_seqlen_q")
    max_len = _bound(max_seq_len, "max_seq_len")
    if rf_cpu_check_attention(&p, max_q, max_len, &work, &fault) != RF_OK:
        _raise(&fault)

    result = out
    if out is None:
        dims[0] = p.num_tokens
        dims[1] = p.num_heads
        dims[2] = p.v_head_dim
        descr = _F32 if p.dtype == RF_F32 else _F16 if p.dtype == RF_F16 else _BF16
        Py_INCREF(descr)  # the constructor steals it
        o = PyArray_NewFromDescr(cnp.ndarray, descr, 3, dims, NULL, NULL, 0, None)
        if cu is not None and p.cu_seqlens_q[p.num_seqs] < p.num_tokens:
            o[p.cu_seqlens_q[p.num_seqs]:] = 0  # nobody's rows
        result = o
    else:
        o = _array(out, "out")
        if (cnp.PyArray_NDIM(o) != 3 or cnp.PyArray_DIM(o, 0) != p.num_tokens
                or cnp.PyArray_DIM(o, 1) != p.num_heads
                or cnp.PyArray_DIM(o, 2) != p.v_head_dim):
            raise ValueError(f"out must have shape [{p.num_tokens}, {p.num_heads}, "
                             f"{p.v_head_dim}], got {_shape(o)}")
        _same_dtype(o, "out", q, "query")
        _writable(o, "out")
        _apart(o, "out", q, "query")
        _apart(o, "out", k, "k_cache")
        _apart(o, "out", v, "v_cache")
        _apart(o, "out", table, "block_table")
        _apart(o, "out", lens, "seq_lens")
        if cu is not None:
            _apart(o, "out", cu, "cu_seqlens_q")
        if row_array is not None:
            _apart(o, "out", row_array, "rows")
    _vectors(o, "out", &p.out)

    bytes_read = work * p.num_kv_heads * p.head_dim * cnp.PyArray_ITEMSIZE(q)
    if bytes_read < _HOLD_GIL_BYTES:
        status = rf_cpu_attention(_cpu, &p)
    else:
        with nogil:
            status = rf_cpu_attention(_cpu, &p)
    if status == RF_ERR_NO_MEMORY:
        raise MemoryError("paged_attention: no memory for scratch")
    return result


def write_kv(key, value, k_cache, v_cache, slot_mapping, *, layout="HND"):
    """Write the keys and values of new tokens into their slots of the paged cache.

    Synchronous. A slot that is named twice gets one of its tokens, unspecified which.

    Parameters
    ----------
    key : array [num_tokens, num_kv_heads, head_dim]
        float32, float16 or bfloat16, any strides with a contiguous last dimension.
    value : array [num_tokens, num_kv_heads, v_head_dim]
        As key; v_head_dim is the last dimension of v_cache.
    k_cache, v_cache : array [num_blocks, num_kv_heads, block_size, head_dim]
        One layer's blocks, or ``[num_blocks, block_size, num_kv_heads, head_dim]`` with
        ``layout="NHD"``; the dtype of key; written in place.
    slot_mapping : array int64 [num_tokens]
        Slot of each token: block id x block_size + offset. A negative one is padding and skipped.
    layout : {"HND", "NHD"}
        The order of the caches' two middle dimensions.

    Raises
    ------
    ValueError
        A dtype, shape, stride or slot that does not fit, with what was expected and what came.
    TypeError
        An argument of a wrong kind. After any error nothing was written.
    """
    cdef rf_write_params p
    cdef rf_fault fault
    cdef int64_t size
    cdef bint nhd = _is_nhd(layout)
    cdef cnp.ndarray kk = _array(key, "key")
    cdef cnp.ndarray vv = _array(value, "value")
    cdef cnp.ndarray k = _array(k_cache, "k_cache")
    cdef cnp.ndarray v = _array(v_cache, "v_cache")
    cdef cnp.ndarray slots = _array(slot_mapping, "slot_mapping")

    if cnp.PyArray_NDIM(kk) != 3:
        _bad_rank(kk, "key", "[num_tokens, num_kv_heads, head_dim]")
    if cnp.PyArray_NDIM(vv) != 3:
        _bad_rank(vv, "value", "[num_tokens, num_kv_heads, v_head_dim]")
    p.dtype = _dtype(kk, "key")
    _same_dtype(vv, "value", kk, "key")
    _same_dtype(k, "k_cache", kk, "key")
    _same_dtype(v, "v_cache", kk, "key")
    _pools(k, v, nhd)
    p.num_tokens = cnp.PyArray_DIM(kk, 0)
    p.num_blocks = cnp.PyArray_DIM(k, 0)
    p.num_kv_heads = <int32_t>cnp.PyArray_DIM(k, 2 if nhd else 1)
    p.block_size = <int32_t>cnp.PyArray_DIM(k, 1 if nhd else 2)
    _head_dim(cnp.PyArray_DIM(k, 3), k, "k_cache")
    _head_dim(cnp.PyArray_DIM(v, 3), v, "v_cache")
    p.head_dim = <int32_t>cnp.PyArray_DIM(k, 3)
    p.v_head_dim = <int32_t>cnp.PyArray_DIM(v, 3)
    if cnp.PyArray_DIM(kk, 1) != p.num_kv_heads or cnp.PyArray_DIM(kk, 2) != p.head_dim:
        raise ValueError(f"key must have shape [num_tokens, {p.num_kv_heads}, {p.head_dim}] as "
                         f"k_cache has, got {_shape(kk)}")
    if (cnp.PyArray_DIM(vv, 0) != p.num_tokens or cnp.PyArray_DIM(vv, 1) != p.num_kv_heads
            or cnp.PyArray_DIM(vv, 2) != p.v_head_dim):
        raise ValueError(f"value must have shape [{p.num_tokens}, {p.num_kv_heads}, "
                         f"{p.v_head_dim}] as key and v_cache have, got {_shape(vv)}")
    if cnp.PyArray_NDIM(slots) != 1 or cnp.PyArray_DIM(slots, 0) != p.num_tokens:
        raise ValueError(f"slot_mapping must have shape [{p.num_tokens}], one slot a token of key, "
                         f"got {_shape(slots)}")
    if cnp.PyArray_TYPE(slots) != cnp.NPY_INT64:
        raise ValueError(f"slot_mapping must be int64, got {slots.dtype}")
    _behaved(slots, "slot_mapping")
    _contiguous(slots, "slot_mapping", sizeof(int64_t))
    p.slot_mapping = <const int64_t *>cnp.PyArray_DATA(slots)
    _writable(k, "k_cache")
    _writable(v, "v_cache")
    _vectors(kk, "key", &p.key)
    _vectors(vv, "value", &p.value)
    _pool(k, "k_cache", nhd, &p.k)
    _pool(v, "v_cache", nhd, &p.v)
    p.kv_dtype = p.dtype
    if rf_cpu_check_write(&p, &fault) != RF_OK:
        _raise(&fault)
    _apart(k, "k_cache", kk, "key")
    _apart(k, "k_cache", vv, "value")
    _apart(v, "v_cache", kk, "key")
    _apart(v, "v_cache", vv, "value")

    size = p.num_tokens * p.num_kv_heads * p.head_dim * cnp.PyArray_ITEMSIZE(kk)
    if size < _HOLD_GIL_BYTES:
        rf_cpu_write_kv(_cpu, &p)
    else:
        with nogil:
            rf_cpu_write_kv(_cpu, &p)


cdef int _copy_pool(cnp.ndarray a, str name, rf_copy_params *out) except -1:
    """[num_blocks, ...] as a block stride, two inner dimensions and contiguous bytes."""
    cdef int n = cnp.PyArray_NDIM(a), axis
    cdef int64_t inner = cnp.PyArray_ITEMSIZE(a)
    if n < 1:
        _bad_rank(a, name, "[num_blocks, ...]")
    _writable(a, name)
    axis = n - 1
    while axis >= 1 and (cnp.PyArray_STRIDE(a, axis) == inner or cnp.PyArray_DIM(a, axis) == 1):
        inner *= cnp.PyArray_DIM(a, axis)
        axis -= 1
    if axis > 2:
        raise ValueError(f"{name} must have blocks of at most two strided dimensions, got strides "
                         f"{(<object>a).strides}")
    out.data = <char *>cnp.PyArray_DATA(a)
    out.block_stride = cnp.PyArray_STRIDE(a, 0)
    out.outer_stride = cnp.PyArray_STRIDE(a, 1) if axis >= 1 else 0
    out.outer = cnp.PyArray_DIM(a, 1) if axis >= 1 else 1
    out.middle_stride = cnp.PyArray_STRIDE(a, 2) if axis >= 2 else 0
    out.middle = cnp.PyArray_DIM(a, 2) if axis >= 2 else 1
    out.inner = inner
    return 0


def copy_blocks(caches, copies):
    """Copy whole blocks within each cache, as copy-on-write needs.

    Synchronous. The copies have no order: no block may be written twice, or written and read.

    Parameters
    ----------
    caches : array [num_blocks, ...], or sequence of such arrays
        Anything with one entry a block: the key and value caches of all layers in one call. Any
        dtypes and inner shapes; all with the same num_blocks.
    copies : array int32 [num_copies, 2]
        Source and destination block of each copy.

    Raises
    ------
    ValueError
        A shape, dtype or block id that does not fit, named with what was expected and what came.
    TypeError
        An argument of a wrong kind.
    MemoryError
        No scratch memory. After any error nothing was written.
    """
    cdef cnp.ndarray pairs = _array(copies, "copies"), a
    cdef rf_fault fault
    cdef int64_t n, num_blocks = -1, size = 0
    cdef Py_ssize_t i
    cdef int status
    if cnp.PyArray_NDIM(pairs) != 2 or cnp.PyArray_DIM(pairs, 1) != 2:
        _bad_rank(pairs, "copies", "[num_copies, 2]")
    if cnp.PyArray_TYPE(pairs) != cnp.NPY_INT32:
        raise ValueError(f"copies must be int32, got {pairs.dtype}")
    if not cnp.PyArray_ISCARRAY_RO(pairs):
        raise ValueError("copies must be C-contiguous, aligned and in native byte order")
    n = cnp.PyArray_DIM(pairs, 0)
    if not isinstance(caches, (list, tuple)):
        caches = (caches,)
    arrays = []
    buffer = bytearray(sizeof(rf_copy_params) * max(len(caches), 1))
    cdef unsigned char[::1] raw = buffer
    cdef rf_copy_params *pools = <rf_copy_params *>&raw[0]
    for i, cache in enumerate(caches):
        name = f"caches[{i}]"
        a = _array(cache, name)
        arrays.append(a)
        _copy_pool(a, name, &pools[i])
        if num_blocks < 0:
            num_blocks = cnp.PyArray_DIM(a, 0)
        elif cnp.PyArray_DIM(a, 0) != num_blocks:
            raise ValueError(f"{name} must have the {num_blocks} blocks of caches[0], "
                             f"got {_shape(a)}")
        _apart(a, name, pairs, "copies")
        size += pools[i].outer * pools[i].middle * pools[i].inner
    if n == 0 or not arrays:
        return
    cdef const int32_t *data = <const int32_t *>cnp.PyArray_DATA(pairs)
    status = rf_cpu_check_copy(data, n, num_blocks, &fault)
    if status == RF_ERR_NO_MEMORY:
        raise MemoryError("copy_blocks: no memory for scratch")
    if status != RF_OK:
        _raise(&fault)
    i = len(arrays)
    if size * n < _HOLD_GIL_BYTES:
        rf_cpu_copy_blocks(_cpu, pools, i, data, n)
    else:
        with nogil:
            rf_cpu_copy_blocks(_cpu, pools, i, data, n)


# ---------------------------------------------------------------- threads and instruction sets

def set_num_threads(n):
    """Set how many threads the CPU operations use, the calling one included.

    By default the environment's ``ROCMFORGE_NUM_THREADS``, else its ``OMP_NUM_THREADS``, else the
    processors this process may run on. Results do not depend on it.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    ValueError
        n is below 1 or above 4096.
    TypeError
        n is not an integer.
    """
    try:
        value = _index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {type(n).__name__}") from None
    if not 1 <= value <= 4096:
        raise ValueError(f"n must be 1 to 4096, got {value}")
    rf_cpu_set_threads(_cpu, value)


def get_num_threads():
    """Return how many threads the CPU operations use, the calling one included."""
    return rf_cpu_get_threads(_cpu)


def isa():
    """Return the name of the instruction-set variant in use."""
    return rf_cpu_isa(_cpu).decode()


def available_isas():
    """Return the names of the variants that this processor can run, best first."""
    names = []
    cdef int i = 0
    while rf_cpu_isa_name(i) != NULL:
        if rf_cpu_isa_available(rf_cpu_isa_name(i)):
            names.append(rf_cpu_isa_name(i).decode())
        i += 1
    return tuple(names)


def _set_isa(name):
    """Use another variant from the next call on: for tests, with no call in flight."""
    if rf_cpu_set_isa(_cpu, name.encode()) != RF_OK:
        raise ValueError(f"isa must be one of {', '.join(available_isas())}, got {name!r}")


cdef int _default_threads() except -1:
    for variable in ("ROCMFORGE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0].strip()
        if text.isdigit() and 1 <= int(text) <= 4096:
            return int(text)
    return rf_cpu_online()


cdef int _start() except -1:
    global _cpu
    forced = os.environ.get("ROCMFORGE_CPU_ISA", "")
    name = forced.encode()
    if forced and not rf_cpu_isa_available(name):
        raise ImportError(f"ROCMFORGE_CPU_ISA must be one of {', '.join(available_isas())} on this "
                          f"processor, got {forced!r}")
    cdef int status
    if forced:
        status = rf_cpu_create(name, _default_threads(), &_cpu)
    else:
        status = rf_cpu_create(NULL, _default_threads(), &_cpu)
    if status != RF_OK:
        raise MemoryError("rocmforge: no memory for the CPU backend")
    return 0


_start()
