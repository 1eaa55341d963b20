#include "rf/id_map.h"

#include "check.h"
#include "rf/alloc.h"

#define VALID(map)         CHECK_VALID(rf_id_map_validate(map, &reason))
#define INVALID(map, text) CHECK_INVALID(rf_id_map_validate(map, &reason), text)

static uint64_t random_state = 88172645463325252u;

static uint64_t next_random(void) { /* xorshift64 (Marsaglia 2003) */
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

static int32_t put(rf_id_map *map, uint64_t id) {
    CHECK(rf_id_map_reserve(map) == RF_OK);
    return rf_id_map_add(map, id);
}

static rf_id_map map_of(int n) {
    rf_id_map map;
    rf_id_map_init(&map);
    for (int i = 0; i < n; i++) CHECK(put(&map, (uint64_t)i * 3) == i);
    return map;
}

static void an_empty_map(void) {
    rf_id_map map = map_of(0);
    VALID(&map);
    CHECK(rf_id_map_find(&map, 0) == RF_NO_ROW);
    CHECK(rf_id_map_find(&map, UINT64_MAX) == RF_NO_ROW);
    CHECK(rf_id_map_remove(&map, 0) == RF_NO_ROW);
    rf_id_map_free(&map);
    VALID(&map);
    rf_id_map_free(&map);
}

static void rows_are_stable_and_used_again_newest_first(void) {
    rf_id_map map = map_of(100);
    for (int i = 0; i < 100; i++) CHECK(rf_id_map_find(&map, (uint64_t)i * 3) == i);
    CHECK(rf_id_map_find(&map, 1) == RF_NO_ROW);
    CHECK(rf_id_map_remove(&map, 1) == RF_NO_ROW);
    CHECK(rf_id_map_remove(&map, 30) == 10);
    CHECK(rf_id_map_remove(&map, 60) == 20);
    CHECK(rf_id_map_remove(&map, 60) == RF_NO_ROW);
    VALID(&map);
    CHECK(map.num_ids == 98);
    CHECK(put(&map, UINT64_MAX) == 20);
    CHECK(put(&map, 1) == 10);
    CHECK(put(&map, 2) == 100);
    CHECK(rf_id_map_find(&map, UINT64_MAX) == 20);
    VALID(&map);
    rf_id_map_free(&map);
}

/* The ids of free rows' links must not be found, nor hide real ones. */
static void ids_that_look_like_links(void) {
    rf_id_map map = map_of(0);
    for (uint64_t id = 0; id < 8; id++) put(&map, id);
    for (uint64_t id = 0; id < 8; id += 2) CHECK(rf_id_map_remove(&map, id) == (int32_t)id);
    VALID(&map);
    for (uint64_t id = 0; id < 8; id++) {
        CHECK(rf_id_map_find(&map, id) == (id % 2 ? (int32_t)id : RF_NO_ROW));
    }
    CHECK(rf_id_map_find(&map, UINT64_MAX) == RF_NO_ROW);
    rf_id_map_free(&map);
}

/* Beside an array of ids: the map holds exactly those that the array does. */
static void random_adds_and_removes(void) {
    enum { NUM = 512 };
    uint64_t ids[NUM];
    int32_t rows[NUM];
    for (int i = 0; i < NUM; i++) {
        ids[i] = i % 2 ? next_random() : (uint64_t)i; /* neighbours, and spread ones */
        rows[i] = RF_NO_ROW;
    }
    rf_id_map map = map_of(0);
    for (int step = 0; step < 40000; step++) {
        const int i = (int)(next_random() % NUM);
        CHECK(rf_id_map_find(&map, ids[i]) == rows[i]);
        if (rows[i] == RF_NO_ROW) rows[i] = put(&map, ids[i]);
        else {
            CHECK(rf_id_map_remove(&map, ids[i]) == rows[i]);
            rows[i] = RF_NO_ROW;
        }
        if (step % 97 == 0) VALID(&map);
    }
    CHECK(map.num_rows <= NUM);
    for (int i = 0; i < NUM; i++) CHECK(rf_id_map_find(&map, ids[i]) == rows[i]);
    rf_id_map_free(&map);
}

static void memory_stays_in_its_bound(void) {
    rf_id_map map = map_of(0);
    for (uint64_t id = 1; id <= 100000; id++) {
        put(&map, id);
        if (id > 64) {
            CHECK((uint64_t)map.num_slots * 4 > (id - 1) * 5);
            CHECK((uint64_t)map.num_slots * 2 <= id * 5);
            CHECK((uint64_t)map.row_capacity * 4 <= id * 5 + 64);
        }
    }
    VALID(&map);
    rf_id_map_free(&map);
}

static void a_failed_reserve_changes_nothing(void) {
    for (int size = 0; size < 60; size++) {
        for (int64_t n = 1;; n++) {
            rf_id_map map = map_of(size);
            CHECK(rf_alloc_fail_after(n) == 0);
            const int status = rf_id_map_reserve(&map);
            const int failed = rf_alloc_fail_after(0) == 0;
            CHECK(status == (failed ? RF_ERR_NO_MEMORY : RF_OK));
            VALID(&map);
            CHECK(map.num_ids == size && map.num_rows == size);
            for (int i = 0; i < size; i++) CHECK(rf_id_map_find(&map, (uint64_t)i * 3) == i);
            CHECK(put(&map, UINT64_MAX) == size);
            VALID(&map);
            rf_id_map_free(&map);
            if (!failed) break;
        }
    }
}

static void after_a_reserve_the_add_takes_no_memory(void) {
    for (int size = 0; size < 60; size++) {
        rf_id_map map = map_of(size);
        CHECK(rf_id_map_reserve(&map) == RF_OK);
        CHECK(rf_alloc_fail_after(1) == 0);
        CHECK(rf_id_map_add(&map, UINT64_MAX) == size);
        CHECK(rf_id_map_remove(&map, UINT64_MAX) == size);
        CHECK(rf_alloc_fail_after(0) == 1);
        rf_id_map_free(&map);
    }
}

static uint32_t slot_of(const rf_id_map *map, int32_t row) {
    for (uint32_t s = 0; s < map->num_slots; s++) {
        if (map->slots[s] == row) return s;
    }
    CHECK(!"a row without a slot");
    return 0;
}

/* Breaks something in the sound map, sees it reported, and mends it. */
#define BROKEN(breakage, text)                                                                     \
    do {                                                                                           \
        breakage;                                                                                  \
        INVALID(&map, text);                                                                       \
        map = sound;                                                                               \
        memcpy(map.ids, ids, sizeof ids);                                                          \
        memcpy(map.slots, slots, sizeof slots);                                                    \
    } while (0)

static void corruption_is_reported(void) {
    rf_id_map map = map_of(10);
    rf_id_map_remove(&map, 3); /* row 1 */
    rf_id_map_remove(&map, 9); /* row 3, the first free one */
    VALID(&map);
    const rf_id_map sound = map;
    uint64_t ids[10];
    int32_t slots[16];
    CHECK(map.num_rows == COUNT(ids) && map.num_slots == COUNT(slots));
    memcpy(ids, map.ids, sizeof ids);
    memcpy(slots, map.slots, sizeof slots);
    const uint32_t five = slot_of(&map, 5), empty = slot_of(&map, RF_NO_ROW);

    BROKEN(map.num_slots = 15, "power of two");
    BROKEN(map.num_rows = map.row_capacity + 1, "num_rows out of range");
    BROKEN(map.num_rows = -1, "num_rows out of range");
    BROKEN(map.ids[10] = 1; map.num_rows = 11, "rows free + rows used");
    BROKEN(map.num_ids = 9, "num_ids");
    BROKEN(map.num_ids = -1, "num_ids");
    BROKEN(map.free_row = 10, "free row out of range");
    BROKEN(map.free_row = -2, "free row out of range");
    BROKEN(map.free_row = RF_NO_ROW, "rows free + rows used");
    BROKEN(map.free_row = 1, "rows free + rows used");
    BROKEN(map.free_row = 5, "both free and in use");

    BROKEN(map.slots[five] = 10, "a row out of range");
    BROKEN(map.slots[five] = INT32_MAX, "a row out of range");
    BROKEN(map.slots[five] = INT32_MIN, "a row out of range");
    BROKEN(map.slots[five] = RF_NO_ROW, "num_ids");
    BROKEN(map.slots[five] = 6, "not found"); /* row 6 twice, row 5 lost */
    BROKEN(map.slots[empty] = 6, "num_ids");

    BROKEN(map.ids[5] = 18, "not found"); /* the id of row 6 */
    BROKEN(map.ids[1] = 1, "does not end");
    BROKEN(map.ids[1] = 3, "does not end");
    BROKEN(map.ids[1] = 10, "free row out of range");
    BROKEN(map.ids[1] = UINT64_MAX - 1, "free row out of range");

    /* slots without an empty one: a search would never end */
    for (uint32_t s = 0; s < map.num_slots; s++) {
        if (map.slots[s] == RF_NO_ROW) map.slots[s] = 5;
    }
    BROKEN(map.num_ids = (int32_t)map.num_slots, "no empty slot");
    VALID(&map);
    rf_id_map_free(&map);
}

int main(void) {
    an_empty_map();
    rows_are_stable_and_used_again_newest_first();
    ids_that_look_like_links();
    random_adds_and_removes();
    memory_stays_in_its_bound();
    a_failed_reserve_changes_nothing();
    after_a_reserve_the_add_takes_no_memory();
    corruption_is_reported();
    return 0;
}
