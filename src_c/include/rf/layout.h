/* How keys and values lie in memory: shared by the CPU and the HIP kernels. */
#ifndef RF_LAYOUT_H
#define RF_LAYOUT_H

#include <assert.h>
#include <stdint.h>

enum rf_dtype {
    RF_F32 = 0,
    RF_F16 = 1,
    RF_BF16 = 2,
    RF_NUM_DTYPES = 3,
};

/* Keys or values of one layer in the block pool. The vector of token offset t, head h in block b
 * starts at data + b * block_stride + h * head_stride + t * token_stride and is contiguous. Strides
 * count elements, not bytes. HND and NHD, and views into other engines' caches, differ only in
 * them. */
typedef struct rf_paged {
    void *data;
    int64_t block_stride;
    int64_t head_stride;
    int64_t token_stride;
} rf_paged;
static_assert(sizeof(rf_paged) == 32, "rf_paged is shared with device code");

/* Vectors of tokens outside the pool: query, key, value, output. */
typedef struct rf_rows {
    void *data;
    int64_t token_stride; /* elements */
    int64_t head_stride;  /* elements */
} rf_rows;
static_assert(sizeof(rf_rows) == 24, "rf_rows is shared with device code");

#endif
