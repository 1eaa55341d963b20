#include <string.h>

#include "check.h"
#include "rf/alloc.h"
#include "rf/event_log.h"
#include "rf/prefix_index.h"

enum { SIZE = 2, NODES = 8 };

static const uint8_t root_name[32] = {1, 2, 3};

static void test_the_ring_keeps_the_newest(void) {
    rf_event_log log;
    const int32_t tokens[SIZE] = {7, -7};
    CHECK(rf_event_log_init(&log, 3, SIZE, NODES, root_name) == RF_OK);
    for (int32_t node = 1; node < 6; node++) {
        rf_event_log_name(&log, node, node == 1 ? RF_NO_NODE : node - 1, tokens, NULL, 0);
        rf_event_log_stored(&log, node % 2, node, node == 1 ? RF_NO_NODE : node - 1, tokens);
    }
    CHECK(log.num == 3 && log.lost == 2);
    for (int32_t i = 0; i < 3; i++) {
        const rf_event *const event = rf_event_log_at(&log, i);
        CHECK(event->kind == RF_EVENT_STORED && event->group == (i + 3) % 2 && !event->is_first);
        CHECK(memcmp(event->name, log.names[i + 3], 32) == 0);
        CHECK(memcmp(event->parent, log.names[i + 2], 32) == 0);
        CHECK(memcmp(rf_event_log_tokens(&log, i), tokens, sizeof tokens) == 0);
    }
    rf_event_log_drop(&log, 2);
    rf_event_log_removed(&log, 1, 2);
    rf_event_log_cleared(&log);
    CHECK(log.num == 3 && log.lost == 2);
    CHECK(rf_event_log_at(&log, 1)->kind == RF_EVENT_REMOVED);
    CHECK(memcmp(rf_event_log_at(&log, 1)->name, log.names[2], 32) == 0);
    CHECK(rf_event_log_at(&log, 2)->kind == RF_EVENT_CLEARED);
    rf_event_log_free(&log);
    CHECK(log.events == NULL && log.num == 0);
}

static void test_names_depend_on_all_that_is_named(void) {
    rf_event_log log;
    const int32_t a[SIZE] = {1, 2}, b[SIZE] = {2, 1};
    const uint8_t extra[] = {0x81, 0x61, 'x'};
    CHECK(rf_event_log_init(&log, 1, SIZE, NODES, root_name) == RF_OK);
    rf_event_log_name(&log, 0, RF_NO_NODE, a, NULL, 0);
    rf_event_log_name(&log, 1, RF_NO_NODE, b, NULL, 0);
    rf_event_log_name(&log, 2, RF_NO_NODE, a, extra, sizeof extra);
    rf_event_log_name(&log, 3, 0, a, NULL, 0);
    rf_event_log_name(&log, 4, 1, a, NULL, 0);
    rf_event_log_name(&log, 5, RF_NO_NODE, a, NULL, 0);
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < i; j++) CHECK(memcmp(log.names[i], log.names[j], 32) != 0);
    }
    CHECK(memcmp(log.names[5], log.names[0], 32) == 0);
    rf_event_log_free(&log);
}

static void test_init_refuses_and_survives_no_memory(void) {
    rf_event_log log;
    CHECK(rf_event_log_init(&log, 0, SIZE, NODES, root_name) == RF_ERR_BAD_ARGUMENT);
    CHECK(rf_event_log_init(&log, INT32_MAX, SIZE, NODES, root_name) == RF_ERR_BAD_ARGUMENT);
    for (int64_t n = 1; n <= 3; n++) {
        rf_alloc_fail_after(n);
        CHECK(rf_event_log_init(&log, 4, SIZE, NODES, root_name) == RF_ERR_NO_MEMORY);
        CHECK(rf_alloc_fail_after(0) == 0);
        CHECK(log.events == NULL && log.tokens == NULL && log.names == NULL);
    }
}

int main(void) {
    test_the_ring_keeps_the_newest();
    test_names_depend_on_all_that_is_named();
    test_init_refuses_and_survives_no_memory();
    return 0;
}
