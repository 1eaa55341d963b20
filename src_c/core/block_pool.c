/* The free list is a stack of ids rather than a list threaded through the blocks: taking n blocks
 * is then n independent loads instead of a chain of n dependent ones. Blocks above next_fresh were
 * never used, so that a pool of a million blocks costs nothing to build. */
#include "rf/block_pool.h"

#include <string.h>

#include "require.h"
#include "rf/alloc.h"

/* A pool of nothing. */
static void clear(rf_block_pool *pool) {
    memset(pool, 0, sizeof *pool);
    for (int p = 0; p < RF_NUM_PRIORITIES; p++) {
        pool->lru_oldest[p] = pool->lru_newest[p] = RF_NO_BLOCK;
    }
}

int rf_block_pool_init(rf_block_pool *pool, int64_t num_blocks) {
    clear(pool);
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
    clear(pool);
}

static void lru_push_newest(rf_block_pool *pool, int32_t id) {
    rf_block *b = &pool->blocks[id];
    const int p = b->priority;
    b->prev = pool->lru_newest[p];
    b->next = RF_NO_BLOCK;
    if (b->prev == RF_NO_BLOCK) pool->lru_oldest[p] = id;
    else pool->blocks[b->prev].next = id;
    pool->lru_newest[p] = id;
    b->flags |= RF_BLOCK_KEPT;
    pool->num_kept++;
}

static void lru_unlink(rf_block_pool *pool, int32_t id) {
    rf_block *b = &pool->blocks[id];
    const int p = b->priority;
    if (b->prev == RF_NO_BLOCK) pool->lru_oldest[p] = b->next;
    else pool->blocks[b->prev].next = b->next;
    if (b->next == RF_NO_BLOCK) pool->lru_newest[p] = b->prev;
    else pool->blocks[b->next].prev = b->prev;
    b->flags &= (uint8_t)~RF_BLOCK_KEPT;
    pool->num_kept--;
}

/* The eviction policy: of the lowest priority, the kept block that was released longest ago. */
static int32_t evict(rf_block_pool *pool) {
    int p = 0;
    while (pool->lru_oldest[p] == RF_NO_BLOCK) p++;
    const int32_t id = pool->lru_oldest[p];
    lru_unlink(pool, id);
    if (!(pool->blocks[id].flags & RF_BLOCK_EVICTED)) {
        pool->blocks[id].flags |= RF_BLOCK_EVICTED;
        pool->evicted[pool->num_evicted++] = id;
    }
    pool->total_evictions++;
    return id;
}

/* A reference less; with the last one the block becomes free or kept. */
static inline void drop_one(rf_block_pool *pool, int32_t id, int keep, uint64_t now) {
    rf_block *b = &pool->blocks[id];
    b->last_use = now;
    if (--b->ref_count) return;
    if (keep == RF_KEEP_ALL || (keep == RF_KEEP_CACHED && (b->flags & RF_BLOCK_CACHED))) {
        lru_push_newest(pool, id);
    } else {
        pool->free_ids[pool->num_recycled++] = id;
    }
}

static inline int32_t hand_out(rf_block_pool *pool, int32_t id, uint64_t now) {
    rf_block *b = &pool->blocks[id];
    b->ref_count = 1;
    b->last_use = now;
    b->priority = 0;
    b->flags &= RF_BLOCK_EVICTED;
    return id;
}

int rf_block_pool_allocate(rf_block_pool *pool, int32_t n, int32_t *ids) {
    if (n < 0) return RF_ERR_BAD_ARGUMENT;
    if (n > rf_block_pool_num_available(pool)) return RF_ERR_OUT_OF_BLOCKS;
    const uint64_t now = ++pool->clock;
    int32_t i = 0;
    const int32_t recycled = n < pool->num_recycled ? n : pool->num_recycled;
    const int32_t *top = pool->free_ids + pool->num_recycled;
    pool->num_recycled -= recycled;
    for (; i < recycled; i++) ids[i] = hand_out(pool, *--top, now);
    for (; i < n && pool->next_fresh < pool->num_blocks; i++) {
        ids[i] = hand_out(pool, pool->next_fresh++, now);
    }
    for (; i < n; i++) ids[i] = hand_out(pool, evict(pool), now);
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
    const uint32_t num_blocks = (uint32_t)pool->num_blocks;
    int32_t marked = 0;
    for (; marked < n && (uint32_t)ids[marked] < num_blocks; marked++) {
        rf_block *b = &pool->blocks[ids[marked]];
        if (b->ref_count == 0 || b->flags & RF_BLOCK_MARKED) break;
        b->flags |= RF_BLOCK_MARKED;
    }
    if (marked < n) {
        int status = RF_ERR_BLOCK_REPEATED;
        if ((uint32_t)ids[marked] >= num_blocks) status = RF_ERR_BLOCK_RANGE;
        else if (pool->blocks[ids[marked]].ref_count == 0) status = RF_ERR_BLOCK_NOT_IN_USE;
        for (int32_t i = 0; i < marked; i++) {
            pool->blocks[ids[i]].flags &= (uint8_t)~RF_BLOCK_MARKED;
        }
        *bad = marked;
        return status;
    }
    const uint64_t now = ++pool->clock;
    for (int32_t i = 0; i < n; i++) {
        pool->blocks[ids[i]].flags &= (uint8_t)~RF_BLOCK_MARKED;
        drop_one(pool, ids[i], keep, now);
    }
    return RF_OK;
}

void rf_block_pool_hold(rf_block_pool *pool, int32_t id) {
    rf_block *b = &pool->blocks[id];
    if (b->flags & RF_BLOCK_KEPT) lru_unlink(pool, id);
    b->ref_count++;
    b->last_use = ++pool->clock;
}

void rf_block_pool_drop(rf_block_pool *pool, const int32_t *ids, int32_t n, int keep,
                        int priority) {
    const uint64_t now = ++pool->clock;
    for (int32_t i = n - 1; i >= 0; i--) {
        if (ids[i] < 0) continue;
        rf_block *b = &pool->blocks[ids[i]];
        if (b->priority < priority) b->priority = (uint8_t)priority;
        drop_one(pool, ids[i], keep, now);
    }
}

void rf_block_pool_forget(rf_block_pool *pool, int32_t id) {
    lru_unlink(pool, id);
    pool->blocks[id].flags &= (uint8_t)~RF_BLOCK_CACHED;
    pool->free_ids[pool->num_recycled++] = id;
}

void rf_block_pool_pin(rf_block_pool *pool, int32_t id) {
    rf_block_pool_hold(pool, id);
    if (pool->blocks[id].pins++ == 0) pool->num_pinned++;
}

void rf_block_pool_unpin(rf_block_pool *pool, int32_t id) {
    if (--pool->blocks[id].pins == 0) pool->num_pinned--;
    drop_one(pool, id, RF_KEEP_CACHED, ++pool->clock);
}

int32_t rf_block_pool_take_evicted(rf_block_pool *pool, int32_t *ids) {
    const int32_t n = pool->num_evicted;
    for (int32_t i = 0; i < n; i++) {
        ids[i] = pool->evicted[i];
        pool->blocks[ids[i]].flags &= (uint8_t)~RF_BLOCK_EVICTED;
    }
    pool->num_evicted = 0;
    return n;
}

int rf_block_pool_validate(const rf_block_pool *pool, const char **reason) {
    *reason = "";
    REQUIRE(pool->next_fresh >= 0 && pool->next_fresh <= pool->num_blocks,
            "next_fresh out of range");
    int32_t used = 0, kept = 0, idle = 0, evicted = 0, pinned = 0;
    for (int32_t id = 0; id < pool->num_blocks; id++) {
        const rf_block *b = &pool->blocks[id];
        const int is_kept = (b->flags & RF_BLOCK_KEPT) != 0;
        REQUIRE(b->ref_count >= 0, "a negative reference count");
        REQUIRE(!(b->ref_count && is_kept), "a used block on the LRU list");
        REQUIRE(!(b->flags & RF_BLOCK_MARKED), "a mark left behind by a call");
        REQUIRE(b->last_use <= pool->clock, "a block used in the future");
        REQUIRE(id < pool->next_fresh || (!b->ref_count && !is_kept), "a fresh block in use");
        REQUIRE(b->priority < RF_NUM_PRIORITIES, "a priority out of range");
        REQUIRE(b->pins <= b->ref_count, "more pins than holders");
        pinned += b->pins > 0;
        used += b->ref_count > 0;
        kept += is_kept;
        idle += b->ref_count == 0 && !is_kept;
        evicted += (b->flags & RF_BLOCK_EVICTED) != 0;
    }
    REQUIRE(kept == pool->num_kept, "num_kept differs from the kept blocks");
    REQUIRE(pinned == pool->num_pinned, "num_pinned differs from the pinned blocks");
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
        uint8_t *flags = &pool->blocks[pool->free_ids[i]].flags;
        repeated |= (*flags & RF_BLOCK_MARKED) != 0;
        *flags |= RF_BLOCK_MARKED;
    }
    for (int32_t i = 0; i < pool->num_recycled; i++) {
        pool->blocks[pool->free_ids[i]].flags &= (uint8_t)~RF_BLOCK_MARKED;
    }
    REQUIRE(!repeated, "a block twice on the free list");
    int32_t walked = 0;
    for (int p = 0; p < RF_NUM_PRIORITIES; p++) {
        int32_t prev = RF_NO_BLOCK;
        for (int32_t id = pool->lru_oldest[p]; id != RF_NO_BLOCK; id = pool->blocks[id].next) {
            REQUIRE(id >= 0 && id < pool->num_blocks, "an LRU link out of range");
            REQUIRE(pool->blocks[id].flags & RF_BLOCK_KEPT, "a block on an LRU list, not kept");
            REQUIRE(pool->blocks[id].priority == p, "a block on the list of another priority");
            REQUIRE(pool->blocks[id].prev == prev, "LRU links that disagree");
            REQUIRE(++walked <= pool->num_kept, "LRU lists longer than num_kept");
            prev = id;
        }
        REQUIRE(prev == pool->lru_newest[p], "an LRU list cut short");
    }
    REQUIRE(walked == pool->num_kept, "LRU lists shorter than num_kept");
    return RF_OK;
}
