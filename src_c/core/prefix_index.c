#include "rf/prefix_index.h"

#include <string.h>

#include "require.h"
#include "rf/alloc.h"

/* SplitMix64 (Steele, Lea, Flood 2014): expands the seed to the keys. */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

int rf_prefix_index_init(rf_prefix_index *index, int32_t block_size, int32_t num_groups,
                         const int32_t *group_blocks, uint64_t seed) {
    memset(index, 0, sizeof *index);
    /* A node for each block is enough but for roots, and for ancestors whose block was evicted. */
    int64_t capacity = 1024;
    for (int32_t g = 0; g < num_groups; g++) capacity += group_blocks[g];
    if (capacity > INT32_MAX - 1) capacity = INT32_MAX - 1;
    uint32_t num_buckets = 1024;
    while (num_buckets < capacity - 1024 && num_buckets < UINT32_C(1) << 30) num_buckets *= 2;
    index->capacity = (int32_t)capacity;
    index->block_size = block_size;
    index->num_groups = num_groups;
    index->num_buckets = num_buckets;
    index->hash_mask = UINT32_MAX;
    index->free_node = RF_NO_NODE;
    const size_t n = (size_t)capacity, num_keys = ((size_t)block_size + 1) / 2 * 2;
    index->nodes = rf_calloc(n, sizeof *index->nodes);
    index->tokens = rf_calloc(n, (size_t)block_size * sizeof *index->tokens);
    index->node_blocks = rf_calloc(n, (size_t)num_groups * sizeof *index->node_blocks);
    index->block_nodes = rf_calloc((size_t)num_groups, sizeof *index->block_nodes);
    index->buckets = rf_calloc(num_buckets, sizeof *index->buckets);
    index->keys = rf_calloc(num_keys, sizeof *index->keys);
    int complete = index->nodes && index->tokens && index->node_blocks && index->block_nodes &&
                   index->buckets && index->keys;
    for (int32_t g = 0; complete && g < num_groups; g++) {
        index->block_nodes[g] = rf_calloc((size_t)group_blocks[g], sizeof **index->block_nodes);
        complete = index->block_nodes[g] != NULL;
    }
    if (!complete) {
        rf_prefix_index_free(index);
        return RF_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < num_keys; i++) index->keys[i] = (uint32_t)(next_random(&seed) >> 32);
    return RF_OK;
}

void rf_prefix_index_free(rf_prefix_index *index) {
    for (int32_t g = 0; index->block_nodes && g < index->num_groups; g++) {
        rf_free(index->block_nodes[g]);
    }
    rf_free(index->nodes);
    rf_free(index->tokens);
    rf_free(index->node_blocks);
    rf_free(index->block_nodes);
    rf_free(index->buckets);
    rf_free(index->keys);
    memset(index, 0, sizeof *index);
}

/* NH of one block's tokens: independent of the parent, so that a walk does not wait for it. */
static uint64_t hash_tokens(const rf_prefix_index *index, const int32_t *tokens) {
    const uint32_t *const k = index->keys;
    const int32_t n = index->block_size;
    uint64_t sum = 0;
    for (int32_t i = 0; i + 1 < n; i += 2) {
        sum += (uint64_t)(k[i] + (uint32_t)tokens[i]) * (k[i + 1] + (uint32_t)tokens[i + 1]);
    }
    if (n & 1) sum += (uint64_t)(k[n - 1] + (uint32_t)tokens[n - 1]) * k[n];
    return sum;
}

static uint32_t hash_node(const rf_prefix_index *index, int32_t parent, uint64_t tokens_hash) {
    uint64_t h = tokens_hash + (uint64_t)(uint32_t)parent * UINT64_C(0x9e3779b97f4a7c15);
    h ^= h >> 32;
    h *= UINT64_C(0xd6e8feb86659fd93);
    return (uint32_t)(h >> 32) & index->hash_mask;
}

static int32_t find_hashed(const rf_prefix_index *index, int32_t parent, const int32_t *tokens,
                           uint32_t hash) {
    const size_t bytes = (size_t)index->block_size * sizeof *tokens;
    int32_t node = index->buckets[hash & (index->num_buckets - 1)] - 1;
    for (; node != RF_NO_NODE; node = index->nodes[node].next) {
        const rf_prefix_node *const n = &index->nodes[node];
        if (n->parent == parent && n->hash == hash &&
            memcmp(index->tokens + (int64_t)node * index->block_size, tokens, bytes) == 0) {
            return node;
        }
    }
    return RF_NO_NODE;
}

int32_t rf_prefix_index_find(const rf_prefix_index *index, int32_t parent, const int32_t *tokens) {
    return find_hashed(index, parent, tokens, hash_node(index, parent, hash_tokens(index, tokens)));
}

int32_t rf_prefix_index_walk(const rf_prefix_index *index, int32_t root, const int32_t *tokens,
                             int32_t n, int32_t *nodes) {
    int32_t node = root;
    for (int32_t i = 0; i < n; i++, tokens += index->block_size) {
        node = rf_prefix_index_find(index, node, tokens);
        if (node == RF_NO_NODE) return i;
        nodes[i] = node;
    }
    return n;
}

static int32_t take_node(rf_prefix_index *index) {
    int32_t node = index->free_node;
    if (node != RF_NO_NODE) index->free_node = index->nodes[node].parent;
    else if (index->next_fresh < index->capacity) node = index->next_fresh++;
    else return RF_NO_NODE;
    index->num_nodes++;
    return node;
}

static void return_node(rf_prefix_index *index, int32_t node) {
    index->nodes[node].parent = index->free_node;
    index->nodes[node].uses = 0;
    index->free_node = node;
    index->num_nodes--;
}

int32_t rf_prefix_index_add_root(rf_prefix_index *index) {
    const int32_t node = take_node(index);
    if (node == RF_NO_NODE) return RF_NO_NODE;
    index->nodes[node] = (rf_prefix_node){.parent = RF_NO_NODE, .next = RF_NO_NODE};
    return node;
}

void rf_prefix_index_drop_root(rf_prefix_index *index, int32_t root) { return_node(index, root); }

int32_t rf_prefix_index_step(rf_prefix_index *index, int32_t node, const int32_t *tokens) {
    const uint32_t hash = hash_node(index, node, hash_tokens(index, tokens));
    int32_t child = find_hashed(index, node, tokens, hash);
    if (child != RF_NO_NODE) {
        index->nodes[child].uses++;
        index->nodes[node].uses--; /* not the last one: the child uses it */
        return child;
    }
    child = take_node(index);
    if (child == RF_NO_NODE) return RF_NO_NODE;
    /* The use that leaves the node comes back as the child's. */
    int32_t *const bucket = &index->buckets[hash & (index->num_buckets - 1)];
    index->nodes[child] =
        (rf_prefix_node){.parent = node, .next = *bucket - 1, .uses = 1, .hash = hash};
    *bucket = child + 1;
    memcpy(index->tokens + (int64_t)child * index->block_size, tokens,
           (size_t)index->block_size * sizeof *tokens);
    return child;
}

void rf_prefix_index_use(rf_prefix_index *index, int32_t node) { index->nodes[node].uses++; }

void rf_prefix_index_unuse(rf_prefix_index *index, int32_t node) {
    while (--index->nodes[node].uses == 0 && index->nodes[node].parent != RF_NO_NODE) {
        const int32_t parent = index->nodes[node].parent;
        int32_t *const bucket = &index->buckets[index->nodes[node].hash & (index->num_buckets - 1)];
        if (*bucket - 1 == node) {
            *bucket = index->nodes[node].next + 1;
        } else {
            int32_t before = *bucket - 1;
            while (index->nodes[before].next != node) before = index->nodes[before].next;
            index->nodes[before].next = index->nodes[node].next;
        }
        return_node(index, node);
        node = parent;
    }
}

void rf_prefix_index_detach(rf_prefix_index *index, int32_t group, int32_t block) {
    const int32_t node = rf_prefix_index_node(index, group, block);
    if (node == RF_NO_NODE) return;
    index->node_blocks[(int64_t)node * index->num_groups + group] = 0;
    index->block_nodes[group][block] = 0;
    index->num_blocks--;
    rf_prefix_index_unuse(index, node);
}

int rf_prefix_index_validate(const rf_prefix_index *index, const int32_t *group_blocks,
                             const char **reason) {
    *reason = "";
    int32_t free_nodes = 0, hashed = 0, attached = 0;
    for (int32_t n = index->free_node; n != RF_NO_NODE; n = index->nodes[n].parent) {
        REQUIRE(n >= 0 && n < index->next_fresh, "a free node out of range");
        REQUIRE(++free_nodes <= index->next_fresh, "a free list of nodes that does not end");
    }
    REQUIRE(free_nodes + index->num_nodes == index->next_fresh, "free + live != nodes");
    for (uint32_t b = 0; b < index->num_buckets; b++) {
        for (int32_t n = index->buckets[b] - 1; n != RF_NO_NODE; n = index->nodes[n].next) {
            REQUIRE(n >= 0 && n < index->next_fresh, "a node of a bucket out of range");
            REQUIRE(++hashed <= index->num_nodes, "a bucket that does not end");
            const int32_t *const tokens = index->tokens + (int64_t)n * index->block_size;
            const int32_t parent = index->nodes[n].parent;
            REQUIRE(parent >= 0 && parent < index->next_fresh, "a parent out of range");
            REQUIRE(index->nodes[n].uses > 0, "a node in a bucket that nothing uses");
            REQUIRE(index->nodes[parent].uses > 0, "a parent that nothing uses");
            REQUIRE(rf_prefix_index_find(index, parent, tokens) == n, "a node that is not found");
        }
    }
    for (int32_t g = 0; g < index->num_groups; g++) {
        for (int32_t block = 0; block < group_blocks[g]; block++) {
            const int32_t node = rf_prefix_index_node(index, g, block);
            if (node == RF_NO_NODE) continue;
            attached++;
            REQUIRE(node >= 0 && node < index->next_fresh, "the node of a block out of range");
            REQUIRE(rf_prefix_index_block(index, node, g) == block, "node and block disagree");
        }
    }
    REQUIRE(attached == index->num_blocks, "num_blocks differs from the blocks in the index");
    return RF_OK;
}
