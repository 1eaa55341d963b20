# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The physical blocks: a C free list with reference counts and LRU eviction."""

cimport cython
cimport numpy as cnp
from libc.stdint cimport INT32_MAX, int32_t, int64_t

from rocmforge._core cimport (
    RF_BLOCK_KEPT, RF_ERR_BLOCK_FREE, RF_ERR_BLOCK_NOT_IN_USE, RF_ERR_BLOCK_RANGE,
    RF_ERR_BLOCK_REPEATED, RF_ERR_NO_MEMORY, RF_ERR_OUT_OF_BLOCKS, RF_OK, as_int, as_int_array,
    rf_block, rf_block_pool_allocate, rf_block_pool_free, rf_block_pool_init,
    rf_block_pool_num_available, rf_block_pool_num_free, rf_block_pool_ref, rf_block_pool_release,
    rf_block_pool_take_evicted, rf_block_pool_validate, rf_strerror)

from typing import NamedTuple

from rocmforge.errors import InvalidBlockError, OutOfBlocksError

cnp.import_array()


class PhysicalBlock(NamedTuple):
    """What the allocator knows of a block, at the time it was asked.

    A block with ``ref_count == 0`` that is not free is *kept*: nobody holds it, its contents can
    be revived by `BlockAllocator.ref` until it is evicted.

    Attributes
    ----------
    id : int
        The block.
    ref_count : int
        Its holders.
    is_free : bool
        Whether it is neither held nor kept.
    last_use : int
        The allocator's count of calls when the block was last allocated, shared or released.
    """

    id: int
    ref_count: int
    is_free: bool
    last_use: int


@cython.final
cdef class BlockAllocator:
    """Hands out the blocks ``0 .. num_blocks - 1`` and takes them back, each O(1).

    Parameters
    ----------
    num_blocks : int
        Size of the pool in blocks, from 0 up.

    Raises
    ------
    ValueError
        If `num_blocks` is negative or above 2**31 - 1.
    MemoryError
        If there is no memory for 32 bytes a block.

    Notes
    -----
    A block is free, used (somebody holds a reference) or kept (nobody does, but its contents may
    be wanted again), and ``free + kept + used == num_blocks`` always. Allocation takes free blocks
    first and then evicts kept ones, the one released longest ago first. A method that raises has
    changed nothing.
    """

    def __cinit__(self, num_blocks):
        cdef int64_t n = as_int(num_blocks, "num_blocks", 0, INT32_MAX)
        self.check(rf_block_pool_init(&self.pool, n), 0, n)

    def __dealloc__(self):
        rf_block_pool_free(&self.pool)

    cdef int check_writable(self) except -1:
        if self.read_only:
            raise ValueError("this allocator belongs to a cache and is read-only")
        return 0

    cdef int check(self, int status, int32_t block_id, int64_t requested) except -1:
        if status == RF_OK:
            return 0
        if status == RF_ERR_OUT_OF_BLOCKS:
            raise OutOfBlocksError(requested, rf_block_pool_num_available(&self.pool))
        if status == RF_ERR_NO_MEMORY:
            raise MemoryError(f"no memory for the metadata of {requested} blocks")
        if status == RF_ERR_BLOCK_RANGE:
            raise InvalidBlockError(
                f"block {block_id}: expected 0 .. {self.pool.num_blocks - 1}")
        if status == RF_ERR_BLOCK_NOT_IN_USE:
            raise InvalidBlockError(
                f"block {block_id} is not in use: freed twice, or never allocated")
        if status == RF_ERR_BLOCK_FREE:
            raise InvalidBlockError(f"block {block_id} is free: it has no contents to share")
        if status == RF_ERR_BLOCK_REPEATED:
            raise InvalidBlockError(f"block {block_id} is named twice in one call")
        raise ValueError(rf_strerror(status).decode())

    @property
    def num_blocks(self):
        """Size of the pool in blocks."""
        return self.pool.num_blocks

    @property
    def num_kept(self):
        """Blocks that nobody holds and whose contents are kept."""
        return self.pool.num_kept

    def get_free_count(self):
        """Blocks that are free: an allocation can have these and the kept ones."""
        return rf_block_pool_num_free(&self.pool)

    def allocate_block(self):
        """Take a block, with one reference, and return its id.

        Raises
        ------
        OutOfBlocksError
            If no block is free or kept.
        """
        cdef int32_t block_id
        self.check_writable()
        self.check(rf_block_pool_allocate(&self.pool, 1, &block_id), 0, 1)
        return block_id

    def allocate_blocks(self, n):
        """Take `n` blocks, each with one reference; all or none.

        Returns
        -------
        numpy.ndarray
            int32 ``[n]``: the ids.

        Raises
        ------
        OutOfBlocksError
            If fewer than `n` blocks are free or kept.
        ValueError
            If `n` is negative.
        """
        self.check_writable()
        cdef cnp.npy_intp count = as_int(n, "n", 0, INT32_MAX)
        if count > rf_block_pool_num_available(&self.pool):
            self.check(RF_ERR_OUT_OF_BLOCKS, 0, count)
        cdef cnp.ndarray ids = cnp.PyArray_SimpleNew(1, &count, cnp.NPY_INT32)
        self.check(rf_block_pool_allocate(&self.pool, <int32_t> count,
                                          <int32_t *> cnp.PyArray_DATA(ids)), 0, count)
        return ids

    def ref(self, block_id):
        """Add a reference to a used block, or revive a kept one.

        Raises
        ------
        InvalidBlockError
            If the id is out of range or the block is free.
        """
        cdef int32_t bad, block = self.as_block_id(block_id)
        self.check_writable()
        self.check(rf_block_pool_ref(&self.pool, &block, 1, &bad), block, 1)

    def deallocate_block(self, block_id, keep=False):
        """Drop a reference of a block.

        Parameters
        ----------
        block_id : int
            A block in use.
        keep : bool
            Keep the contents of a block that nobody holds any longer: it goes to the recent end
            of the LRU list, where `ref` can revive it until it is evicted.

        Raises
        ------
        InvalidBlockError
            If the id is out of range or the block is not in use (a double free).
        """
        cdef int32_t bad, block = self.as_block_id(block_id)
        cdef bint keeps = keep
        self.check_writable()
        self.check(rf_block_pool_release(&self.pool, &block, 1, keeps, &bad), block, 1)

    def deallocate_blocks(self, block_ids, keep=False):
        """Drop a reference of each of several blocks, in order; all or none.

        Parameters
        ----------
        block_ids : sequence of int or integer array ``[n]``
            Different blocks in use. With `keep`, the first becomes the oldest of the kept.
        keep : bool
            As in `deallocate_block`.

        Raises
        ------
        InvalidBlockError
            If an id is out of range, not in use, or named twice.
        """
        self.check_writable()
        cdef bint keeps = keep
        cdef cnp.ndarray wide
        try:
            wide = as_int_array(block_ids, "block_ids", cnp.NPY_INT32)
        except ValueError as error:
            raise InvalidBlockError(str(error)) from None
        cdef const int32_t *ids = <const int32_t *> cnp.PyArray_DATA(wide)
        cdef Py_ssize_t n = cnp.PyArray_SIZE(wide)
        cdef int32_t bad = 0
        cdef int status
        if n > self.pool.num_blocks:  # more ids than blocks: one of the first num_blocks + 1 is bad
            n = self.pool.num_blocks + 1
        status = rf_block_pool_release(&self.pool, ids, <int32_t> n, keeps, &bad)
        self.check(status, ids[bad] if n else 0, n)

    def take_evicted(self):
        """The blocks whose kept contents were given up since the last call, each once.

        Returns
        -------
        numpy.ndarray
            int32 ``[n]``, in the order of their (first) eviction.
        """
        self.check_writable()
        cdef cnp.npy_intp n = self.pool.num_evicted
        cdef cnp.ndarray ids = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_INT32)
        rf_block_pool_take_evicted(&self.pool, <int32_t *> cnp.PyArray_DATA(ids))
        return ids

    def get_block(self, block_id):
        """What is known of a block, as a `PhysicalBlock`.

        Raises
        ------
        InvalidBlockError
            If the id is out of range.
        """
        cdef int32_t block = self.as_block_id(block_id)
        if block < 0 or block >= self.pool.num_blocks:
            self.check(RF_ERR_BLOCK_RANGE, block, 1)
        cdef rf_block *b = &self.pool.blocks[block]
        return PhysicalBlock(block, b.ref_count,
                             b.ref_count == 0 and not b.flags & RF_BLOCK_KEPT, b.last_use)

    cdef int32_t as_block_id(self, object block_id) except? -2:
        try:
            return <int32_t> as_int(block_id, "block_id", -INT32_MAX - 1, INT32_MAX)
        except ValueError as error:
            raise InvalidBlockError(str(error)) from None

    def check_integrity(self):
        """Prove free + kept + used == num_blocks and that the lists agree, in O(num_blocks).

        Raises
        ------
        AssertionError
            With a sentence, if a structure is corrupt.
        """
        cdef const char *reason
        if rf_block_pool_validate(&self.pool, &reason) != RF_OK:
            raise AssertionError(reason.decode())

    def __reduce__(self):
        from rocmforge.saved_state import dump_allocator, load_allocator
        return load_allocator, dump_allocator(self)

    def __len__(self):
        return self.pool.num_blocks

    def __repr__(self):
        cdef int32_t num_free = rf_block_pool_num_free(&self.pool)
        return (f"BlockAllocator(num_blocks={self.pool.num_blocks}, free={num_free}, "
                f"kept={self.pool.num_kept}, "
                f"used={self.pool.num_blocks - num_free - self.pool.num_kept})")
