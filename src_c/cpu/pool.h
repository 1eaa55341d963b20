/* Worker threads for loops of independent tasks.
 *
 * Not OpenMP, for four reasons: libgomp's workers do not survive fork() and the child hangs; a
 * parallel region waits for every thread to wake, also when the caller could have done all the work
 * by then; its threads spin for milliseconds after a region and take the processor from the matrix
 * product that comes next; and a wheel would depend on the compiler's runtime library. Here a
 * region ends when its tasks are done, by whomever, so a worker that wakes late costs nothing.
 * Workers are kept off the processor that the caller is on. */
#ifndef RF_CPU_POOL_H
#define RF_CPU_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define RF_MAX_PROCESSORS 1024

/* worker: 0 .. threads - 1, a different one for each thread that is in the region. */
typedef void (*rf_task_fn)(void *arg, int64_t task, int worker);

typedef struct rf_worker rf_worker;

typedef struct rf_pool {
    _Atomic int32_t busy;  /* 1 while a caller owns the pool */
    _Atomic int64_t owner; /* process that started the workers; they do not exist in its children */
    int32_t started;       /* workers running, the caller not counted */
    _Atomic int32_t threads; /* asked for, the caller counted */
    int32_t capacity;        /* of workers */
    int32_t caller;          /* the processor that workers were kept off last, or -1 */
    _Atomic int32_t moved;   /* 1 when workers that were started have another set of processors */
    uint64_t processors[RF_MAX_PROCESSORS / 64]; /* a bit each; none: where the caller may run */
    rf_worker *workers;                          /* [started] */

    pthread_mutex_t lock; /* only for going to sleep and being woken */
    pthread_cond_t wake;  /* workers wait here */
    pthread_cond_t done;  /* the caller waits here */

    _Atomic uint32_t epoch;     /* counts regions: a change is a worker's signal */
    _Atomic int32_t sleepers;   /* workers in, or about to enter, pthread_cond_wait */
    _Atomic int32_t sleeping;   /* the caller is, or is about to be */
    _Atomic int32_t quit;       /* workers end */
    _Atomic uint64_t unclaimed; /* epoch << 32 | tasks of that region not yet taken */
    _Atomic int64_t finished;   /* tasks of this region */
    _Atomic int64_t busy_ns;    /* in tasks, of all threads and regions */

    /* The region: written before `unclaimed`, read only by who took one of its tasks, and a region
     * lives until all its tasks are finished. */
    rf_task_fn fn;
    void *arg;
    int64_t tasks;
} rf_pool;

int rf_pool_init(rf_pool *p, int threads);
void rf_pool_destroy(rf_pool *p);

int rf_pool_threads(const rf_pool *p);
void rf_pool_set_threads(rf_pool *p, int threads); /* takes effect at the next region */
/* Where workers may run, from the next region on; a set of zeros is where the thread may that
 * starts them. Nobody may be in a region. Ignored where threads cannot be bound. */
void rf_pool_set_processors(rf_pool *p, const uint64_t processors[RF_MAX_PROCESSORS / 64]);

/* 1 when the workers have not gone to sleep since the last region: they can be had for little. */
int rf_pool_polling(const rf_pool *p);
int64_t rf_pool_busy_ns(const rf_pool *p);

/* 1: the caller owns the pool until rf_pool_leave. 0: somebody else does; work alone. */
int rf_pool_enter(rf_pool *p);
void rf_pool_leave(rf_pool *p);

/* Starts the workers that a region of that many tasks lacks. Returns how many there are with the
 * caller: any of them may take tasks, more than the region needs, too. For an owner. */
int rf_pool_ready(rf_pool *p, int64_t tasks);

/* fn(arg, i, worker) for i in 0 .. tasks - 1, taken in ascending order; tasks < 2^32. For an owner,
 * after rf_pool_ready. Returns when all have finished. */
void rf_pool_run(rf_pool *p, rf_task_fn fn, void *arg, int64_t tasks);

#endif
