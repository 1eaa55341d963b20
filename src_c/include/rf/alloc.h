/* The one seam through which all metadata memory comes, so a test can make any allocation fail. */
#ifndef RF_ALLOC_H
#define RF_ALLOC_H

#include <stddef.h>
#include <stdint.h>

#include "rf/status.h"

/* As malloc, calloc, realloc and free. NULL when there is no memory or the test hook says so. */
RF_API void *rf_alloc(size_t size);
RF_API void *rf_calloc(size_t count, size_t size);
RF_API void *rf_realloc(void *p, size_t size);
RF_API void rf_free(void *p);

/* Test hook: the n-th allocation from now (1 is the next) fails, once; 0 turns it off.
 * Returns what was left of the former countdown: 0 tells that its failure has happened. */
RF_API int64_t rf_alloc_fail_after(int64_t n);

#endif
