# What a HIP launch needs (src_c/include/rf/hip.h) as Cython sees it.
from libc.stdint cimport int32_t, int64_t, uint32_t

from rocmforge.ops._params cimport (
    rf_attention_params, rf_copy_params, rf_merge_params, rf_write_params)


cdef extern from "rf/hip.h" nogil:
    enum:
        RF_WAVES, RF_SPLIT_ROWS, RF_PART_TOKENS, RF_MAX_SPLITS, RF_SPLIT_STEP, RF_WRITE_LANES
        RF_MATRIX_ROWS, RF_ARRIVALS, RF_COPY_POOLS, RF_COPY_PAIRS, RF_TABLE_ENTRIES
        RF_HIP_MAX_HEAD_DIM, RF_COPY_WITHIN, RF_COPY_GATHER, RF_COPY_SCATTER
    ctypedef struct rf_divisor:
        uint32_t value
    ctypedef struct rf_attention_launch:
        rf_attention_params p
        float *partial
        float *partial_state
        uint32_t *arrivals
        rf_divisor block_size
        rf_divisor group
        rf_divisor heads
        int32_t split_rows
        int32_t max_splits
        int32_t part_tokens
        int32_t one_tile
        int32_t mask_width
    ctypedef struct rf_write_launch:
        rf_write_params p
        rf_divisor block_size
        rf_divisor heads
        int64_t num_vectors
    ctypedef struct rf_merge_launch:
        rf_merge_params p
        rf_divisor heads
        int32_t reserved
    ctypedef struct rf_copy_launch:
        rf_copy_params pools[0]
        char *dense[0]
        int64_t dense_stride
        const int32_t *pairs
        int32_t inline_pairs[0]
        int64_t num_blocks
        int32_t num_copies
        int32_t direction
    ctypedef struct rf_table_launch:
        int32_t *table
        int64_t stride
        int32_t rows
        int32_t columns
        int32_t num_entries
        int32_t reserved
        int32_t row[0]
        int32_t column[0]
        int32_t value[0]
    rf_divisor rf_divisor_of(uint32_t value)
    int32_t RF_ROWS_OF(int chunks)
    int32_t RF_TILE_ROWS(int rows)
