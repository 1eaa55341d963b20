cimport cython
from libc.stdint cimport int32_t

from rocmforge._core cimport rf_event_log, rf_prefix_index


@cython.final
cdef class EventLog:
    cdef rf_event_log log
    cdef dict extras             # root -> CBOR of the extra keys, or None
    cdef object medium

    # Nothing here runs anybody's code.
    cdef int add_root(self, int32_t root, object extra) except -1
    cdef void name(self, rf_prefix_index *index, int32_t node) noexcept
    cdef void stored(self, rf_prefix_index *index, int32_t group, int32_t node) noexcept
    cdef void removed(self, rf_prefix_index *index, int32_t group, int32_t block) noexcept
    cdef void cleared(self) noexcept


cdef object extra_keys(object salt)
cdef EventLog new_event_log(rf_prefix_index *index, int32_t capacity, str seed, object medium)
