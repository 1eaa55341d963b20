cimport cython
from libc.stdint cimport int32_t, int64_t

from rocmforge._core cimport rf_prefix_index
from rocmforge.event_log cimport EventLog

cdef object salt_key(object salt)


@cython.final
cdef class PrefixCache:
    cdef tuple groups            # of CacheGroup: those whose blocks it knows
    cdef int block_size
    cdef rf_prefix_index index
    cdef bint is_ready           # the index was needed and has its memory
    cdef int32_t unsalted        # root of the space of no salt
    cdef dict salts              # bytes, or None for no salt -> root
    cdef EventLog events         # None where nobody wants them
    cdef int64_t resets          # how often everything was forgotten
    cdef int salts_limit         # unused roots are dropped when there are more
    cdef int32_t *nodes          # [nodes_capacity] the nodes that `match` walked
    cdef int64_t nodes_capacity

    # Making room may fail and then changes nothing; what is noexcept runs nobody's code, nor do
    # find_root and root_of.
    cdef int make_index(self) except -1
    cdef int require(self) except -1
    cdef int sweep_salts(self) except -1
    cdef int reserve_nodes(self, int64_t n) except -1
    cdef int32_t find_root(self, object key) except -2
    cdef object extra_of(self, object key)
    cdef int32_t root_of(self, object key, object extra) except -2
    cdef int enable_events(self, int32_t capacity, str seed, object medium) except -1
    cdef void named(self, int32_t node) noexcept
    cdef void attach(self, int32_t node, int32_t group, int32_t block) noexcept
    cdef void detach(self, int32_t group, int32_t block) noexcept
    cdef int64_t match(self, int32_t root, const int32_t *tokens, int64_t limit) noexcept
    cdef int32_t block(self, int64_t i, int32_t g) noexcept
    cdef void unlink_block(self, int32_t group, int32_t block) noexcept
    cdef void take(self, int32_t g, int32_t n, int32_t *ids) noexcept
    cdef int64_t forget_all(self) noexcept


cdef PrefixCache new_prefix_cache(tuple groups, int block_size)
