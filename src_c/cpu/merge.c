/* Merging two results of attention over parts of the same context. */
#include "cpu.h"

/* Elements below which threads are not worth their waking, and tokens of a task. */
#define SERIAL_ELEMENTS ((int64_t)32 << 10)
#define CHUNK           16

typedef struct job {
    const rf_merge_params *p;
    const rf_kernels *kernels;
} job;

static void task(void *arg, int64_t i, int worker) {
    const job *j = arg;
    int64_t end = (i + 1) * CHUNK;
    (void)worker;
    j->kernels->merge_states(j->p, i * CHUNK, end < j->p->num_tokens ? end : j->p->num_tokens);
}

int rf_cpu_merge_states(rf_cpu *cpu, const rf_merge_params *p) {
    int64_t tasks = (p->num_tokens + CHUNK - 1) / CHUNK;
    if (p->num_tokens * p->num_heads * p->head_dim > SERIAL_ELEMENTS &&
        rf_pool_threads(&cpu->pool) > 1 && rf_pool_enter(&cpu->pool)) {
        job j = {p, cpu->variant->kernels};
        rf_pool_ready(&cpu->pool, tasks);
        rf_pool_run(&cpu->pool, task, &j, tasks);
        rf_pool_leave(&cpu->pool);
        return RF_OK;
    }
    cpu->variant->kernels->merge_states(p, 0, p->num_tokens);
    return RF_OK;
}
