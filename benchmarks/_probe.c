/* What this machine can do at most: bytes read or copied and multiply-adds, by a number of threads.
 * Compiled for this very processor and loaded by _probe.py. Every probe returns seconds, from when
 * all its threads are ready until the last one is done. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float vec __attribute__((vector_size(WIDTH), aligned(4), may_alias));
#define LANES (WIDTH / 4)

typedef struct job job;
struct job {
    void (*run)(job *);
    pthread_barrier_t *ready;
    int thread, threads, how;
    const char *from, *values;
    char *to;
    const int32_t *blocks;
    int64_t bytes, num_blocks;
    double begin, end;
    float result;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int processors[1024], num_processors;

/* Thread i is on processor i of these, modulo how many there are; none: wherever. */
void probe_bind(const int *numbers, int n) {
    num_processors = n < 1024 ? n : 1024;
    for (int i = 0; i < num_processors; i++) processors[i] = numbers[i];
}

static void *start(void *arg) {
    job *j = arg;
#ifdef __linux__
    cpu_set_t one;
    CPU_ZERO(&one);
    if (num_processors > 0) {
        CPU_SET((size_t)processors[j->thread % num_processors], &one);
        (void)sched_setaffinity(0, sizeof one, &one);
    }
#endif
    pthread_barrier_wait(j->ready);
    j->begin = now();
    j->run(j);
    j->end = now();
    return NULL;
}

static double run(job all, int threads) {
    job jobs[256];
    pthread_t ids[256];
    pthread_barrier_t ready;
    if (threads > 256) threads = 256;
    pthread_barrier_init(&ready, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++) {
        jobs[i] = all;
        jobs[i].ready = &ready;
        jobs[i].thread = i;
        jobs[i].threads = threads;
        if (i > 0 && pthread_create(&ids[i], NULL, start, &jobs[i]) != 0) abort();
    }
#ifdef __linux__
    cpu_set_t before;
    const int bound = sched_getaffinity(0, sizeof before, &before);
    start(&jobs[0]);
    if (bound == 0) (void)sched_setaffinity(0, sizeof before, &before);
#else
    start(&jobs[0]);
#endif
    double begin = jobs[0].begin, end = jobs[0].end;
    for (int i = 1; i < threads; i++) {
        pthread_join(ids[i], NULL);
        if (jobs[i].begin < begin) begin = jobs[i].begin;
        if (jobs[i].end > end) end = jobs[i].end;
    }
    pthread_barrier_destroy(&ready);
    return end - begin;
}

/* Adds up `bytes` bytes; how: 0 plain, 1 unrolled, 2 with prefetches into the first level, 3 into
 * the second, of what lies at `ahead`. */
static inline __attribute__((always_inline)) void add(const char *p, const char *ahead,
                                                      int64_t bytes, int how, vec s[8]) {
    for (int64_t i = 0; i + 512 <= bytes; i += 512) {
#pragma GCC unroll 64
        for (int j = 0; j < 512 / WIDTH; j++) {
            s[how == 0 ? 0 : j % 8] += *(const vec *)(p + i + j * WIDTH);
            if (how == 2 && j * WIDTH % 64 == 0) __builtin_prefetch(ahead + i + j * WIDTH, 0, 3);
            if (how == 3 && j * WIDTH % 64 == 0) __builtin_prefetch(ahead + i + j * WIDTH, 0, 2);
        }
    }
}

static void keep(job *j, vec s[8]) {
    for (int i = 1; i < 8; i++) s[0] += s[i];
    j->result = s[0][0];
    __asm__ volatile("" : : "m"(j->result));
}

static void sequential(job *j) {
    vec s[8] = {0};
    int64_t piece = j->bytes / j->threads & ~(int64_t)4095;
    const char *p = j->from + piece * j->thread;
    switch (j->how) {
    case 0: add(p, p, piece, 0, s); break;
    case 1: add(p, p, piece, 1, s); break;
    case 2: add(p, p + 2048, piece, 2, s); break;
    default: add(p, p + 8192, piece, 3, s); break;
    }
    keep(j, s);
}

double probe_sequential(const char *from, int64_t bytes, int threads, int how) {
    return run((job){.run = sequential, .from = from, .bytes = bytes, .how = how}, threads);
}

/* Bytes of one piece, and what is prefetched is `distance` behind it, in this piece or the next. */
static void add_behind(const char *p, const char *next, int64_t bytes, int64_t distance, vec s[8]) {
    if (distance > bytes) distance = bytes;
    add(p, p + distance, bytes - distance, 3, s);
    add(p + bytes - distance, next, distance, 3, s);
}

/* What is prefetched is what lies at `ahead`, from four places of it in turn: brings most, as the
 * processor's own prefetching goes on behind each (see src_c/cpu/tile.h). */
static void add_from_four(const char *p, const char *ahead, int64_t bytes, vec s[8]) {
    for (int64_t i = 0; i + 512 <= bytes; i += 512) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            __builtin_prefetch(ahead + j % 4 * (bytes / 4) + i / 4 + j / 4 * 64, 0, 2);
        add(p + i, p, 512, 1, s);
    }
}

/* One line of each page: the walk to it is over when the other lines are asked for. */
static void touch(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 4096) __builtin_prefetch(p + i, 0, 2);
}

/* The keys of a block, its values, the keys of the next: as attention must read them. */
static void paged(job *j) {
    vec s[8] = {0};
    int64_t begin = j->num_blocks * j->thread / j->threads;
    int64_t end = j->num_blocks * (j->thread + 1) / j->threads;
    for (int64_t i = begin; i < end; i++) {
        int64_t now_at = j->blocks[i] * j->bytes;
        int64_t next_at = j->blocks[i + 1 < end ? i + 1 : i] * j->bytes;
        const char *k = j->from + now_at, *v = j->values + now_at, *next = j->from + next_at;
        switch (j->how) {
        case 0: add(k, v, j->bytes, 1, s), add(v, next, j->bytes, 1, s); break;
        case 1: add(k, v, j->bytes, 2, s), add(v, next, j->bytes, 2, s); break;
        case 2: add(k, v, j->bytes, 3, s), add(v, next, j->bytes, 3, s); break;
        case 3:
            add_behind(k, v, j->bytes, 16384, s), add_behind(v, next, j->bytes, 16384, s);
            break;
        case 4: add_from_four(k, v, j->bytes, s), add_from_four(v, next, j->bytes, s); break;
        default:
            touch(next, j->bytes);
            add_from_four(k, v, j->bytes, s);
            touch(j->values + next_at, j->bytes);
            add_from_four(v, next, j->bytes, s);
            break;
        }
    }
    keep(j, s);
}

double probe_paged(const char *keys, const char *values, const int32_t *blocks, int64_t num_blocks,
                   int64_t block_bytes, int threads, int how) {
    return run((job){.run = paged,
                     .from = keys,
                     .values = values,
                     .blocks = blocks,
                     .num_blocks = num_blocks,
                     .bytes = block_bytes,
                     .how = how},
               threads);
}

static void copy(job *j) {
    int64_t piece = j->bytes / j->threads & ~(int64_t)4095;
    const char *p = j->from + piece * j->thread;
    char *q = j->to + piece * j->thread;
    if (j->how == 0) memcpy(q, p, (size_t)piece);
    else {
#ifdef __AVX2__
        for (int64_t i = 0; i < piece; i += 32)
            _mm256_stream_si256((__m256i *)(q + i), _mm256_loadu_si256((const __m256i *)(p + i)));
        _mm_sfence();
#else
        memcpy(q, p, (size_t)piece);
#endif
    }
}

/* how: 0 memcpy, 1 stores past the caches; `to` is aligned to 64 bytes. */
double probe_copy(const char *from, char *to, int64_t bytes, int threads, int how) {
    return run((job){.run = copy, .from = from, .to = to, .bytes = bytes, .how = how}, threads);
}

static void multiply_add(job *j) {
    vec s[12], a, b;
    for (int i = 0; i < LANES; i++) a[i] = 0.5f, b[i] = 1.0f;
    for (int i = 0; i < 12; i++) s[i] = a;
    for (int64_t i = 0; i < j->bytes; i++) {
        __asm__ volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 12
        for (int k = 0; k < 12; k++) s[k] = s[k] * a + b;
    }
    for (int k = 1; k < 12; k++) s[0] += s[k];
    keep(j, (vec[8]){s[0]});
}

/* rounds x 12 multiply-adds of whole vectors a thread; *flops gets how many operations that was. */
double probe_multiply_add(int64_t rounds, int threads, double *flops) {
    *flops = 2.0 * 12 * LANES * (double)rounds * threads;
    return run((job){.run = multiply_add, .bytes = rounds}, threads);
}

#ifdef __AVX512BF16__
static void dot(job *j) {
    __m512 s[12];
    __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00);
    for (int i = 0; i < 12; i++) s[i] = _mm512_set1_ps((float)i); /* or they are one */
    for (int64_t i = 0; i < j->bytes; i++) {
        __asm__ volatile("" : "+v"(a)); /* on s, it would make them live in memory */
#pragma GCC unroll 12
        for (int k = 0; k < 12; k++) s[k] = _mm512_dpbf16_ps(s[k], a, a);
    }
    for (int k = 1; k < 12; k++) s[0] = _mm512_add_ps(s[0], s[k]);
    keep(j, (vec[8]){(vec)s[0]});
}
#endif

/* The same of dot products of bfloat16 pairs; -1 where the processor has none. */
double probe_dot(int64_t rounds, int threads, double *flops) {
    *flops = 4.0 * 12 * 16 * (double)rounds * threads;
#ifdef __AVX512BF16__
    return run((job){.run = dot, .bytes = rounds}, threads);
#else
    return -1;
#endif
}
