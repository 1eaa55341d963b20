/* Whole blocks as bytes: within a pool, and to and from rows of bytes outside. */
#include <string.h>

#include "cpu.h"

/* Bytes below which threads are not worth their waking. */
#define SERIAL_BYTES ((int64_t)128 << 10)

/* Copies count pieces of `width` bytes; one copy where both sides are contiguous. */
static void copy_pieces(char *to, int64_t to_stride, const char *from, int64_t from_stride,
                        int64_t count, int64_t width) {
    if (to_stride == width && from_stride == width) {
        memcpy(to, from, (size_t)(count * width));
        return;
    }
    for (int64_t i = 0; i < count; i++)
        memcpy(to + i * to_stride, from + i * from_stride, (size_t)width);
}

static int64_t block_bytes(const rf_copy_params *p) { return p->outer * p->middle * p->inner; }

/* What is done to block ids[i] of each pool. */
typedef struct job {
    const rf_copy_params *pools;
    const int32_t *ids; /* of copies: pairs */
    int64_t num;
    char *data; /* row i, row_stride bytes each; of copies: NULL */
    int64_t row_stride;
    int scatter;
} job;

static void copy_task(void *arg, int64_t i, int worker) {
    const job *j = arg;
    const rf_copy_params *p = &j->pools[i / j->num];
    const int32_t *pair = &j->ids[2 * (i % j->num)];
    (void)worker;
    for (int64_t o = 0; o < p->outer; o++) {
        char *at = p->data + o * p->outer_stride;
        copy_pieces(at + pair[1] * p->block_stride, p->middle_stride,
                    at + pair[0] * p->block_stride, p->middle_stride, p->middle, p->inner);
    }
}

static void row_task(void *arg, int64_t i, int worker) {
    const job *j = arg;
    const rf_copy_params *p = &j->pools[i / j->num];
    char *row = j->data + i % j->num * j->row_stride;
    char *block = p->data + j->ids[i % j->num] * p->block_stride;
    (void)worker;
    for (const rf_copy_params *before = j->pools; before < p; before++) row += block_bytes(before);
    for (int64_t o = 0; o < p->outer; o++, row += p->middle * p->inner, block += p->outer_stride) {
        if (j->scatter) copy_pieces(block, p->middle_stride, row, p->inner, p->middle, p->inner);
        else copy_pieces(row, p->inner, block, p->middle_stride, p->middle, p->inner);
    }
}

/* One task for each block of each pool. */
static int run(rf_cpu *cpu, rf_task_fn task, job *j, int64_t num_pools) {
    int64_t bytes = 0, tasks = num_pools * j->num;
    for (int64_t i = 0; i < num_pools; i++) bytes += block_bytes(&j->pools[i]) * j->num;
    if (bytes > SERIAL_BYTES && rf_pool_threads(&cpu->pool) > 1 && rf_pool_enter(&cpu->pool)) {
        rf_pool_ready(&cpu->pool, tasks);
        rf_pool_run(&cpu->pool, task, j, tasks);
        rf_pool_leave(&cpu->pool);
        return RF_OK;
    }
    for (int64_t i = 0; i < tasks; i++) task(j, i, 0);
    return RF_OK;
}

int rf_cpu_copy_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                       const int32_t *copies, int64_t num_copies) {
    job j = {pools, copies, num_copies, NULL, 0, 0};
    return run(cpu, copy_task, &j, num_pools);
}

int rf_cpu_gather_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                         const int32_t *ids, int64_t num_ids, char *data, int64_t row_stride) {
    job j = {pools, ids, num_ids, data, row_stride, 0};
    return run(cpu, row_task, &j, num_pools);
}

int rf_cpu_scatter_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                          const int32_t *ids, int64_t num_ids, const char *data,
                          int64_t row_stride) {
    job j = {pools, ids, num_ids, (char *)(uintptr_t)data, row_stride, 1};
    return run(cpu, row_task, &j, num_pools);
}
