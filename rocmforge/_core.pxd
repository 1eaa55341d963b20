# The C core (src_c/include/rf) as Cython sees it, and the conversions that its modules share.
# The conversions are inline, so that this file needs no module of its own.
cimport cython
cimport numpy as cnp
from cpython.list cimport PyList_CheckExact, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsLongLong, PyLong_AsUnsignedLongLong, PyLong_CheckExact
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


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
        int32_t free_row
    void rf_id_map_init(rf_id_map *map)
    void rf_id_map_free(rf_id_map *map)
    int rf_id_map_reserve(rf_id_map *map)
    int32_t rf_id_map_add(rf_id_map *map, uint64_t id)
    int32_t rf_id_map_remove(rf_id_map *map, uint64_t id)
    int32_t rf_id_map_find(const rf_id_map *map, uint64_t id)
    int rf_id_map_validate(const rf_id_map *map, const char **reason)


cdef extern from "rf/block_pool.h" nogil:
    int32_t RF_NO_BLOCK
    int RF_NUM_PRIORITIES
    int RF_BLOCK_KEPT, RF_BLOCK_CACHED
    int RF_KEEP_NONE, RF_KEEP_ALL, RF_KEEP_CACHED
    ctypedef struct rf_block:
        int32_t ref_count
        uint8_t flags
        uint16_t pins
        uint64_t last_use
    ctypedef struct rf_block_pool:
        rf_block *blocks
        int32_t num_blocks
        int32_t next_fresh
        int32_t num_kept
        int32_t num_pinned
        int32_t *evicted
        int32_t num_evicted
        uint64_t clock
        uint64_t total_evictions
    int rf_block_pool_init(rf_block_pool *pool, int64_t num_blocks)
    void rf_block_pool_free(rf_block_pool *pool)
    int rf_block_pool_allocate(rf_block_pool *pool, int32_t n, int32_t *ids)
    int rf_block_pool_ref(rf_block_pool *pool, const int32_t *ids, int32_t n, int32_t *bad)
    int rf_block_pool_release(rf_block_pool *pool, const int32_t *ids, int32_t n, int keep,
                              int32_t *bad)
    void rf_block_pool_hold(rf_block_pool *pool, int32_t id)
    void rf_block_pool_drop(rf_block_pool *pool, const int32_t *ids, int32_t n, int keep,
                            int priority)
    void rf_block_pool_forget(rf_block_pool *pool, int32_t id)
    void rf_block_pool_pin(rf_block_pool *pool, int32_t id)
    void rf_block_pool_unpin(rf_block_pool *pool, int32_t id)
    int32_t rf_block_pool_take_evicted(rf_block_pool *pool, int32_t *ids)
    int rf_block_pool_validate(const rf_block_pool *pool, const char **reason)
    int32_t rf_block_pool_num_free(const rf_block_pool *pool)
    int32_t rf_block_pool_num_available(const rf_block_pool *pool)


cdef extern from "rf/prefix_index.h" nogil:
    int32_t RF_NO_NODE
    ctypedef struct rf_prefix_node:
        int32_t parent
        int32_t uses
    ctypedef struct rf_prefix_index:
        rf_prefix_node *nodes
        int32_t *tokens
        uint32_t hash_mask
        int32_t capacity
        int32_t block_size
        int32_t num_groups
        int32_t next_fresh
        int32_t num_nodes
        int32_t num_blocks
    int rf_prefix_index_init(rf_prefix_index *index, int32_t block_size, int32_t num_groups,
                             const int32_t *group_blocks, uint64_t seed)
    void rf_prefix_index_free(rf_prefix_index *index)
    int32_t rf_prefix_index_add_root(rf_prefix_index *index)
    void rf_prefix_index_drop_root(rf_prefix_index *index, int32_t root)
    int32_t rf_prefix_index_walk(const rf_prefix_index *index, int32_t root,
                                 const int32_t *tokens, int32_t n, int32_t *nodes)
    int32_t rf_prefix_index_step(rf_prefix_index *index, int32_t node, const int32_t *tokens)
    void rf_prefix_index_use(rf_prefix_index *index, int32_t node)
    void rf_prefix_index_unuse(rf_prefix_index *index, int32_t node)
    void rf_prefix_index_attach(rf_prefix_index *index, int32_t node, int32_t group, int32_t block)
    void rf_prefix_index_detach(rf_prefix_index *index, int32_t group, int32_t block)
    int rf_prefix_index_validate(const rf_prefix_index *index, const int32_t *group_blocks,
                                 const char **reason)
    int32_t rf_prefix_index_block(const rf_prefix_index *index, int32_t node, int32_t group)
    int32_t rf_prefix_index_node(const rf_prefix_index *index, int32_t group, int32_t block)


cdef extern from "rf/saved.h" nogil:
    ctypedef struct rf_saved_pool:
        int32_t num_touched
        int32_t num_free
        int32_t num_kept
        int32_t num_evicted
        int32_t *ref_counts
        uint8_t *priorities
        uint16_t *pins
        uint64_t *last_uses
        int32_t *free_ids
        int32_t *kept
        int32_t *evicted
        uint64_t clock
        uint64_t total_evictions
    void rf_saved_pool_measure(rf_saved_pool *saved, const rf_block_pool *pool)
    void rf_saved_pool_fill(rf_saved_pool *saved, const rf_block_pool *pool)
    int rf_saved_pool_restore(const rf_saved_pool *saved, rf_block_pool *pool, const char **reason)
    ctypedef struct rf_saved_nodes:
        int32_t num_nodes
        int32_t num_roots
        const int32_t *parents
        const int32_t *tokens
        const int32_t *blocks
        const int32_t *uses
    void rf_prefix_index_order(const rf_prefix_index *index, int32_t num_roots, int32_t *order,
                               int32_t *place)
    int rf_saved_nodes_restore(const rf_saved_nodes *saved, rf_prefix_index *index,
                               const int32_t *group_blocks, const char **reason)


cdef extern from "rf/event_log.h" nogil:
    int RF_EVENT_STORED, RF_EVENT_REMOVED, RF_EVENT_CLEARED
    ctypedef struct rf_event:
        uint8_t name[32]
        uint8_t parent[32]
        uint8_t kind
        uint8_t is_first
        int32_t group
    ctypedef struct rf_event_log:
        int32_t block_size
        int32_t num
        uint64_t lost
    int rf_event_log_init(rf_event_log *log, int32_t capacity, int32_t block_size,
                          int32_t num_nodes, const uint8_t *root_name)
    void rf_event_log_free(rf_event_log *log)
    void rf_event_log_name(rf_event_log *log, int32_t node, int32_t parent, const int32_t *tokens,
                           const uint8_t *extra, int64_t extra_size)
    void rf_event_log_stored(rf_event_log *log, int32_t group, int32_t node, int32_t parent,
                             const int32_t *tokens)
    void rf_event_log_removed(rf_event_log *log, int32_t group, int32_t node)
    void rf_event_log_cleared(rf_event_log *log)
    void rf_event_log_drop(rf_event_log *log, int32_t n)
    const rf_event *rf_event_log_at(const rf_event_log *log, int32_t i)
    const int32_t *rf_event_log_tokens(const rf_event_log *log, int32_t i)


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
    cdef cnp.ndarray array
    if (cnp.PyArray_Check(values) and cnp.PyArray_TYPE(<cnp.ndarray> values) == type_num
            and cnp.PyArray_NDIM(<cnp.ndarray> values) == 1
            and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> values)):
        return values
    import numpy as np
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
        return array  # of a list, or by DLPack
    return array.astype(dtype, order="C")


cdef inline cnp.ndarray as_tokens(object values, str name):
    """Token ids as a contiguous int32 array; an int32 one of the caller's is not copied."""
    cdef cnp.npy_intp i, n
    cdef cnp.ndarray array, wide
    cdef int32_t *tokens
    cdef const int64_t *source
    cdef int64_t lost = 0
    if PyList_CheckExact(values):
        n = PyList_GET_SIZE(values)
        array = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_INT32)
        tokens = <int32_t *> cnp.PyArray_DATA(array)
        try:
            for i in range(n):
                item = <object> PyList_GET_ITEM(values, i)
                if not PyLong_CheckExact(item):
                    break
                tokens[i] = <int32_t> item
            else:
                return array
        except OverflowError:
            pass  # as_int_array says it better
    elif (cnp.PyArray_Check(values) and cnp.PyArray_NDIM(<cnp.ndarray> values) == 1
            and cnp.PyArray_TYPE(<cnp.ndarray> values) == cnp.NPY_INT64
            and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> values)):
        wide = <cnp.ndarray> values
        n = cnp.PyArray_SIZE(wide)
        array = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_INT32)
        tokens = <int32_t *> cnp.PyArray_DATA(array)
        source = <const int64_t *> cnp.PyArray_DATA(wide)
        for i in range(n):
            tokens[i] = <int32_t> source[i]
            lost |= source[i] - tokens[i]
        if lost == 0:
            return array
    return as_int_array(values, name, cnp.NPY_INT32)


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
