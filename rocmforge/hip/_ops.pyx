# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The operations of `rocmforge.ops` on HIP devices: checked, planned and launched.

Shapes, types and strides are checked as on the CPU. What index arrays hold is not: they lie on the
device and nobody waits for it; the kernels mask or skip what is out of range. Everything is
enqueued on the caller's stream, and nothing is allocated when results and workspace are given.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint32_t, uintptr_t
from libc.string cimport memset

from rocmforge.hip._array cimport DeviceArray, device_of, new_device_array, on_device
from rocmforge.hip._driver cimport (
    Device, fill_bytes, fill_words, launch, stream_handle)
from rocmforge.hip._launch cimport (
    RF_ARRIVALS, RF_COPY_GATHER, RF_COPY_PAIRS, RF_COPY_POOLS, RF_COPY_SCATTER, RF_COPY_WITHIN,
    RF_MATRIX_ROWS, RF_MAX_SPLITS, RF_PART_TOKENS, RF_ROWS_OF, RF_SPLIT_ROWS, RF_SPLIT_STEP,
    RF_TABLE_ENTRIES, RF_TILE_ROWS, RF_WAVES, RF_WRITE_LANES, rf_attention_launch, rf_copy_launch,
    rf_divisor_of, rf_merge_launch, rf_table_launch, rf_write_launch)
from rocmforge.ops cimport _cpu
from rocmforge.ops._arguments cimport (
    as_scale, read_attention, read_batch, read_blocks, read_logits, read_mask, read_merge,
    read_merged, read_write)
from rocmforge.ops._arrays cimport (
    MAX_COUNT, apart, as_bound, as_flag, as_int32s, as_vectors, bad_shape, is_nhd, same_dtype,
    shape3, shape_text, writable)
from rocmforge.ops._params cimport rf_attention_params, rf_copy_params

import ml_dtypes
import numpy as np

from rocmforge.hip._array import from_dlpack
from rocmforge.hip._driver import get_device

cnp.import_array()

cdef extern from *:
    """
    #include "rf/hip.h"
    /* Suffix of a storage type's kernels, by enum rf_dtype; NULL: not built. */
    static const char *storage_name(int dtype) {
        switch (dtype) {
    #define RF_NAME(name, code) case code: return #name;
        RF_STORAGE_INSTANCES(RF_NAME)
    #undef RF_NAME
        }
        return 0;
    }
    /* The smallest size of head that is built and fits, and its chunks a lane; 0: none. */
    static int size_for(int dim, int *chunks) {
    #define RF_FITS(size, lanes, chunks_) if (dim <= size) { *chunks = chunks_; return size; }
        RF_SIZE_INSTANCES(RF_FITS)
    #undef RF_FITS
        return 0;
    }
    /* A query of 16 bits over a cache of 8. */
    static int is_narrow(const rf_attention_params *p) {
        return p->kv_dtype >= RF_E4M3FN && p->dtype != RF_F32;
    }
    /* The smallest size of RF_MATRIX_INSTANCES that has it; 0: none. */
    static int matrix_size(const rf_attention_params *p) {
        const int wide = p->kv_dtype >= RF_E4M3FN ? is_narrow(p) : p->kv_dtype == p->dtype;
        const int whole = p->kv_dtype >= RF_E4M3FN ? 16 : 8; /* elements of 16 bytes */
        if (!wide || p->head_dim % whole || p->v_head_dim % whole) return 0;
    #define RF_FITS(name, code, size) \
        if (p->kv_dtype == code && p->head_dim <= size && p->v_head_dim <= size) return size;
        RF_MATRIX_INSTANCES(RF_FITS)
    #undef RF_FITS
        return 0;
    }
    """
    bint is_narrow(const rf_attention_params *p)
    int matrix_size(const rf_attention_params *p)
    const char *storage_name(int dtype)
    int size_for(int dim, int *chunks)

cdef cnp.dtype _F32 = np.dtype(np.float32)
cdef cnp.dtype _U8 = np.dtype(np.uint8)
cdef tuple _WIDE = (_F32, np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
cdef int _MINUS_INFINITY = <int>0xff800000
cdef int64_t _MAX_GRID = 65535  # of y and z
cdef int64_t _MAX_SPLITS = 256

# Kernel names by (head_dim, storage, 16-bit queries over 8 bits, matrix kernel's size or 0): made
# once, not at each call.
cdef dict _names = {}


# For tests and measurements.
cdef bint _by_matrix = True


def by_matrix(yes):
    """Let kernels with matrix instructions serve the calls that they can serve, or none."""
    global _by_matrix
    _by_matrix = yes


cdef int _matrix_size(rf_attention_launch *a, Device device) except -1:
    """Size of the kernel with matrix instructions that serves the call, 0 where none does:
    RF_MATRIX_INSTANCES, and strides between tokens that 16 of them keep below 2 GiB."""
    if not (_by_matrix and 0 <= a.p.k.token_stride < 1 << 25
            and 0 <= a.p.v.token_stride < 1 << 25 and device.has("matrix")):
        return 0
    return matrix_size(&a.p)


cdef tuple _kernel_of(int head_dim, int dtype, bint narrow, int matrix):
    """Family and name of the attention kernel, name of its reduction, rows of a tile."""
    key = (head_dim, dtype, narrow, matrix)
    known = _names.get(key)
    cdef int chunks = 0, size
    if known is None and matrix:
        kernel = f"paged_attention_matrix_{storage_name(dtype).decode()}_d{matrix}"
        known = "matrix", kernel, "paged_attention_matrix_reduce", RF_MATRIX_ROWS
        _names[key] = known
    elif known is None:
        size = size_for(head_dim, &chunks)
        if size == 0 or storage_name(dtype) == NULL:  # no argument that was checked gets here
            raise ValueError(f"no kernel is built for a head_dim of {head_dim}")
        rows = RF_ROWS_OF(chunks)
        kind = "narrow_" if narrow else ""
        known = ("attention", f"paged_attention_{kind}{storage_name(dtype).decode()}_d{size}",
                 f"paged_attention_reduce_r{rows}", RF_TILE_ROWS(rows))
        _names[key] = known
    return known


cdef Device _device(object x, str name):
    cdef int index = device_of(x)
    if index < 0:
        raise ValueError(f"{name} must be on a HIP device, got {type(x).__name__}")
    return get_device(index)


def to_host(x, name, stream=None):
    """Copy an array on a HIP device to a new NumPy array, and wait for it."""
    _device(x, name)
    return from_dlpack(x, stream).numpy(stream)


cdef cnp.ndarray _optional(object x, str name, Device device, size_t stream):
    return None if x is None else on_device(x, name, device, stream)


cdef object _scale(object x, str name, Device device, size_t stream):
    """A float as it is, an array of the device described."""
    if x is None or isinstance(x, (float, int)) or not hasattr(x, "__dlpack__"):
        return as_scale(x, name)
    if isinstance(x, cnp.ndarray) and (<cnp.ndarray>x).ndim == 0:
        return as_scale(x, name)
    return on_device(x, name, device, stream)


cdef int _grid(str what, int64_t x, int64_t y, int64_t z, Device device) except -1:
    """HIP's bounds: 2^32 threads along x, 65535 workgroups along y and z."""
    if x * RF_WAVES * device.wave_size > 0xffffffff or y > _MAX_GRID or z > _MAX_GRID:
        raise ValueError(f"{what}: a launch of {x} x {y} x {z} workgroups is more than HIP takes")
    return 0


# ---------------------------------------------------------------- attention

cdef struct _Plan:
    int64_t tiles
    int64_t states  # partial results of the workspace
    int64_t bytes


cdef int _plan(rf_attention_launch *a, _Plan *plan, int64_t tile_rows, int64_t max_q,
               int64_t max_len, object num_splits, bint deterministic,
               int compute_units) except -1:
    """How the work is cut: by the bounds that the caller gives, never by what lies on the device.

    With deterministic results a sequence's cuts depend on its own length alone (RF_PART_TOKENS).
    Otherwise there are about two workgroups a compute unit, and no more cuts than that takes.
    """
    cdef int64_t group = a.p.num_heads // a.p.num_kv_heads, splits, part, busy
    cdef int64_t wanted = as_bound(num_splits, "num_splits", 1)
    cdef int64_t rows = max_q * group
    if wanted > _MAX_SPLITS:
        raise ValueError(f"num_splits must be at most {_MAX_SPLITS}, got {wanted}")
    if a.p.num_tokens * group > MAX_COUNT:
        raise ValueError(f"query must have less than 2**31 rows of a key/value head, got "
                         f"{a.p.num_tokens} tokens x {group} heads")
    a.one_tile = rows <= tile_rows
    plan.tiles = a.p.num_seqs
    if not a.one_tile:
        plan.tiles += a.p.num_tokens * group // tile_rows
    a.split_rows = <int32_t>min(rows, RF_SPLIT_ROWS)
    if wanted >= 0:
        splits, part = wanted, RF_SPLIT_STEP
    elif deterministic:
        splits, part = RF_MAX_SPLITS, RF_PART_TOKENS
    else:
        busy = max(plan.tiles * a.p.num_kv_heads, 1)
        splits = min((2 * compute_units + busy - 1) // busy, _MAX_SPLITS)
        part = max((max_len + splits - 1) // splits, RF_PART_TOKENS // 2)
    a.max_splits = <int32_t>max(min(splits, (max_len + part - 1) // part), 1)
    a.part_tokens = <int32_t>min(part, MAX_COUNT)
    plan.states = 0
    if a.max_splits > 1:
        plan.states = (<int64_t>a.p.num_seqs * a.split_rows * a.p.num_kv_heads * a.max_splits)
    plan.bytes = plan.states * (a.p.v_head_dim + 2) * sizeof(float)
    return 0


# For tests and measurements: whether the last workgroup merges, wherever it can. None: see below.
cdef object _merged_by_last = None


def merge_by_last(last):
    """Let the last workgroup merge splits (True), a second kernel (False), or choose (None)."""
    global _merged_by_last
    _merged_by_last = last


cdef bint _last_merges(rf_attention_launch *a, _Plan *plan, int64_t tile_rows,
                       Device device) except -1:
    """Whether the last workgroup of a tile to end merges its splits, instead of a second kernel.

    The second kernel is a launch more, in a graph a node: 3.9 us on gfx1100 (ROCm/rocm-systems
    #10834; 2 to 5 us is what others publish). Its waves have a row each, a wave of the last
    workgroup has a quarter of the tile's, one after the other, and reads twice per row and split
    what waits for the read before: at an assumed 0.15 us, from the second-level cache. With up to
    16 such pairs a wave what is lost, at most 3.6 us, is about what is saved; with up to four
    rows nothing is lost. Where several dies have such a cache each, a fence writes it back: 28 of
    41 us in a published decode kernel (ROCm/rccl#1766 avoids it too). None of this was timed here.
    """
    if plan.tiles * a.p.num_kv_heads > RF_ARRIVALS:
        return False
    if _merged_by_last is not None:
        return _merged_by_last
    cdef int64_t turns = (min(<int64_t>a.split_rows, tile_rows) + RF_WAVES - 1) // RF_WAVES
    return device.one_die and turns * a.max_splits <= 16


cdef int64_t _longest(object bound, str name, int64_t otherwise) except -2:
    """A bound of the caller's, or what the shapes allow."""
    cdef int64_t value = as_bound(bound, name, 0)
    return otherwise if value < 0 else min(value, otherwise)


def attention_workspace_size(*, num_seqs, num_heads, num_kv_heads, head_dim, max_seq_len,
                             v_head_dim=None, max_seqlen_q=1, num_splits=None, deterministic=True,
                             device=0):
    """Bytes of the workspace that `paged_attention` needs on a HIP device.

    Parameters
    ----------
    num_seqs, num_heads, num_kv_heads, head_dim, v_head_dim : int
        Of the largest call. It is enough for smaller ones.
    max_seqlen_q, max_seq_len : int
        The bounds that the calls give. Without them `paged_attention` takes the number of query
        tokens, and block_table's width times the block size.
    num_splits, deterministic
        As the calls give them.
    device : int, str or Device
        The device: with ``deterministic=False`` its compute units decide.

    Returns
    -------
    int
        0 where contexts are not split.
    """
    cdef rf_attention_launch a
    cdef _Plan plan
    cdef int units = 1
    cdef int64_t size = 0
    numbers = {"num_seqs": num_seqs, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
               "head_dim": head_dim, "max_seqlen_q": max_seqlen_q, "max_seq_len": max_seq_len}
    for name, number in numbers.items():
        if as_bound(number, name, 1) < 0 or number > MAX_COUNT:
            raise ValueError(f"{name} must be 1 to 2**31 - 1, got {number}")
    if not deterministic and num_splits is None:
        units = get_device(device).compute_units
    a.p.num_heads, a.p.num_kv_heads = num_heads, num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and "
                         f"{num_kv_heads}")
    a.p.v_head_dim = head_dim if v_head_dim is None else v_head_dim
    calls = [(num_seqs, num_seqs * max_seqlen_q)]
    if not deterministic and num_splits is None:  # where there is less to do, it is cut finer
        calls += [(n, n) for n in range(1, min(num_seqs, 2 * units) + 1)]
    # whichever kernel the calls' types choose
    for rows in (_kernel_of(max(head_dim, a.p.v_head_dim), 0, False, 0)[3], RF_MATRIX_ROWS):
        for a.p.num_seqs, a.p.num_tokens in calls:
            _plan(&a, &plan, rows, max_seqlen_q, max_seq_len, num_splits, deterministic, units)
            size = max(size, plan.bytes)
    return size


def paged_attention(query, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q=None, *, rows=None,
                    scale=None, causal=True, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                    sinks=None, mask=None, k_scale=None, v_scale=None, kv_dtype=None,
                    max_seqlen_q=None, max_seq_len=None, num_splits=None, deterministic=True,
                    layout="HND", out=None, return_lse=False, workspace=None, stream=None):
    """`rocmforge.ops.paged_attention` on the HIP device that query is on."""
    cdef rf_attention_launch a
    cdef _Plan plan
    cdef Device device = _device(query, "query")
    cdef void *handle = stream_handle(stream)
    cdef size_t number = <uintptr_t>handle
    cdef bint nhd = is_nhd(layout), with_lse = as_flag(return_lse, "return_lse")
    cdef cnp.ndarray q = on_device(query, "query", device, number)
    cdef cnp.ndarray k = on_device(k_cache, "k_cache", device, number)
    cdef cnp.ndarray v = on_device(v_cache, "v_cache", device, number)
    cdef cnp.ndarray table = on_device(block_table, "block_table", device, number)
    cdef cnp.ndarray lens = on_device(seq_lens, "seq_lens", device, number)
    cdef cnp.ndarray cu = _optional(cu_seqlens_q, "cu_seqlens_q", device, number)
    cdef cnp.ndarray row_array = _optional(rows, "rows", device, number)
    cdef cnp.ndarray slopes = _optional(alibi_slopes, "alibi_slopes", device, number)
    cdef cnp.ndarray sink_array = _optional(sinks, "sinks", device, number)
    cdef cnp.ndarray mask_array = _optional(mask, "mask", device, number)
    cdef cnp.ndarray o, space
    cdef DeviceArray result, lse = None
    cdef int64_t mask_width, max_q, max_len, counters = RF_ARRIVALS * sizeof(uint32_t)
    cdef void *scratch = NULL
    cdef void *reduction = NULL
    memset(&a, 0, sizeof(a))
    k_scale = _scale(k_scale, "k_scale", device, number)
    v_scale = _scale(v_scale, "v_scale", device, number)
    read_attention(&a.p, q, k, v, k_scale, v_scale, nhd, kv_dtype)
    if cnp.PyArray_DIM(k, 0) == 0 and a.p.num_tokens:
        raise ValueError("k_cache must have at least one block on a HIP device, got none")
    read_batch(&a.p, table, lens, cu, row_array)
    read_logits(&a.p, scale, causal, window_size, softcap, slopes, sink_array)
    mask_width = read_mask(&a.p, mask_array)
    max_q = 1 if cu is None else a.p.num_tokens
    if mask_width >= 0:
        max_q = min(max_q, mask_width)
    max_q = max(_longest(max_seqlen_q, "max_seqlen_q", max_q), 1)
    max_len = _longest(max_seq_len, "max_seq_len",
                       min(a.p.table_width * a.p.block_size, MAX_COUNT))
    a.mask_width = <int32_t>max(mask_width, 0)
    family, kernel_name, reduction_name, tile_rows = _kernel_of(
        max(a.p.head_dim, a.p.v_head_dim), a.p.kv_dtype, is_narrow(&a.p),
        _matrix_size(&a, device))
    a.block_size = rf_divisor_of(<uint32_t>a.p.block_size)
    a.group = rf_divisor_of(<uint32_t>(a.p.num_heads // a.p.num_kv_heads))
    a.heads = rf_divisor_of(<uint32_t>a.p.num_kv_heads)
    _plan(&a, &plan, tile_rows, max_q, max_len, num_splits,
          as_flag(deterministic, "deterministic"), device.compute_units)
    _grid("paged_attention", plan.tiles * a.p.num_kv_heads, 1, a.max_splits, device)

    if workspace is not None:
        space = on_device(workspace, "workspace", device, number)
        if cnp.PyArray_NDIM(space) != 1 or cnp.PyArray_TYPE(space) != cnp.NPY_UINT8:
            raise ValueError(f"workspace must be uint8 [num_bytes], got {space.dtype} "
                             f"{shape_text(space)}")
        if cnp.PyArray_DIM(space, 0) < plan.bytes or <uintptr_t>cnp.PyArray_DATA(space) % 16:
            raise ValueError(f"workspace must have {plan.bytes} bytes at a multiple of 16 (see "
                             f"attention_workspace_size), got {cnp.PyArray_DIM(space, 0)}")
        scratch = cnp.PyArray_DATA(space)
    if out is None:
        result = new_device_array(device, (a.p.num_tokens, a.p.num_heads, a.p.v_head_dim),
                                  _WIDE[a.p.dtype])
        out, o = result, result._array
    else:
        o = on_device(out, "out", device, number)
        if not shape3(o, a.p.num_tokens, a.p.num_heads, a.p.v_head_dim):
            bad_shape(o, "out", f"[{a.p.num_tokens}, {a.p.num_heads}, {a.p.v_head_dim}]")
        same_dtype(o, "out", q, "query")
        writable(o, "out")
        for other, name in ((q, "query"), (k, "k_cache"), (v, "v_cache"), (table, "block_table"),
                            (lens, "seq_lens"), (cu, "cu_seqlens_q"), (row_array, "rows"),
                            (slopes, "alibi_slopes"), (sink_array, "sinks"), (mask_array, "mask")):
            apart(o, "out", other, name)
        result = None
    as_vectors(o, "out", &a.p.out)
    if with_lse:
        lse = new_device_array(device, (a.p.num_tokens, a.p.num_heads), _F32)
        a.p.lse = <float *>cnp.PyArray_DATA(lse._array)
    cdef void *kernel = device.kernel(family, kernel_name)
    lock = device.scratch_lock if plan.states and workspace is None else None
    if lock is not None:
        lock.acquire()
    try:
        if plan.states:
            if workspace is None:
                scratch = device.workspace(handle, counters + plan.bytes)
                if _last_merges(&a, &plan, tile_rows, device):
                    a.arrivals = <uint32_t *>scratch
                scratch = <char *>scratch + counters
            # else a second kernel merges: nobody knows what lies in a workspace of the caller's
            a.partial = <float *>scratch
            a.partial_state = a.partial + plan.states * a.p.v_head_dim
        if plan.states and a.arrivals == NULL:
            reduction = device.kernel(family, reduction_name)
        if cu is not None:  # rows of nobody: what is new must hold something
            if result is not None:
                fill_bytes(device, cnp.PyArray_DATA(o), 0, cnp.PyArray_NBYTES(o), handle)
            if with_lse:
                fill_words(device, a.p.lse, _MINUS_INFINITY, a.p.num_tokens * a.p.num_heads,
                           handle)
        if a.p.num_tokens and a.p.num_seqs:
            launch(device, kernel, plan.tiles * a.p.num_kv_heads, 1, a.max_splits, handle, &a,
                   sizeof(a))
            if reduction != NULL:
                launch(device, reduction, a.p.num_seqs, a.p.num_kv_heads,
                       (a.split_rows + RF_WAVES - 1) // RF_WAVES, handle, &a, sizeof(a))
    finally:
        if lock is not None:
            lock.release()
    return (out, lse) if with_lse else out


# ---------------------------------------------------------------- writes and merges

def write_kv(key, value, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None,
             kv_dtype=None, layout="HND", stream=None):
    """`rocmforge.ops.write_kv` on the HIP device that key is on."""
    cdef rf_write_launch a
    cdef Device device = _device(key, "key")
    cdef void *handle = stream_handle(stream)
    cdef size_t number = <uintptr_t>handle
    cdef cnp.ndarray kk = on_device(key, "key", device, number)
    cdef cnp.ndarray vv = _optional(value, "value", device, number)
    cdef cnp.ndarray k = on_device(k_cache, "k_cache", device, number)
    cdef cnp.ndarray v = _optional(v_cache, "v_cache", device, number)
    cdef cnp.ndarray slots = on_device(slot_mapping, "slot_mapping", device, number)
    cdef int64_t groups, vectors = RF_WAVES * device.wave_size // RF_WRITE_LANES
    memset(&a, 0, sizeof(a))
    k_scale = _scale(k_scale, "k_scale", device, number)
    v_scale = _scale(v_scale, "v_scale", device, number)
    read_write(&a.p, kk, vv, k, v, slots, k_scale, v_scale, is_nhd(layout), kv_dtype)
    for cache, name in ((k, "k_cache"), (v, "v_cache")):
        for other, other_name in ((kk, "key"), (vv, "value"), (slots, "slot_mapping")):
            apart(cache, name, other, other_name)
    apart(v, "v_cache", k, "k_cache")
    a.num_vectors = a.p.num_tokens * a.p.num_kv_heads * (1 if v is None else 2)
    if a.num_vectors > MAX_COUNT:
        raise ValueError(f"key must have less than 2**30 vectors (tokens x heads), got "
                         f"{shape_text(kk)}")
    a.block_size = rf_divisor_of(<uint32_t>a.p.block_size)
    a.heads = rf_divisor_of(<uint32_t>a.p.num_kv_heads)
    cdef void *kernel = device.kernel("write", f"write_kv_{storage_name(a.p.kv_dtype).decode()}")
    groups = (a.num_vectors + vectors - 1) // vectors
    if groups:
        launch(device, kernel, groups, 1, 1, handle, &a, sizeof(a))


def merge_states(out_a, lse_a, out_b, lse_b, *, out=None, lse=None, stream=None):
    """`rocmforge.ops.merge_states` on the HIP device that out_a is on."""
    cdef rf_merge_launch m
    cdef Device device = _device(out_a, "out_a")
    cdef void *handle = stream_handle(stream)
    cdef size_t number = <uintptr_t>handle
    cdef cnp.ndarray a = on_device(out_a, "out_a", device, number)
    cdef cnp.ndarray la = on_device(lse_a, "lse_a", device, number)
    cdef cnp.ndarray b = on_device(out_b, "out_b", device, number)
    cdef cnp.ndarray lb = on_device(lse_b, "lse_b", device, number)
    cdef cnp.ndarray o = _optional(out, "out", device, number)
    cdef cnp.ndarray l = _optional(lse, "lse", device, number)
    cdef DeviceArray made
    cdef int64_t total, vectors = RF_WAVES * device.wave_size // RF_WRITE_LANES
    memset(&m, 0, sizeof(m))
    read_merge(&m.p, a, la, b, lb)
    total = m.p.num_tokens * m.p.num_heads
    if total > MAX_COUNT:
        raise ValueError(f"out_a must have less than 2**31 vectors (tokens x heads), got "
                         f"{shape_text(a)}")
    if o is None:
        made = new_device_array(device, (<object>a).shape, a.dtype)
        out, o = made, made._array
    if l is None:
        made = new_device_array(device, (<object>la).shape, _F32)
        lse, l = made, made._array
    read_merged(&m.p, a, la, b, lb, o, l)
    m.heads = rf_divisor_of(<uint32_t>m.p.num_heads)
    cdef void *kernel = device.kernel("merge", "merge_states")
    if total:
        launch(device, kernel, (total + vectors - 1) // vectors, 1, 1, handle, &m, sizeof(m))
    return out, lse


# ---------------------------------------------------------------- blocks

cdef class _Pools:
    """The caches of a copy, described."""

    cdef list arrays
    cdef Device device
    cdef int64_t num_blocks, block_bytes
    cdef list offsets

    def __cinit__(self, caches, size_t stream, bint written):
        if not isinstance(caches, (list, tuple)):
            caches = (caches,)
        cdef cnp.ndarray a
        cdef rf_copy_params p
        self.arrays, self.offsets = [], []
        self.num_blocks, self.block_bytes = -1, 0
        for i, cache in enumerate(caches):
            name = f"caches[{i}]"
            if self.device is None:
                self.device = _device(cache, name)
            a = on_device(cache, name, self.device, stream)
            read_blocks(&p, a, name)
            if written:
                writable(a, name)
            if self.num_blocks < 0:
                self.num_blocks = cnp.PyArray_DIM(a, 0)
            elif cnp.PyArray_DIM(a, 0) != self.num_blocks:
                raise ValueError(f"{name} must have the {self.num_blocks} blocks of caches[0], "
                                 f"got {shape_text(a)}")
            self.arrays.append(a)
            self.offsets.append(self.block_bytes)
            self.block_bytes += p.outer * p.middle * p.inner


cdef int _run_copies(_Pools pools, int direction, const int32_t *ids, bint ids_on_device,
                     int64_t n, char *dense, int64_t stride, void *stream) except -1:
    """Launch as many copies as there are, pools and ids in as many launches as they take."""
    cdef rf_copy_launch c
    cdef int64_t first, count, begin, i, most, width = 2 if direction == RF_COPY_WITHIN else 1
    cdef int64_t unit = 16 * RF_WAVES * pools.device.wave_size, biggest, size
    cdef void *kernel = pools.device.kernel("copy", "copy_blocks")
    most = _MAX_GRID if ids_on_device else (2 * RF_COPY_PAIRS) // width
    memset(&c, 0, sizeof(c))
    c.num_blocks, c.direction, c.dense_stride = pools.num_blocks, direction, stride
    for begin in range(0, len(pools.arrays), RF_COPY_POOLS):
        count = min(RF_COPY_POOLS, len(pools.arrays) - begin)
        biggest = 0
        for i in range(count):
            read_blocks(&c.pools[i], pools.arrays[begin + i], "caches")
            size = c.pools[i].outer * c.pools[i].middle * c.pools[i].inner
            biggest = max(biggest, size)
        if biggest == 0:
            continue
        for first in range(0, n, most):
            c.num_copies = <int32_t>min(most, n - first)
            c.pairs = NULL
            if ids_on_device:
                c.pairs = ids + first * width
            else:
                for i in range(c.num_copies * width):
                    c.inline_pairs[i] = ids[first * width + i]
            for i in range(count):
                c.dense[i] = NULL
                if dense != NULL:
                    c.dense[i] = dense + first * stride + <int64_t>pools.offsets[begin + i]
            launch(pools.device, kernel, (biggest + unit - 1) // unit, c.num_copies, count, stream,
                   &c, sizeof(c))
    return 0


cdef cnp.ndarray _ids(object x, str name, Device device, size_t stream, bint *on_gpu):
    """Block ids: on the host, where they are checked and go with the launch, or on the device."""
    on_gpu[0] = not isinstance(x, cnp.ndarray)
    return on_device(x, name, device, stream) if on_gpu[0] else <cnp.ndarray>x


def copy_blocks(caches, copies, *, stream=None):
    """`rocmforge.ops.copy_blocks` on the HIP device that the caches are on.

    copies is a NumPy array, which is checked and travels with the launch, or an array on the
    device, whose pairs out of range are skipped.
    """
    cdef void *handle = stream_handle(stream)
    cdef bint on_gpu
    cdef _Pools pools = _Pools(caches, <uintptr_t>handle, True)
    if pools.device is None:
        return
    cdef cnp.ndarray pairs = _ids(copies, "copies", pools.device, <uintptr_t>handle, &on_gpu)
    if cnp.PyArray_NDIM(pairs) != 2 or cnp.PyArray_DIM(pairs, 1) != 2:
        bad_shape(pairs, "copies", "[num_copies, 2]")
    if cnp.PyArray_TYPE(pairs) != cnp.NPY_INT32 or not cnp.PyArray_ISCARRAY_RO(pairs):
        raise ValueError(f"copies must be C-contiguous int32, got {pairs.dtype} with strides "
                         f"{(<object>pairs).strides}")
    cdef int64_t n = cnp.PyArray_DIM(pairs, 0)
    cdef const int32_t *data = <const int32_t *>cnp.PyArray_DATA(pairs)
    if n and not on_gpu:
        _cpu.check_copies(data, n, pools.num_blocks)
    _run_copies(pools, RF_COPY_WITHIN, data, on_gpu, n, NULL, 0, handle)


cdef int _rows(cnp.ndarray a, str name, int64_t n, int64_t width) except -1:
    if (cnp.PyArray_NDIM(a) != 2 or cnp.PyArray_DIM(a, 0) != n or cnp.PyArray_DIM(a, 1) != width):
        bad_shape(a, name, f"[{n}, {width}]")
    if cnp.PyArray_TYPE(a) != cnp.NPY_UINT8 or (width > 1 and cnp.PyArray_STRIDE(a, 1) != 1):
        raise ValueError(f"{name} must be uint8 and contiguous in its last dimension, got "
                         f"{a.dtype} with strides {(<object>a).strides}")
    return 0


def gather_blocks(caches, block_ids, out=None, *, stream=None):
    """`rocmforge.ops.gather_blocks` on the HIP device that the caches are on."""
    cdef void *handle = stream_handle(stream)
    cdef bint on_gpu
    cdef _Pools pools = _Pools(caches, <uintptr_t>handle, False)
    cdef cnp.ndarray ids = _ids(block_ids, "block_ids", pools.device, <uintptr_t>handle, &on_gpu)
    cdef cnp.ndarray rows
    cdef DeviceArray made
    cdef const int32_t *data = as_int32s(ids, "block_ids", "[n]", -1)
    cdef int64_t n = cnp.PyArray_DIM(ids, 0)
    if n and not on_gpu:
        _cpu.check_blocks(data, n, pools.num_blocks, False)
    if out is None:
        made = new_device_array(pools.device, (n, pools.block_bytes), _U8)
        out, rows = made, made._array
    else:
        rows = on_device(out, "out", pools.device, <uintptr_t>handle)
        _rows(rows, "out", n, pools.block_bytes)
        writable(rows, "out")
        for i, a in enumerate(pools.arrays):
            apart(rows, "out", a, f"caches[{i}]")
    _run_copies(pools, RF_COPY_GATHER, data, on_gpu, n, <char *>cnp.PyArray_DATA(rows),
                cnp.PyArray_STRIDE(rows, 0), handle)
    return out


def scatter_blocks(caches, block_ids, data, *, stream=None):
    """`rocmforge.ops.scatter_blocks` on the HIP device that the caches are on."""
    cdef void *handle = stream_handle(stream)
    cdef bint on_gpu
    cdef _Pools pools = _Pools(caches, <uintptr_t>handle, True)
    cdef cnp.ndarray ids = _ids(block_ids, "block_ids", pools.device, <uintptr_t>handle, &on_gpu)
    cdef cnp.ndarray rows = on_device(data, "data", pools.device, <uintptr_t>handle)
    cdef const int32_t *indices = as_int32s(ids, "block_ids", "[n]", -1)
    cdef int64_t n = cnp.PyArray_DIM(ids, 0)
    _rows(rows, "data", n, pools.block_bytes)
    if n and not on_gpu:
        _cpu.check_blocks(indices, n, pools.num_blocks, True)
    for i, a in enumerate(pools.arrays):
        apart(a, f"caches[{i}]", rows, "data")
    _run_copies(pools, RF_COPY_SCATTER, indices, on_gpu, n, <char *>cnp.PyArray_DATA(rows),
                cnp.PyArray_STRIDE(rows, 0), handle)


def update_table(DeviceArray table not None, cnp.ndarray row not None, cnp.ndarray column not None,
                 cnp.ndarray value not None, *, stream=None):
    """Set entries of a block table on the device; the entries travel with the launches.

    Parameters
    ----------
    table : DeviceArray int32 [num_rows, max_blocks]
    row, column, value : numpy.ndarray int32 [n]
    """
    cdef rf_table_launch t
    cdef const int32_t *r = as_int32s(row, "row", "[n]", -1)
    cdef Py_ssize_t n = cnp.PyArray_DIM(row, 0), first, i
    cdef const int32_t *c = as_int32s(column, "column", "[n]", n)
    cdef const int32_t *v = as_int32s(value, "value", "[n]", n)
    if table.ndim != 2 or cnp.PyArray_TYPE(table._array) != cnp.NPY_INT32:
        raise ValueError(f"table must be int32 [num_rows, max_blocks], got {table!r}")
    cdef void *handle = stream_handle(stream)
    cdef void *kernel = table.device.kernel("copy", "table_delta")
    memset(&t, 0, sizeof(t))
    t.table = <int32_t *>cnp.PyArray_DATA(table._array)
    t.stride = cnp.PyArray_STRIDE(table._array, 0) // 4
    t.rows = <int32_t>cnp.PyArray_DIM(table._array, 0)
    t.columns = <int32_t>cnp.PyArray_DIM(table._array, 1)
    for first in range(0, n, RF_TABLE_ENTRIES):
        t.num_entries = <int32_t>min(RF_TABLE_ENTRIES, n - first)
        for i in range(t.num_entries):
            t.row[i], t.column[i], t.value[i] = r[first + i], c[first + i], v[first + i]
        launch(table.device, kernel, 1, 1, 1, handle, &t, sizeof(t))
