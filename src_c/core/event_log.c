#include "rf/event_log.h"

#include <string.h>

#include "rf/alloc.h"
#include "rf/prefix_index.h"
#include "rf/sha256.h"

int rf_event_log_init(rf_event_log *log, int32_t capacity, int32_t block_size, int32_t num_nodes,
                      const uint8_t root_name[32]) {
    memset(log, 0, sizeof *log);
    if (capacity < 1 || capacity > 1 << 30) return RF_ERR_BAD_ARGUMENT;
    log->events = rf_calloc((size_t)capacity, sizeof *log->events);
    log->tokens = rf_calloc((size_t)capacity, (size_t)block_size * sizeof *log->tokens);
    log->names = rf_calloc((size_t)num_nodes, sizeof *log->names);
    if (!log->events || !log->tokens || !log->names) {
        rf_event_log_free(log);
        return RF_ERR_NO_MEMORY;
    }
    log->capacity = capacity;
    log->block_size = block_size;
    memcpy(log->root_name, root_name, sizeof log->root_name);
    return RF_OK;
}

void rf_event_log_free(rf_event_log *log) {
    rf_free(log->events);
    rf_free(log->tokens);
    rf_free(log->names);
    memset(log, 0, sizeof *log);
}

/* The head of a CBOR item: its major type, and a number in as few bytes as it takes. */
static void put_head(rf_sha256 *hash, uint8_t major, uint32_t number) {
    uint8_t head[5];
    size_t size = 1;
    major = (uint8_t)(major << 5);
    if (number < 24) {
        head[0] = (uint8_t)(major | number);
    } else if (number <= UINT8_MAX) {
        head[0] = major | 24;
        head[size++] = (uint8_t)number;
    } else if (number <= UINT16_MAX) {
        head[0] = major | 25;
        head[size++] = (uint8_t)(number >> 8);
        head[size++] = (uint8_t)number;
    } else {
        head[0] = major | 26;
        for (int shift = 24; shift >= 0; shift -= 8) head[size++] = (uint8_t)(number >> shift);
    }
    rf_sha256_update(hash, head, size);
}

static const uint8_t *parent_name(const rf_event_log *log, int32_t parent) {
    return parent == RF_NO_NODE ? log->root_name : log->names[parent];
}

void rf_event_log_name(rf_event_log *log, int32_t node, int32_t parent, const int32_t *tokens,
                       const uint8_t *extra, int64_t extra_size) {
    enum { UNSIGNED = 0, NEGATIVE = 1, BYTES = 2, ARRAY = 4 };
    static const uint8_t null = 0xf6;
    rf_sha256 hash;
    rf_sha256_init(&hash);
    put_head(&hash, ARRAY, 3);
    put_head(&hash, BYTES, 32);
    rf_sha256_update(&hash, parent_name(log, parent), 32);
    put_head(&hash, ARRAY, (uint32_t)log->block_size);
    for (int32_t i = 0; i < log->block_size; i++) {
        if (tokens[i] >= 0) put_head(&hash, UNSIGNED, (uint32_t)tokens[i]);
        else put_head(&hash, NEGATIVE, (uint32_t)(-1 - tokens[i]));
    }
    if (extra) rf_sha256_update(&hash, extra, (size_t)extra_size);
    else rf_sha256_update(&hash, &null, 1);
    rf_sha256_finish(&hash, log->names[node]);
}

/* The place for one more event. */
static rf_event *push(rf_event_log *log, enum rf_event_kind kind, int32_t group) {
    if (log->num == log->capacity) {
        rf_event_log_drop(log, 1);
        log->lost++;
    }
    rf_event *const event = &log->events[((int64_t)log->first + log->num++) % log->capacity];
    event->kind = (uint8_t)kind;
    event->group = group;
    return event;
}

void rf_event_log_stored(rf_event_log *log, int32_t group, int32_t node, int32_t parent,
                         const int32_t *tokens) {
    rf_event *const event = push(log, RF_EVENT_STORED, group);
    memcpy(event->name, log->names[node], sizeof event->name);
    memcpy(event->parent, parent_name(log, parent), sizeof event->parent);
    event->is_first = parent == RF_NO_NODE;
    memcpy(log->tokens + (event - log->events) * log->block_size, tokens,
           (size_t)log->block_size * sizeof *tokens);
}

void rf_event_log_removed(rf_event_log *log, int32_t group, int32_t node) {
    rf_event *const event = push(log, RF_EVENT_REMOVED, group);
    memcpy(event->name, log->names[node], sizeof event->name);
}

void rf_event_log_cleared(rf_event_log *log) { push(log, RF_EVENT_CLEARED, 0); }

void rf_event_log_drop(rf_event_log *log, int32_t n) {
    log->first = (int32_t)(((int64_t)log->first + n) % log->capacity);
    log->num -= n;
}
