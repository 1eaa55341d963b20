#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "rf/saved.h"

enum { BLOCKS = 8, SIZE = 2 };

/* Room for whatever a pool of BLOCKS has to save. */
typedef struct {
    int32_t ref_counts[BLOCKS], free_ids[BLOCKS], kept[BLOCKS], evicted[BLOCKS];
    uint8_t priorities[BLOCKS];
    uint16_t pins[BLOCKS];
    uint64_t last_uses[BLOCKS];
} room;

static rf_saved_pool save(room *r, const rf_block_pool *pool) {
    rf_saved_pool saved;
    rf_saved_pool_measure(&saved, pool);
    saved.ref_counts = r->ref_counts;
    saved.priorities = r->priorities;
    saved.pins = r->pins;
    saved.last_uses = r->last_uses;
    saved.free_ids = r->free_ids;
    saved.kept = r->kept;
    saved.evicted = r->evicted;
    rf_saved_pool_fill(&saved, pool);
    return saved;
}

/* Used, kept, free, fresh and evicted blocks. */
static void make_pool(rf_block_pool *pool) {
    int32_t ids[BLOCKS], bad;
    CHECK(rf_block_pool_init(pool, BLOCKS) == RF_OK);
    CHECK(rf_block_pool_allocate(pool, BLOCKS, ids) == RF_OK);
    rf_block_pool_drop(pool, ids, 2, RF_KEEP_ALL, 0);
    rf_block_pool_drop(pool, ids + 2, 2, RF_KEEP_ALL, 3);
    CHECK(rf_block_pool_release(pool, ids + 4, 1, RF_KEEP_NONE, &bad) == RF_OK);
    rf_block_pool_pin(pool, 5);
    int32_t two[2];
    CHECK(rf_block_pool_allocate(pool, 2, two) == RF_OK); /* the free one, and one evicted */
    CHECK(pool->num_evicted == 1);
    CHECK(rf_block_pool_release(pool, two, 1, RF_KEEP_NONE, &bad) == RF_OK);
}

static void test_a_pool_comes_back(void) {
    rf_block_pool pool, other;
    room r, again;
    const char *reason;
    make_pool(&pool);
    const rf_saved_pool saved = save(&r, &pool);
    CHECK(rf_block_pool_init(&other, BLOCKS) == RF_OK);
    CHECK(rf_saved_pool_restore(&saved, &other, &reason) == RF_OK);
    CHECK(rf_block_pool_validate(&other, &reason) == RF_OK);
    const rf_saved_pool second = save(&again, &other);
    CHECK(second.clock == saved.clock && second.total_evictions == saved.total_evictions);
    CHECK(second.num_touched == saved.num_touched && second.num_free == saved.num_free);
    CHECK(second.num_kept == saved.num_kept && second.num_evicted == saved.num_evicted);
    CHECK(memcmp(r.ref_counts, again.ref_counts, sizeof r.ref_counts) == 0);
    CHECK(memcmp(r.last_uses, again.last_uses, sizeof r.last_uses) == 0);
    CHECK(memcmp(r.pins, again.pins, sizeof r.pins) == 0);
    CHECK(memcmp(r.kept, again.kept, (size_t)saved.num_kept * sizeof *r.kept) == 0);
    /* both evict in the same order */
    int32_t mine[4], theirs[4];
    CHECK(rf_block_pool_num_available(&pool) == 4);
    CHECK(rf_block_pool_allocate(&pool, 4, mine) == RF_OK);
    CHECK(rf_block_pool_allocate(&other, 4, theirs) == RF_OK);
    CHECK(memcmp(mine, theirs, sizeof mine) == 0);
    rf_block_pool_free(&pool);
    rf_block_pool_free(&other);
}

/* Restores with one number changed; it must be refused, and nothing may leak. */
#define REFUSED(field, value)                                                                      \
    do {                                                                                           \
        room r;                                                                                    \
        rf_block_pool pool, other;                                                                 \
        const char *reason = NULL;                                                                 \
        make_pool(&pool);                                                                          \
        rf_saved_pool saved = save(&r, &pool);                                                     \
        saved.field = (value);                                                                     \
        CHECK(rf_block_pool_init(&other, BLOCKS) == RF_OK);                                        \
        CHECK(rf_saved_pool_restore(&saved, &other, &reason) == RF_ERR_BAD_ARGUMENT);              \
        CHECK(reason != NULL && *reason != '\0');                                                  \
        CHECK(other.blocks == NULL && other.num_blocks == 0);                                      \
        rf_block_pool_free(&pool);                                                                 \
    } while (0)

static void test_a_damaged_pool_is_refused(void) {
    REFUSED(num_touched, BLOCKS + 1);
    REFUSED(num_touched, -1);
    REFUSED(num_free, -1);
    REFUSED(num_free, INT32_MAX);
    REFUSED(num_free, 0);
    REFUSED(num_kept, INT32_MAX);
    REFUSED(num_kept, 0);
    REFUSED(num_evicted, INT32_MAX);
    REFUSED(clock, 0);
    REFUSED(clock, UINT64_MAX);
    REFUSED(total_evictions, UINT64_MAX);
    REFUSED(ref_counts[5], -1);
    REFUSED(ref_counts[5], 0);
    REFUSED(pins[5], 9);
    REFUSED(priorities[0], RF_NUM_PRIORITIES);
    REFUSED(free_ids[0], -1);
    REFUSED(free_ids[0], BLOCKS);
    REFUSED(free_ids[0], 5);
    REFUSED(kept[0], INT32_MIN);
    REFUSED(kept[0], r.kept[1]);
    REFUSED(kept[0], r.free_ids[0]);
    REFUSED(evicted[0], BLOCKS);
}

/* An index of two roots with a chain of two below the second and one below the first. */
static void make_index(rf_prefix_index *index, const int32_t *sizes) {
    const int32_t a[SIZE] = {1, 2}, b[SIZE] = {3, 4};
    CHECK(rf_prefix_index_init(index, SIZE, 1, sizes, 7) == RF_OK);
    const int32_t first = rf_prefix_index_add_root(index);
    int32_t gone = first;
    rf_prefix_index_use(index, first);
    gone = rf_prefix_index_step(index, gone, b); /* takes a node that is free again afterwards */
    const int32_t second = rf_prefix_index_add_root(index);
    rf_prefix_index_unuse(index, gone);
    int32_t node = second;
    rf_prefix_index_use(index, node);
    node = rf_prefix_index_step(index, node, a);
    node = rf_prefix_index_step(index, node, b);
    rf_prefix_index_attach(index, node, 0, 6);
    rf_prefix_index_unuse(index, node);
    rf_prefix_index_use(index, first);
    node = rf_prefix_index_step(index, first, a);
    rf_prefix_index_attach(index, node, 0, 1);
    rf_prefix_index_unuse(index, node);
    CHECK(index->num_nodes == 5);
}

static void test_nodes_come_back(void) {
    const int32_t sizes[1] = {BLOCKS};
    rf_prefix_index index, other;
    const char *reason;
    make_index(&index, sizes);
    int32_t order[5] = {0, 2}, place[8], parents[5], tokens[5 * SIZE] = {0}, blocks[5];
    const int32_t uses[5] = {0};
    CHECK(index.next_fresh <= 8);
    rf_prefix_index_order(&index, 2, order, place);
    for (int i = 0; i < 5; i++) {
        CHECK(place[order[i]] == i);
        blocks[i] = rf_prefix_index_block(&index, order[i], 0);
        parents[i] = i < 2 ? RF_NO_NODE : place[index.nodes[order[i]].parent];
        CHECK(parents[i] < i);
        if (i >= 2)
            memcpy(tokens + i * SIZE, index.tokens + order[i] * SIZE, sizeof *tokens * SIZE);
    }
    const rf_saved_nodes saved = {5, 2, parents, tokens, blocks, uses};
    CHECK(rf_prefix_index_init(&other, SIZE, 1, sizes, 8) == RF_OK);
    CHECK(rf_saved_nodes_restore(&saved, &other, sizes, &reason) == RF_OK);
    CHECK(rf_prefix_index_validate(&other, sizes, &reason) == RF_OK);
    int32_t nodes[2];
    const int32_t chain[2 * SIZE] = {1, 2, 3, 4};
    CHECK(rf_prefix_index_walk(&other, 1, chain, 2, nodes) == 2);
    CHECK(rf_prefix_index_block(&other, nodes[1], 0) == 6);
    CHECK(rf_prefix_index_walk(&other, 0, chain, 2, nodes) == 1);
    CHECK(rf_prefix_index_block(&other, nodes[0], 0) == 1);
    rf_prefix_index_free(&other);

    /* each damage is refused and leaves an index that was freed */
    struct {
        int32_t *where, value;
    } damages[] = {
        {&parents[0], 0}, {&parents[2], 2},        {&parents[3], 4}, {&parents[2], -1},
        {&parents[4], 5}, {&parents[3], -9},       {&blocks[0], 3},  {&blocks[2], BLOCKS},
        {&blocks[3], -2}, {&blocks[2], INT32_MAX},
    };
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) {
        const int32_t before = *damages[i].where;
        *damages[i].where = damages[i].value;
        CHECK(rf_prefix_index_init(&other, SIZE, 1, sizes, 8) == RF_OK);
        CHECK(rf_saved_nodes_restore(&saved, &other, sizes, &reason) == RF_ERR_BAD_ARGUMENT);
        CHECK(other.nodes == NULL);
        *damages[i].where = before;
    }
    rf_saved_nodes wrong = saved;
    wrong.num_nodes = INT32_MAX;
    CHECK(rf_prefix_index_init(&other, SIZE, 1, sizes, 8) == RF_OK);
    CHECK(rf_saved_nodes_restore(&wrong, &other, sizes, &reason) == RF_ERR_BAD_ARGUMENT);
    wrong.num_nodes = 5;
    wrong.num_roots = 6;
    CHECK(rf_prefix_index_init(&other, SIZE, 1, sizes, 8) == RF_OK);
    CHECK(rf_saved_nodes_restore(&wrong, &other, sizes, &reason) == RF_ERR_BAD_ARGUMENT);
    rf_prefix_index_free(&index);
}

int main(void) {
    test_a_pool_comes_back();
    test_a_damaged_pool_is_refused();
    test_nodes_come_back();
    return 0;
}
