/* The prefix index: which full blocks hold which tokens, so that a new sequence can share them.
 *
 * It is a tree. A node stands for a content: the tokens of one block after the contents of its
 * ancestors, up to a root; each root is a space of its own (a salt). A node is found by comparing
 * its parent and all its tokens, never by its hash alone. A node knows for each layer group the
 * block that holds its content, if one does, and lives while anything uses it: a child, a block,
 * or a sequence whose last full block it is. So a node index names a content exactly, an evicted
 * block leaves its place in the tree to whoever computes the same tokens again, and no block is
 * ever found by what it held before.
 *
 * The hash is NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, 1999) with random keys: for any
 * two contents chosen without knowing the keys, they collide with a probability of about 2^-32, so
 * that nobody can flood a bucket. No decision depends on it, only speed.
 *
 * All memory is taken at init, and the system provides its pages as they are first used. When all
 * nodes are taken, new contents are not indexed. Not thread-safe: the caller holds a lock. */
#ifndef RF_PREFIX_INDEX_H
#define RF_PREFIX_INDEX_H

#include <stdint.h>

#include "rf/status.h"

#define RF_NO_NODE INT32_C(-1)

typedef struct rf_prefix_node {
    int32_t parent; /* RF_NO_NODE in a root; in a free node the next free one */
    int32_t next;   /* next node of the bucket, RF_NO_NODE at its end; unused in a root */
    int32_t uses;  /* children, blocks and sequences; a node other than a root dies with the last */
    uint32_t hash; /* of parent and tokens; its low bits choose the bucket */
} rf_prefix_node;

typedef struct rf_prefix_index {
    rf_prefix_node *nodes; /* [capacity] */
    int32_t *tokens;       /* [capacity, block_size] */
    int32_t *node_blocks;  /* [capacity, num_groups] block id + 1, or 0 for none */
    int32_t **block_nodes; /* [num_groups][blocks of the group] node + 1 of a block, or 0 */
    int32_t *buckets;      /* [num_buckets] first node + 1, or 0 */
    uint32_t *keys;        /* [block_size rounded up to even] NH keys */
    uint32_t num_buckets;  /* a power of two */
    uint32_t hash_mask;    /* all ones; a test sets 0 to make every hash collide */
    int32_t capacity, block_size, num_groups;
    int32_t next_fresh; /* nodes from here on were never used */
    int32_t free_node;  /* the first free node below next_fresh, or RF_NO_NODE */
    int32_t num_nodes;  /* nodes that live, roots included */
    int32_t num_blocks; /* (node, group) pairs that have a block */
} rf_prefix_index;

/* group_blocks[g] is the number of blocks of group g; seed is secret and random. Must be freed by
 * rf_prefix_index_free, also after a failure. */
RF_API int rf_prefix_index_init(rf_prefix_index *index, int32_t block_size, int32_t num_groups,
                                const int32_t *group_blocks, uint64_t seed);
RF_API void rf_prefix_index_free(rf_prefix_index *index);

/* A new root, or RF_NO_NODE when all nodes are taken. It lives until rf_prefix_index_drop_root. */
RF_API int32_t rf_prefix_index_add_root(rf_prefix_index *index);
/* Frees a root that nothing uses. */
RF_API void rf_prefix_index_drop_root(rf_prefix_index *index, int32_t root);

/* The child of a node with these tokens, or RF_NO_NODE. Expected O(block_size). */
RF_API int32_t rf_prefix_index_find(const rf_prefix_index *index, int32_t parent,
                                    const int32_t *tokens);

/* Moves one use from a node to its child with these tokens, which is made where it is not there
 * yet. Returns the child, or RF_NO_NODE when all nodes are taken, and then nothing moves. */
RF_API int32_t rf_prefix_index_step(rf_prefix_index *index, int32_t node, const int32_t *tokens);

/* As find, for n blocks of tokens in a row; returns how many nodes it found and stored. */
RF_API int32_t rf_prefix_index_walk(const rf_prefix_index *index, int32_t root,
                                    const int32_t *tokens, int32_t n, int32_t *nodes);

/* One use more or less. The last one frees the node, and its ancestors as far as nothing else
 * uses them. */
RF_API void rf_prefix_index_use(rf_prefix_index *index, int32_t node);
RF_API void rf_prefix_index_unuse(rf_prefix_index *index, int32_t node);

/* Forgets what a block holds; nothing happens to a block that is not in the index. */
RF_API void rf_prefix_index_detach(rf_prefix_index *index, int32_t group, int32_t block);

RF_API int rf_prefix_index_validate(const rf_prefix_index *index, const int32_t *group_blocks,
                                    const char **reason);

/* Says that a block holds a node's content; neither has a partner in this group. */
static inline void rf_prefix_index_attach(rf_prefix_index *index, int32_t node, int32_t group,
                                          int32_t block) {
    index->node_blocks[(int64_t)node * index->num_groups + group] = block + 1;
    index->block_nodes[group][block] = node + 1;
    index->num_blocks++;
    index->nodes[node].uses++;
}

/* The block of a node in a group, or -1. */
static inline int32_t rf_prefix_index_block(const rf_prefix_index *index, int32_t node,
                                            int32_t group) {
    return index->node_blocks[(int64_t)node * index->num_groups + group] - 1;
}

/* The node whose content a block of a group holds, or RF_NO_NODE. */
static inline int32_t rf_prefix_index_node(const rf_prefix_index *index, int32_t group,
                                           int32_t block) {
    return index->block_nodes[group][block] - 1;
}

#endif
