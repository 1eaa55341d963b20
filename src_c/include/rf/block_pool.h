/* The physical blocks: which are free, who holds how many references, which are kept for reuse.
 *
 * A block is in one of three states:
 *   free   nobody holds it and its contents are worthless
 *   used   ref_count > 0
 *   kept   nobody holds it, but its contents may be wanted again: on an LRU list, oldest first
 * and free + kept + used == num_blocks at all times. Allocation takes free blocks first and then
 * evicts kept ones: of the lowest priority there is, the one released longest ago. This file and
 * block_pool.c are the only place that decides which.
 *
 * Every operation is O(1) a block. A call that fails leaves the pool and its outputs untouched.
 * No operation allocates memory after init. Not thread-safe: the caller holds a lock.
 * Decisions depend on the calls made and on nothing else: last_use counts calls, it is no time. */
#ifndef RF_BLOCK_POOL_H
#define RF_BLOCK_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "rf/status.h"

#define RF_NO_BLOCK       INT32_C(-1)
#define RF_NUM_PRIORITIES 8 /* an LRU list each */

enum {
    RF_BLOCK_KEPT = 1u,    /* on an LRU list */
    RF_BLOCK_EVICTED = 2u, /* listed in `evicted` already */
    RF_BLOCK_MARKED = 4u,  /* seen by the running call; never set between calls */
    RF_BLOCK_CACHED = 8u,  /* in the prefix index: worth keeping when nobody holds it */
};

/* What becomes of a block that nobody holds any longer. */
enum rf_keep {
    RF_KEEP_NONE = 0,   /* it is free */
    RF_KEEP_ALL = 1,    /* it is kept */
    RF_KEEP_CACHED = 2, /* it is kept if RF_BLOCK_CACHED says so */
};

typedef struct rf_block {
    int32_t ref_count; /* holders; 0 when free or kept */
    int32_t prev;      /* older neighbour on its LRU list; meaningful only while kept */
    int32_t next;      /* newer neighbour, likewise */
    uint8_t flags;     /* RF_BLOCK_... */
    uint8_t priority;  /* the highest it was released with since it was allocated */
    uint16_t pins;     /* holders that are pins of a prefix; part of ref_count */
    uint64_t last_use; /* the pool's clock when last allocated, shared or released; 0 is never */
} rf_block;

typedef struct rf_block_pool {
    rf_block *blocks;     /* [num_blocks], zeroed lazily by the operating system */
    int32_t *free_ids;    /* [num_blocks], a stack of blocks that were used and are free again */
    int32_t *evicted;     /* [num_blocks], blocks evicted since the last take, each once */
    int32_t num_blocks;   /* fixed for life */
    int32_t num_recycled; /* height of free_ids */
    int32_t next_fresh;   /* blocks from here on were never used: they need no list */
    int32_t num_kept;     /* length of all LRU lists */
    int32_t num_pinned;   /* blocks with pins */
    int32_t num_evicted;  /* filled part of evicted */
    int32_t lru_oldest[RF_NUM_PRIORITIES]; /* ends of a list, RF_NO_BLOCK when it is empty */
    int32_t lru_newest[RF_NUM_PRIORITIES];
    uint64_t clock;           /* counts calls that use blocks */
    uint64_t total_evictions; /* for statistics */
} rf_block_pool;

/* num_blocks is 0 .. INT32_MAX. rf_block_pool_free must follow, also after a failure. */
RF_API int rf_block_pool_init(rf_block_pool *pool, int64_t num_blocks);
RF_API void rf_block_pool_free(rf_block_pool *pool);

/* Takes n blocks, each with one reference. RF_ERR_OUT_OF_BLOCKS when free + kept < n. */
RF_API int rf_block_pool_allocate(rf_block_pool *pool, int32_t n, int32_t *ids);

/* Adds a reference to a used block, or revives a kept one. *bad indexes the first offender. */
RF_API int rf_block_pool_ref(rf_block_pool *pool, const int32_t *ids, int32_t n, int32_t *bad);

/* Drops a reference of each block, in the order given. One that nobody holds any longer becomes
 * free, or the newest of the kept with its priority, as keep (enum rf_keep) says. *bad is the index
 * of the first offender: out of range, not in use, or the second occurrence of an id in this call.
 */
RF_API int rf_block_pool_release(rf_block_pool *pool, const int32_t *ids, int32_t n, int keep,
                                 int32_t *bad);

/* As ref, for one block that is known to be used or kept. */
RF_API void rf_block_pool_hold(rf_block_pool *pool, int32_t id);

/* As release, for blocks that the caller knows it holds, from the last to the first, so that with
 * RF_KEEP_CACHED the tail of a sequence is evicted before its head. Negative ids are skipped. Their
 * priority rises to the one given, 0 .. RF_NUM_PRIORITIES - 1. */
RF_API void rf_block_pool_drop(rf_block_pool *pool, const int32_t *ids, int32_t n, int keep,
                               int priority);

/* Makes a kept block free: its contents are no longer wanted. */
RF_API void rf_block_pool_forget(rf_block_pool *pool, int32_t id);

/* Holds a used or kept block by a pin, and drops that again. At most 65535 pins a block. */
RF_API void rf_block_pool_pin(rf_block_pool *pool, int32_t id);
RF_API void rf_block_pool_unpin(rf_block_pool *pool, int32_t id);

/* Moves the list of evicted blocks to ids, which has room for num_evicted; returns their number. */
RF_API int32_t rf_block_pool_take_evicted(rf_block_pool *pool, int32_t *ids);

/* RF_OK, or RF_ERR_BAD_ARGUMENT with a sentence in *reason. O(num_blocks), every walk bounded. */
RF_API int rf_block_pool_validate(const rf_block_pool *pool, const char **reason);

/* Blocks on the free list or never used. */
static inline int32_t rf_block_pool_num_free(const rf_block_pool *pool) {
    return pool->num_recycled + (pool->num_blocks - pool->next_fresh);
}

/* What an allocation can have at most. */
static inline int32_t rf_block_pool_num_available(const rf_block_pool *pool) {
    return rf_block_pool_num_free(pool) + pool->num_kept;
}

#endif
