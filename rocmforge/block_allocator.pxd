from libc.stdint cimport int32_t, int64_t

from rocmforge._core cimport rf_block_pool


cdef class BlockAllocator:
    cdef rf_block_pool pool
    cdef bint read_only  # a face of a cache's own pool: only the cache may change it

    cdef int check_writable(self) except -1
    cdef int32_t as_block_id(self, object block_id) except? -2
    # The boundary where a status of the pool becomes an exception; RF_OK returns 0.
    cdef int check(self, int status, int32_t block_id, int64_t requested) except -1
