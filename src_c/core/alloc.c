#include "rf/alloc.h"

#include <stdatomic.h>
#include <stdlib.h>

/* The library's only global. Zero in every program but a test: the check is one predicted load. */
static _Atomic int64_t countdown;

static int fails_now(void) {
    if (atomic_load_explicit(&countdown, memory_order_relaxed) == 0) return 0;
    return atomic_fetch_sub_explicit(&countdown, 1, memory_order_relaxed) == 1;
}

void *rf_alloc(size_t size) { return fails_now() ? NULL : malloc(size ? size : 1); }

void *rf_calloc(size_t count, size_t size) {
    return fails_now() ? NULL : calloc(count ? count : 1, size ? size : 1);
}

void *rf_realloc(void *p, size_t size) { return fails_now() ? NULL : realloc(p, size ? size : 1); }

void rf_free(void *p) { free(p); }

int64_t rf_alloc_fail_after(int64_t n) {
    return atomic_exchange_explicit(&countdown, n, memory_order_relaxed);
}
