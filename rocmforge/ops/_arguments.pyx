# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The arguments of each operation, checked against each other and laid out for the kernels.

Types, shapes and strides only: what the arrays hold is the backend's to check, who may not be able
to read it from here. The arrays must outlive the struct that is filled.
"""

cimport numpy as cnp
from libc.math cimport INFINITY, sqrt
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint8_t

from rocmforge.ops._arrays cimport (
    MAX_COUNT, apart, as_array, as_flag, as_floats, as_int32s, as_number, as_pool, as_vectors,
    bad_shape, behaved, contiguous_rows, dtype_of, same_dtype, shape3, shape_text, stride_of,
    wide_dtype, writable)
from rocmforge.ops._params cimport (
    RF_E4M3FN, RF_E4M3FNUZ, RF_NUM_WIDE_DTYPES, rf_attention_params, rf_copy_params,
    rf_merge_params, rf_paged, rf_scales, rf_write_params)

from rocmforge import dtypes as _dtypes

cnp.import_array()

cdef int _MIN_DIM = 8, _MAX_DIM = 576
cdef str _EIGHT_BIT = "float8_e4m3fn, float8_e4m3fnuz or int8"
cdef str _FLOAT8 = "float8_e4m3fn or float8_e4m3fnuz"
cdef str _SCALE_FORMS = ("a float, float32 [num_kv_heads], or a float32 pool [num_blocks, "
                         "num_kv_heads, block_size]")
cdef tuple _NO_WINDOW = (-1, -1)
cdef object _index = __import__("operator").index


# ---------------------------------------------------------------- caches and their scales

cdef str _pool_shape(bint nhd):
    return ("[num_blocks, block_size, num_kv_heads, head_dim]" if nhd
            else "[num_blocks, num_kv_heads, block_size, head_dim]")


cdef int _head_dim(cnp.ndarray a, str name) except -1:
    """The last dimension."""
    cdef int64_t dim = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1)
    if dim < _MIN_DIM or dim > _MAX_DIM or dim % 8:
        raise ValueError(f"{name} must have a head_dim (its last dimension) of {_MIN_DIM} to "
                         f"{_MAX_DIM} in steps of 8, got {shape_text(a)}")
    return <int>dim


cdef cnp.ndarray _typed(cnp.ndarray a, str name, cnp.ndarray other, object kv_dtype):
    """One of the caches, float8 where it came as uint8: kv_dtype says which, or the other cache."""
    if kv_dtype is not None:
        kind = _dtypes.resolve(kv_dtype, "kv_dtype")
        if kind.name not in _dtypes.EIGHT_BIT[:2]:
            raise ValueError(f"kv_dtype must be {_FLOAT8}, the types that may come as uint8, got "
                             f"{kind.name}")
    elif other is not None and dtype_of(other) in (RF_E4M3FN, RF_E4M3FNUZ):
        kind = other.dtype
    else:
        return a
    if a is not None and cnp.PyArray_TYPE(a) == cnp.NPY_UBYTE:
        return a.view(kind)
    if kv_dtype is not None and a is not None and a.dtype != kind:
        raise ValueError(f"{name} must be {kind.name}, as kv_dtype says, or uint8, got {a.dtype}")
    return a


cdef int _cache_dtypes(cnp.ndarray k, cnp.ndarray v, cnp.ndarray new, str new_name) except -1:
    """The type of the caches: that of the new vectors, or an 8-bit one; v may be None."""
    cdef int code = dtype_of(k)
    if cnp.PyArray_TYPE(k) == cnp.PyArray_TYPE(new) or code >= RF_NUM_WIDE_DTYPES:
        behaved(k, "k_cache")
    else:
        raise ValueError(f"k_cache must have the dtype of {new_name}, {new.dtype}, or be "
                         f"{_EIGHT_BIT}, got {k.dtype}"
                         + ("; kv_dtype says which float8 uint8 holds"
                            if cnp.PyArray_TYPE(k) == cnp.NPY_UBYTE else ""))
    if v is None:
        return code
    if code >= RF_NUM_WIDE_DTYPES:
        same_dtype(v, "v_cache", k, "k_cache")
    else:
        same_dtype(v, "v_cache", new, new_name)
    return code


cdef int _pools(cnp.ndarray k, cnp.ndarray v, bint nhd) except -1:
    """What k_cache and v_cache, which may be None, have in common."""
    cdef int i
    if cnp.PyArray_NDIM(k) != 4:
        bad_shape(k, "k_cache", _pool_shape(nhd))
    if v is not None:
        if cnp.PyArray_NDIM(v) != 4:
            bad_shape(v, "v_cache", _pool_shape(nhd))
        for i in range(3):
            if cnp.PyArray_DIM(k, i) != cnp.PyArray_DIM(v, i):
                raise ValueError(f"v_cache must have the blocks, heads and block size of k_cache, "
                                 f"{shape_text(k)}, got {shape_text(v)}")
    if cnp.PyArray_DIM(k, 1) < 1 or cnp.PyArray_DIM(k, 2) < 1:
        raise ValueError(f"k_cache must have at least one head and one token a block, "
                         f"{_pool_shape(nhd)}, got {shape_text(k)}")
    if cnp.PyArray_DIM(k, 0) > MAX_COUNT or cnp.PyArray_DIM(k, 2) > MAX_COUNT or \
            cnp.PyArray_DIM(k, 1) > MAX_COUNT:
        raise ValueError(f"k_cache must have at most 2**31 - 1 blocks, got {shape_text(k)}")
    return 0


cdef object as_scale(object scale, str name):
    """None, a float, or an array."""
    if scale is None or isinstance(scale, cnp.ndarray) and cnp.PyArray_NDIM(scale) > 0:
        return scale
    if hasattr(scale, "__dlpack__") and not isinstance(scale, cnp.ndarray):
        return as_array(scale, name)
    cdef double value = as_number(scale, name, _SCALE_FORMS)
    if not 2.0**-126 <= value < 3.4028235677973366e38:
        raise ValueError(f"{name} must be positive and finite in float32, got {scale}")
    return value


cdef int _scales(rf_scales *s, object scale, str name, cnp.ndarray k, int dtype,
                 bint nhd) except -1:
    """Scales of one of the caches, whose common shape k has; the struct is zero where unused."""
    cdef cnp.ndarray a
    cdef int64_t heads, tokens
    s.data = NULL
    s.block_stride = s.head_stride = s.token_stride = 0
    s.value = 1.0
    s.per_token = 0
    if dtype < RF_NUM_WIDE_DTYPES:
        if scale is not None:
            raise ValueError(f"{name} must be None for a cache of {k.dtype}: only 8-bit elements "
                             f"have scales")
        return 0
    if scale is None:
        raise ValueError(f"{name} must be given for a cache of {k.dtype}: {_SCALE_FORMS}")
    if isinstance(scale, float):
        s.value = <float>(<double>scale)
        return 0
    a = scale
    heads = cnp.PyArray_DIM(k, 2 if nhd else 1)
    tokens = cnp.PyArray_DIM(k, 1 if nhd else 2)
    if cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT:
        raise ValueError(f"{name} must be float32, got {a.dtype}")
    behaved(a, name)
    s.data = <float *>cnp.PyArray_DATA(a)
    if cnp.PyArray_NDIM(a) == 1 and cnp.PyArray_DIM(a, 0) == heads:
        s.head_stride = stride_of(a, 0)
    elif shape3(a, cnp.PyArray_DIM(k, 0), heads, tokens):
        s.block_stride = stride_of(a, 0)
        s.head_stride = stride_of(a, 1)
        s.token_stride = stride_of(a, 2)
        s.per_token = 1
    else:
        raise ValueError(f"{name} must have shape [{heads}] or [{cnp.PyArray_DIM(k, 0)}, {heads}, "
                         f"{tokens}] as k_cache has, got {shape_text(a)}")
    return 0


cdef bint _latent(const rf_paged *k, const rf_paged *v, int64_t vector_bytes) noexcept:
    """Whether values are a part of the keys' vectors."""
    return (k.block_stride == v.block_stride and k.head_stride == v.head_stride
            and k.token_stride == v.token_stride and v.data >= k.data
            and <char *>v.data - <char *>k.data < vector_bytes)


# ---------------------------------------------------------------- attention

cdef int read_attention(rf_attention_params *p, cnp.ndarray query, cnp.ndarray k, cnp.ndarray v,
                        object k_scale, object v_scale, bint nhd, object kv_dtype) except -1:
    """Query and caches. Leaves `p.scale` 0 where it has no default: values are a part of keys."""
    if cnp.PyArray_NDIM(query) != 3:
        bad_shape(query, "query", "[num_tokens, num_heads, head_dim]")
    p.dtype = wide_dtype(query, "query")
    k, v = _typed(k, "k_cache", v, kv_dtype), _typed(v, "v_cache", k, kv_dtype)
    p.kv_dtype = _cache_dtypes(k, v, query, "query")
    _pools(k, v, nhd)
    p.num_tokens = cnp.PyArray_DIM(query, 0)
    if p.num_tokens > MAX_COUNT or cnp.PyArray_DIM(query, 1) > MAX_COUNT:
        raise ValueError(f"query must have less than 2**31 tokens and heads, got "
                         f"{shape_text(query)}")
    p.num_heads = <int32_t>cnp.PyArray_DIM(query, 1)
    p.num_blocks = cnp.PyArray_DIM(k, 0)
    p.num_kv_heads = <int32_t>cnp.PyArray_DIM(k, 2 if nhd else 1)
    p.block_size = <int32_t>cnp.PyArray_DIM(k, 1 if nhd else 2)
    p.head_dim = _head_dim(query, "query")
    p.v_head_dim = _head_dim(v, "v_cache")
    if cnp.PyArray_DIM(k, 3) != p.head_dim:
        raise ValueError(f"k_cache must have the head_dim of query, {p.head_dim}, got "
                         f"{shape_text(k)}")
    if p.num_heads < 1 or p.num_heads % p.num_kv_heads:
        raise ValueError(f"query must have a multiple of the {p.num_kv_heads} heads of k_cache, "
                         f"got {p.num_heads} heads")
    as_vectors(query, "query", &p.query)
    as_pool(k, "k_cache", nhd, &p.k)
    as_pool(v, "v_cache", nhd, &p.v)
    cdef bint latent = _latent(&p.k, &p.v, p.head_dim * cnp.PyArray_ITEMSIZE(k))
    _scales(&p.k_scale, k_scale, "k_scale", k, p.kv_dtype, nhd)
    if latent and v_scale is None:  # the same elements
        p.v_scale = p.k_scale
    else:
        _scales(&p.v_scale, v_scale, "v_scale", k, p.kv_dtype, nhd)
    p.scale = 0.0 if latent else <float>(1.0 / sqrt(<double>p.head_dim))
    p.reserved = 0
    return 0


cdef int read_batch(rf_attention_params *p, cnp.ndarray table, cnp.ndarray lens, cnp.ndarray cu,
                    cnp.ndarray rows) except -1:
    """Which blocks and query tokens belong to which sequence; cu and rows may be None."""
    if cnp.PyArray_NDIM(table) != 2:
        bad_shape(table, "block_table", "[num_rows, max_blocks]")
    if cnp.PyArray_TYPE(table) != cnp.NPY_INT32:
        raise ValueError(f"block_table must be int32, got {table.dtype}")
    behaved(table, "block_table")
    contiguous_rows(table, "block_table")
    p.block_table = <const int32_t *>cnp.PyArray_DATA(table)
    p.table_stride = stride_of(table, 0)
    p.num_rows = cnp.PyArray_DIM(table, 0)
    p.table_width = cnp.PyArray_DIM(table, 1)
    p.seq_lens = as_int32s(lens, "seq_lens", "[num_seqs]", -1)
    if cnp.PyArray_DIM(lens, 0) > MAX_COUNT:
        raise ValueError(f"seq_lens must have less than 2**31 entries, got {shape_text(lens)}")
    p.num_seqs = <int32_t>cnp.PyArray_DIM(lens, 0)
    p.cu_seqlens_q = NULL
    if cu is not None:
        p.cu_seqlens_q = as_int32s(cu, "cu_seqlens_q", "[num_seqs + 1]", <int64_t>p.num_seqs + 1)
    elif p.num_tokens != p.num_seqs:
        raise ValueError(f"cu_seqlens_q is needed when query and seq_lens differ in length, got "
                         f"{p.num_tokens} tokens and {p.num_seqs} sequences")
    p.rows = NULL
    if rows is not None:
        p.rows = as_int32s(rows, "rows", "[num_seqs]", p.num_seqs)
    elif p.num_rows < p.num_seqs:
        raise ValueError(f"block_table must have a row for each of the {p.num_seqs} sequences, got "
                         f"{shape_text(table)}")
    return 0


cdef int32_t _window_side(object side, object window_size) except -2:
    try:
        value = _index(side)
    except TypeError:
        raise TypeError(f"window_size must be two integers, got {window_size!r}") from None
    if value < -1:
        raise ValueError(f"window_size must be two numbers of tokens, or -1 for no bound, got "
                         f"{window_size!r}")
    return <int32_t>min(value, INT32_MAX)  # nothing is farther away


cdef int read_logits(rf_attention_params *p, object scale, object causal, object window_size,
                     object softcap, cnp.ndarray alibi_slopes, cnp.ndarray sinks) except -1:
    """What happens to a logit; needs query and caches to be read."""
    p.causal = as_flag(causal, "causal")
    if scale is not None:
        p.scale = <float>as_number(scale, "scale", "a float or None")
        if not (-INFINITY < p.scale < INFINITY):
            raise ValueError(f"scale must be finite, got {scale}")
    elif p.scale == 0.0:
        raise ValueError("scale must be given when v_cache is a part of k_cache: the head_dim of "
                         "the model, which it comes from, is not that of a latent cache")
    p.window_left = p.window_right = -1
    if window_size is not _NO_WINDOW:
        if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
            raise TypeError(f"window_size must be two integers, got {window_size!r}")
        p.window_left = _window_side(window_size[0], window_size)
        p.window_right = _window_side(window_size[1], window_size)
    p.softcap = <float>as_number(softcap, "softcap", "a float")
    if not 0.0 <= p.softcap < INFINITY or (p.softcap == 0.0 and softcap != 0):
        raise ValueError(f"softcap must be 0, or positive and finite in float32, got {softcap}")
    p.alibi_slopes = p.sinks = NULL
    if alibi_slopes is not None:
        p.alibi_slopes = as_floats(alibi_slopes, "alibi_slopes", "[num_heads]", p.num_heads)
    if sinks is not None:
        p.sinks = as_floats(sinks, "sinks", "[num_heads]", p.num_heads)
    return 0


cdef int64_t read_mask(rf_attention_params *p, cnp.ndarray mask) except -2:
    """The mask, which may be None; gives its width."""
    p.mask = NULL
    p.mask_stride = 0
    if mask is None:
        return -1
    if cnp.PyArray_NDIM(mask) != 2 or cnp.PyArray_DIM(mask, 0) != p.num_tokens:
        raise ValueError(f"mask must have shape [{p.num_tokens}, max_seqlen_q], one row a token of "
                         f"query, got {shape_text(mask)}")
    if cnp.PyArray_TYPE(mask) not in (cnp.NPY_UINT8, cnp.NPY_BOOL):
        raise ValueError(f"mask must be uint8 or bool, got {mask.dtype}")
    contiguous_rows(mask, "mask")
    p.mask = <const uint8_t *>cnp.PyArray_DATA(mask)
    p.mask_stride = stride_of(mask, 0)
    return cnp.PyArray_DIM(mask, 1)


# ---------------------------------------------------------------- the others

cdef int read_write(rf_write_params *p, cnp.ndarray key, cnp.ndarray value, cnp.ndarray k,
                    cnp.ndarray v, cnp.ndarray slots, object k_scale, object v_scale,
                    bint nhd, object kv_dtype) except -1:
    """All of a write; value and v are None for a latent cache."""
    if (value is None) != (v is None):
        one, other = ("value", "v_cache") if value is None else ("v_cache", "value")
        raise ValueError(f"{one} must be given with {other}; both are None for a latent cache")
    if cnp.PyArray_NDIM(key) != 3:
        bad_shape(key, "key", "[num_tokens, num_kv_heads, head_dim]")
    if value is not None and cnp.PyArray_NDIM(value) != 3:
        bad_shape(value, "value", "[num_tokens, num_kv_heads, v_head_dim]")
    p.dtype = wide_dtype(key, "key")
    if value is not None:
        same_dtype(value, "value", key, "key")
    k, v = _typed(k, "k_cache", v, kv_dtype), _typed(v, "v_cache", k, kv_dtype)
    p.kv_dtype = _cache_dtypes(k, v, key, "key")
    _pools(k, v, nhd)
    p.num_tokens = cnp.PyArray_DIM(key, 0)
    p.num_blocks = cnp.PyArray_DIM(k, 0)
    p.num_kv_heads = <int32_t>cnp.PyArray_DIM(k, 2 if nhd else 1)
    p.block_size = <int32_t>cnp.PyArray_DIM(k, 1 if nhd else 2)
    p.head_dim = _head_dim(k, "k_cache")
    if not shape3(key, p.num_tokens, p.num_kv_heads, p.head_dim):
        raise ValueError(f"key must have shape [num_tokens, {p.num_kv_heads}, {p.head_dim}] as "
                         f"k_cache has, got {shape_text(key)}")
    as_vectors(key, "key", &p.key)
    as_pool(k, "k_cache", nhd, &p.k)
    _scales(&p.k_scale, k_scale, "k_scale", k, p.kv_dtype, nhd)
    if v is None:
        if v_scale is not None:
            raise ValueError("v_scale must be None when v_cache is")
        p.v_head_dim = 0
        p.v.data = p.value.data = NULL
        p.v_scale = p.k_scale
    else:
        p.v_head_dim = _head_dim(v, "v_cache")
        if not shape3(value, p.num_tokens, p.num_kv_heads, p.v_head_dim):
            raise ValueError(f"value must have shape [{p.num_tokens}, {p.num_kv_heads}, "
                             f"{p.v_head_dim}] as key and v_cache have, got {shape_text(value)}")
        as_vectors(value, "value", &p.value)
        as_pool(v, "v_cache", nhd, &p.v)
        _scales(&p.v_scale, v_scale, "v_scale", k, p.kv_dtype, nhd)
        writable(v, "v_cache")
        if p.v_scale.per_token:
            writable(v_scale, "v_scale")
    writable(k, "k_cache")
    if p.k_scale.per_token:
        writable(k_scale, "k_scale")
    if cnp.PyArray_NDIM(slots) != 1 or cnp.PyArray_DIM(slots, 0) != p.num_tokens:
        raise ValueError(f"slot_mapping must have shape [{p.num_tokens}], one slot a token of key, "
                         f"got {shape_text(slots)}")
    if cnp.PyArray_TYPE(slots) != cnp.NPY_INT64:
        raise ValueError(f"slot_mapping must be int64, got {slots.dtype}")
    behaved(slots, "slot_mapping")
    contiguous_rows(slots, "slot_mapping")
    p.slot_mapping = <const int64_t *>cnp.PyArray_DATA(slots)
    return 0


cdef const float *_lse(cnp.ndarray a, str name, const rf_merge_params *p) except? NULL:
    if (cnp.PyArray_NDIM(a) != 2 or cnp.PyArray_DIM(a, 0) != p.num_tokens
            or cnp.PyArray_DIM(a, 1) != p.num_heads):
        bad_shape(a, name, f"[{p.num_tokens}, {p.num_heads}] as out_a has")
    if cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT:
        raise ValueError(f"{name} must be float32, got {a.dtype}")
    if not cnp.PyArray_ISCARRAY_RO(a):
        raise ValueError(f"{name} must be C-contiguous, aligned and in native byte order")
    return <const float *>cnp.PyArray_DATA(a)


cdef int _part(cnp.ndarray a, str name, cnp.ndarray like) except -1:
    """A tensor of the shape and type of out_a."""
    if not shape3(a, cnp.PyArray_DIM(like, 0), cnp.PyArray_DIM(like, 1), cnp.PyArray_DIM(like, 2)):
        bad_shape(a, name, f"{shape_text(like)} as out_a has")
    same_dtype(a, name, like, "out_a")
    return 0


cdef bint _same_place(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two arrays of one shape are the same elements in the same order."""
    cdef int i
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if stride_of(a, i) != stride_of(b, i):
            return False
    return True


cdef int read_merge(rf_merge_params *p, cnp.ndarray out_a, cnp.ndarray lse_a, cnp.ndarray out_b,
                    cnp.ndarray lse_b) except -1:
    """The parts of a merge."""
    if cnp.PyArray_NDIM(out_a) != 3:
        bad_shape(out_a, "out_a", "[num_tokens, num_heads, v_head_dim]")
    p.dtype = wide_dtype(out_a, "out_a")
    p.num_tokens = cnp.PyArray_DIM(out_a, 0)
    if p.num_tokens > MAX_COUNT or cnp.PyArray_DIM(out_a, 1) > MAX_COUNT:
        raise ValueError(f"out_a must have less than 2**31 tokens and heads, got "
                         f"{shape_text(out_a)}")
    p.num_heads = <int32_t>cnp.PyArray_DIM(out_a, 1)
    p.head_dim = _head_dim(out_a, "out_a")
    p.reserved = 0
    as_vectors(out_a, "out_a", &p.a)
    _part(out_b, "out_b", out_a)
    as_vectors(out_b, "out_b", &p.b)
    p.lse_a = _lse(lse_a, "lse_a", p)
    p.lse_b = _lse(lse_b, "lse_b", p)
    return 0


cdef int read_merged(rf_merge_params *p, cnp.ndarray out_a, cnp.ndarray lse_a, cnp.ndarray out_b,
                     cnp.ndarray lse_b, cnp.ndarray out, cnp.ndarray lse) except -1:
    """Its results, which may be in place of either part."""
    _part(out, "out", out_a)
    as_vectors(out, "out", &p.out)
    writable(out, "out")
    p.lse = <float *>_lse(lse, "lse", p)
    writable(lse, "lse")
    if not _same_place(out, out_a):
        apart(out, "out", out_a, "out_a")
    if not _same_place(out, out_b):
        apart(out, "out", out_b, "out_b")
    if not _same_place(lse, lse_a):
        apart(lse, "lse", lse_a, "lse_a")
    if not _same_place(lse, lse_b):
        apart(lse, "lse", lse_b, "lse_b")
    apart(out, "out", lse_a, "lse_a")
    apart(out, "out", lse_b, "lse_b")
    apart(lse, "lse", out_a, "out_a")
    apart(lse, "lse", out_b, "out_b")
    apart(lse, "lse", out, "out")
    return 0


cdef int read_blocks(rf_copy_params *p, cnp.ndarray a, str name) except -1:
    """[num_blocks, ...] as a block stride, two inner dimensions and contiguous bytes."""
    cdef int n = cnp.PyArray_NDIM(a), axis
    cdef int64_t inner = cnp.PyArray_ITEMSIZE(a)
    if n < 1:
        bad_shape(a, name, "[num_blocks, ...]")
    axis = n - 1
    while axis >= 1 and (cnp.PyArray_STRIDE(a, axis) == inner or cnp.PyArray_DIM(a, axis) == 1):
        inner *= cnp.PyArray_DIM(a, axis)
        axis -= 1
    if axis > 2:
        raise ValueError(f"{name} must have blocks of at most two strided dimensions, got strides "
                         f"{(<object>a).strides}")
    p.data = <char *>cnp.PyArray_DATA(a)
    p.block_stride = cnp.PyArray_STRIDE(a, 0)
    p.outer_stride = cnp.PyArray_STRIDE(a, 1) if axis >= 1 else 0
    p.outer = cnp.PyArray_DIM(a, 1) if axis >= 1 else 1
    p.middle_stride = cnp.PyArray_STRIDE(a, 2) if axis >= 2 else 0
    p.middle = cnp.PyArray_DIM(a, 2) if axis >= 2 else 1
    p.inner = inner
    return 0
