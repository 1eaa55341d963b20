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

/* What a plan was made for, besides the lengths. */
typedef struct rf_plan_key {
    const rf_kernels *kernels;
    int64_t block_rows; /* of a task in blocks; 0: none are */
    int64_t max_cost;
    int32_t num_seqs, num_heads, num_kv_heads, head_dim, v_head_dim;
    int32_t causal, window_left, window_right, ragged;
} rf_plan_key;

/* See plan.h. All zero is an empty plan. */
typedef struct rf_plan {
    rf_plan_key key;
    const int32_t *lens, *cu; /* copies of seq_lens and cu_seqlens_q; lens NULL: nothing planned */
    rf_task *tasks;
    rf_merge *merges;
    int64_t num_tasks, num_merges, state_floats;
    int64_t scratch_floats; /* of a thread, a multiple of 16 */
    rf_buffer memory;
} rf_plan;

struct rf_cpu {
    const rf_variant *variant;
    rf_pool pool;
    /* Kept from call to call for whoever holds the pool; others have their own. */
    rf_buffer scratch;
    rf_plan plan;
};

/* The variant of that name if the processor can run it; the best one for NULL. */
const rf_variant *rf_find_variant(const char *isa);

/* At least size bytes in b->data, contents lost; RF_ERR_NO_MEMORY leaves b as it was. */
int rf_buffer_reserve(rf_buffer *b, size_t size);
void rf_buffer_free(rf_buffer *b);

#endif
