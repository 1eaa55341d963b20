#include "rf/id_map.h"

#include <string.h>

#include "require.h"
#include "rf/alloc.h"

void rf_id_map_free(rf_id_map *map) {
    rf_free(map->ids);
    rf_free(map->slots);
    rf_id_map_init(map);
}

static void insert_row(const rf_id_map *map, int32_t row) {
    const uint32_t mask = map->num_slots - 1;
    uint32_t s = rf_id_hash(map->ids[row]) & mask;
    while (map->slots[s] != RF_NO_ROW) s = (s + 1) & mask;
    map->slots[s] = row;
}

/* Doubles the slots: at most 4/5 of them are ever taken, so a probe ends after a few steps. */
static int grow_slots(rf_id_map *map) {
    const uint32_t old_num = map->num_slots, num = old_num ? old_num * 2 : 16;
    if (num > (UINT32_C(1) << 30)) return RF_ERR_NO_MEMORY;
    int32_t *const old = map->slots, *const slots = rf_alloc(num * sizeof *slots);
    if (!slots) return RF_ERR_NO_MEMORY;
    memset(slots, 0xff, num * sizeof *slots); /* RF_NO_ROW everywhere */
    map->slots = slots;
    map->num_slots = num;
    for (uint32_t s = 0; s < old_num; s++) {
        if (old[s] != RF_NO_ROW) insert_row(map, old[s]);
    }
    rf_free(old);
    return RF_OK;
}

int rf_id_map_reserve(rf_id_map *map) {
    if (map->free_row == RF_NO_ROW && map->num_rows == map->row_capacity) {
        /* a quarter more, not twice: a table of many short sequences must stay small */
        const int64_t capacity = (int64_t)map->row_capacity + map->row_capacity / 4 + 16;
        uint64_t *const ids = rf_realloc(map->ids, (size_t)capacity * sizeof *ids);
        if (!ids) return RF_ERR_NO_MEMORY;
        map->ids = ids;
        map->row_capacity = (int32_t)capacity;
    }
    if ((uint64_t)map->num_ids * 5 >= (uint64_t)map->num_slots * 4) return grow_slots(map);
    return RF_OK;
}

int32_t rf_id_map_add(rf_id_map *map, uint64_t id) {
    int32_t row = map->free_row;
    if (row != RF_NO_ROW) map->free_row = (int32_t)(int64_t)map->ids[row];
    else row = map->num_rows++;
    map->ids[row] = id;
    map->num_ids++;
    insert_row(map, row);
    return row;
}

int32_t rf_id_map_remove(rf_id_map *map, uint64_t id) {
    if (map->num_slots == 0) return RF_NO_ROW;
    const uint32_t mask = map->num_slots - 1;
    uint32_t hole = rf_id_hash(id) & mask;
    while (map->slots[hole] != RF_NO_ROW && map->ids[map->slots[hole]] != id)
        hole = (hole + 1) & mask;
    const int32_t row = map->slots[hole];
    if (row == RF_NO_ROW) return RF_NO_ROW;
    /* Move back every later entry of the run that may stand in the hole (Knuth, TAOCP 3, 6.4 R). */
    for (uint32_t s = (hole + 1) & mask; map->slots[s] != RF_NO_ROW; s = (s + 1) & mask) {
        const uint32_t home = rf_id_hash(map->ids[map->slots[s]]) & mask;
        if (((s - home) & mask) >= ((s - hole) & mask)) {
            map->slots[hole] = map->slots[s];
            hole = s;
        }
    }
    map->slots[hole] = RF_NO_ROW;
    map->ids[row] = (uint64_t)(int64_t)map->free_row;
    map->free_row = row;
    map->num_ids--;
    return row;
}

int rf_id_map_validate(const rf_id_map *map, const char **reason) {
    *reason = "";
    REQUIRE((map->num_slots & (map->num_slots - 1)) == 0, "num_slots is no power of two");
    REQUIRE(map->num_rows >= 0 && map->num_rows <= map->row_capacity, "num_rows out of range");
    uint32_t taken = 0;
    for (uint32_t s = 0; s < map->num_slots; s++) {
        const int32_t row = map->slots[s];
        if (row == RF_NO_ROW) continue;
        REQUIRE(row >= 0 && row < map->num_rows, "a slot with a row out of range");
        taken++;
    }
    REQUIRE(map->num_ids >= 0 && taken == (uint32_t)map->num_ids,
            "num_ids differs from the slots taken");
    /* from here on a find stays in bounds and ends */
    REQUIRE(taken == 0 || taken < map->num_slots, "no empty slot");
    int32_t found = 0, free_rows = 0;
    for (int32_t row = 0; row < map->num_rows; row++) {
        found += rf_id_map_find(map, map->ids[row]) == row;
    }
    REQUIRE(found == map->num_ids, "an id that is not found");
    for (int32_t row = map->free_row; row != RF_NO_ROW; free_rows++) {
        REQUIRE(row >= 0 && row < map->num_rows, "a free row out of range");
        REQUIRE(free_rows < map->num_rows, "a list of free rows that does not end");
        REQUIRE(rf_id_map_find(map, map->ids[row]) != row, "a row both free and in use");
        const uint64_t next = map->ids[row];
        row = next < (uint64_t)map->num_rows ? (int32_t)next : RF_NO_ROW;
        REQUIRE(row != RF_NO_ROW || next == UINT64_MAX, "a free row out of range");
    }
    REQUIRE(free_rows + map->num_ids == map->num_rows, "rows free + rows used != rows");
    return RF_OK;
}
