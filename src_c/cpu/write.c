/* Writing new vectors into the pool. An 8-bit cache's go through the kernels; others are moved.
 *
 * A large write does not fit the caches, and its vectors are next read when all of them are
 * written: so its stores go past the caches, which saves reading the lines that are overwritten.
 * Tried on a Zen 4 with two cores, 65,536 tokens of 8 heads of 128 bfloat16 (16 pages are written
 * to in turn), against the fastest copy from end to end, 22 to 24 GB/s:
 *   plain stores, token by token                11 to 12 GB/s
 *   past the caches, token by token             19 to 20
 *   the same, with prefetches 1 to 4 KiB ahead  15 to 19
 *   past the caches, block by block, head by head: 12, a source of 256 bytes every 2 KiB
 * On a Xeon with AMX one thread, whose fastest copy gets 12.7 to 13.1 GB/s, prefers what Zen 4 does
 * not, so that its variant alone fetches ahead (write_ahead):
 *   past the caches, token by token             8.8, 9.3 by stores of 64 bytes instead of 16
 *   the same, with prefetches into the second level 2, 4, 8, 16 or 32 KiB ahead: 10.1, 10.7, 10.6,
 *     10.5, 10.5, from 4 to 16 KiB 11.4 by stores of 64 bytes; into the first level 7.7, 9.5
 *   head by head, four tokens                   10.2, 10.7; and with prefetches 10.7, 12.0
 *   head by head, a whole block                 10.2, 11.7; and with prefetches 10.9, 11.8
 *   four tokens first copied to the stack       8.5, 8.5
 */
#include <string.h>

#include "cpu.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* Bytes below which threads are not worth their waking. */
#define SERIAL_BYTES ((int64_t)128 << 10)
/* Bytes from which stores go past the caches: more than a core's second level holds. */
#define STREAM_BYTES ((int64_t)2 << 20)
/* Tokens of a task. */
#define CHUNK 64

static const int64_t type_size[RF_NUM_DTYPES] = {4, 2, 2, 1, 1, 1};

typedef char bytes16 __attribute__((vector_size(16), aligned(1), may_alias));

/* 8 elements are 16 bytes or 32, so that width is a multiple of 16. */
static inline void copy_vector(char *to, const char *from, int64_t width) {
    int64_t i = 0;
    for (; i + 64 <= width; i += 64) {
        bytes16 a = *(const bytes16 *)(from + i), b = *(const bytes16 *)(from + i + 16);
        bytes16 c = *(const bytes16 *)(from + i + 32), d = *(const bytes16 *)(from + i + 48);
        *(bytes16 *)(to + i) = a, *(bytes16 *)(to + i + 16) = b;
        *(bytes16 *)(to + i + 32) = c, *(bytes16 *)(to + i + 48) = d;
    }
    for (; i < width; i += 16) *(bytes16 *)(to + i) = *(const bytes16 *)(from + i);
}

/* What is done once, not for each token: strides in bytes. */
typedef struct side {
    char *pool;
    const char *rows;
    int64_t block, head, token; /* of the pool */
    int64_t row, row_head;
    int64_t width;
    rf_stream *stream; /* NULL: plain stores */
    int ahead;
} side;

static side side_of(const rf_paged *to, const rf_rows *from, int64_t dim, int64_t size,
                    rf_stream *stream, int ahead) {
    side s = {to->data,
              from->data,
              to->block_stride * size,
              to->head_stride * size,
              to->token_stride * size,
              from->token_stride * size,
              from->head_stride * size,
              dim * size,
              stream,
              ahead};
    int64_t all = (int64_t)(uintptr_t)s.pool | s.block | s.head | s.token | s.width;
    if (all & 63) s.stream = NULL;
    return s;
}

static inline void write_vectors(const side *s, int64_t token, int64_t block, int64_t offset,
                                 int64_t heads) {
    char *to = s->pool + block * s->block + offset * s->token;
    const char *from = s->rows + token * s->row;
    if (s->stream) s->stream(to, s->head, from, s->row_head, heads, s->width, s->ahead);
    else
        for (int64_t h = 0; h < heads; h++, to += s->head, from += s->row_head)
            copy_vector(to, from, s->width);
}

typedef struct job {
    const rf_write_params *p;
    const rf_kernels *kernels;
    side k, v;
} job;

/* All keys of the tokens, then all values: half as many pages in turn. */
static void write_tokens(const job *j, int64_t begin, int64_t end) {
    const rf_write_params *p = j->p;
    for (const side *s = &j->k; s; s = s == &j->k && p->v.data ? &j->v : NULL) {
        int64_t block = 0, first = 0; /* of the slots that the last division was for */
        for (int64_t i = begin; i < end; i++) {
            int64_t slot = p->slot_mapping[i];
            if (slot < 0) continue;
            if (slot < first || slot >= first + p->block_size) {
                block = slot / p->block_size;
                first = block * p->block_size;
            }
            write_vectors(s, i, block, slot - first, p->num_kv_heads);
        }
    }
#if defined(__SSE2__)
    if (j->k.stream || j->v.stream) _mm_sfence();
#endif
}

static void run(const job *j, int64_t begin, int64_t end) {
    if (j->p->kv_dtype >= RF_NUM_WIDE_DTYPES) j->kernels->quantise(j->p, begin, end);
    else write_tokens(j, begin, end);
}

static void task(void *arg, int64_t i, int worker) {
    const job *j = arg;
    int64_t end = (i + 1) * CHUNK;
    (void)worker;
    run(j, i * CHUNK, end < j->p->num_tokens ? end : j->p->num_tokens);
}

int rf_cpu_write_kv(rf_cpu *cpu, const rf_write_params *p) {
    const int64_t size = type_size[p->dtype];
    int64_t bytes = p->num_tokens * p->num_kv_heads * (p->head_dim + p->v_head_dim) * size;
    job j = {p, cpu->variant->kernels, {0}, {0}};
    rf_stream *const stream = bytes >= STREAM_BYTES ? j.kernels->stream : NULL;
    const int ahead = cpu->variant->write_ahead;
    j.k = side_of(&p->k, &p->key, p->head_dim, size, stream, ahead);
    j.v = side_of(&p->v, &p->value, p->v_head_dim, size, stream, ahead);
    if (bytes > SERIAL_BYTES && rf_pool_threads(&cpu->pool) > 1 && rf_pool_enter(&cpu->pool)) {
        int64_t tasks = (p->num_tokens + CHUNK - 1) / CHUNK;
        rf_pool_ready(&cpu->pool, tasks);
        rf_pool_run(&cpu->pool, task, &j, tasks);
        rf_pool_leave(&cpu->pool);
        return RF_OK;
    }
    run(&j, 0, p->num_tokens);
    return RF_OK;
}
