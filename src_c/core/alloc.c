#include "rf/alloc.h"

#include <stdatomic.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* The library's only global. Zero in every program but a test: the check is one predicted load. */
static _Atomic int64_t countdown;

static int fails_now(void) {
    if (atomic_load_explicit(&countdown, memory_order_relaxed) == 0) return 0;
    return atomic_fetch_sub_explicit(&countdown, 1, memory_order_relaxed) == 1;
}

void *rf_alloc(size_t size) { return fails_now() ? NULL : malloc(size ? size : 1); }

enum { HUGE_PAGE = 2 << 20 };

/*
 * Asks for huge pages where the memory has whole ones. A pool's arrays are touched here and there,
 * in memory that is at first not there: that is a fault for each 4 KiB, and later a miss of the
 * TLB.
 */
static void *in_huge_pages(void *p, size_t size) {
#ifdef MADV_HUGEPAGE
    const size_t skipped = -(uintptr_t)p % HUGE_PAGE;
    if (p != NULL && size >= skipped + HUGE_PAGE)
        (void)madvise((char *)p + skipped, (size - skipped) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#else
    (void)size;
#endif
    return p;
}

void *rf_calloc(size_t count, size_t size) {
    if (fails_now()) return NULL;
    return in_huge_pages(calloc(count ? count : 1, size ? size : 1), count * size);
}

void *rf_realloc(void *p, size_t size) { return fails_now() ? NULL : realloc(p, size ? size : 1); }

void rf_free(void *p) { free(p); }

int64_t rf_alloc_fail_after(int64_t n) {
    return atomic_exchange_explicit(&countdown, n, memory_order_relaxed);
}
