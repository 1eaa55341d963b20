# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Arrays of NumPy and of other libraries as the kernels see them, and what is asked of each.

Nothing here reads an element: a NumPy array is a shape, strides, a type and an address.
"""

cimport numpy as cnp
from cpython.bool cimport PyBool_Check
from cpython.exc cimport PyErr_Clear
from cpython.float cimport PyFloat_CheckExact
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memset, strncpy

from rocmforge.ops._params cimport (
    RF_BF16, RF_E4M3FN, RF_E4M3FNUZ, RF_F16, RF_F32, RF_I8, RF_NUM_WIDE_DTYPES, rf_paged, rf_rows)

import ml_dtypes
import numpy as np

cnp.import_array()

cdef extern from "rf/dlpack.h" nogil:
    enum: RF_DL_CPU
    enum: RF_DL_CUDA_HOST
    enum: RF_DL_ROCM
    enum: RF_DL_ROCM_HOST
    enum: RF_DL_INT
    enum: RF_DL_UINT
    enum: RF_DL_FLOAT
    enum: RF_DL_BFLOAT
    enum: RF_DL_BOOL
    enum: RF_DL_E4M3FN
    enum: RF_DL_E4M3FNUZ
    uint64_t RF_DL_READ_ONLY

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(type subtype, cnp.dtype descr, int nd, const cnp.npy_intp *dims,
                                const cnp.npy_intp *strides, void *data, int flags, object obj)

# NumPy's types by enum rf_dtype. A type of ml_dtypes has another number in each process.
cdef tuple _DTYPES = tuple([np.dtype(kind) for kind in (
    np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz,
    np.int8)])
cdef int _F16_NUM = np.dtype(np.float16).num
cdef int _BF16_NUM = np.dtype(ml_dtypes.bfloat16).num
cdef int _FN_NUM = np.dtype(ml_dtypes.float8_e4m3fn).num
cdef int _FNUZ_NUM = np.dtype(ml_dtypes.float8_e4m3fnuz).num

cdef object _shares_memory = np.shares_memory
cdef object _index = __import__("operator").index


# ---------------------------------------------------------------- arrays in and out

# NumPy's types by DLPack's code and bits; what is not here, no argument can have.
cdef dict _OF_DLPACK = {code << 8 | bits: np.dtype(kind) for code, bits, kind in (
    (RF_DL_FLOAT, 32, np.float32), (RF_DL_FLOAT, 16, np.float16),
    (RF_DL_BFLOAT, 16, ml_dtypes.bfloat16), (RF_DL_E4M3FN, 8, ml_dtypes.float8_e4m3fn),
    (RF_DL_E4M3FNUZ, 8, ml_dtypes.float8_e4m3fnuz), (RF_DL_INT, 8, np.int8),
    (RF_DL_INT, 32, np.int32), (RF_DL_INT, 64, np.int64), (RF_DL_UINT, 8, np.uint8),
    (RF_DL_BOOL, 8, np.uint8))}


cdef cnp.dtype _dlpack_dtype(const rf_dl_tensor *t, str name):
    cdef object descr = _OF_DLPACK.get(<int>t.code << 8 | t.bits)
    if descr is None or t.lanes != 1:
        raise ValueError(f"{name} has a type that no argument can have: DLPack type code {t.code} "
                         f"with {t.bits} bits and {t.lanes} lanes")
    return descr


# The tables of functions of the types that have one, as addresses, by type. There are few such
# types, and they live as long as their library.
cdef dict _exchanges = {}


cdef const rf_dl_exchange *exchange_of(object x) except? NULL:
    """The functions of the library that x is of; NULL: it offers none that we know.

    They take a tenth of a microsecond, `__dlpack__` and `__dlpack_device__`, which are Python in
    PyTorch, seven. Only those of x's very type count: a subclass may have no memory of its own
    (PyTorch's fake tensors), which `__dlpack__` would say and these functions do not.
    """
    cdef const rf_dl_exchange *api
    kind = type(x)
    cdef object known = _exchanges.get(kind)
    if known is not None:
        return <const rf_dl_exchange *><uintptr_t>known
    capsule = kind.__dict__.get("__dlpack_c_exchange_api__")
    if capsule is None or not PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        return NULL
    api = <const rf_dl_exchange *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    while api != NULL and api.major > 1:
        api = api.previous
    if api == NULL or api.major != 1 or api.describe == NULL:
        return NULL
    _exchanges[kind] = <uintptr_t>api
    return api


cdef int _must_be_host(int kind, object x, str name) except -1:
    if kind not in (RF_DL_CPU, RF_DL_CUDA_HOST, RF_DL_ROCM_HOST):
        raise ValueError(f"{name} must be in host memory for the CPU operations, got a "
                         f"{type(x).__name__} on DLPack device type {kind}")
    return 0


cdef cnp.ndarray _import_dlpack(object x, str name):
    """An array of another library as a NumPy array over the same memory."""
    _must_be_host(int(x.__dlpack_device__()[0]), x, name)
    try:
        capsule = x.__dlpack__(max_version=(1, 0))
    except TypeError:  # a producer from before DLPack 1.0
        capsule = x.__dlpack__()
    return dlpack_array(capsule, x, name)


cdef class _Taken:
    """What a producer gave, which is its own again with the last array over it."""
    cdef rf_dl_managed *plain
    cdef rf_dl_versioned *versioned

    def __dealloc__(self):
        if self.plain != NULL and self.plain.deleter != NULL:
            self.plain.deleter(self.plain)
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)


cdef cnp.ndarray dlpack_array(object capsule, object producer, str name):
    """A NumPy array over the memory of a DLPack capsule, wherever that is."""
    cdef rf_dl_tensor *t
    cdef _Taken taken = _Taken.__new__(_Taken)
    cdef int flags = cnp.NPY_ARRAY_WRITEABLE
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        taken.versioned = <rf_dl_versioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")
        PyCapsule_SetName(capsule, "used_dltensor_versioned")
        if taken.versioned.major > 1:  # only the version and the deleter are where we look
            raise ValueError(f"{name} came by version {taken.versioned.major} of DLPack, 1 was "
                             "asked for")
        if taken.versioned.flags & RF_DL_READ_ONLY:
            flags = 0
        t = &taken.versioned.tensor
    elif PyCapsule_IsValid(capsule, "dltensor"):
        taken.plain = <rf_dl_managed *>PyCapsule_GetPointer(capsule, "dltensor")
        PyCapsule_SetName(capsule, "used_dltensor")
        t = &taken.plain.tensor
        # Such a capsule has no flags. Only JAX gives one of memory that must not be written to.
        if type(producer).__module__.partition(".")[0] in ("jax", "jaxlib"):
            flags = 0
    else:
        raise TypeError(f"{name} must give a DLPack capsule that nobody has used, got "
                        f"{type(capsule).__name__}")
    return tensor_array(t, name, flags, taken)


cdef cnp.ndarray tensor_array(const rf_dl_tensor *t, str name, int flags, object base):
    """A NumPy array over a DLPack tensor, wherever that is; `base` keeps its memory alive."""
    cdef cnp.dtype descr = _dlpack_dtype(t, name)
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
    cnp.set_array_base(a, base)
    return a


cdef int dlpack_type(cnp.dtype descr, rf_dl_tensor *t) except -1:
    """Sets the type of a DLPack tensor to one of NumPy's."""
    cdef int dtype = _code_of(descr.type_num)
    t.lanes = 1
    t.bits = <uint8_t>(8 * descr.itemsize)
    if dtype == RF_BF16:
        t.code = RF_DL_BFLOAT
    elif dtype == RF_E4M3FN:
        t.code = RF_DL_E4M3FN
    elif dtype == RF_E4M3FNUZ:
        t.code = RF_DL_E4M3FNUZ
    elif descr.kind == c"f":
        t.code = RF_DL_FLOAT
    elif descr.kind == c"i":
        t.code = RF_DL_INT
    elif descr.kind == c"u":
        t.code = RF_DL_UINT
    elif descr.kind == c"b":
        t.code = RF_DL_BOOL
    else:
        raise ValueError(f"DLPack has no type for {descr}")
    return 0


cdef cnp.ndarray array_at(void *data, object shape, cnp.dtype descr, object base):
    """A C-contiguous array at an address that `base` keeps alive; nothing is read there."""
    cdef cnp.npy_intp dims[32]
    cdef int i, n = len(shape)
    for i in range(n):
        dims[i] = shape[i]
    Py_INCREF(descr)  # the constructor steals it
    a = PyArray_NewFromDescr(cnp.ndarray, descr, n, dims, NULL, data, cnp.NPY_ARRAY_CARRAY, None)
    cnp.set_array_base(a, base)
    return a


cdef cnp.ndarray as_array(object x, str name):
    cdef const rf_dl_exchange *api
    cdef rf_dl_tensor t
    if isinstance(x, cnp.ndarray):
        return <cnp.ndarray>x
    api = exchange_of(x)
    if api != NULL:
        api.describe(<void *>x, &t)
        if t.device_type != RF_DL_CPU:
            _must_be_host(t.device_type, x, name)
        return tensor_array(&t, name, cnp.NPY_ARRAY_WRITEABLE, x)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _import_dlpack(x, name)
    raise TypeError(f"{name} must be a NumPy array or an object with __dlpack__, got "
                    f"{type(x).__name__}")


cdef struct _Refusal:
    char text[200]


cdef void _refuse(void *context, const char *kind, const char *message) noexcept with gil:
    cdef _Refusal *refusal = <_Refusal *>context
    strncpy(refusal.text, message, sizeof(refusal.text) - 1)


cdef object new_result(object like, cnp.dtype descr, int ndim, const cnp.npy_intp *dims,
                       int32_t device_type, int32_t device_id):
    """A C-contiguous array of the library that `like` is of; None: it offers no way to make one.

    Its memory is of the library's own allocator, on the given device; its elements are not set.
    """
    cdef const rf_dl_exchange *api = NULL
    cdef rf_dl_tensor wanted
    cdef rf_dl_versioned *made = NULL
    cdef int64_t shape[8]
    cdef PyObject *result = NULL
    cdef _Refusal refusal
    cdef int i
    if not isinstance(like, cnp.ndarray):
        api = exchange_of(like)
    if api == NULL:
        return None
    for i in range(ndim):
        shape[i] = dims[i]
    wanted.data = NULL
    wanted.device_type, wanted.device_id = device_type, device_id
    wanted.ndim, wanted.shape, wanted.strides, wanted.byte_offset = ndim, shape, NULL, 0
    dlpack_type(descr, &wanted)
    memset(&refusal, 0, sizeof(refusal))
    if api.allocate(&wanted, &made, &refusal, _refuse) != 0:
        PyErr_Clear()
        raise MemoryError(f"{type(like).__name__} of {descr} {[dims[i] for i in range(ndim)]}: "
                          f"{(<bytes>refusal.text).decode('utf-8', 'replace')}")
    api.import_object(made, <void **>&result)
    owned = <object>result
    Py_DECREF(owned)  # the reference that import_object gave
    return owned


cdef cnp.dtype dtype_named(int dtype):
    """NumPy's dtype of an enum rf_dtype."""
    return _DTYPES[dtype]


cdef tuple host_result(object like, cnp.dtype descr, int ndim, const cnp.npy_intp *dims):
    """A new array of the library that `like` is of, or else NumPy's; and the same as NumPy sees it.

    C-contiguous; its elements are not set.
    """
    made = new_result(like, descr, ndim, dims, RF_DL_CPU, 0)
    if made is not None:
        return made, as_array(made, "result")
    Py_INCREF(descr)  # the constructor steals it
    made = PyArray_NewFromDescr(cnp.ndarray, descr, ndim, dims, NULL, NULL, 0, None)
    return made, made


cdef object like_library(cnp.ndarray a, object like):
    """A copy of a NumPy array in host memory as an array of the library that `like` is of."""
    made = new_result(like, a.dtype, cnp.PyArray_NDIM(a), cnp.PyArray_DIMS(a), RF_DL_CPU, 0)
    if made is None:
        return a
    as_array(made, "result")[...] = a
    return made


# ---------------------------------------------------------------- scalars

cdef bint as_flag(object x, str name) except -1:
    if not PyBool_Check(x) and not isinstance(x, np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(x).__name__}")
    return True if x else False


cdef double as_number(object x, str name, str what) except? -1.0:
    """Anything that Python's float takes but text; what: 'a float', for the message."""
    if PyFloat_CheckExact(x):
        return <double>x
    if isinstance(x, (str, bytes, bytearray)):
        raise TypeError(f"{name} must be {what}, got {type(x).__name__}")
    try:
        return float(x)
    except TypeError:
        raise TypeError(f"{name} must be {what}, got {type(x).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a number beyond every float") from None


cdef int64_t as_bound(object x, str name, int64_t low) except -2:
    """A host integer from `low` up, or None, as -1."""
    if x is None:
        return -1
    cdef int64_t i
    try:
        value = _index(x)
    except TypeError:
        raise TypeError(f"{name} must be an integer or None, got {type(x).__name__}") from None
    if value < low:
        must = "must not be negative" if low == 0 else f"must be at least {low}"
        raise ValueError(f"{name} {must}, got {value}")
    i = min(value, 2**63 - 1)  # nothing is longer
    return i


cdef int device_kind(object x) except -2:
    """DLPack's type of the device that an array is on; -1: it does not say."""
    cdef const rf_dl_exchange *api = exchange_of(x)
    cdef rf_dl_tensor t
    if api != NULL:
        api.describe(<void *>x, &t)
        return t.device_type
    if not hasattr(x, "__dlpack_device__"):
        return -1
    return int(x.__dlpack_device__()[0])


cdef object hip_operations(object x):
    """The module that computes on arrays of HIP devices, if x is one; else None."""
    if isinstance(x, cnp.ndarray) or device_kind(x) != RF_DL_ROCM:
        return None
    from rocmforge.hip import _ops
    return _ops


cdef int host_only(object stream) except -1:
    if stream is not None:
        raise ValueError(f"stream must be None for arrays in host memory, got "
                         f"{type(stream).__name__}")
    return 0


cdef bint is_nhd(object layout) except -1:
    if layout == "HND":
        return False
    if layout == "NHD":
        return True
    if not isinstance(layout, str):
        raise TypeError(f"layout must be 'HND' or 'NHD', got {type(layout).__name__}")
    raise ValueError(f"layout must be 'HND' or 'NHD', got {layout!r}")


# ---------------------------------------------------------------- what an array must be

cdef str shape_text(cnp.ndarray a):
    return "[" + ", ".join([str(n) for n in (<object>a).shape]) + "]"


cdef int bad_shape(cnp.ndarray a, str name, str what) except -1:
    raise ValueError(f"{name} must have shape {what}, got {shape_text(a)}")


cdef int dtype_of(cnp.ndarray a) noexcept:
    """The enum rf_dtype of an array's elements, or -1."""
    return _code_of(cnp.PyArray_TYPE(a))


cdef int _code_of(int num) noexcept:
    if num == cnp.NPY_FLOAT:
        return RF_F32
    if num == _F16_NUM:
        return RF_F16
    if num == _BF16_NUM:
        return RF_BF16
    if num == _FN_NUM:
        return RF_E4M3FN
    if num == _FNUZ_NUM:
        return RF_E4M3FNUZ
    if num == cnp.NPY_BYTE:
        return RF_I8
    return -1


cdef int wide_dtype(cnp.ndarray a, str name) except -1:
    """The type of new vectors; also that its elements are aligned and native."""
    cdef int code = dtype_of(a)
    if code < 0 or code >= RF_NUM_WIDE_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {a.dtype}")
    behaved(a, name)
    return code


cdef int behaved(cnp.ndarray a, str name) except -1:
    if not (cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISNOTSWAPPED(a)):
        raise ValueError(f"{name} must be aligned and in native byte order")
    return 0


cdef int same_dtype(cnp.ndarray a, str name, cnp.ndarray like, str other) except -1:
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(like):
        raise ValueError(f"{name} must have the dtype of {other}, {like.dtype}, got {a.dtype}")
    behaved(a, name)
    return 0


cdef int writable(cnp.ndarray a, str name) except -1:
    if not cnp.PyArray_ISWRITEABLE(a):
        imported = isinstance((<object>a).base, _Taken)
        origin = " of another library (JAX's always are)" if imported else ""
        raise ValueError(f"{name} must be writable, got a read-only array{origin}")
    return 0


cdef int contiguous_rows(cnp.ndarray a, str name) except -1:
    """The last dimension must be contiguous."""
    cdef int last = cnp.PyArray_NDIM(a) - 1
    cdef Py_ssize_t item = cnp.PyArray_ITEMSIZE(a)
    if (cnp.PyArray_DIM(a, last) > 1 and cnp.PyArray_STRIDE(a, last) != item
            and cnp.PyArray_SIZE(a)):
        raise ValueError(f"{name} must be contiguous in its last dimension, got a stride of "
                         f"{cnp.PyArray_STRIDE(a, last)} bytes for elements of {item}")
    return 0


cdef int shape3(cnp.ndarray a, int64_t n0, int64_t n1, int64_t n2) noexcept:
    return (cnp.PyArray_NDIM(a) == 3 and cnp.PyArray_DIM(a, 0) == n0
            and cnp.PyArray_DIM(a, 1) == n1 and cnp.PyArray_DIM(a, 2) == n2)


cdef struct Extent:
    size_t low
    size_t high


cdef Extent extent_of(cnp.ndarray a) noexcept:
    """First byte and one past the last that the array can touch."""
    cdef Extent e
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


cdef int apart(cnp.ndarray a, str name, cnp.ndarray b, str other) except -1:
    """Two arrays must share no byte; either may be None."""
    if a is None or b is None:
        return 0
    cdef Extent x = extent_of(a), y = extent_of(b)
    if x.low >= y.high or y.low >= x.high:
        return 0
    # Extents may interleave without sharing a byte (one fused buffer): the exact answer.
    if _shares_memory(a, b):
        raise ValueError(f"{name} must not overlap {other} in memory")
    return 0


# ---------------------------------------------------------------- an array as the kernels see it

cdef int64_t stride_of(cnp.ndarray a, int axis) noexcept:
    """Elements from one index of an axis to the next; 0 where there is only one index.

    An aligned array's strides are whole elements: no type here is larger than its alignment.
    """
    if cnp.PyArray_DIM(a, axis) <= 1:
        return 0
    return cnp.PyArray_STRIDE(a, axis) // cnp.PyArray_ITEMSIZE(a)


cdef int as_vectors(cnp.ndarray a, str name, rf_rows *out) except -1:
    """[tokens, heads, dim] with a contiguous last dimension."""
    contiguous_rows(a, name)
    out.data = cnp.PyArray_DATA(a)
    out.token_stride = stride_of(a, 0)
    out.head_stride = stride_of(a, 1)
    return 0


cdef int as_pool(cnp.ndarray a, str name, bint nhd, rf_paged *out) except -1:
    contiguous_rows(a, name)
    out.data = cnp.PyArray_DATA(a)
    out.block_stride = stride_of(a, 0)
    out.head_stride = stride_of(a, 2 if nhd else 1)
    out.token_stride = stride_of(a, 1 if nhd else 2)
    return 0


cdef int _line(cnp.ndarray a, str name, str what, int64_t n, int type_num, str kind) except -1:
    """A contiguous [n] of a type; n < 0 is any length."""
    if cnp.PyArray_NDIM(a) != 1:
        bad_shape(a, name, what)
    if cnp.PyArray_TYPE(a) != type_num:
        raise ValueError(f"{name} must be {kind}, got {a.dtype}")
    behaved(a, name)
    if n >= 0 and cnp.PyArray_DIM(a, 0) != n:
        raise ValueError(f"{name} must have shape {what} with {n} entries, got {shape_text(a)}")
    contiguous_rows(a, name)
    return 0


cdef const int32_t *as_int32s(cnp.ndarray a, str name, str what, int64_t n) except? NULL:
    _line(a, name, what, n, cnp.NPY_INT32, "int32")
    return <const int32_t *>cnp.PyArray_DATA(a)


cdef const float *as_floats(cnp.ndarray a, str name, str what, int64_t n) except? NULL:
    _line(a, name, what, n, cnp.NPY_FLOAT, "float32")
    return <const float *>cnp.PyArray_DATA(a)
