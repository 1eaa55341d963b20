cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from rocmforge.ops._params cimport rf_paged, rf_rows

cdef extern from "rf/dlpack.h" nogil:
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
        void *context
        void (*deleter)(rf_dl_managed *) noexcept nogil
    ctypedef struct rf_dl_versioned:
        uint32_t major
        uint32_t minor
        void *context
        void (*deleter)(rf_dl_versioned *) noexcept nogil
        uint64_t flags
        rf_dl_tensor tensor
    ctypedef struct rf_dl_exchange:
        uint32_t major
        uint32_t minor
        rf_dl_exchange *previous
        int (*allocate)(rf_dl_tensor *like, rf_dl_versioned **out, void *context,
                        void (*set_error)(void *context, const char *kind,
                                          const char *message) noexcept) noexcept
        int (*export_object)(void *object, rf_dl_versioned **out) except -1
        int (*import_object)(rf_dl_versioned *tensor, void **out) except -1
        int (*describe)(void *object, rf_dl_tensor *out) except -1
        int (*current_stream)(int32_t device_type, int32_t device_id, void **out) except -1

# The most blocks, heads or tokens that the kernels' 32-bit indices allow.
cdef enum:
    MAX_COUNT = 2147483647

# arrays in and out
cdef const rf_dl_exchange *exchange_of(object x) except? NULL
cdef object hip_operations(object x)
cdef cnp.ndarray as_array(object x, str name)
cdef cnp.ndarray dlpack_array(object capsule, object producer, str name)
cdef cnp.ndarray tensor_array(const rf_dl_tensor *t, str name, int flags, object base)
cdef int dlpack_type(cnp.dtype descr, rf_dl_tensor *t) except -1
cdef cnp.ndarray array_at(void *data, object shape, cnp.dtype descr, object base)
cdef object new_result(object like, cnp.dtype descr, int ndim, const cnp.npy_intp *dims,
                       int32_t device_type, int32_t device_id)
cdef cnp.dtype dtype_named(int dtype)
cdef tuple host_result(object like, cnp.dtype descr, int ndim, const cnp.npy_intp *dims)
cdef object like_library(cnp.ndarray a, object like)
cdef int device_kind(object x) except -2

# scalars
cdef bint as_flag(object x, str name) except -1
cdef double as_number(object x, str name, str what) except? -1.0
cdef int64_t as_bound(object x, str name, int64_t low) except -2
cdef int host_only(object stream) except -1
cdef bint is_nhd(object layout) except -1

# what an array must be
cdef str shape_text(cnp.ndarray a)
cdef int bad_shape(cnp.ndarray a, str name, str what) except -1
cdef int dtype_of(cnp.ndarray a) noexcept
cdef int wide_dtype(cnp.ndarray a, str name) except -1
cdef int same_dtype(cnp.ndarray a, str name, cnp.ndarray like, str other) except -1
cdef int behaved(cnp.ndarray a, str name) except -1
cdef int writable(cnp.ndarray a, str name) except -1
cdef int contiguous_rows(cnp.ndarray a, str name) except -1
cdef int shape3(cnp.ndarray a, int64_t n0, int64_t n1, int64_t n2) noexcept
cdef int apart(cnp.ndarray a, str name, cnp.ndarray b, str other) except -1

# an array as the kernels see it
cdef int64_t stride_of(cnp.ndarray a, int axis) noexcept
cdef int as_vectors(cnp.ndarray a, str name, rf_rows *out) except -1
cdef int as_pool(cnp.ndarray a, str name, bint nhd, rf_paged *out) except -1
cdef const int32_t *as_int32s(cnp.ndarray a, str name, str what, int64_t n) except? NULL
cdef const float *as_floats(cnp.ndarray a, str name, str what, int64_t n) except? NULL
