/* Status codes of the C libraries: 0 is success, every failure is negative, spaced by group. */
#ifndef RF_STATUS_H
#define RF_STATUS_H

#if defined(RF_BUILDING_CORE)
#define RF_API __attribute__((visibility("default")))
#else
#define RF_API
#endif

enum rf_status {
    RF_OK = 0,

    /* resources */
    RF_ERR_NO_MEMORY = -1,     /* the host allocator gave nothing */
    RF_ERR_OUT_OF_BLOCKS = -2, /* the pool has fewer free and kept blocks than asked for */

    /* arguments */
    RF_ERR_BAD_ARGUMENT = -20,     /* a size or count out of its range */
    RF_ERR_BLOCK_RANGE = -21,      /* a block id outside 0 .. num_blocks - 1 */
    RF_ERR_BLOCK_NOT_IN_USE = -22, /* a block nobody holds: a double free, or never allocated */
    RF_ERR_BLOCK_FREE = -23,       /* a block without contents to share */
    RF_ERR_BLOCK_REPEATED = -24,   /* one call releases a block twice, held twice or not */
};

/* A sentence for a status; never NULL. */
RF_API const char *rf_strerror(int status);

#endif
