/* How keys and values lie in memory: shared by the CPU and the HIP kernels. */
#ifndef RF_LAYOUT_H
#define RF_LAYOUT_H

#ifndef __cplusplus
#include <assert.h>
#endif
#include <stdint.h>

/* The first three hold queries, keys and values; all of them can be a cache's. An 8-bit element
 * stands for its value times a scale (rf_scales). */
enum rf_dtype {
    RF_F32 = 0,
    RF_F16 = 1,
    RF_BF16 = 2,
    RF_E4M3FN = 3,   /* float8: bias 7, largest 448, NaN 0x7f and 0xff, no infinity */
    RF_E4M3FNUZ = 4, /* float8: bias 8, largest 240, NaN 0x80, neither infinity nor -0 */
    RF_I8 = 5,       /* -127 .. 127 */
    RF_NUM_DTYPES = 6,
    RF_NUM_WIDE_DTYPES = 3, /* those of queries and outputs */
};

/* Factors of an 8-bit cache's elements. The one of token offset t, head h in block b is
 * data[b * block_stride + h * head_stride + t * token_stride], or `value` where data is NULL: one
 * number, one a head (block and token stride 0), or a pool that has one a block, head and token. */
typedef struct rf_scales {
    float *data;
    int64_t block_stride; /* floats */
    int64_t head_stride;
    int64_t token_stride;
    float value;
    int32_t per_token; /* 1: a pool, which a write fills; 0: given, and only read */
} rf_scales;
static_assert(sizeof(rf_scales) == 40, "rf_scales is shared with device code");

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
