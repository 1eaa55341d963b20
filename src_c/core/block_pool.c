/* The free list is a stack of ids rather than a list threaded through the blocks: taking n blocks
 * is then n independent loads instead of a chain of n dependent ones. Blocks above next_fresh were
 * never used, so that a pool of a million blocks costs nothing to build. */
#include "rf/block_pool.h"

#include <string.h>

#include "require.h"
#include "rf/alloc.h"

int rf_block_pool_init(rf_block_pool *pool, int64_t num_blocks) {
    memset(pool, 0, sizeof *pool);
    pool->lru_oldest = pool->lru_newest = RF_NO_BLOCK;
    if (num_blocks < 0 || num_blocks > INT32_MAX) return RF_ERR_BAD_ARGUMENT;
    const size_t n = (size_t)num_blocks;
    pool->blocks = rf_calloc(n, sizeof *pool->blocks);
    pool->free_ids = rf_calloc(n, sizeof *pool->free_ids);
    pool->evicted = rf_calloc(n, sizeof *pool->evicted);
    if (!pool->blocks || !pool->free_ids || !pool->evicted) {
        rf_block_pool_free(pool);
        return RF_ERR_NO_MEMORY;
    }
    pool->num_blocks = (int32_t)num_blocks;
    return RF_OK;
}

void rf_block_pool_free(rf_block_pool *pool) {
    rf_free(pool->blocks);
    rf_free(pool->free_ids);
    rf_free(pool->evicted);
    memset(pool, 0, sizeof *pool);
    pool->lru_oldest = pool->lru_newest = RF_NO_BLOCK;
}

static void lru_push_newest(rf_block_pool *pool, int32_t id) {
    rf_block *b = &pool->blocks[id];
    b->prev = pool->lru_newest;
    b->next = RF_NO_BLOCK;
    if (pool->lru_newest == RF_NO_BLOCK) pool->lru_oldest = id;
    else pool->blocks[pool->lru_newest].next = id;
    pool->lru_newest = id;
    b->flags |= RF_BLOCK_KEPT;
    pool->num_kept++;
}

static void lru_unlink(rf_block_pool *pool, int32_t id) {
    rf_block *b = &pool->blocks[id];
    if (b->prev == RF_NO_BLOCK) pool->lru_oldest = b->next;
    else pool->blocks[b->prev].next = b->next;
    if (b->next == RF_NO_BLOCK) pool->lru_newest = b->prev;
    else pool->blocks[b->next].prev = b->prev;
    b->flags &= ~(uint32_t)RF_BLOCK_KEPT;
    pool->num_kept--;
}

/* The eviction policy: the kept block that was released longest ago. */
static int32_t evict(rf_block_pool *pool) {
    const int32_t id = pool->lru_oldest;
    lru_unlink(pool, id);
    if (!(pool->blocks[id].flags & RF_BLOCK_EVICTED)) {
        pool->blocks[id].flags |= RF_BLOCK_EVICTED;
        pool->evicted[pool->num_evicted++] = id;
    }
    pool->total_evictions++;
    return id;
}

int rf_block_pool_allocate(rf_block_pool *pool, int32_t n, int32_t *ids) {
    if (n < 0) return RF_ERR_BAD_ARGUMENT;
    if (n > rf_block_pool_num_available(pool)) return RF_ERR_OUT_OF_BLOCKS;
    const uint64_t now = ++pool->clock;
    for (int32_t i = 0; i < n; i++) {
        int32_t id;
        if (pool->num_recycled) id = pool->free_ids[--pool->num_recycled];
        else if (pool->next_fresh < pool->num_blocks) id = pool->next_fresh++;
        else id = evict(pool);
        pool->blocks[id].ref_count = 1;
        pool->blocks[id].last_use = now;
        ids[i] = id;
    }
    return RF_OK;
}

int rf_block_pool_ref(rf_block_pool *pool, const int32_t *ids, int32_t n, int32_t *bad) {
    for (int32_t i = 0; i < n; i++) {
        *bad = i;
        if (ids[i] < 0 || ids[i] >= pool->num_blocks) return RF_ERR_BLOCK_RANGE;
        const rf_block *b = &pool->blocks[ids[i]];
        if (b->ref_count == 0 && !(b->flags & RF_BLOCK_KEPT)) return RF_ERR_BLOCK_FREE;
        /* n more holders at most, so that a repeated id cannot overflow in the second pass */
        if (b->ref_count > INT32_MAX - n) return RF_ERR_BAD_ARGUMENT;
    }
    const uint64_t now = ++pool->clock;
    for (int32_t i = 0; i < n; i++) {
        rf_block *b = &pool->blocks[ids[i]];
        if (b->flags & RF_BLOCK_KEPT) lru_unlink(pool, ids[i]);
        b->ref_count++;
        b->last_use = now;
    }
    return RF_OK;
}

int rf_block_pool_release(rf_block_pool *pool, const int32_t *ids, int32_t n, int keep,
                          int32_t *bad) {
    int status = RF_OK;
    int32_t marked = 0;
    for (; marked < n; marked++) {
        const int32_t id = ids[marked];
        if (id < 0 || id >= pool->num_blocks) status = RF_ERR_BLOCK_RANGE;
        else if (pool->blocks[id].ref_count == 0) status = RF_ERR_BLOCK_NOT_IN_USE;
        else if (pool->blocks[id].flags & RF_BLOCK_MARKED) status = RF_ERR_BLOCK_REPEATED;
        if (status != RF_OK) break;
        pool->blocks[id].flags |= RF_BLOCK_MARKED;
    }
    if (status != RF_OK) {
        for (int32_t i = 0; i < marked; i++) {
            pool->blocks[ids[i]].flags &= ~(uint32_t)RF_BLOCK_MARKED;
        }
        *bad = marked;
        return status;
    }
    const uint64_t now = ++pool->clock;
    for (int32_t i = 0; i < n; i++) {
        rf_block *b = &pool->blocks[ids[i]];
        b->flags &= ~(uint32_t)RF_BLOCK_MARKED;
        b->last_use = now;
        if (--b->ref_count) continue;
        if (keep) lru_push_newest(pool, ids[i]);
        else pool->free_ids[pool->num_recycled++] = ids[i];
    }
    return RF_OK;
}

int32_t rf_block_pool_take_evicted(rf_block_pool *pool, int32_t *ids) {
    const int32_t n = pool->num_evicted;
    for (int32_t i = 0; i < n; i++) {
        ids[i] = pool->evicted[i];
        pool->blocks[ids[i]].flags &= ~(uint32_t)RF_BLOCK_EVICTED;
    }
    pool->num_evicted = 0;
    return n;
}

int rf_block_pool_validate(const rf_block_pool *pool, const char **reason) {
    *reason = "";
    REQUIRE(pool->next_fresh >= 0 && pool->next_fresh <= pool->num_blocks,
            "next_fresh out of range");
    int32_t used = 0, kept = 0, idle = 0, evicted = 0;
    for (int32_t id = 0; id < pool->num_blocks; id++) {
        const rf_block *b = &pool->blocks[id];
        const int is_kept = (b->flags & RF_BLOCK_KEPT) != 0;
        REQUIRE(b->ref_count >= 0, "a negative reference count");
        REQUIRE(!(b->ref_count && is_kept), "a used block on the LRU list");
        REQUIRE(!(b->flags & RF_BLOCK_MARKED), "a mark left behind by a call");
        REQUIRE(b->last_use <= pool->clock, "a block used in the future");
        REQUIRE(id < pool->next_fresh || (!b->ref_count && !is_kept), "a fresh block in use");
        used += b->ref_count > 0;
        kept += is_kept;
        idle += b->ref_count == 0 && !is_kept;
        evicted += (b->flags & RF_BLOCK_EVICTED) != 0;
    }
    REQUIRE(kept == pool->num_kept, "num_kept differs from the kept blocks");
    REQUIRE(idle == rf_block_pool_num_free(pool), "free + kept + used differs from the total");
    REQUIRE(used + kept + idle == pool->num_blocks, "free + kept + used differs from the total");
    REQUIRE(evicted == pool->num_evicted, "the list of evicted blocks differs from their flags");
    for (int32_t i = 0; i < pool->num_evicted; i++) {
        const int32_t id = pool->evicted[i];
        REQUIRE(id >= 0 && id < pool->num_blocks, "an evicted id out of range");
        REQUIRE(pool->blocks[id].flags & RF_BLOCK_EVICTED, "an evicted block without its flag");
    }
    for (int32_t i = 0; i < pool->num_recycled; i++) {
        const int32_t id = pool->free_ids[i];
        REQUIRE(id >= 0 && id < pool->next_fresh, "a free id out of range");
        REQUIRE(pool->blocks[id].ref_count == 0 && !(pool->blocks[id].flags & RF_BLOCK_KEPT),
                "a block on the free list that is used or kept");
    }
    int repeated = 0; /* the marks are taken off again: to the caller the pool is const */
    for (int32_t i = 0; i < pool->num_recycled; i++) {
        uint32_t *flags = &pool->blocks[pool->free_ids[i]].flags;
        repeated |= (*flags & RF_BLOCK_MARKED) != 0;
        *flags |= RF_BLOCK_MARKED;
    }
    for (int32_t i = 0; i < pool->num_recycled; i++) {
        pool->blocks[pool->free_ids[i]].flags &= ~(uint32_t)RF_BLOCK_MARKED;
    }
    REQUIRE(!repeated, "a block twice on the free list");
    int32_t walked = 0, prev = RF_NO_BLOCK;
    for (int32_t id = pool->lru_oldest; id != RF_NO_BLOCK; id = pool->blocks[id].next) {
        REQUIRE(id >= 0 && id < pool->num_blocks, "an LRU link out of range");
        REQUIRE(pool->blocks[id].flags & RF_BLOCK_KEPT, "a block on the LRU list that is not kept");
        REQUIRE(pool->blocks[id].prev == prev, "LRU links that disagree");
        REQUIRE(++walked <= pool->num_kept, "an LRU list longer than num_kept");
        prev = id;
    }
    REQUIRE(walked == pool->num_kept && prev == pool->lru_newest, "an LRU list cut short");
    return RF_OK;
}
