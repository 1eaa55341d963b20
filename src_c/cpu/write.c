/* Moving bytes into and within the pool: no arithmetic, so one version serves all types. */
#include <string.h>

#include "cpu.h"

/* Bytes below which threads are not worth their waking. */
#define SERIAL_BYTES ((int64_t)128 << 10)
/* Tokens of a task. */
#define CHUNK 64

static const int64_t type_size[RF_NUM_WIDE_DTYPES] = {4, 2, 2};

/* Copies heads x width bytes; one copy where both sides are contiguous. */
static void copy_vectors(char *to, int64_t to_stride, const char *from, int64_t from_stride,
                         int64_t heads, int64_t width) {
    if (to_stride == width && from_stride == width) {
        memcpy(to, from, (size_t)(heads * width));
        return;
    }
    for (int64_t h = 0; h < heads; h++)
        memcpy(to + h * to_stride, from + h * from_stride, (size_t)width);
}

static void write_tokens(const rf_write_params *p, int64_t begin, int64_t end) {
    const int64_t size = type_size[p->dtype];
    for (int64_t i = begin; i < end; i++) {
        int64_t slot = p->slot_mapping[i];
        if (slot < 0) continue;
        int64_t block = slot / p->block_size, offset = slot - block * p->block_size;
        copy_vectors(
            (char *)p->k.data + (block * p->k.block_stride + offset * p->k.token_stride) * size,
            p->k.head_stride * size, (const char *)p->key.data + i * p->key.token_stride * size,
            p->key.head_stride * size, p->num_kv_heads, p->head_dim * size);
        copy_vectors(
            (char *)p->v.data + (block * p->v.block_stride + offset * p->v.token_stride) * size,
            p->v.head_stride * size, (const char *)p->value.data + i * p->value.token_stride * size,
            p->value.head_stride * size, p->num_kv_heads, p->v_head_dim * size);
    }
}

static void write_task(void *arg, int64_t i, int worker) {
    const rf_write_params *p = arg;
    (void)worker;
    int64_t end = (i + 1) * CHUNK;
    write_tokens(p, i * CHUNK, end < p->num_tokens ? end : p->num_tokens);
}

int rf_cpu_write_kv(rf_cpu *cpu, const rf_write_params *p) {
    int64_t bytes =
        p->num_tokens * p->num_kv_heads * (p->head_dim + p->v_head_dim) * type_size[p->dtype];
    if (bytes > SERIAL_BYTES && rf_pool_threads(&cpu->pool) > 1 && rf_pool_enter(&cpu->pool)) {
        int64_t tasks = (p->num_tokens + CHUNK - 1) / CHUNK;
        rf_pool_ready(&cpu->pool, tasks);
        rf_write_params copy = *p;
        rf_pool_run(&cpu->pool, write_task, &copy, tasks);
        rf_pool_leave(&cpu->pool);
        return RF_OK;
    }
    write_tokens(p, 0, p->num_tokens);
    return RF_OK;
}
