#include "rf/block_pool.h"

#include "check.h"
#include "rf/alloc.h"

#define VALID(pool)         CHECK_VALID(rf_block_pool_validate(pool, &reason))
#define INVALID(pool, text) CHECK_INVALID(rf_block_pool_validate(pool, &reason), text)

enum { KEEP = 1, NO_KEEP = 0 };

static uint64_t random_state = 88172645463325252u;

static uint32_t next_random(uint32_t below) { /* xorshift64 (Marsaglia 2003) */
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32) % below;
}

static rf_block_pool pool_of(int32_t num_blocks) {
    rf_block_pool pool;
    CHECK(rf_block_pool_init(&pool, num_blocks) == RF_OK);
    return pool;
}

static int32_t take(rf_block_pool *pool) {
    int32_t id = -7;
    CHECK(rf_block_pool_allocate(pool, 1, &id) == RF_OK);
    return id;
}

static int release(rf_block_pool *pool, int32_t id, int keep) {
    int32_t bad = -7;
    return rf_block_pool_release(pool, &id, 1, keep, &bad);
}

static int ref(rf_block_pool *pool, int32_t id) {
    int32_t bad = -7;
    return rf_block_pool_ref(pool, &id, 1, &bad);
}

/* Everything in the pool, to see that a call left it alone. */
typedef struct copy_of_pool {
    rf_block_pool pool;
    rf_block blocks[64];
    int32_t free_ids[64], evicted[64];
} copy_of_pool;

static copy_of_pool copy_of(const rf_block_pool *pool) {
    copy_of_pool copy;
    memset(&copy, 0, sizeof copy);
    const size_t n = (size_t)pool->num_blocks;
    CHECK(n <= COUNT(copy.blocks));
    memcpy(&copy.pool, pool, sizeof *pool);
    memcpy(copy.blocks, pool->blocks, n * sizeof *pool->blocks);
    memcpy(copy.free_ids, pool->free_ids, n * sizeof *pool->free_ids);
    memcpy(copy.evicted, pool->evicted, n * sizeof *pool->evicted);
    return copy;
}

static int is_unchanged(const rf_block_pool *pool, const copy_of_pool *before) {
    const copy_of_pool now = copy_of(pool);
    return memcmp(&now, before, sizeof now) == 0;
}

static void sizes(void) {
    rf_block_pool pool;
    for (int32_t n = 0; n < 3; n++) {
        pool = pool_of(n);
        CHECK(rf_block_pool_num_free(&pool) == n && rf_block_pool_num_available(&pool) == n);
        VALID(&pool);
        rf_block_pool_free(&pool);
        VALID(&pool);
        rf_block_pool_free(&pool);
    }
    CHECK(rf_block_pool_init(&pool, -1) == RF_ERR_BAD_ARGUMENT);
    rf_block_pool_free(&pool);
    CHECK(rf_block_pool_init(&pool, INT64_C(1) + INT32_MAX) == RF_ERR_BAD_ARGUMENT);
    rf_block_pool_free(&pool);
    CHECK(rf_block_pool_init(&pool, INT64_MIN) == RF_ERR_BAD_ARGUMENT);
    rf_block_pool_free(&pool);
}

static void a_failed_init_leaves_an_empty_pool(void) {
    int failures = 0;
    for (int64_t n = 1;; n++) {
        rf_block_pool pool;
        CHECK(rf_alloc_fail_after(n) == 0);
        const int status = rf_block_pool_init(&pool, 10);
        const int failed = rf_alloc_fail_after(0) == 0;
        CHECK(status == (failed ? RF_ERR_NO_MEMORY : RF_OK));
        CHECK(pool.num_blocks == (failed ? 0 : 10));
        VALID(&pool);
        rf_block_pool_free(&pool);
        if (!failed) break;
        failures++;
    }
    CHECK(failures == 3);
}

static void free_blocks_go_first_then_the_oldest_kept(void) {
    rf_block_pool pool = pool_of(5);
    int32_t ids[5], evicted[5];
    CHECK(rf_block_pool_allocate(&pool, 4, ids) == RF_OK);
    CHECK(release(&pool, 2, KEEP) == RF_OK);
    CHECK(release(&pool, 0, KEEP) == RF_OK);
    CHECK(release(&pool, 3, NO_KEEP) == RF_OK);
    VALID(&pool);
    CHECK(pool.num_kept == 2 && rf_block_pool_num_free(&pool) == 2);
    CHECK(rf_block_pool_num_available(&pool) == 4);
    CHECK(rf_block_pool_allocate(&pool, 4, ids) == RF_OK);
    CHECK(ids[0] + ids[1] == 3 + 4); /* in some order */
    CHECK(ids[2] == 2 && ids[3] == 0);
    VALID(&pool);
    CHECK(pool.num_evicted == 2 && pool.total_evictions == 2);
    CHECK(rf_block_pool_take_evicted(&pool, evicted) == 2);
    CHECK(evicted[0] == 2 && evicted[1] == 0);
    CHECK(rf_block_pool_take_evicted(&pool, evicted) == 0);
    VALID(&pool);
    rf_block_pool_free(&pool);
}

static void a_kept_block_is_revived_from_anywhere_in_the_list(void) {
    for (int32_t revived = 0; revived < 4; revived++) {
        rf_block_pool pool = pool_of(4);
        int32_t ids[4] = {0}, bad;
        CHECK(rf_block_pool_allocate(&pool, 4, ids) == RF_OK);
        CHECK(rf_block_pool_release(&pool, ids, 4, KEEP, &bad) == RF_OK);
        CHECK(ref(&pool, revived) == RF_OK);
        CHECK(pool.blocks[revived].ref_count == 1 && pool.num_kept == 3);
        VALID(&pool);
        for (int32_t id = 0; id < 4; id++) CHECK(id == revived || take(&pool) == id);
        VALID(&pool);
        rf_block_pool_free(&pool);
    }
}

static void a_block_is_logged_once_until_the_log_is_taken(void) {
    rf_block_pool pool = pool_of(1);
    int32_t evicted[1] = {-1};
    take(&pool);
    for (int i = 0; i < 3; i++) {
        CHECK(release(&pool, 0, KEEP) == RF_OK);
        CHECK(take(&pool) == 0);
        VALID(&pool);
    }
    CHECK(pool.total_evictions == 3 && pool.num_evicted == 1);
    CHECK(rf_block_pool_take_evicted(&pool, evicted) == 1 && evicted[0] == 0);
    CHECK(release(&pool, 0, KEEP) == RF_OK);
    take(&pool);
    CHECK(pool.num_evicted == 1);
    rf_block_pool_free(&pool);
}

static void last_use_is_the_clock(void) {
    rf_block_pool pool = pool_of(3);
    int32_t ids[2];
    CHECK(pool.blocks[0].last_use == 0);
    CHECK(rf_block_pool_allocate(&pool, 2, ids) == RF_OK);
    CHECK(pool.blocks[ids[0]].last_use == pool.clock && pool.blocks[ids[1]].last_use == pool.clock);
    const uint64_t before = pool.clock;
    CHECK(ref(&pool, ids[0]) == RF_OK);
    CHECK(pool.blocks[ids[0]].last_use == pool.clock && pool.clock > before);
    CHECK(pool.blocks[ids[1]].last_use == before);
    rf_block_pool_free(&pool);
}

/* 0 used, 1 used twice, 2 kept, 3 free again, 4 never used */
static rf_block_pool mixed_pool(void) {
    rf_block_pool pool = pool_of(5);
    int32_t ids[4];
    CHECK(rf_block_pool_allocate(&pool, 4, ids) == RF_OK);
    for (int32_t i = 0; i < 4; i++) CHECK(ids[i] == i);
    CHECK(ref(&pool, 1) == RF_OK);
    CHECK(release(&pool, 2, KEEP) == RF_OK);
    CHECK(release(&pool, 3, NO_KEEP) == RF_OK);
    VALID(&pool);
    return pool;
}

static void what_is_wrong_changes_nothing(void) {
    static const struct {
        int32_t ids[4];
        int32_t n, bad;
        int release, ref; /* statuses */
    } cases[] = {
        {{5}, 1, 0, RF_ERR_BLOCK_RANGE, RF_ERR_BLOCK_RANGE},
        {{-1}, 1, 0, RF_ERR_BLOCK_RANGE, RF_ERR_BLOCK_RANGE},
        {{INT32_MIN}, 1, 0, RF_ERR_BLOCK_RANGE, RF_ERR_BLOCK_RANGE},
        {{INT32_MAX}, 1, 0, RF_ERR_BLOCK_RANGE, RF_ERR_BLOCK_RANGE},
        {{0, 1, 5}, 3, 2, RF_ERR_BLOCK_RANGE, RF_ERR_BLOCK_RANGE},
        {{3}, 1, 0, RF_ERR_BLOCK_NOT_IN_USE, RF_ERR_BLOCK_FREE},
        {{4}, 1, 0, RF_ERR_BLOCK_NOT_IN_USE, RF_ERR_BLOCK_FREE},
        {{0, 3, 1}, 3, 1, RF_ERR_BLOCK_NOT_IN_USE, RF_ERR_BLOCK_FREE},
        {{2}, 1, 0, RF_ERR_BLOCK_NOT_IN_USE, RF_OK},
        {{0, 0}, 2, 1, RF_ERR_BLOCK_REPEATED, RF_OK},
        {{1, 0, 1}, 3, 2, RF_ERR_BLOCK_REPEATED, RF_OK},
        {{0, 1, 0, 9}, 4, 2, RF_ERR_BLOCK_REPEATED, RF_ERR_BLOCK_RANGE},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        rf_block_pool pool = mixed_pool();
        const copy_of_pool before = copy_of(&pool);
        for (int keep = 0; keep < 2; keep++) {
            int32_t bad = -7;
            CHECK(rf_block_pool_release(&pool, cases[i].ids, cases[i].n, keep, &bad) ==
                  cases[i].release);
            CHECK(bad == cases[i].bad);
            CHECK(is_unchanged(&pool, &before));
        }
        if (cases[i].ref != RF_OK) {
            int32_t bad = -7;
            CHECK(rf_block_pool_ref(&pool, cases[i].ids, cases[i].n, &bad) == cases[i].ref);
            CHECK(bad >= 0 && bad < cases[i].n);
            CHECK(is_unchanged(&pool, &before));
        }
        VALID(&pool);
        rf_block_pool_free(&pool);
    }
}

static void exhaustion_changes_nothing(void) {
    rf_block_pool pool = mixed_pool();
    const copy_of_pool before = copy_of(&pool);
    int32_t ids[8] = {-9, -9, -9, -9, -9, -9, -9, -9};
    CHECK(rf_block_pool_allocate(&pool, 4, ids) == RF_ERR_OUT_OF_BLOCKS);
    CHECK(rf_block_pool_allocate(&pool, INT32_MAX, ids) == RF_ERR_OUT_OF_BLOCKS);
    CHECK(rf_block_pool_allocate(&pool, -1, ids) == RF_ERR_BAD_ARGUMENT);
    CHECK(is_unchanged(&pool, &before));
    for (size_t i = 0; i < COUNT(ids); i++) CHECK(ids[i] == -9);
    CHECK(rf_block_pool_allocate(&pool, 3, ids) == RF_OK);
    CHECK(ids[2] == 2);
    VALID(&pool);
    rf_block_pool_free(&pool);
}

static void a_reference_count_does_not_overflow(void) {
    rf_block_pool pool = pool_of(1);
    const int32_t twice[] = {0, 0};
    int32_t bad = -7;
    take(&pool);
    pool.blocks[0].ref_count = INT32_MAX - 1;
    const copy_of_pool before = copy_of(&pool);
    CHECK(rf_block_pool_ref(&pool, twice, 2, &bad) == RF_ERR_BAD_ARGUMENT);
    CHECK(is_unchanged(&pool, &before));
    CHECK(ref(&pool, 0) == RF_OK);
    CHECK(pool.blocks[0].ref_count == INT32_MAX);
    CHECK(ref(&pool, 0) == RF_ERR_BAD_ARGUMENT);
    VALID(&pool);
    rf_block_pool_free(&pool);
}

/* Beside an array of reference counts, -1 for kept. */
static void random_calls(void) {
    enum { NUM = 40 };
    int32_t model[NUM] = {0}, used = 0, kept = 0;
    rf_block_pool pool = pool_of(NUM);
    for (int step = 0; step < 40000; step++) {
        const int32_t id = (int32_t)next_random(NUM);
        switch (next_random(4)) {
        case 0:
            if (used == NUM) {
                int32_t none;
                CHECK(rf_block_pool_allocate(&pool, 1, &none) == RF_ERR_OUT_OF_BLOCKS);
            } else {
                const int32_t got = take(&pool);
                CHECK(model[got] == (used + kept == NUM ? -1 : 0));
                kept -= model[got] == -1;
                model[got] = 1;
                used++;
            }
            break;
        case 1:
            CHECK(ref(&pool, id) == (model[id] ? RF_OK : RF_ERR_BLOCK_FREE));
            if (model[id] == -1) kept--, used++, model[id] = 1;
            else if (model[id]) model[id]++;
            break;
        default: {
            const int keep = (int)next_random(2);
            CHECK(release(&pool, id, keep) == (model[id] > 0 ? RF_OK : RF_ERR_BLOCK_NOT_IN_USE));
            if (model[id] > 0 && --model[id] == 0) {
                used--;
                kept += keep;
                model[id] = -keep;
            }
        }
        }
        CHECK(pool.num_kept == kept && rf_block_pool_num_free(&pool) == NUM - used - kept);
        if (step % 53 == 0) VALID(&pool);
        if (step % 1000 == 0) {
            int32_t evicted[NUM];
            const int32_t n = rf_block_pool_take_evicted(&pool, evicted);
            for (int32_t i = 0; i < n; i++) {
                for (int32_t j = 0; j < i; j++) CHECK(evicted[i] != evicted[j]);
            }
        }
    }
    VALID(&pool);
    rf_block_pool_free(&pool);
}

static void restore(rf_block_pool *pool, const copy_of_pool *copy) {
    *pool = copy->pool;
    const size_t n = (size_t)pool->num_blocks;
    memcpy(pool->blocks, copy->blocks, n * sizeof *pool->blocks);
    memcpy(pool->free_ids, copy->free_ids, n * sizeof *pool->free_ids);
    memcpy(pool->evicted, copy->evicted, n * sizeof *pool->evicted);
}

/* Breaks something in the sound pool, sees it reported, and mends it. */
#define BROKEN(breakage, text)                                                                     \
    do {                                                                                           \
        breakage;                                                                                  \
        INVALID(&pool, text);                                                                      \
        restore(&pool, &sound);                                                                    \
    } while (0)

static void corruption_is_reported(void) {
    rf_block_pool pool = pool_of(9);
    int32_t ids[8];
    CHECK(rf_block_pool_allocate(&pool, 8, ids) == RF_OK);
    for (int32_t id = 2; id <= 4; id++) CHECK(release(&pool, id, KEEP) == RF_OK);
    for (int32_t id = 5; id <= 6; id++) CHECK(release(&pool, id, NO_KEEP) == RF_OK);
    pool.blocks[7].flags |= RF_BLOCK_EVICTED; /* as if it had been */
    pool.evicted[pool.num_evicted++] = 7;
    VALID(&pool); /* 0, 1, 7 used; 2, 3, 4 kept in this order; 5, 6 free; 8 never used */
    const copy_of_pool sound = copy_of(&pool);
    rf_block *const b = pool.blocks;
    int32_t *const lru_oldest = (int32_t *)&pool.lru_oldest;
    int32_t *const lru_newest = (int32_t *)&pool.lru_newest;

    BROKEN(pool.next_fresh = -1, "next_fresh");
    BROKEN(pool.next_fresh = 10, "next_fresh");
    BROKEN(pool.next_fresh = 7, "fresh block in use");
    BROKEN(pool.num_kept = 2, "num_kept");
    BROKEN(pool.num_recycled = 1, "free + kept + used");
    BROKEN(pool.num_recycled = 3, "free + kept + used");
    BROKEN(pool.num_evicted = 0, "evicted");
    BROKEN(pool.num_evicted = 5, "evicted");
    BROKEN(pool.clock = 1, "future");
    BROKEN(*lru_oldest = 3, "LRU");
    BROKEN(*lru_oldest = 9, "LRU link out of range");
    BROKEN(*lru_oldest = -5, "LRU link out of range");
    BROKEN(*lru_oldest = 1, "kept");
    BROKEN(*lru_oldest = RF_NO_BLOCK, "LRU");
    BROKEN(*lru_newest = 3, "cut short");

    BROKEN(b[1].ref_count = -1, "negative reference count");
    BROKEN(b[1].ref_count = 0, "free + kept + used");
    BROKEN(b[1].flags = RF_BLOCK_KEPT, "used block on");
    BROKEN(b[1].flags = RF_BLOCK_MARKED, "mark");
    BROKEN(b[1].flags = RF_BLOCK_EVICTED, "evicted");
    BROKEN(b[1].last_use = pool.clock + 1, "future");
    BROKEN(b[3].flags = 0, "num_kept");
    BROKEN(b[3].prev = 4, "disagree");
    BROKEN(b[3].next = RF_NO_BLOCK, "LRU");
    BROKEN(b[3].next = 2, "LRU");
    BROKEN(b[3].next = 5, "kept");
    BROKEN(b[2].next = 100, "LRU link out of range");
    BROKEN(b[4].next = 2, "LRU"); /* a ring */
    BROKEN(b[2].prev = b[3].prev = b[4].prev = 4; b[2].next = 2; *lru_oldest = 2, "LRU");
    BROKEN(b[5].flags = RF_BLOCK_KEPT, "num_kept");
    BROKEN(b[5].ref_count = 1, "free + kept + used");
    BROKEN(b[8].ref_count = 1, "fresh block in use");
    BROKEN(b[8].flags = RF_BLOCK_KEPT, "fresh block in use");

    BROKEN(pool.free_ids[0] = 6, "twice on the free list");
    BROKEN(pool.free_ids[0] = 1, "used or kept");
    BROKEN(pool.free_ids[0] = 3, "used or kept");
    BROKEN(pool.free_ids[0] = 8, "free id out of range");
    BROKEN(pool.free_ids[0] = -1, "free id out of range");
    BROKEN(pool.evicted[0] = 1, "evicted");
    BROKEN(pool.evicted[0] = 9, "evicted");
    VALID(&pool);
    rf_block_pool_free(&pool);
}

int main(void) {
    sizes();
    a_failed_init_leaves_an_empty_pool();
    free_blocks_go_first_then_the_oldest_kept();
    a_kept_block_is_revived_from_anywhere_in_the_list();
    a_block_is_logged_once_until_the_log_is_taken();
    last_use_is_the_clock();
    what_is_wrong_changes_nothing();
    exhaustion_changes_nothing();
    a_reference_count_does_not_overflow();
    random_calls();
    corruption_is_reported();
    return 0;
}
