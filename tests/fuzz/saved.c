/* libFuzzer target on what a snapshot's arrays are read by: the input is the arrays of a block pool
 * and of a prefix index, claimed by somebody who may be hostile. Whatever is accepted must be
 * valid, must give the same arrays when it is saved again, and must go on working.
 *
 *   cmake -S . -B build -DROCMFORGE_PYTHON=OFF -DROCMFORGE_FUZZ=ON -DCMAKE_C_COMPILER=clang-19
 *   cmake --build build && build/tests/fuzz/fuzz_saved -max_total_time=60 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rf/saved.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

enum { NUM_BLOCKS = 12, MAX_NODES = 16, BLOCK_SIZE = 2, MAX_GROUPS = 2 };

typedef struct {
    const uint8_t *data;
    size_t size;
} input;

static uint8_t next_byte(input *in) {
    if (in->size == 0) return 0;
    in->size--;
    return *in->data++;
}

/* Mostly a small number, so that much is nearly right; now and then an extreme one. */
static int32_t next_number(input *in) {
    const uint8_t byte = next_byte(in);
    if (byte < 0xf8) return (int32_t)(byte % 20) - 1;
    const int32_t extremes[8] = {INT32_MIN, INT32_MAX, -2, 1 << 30, 255, 65535, NUM_BLOCKS, -1};
    return extremes[byte - 0xf8];
}

/* Buffers of exactly the size claimed, so that the address sanitizer sees every step outside. */
static void *exactly(int32_t n, size_t size) {
    void *const p = malloc((size_t)(n > 0 ? n : 0) * size);
    CHECK(p);
    return p;
}

static void make_room(rf_saved_pool *saved) {
    saved->ref_counts = exactly(saved->num_touched, sizeof *saved->ref_counts);
    saved->priorities = exactly(saved->num_touched, sizeof *saved->priorities);
    saved->pins = exactly(saved->num_touched, sizeof *saved->pins);
    saved->last_uses = exactly(saved->num_touched, sizeof *saved->last_uses);
    saved->free_ids = exactly(saved->num_free, sizeof *saved->free_ids);
    saved->kept = exactly(saved->num_kept, sizeof *saved->kept);
    saved->evicted = exactly(saved->num_evicted, sizeof *saved->evicted);
}

static void free_room(rf_saved_pool *saved) {
    free(saved->ref_counts);
    free(saved->priorities);
    free(saved->pins);
    free(saved->last_uses);
    free(saved->free_ids);
    free(saved->kept);
    free(saved->evicted);
}

static int same(const void *a, const void *b, int32_t n, size_t size) {
    return n <= 0 || memcmp(a, b, (size_t)n * size) == 0;
}

static void use_pool(rf_block_pool *pool) {
    int32_t ids[NUM_BLOCKS], bad;
    const char *reason;
    const int32_t n = rf_block_pool_num_available(pool);
    CHECK(n >= 0 && n <= NUM_BLOCKS);
    CHECK(rf_block_pool_allocate(pool, n, ids) == RF_OK);
    CHECK(rf_block_pool_validate(pool, &reason) == RF_OK);
    CHECK(rf_block_pool_release(pool, ids, n, RF_KEEP_ALL, &bad) == RF_OK);
    CHECK(rf_block_pool_validate(pool, &reason) == RF_OK);
}

static void fuzz_pool(input *in) {
    rf_saved_pool saved = {0}, again;
    rf_block_pool pool;
    const char *reason = NULL;
    /* what was there is there: sizes are those of the arrays */
    saved.num_touched = next_byte(in) % (NUM_BLOCKS + 2);
    saved.num_free = next_byte(in) % (NUM_BLOCKS + 2);
    saved.num_kept = next_byte(in) % (NUM_BLOCKS + 2);
    saved.num_evicted = next_byte(in) % 3;
    saved.clock = (uint64_t)next_number(in);
    saved.total_evictions = next_byte(in);
    make_room(&saved);
    for (int32_t i = 0; i < saved.num_touched; i++) {
        saved.ref_counts[i] = next_number(in);
        saved.priorities[i] = next_byte(in) % 9;
        saved.pins[i] = (uint16_t)(next_byte(in) % 3);
        saved.last_uses[i] = next_byte(in) % 8;
    }
    for (int32_t i = 0; i < saved.num_free; i++) saved.free_ids[i] = next_number(in);
    for (int32_t i = 0; i < saved.num_kept; i++) saved.kept[i] = next_number(in);
    for (int32_t i = 0; i < saved.num_evicted; i++) saved.evicted[i] = next_number(in);
    CHECK(rf_block_pool_init(&pool, NUM_BLOCKS) == RF_OK);
    if (rf_saved_pool_restore(&saved, &pool, &reason) == RF_OK) {
        CHECK(rf_block_pool_validate(&pool, &reason) == RF_OK);
        rf_saved_pool_measure(&again, &pool);
        CHECK(again.num_touched == saved.num_touched && again.num_free == saved.num_free);
        CHECK(again.num_kept == saved.num_kept && again.num_evicted == saved.num_evicted);
        CHECK(again.clock == saved.clock && again.total_evictions == saved.total_evictions);
        make_room(&again);
        rf_saved_pool_fill(&again, &pool);
        CHECK(same(again.ref_counts, saved.ref_counts, saved.num_touched, sizeof(int32_t)));
        CHECK(same(again.priorities, saved.priorities, saved.num_touched, 1));
        CHECK(same(again.pins, saved.pins, saved.num_touched, sizeof(uint16_t)));
        CHECK(same(again.last_uses, saved.last_uses, saved.num_touched, sizeof(uint64_t)));
        CHECK(same(again.free_ids, saved.free_ids, saved.num_free, sizeof(int32_t)));
        CHECK(same(again.evicted, saved.evicted, saved.num_evicted, sizeof(int32_t)));
        free_room(&again);
        use_pool(&pool);
    } else {
        CHECK(reason && *reason && pool.blocks == NULL);
    }
    rf_block_pool_free(&pool);
    free_room(&saved);
}

static void save_nodes_again(const rf_prefix_index *index, const rf_saved_nodes *saved) {
    int32_t order[MAX_NODES], place[MAX_NODES];
    for (int32_t i = 0; i < saved->num_roots; i++) order[i] = i;
    rf_prefix_index_order(index, saved->num_roots, order, place);
    for (int32_t i = 0; i < saved->num_nodes; i++) {
        CHECK(place[order[i]] == i);
        const int32_t parent = index->nodes[order[i]].parent;
        CHECK(parent == RF_NO_NODE || place[parent] < i);
    }
}

static void fuzz_nodes(input *in) {
    const int32_t num_groups = next_byte(in) % MAX_GROUPS + 1;
    const int32_t sizes[MAX_GROUPS] = {NUM_BLOCKS, NUM_BLOCKS / 2};
    const int32_t n = next_byte(in) % (MAX_NODES + 1);
    int32_t *const parents = exactly(n, sizeof(int32_t));
    int32_t *const tokens = exactly(n * BLOCK_SIZE, sizeof(int32_t));
    int32_t *const blocks = exactly(n * num_groups, sizeof(int32_t));
    int32_t *const uses = exactly(n, sizeof(int32_t));
    const rf_saved_nodes saved = {n, next_byte(in) % 4, parents, tokens, blocks, uses};
    rf_prefix_index index;
    const char *reason = NULL;
    for (int32_t i = 0; i < n; i++) {
        parents[i] = next_number(in);
        uses[i] = next_byte(in) % 2;
        for (int32_t t = 0; t < BLOCK_SIZE; t++) tokens[i * BLOCK_SIZE + t] = next_byte(in) % 4;
        for (int32_t g = 0; g < num_groups; g++) blocks[i * num_groups + g] = next_number(in);
    }
    CHECK(rf_prefix_index_init(&index, BLOCK_SIZE, num_groups, sizes, 42) == RF_OK);
    if (next_byte(in) & 1) index.hash_mask = 0;
    if (rf_saved_nodes_restore(&saved, &index, sizes, &reason) == RF_OK) {
        CHECK(rf_prefix_index_validate(&index, sizes, &reason) == RF_OK);
        CHECK(index.num_nodes == n);
        save_nodes_again(&index, &saved);
        /* all that uses the nodes goes, and the nodes with it */
        for (int32_t i = 0; i < n; i++) {
            if (i < saved.num_roots) rf_prefix_index_use(&index, i); /* dropped at the end */
            for (int32_t g = 0; g < num_groups; g++) {
                if (blocks[i * num_groups + g] >= 0)
                    rf_prefix_index_detach(&index, g, blocks[i * num_groups + g]);
            }
            if (uses[i]) rf_prefix_index_unuse(&index, i);
        }
        CHECK(rf_prefix_index_validate(&index, sizes, &reason) == RF_OK);
        CHECK(index.num_nodes == saved.num_roots && index.num_blocks == 0);
    } else {
        CHECK(reason && *reason && index.nodes == NULL);
    }
    rf_prefix_index_free(&index);
    free(parents);
    free(tokens);
    free(blocks);
    free(uses);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = {data, size};
    if (next_byte(&in) & 1) fuzz_pool(&in);
    else fuzz_nodes(&in);
    return 0;
}
