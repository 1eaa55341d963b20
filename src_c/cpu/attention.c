/* Attention on threads: a plan, scratch for each thread, states where parts are split, the kernels.
 */
#include <stdint.h>

#include "plan.h"

/* Below this much work (see rf_plan_cost; 80 us on a fast processor) waking a thread costs more
 * than it saves; below the second one, so does handing work to threads that still poll. */
#define SERIAL_COST  40000
#define POLLING_COST 5000
/* Tasks a thread to aim at, so that the last ones to finish are small. */
#define TASKS_PER_THREAD 12

typedef struct job {
    const rf_attention_params *p;
    const rf_variant *variant;
    const rf_plan *plan;
    float *states, *scratch; /* scratch: plan->scratch_floats a thread */
} job;

static const rf_products *products_of(const job *j, int64_t num_q) {
    const rf_attention_params *p = j->p;
    const int64_t rows = num_q * (p->num_heads / p->num_kv_heads);
    return rf_products_of(j->variant, rows, p->dtype, p->kv_dtype);
}

static void run_task(void *arg, int64_t i, int worker) {
    const job *j = arg;
    const rf_kernels *kernels = j->variant->kernels;
    const rf_task *t = &j->plan->tasks[i];
    float *scratch = j->scratch + worker * j->plan->scratch_floats;
    if (t->merge < 0) {
        kernels->attend(j->p, products_of(j, t->num_q), t, scratch, NULL, 0);
        return;
    }
    rf_merge *m = &j->plan->merges[t->merge];
    float *states = j->states + m->states;
    kernels->attend(j->p, products_of(j, t->num_q), t, scratch, states, m->first_part);
    if (__atomic_sub_fetch(&m->pending, 1, __ATOMIC_ACQ_REL) == 0)
        kernels->merge(j->p, products_of(j, m->num_q), m, states);
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int rf_cpu_attention(rf_cpu *cpu, const rf_attention_params *p) {
    _Alignas(64) char small[16384], tasks[2048];
    rf_buffer local = {small, sizeof small, 0}, *b = &local;
    rf_plan own = {.memory = {tasks, sizeof tasks, 0}}, *plan = &own;
    int64_t max_cost = INT64_MAX;
    int threads = 1, owner = 0, status;

    const int64_t cost = rf_plan_cost(p);
    const int64_t worth = rf_pool_polling(&cpu->pool) ? POLLING_COST : SERIAL_COST;
    if (cost > worth && rf_pool_threads(&cpu->pool) > 1) {
        owner = rf_pool_enter(&cpu->pool);
        if (owner) threads = rf_pool_ready(&cpu->pool, cost / (worth / 2));
    }
    if (owner) {
        b = &cpu->scratch;
        plan = &cpu->plan;
    }
    if (threads > 1) {
        max_cost = cost / (threads * TASKS_PER_THREAD);
        if (max_cost < SERIAL_COST / 4) max_cost = smaller(SERIAL_COST / 4, cost / threads);
    }
    status = rf_plan_make(plan, p, cpu->variant, max_cost);
    if (status != RF_OK || plan->num_tasks == 0) goto out;
    const int64_t floats = plan->state_floats + threads * plan->scratch_floats;
    status = rf_buffer_reserve(b, (size_t)floats * sizeof(float));
    if (status != RF_OK) goto out;
    for (int64_t i = 0; i < plan->num_merges; i++) plan->merges[i].pending = plan->merges[i].pieces;
    job j = {p, cpu->variant, plan, b->data, (float *)b->data + plan->state_floats};
    if (threads > 1) rf_pool_run(&cpu->pool, run_task, &j, plan->num_tasks);
    else
        for (int64_t i = 0; i < plan->num_tasks; i++) run_task(&j, i, 0);
out:
    if (owner) rf_pool_leave(&cpu->pool);
    rf_buffer_free(&local);
    rf_buffer_free(&own.memory);
    return status;
}
