from libc.stdint cimport int32_t, int64_t

from rocmforge.batch cimport Batch
from rocmforge.shared_sequences cimport Sequence, SharedSequences


cdef class KVCacheManager(SharedSequences):
    cdef int learn(self, Sequence *sequence, const int32_t *tokens, int64_t n) except -1
    cdef int64_t plan(self, Batch batch, const int32_t *tokens) except -1
    cdef int plan_group(self, Batch batch, int32_t g, int64_t *slots, int64_t *needed,
                        int64_t *copies, int64_t *delta) except -1
    cdef void apply(self, Batch batch, const int32_t *tokens) noexcept
    cdef void apply_group(self, Batch batch, int32_t g) noexcept
    cdef int32_t first_gap(self, Batch batch) noexcept
    cdef int check_batch(self, object batch) except -1
