cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint64_t

from rocmforge.cache_group cimport CacheGroup
from rocmforge.prefix_cache cimport PrefixCache


cdef enum:
    ROOT_UNSET = -2  # no token was given yet, so that the sequence needs no space


cdef struct Sequence:
    int64_t length      # tokens that have a slot
    int64_t committed   # tokens whose keys and values are written, from the start on
    int64_t num_known   # tokens known, from the start on
    int64_t capacity    # of tokens
    int32_t *tokens     # [num_known]
    uint64_t version    # set from the manager's counter: a batch of another version is stale
    uint64_t seen       # the planning that last met it, to find an id named twice
    int32_t root        # its space in the prefix index; RF_NO_NODE: it publishes nothing
    int32_t chain       # node of its first `chained` full blocks, which it uses; at first the root
    int32_t chained
    int32_t priority
    bint started        # it was in a batch: the reserve is open to it


cdef class SharedSequences:
    cdef readonly tuple groups               # of CacheGroup
    cdef readonly int block_size, kernel_block_size, watermark, max_pinned_blocks
    cdef readonly object max_sequences, max_seq_len
    cdef readonly bint prefix_caching
    cdef bint initialized, has_windows
    cdef CacheGroup first                    # groups[0], whose page table finds the rows
    cdef Sequence *sequences                 # [sequences_capacity], by row
    cdef int32_t sequences_capacity
    cdef PrefixCache prefixes
    cdef uint64_t versions                   # last version given to a sequence
    cdef uint64_t plannings                  # batches planned so far
    cdef uint64_t changes                    # state changes so far
    cdef uint64_t batches                    # serial of the newest batch
    cdef int64_t prompt_tokens, hit_tokens   # given to add_sequence, and found by it, so far
    cdef int64_t copied_blocks               # by copy-on-write, so far

    cdef int32_t require(self, object sequence_id) except -2
    cdef int reserve_sequence(self) except -1
    cdef int32_t add_row(self, uint64_t key) noexcept
    cdef void drop_row(self, uint64_t key, int32_t row) noexcept
    cdef void publish(self, int32_t row) noexcept
    cdef void release_window(self, int32_t row) noexcept
