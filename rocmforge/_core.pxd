# The C core (src_c/include/rf) as Cython sees it, and the conversions that its modules share.
# The conversions are inline, so that this file needs no module of its own.
cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsLongLong, PyLong_AsUnsignedLongLong, PyLong_Check
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t


cdef extern from "rf/status.h" nogil:
    int RF_OK, RF_ERR_NO_MEMORY, RF_ERR_OUT_OF_BLOCKS, RF_ERR_BAD_ARGUMENT
    int RF_ERR_BLOCK_RANGE, RF_ERR_BLOCK_NOT_IN_USE, RF_ERR_BLOCK_FREE, RF_ERR_BLOCK_REPEATED
    const char *rf_strerror(int status)


cdef extern from "rf/alloc.h" nogil:
    void *rf_alloc(size_t size)
    void *rf_calloc(size_t count, size_t size)
    void *rf_realloc(void *p, size_t size)
    void rf_free(void *p)
    int64_t rf_alloc_fail_after(int64_t n)


cdef extern from "rf/id_map.h" nogil:
    int32_t RF_NO_ROW
    ctypedef struct rf_id_map:
        uint64_t *ids
        uint32_t num_slots
        int32_t num_ids
        int32_t row_capacity
        int32_t num_rows
    void rf_id_map_init(rf_id_map *map)
    void rf_id_map_free(rf_id_map *map)
    int rf_id_map_reserve(rf_id_map *map)
    int32_t rf_id_map_add(rf_id_map *map, uint64_t id)
    int32_t rf_id_map_remove(rf_id_map *map, uint64_t id)
    int32_t rf_id_map_find(const rf_id_map *map, uint64_t id)
    int rf_id_map_validate(const rf_id_map *map, const char **reason)


cdef extern from "rf/block_pool.h" nogil:
    int32_t RF_NO_BLOCK
    uint32_t RF_BLOCK_KEPT
    ctypedef struct rf_block:
        int32_t ref_count
        uint32_t flags
        uint64_t last_use
    ctypedef struct rf_block_pool:
        rf_block *blocks
        int32_t num_blocks
        int32_t num_kept
        int32_t num_evicted
        uint64_t total_evictions
    int rf_block_pool_init(rf_block_pool *pool, int64_t num_blocks)
    void rf_block_pool_free(rf_block_pool *pool)
    int rf_block_pool_allocate(rf_block_pool *pool, int32_t n, int32_t *ids)
    int rf_block_pool_ref(rf_block_pool *pool, const int32_t *ids, int32_t n, int32_t *bad)
    int rf_block_pool_release(rf_block_pool *pool, const int32_t *ids, int32_t n, int keep,
                              int32_t *bad)
    int32_t rf_block_pool_take_evicted(rf_block_pool *pool, int32_t *ids)
    int rf_block_pool_validate(const rf_block_pool *pool, const char **reason)
    int32_t rf_block_pool_num_free(const rf_block_pool *pool)
    int32_t rf_block_pool_num_available(const rf_block_pool *pool)


cdef inline object plain_int(object value, str name):
    """A Python int of any integer; may run the caller's code, which reading the int then cannot."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    return value.__index__()


cdef inline uint64_t as_sequence_id(object value) except? 0xfffffffffffffffe:
    """An unsigned 64-bit sequence id from any Python or NumPy integer."""
    value = plain_int(value, "sequence id")
    try:
        return PyLong_AsUnsignedLongLong(value)
    except OverflowError:
        raise ValueError(f"sequence id: expected 0 .. 2**64 - 1, got {value}") from None


cdef inline int64_t as_int(object value, str name, int64_t low, int64_t high) except? -2:
    """An integer of the closed range low .. high; the messages name the argument."""
    cdef int64_t number
    value = plain_int(value, name)
    try:
        number = PyLong_AsLongLong(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {low} .. {high}, got {value}") from None
    if number < low or number > high:
        raise ValueError(f"{name}: expected {low} .. {high}, got {number}")
    return number


cdef inline object as_int_array(object values, str name, int type_num):
    """An aligned, contiguous, one-dimensional array of one integer type; no copy where it is one.

    A value outside the type's range is a ValueError; floats, bools and nested lists are refused.
    int64 and uint64 may stand for each other as the contract of sequence ids allows: the negative
    ones are refused by whoever looks them up.
    """
    import numpy as np
    cdef cnp.ndarray array
    cdef object dtype = cnp.PyArray_DescrFromType(type_num)
    if cnp.PyArray_Check(values):
        array = <cnp.ndarray> values
    else:
        try:
            if not isinstance(values, (list, tuple, range)) and hasattr(values, "__dlpack__"):
                array = np.from_dlpack(values)
            else:
                array = np.asarray(values)
            if (array.dtype.kind in "fO" and isinstance(values, (list, tuple))
                    and False not in [hasattr(value, "__index__") for value in values]):
                # NumPy makes floats of [1, 2**63] and objects of [2**64]
                array = np.array([value.__index__() for value in values], dtype)
        except OverflowError:
            limits = np.iinfo(dtype)
            raise ValueError(
                f"{name}: expected {limits.min} .. {limits.max}, one is outside") from None
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}: expected a sequence of integers, got {type(values).__name__}") from None
        if array.size == 0:
            array = array.astype(np.int64)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {np.shape(values)}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    if array.dtype != dtype and array.size:
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"{name}: expected {limits.min} .. {limits.max}, got {low} .. {high}")
    if cnp.PyArray_TYPE(array) == type_num and cnp.PyArray_ISCARRAY_RO(array):
        return array
    return array.astype(dtype, order="C")


cdef inline cnp.ndarray as_out(object out, str name, int type_num, tuple shape):
    """The caller's buffer, checked: exact dtype and shape, aligned, C-contiguous, writable."""
    cdef object dtype = cnp.PyArray_DescrFromType(type_num)
    if not cnp.PyArray_Check(out):
        raise TypeError(f"{name}: expected a NumPy array, got {type(out).__name__}")
    if out.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {out.shape}")
    if not cnp.PyArray_ISCARRAY(<cnp.ndarray> out):
        raise ValueError(f"{name}: expected a writable, aligned, C-contiguous array")
    return out
