#include "rf/prefix_index.h"

#include "check.h"
#include "rf/alloc.h"

enum { BLOCK_SIZE = 3, NUM_GROUPS = 2 };

static const int32_t sizes[NUM_GROUPS] = {20, 9};

#define VALID(index)         CHECK_VALID(rf_prefix_index_validate(index, sizes, &reason))
#define INVALID(index, text) CHECK_INVALID(rf_prefix_index_validate(index, sizes, &reason), text)

static rf_prefix_index index_of(void) {
    rf_prefix_index index;
    CHECK(rf_prefix_index_init(&index, BLOCK_SIZE, NUM_GROUPS, sizes, 12345) == RF_OK);
    return index;
}

static int32_t root_of(rf_prefix_index *index) {
    const int32_t root = rf_prefix_index_add_root(index);
    CHECK(root != RF_NO_NODE);
    return root;
}

/* The block of tokens that stands for a number. */
static const int32_t *block_of(int32_t number, int32_t *tokens) {
    for (int32_t i = 0; i < BLOCK_SIZE; i++) tokens[i] = number - i;
    return tokens;
}

static int32_t find(const rf_prefix_index *index, int32_t parent, int32_t number) {
    int32_t tokens[BLOCK_SIZE];
    return rf_prefix_index_find(index, parent, block_of(number, tokens));
}

static int32_t step(rf_prefix_index *index, int32_t node, int32_t number) {
    int32_t tokens[BLOCK_SIZE];
    return rf_prefix_index_step(index, node, block_of(number, tokens));
}

/* A node below another one, with a use that the caller drops. */
static int32_t child_of(rf_prefix_index *index, int32_t parent, int32_t number) {
    rf_prefix_index_use(index, parent);
    const int32_t child = step(index, parent, number);
    CHECK(child != RF_NO_NODE);
    return child;
}

static void sizes_of_blocks_and_groups(void) {
    static const int32_t none[1] = {0};
    for (int32_t block_size = 1; block_size < 6; block_size++) {
        rf_prefix_index index;
        CHECK(rf_prefix_index_init(&index, block_size, 1, none, 7) == RF_OK);
        CHECK(index.num_nodes == 0 && index.num_blocks == 0);
        const int32_t root = root_of(&index);
        /* one token of five at a time differs: all of them count, also the last of an odd number */
        for (int32_t i = 0; i < block_size; i++) {
            int32_t tokens[5] = {0};
            tokens[i] = -1;
            rf_prefix_index_use(&index, root);
            CHECK(rf_prefix_index_find(&index, root, tokens) == RF_NO_NODE);
            const int32_t node = rf_prefix_index_step(&index, root, tokens);
            CHECK(rf_prefix_index_find(&index, root, tokens) == node);
        }
        CHECK(index.num_nodes == 1 + block_size);
        CHECK_VALID(rf_prefix_index_validate(&index, none, &reason));
        rf_prefix_index_free(&index);
        rf_prefix_index_free(&index);
    }
}

static void a_failed_init_leaves_nothing(void) {
    int failures = 0;
    for (int64_t n = 1;; n++) {
        rf_prefix_index index;
        CHECK(rf_alloc_fail_after(n) == 0);
        const int status = rf_prefix_index_init(&index, BLOCK_SIZE, NUM_GROUPS, sizes, 1);
        const int failed = rf_alloc_fail_after(0) == 0;
        CHECK(status == (failed ? RF_ERR_NO_MEMORY : RF_OK));
        CHECK((index.nodes == NULL) == failed && (index.capacity == 0) == failed);
        rf_prefix_index_free(&index);
        if (!failed) break;
        failures++;
    }
    CHECK(failures == 6 + NUM_GROUPS);
}

static void nothing_allocates_after_init(void) {
    rf_prefix_index index = index_of();
    CHECK(rf_alloc_fail_after(1) == 0);
    const int32_t root = root_of(&index);
    int32_t node = child_of(&index, root, 5);
    rf_prefix_index_attach(&index, node, 1, 3);
    node = step(&index, node, 6);
    rf_prefix_index_unuse(&index, node);
    rf_prefix_index_detach(&index, 1, 3);
    rf_prefix_index_drop_root(&index, root);
    CHECK(rf_alloc_fail_after(0) == 1);
    CHECK(index.num_nodes == 0);
    VALID(&index);
    rf_prefix_index_free(&index);
}

static void contents_are_told_from_the_root(void) {
    rf_prefix_index index = index_of();
    const int32_t a = root_of(&index), b = root_of(&index);
    CHECK(a != b && find(&index, a, 1) == RF_NO_NODE);
    const int32_t a1 = child_of(&index, a, 1), a2 = child_of(&index, a, 2);
    CHECK(find(&index, a, 1) == a1 && find(&index, a, 2) == a2);
    CHECK(find(&index, b, 1) == RF_NO_NODE); /* the spaces are apart */
    const int32_t a11 = child_of(&index, a1, 1), a21 = child_of(&index, a2, 1);
    const int32_t b1 = child_of(&index, b, 1);
    CHECK(a11 != a21 && a11 != a1 && b1 != a1); /* the same tokens, of other ancestors */
    CHECK(find(&index, a1, 1) == a11 && find(&index, a2, 1) == a21 && find(&index, b, 1) == b1);
    CHECK(find(&index, a1, 2) == RF_NO_NODE);
    CHECK(child_of(&index, a, 1) == a1); /* one node a content */
    CHECK(index.num_nodes == 7);
    VALID(&index);
    rf_prefix_index_free(&index);
}

static void a_walk_ends_where_nothing_is_found(void) {
    rf_prefix_index index = index_of();
    const int32_t root = root_of(&index);
    int32_t chain[4], found[5] = {-9, -9, -9, -9, -9}, tokens[5 * BLOCK_SIZE], node = root;
    rf_prefix_index_use(&index, root);
    for (int32_t i = 0; i < 4; i++) node = chain[i] = step(&index, node, 10 * i);
    for (int32_t i = 0; i < 5; i++) block_of(10 * i, tokens + i * BLOCK_SIZE);
    for (int32_t n = 0; n < 6; n++) {
        const int32_t walked = rf_prefix_index_walk(&index, root, tokens, n < 5 ? n : 5, found);
        CHECK(walked == (n < 4 ? n : 4));
        for (int32_t i = 0; i < walked; i++) CHECK(found[i] == chain[i]);
    }
    CHECK(found[4] == -9);
    tokens[2 * BLOCK_SIZE + 1]++;
    CHECK(rf_prefix_index_walk(&index, root, tokens, 5, found) == 2);
    CHECK(rf_prefix_index_walk(&index, chain[0], tokens + BLOCK_SIZE, 4, found) == 1);
    rf_prefix_index_free(&index);
}

static void the_last_use_frees_a_chain(void) {
    rf_prefix_index index = index_of();
    const int32_t root = root_of(&index);
    int32_t node = root, middle = RF_NO_NODE;
    rf_prefix_index_use(&index, root);
    for (int32_t i = 0; i < 6; i++) {
        node = step(&index, node, i);
        if (i == 2) middle = node;
    }
    CHECK(index.num_nodes == 7 && index.nodes[root].uses == 1);
    rf_prefix_index_attach(&index, middle, 0, 11);
    rf_prefix_index_unuse(&index, node);
    CHECK(index.num_nodes == 4); /* as far as the block */
    CHECK(index.nodes[middle].uses == 1 && rf_prefix_index_block(&index, middle, 0) == 11);
    VALID(&index);
    rf_prefix_index_detach(&index, 0, 11);
    CHECK(index.num_nodes == 1 && index.nodes[root].uses == 0);
    CHECK(find(&index, root, 0) == RF_NO_NODE);
    VALID(&index);
    /* freed nodes are found again under other contents only */
    node = child_of(&index, root, 77);
    CHECK(node < 7 && rf_prefix_index_block(&index, node, 0) == -1);
    CHECK(find(&index, root, 77) == node);
    VALID(&index);
    rf_prefix_index_free(&index);
}

static void blocks_of_groups_come_and_go_on_their_own(void) {
    rf_prefix_index index = index_of();
    const int32_t root = root_of(&index), node = child_of(&index, root, 1);
    rf_prefix_index_attach(&index, node, 0, 19);
    rf_prefix_index_attach(&index, node, 1, 0);
    CHECK(index.num_blocks == 2 && index.nodes[node].uses == 3);
    CHECK(rf_prefix_index_block(&index, node, 0) == 19);
    CHECK(rf_prefix_index_block(&index, node, 1) == 0);
    CHECK(rf_prefix_index_node(&index, 0, 19) == node);
    CHECK(rf_prefix_index_node(&index, 1, 0) == node);
    CHECK(rf_prefix_index_node(&index, 0, 0) == RF_NO_NODE);
    VALID(&index);
    rf_prefix_index_detach(&index, 0, 0); /* holds nothing */
    rf_prefix_index_detach(&index, 0, 19);
    rf_prefix_index_detach(&index, 0, 19);
    CHECK(index.num_blocks == 1 && rf_prefix_index_block(&index, node, 0) == -1);
    CHECK(rf_prefix_index_block(&index, node, 1) == 0);
    rf_prefix_index_attach(&index, node, 0, 4); /* another one takes its place */
    rf_prefix_index_unuse(&index, node);
    VALID(&index);
    rf_prefix_index_detach(&index, 1, 0);
    CHECK(find(&index, root, 1) == node);
    rf_prefix_index_detach(&index, 0, 4);
    CHECK(find(&index, root, 1) == RF_NO_NODE);
    VALID(&index);
    rf_prefix_index_free(&index);
}

static void when_all_nodes_are_taken_nothing_moves(void) {
    rf_prefix_index index = index_of();
    const int32_t root = root_of(&index);
    int32_t last = RF_NO_NODE;
    for (int32_t i = 1; i < index.capacity; i++) last = child_of(&index, root, i);
    CHECK(index.num_nodes == index.capacity && index.nodes[root].uses == index.capacity - 1);
    CHECK(rf_prefix_index_add_root(&index) == RF_NO_NODE);
    rf_prefix_index_use(&index, last);
    CHECK(step(&index, last, 1) == RF_NO_NODE);
    CHECK(index.nodes[last].uses == 2);
    CHECK(find(&index, last, 1) == RF_NO_NODE);
    VALID(&index);
    CHECK(step(&index, root, 5) != RF_NO_NODE); /* one that is there already */
    rf_prefix_index_use(&index, root);
    VALID(&index);
    const int32_t five = find(&index, root, 5);
    rf_prefix_index_unuse(&index, five);
    rf_prefix_index_unuse(&index, five);
    CHECK(step(&index, last, 1) == five); /* one was left: it is used again */
    CHECK(index.num_nodes == index.capacity);
    VALID(&index);
    rf_prefix_index_free(&index);
}

static void roots_come_back(void) {
    rf_prefix_index index = index_of();
    for (int32_t i = 0; i < 3 * index.capacity; i++) {
        rf_prefix_index_drop_root(&index, root_of(&index));
    }
    CHECK(index.num_nodes == 0 && index.next_fresh == 1);
    VALID(&index);
    rf_prefix_index_free(&index);
}

static uint64_t random_state = 88172645463325252u;

static int32_t next_random(uint32_t below) { /* xorshift64 (Marsaglia 2003) */
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (int32_t)((uint32_t)(random_state >> 32) % below);
}

/* Chains of 0 and 1, beside the contents of each block as a number: a leading 1, then a bit a
 * block of the chain. */
static void random_calls(uint32_t hash_mask) {
    rf_prefix_index index = index_of();
    index.hash_mask = hash_mask;
    const int32_t root = root_of(&index);
    int32_t model[20] = {0};
    for (int call = 0; call < 4000; call++) {
        const int32_t depth = 1 + next_random(5);
        int32_t node = root, code = 1, tokens[5 * BLOCK_SIZE], nodes[5];
        rf_prefix_index_use(&index, root);
        for (int32_t i = 0; i < depth; i++) {
            const int32_t bit = next_random(2);
            code = 2 * code + bit;
            block_of(bit, tokens + i * BLOCK_SIZE);
            node = step(&index, node, bit);
        }
        CHECK(rf_prefix_index_walk(&index, root, tokens, depth, nodes) == depth);
        CHECK(nodes[depth - 1] == node);
        int32_t holder = -1;
        for (int32_t b = 0; b < 20; b++) {
            if (model[b] == code) holder = b;
        }
        CHECK(rf_prefix_index_block(&index, node, 0) == holder);
        const int32_t block = next_random(20);
        if (holder == -1) {
            rf_prefix_index_detach(&index, 0, block); /* as if it were evicted for it */
            rf_prefix_index_attach(&index, node, 0, block);
            model[block] = code;
        } else if (next_random(3) == 0) {
            rf_prefix_index_detach(&index, 0, holder);
            model[holder] = 0;
        }
        rf_prefix_index_unuse(&index, node);
        if (call % 31 == 0) VALID(&index);
    }
    for (int32_t b = 0; b < 20; b++) rf_prefix_index_detach(&index, 0, b);
    CHECK(index.num_nodes == 1 && index.num_blocks == 0 && index.nodes[root].uses == 0);
    VALID(&index);
    rf_prefix_index_free(&index);
}

/* Breaks one thing of a sound index, sees it reported, and mends it. */
#define BROKEN(place, value, text)                                                                 \
    do {                                                                                           \
        const int32_t sound = (int32_t)(place);                                                    \
        place = (value);                                                                           \
        INVALID(&index, text);                                                                     \
        place = sound;                                                                             \
        VALID(&index);                                                                             \
    } while (0)

static void corruption_is_reported(void) {
    rf_prefix_index index = index_of();
    index.hash_mask = 0; /* one bucket, so that its list has several nodes */
    const int32_t root = root_of(&index);
    const int32_t a = child_of(&index, root, 1), b = child_of(&index, a, 2);
    const int32_t c = child_of(&index, root, 3), d = child_of(&index, root, 4);
    const int32_t e = child_of(&index, root, 5);
    rf_prefix_index_attach(&index, b, 0, 7);
    rf_prefix_index_attach(&index, c, 1, 2);
    rf_prefix_index_unuse(&index, d);
    rf_prefix_index_unuse(&index, e);
    VALID(&index); /* d and e are free nodes; the bucket is c, b, a */
    CHECK(index.free_node == e && index.buckets[0] == c + 1 && index.nodes[c].next == b);
    rf_prefix_node *const n = index.nodes;

    BROKEN(index.free_node, 99, "a free node out of range");
    BROKEN(index.free_node, -3, "a free node out of range");
    BROKEN(index.free_node, RF_NO_NODE, "free + live");
    BROKEN(n[d].parent, 99, "a free node out of range");
    BROKEN(n[d].parent, e, "does not end"); /* a ring */
    BROKEN(n[e].parent, e, "does not end");
    BROKEN(index.num_nodes, 3, "free + live");
    BROKEN(index.next_fresh, 7, "free + live");

    BROKEN(index.buckets[0], 100, "a node of a bucket out of range");
    BROKEN(index.buckets[0], -7, "a node of a bucket out of range");
    BROKEN(n[c].next, 100, "a node of a bucket out of range");
    BROKEN(n[a].next, c, "a bucket that does not end");
    BROKEN(n[b].next, b, "a bucket that does not end");
    BROKEN(index.buckets[3], c + 1, "");
    BROKEN(n[c].parent, 100, "a parent out of range");
    BROKEN(n[c].parent, RF_NO_NODE, "a parent out of range");
    BROKEN(n[c].parent, d, "a parent that nothing uses");
    BROKEN(n[c].uses, 0, "that nothing uses");
    BROKEN(n[root].uses, 0, "a parent that nothing uses");
    n[c].hash ^= 1;
    INVALID(&index, "a node that is not found");
    n[c].hash ^= 1;
    BROKEN(index.block_nodes[0][7], 100, "the node of a block out of range");
    BROKEN(index.block_nodes[0][7], -5, "the node of a block out of range");
    BROKEN(index.block_nodes[0][7], c + 1, "node and block disagree");
    BROKEN(index.block_nodes[0][8], b + 1, "node and block disagree");
    BROKEN(index.block_nodes[0][7], 0, "num_blocks");
    BROKEN(index.node_blocks[b * NUM_GROUPS], 1, "node and block disagree");
    BROKEN(index.num_blocks, 1, "num_blocks");
    rf_prefix_index_free(&index);
}

int main(void) {
    sizes_of_blocks_and_groups();
    a_failed_init_leaves_nothing();
    nothing_allocates_after_init();
    contents_are_told_from_the_root();
    a_walk_ends_where_nothing_is_found();
    the_last_use_frees_a_chain();
    blocks_of_groups_come_and_go_on_their_own();
    when_all_nodes_are_taken_nothing_moves();
    roots_come_back();
    random_calls(UINT32_MAX);
    random_calls(0);
    corruption_is_reported();
    return 0;
}
