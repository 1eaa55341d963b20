/* Sequence id -> row: a hash map from any 64-bit id to a small stable index.
 *
 * A row belongs to its id until the id is removed; then the row is used again, newest first. Rows
 * index the arrays of whoever owns the map. Memory: 8 bytes a row and 4 bytes a hash slot, the
 * slots 1.25 to 2.5 times as many as the ids. Not thread-safe: the caller holds a lock. */
#ifndef RF_ID_MAP_H
#define RF_ID_MAP_H

#include <stdint.h>

#include "rf/status.h"

#define RF_NO_ROW INT32_C(-1)

typedef struct rf_id_map {
    uint64_t *ids;      /* [row_capacity] the id of a row; in a free row, the next free row */
    int32_t *slots;     /* [num_slots] rows, RF_NO_ROW when empty; linear probing, no tombstones */
    uint32_t num_slots; /* a power of two, or 0 before the first id */
    int32_t num_ids;    /* ids in the map */
    int32_t row_capacity; /* rows that ids has room for */
    int32_t num_rows;     /* rows ever used: all rows are below it */
    int32_t free_row;     /* the first free row below num_rows, RF_NO_ROW when there is none */
} rf_id_map;

static inline void rf_id_map_init(rf_id_map *map) { *map = (rf_id_map){.free_row = RF_NO_ROW}; }
RF_API void rf_id_map_free(rf_id_map *map);

/* Makes room: the next add of a new id cannot fail. RF_ERR_NO_MEMORY leaves it unchanged. */
RF_API int rf_id_map_reserve(rf_id_map *map);

/* The row of a new id, after a successful reserve. The id must not be in the map. O(1). */
RF_API int32_t rf_id_map_add(rf_id_map *map, uint64_t id);

/* Forgets the id and returns the row it had, or RF_NO_ROW. O(1). */
RF_API int32_t rf_id_map_remove(rf_id_map *map, uint64_t id);

RF_API int rf_id_map_validate(const rf_id_map *map, const char **reason);

/* The finalizer of MurmurHash3 (Austin Appleby, public domain): neighbouring ids spread out. */
static inline uint32_t rf_id_hash(uint64_t id) {
    id ^= id >> 33;
    id *= UINT64_C(0xff51afd7ed558ccd);
    id ^= id >> 33;
    id *= UINT64_C(0xc4ceb9fe1a85ec53);
    return (uint32_t)(id >> 32);
}

/* The row of an id, or RF_NO_ROW. O(1): a slot and an id in the usual case. */
static inline int32_t rf_id_map_find(const rf_id_map *map, uint64_t id) {
    if (map->num_slots == 0) return RF_NO_ROW;
    const uint32_t mask = map->num_slots - 1;
    for (uint32_t s = rf_id_hash(id) & mask;; s = (s + 1) & mask) {
        const int32_t row = map->slots[s];
        if (row == RF_NO_ROW || map->ids[row] == id) return row;
    }
}

#endif
