/* libFuzzer target on the C core: the input is a program of operations on an id map, a block pool
 * and a prefix index that publishes the pool's blocks, as the manager uses them. After every
 * operation the three must be valid, and every hit must hold the tokens that it was found by.
 *
 *   cmake -S . -B build -DROCMFORGE_PYTHON=OFF -DROCMFORGE_FUZZ=ON -DCMAKE_C_COMPILER=clang-19
 *   cmake --build build && build/tests/fuzz/fuzz_core -max_total_time=60 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rf/block_pool.h"
#include "rf/id_map.h"
#include "rf/prefix_index.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

enum { NUM_BLOCKS = 24, BLOCK_SIZE = 3, MAX_CHAIN = 8, NUM_IDS = 16 };

/* What the fuzzer believes: the contents that each block was published with, all tokens from the
 * root on. */
typedef struct {
    int32_t published; /* tokens, 0 when the block is in no index */
    int32_t tokens[MAX_CHAIN * BLOCK_SIZE];
} belief;

typedef struct {
    const uint8_t *data;
    size_t size;
} input;

static uint8_t next_byte(input *in) {
    if (in->size == 0) return 0;
    in->size--;
    return *in->data++;
}

static void check_all(const rf_block_pool *pool, const rf_prefix_index *index,
                      const rf_id_map *map) {
    const int32_t sizes[1] = {NUM_BLOCKS};
    const char *reason;
    CHECK(rf_block_pool_validate(pool, &reason) == RF_OK);
    CHECK(rf_prefix_index_validate(index, sizes, &reason) == RF_OK);
    CHECK(rf_id_map_validate(map, &reason) == RF_OK);
}

static void forget_evicted(rf_block_pool *pool, rf_prefix_index *index, belief *beliefs) {
    int32_t evicted[NUM_BLOCKS];
    const int32_t n = rf_block_pool_take_evicted(pool, evicted);
    for (int32_t i = 0; i < n; i++) {
        rf_prefix_index_detach(index, 0, evicted[i]);
        beliefs[evicted[i]].published = 0;
    }
}

/* Publishes used blocks as the contents of a chain of tokens from a root. */
static void publish(rf_block_pool *pool, rf_prefix_index *index, belief *beliefs, int32_t root,
                    const int32_t *tokens, int32_t n, int32_t first_block) {
    int32_t node = root;
    rf_prefix_index_use(index, node);
    for (int32_t i = 0; i < n; i++) {
        const int32_t child = rf_prefix_index_step(index, node, tokens + i * BLOCK_SIZE);
        if (child == RF_NO_NODE) break;
        node = child;
        const int32_t block = (first_block + i) % NUM_BLOCKS;
        if (pool->blocks[block].ref_count && rf_prefix_index_block(index, node, 0) < 0 &&
            rf_prefix_index_node(index, 0, block) == RF_NO_NODE) {
            rf_prefix_index_attach(index, node, 0, block);
            pool->blocks[block].flags |= RF_BLOCK_CACHED;
            beliefs[block].published = (i + 1) * BLOCK_SIZE;
            memcpy(beliefs[block].tokens, tokens, (size_t)(i + 1) * BLOCK_SIZE * sizeof *tokens);
        }
    }
    rf_prefix_index_unuse(index, node);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = {data, size};
    const int32_t sizes[1] = {NUM_BLOCKS};
    rf_block_pool pool;
    rf_prefix_index index;
    rf_id_map map;
    belief beliefs[NUM_BLOCKS];
    uint8_t present[NUM_IDS] = {0};
    memset(beliefs, 0, sizeof beliefs);
    CHECK(rf_block_pool_init(&pool, NUM_BLOCKS) == RF_OK);
    CHECK(rf_prefix_index_init(&index, BLOCK_SIZE, 1, sizes, 42) == RF_OK);
    rf_id_map_init(&map);
    if (next_byte(&in) & 1) index.hash_mask = 0; /* all contents collide */
    const int32_t roots[2] = {rf_prefix_index_add_root(&index), rf_prefix_index_add_root(&index)};
    while (in.size) {
        const uint8_t op = next_byte(&in), a = next_byte(&in), b = next_byte(&in);
        int32_t ids[8], bad = 0, nodes[MAX_CHAIN], tokens[MAX_CHAIN * BLOCK_SIZE];
        const int32_t n = b % 8;
        /* few different tokens, so that chains meet; a whole chain from one byte */
        for (int32_t i = 0; i < MAX_CHAIN * BLOCK_SIZE; i++)
            tokens[i] = (a >> (i / BLOCK_SIZE)) & 1;
        switch (op % 9) {
        case 0: {
            const int32_t available = rf_block_pool_num_available(&pool);
            const int status = rf_block_pool_allocate(&pool, n, ids);
            CHECK((status == RF_OK) == (n <= available));
            forget_evicted(&pool, &index, beliefs);
            break;
        }
        case 1:
        case 2: /* any ids, also wrong and repeated ones; a release that keeps what is cached */
            for (int32_t i = 0; i < n; i++) {
                ids[i] = (int32_t)next_byte(&in) % (NUM_BLOCKS + 2) - 1;
                if (ids[i] < 0 || ids[i] >= NUM_BLOCKS) continue;
                /* a pin's reference is the pin's to drop */
                if (pool.blocks[ids[i]].pins >= pool.blocks[ids[i]].ref_count) ids[i] = -1;
            }
            if (op % 9 == 1) rf_block_pool_release(&pool, ids, n, RF_KEEP_CACHED, &bad);
            else rf_block_pool_ref(&pool, ids, n, &bad);
            break;
        case 3:
            publish(&pool, &index, beliefs, roots[op / 9 % 2], tokens, n, a % NUM_BLOCKS);
            break;
        case 4: {
            const int32_t found = rf_prefix_index_walk(&index, roots[op / 9 % 2], tokens, n, nodes);
            for (int32_t i = 0; i < found; i++) {
                const int32_t block = rf_prefix_index_block(&index, nodes[i], 0);
                if (block < 0) continue;
                CHECK(beliefs[block].published == (i + 1) * BLOCK_SIZE);
                CHECK(memcmp(beliefs[block].tokens, tokens,
                             (size_t)beliefs[block].published * sizeof *tokens) == 0);
            }
            break;
        }
        case 5:
            if (pool.blocks[a % NUM_BLOCKS].ref_count || pool.blocks[a % NUM_BLOCKS].flags & 1) {
                if (pool.blocks[a % NUM_BLOCKS].pins < 100)
                    rf_block_pool_pin(&pool, a % NUM_BLOCKS);
            }
            break;
        case 6:
            if (pool.blocks[a % NUM_BLOCKS].pins) rf_block_pool_unpin(&pool, a % NUM_BLOCKS);
            break;
        case 7: {
            rf_block *const block = &pool.blocks[a % NUM_BLOCKS];
            if (!(block->flags & RF_BLOCK_CACHED)) break;
            rf_prefix_index_detach(&index, 0, a % NUM_BLOCKS);
            beliefs[a % NUM_BLOCKS].published = 0;
            if (block->flags & RF_BLOCK_KEPT) rf_block_pool_forget(&pool, a % NUM_BLOCKS);
            else block->flags &= (uint8_t)~RF_BLOCK_CACHED;
            break;
        }
        default: {
            const uint64_t id = (uint64_t)(a % NUM_IDS) << (b % 3 * 24);
            const int key = a % NUM_IDS;
            if (b % 3) { /* ids with other bits come and go without a belief */
                if (rf_id_map_find(&map, id) != RF_NO_ROW) rf_id_map_remove(&map, id);
                else if (rf_id_map_reserve(&map) == RF_OK) rf_id_map_add(&map, id);
                if (id == (uint64_t)key) present[key] = rf_id_map_find(&map, id) != RF_NO_ROW;
            } else {
                CHECK((rf_id_map_find(&map, id) != RF_NO_ROW) == present[key]);
                if (present[key]) CHECK(rf_id_map_remove(&map, id) != RF_NO_ROW);
                else if (rf_id_map_reserve(&map) == RF_OK) rf_id_map_add(&map, id);
                present[key] = !present[key];
            }
            break;
        }
        }
        check_all(&pool, &index, &map);
    }
    rf_id_map_free(&map);
    rf_prefix_index_free(&index);
    rf_block_pool_free(&pool);
    return 0;
}
