#include "rf/saved.h"

#include <string.h>

#include "require.h"

void rf_saved_pool_measure(rf_saved_pool *saved, const rf_block_pool *pool) {
    memset(saved, 0, sizeof *saved);
    saved->num_touched = pool->next_fresh;
    saved->num_free = pool->num_recycled;
    saved->num_kept = pool->num_kept;
    saved->num_evicted = pool->num_evicted;
    saved->clock = pool->clock;
    saved->total_evictions = pool->total_evictions;
}

void rf_saved_pool_fill(rf_saved_pool *saved, const rf_block_pool *pool) {
    for (int32_t id = 0; id < saved->num_touched; id++) {
        const rf_block *const b = &pool->blocks[id];
        saved->ref_counts[id] = b->ref_count;
        saved->priorities[id] = b->priority;
        saved->pins[id] = b->pins;
        saved->last_uses[id] = b->last_use;
    }
    for (int32_t i = 0; i < saved->num_free; i++) saved->free_ids[i] = pool->free_ids[i];
    for (int32_t i = 0; i < saved->num_evicted; i++) saved->evicted[i] = pool->evicted[i];
    int32_t n = 0;
    for (int p = 0; p < RF_NUM_PRIORITIES; p++) {
        for (int32_t id = pool->lru_oldest[p]; id != RF_NO_BLOCK; id = pool->blocks[id].next)
            saved->kept[n++] = id;
    }
}

/* Whether an id may be put on a list: it was used once, nobody holds it, and it is on none yet. */
static int is_idle(const rf_block_pool *pool, int32_t id) {
    return id >= 0 && id < pool->next_fresh && pool->blocks[id].ref_count == 0 &&
           !(pool->blocks[id].flags & (RF_BLOCK_MARKED | RF_BLOCK_KEPT));
}

static int restore_pool(const rf_saved_pool *saved, rf_block_pool *pool, const char **reason) {
    const int32_t touched = saved->num_touched;
    REQUIRE(touched >= 0 && touched <= pool->num_blocks, "more blocks than the pool has");
    REQUIRE(saved->num_free >= 0 && saved->num_free <= touched, "more free blocks than blocks");
    REQUIRE(saved->num_kept >= 0 && saved->num_kept <= touched, "more kept blocks than blocks");
    REQUIRE(saved->num_evicted >= 0 && saved->num_evicted <= touched,
            "more evicted blocks than blocks");
    REQUIRE(saved->clock <= INT64_MAX && saved->total_evictions <= INT64_MAX,
            "a counter out of range");
    pool->next_fresh = touched;
    int32_t used = 0;
    for (int32_t id = 0; id < touched; id++) {
        rf_block *const b = &pool->blocks[id];
        REQUIRE(saved->ref_counts[id] >= 0, "a negative reference count");
        REQUIRE(saved->priorities[id] < RF_NUM_PRIORITIES, "a priority out of range");
        REQUIRE(saved->pins[id] <= saved->ref_counts[id], "more pins than holders");
        REQUIRE(saved->last_uses[id] <= saved->clock, "a block used in the future");
        b->ref_count = saved->ref_counts[id];
        b->priority = saved->priorities[id];
        b->pins = saved->pins[id];
        used += b->ref_count > 0;
        pool->num_pinned += b->pins > 0;
    }
    for (int32_t i = 0; i < saved->num_free; i++) {
        const int32_t id = saved->free_ids[i];
        REQUIRE(is_idle(pool, id), "a free block out of range, in use, or free twice");
        pool->blocks[id].flags |= RF_BLOCK_MARKED;
        pool->free_ids[pool->num_recycled++] = id;
    }
    for (int32_t i = 0; i < saved->num_kept; i++) {
        const int32_t id = saved->kept[i];
        REQUIRE(is_idle(pool, id), "a kept block out of range, in use, free, or kept twice");
        pool->blocks[id].ref_count = 1;
        rf_block_pool_drop(pool, &id, 1, RF_KEEP_ALL, 0);
    }
    REQUIRE((int64_t)used + saved->num_free + saved->num_kept == touched,
            "free + kept + used differs from the total");
    for (int32_t i = 0; i < saved->num_free; i++) {
        pool->blocks[saved->free_ids[i]].flags &= (uint8_t)~RF_BLOCK_MARKED;
    }
    for (int32_t i = 0; i < saved->num_evicted; i++) {
        const int32_t id = saved->evicted[i];
        REQUIRE(id >= 0 && id < touched, "an evicted block out of range");
        REQUIRE(!(pool->blocks[id].flags & RF_BLOCK_EVICTED), "a block evicted twice");
        pool->blocks[id].flags |= RF_BLOCK_EVICTED;
        pool->evicted[pool->num_evicted++] = id;
    }
    for (int32_t id = 0; id < touched; id++) pool->blocks[id].last_use = saved->last_uses[id];
    pool->clock = saved->clock;
    pool->total_evictions = saved->total_evictions;
    return RF_OK;
}

int rf_saved_pool_restore(const rf_saved_pool *saved, rf_block_pool *pool, const char **reason) {
    const int status = restore_pool(saved, pool, reason);
    if (status != RF_OK) rf_block_pool_free(pool);
    return status;
}

void rf_prefix_index_order(const rf_prefix_index *index, int32_t num_roots, int32_t *order,
                           int32_t *place) {
    int32_t n = num_roots;
    memset(place, 0xff, (size_t)index->next_fresh * sizeof *place);
    for (int32_t i = 0; i < num_roots; i++) place[order[i]] = i;
    for (int32_t node = 0; node < index->next_fresh; node++) {
        if (index->nodes[node].uses == 0) continue; /* free: a root without uses is listed */
        int32_t depth = 0;
        for (int32_t up = node; place[up] < 0; up = index->nodes[up].parent) depth++;
        for (int32_t up = node; depth; up = index->nodes[up].parent) {
            place[up] = n + --depth;
            order[place[up]] = up;
        }
        if (place[node] >= n) n = place[node] + 1;
    }
}

static int restore_nodes(const rf_saved_nodes *saved, rf_prefix_index *index,
                         const int32_t *group_blocks, const char **reason) {
    const int32_t n = saved->num_nodes;
    REQUIRE(n >= 0 && n <= index->capacity, "more nodes than the prefix index has");
    REQUIRE(saved->num_roots >= 0 && saved->num_roots <= n, "more roots than nodes");
    for (int32_t i = 0; i < n; i++) {
        const int32_t parent = saved->parents[i];
        if (i < saved->num_roots) {
            REQUIRE(parent == RF_NO_NODE, "a root with a parent");
            rf_prefix_index_add_root(index);
        } else {
            REQUIRE(parent >= 0 && parent < i, "a node before its parent, or without one");
            const int32_t *const tokens = saved->tokens + (int64_t)i * index->block_size;
            rf_prefix_index_use(index, parent); /* which a new child takes over */
            const int32_t before = index->num_nodes;
            const int32_t node = rf_prefix_index_step(index, parent, tokens);
            REQUIRE(node == i && index->num_nodes > before, "the same content twice");
            index->nodes[node].uses--; /* the use that was moved; it has its own below */
        }
        REQUIRE(saved->uses[i] >= 0, "a negative number of uses");
        index->nodes[i].uses += saved->uses[i];
        for (int32_t g = 0; g < index->num_groups; g++) {
            const int32_t block = saved->blocks[(int64_t)i * index->num_groups + g];
            if (block == RF_NO_BLOCK) continue;
            REQUIRE(i >= saved->num_roots, "a block of a root");
            REQUIRE(block >= 0 && block < group_blocks[g], "the block of a node out of range");
            REQUIRE(rf_prefix_index_node(index, g, block) == RF_NO_NODE, "a block of two nodes");
            rf_prefix_index_attach(index, i, g, block);
        }
    }
    for (int32_t i = saved->num_roots; i < n; i++) {
        REQUIRE(index->nodes[i].uses > 0, "a node that nothing uses");
    }
    return RF_OK;
}

int rf_saved_nodes_restore(const rf_saved_nodes *saved, rf_prefix_index *index,
                           const int32_t *group_blocks, const char **reason) {
    const int status = restore_nodes(saved, index, group_blocks, reason);
    if (status != RF_OK) rf_prefix_index_free(index);
    return status;
}
