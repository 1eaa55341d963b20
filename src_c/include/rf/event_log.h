/* What happened to cached blocks, for whoever keeps a picture of the cache elsewhere.
 *
 * A content has a name that everybody can compute who knows its tokens: SHA-256 over the canonical
 * CBOR of (name of the parent, tokens, extra keys), vLLM's sha256_cbor. The log keeps the name of
 * each node of a prefix index, and a ring of events: when it is full, the oldest is lost. All
 * memory is taken at init. Not thread-safe: the caller holds a lock. */
#ifndef RF_EVENT_LOG_H
#define RF_EVENT_LOG_H

#include <stdint.h>

#include "rf/status.h"

enum rf_event_kind {
    RF_EVENT_STORED = 0,
    RF_EVENT_REMOVED = 1,
    RF_EVENT_CLEARED = 2, /* of all groups; it has no name */
};

typedef struct rf_event {
    uint8_t name[32];
    uint8_t parent[32]; /* with STORED */
    uint8_t kind;
    uint8_t is_first; /* with STORED: the parent is a root */
    int32_t group;
} rf_event;

typedef struct rf_event_log {
    rf_event *events;     /* [capacity] */
    int32_t *tokens;      /* [capacity, block_size], with STORED */
    uint8_t (*names)[32]; /* [num_nodes] of the nodes that live */
    uint8_t root_name[32];
    int32_t capacity, block_size;
    int32_t first, num; /* the oldest event, and how many there are */
    uint64_t lost;
} rf_event_log;

/* root_name is what the contents below a root have for a parent. capacity is 1 .. 2^30. Must be
 * freed by rf_event_log_free, also after a failure. */
RF_API int rf_event_log_init(rf_event_log *log, int32_t capacity, int32_t block_size,
                             int32_t num_nodes, const uint8_t root_name[32]);
RF_API void rf_event_log_free(rf_event_log *log);

/* Names a node by its parent, RF_NO_NODE for a root, and its tokens; extra is the CBOR of the extra
 * keys, or NULL. */
RF_API void rf_event_log_name(rf_event_log *log, int32_t node, int32_t parent,
                              const int32_t *tokens, const uint8_t *extra, int64_t extra_size);

/* A block of a group now holds a node's content; the node has a name. */
RF_API void rf_event_log_stored(rf_event_log *log, int32_t group, int32_t node, int32_t parent,
                                const int32_t *tokens);
RF_API void rf_event_log_removed(rf_event_log *log, int32_t group, int32_t node);
/* Everything was forgotten. */
RF_API void rf_event_log_cleared(rf_event_log *log);

/* Forgets the n oldest events. */
RF_API void rf_event_log_drop(rf_event_log *log, int32_t n);

/* The i-th oldest event, and its tokens. */
static inline const rf_event *rf_event_log_at(const rf_event_log *log, int32_t i) {
    return &log->events[((int64_t)log->first + i) % log->capacity];
}
static inline const int32_t *rf_event_log_tokens(const rf_event_log *log, int32_t i) {
    return log->tokens + ((int64_t)log->first + i) % log->capacity * log->block_size;
}

#endif
