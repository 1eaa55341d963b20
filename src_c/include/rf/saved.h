/* A block pool and a prefix index as plain arrays, to be kept outside of the process and read
 * again.
 *
 * What is read is not trusted: every value is checked before it is used as an index, and what was
 * restored passes rf_block_pool_validate and rf_prefix_index_validate. */
#ifndef RF_SAVED_H
#define RF_SAVED_H

#include <stdint.h>

#include "rf/block_pool.h"
#include "rf/prefix_index.h"

/* The arrays of a pool. Blocks from num_touched on were never used. */
typedef struct rf_saved_pool {
    int32_t num_touched, num_free, num_kept, num_evicted;
    int32_t *ref_counts; /* [num_touched] */
    uint8_t *priorities; /* [num_touched] */
    uint16_t *pins;      /* [num_touched] */
    uint64_t *last_uses; /* [num_touched] */
    int32_t *free_ids;   /* [num_free], the one that is taken next last */
    int32_t *kept;       /* [num_kept], by priority, then the one released longest ago first */
    int32_t *evicted;    /* [num_evicted] */
    uint64_t clock, total_evictions;
} rf_saved_pool;

/* The sizes of the arrays that rf_saved_pool_fill needs, and the two counters. */
RF_API void rf_saved_pool_measure(rf_saved_pool *saved, const rf_block_pool *pool);
RF_API void rf_saved_pool_fill(rf_saved_pool *saved, const rf_block_pool *pool);

/* Brings a pool just after init to the state saved, but for RF_BLOCK_CACHED, which is the prefix
 * index's to say. RF_ERR_BAD_ARGUMENT with a sentence in *reason, and the pool is then freed. */
RF_API int rf_saved_pool_restore(const rf_saved_pool *saved, rf_block_pool *pool,
                                 const char **reason);

/* Lists the live nodes so that parents come before their children. On entry order[0 .. num_roots-1]
 * are all the roots; order has room for num_nodes and place, scratch, for next_fresh. place[node]
 * is then its place in the order. */
RF_API void rf_prefix_index_order(const rf_prefix_index *index, int32_t num_roots, int32_t *order,
                                  int32_t *place);

/* The nodes of an index, in an order in which parents come before their children. */
typedef struct rf_saved_nodes {
    int32_t num_nodes, num_roots; /* the roots are the first nodes */
    const int32_t *parents;       /* [num_nodes]; of a root RF_NO_NODE */
    const int32_t *tokens;        /* [num_nodes, block_size]; of a root not read */
    const int32_t *blocks;        /* [num_nodes, num_groups], RF_NO_BLOCK for none */
    const int32_t *uses;          /* [num_nodes] of each node by sequences; trusted */
} rf_saved_nodes;

/* Adds the nodes to an index just after init, so that they have the numbers 0 .. num_nodes-1.
 * RF_ERR_BAD_ARGUMENT with a sentence in *reason, and the index is then freed. */
RF_API int rf_saved_nodes_restore(const rf_saved_nodes *saved, rf_prefix_index *index,
                                  const int32_t *group_blocks, const char **reason);

#endif
