# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""What one step of some sequences needs: slots, lengths, block tables."""

cimport cython
cimport numpy as cnp
from cpython.list cimport PyList_CheckExact, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsUnsignedLongLong, PyLong_CheckExact
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint64_t
from libc.string cimport memcpy, memset

from rocmforge._core cimport as_int, as_int_array, rf_realloc, rf_free
from rocmforge.cache_group cimport CacheGroup

import numpy as np

cnp.import_array()

cdef cnp.ndarray NO_COPIES = np.empty((0, 2), np.int32)
cdef cnp.ndarray NO_DELTA = np.empty((0, 3), np.int32)
NO_COPIES.flags.writeable = False
NO_DELTA.flags.writeable = False


cdef cnp.ndarray sized(cnp.ndarray array, cnp.npy_intp n, int type_num):
    """The array if it has n elements already, else a new one."""
    if array is not None and cnp.PyArray_DIM(array, 0) == n:
        return array
    return cnp.PyArray_SimpleNew(1, &n, type_num)


@cython.final
cdef class BatchGroup:
    """A batch's part that differs from layer group to layer group.

    Attributes
    ----------
    slot_mapping : numpy.ndarray
        int64 ``[num_tokens]``: the slot of each new token in the group's pool.
    block_table : numpy.ndarray
        int32 ``[num_rows, max_blocks]``: kernel block ids by row; a live view, valid for the
        newest batch.
    copies : numpy.ndarray
        int32 ``[num_copies, 2]``: (source, destination) kernel blocks to copy before anything is
        written.
    table_delta : numpy.ndarray
        int32 ``[num_changes, 3]``: (row, column, kernel block id) of the entries of `block_table`
        that changed since the batch before.
    """

    def __init__(self):
        raise TypeError("a BatchGroup is made by append()")

    cdef int32_t *live_table(self) except NULL:
        if self.group.newest != self.serial:
            raise ValueError("batch: a newer one was made, and the block table is as that needs")
        return <int32_t *> cnp.PyArray_DATA(self.block_table)

    cdef tuple make_csr(self):
        cdef int64_t columns = cnp.PyArray_DIM(self.block_table, 1)
        cdef int32_t page = self.group.page_table.block_size // self.group.ratio
        cdef int32_t *rows = <int32_t *> cnp.PyArray_DATA(self.rows)
        cdef int32_t *lengths = <int32_t *> cnp.PyArray_DATA(self.seq_lens)
        cdef cnp.npy_intp i, n = cnp.PyArray_SIZE(self.rows), total = 0
        cdef int32_t pages
        cdef int32_t *table
        cdef int32_t *starts
        cdef int32_t *ids
        cdef int32_t *last
        for i in range(n):
            total += (lengths[i] + <int64_t> page - 1) // page
        if total > INT32_MAX:
            raise ValueError(f"batch: {total} block table entries are too many for int32 offsets")
        if self.csr_buffer is None or cnp.PyArray_SIZE(self.csr_buffer) < total + 2 * n + 1:
            # an eighth more, so that a batch that is given back has room for some more steps
            self.csr_buffer = sized(None, (total + 2 * n + 1) * 9 // 8, cnp.NPY_INT32)
        indptr = self.csr_buffer[:n + 1]
        last_page_len = self.csr_buffer[n + 1:2 * n + 1]
        indices = self.csr_buffer[2 * n + 1:2 * n + 1 + total]
        starts = <int32_t *> cnp.PyArray_DATA(indptr)
        ids = <int32_t *> cnp.PyArray_DATA(indices)
        last = <int32_t *> cnp.PyArray_DATA(last_page_len)
        table = self.live_table()  # behind the slices: making objects may let others in
        total = 0
        for i in range(n):
            pages = (lengths[i] - 1) // page + 1
            starts[i] = <int32_t> total
            memcpy(ids + total, table + rows[i] * columns, pages * sizeof(int32_t))
            last[i] = lengths[i] - (pages - 1) * page
            total += pages
        starts[n] = <int32_t> total
        return indptr, indices, last_page_len

    @property
    def kv_indptr(self):
        """Where each sequence's blocks start in `kv_indices`: int32 ``[num_seqs + 1]``.

        The three ``kv_`` arrays are the same table as compressed rows, in FlashInfer's convention.
        They are made when first asked for, which must be before the next batch is made.
        """
        if self.csr is None:
            self.csr = self.make_csr()
        return self.csr[0]

    @property
    def kv_indices(self):
        """The kernel block ids of all sequences, one after the other: int32 ``[nnz]``."""
        if self.csr is None:
            self.csr = self.make_csr()
        return self.csr[1]

    @property
    def kv_last_page_len(self):
        """Tokens in each sequence's last kernel block, from 1 up: int32 ``[num_seqs]``."""
        if self.csr is None:
            self.csr = self.make_csr()
        return self.csr[2]

    @property
    def num_common_blocks(self):
        """Leading kernel blocks that all sequences share, without any slot that the batch writes.

        Made when asked for, which must be before the next batch is made. Blocks that a window has
        passed count as shared.
        """
        cdef int32_t *table = self.live_table()
        cdef int32_t *rows = <int32_t *> cnp.PyArray_DATA(self.rows)
        cdef int32_t *lengths = <int32_t *> cnp.PyArray_DATA(self.seq_lens)
        cdef int32_t *starts = <int32_t *> cnp.PyArray_DATA(self.cu_seqlens_q)
        cdef int64_t columns = cnp.PyArray_DIM(self.block_table, 1), common, column
        cdef int32_t page = self.group.page_table.block_size // self.group.ratio
        cdef cnp.npy_intp i, n = cnp.PyArray_SIZE(self.rows)
        if n == 0:
            return 0
        common = (lengths[0] - starts[1]) // page
        for i in range(1, n):
            common = min(common, (lengths[i] - (starts[i + 1] - starts[i])) // page)
            column = 0
            while column < common and (
                    table[rows[i] * columns + column] == table[rows[0] * columns + column]):
                column += 1
            common = column
        return common


@cython.final
cdef class Batch:
    """What one step of some sequences needs, made by `KVCacheManager.append`.

    Its own arrays never change, unless it is given back by ``append(..., out=batch)``.

    Attributes
    ----------
    sequence_ids : numpy.ndarray
        uint64 ``[num_seqs]``, in the order given.
    rows : numpy.ndarray
        int32 ``[num_seqs]``: the row of the block tables that each sequence uses.
    seq_lens : numpy.ndarray
        int32 ``[num_seqs]``: tokens of each sequence, the new ones included.
    cu_seqlens_q : numpy.ndarray
        int32 ``[num_seqs + 1]``: where each sequence's new tokens start in the flat arrays.
    positions : numpy.ndarray
        int64 ``[num_tokens]``: the position of each new token in its sequence.
    num_tokens, max_seqlen_q, max_seq_len : int
        Number of new tokens, the most of one sequence, and the longest length.
    groups : tuple of BatchGroup
        Slots, block table and pending copies of each layer group.
    committed : bool
        Whether the batch was committed.
    """

    def __init__(self):
        raise TypeError("a Batch is made by append()")

    def __dealloc__(self):
        rf_free(self.items)

    @property
    def slot_mapping(self):
        """Slots of the new tokens in the first group, int64 ``[num_tokens]``."""
        return (<BatchGroup> self.groups[0]).slot_mapping

    @property
    def block_table(self):
        """Block table of the first group, int32 ``[num_rows, max_blocks]``; see `BatchGroup`."""
        return (<BatchGroup> self.groups[0]).block_table

    @property
    def copies(self):
        """Pending block copies of the first group, int32 ``[num_copies, 2]``."""
        return (<BatchGroup> self.groups[0]).copies

    @property
    def table_delta(self):
        """Changed entries of the first group's block table, int32 ``[num_changes, 3]``."""
        return (<BatchGroup> self.groups[0]).table_delta

    @property
    def kv_indptr(self):
        """As `BatchGroup.kv_indptr`, of the first group."""
        return self.groups[0].kv_indptr

    @property
    def kv_indices(self):
        """As `BatchGroup.kv_indices`, of the first group."""
        return self.groups[0].kv_indices

    @property
    def kv_last_page_len(self):
        """As `BatchGroup.kv_last_page_len`, of the first group."""
        return self.groups[0].kv_last_page_len

    @property
    def num_common_blocks(self):
        """As `BatchGroup.num_common_blocks`, of the first group."""
        return self.groups[0].num_common_blocks

    def __len__(self):
        return self.num_sequences

    def __repr__(self):
        return (f"Batch(num_seqs={self.num_sequences}, num_tokens={self.num_tokens}, "
                f"max_seqlen_q={self.max_seqlen_q}, max_seq_len={self.max_seq_len}, "
                f"num_copies={len(self.copies)}, committed={bool(self.committed)})")

    # ---- filling in, by append ----

    cdef int resize(self, int64_t num_sequences) except -1:
        cdef Item *items
        if num_sequences > INT32_MAX - 1:
            raise ValueError(f"sequence_ids: expected at most {INT32_MAX - 1} sequences, got "
                             f"{num_sequences}")
        self.manager = None
        if self.sequence_ids is None or num_sequences != cnp.PyArray_SIZE(self.sequence_ids):
            self.num_sequences = 0
            items = <Item *> rf_realloc(self.items, num_sequences * sizeof(Item))
            if items == NULL:
                raise MemoryError(f"no memory for a batch of {num_sequences} sequences")
            memset(items, 0, num_sequences * sizeof(Item))
            self.items = items
            self.sequence_ids = sized(None, num_sequences, cnp.NPY_UINT64)
            self.rows = sized(None, num_sequences, cnp.NPY_INT32)
            self.seq_lens = sized(None, num_sequences, cnp.NPY_INT32)
            self.cu_seqlens_q = sized(None, num_sequences + 1, cnp.NPY_INT32)
        self.num_sequences = <int32_t> num_sequences
        return 0

    cdef int read_sequences(self, object sequence_ids) except -1:
        """Copy the ids, as the caller may change theirs."""
        cdef Py_ssize_t i, n
        cdef uint64_t *ids
        cdef cnp.ndarray array
        if PyList_CheckExact(sequence_ids):
            n = PyList_GET_SIZE(sequence_ids)
            self.resize(n)
            ids = <uint64_t *> cnp.PyArray_DATA(self.sequence_ids)
            try:
                for i in range(n):
                    item = <object> PyList_GET_ITEM(sequence_ids, i)
                    if not PyLong_CheckExact(item):
                        break
                    ids[i] = PyLong_AsUnsignedLongLong(item)
                else:
                    return 0
            except OverflowError:
                pass  # as_int_array says it better
        array = as_int_array(sequence_ids, "sequence_ids", cnp.NPY_UINT64)
        n = cnp.PyArray_SIZE(array)
        self.resize(n)
        if n:
            memcpy(cnp.PyArray_DATA(self.sequence_ids), cnp.PyArray_DATA(array),
                   n * sizeof(uint64_t))
        return 0

    cdef int read_counts(self, object num_tokens) except -1:
        """Read one number of new tokens for all sequences, or one for each."""
        cdef int64_t i, count, total = 0, n = self.num_sequences
        cdef cnp.ndarray counts
        if PyLong_CheckExact(num_tokens) or (
                hasattr(num_tokens, "__index__") and np.ndim(num_tokens) == 0):
            count = as_int(num_tokens, "num_tokens", 1, INT32_MAX)
            for i in range(n):
                self.items[i].num_tokens = <int32_t> count
            total = n * count
        else:
            counts = as_int_array(num_tokens, "num_tokens", cnp.NPY_INT64)
            if cnp.PyArray_SIZE(counts) != n:
                raise ValueError(
                    f"num_tokens: expected an integer or {n} of them, got {counts.size}")
            for i in range(n):
                count = (<int64_t *> cnp.PyArray_DATA(counts))[i]
                if count < 1 or count > INT32_MAX:
                    raise ValueError(f"num_tokens[{i}]: expected 1 .. {INT32_MAX}, got {count}")
                self.items[i].num_tokens = <int32_t> count
                total += count
        if total > INT32_MAX:
            raise ValueError(f"num_tokens: expected at most {INT32_MAX} in a batch, got {total}")
        self.num_tokens = <int> total
        return 0

    cdef int make_room(self, tuple groups) except -1:
        """Arrays for the tokens, and a part for each group."""
        cdef BatchGroup part
        cdef CacheGroup group
        self.positions = sized(self.positions, self.num_tokens, cnp.NPY_INT64)
        if self.groups is None:
            parts = []
            for group in groups:
                part = BatchGroup.__new__(BatchGroup)
                part.group = group
                parts.append(part)
            self.groups = tuple(parts)
        for part in self.groups:
            part.slot_mapping = sized(part.slot_mapping, self.num_tokens, cnp.NPY_INT64)
            part.rows = self.rows
            part.seq_lens = self.seq_lens
            part.cu_seqlens_q = self.cu_seqlens_q
            part.copies = NO_COPIES
            part.table_delta = NO_DELTA
            part.csr = None
        self.committed = False
        self.written = None
        return 0


cdef Batch new_batch():
    return Batch.__new__(Batch)
