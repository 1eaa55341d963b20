/* Inside the CPU backend: the object that rf/cpu.h keeps opaque. */
#ifndef RF_CPU_CPU_H
#define RF_CPU_CPU_H

#include "kernels.h"
#include "pool.h"
#include "rf/cpu.h"

/* Memory that only grows, 64-byte aligned. */
typedef struct rf_buffer {
    void *data;
    size_t size;
    int owned; /* 0: data is the caller's, or NULL */
} rf_buffer;

struct rf_cpu {
    const rf_kernels *kernels;
    rf_pool pool;
    /* Kept from call to call for whoever holds the pool; others allocate their own. */
    rf_buffer scratch;
};

/* The variant of that name if the processor can run it; the best one for NULL. */
const rf_kernels *rf_find_kernels(const char *isa);

/* At least size bytes in b->data, contents lost; RF_ERR_NO_MEMORY leaves b as it was. */
int rf_buffer_reserve(rf_buffer *b, size_t size);
void rf_buffer_free(rf_buffer *b);

#endif
