# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The CPU backend: threads, instruction sets, and running an operation whose arguments were read.

What arrays hold is checked here, by C: each index that would be followed.
"""

from libc.stdint cimport int32_t, int64_t

from rocmforge.ops._params cimport (
    rf_attention_params, rf_copy_params, rf_merge_params, rf_write_params)

import os

cdef extern from "rf/status.h" nogil:
    enum: RF_OK
    enum: RF_ERR_NO_MEMORY

cdef extern from "rf/cpu.h" nogil:
    ctypedef struct rf_cpu:
        pass
    enum rf_fault_code:
        RF_FAULT_SEQ_LEN
        RF_FAULT_ROW
        RF_FAULT_CU_START
        RF_FAULT_CU_ORDER
        RF_FAULT_CU_END
        RF_FAULT_QUERY_LONGER
        RF_FAULT_MAX_QUERY
        RF_FAULT_MAX_SEQ
        RF_FAULT_BLOCK
        RF_FAULT_MASK
        RF_FAULT_K_SCALE
        RF_FAULT_V_SCALE
        RF_FAULT_SLOT
        RF_FAULT_COPY_RANGE
        RF_FAULT_COPY_REPEATED
        RF_FAULT_BLOCK_ID
        RF_FAULT_BLOCK_ID_REPEATED
    ctypedef struct rf_fault:
        int64_t index
        int64_t index2
        int64_t value
        int64_t limit
        int32_t code
    int rf_cpu_create(const char *isa, int threads, rf_cpu **out)
    int rf_cpu_set_threads(rf_cpu *cpu, int threads)
    int rf_cpu_get_threads(const rf_cpu *cpu)
    int rf_cpu_set_processors(rf_cpu *cpu, const int32_t *processors, int64_t n)
    int64_t rf_cpu_busy_ns(const rf_cpu *cpu)
    int rf_cpu_online()
    const char *rf_cpu_isa_name(int i)
    int rf_cpu_isa_available(const char *isa)
    const char *rf_cpu_isa(const rf_cpu *cpu)
    int rf_cpu_set_isa(rf_cpu *cpu, const char *isa)
    int rf_cpu_check_attention(const rf_attention_params *p, int64_t max_seqlen_q,
                               int64_t max_seq_len, int64_t mask_width, int64_t *work,
                               rf_fault *fault)
    int rf_cpu_check_write(const rf_write_params *p, rf_fault *fault)
    int rf_cpu_check_copy(const int32_t *copies, int64_t num_copies, int64_t num_blocks,
                          rf_fault *fault)
    int rf_cpu_check_blocks(const int32_t *ids, int64_t num_ids, int64_t num_blocks, int written,
                            rf_fault *fault)
    int rf_cpu_attention(rf_cpu *cpu, const rf_attention_params *p)
    int rf_cpu_merge_states(rf_cpu *cpu, const rf_merge_params *p)
    int rf_cpu_write_kv(rf_cpu *cpu, const rf_write_params *p)
    int rf_cpu_copy_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                           const int32_t *copies, int64_t num_copies)
    int rf_cpu_gather_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                             const int32_t *ids, int64_t num_ids, char *data, int64_t stride)
    int rf_cpu_scatter_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                              const int32_t *ids, int64_t num_ids, const char *data,
                              int64_t stride)

cdef object _index = __import__("operator").index

# Releasing the GIL costs more than it gives below this many bytes that are touched, about 5 us.
cdef int64_t _HOLD_GIL_BYTES = 65536

cdef rf_cpu *_cpu = NULL


# ---------------------------------------------------------------- faults

cdef int _raise(rf_fault *f) except -1:
    cdef int64_t i = f.index, value = f.value, limit = f.limit
    if f.code == RF_FAULT_SEQ_LEN:
        raise ValueError(f"seq_lens must be 0 to {limit} (the width of block_table times the block "
                         f"size), got {value} at index {i}")
    if f.code == RF_FAULT_ROW:
        raise ValueError(f"rows must name rows of block_table, 0 to {limit - 1}, got {value} at "
                         f"index {i}")
    if f.code == RF_FAULT_CU_START:
        raise ValueError(f"cu_seqlens_q must start with 0, got {value}")
    if f.code == RF_FAULT_CU_ORDER:
        raise ValueError(f"cu_seqlens_q must not decrease, got {value} at index {i} after {limit}")
    if f.code == RF_FAULT_CU_END:
        raise ValueError(f"cu_seqlens_q must stay within the {limit} tokens of query, got {value} "
                         f"at index {i}")
    if f.code == RF_FAULT_QUERY_LONGER:
        raise ValueError(f"seq_lens must include the new tokens: sequence {i} has {value} query "
                         f"tokens and a seq_len of {limit}")
    if f.code == RF_FAULT_MAX_QUERY:
        raise ValueError(f"max_seqlen_q must bound every sequence: it is {limit}, sequence {i} has "
                         f"{value} query tokens")
    if f.code == RF_FAULT_MAX_SEQ:
        raise ValueError(f"max_seq_len must bound every sequence: it is {limit}, seq_lens has "
                         f"{value} at index {i}")
    if f.code == RF_FAULT_MASK:
        raise ValueError(f"mask must have a column for each query token of a sequence: it has "
                         f"{limit}, sequence {i} has {value} query tokens")
    if f.code == RF_FAULT_BLOCK:
        raise ValueError(f"block_table must name blocks below {limit}, got {value} at row {i}, "
                         f"column {f.index2}")
    if f.code == RF_FAULT_SLOT:
        raise ValueError(f"slot_mapping must name slots below {limit} (num_blocks times "
                         f"block_size), got {value} at index {i}")
    if f.code == RF_FAULT_COPY_RANGE:
        raise ValueError(f"copies must name blocks 0 to {limit - 1}, got {value} at index {i}")
    if f.code == RF_FAULT_BLOCK_ID:
        raise ValueError(f"block_ids must name blocks 0 to {limit - 1}, got {value} at index {i}")
    if f.code == RF_FAULT_BLOCK_ID_REPEATED:
        raise ValueError(f"block_ids must not repeat a block that is written to, got {value} again "
                         f"at index {i}")
    if f.code == RF_FAULT_K_SCALE or f.code == RF_FAULT_V_SCALE:
        raise ValueError(f"{'k' if f.code == RF_FAULT_K_SCALE else 'v'}_scale must be positive, "
                         f"finite and not subnormal: it is not at index {i}")
    raise ValueError(f"copies must not depend on their order: block {value}, a destination at "
                     f"index {i}, is a source or destination of another copy")


cdef int _ok(int status, rf_fault *fault, str name) except -1:
    if status == RF_OK:
        return 0
    if status == RF_ERR_NO_MEMORY:
        raise MemoryError(f"{name}: no memory for scratch")
    _raise(fault)


# ---------------------------------------------------------------- operations

cdef int64_t check_attention(const rf_attention_params *p, int64_t max_seqlen_q,
                             int64_t max_seq_len, int64_t mask_width) except -1:
    """Check what the arrays hold; gives the key/value tokens to read, times query tokens."""
    cdef rf_fault fault
    cdef int64_t work
    _ok(rf_cpu_check_attention(p, max_seqlen_q, max_seq_len, mask_width, &work, &fault), &fault,
        "paged_attention")
    return work


cdef int attention(const rf_attention_params *p, int64_t work) except -1:
    """Run a checked call; work: what the check gave."""
    cdef int status
    if work * p.num_kv_heads * p.head_dim < _HOLD_GIL_BYTES // 2:
        status = rf_cpu_attention(_cpu, p)
    else:
        with nogil:
            status = rf_cpu_attention(_cpu, p)
    return _ok(status, NULL, "paged_attention")


cdef int merge_states(const rf_merge_params *p) except -1:
    if p.num_tokens * p.num_heads * p.head_dim < _HOLD_GIL_BYTES // 4:
        rf_cpu_merge_states(_cpu, p)
    else:
        with nogil:
            rf_cpu_merge_states(_cpu, p)
    return 0


cdef int check_write(const rf_write_params *p) except -1:
    cdef rf_fault fault
    return _ok(rf_cpu_check_write(p, &fault), &fault, "write_kv")


cdef int write_kv(const rf_write_params *p) except -1:
    if p.num_tokens * p.num_kv_heads * p.head_dim < _HOLD_GIL_BYTES // 2:
        rf_cpu_write_kv(_cpu, p)
    else:
        with nogil:
            rf_cpu_write_kv(_cpu, p)
    return 0


cdef int check_copies(const int32_t *copies, int64_t num_copies, int64_t num_blocks) except -1:
    cdef rf_fault fault
    return _ok(rf_cpu_check_copy(copies, num_copies, num_blocks, &fault), &fault, "copy_blocks")


cdef int check_blocks(const int32_t *ids, int64_t num_ids, int64_t num_blocks,
                      bint written) except -1:
    cdef rf_fault fault
    return _ok(rf_cpu_check_blocks(ids, num_ids, num_blocks, written, &fault), &fault,
               "scatter_blocks")


cdef int64_t block_bytes(const rf_copy_params *pools, int64_t num_pools) noexcept:
    """Bytes of a block in all pools."""
    cdef int64_t total = 0, i
    for i in range(num_pools):
        total += pools[i].outer * pools[i].middle * pools[i].inner
    return total


cdef int copy_blocks(const rf_copy_params *pools, int64_t num_pools, const int32_t *copies,
                     int64_t num_copies) except -1:
    if block_bytes(pools, num_pools) * num_copies < _HOLD_GIL_BYTES:
        rf_cpu_copy_blocks(_cpu, pools, num_pools, copies, num_copies)
    else:
        with nogil:
            rf_cpu_copy_blocks(_cpu, pools, num_pools, copies, num_copies)
    return 0


cdef int gather_blocks(const rf_copy_params *pools, int64_t num_pools, const int32_t *ids,
                       int64_t num_ids, char *data, int64_t stride) except -1:
    if block_bytes(pools, num_pools) * num_ids < _HOLD_GIL_BYTES:
        rf_cpu_gather_blocks(_cpu, pools, num_pools, ids, num_ids, data, stride)
    else:
        with nogil:
            rf_cpu_gather_blocks(_cpu, pools, num_pools, ids, num_ids, data, stride)
    return 0


cdef int scatter_blocks(const rf_copy_params *pools, int64_t num_pools, const int32_t *ids,
                        int64_t num_ids, const char *data, int64_t stride) except -1:
    if block_bytes(pools, num_pools) * num_ids < _HOLD_GIL_BYTES:
        rf_cpu_scatter_blocks(_cpu, pools, num_pools, ids, num_ids, data, stride)
    else:
        with nogil:
            rf_cpu_scatter_blocks(_cpu, pools, num_pools, ids, num_ids, data, stride)
    return 0


# ---------------------------------------------------------------- threads and instruction sets

def set_num_threads(n, *, processors=None):
    """Set how many threads the CPU operations use, the calling one included.

    By default the environment's ``ROCMFORGE_NUM_THREADS``, else its ``OMP_NUM_THREADS``, else the
    processors this process may run on. Results do not depend on it.

    Parameters
    ----------
    n : int
        At least 1.
    processors : iterable of int, optional
        Numbers of the processors that the threads may run on, the calling one not included: needed
        where an OpenMP runtime has bound the calling thread to one of them, because threads begin
        where the one may run that starts them, which is the default. Ignored where the system
        cannot bind threads or has no such processor.

    Raises
    ------
    ValueError
        n is below 1 or above 4096, or a processor is not 0 to 1023.
    TypeError
        n or a processor is not an integer. After any error nothing was changed.
    """
    cdef int32_t[1024] numbers
    cdef int count = 0
    try:
        value = _index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {type(n).__name__}") from None
    if not 1 <= value <= 4096:
        raise ValueError(f"n must be 1 to 4096, got {value}")
    for number in sorted(set(processors or ())):
        if not 0 <= _index(number) < 1024:
            raise ValueError(f"processors must be 0 to 1023, got {number}")
        numbers[count] = number
        count += 1
    rf_cpu_set_processors(_cpu, numbers, count)
    rf_cpu_set_threads(_cpu, value)


def get_num_threads():
    """Return how many threads the CPU operations use, the calling one included."""
    return rf_cpu_get_threads(_cpu)


def busy_seconds():
    """Return the seconds that threads spent in work they shared, all of them added up, so far."""
    return 1e-9 * rf_cpu_busy_ns(_cpu)


def isa():
    """Return the name of the instruction-set variant in use."""
    return rf_cpu_isa(_cpu).decode()


def available_isas():
    """Return the names of the variants that this processor can run, best first."""
    names = []
    cdef int i = 0
    while rf_cpu_isa_name(i) != NULL:
        if rf_cpu_isa_available(rf_cpu_isa_name(i)):
            names.append(rf_cpu_isa_name(i).decode())
        i += 1
    return tuple(names)


def _set_isa(name):
    """Use another variant from the next call on: for tests, with no call in flight."""
    if rf_cpu_set_isa(_cpu, name.encode()) != RF_OK:
        raise ValueError(f"isa must be one of {', '.join(available_isas())}, got {name!r}")


cdef int _default_threads() except -1:
    for variable in ("ROCMFORGE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0].strip()
        if text.isdigit() and 1 <= int(text) <= 4096:
            return int(text)
    return rf_cpu_online()


cdef int _start() except -1:
    global _cpu
    forced = os.environ.get("ROCMFORGE_CPU_ISA", "")
    name = forced.encode()
    if forced and not rf_cpu_isa_available(name):
        raise ImportError(f"ROCMFORGE_CPU_ISA must be one of {', '.join(available_isas())} on this "
                          f"processor, got {forced!r}")
    cdef int status
    if forced:
        status = rf_cpu_create(name, _default_threads(), &_cpu)
    else:
        status = rf_cpu_create(NULL, _default_threads(), &_cpu)
    if status != RF_OK:
        raise MemoryError("rocmforge: no memory for the CPU backend")
    return 0


_start()
