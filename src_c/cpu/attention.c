/* Planning of attention: which piece of which sequence is a task, and running them on threads.
 *
 * Tasks differ with the number of threads and with the batch; bits do not (see RF_PART). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "rf/alloc.h"

/* Below this much work (see cost_of) waking a thread costs more than it saves. */
#define SERIAL_COST 40000
/* Tasks a thread to aim at, so that the last ones to finish are small. */
#define TASKS_PER_THREAD 12

typedef struct plan {
    rf_task *tasks;
    rf_merge *merges;
    float *states;
    float *scratch;
    int64_t num_tasks, num_merges, state_floats, scratch_floats;
    int64_t max_cost; /* of a task, where it can be met */
    const rf_attention_params *p;
    const rf_kernels *kernels;
} plan;

/* Work of attending `rows` rows to `tokens` tokens of one head: reading a token costs about as much
 * as four rows of arithmetic. */
static int64_t cost_of(int64_t tokens, int64_t rows) { return tokens * (rows + 4); }

static int64_t query_tile(const rf_attention_params *p) {
    int64_t n = RF_MAX_ROWS / (p->num_heads / p->num_kv_heads);
    return n > 1 ? n : 1;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts_of(int64_t tokens) { return (tokens + RF_PART - 1) / RF_PART; }

static int64_t total_cost(const rf_attention_params *p) {
    int64_t group = p->num_heads / p->num_kv_heads, tile = query_tile(p), total = 0;
    for (int64_t i = 0; i < p->num_seqs; i++) {
        rf_seq s = rf_seq_of(p, i);
        for (int64_t q0 = 0; q0 < s.q_len; q0 += tile) {
            int64_t n = smaller(tile, s.q_len - q0);
            int64_t seen = rf_visible(p, &s, q0 + n - 1) - rf_first(p, &s, q0);
            total += cost_of((seen > 0 ? seen : 0) + 1, n * group) * p->num_kv_heads;
        }
    }
    return total;
}

/* Adds the tasks of query tokens q0 .. q0 + n - 1 of sequence i; with plan->tasks NULL only counts.
 */
static void add_tasks(plan *pl, int64_t i, const rf_seq *s, int64_t q0, int64_t n) {
    const rf_attention_params *p = pl->p;
    int64_t rows = n * (p->num_heads / p->num_kv_heads);
    int64_t first = rf_first(p, s, q0), last = rf_visible(p, s, q0 + n - 1);
    int64_t tokens = last > first ? last - first : 0, first_part = first / RF_PART;
    int64_t parts = tokens ? parts_of(last) - first_part : 0;
    int64_t cost = cost_of(tokens + 1, rows);
    int64_t heads = smaller(RF_MAX_ROWS / rows, smaller(RF_MAX_HEADS, pl->max_cost / cost));
    if (heads < 1) heads = 1;
    int64_t pieces = smaller(parts, (cost - 1) / pl->max_cost + 1);
    if (pieces < 1) pieces = 1;
    int64_t scratch = pl->kernels->scratch_floats(p, rows, heads);
    if (scratch > pl->scratch_floats) pl->scratch_floats = scratch;
    for (int64_t head = 0; head < p->num_kv_heads; head += heads) {
        int64_t h = smaller(heads, p->num_kv_heads - head);
        if (pieces > 1) {
            if (pl->merges)
                pl->merges[pl->num_merges] = (rf_merge){
                    pl->state_floats, (int32_t)i, (int32_t)head,       (int32_t)h,
                    (int32_t)q0,      (int32_t)n, (int32_t)first_part, (int32_t)parts, (int32_t)pieces,
                };
            pl->state_floats += parts * rf_state_floats(rf_head_rows(rows) * h, p->v_head_dim);
        }
        for (int64_t j = 0; j < pieces; j++, pl->num_tasks++) {
            if (!pl->tasks) continue;
            pl->tasks[pl->num_tasks] = (rf_task){
                (int32_t)i,
                (int32_t)head,
                (int32_t)h,
                (int32_t)q0,
                (int32_t)n,
                (int32_t)(first_part + parts * j / pieces),
                (int32_t)(first_part + parts * (j + 1) / pieces),
                pieces > 1 ? (int32_t)pl->num_merges : -1,
            };
        }
        if (pieces > 1) pl->num_merges++;
    }
}

static void make_tasks(plan *pl) {
    const rf_attention_params *p = pl->p;
    int64_t tile = query_tile(p);
    pl->num_tasks = pl->num_merges = pl->state_floats = pl->scratch_floats = 0;
    /* Long prompts first, and of each the last queries, which see most: threads end on small tasks.
     */
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < p->num_seqs; i++) {
            rf_seq s = rf_seq_of(p, i);
            if ((s.q_len > 1) != (pass == 0)) continue;
            for (int64_t q0 = (s.q_len - 1) / tile * tile; q0 >= 0; q0 -= tile)
                if (s.q_len > 0) add_tasks(pl, i, &s, q0, smaller(tile, s.q_len - q0));
        }
}

static void run_task(void *arg, int64_t i, int worker) {
    plan *pl = arg;
    const rf_attention_params *p = pl->p;
    const rf_task *t = &pl->tasks[i];
    float *scratch = pl->scratch + worker * pl->scratch_floats;
    if (t->merge < 0) {
        pl->kernels->attend(p, t, scratch, NULL, 0);
        return;
    }
    rf_merge *m = &pl->merges[t->merge];
    pl->kernels->attend(p, t, scratch, pl->states + m->states, m->first_part);
    if (__atomic_sub_fetch(&m->pending, 1, __ATOMIC_ACQ_REL) == 0)
        pl->kernels->merge(p, m, pl->states + m->states);
}

static size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

/* Lays out everything in b: tasks, merges, states, scratch for each thread. */
static int place(plan *pl, rf_buffer *b, int threads) {
    size_t tasks = align64((size_t)pl->num_tasks * sizeof(rf_task));
    size_t merges = align64((size_t)pl->num_merges * sizeof(rf_merge));
    size_t states = align64((size_t)pl->state_floats * sizeof(float));
    size_t scratch = align64((size_t)pl->scratch_floats * sizeof(float));
    int status = rf_buffer_reserve(b, tasks + merges + states + (size_t)threads * scratch);
    if (status != RF_OK) return status;
    char *at = b->data;
    pl->tasks = (rf_task *)at;
    pl->merges = (rf_merge *)(at + tasks);
    pl->states = (float *)(at + tasks + merges);
    pl->scratch = (float *)(at + tasks + merges + states);
    return RF_OK;
}

int rf_cpu_attention(rf_cpu *cpu, const rf_attention_params *p) {
    plan pl = {.p = p, .kernels = cpu->kernels, .max_cost = INT64_MAX};
    _Alignas(64) char small[16384];
    rf_buffer local = {small, sizeof small, 0};
    rf_buffer *b = &local;
    int threads = 1, owner = 0, status;

    int64_t cost = total_cost(p);
    if (cost > SERIAL_COST && rf_pool_threads(&cpu->pool) > 1) {
        owner = rf_pool_enter(&cpu->pool);
        if (owner) threads = rf_pool_ready(&cpu->pool, cost / (SERIAL_COST / 2));
    }
    if (owner) b = &cpu->scratch;
    if (threads > 1) {
        pl.max_cost = cost / (threads * TASKS_PER_THREAD);
        if (pl.max_cost < SERIAL_COST / 4) pl.max_cost = SERIAL_COST / 4;
    }

    make_tasks(&pl);
    pl.scratch_floats = (int64_t)(align64((size_t)pl.scratch_floats * 4) / 4);
    if (pl.num_tasks == 0) {
        status = RF_OK;
        goto out;
    }
    int64_t scratch_floats = pl.scratch_floats;
    status = place(&pl, b, threads);
    if (status != RF_OK) goto out;
    make_tasks(&pl);
    pl.scratch_floats = scratch_floats;
    if (threads > 1) rf_pool_run(&cpu->pool, run_task, &pl, pl.num_tasks);
    else
        for (int64_t i = 0; i < pl.num_tasks; i++) run_task(&pl, i, 0);
out:
    if (owner) rf_pool_leave(&cpu->pool);
    rf_buffer_free(&local);
    return status;
}
