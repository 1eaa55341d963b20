#include "rf/alloc.h"

#include "check.h"

static void memory_is_usable(void) {
    unsigned char *p = rf_alloc(3);
    CHECK(p);
    memset(p, 0xab, 3);
    p = rf_realloc(p, 1000);
    CHECK(p && p[0] == 0xab && p[2] == 0xab);
    memset(p, 1, 1000);
    rf_free(p);
    p = rf_calloc(7, 9);
    CHECK(p);
    for (int i = 0; i < 63; i++) CHECK(p[i] == 0);
    rf_free(p);
    p = rf_realloc(NULL, 5);
    CHECK(p);
    rf_free(p);
    rf_free(NULL);
}

/* NULL means failure, so nothing is still something. */
static void a_size_of_zero_is_memory(void) {
    void *all[] = {rf_alloc(0), rf_calloc(0, 8), rf_calloc(8, 0), rf_realloc(NULL, 0)};
    for (size_t i = 0; i < COUNT(all); i++) {
        CHECK(all[i]);
        for (size_t j = 0; j < i; j++) CHECK(all[i] != all[j]);
    }
    all[3] = rf_realloc(all[3], 0);
    CHECK(all[3]);
    for (size_t i = 0; i < COUNT(all); i++) rf_free(all[i]);
}

static void the_nth_allocation_fails_once(void) {
    for (int64_t n = 1; n <= 6; n++) {
        CHECK(rf_alloc_fail_after(n) == 0);
        for (int64_t i = 1; i <= 6; i++) {
            void *p = i % 3 == 0 ? rf_alloc(8) : i % 3 == 1 ? rf_calloc(1, 8) : rf_realloc(NULL, 8);
            CHECK((p == NULL) == (i == n));
            rf_free(p);
        }
        CHECK(rf_alloc_fail_after(0) == 0);
    }
}

static void the_countdown_says_what_is_left(void) {
    CHECK(rf_alloc_fail_after(10) == 0);
    rf_free(rf_alloc(1));
    rf_free(rf_alloc(1));
    CHECK(rf_alloc_fail_after(3) == 8);
    CHECK(rf_alloc_fail_after(0) == 3);
    void *p = rf_alloc(1);
    CHECK(p);
    rf_free(p);
}

static void a_failed_realloc_keeps_the_old_memory(void) {
    char *p = rf_alloc(4);
    CHECK(p);
    memcpy(p, "abc", 4);
    CHECK(rf_alloc_fail_after(1) == 0);
    CHECK(rf_realloc(p, 1 << 20) == NULL);
    CHECK(strcmp(p, "abc") == 0);
    rf_free(p);
}

int main(void) {
    memory_is_usable();
    a_size_of_zero_is_memory();
    the_nth_allocation_fails_once();
    the_countdown_says_what_is_left();
    a_failed_realloc_keeps_the_old_memory();
    return 0;
}
