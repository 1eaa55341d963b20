/* Life of the rf_cpu object, and its memory. */
#define _GNU_SOURCE /* sched_getaffinity */
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "cpu.h"
#include "rf/alloc.h"

int rf_cpu_online(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

int rf_cpu_create(const char *isa, int threads, rf_cpu **out) {
    const rf_variant *variant = rf_find_variant(isa);
    if (!variant || threads < 1) return RF_ERR_BAD_ARGUMENT;
    rf_cpu *cpu = rf_calloc(1, sizeof *cpu);
    if (!cpu) return RF_ERR_NO_MEMORY;
    int status = rf_pool_init(&cpu->pool, threads);
    if (status != RF_OK) {
        rf_free(cpu);
        return status;
    }
    cpu->variant = variant;
    *out = cpu;
    return RF_OK;
}

void rf_cpu_destroy(rf_cpu *cpu) {
    if (!cpu) return;
    rf_pool_destroy(&cpu->pool);
    rf_buffer_free(&cpu->scratch);
    rf_buffer_free(&cpu->plan.memory);
    rf_free(cpu);
}

int rf_cpu_set_threads(rf_cpu *cpu, int threads) {
    if (threads < 1) return RF_ERR_BAD_ARGUMENT;
    rf_pool_set_threads(&cpu->pool, threads);
    return RF_OK;
}

int rf_cpu_set_processors(rf_cpu *cpu, const int32_t *processors, int64_t n) {
    uint64_t set[RF_MAX_PROCESSORS / 64] = {0};
    for (int64_t i = 0; i < n; i++) {
        if (processors[i] < 0 || processors[i] >= RF_MAX_PROCESSORS) return RF_ERR_BAD_ARGUMENT;
        set[processors[i] / 64] |= (uint64_t)1 << (processors[i] % 64);
    }
    while (!rf_pool_enter(&cpu->pool)) sched_yield();
    rf_pool_set_processors(&cpu->pool, set);
    rf_pool_leave(&cpu->pool);
    return RF_OK;
}

int64_t rf_cpu_busy_ns(const rf_cpu *cpu) { return rf_pool_busy_ns(&cpu->pool); }

int rf_cpu_get_threads(const rf_cpu *cpu) { return rf_pool_threads(&cpu->pool); }

const char *rf_cpu_isa(const rf_cpu *cpu) { return cpu->variant->name; }

int rf_cpu_set_isa(rf_cpu *cpu, const char *isa) {
    const rf_variant *variant = rf_find_variant(isa);
    if (!variant) return RF_ERR_BAD_ARGUMENT;
    cpu->variant = variant;
    return RF_OK;
}

/* The buffer begins 64 bytes or less after the allocation; the byte before it says how far. */
int rf_buffer_reserve(rf_buffer *b, size_t size) {
    if (size <= b->size) return RF_OK;
    size += size / 4; /* lengths grow by a token a step: not a new buffer for each */
    unsigned char *raw = rf_alloc(size + 64);
    if (!raw) return RF_ERR_NO_MEMORY;
    size_t skip = 64 - ((uintptr_t)raw & 63);
    raw[skip - 1] = (unsigned char)skip;
    if (b->owned) rf_buffer_free(b);
    b->data = raw + skip;
    b->size = size;
    b->owned = 1;
    return RF_OK;
}

void rf_buffer_free(rf_buffer *b) {
    if (b->owned) {
        unsigned char *data = b->data;
        rf_free(data - data[-1]);
    }
    *b = (rf_buffer){0};
}
