#define _GNU_SOURCE /* pthread_setaffinity_np */
#include "pool.h"

#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "rf/alloc.h"
#include "rf/status.h"

/* How long to poll before sleeping. A wake-up through the kernel costs 5 to 50 us; within one model
 * step the next call comes sooner than that, and more would take time from other libraries'
 * threads. */
#define SPIN_WORKER_NS 30000
#define SPIN_CALLER_NS 100000

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void drain(rf_pool *p, int worker) {
    uint64_t w = atomic_load_explicit(&p->unclaimed, memory_order_acquire);
    int64_t mine = 0, tasks = 0, since = (uint32_t)w ? now_ns() : 0;
    while ((uint32_t)w) {
        if (!atomic_compare_exchange_weak_explicit(&p->unclaimed, &w, w - 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        tasks = p->tasks;
        p->fn(p->arg, tasks - (int64_t)(uint32_t)w, worker);
        int64_t now = now_ns(); /* before the region can end */
        atomic_fetch_add_explicit(&p->busy_ns, now - since, memory_order_relaxed);
        since = now;
        mine = atomic_fetch_add(&p->finished, 1) + 1;
        if (mine == tasks && worker != 0 && atomic_load(&p->sleeping)) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->lock);
        }
        w = atomic_load_explicit(&p->unclaimed, memory_order_acquire);
    }
}

struct rf_worker {
    pthread_t id;
#if defined(__linux__)
    cpu_set_t home; /* where it may run, but for the caller's processor */
    cpu_set_t set;  /* what it was bound to last */
#endif
};

/* Binds the workers to where they may run, without the processor that the caller is on. There they
 * have nothing to gain, and where the scheduler wakes them there, as it does to leave virtual
 * processors idle, they wait until the caller's time slice has ended: decode of 67 MB with two
 * threads then took 3 ms more, as long as with one. Done when the caller has moved, before workers
 * that sleep are woken: 0.5 us for each. Who binds a worker from outside is obeyed. */
static void keep_apart(rf_pool *p) {
#if defined(__linux__)
    int caller = sched_getcpu();
    if (caller == p->caller || caller < 0 || caller >= CPU_SETSIZE) return;
    p->caller = caller;
    for (int i = 0; i < p->started; i++) {
        rf_worker *w = &p->workers[i];
        cpu_set_t now;
        if (pthread_getaffinity_np(w->id, sizeof now, &now) != 0) continue;
        if (!CPU_EQUAL(&now, &w->set)) w->home = now;
        w->set = w->home;
        CPU_CLR((size_t)caller, &w->set);
        if (CPU_COUNT(&w->set) == 0) w->set = w->home;
        if (pthread_setaffinity_np(w->id, sizeof w->set, &w->set) != 0) w->set = now;
    }
#else
    (void)p;
#endif
}

/* Binds a new worker to the processors that the pool was given, if any. It is of no less use where
 * that fails. */
static void bind_to(rf_worker *w, const uint64_t *processors) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    for (size_t i = 0; i < RF_MAX_PROCESSORS && i < CPU_SETSIZE; i++)
        if (processors[i / 64] >> (i % 64) & 1) CPU_SET(i, &set);
    if (CPU_COUNT(&set) > 0) (void)pthread_setaffinity_np(w->id, sizeof set, &set);
    CPU_ZERO(&w->set); /* keep_apart takes what it finds for its home */
#else
    (void)w, (void)processors;
#endif
}

typedef struct start {
    rf_pool *pool;
    int worker;
    uint32_t epoch;
} start;

static void *work(void *arg) {
    start s = *(start *)arg;
    rf_pool *p = s.pool;
    uint32_t seen = s.epoch;
    rf_free(arg);
    for (;;) {
        int64_t since = now_ns();
        while (atomic_load(&p->epoch) == seen && now_ns() - since < SPIN_WORKER_NS)
            for (int i = 0; i < 8; i++) relax();
        if (atomic_load(&p->epoch) == seen) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->sleepers, 1);
            while (atomic_load(&p->epoch) == seen && !atomic_load(&p->quit))
                pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->sleepers, 1);
            pthread_mutex_unlock(&p->lock);
        }
        if (atomic_load(&p->quit)) return NULL;
        seen = atomic_load(&p->epoch);
        drain(p, s.worker);
    }
}

static void init_sync(rf_pool *p) {
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
}

int rf_pool_init(rf_pool *p, int threads) {
    if (threads < 1) return RF_ERR_BAD_ARGUMENT;
    memset(p, 0, sizeof *p);
    atomic_store(&p->threads, threads);
    atomic_store(&p->owner, getpid());
    init_sync(p);
    return RF_OK;
}

static void stop_workers(rf_pool *p) {
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->quit, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    atomic_fetch_add(&p->epoch, 1); /* for those that poll */
    for (int i = 0; i < p->started; i++) pthread_join(p->workers[i].id, NULL);
    atomic_store(&p->quit, 0);
    p->started = 0;
}

void rf_pool_destroy(rf_pool *p) {
    if (atomic_load(&p->owner) == getpid()) stop_workers(p);
    rf_free(p->workers);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
}

int rf_pool_polling(const rf_pool *p) {
    return atomic_load(&p->epoch) != 0 && atomic_load(&p->sleepers) == 0;
}
int64_t rf_pool_busy_ns(const rf_pool *p) { return atomic_load(&p->busy_ns); }

int rf_pool_threads(const rf_pool *p) { return atomic_load(&p->threads); }
void rf_pool_set_threads(rf_pool *p, int threads) { atomic_store(&p->threads, threads); }

void rf_pool_set_processors(rf_pool *p, const uint64_t processors[RF_MAX_PROCESSORS / 64]) {
    if (memcmp(p->processors, processors, sizeof p->processors) == 0) return;
    memcpy(p->processors, processors, sizeof p->processors);
    atomic_store(&p->moved, 1);
}

/* In a child of the process that started the workers: there are none, and the lock may have been
 * held by a thread that does not exist here. */
static int forget_workers(rf_pool *p, int64_t pid) {
    int64_t owner = atomic_load(&p->owner);
    if (owner == pid) return 1;
    if (owner == 0 || !atomic_compare_exchange_strong(&p->owner, &owner, 0)) return 0;
    init_sync(p);
    p->started = 0;
    atomic_store(&p->sleepers, 0);
    atomic_store(&p->sleeping, 0);
    atomic_store(&p->quit, 0);
    atomic_store(&p->unclaimed, 0);
    atomic_store(&p->busy, 0);
    atomic_store(&p->owner, pid);
    return 1;
}

int rf_pool_enter(rf_pool *p) {
    int64_t pid = getpid();
    if (atomic_load(&p->owner) != pid && !forget_workers(p, pid)) return 0;
    return atomic_exchange_explicit(&p->busy, 1, memory_order_acquire) == 0;
}

void rf_pool_leave(rf_pool *p) { atomic_store_explicit(&p->busy, 0, memory_order_release); }

int rf_pool_ready(rf_pool *p, int64_t tasks) {
    int want = rf_pool_threads(p) - 1;
    const int moved = atomic_exchange(&p->moved, 0);
    if (p->started > want || moved) stop_workers(p);
    if (tasks - 1 < want) want = tasks > 0 ? (int)(tasks - 1) : 0;
    if (p->started >= want) return p->started + 1; /* any of those may take a task */
    if (want > p->capacity) {
        rf_worker *workers = rf_realloc(p->workers, (size_t)want * sizeof *workers);
        if (!workers) return p->started + 1;
        p->workers = workers;
        p->capacity = want;
    }
    sigset_t every, before; /* signals belong to the program's own threads, but a worker's faults */
    sigfillset(&every);
    static const int faults[] = {SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV};
    for (unsigned i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&every, faults[i]);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    while (p->started < want) {
        start *s = rf_alloc(sizeof *s);
        if (!s) break;
        s->pool = p;
        s->worker = p->started + 1;
        s->epoch = atomic_load(&p->epoch);
        rf_worker *w = &p->workers[p->started];
        if (pthread_create(&w->id, NULL, work, s) != 0) {
            rf_free(s);
            break; /* fewer threads do the same work */
        }
        bind_to(w, p->processors);
        p->started++;
    }
    p->caller = -1;
    keep_apart(p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return p->started + 1;
}

void rf_pool_run(rf_pool *p, rf_task_fn fn, void *arg, int64_t tasks) {
    if (tasks == 0) return;
    if (tasks == 1 || p->started == 0) {
        for (int64_t i = 0; i < tasks; i++) fn(arg, i, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->tasks = tasks;
    atomic_store_explicit(&p->finished, 0, memory_order_relaxed);
    uint64_t epoch = atomic_load(&p->epoch) + 1u;
    atomic_store(&p->unclaimed, epoch << 32 | (uint64_t)tasks);
    atomic_store(&p->epoch, (uint32_t)epoch);
    /* Either a worker sees the new epoch before it sleeps, or it is counted here. */
    if (atomic_load(&p->sleepers)) {
        keep_apart(p);
        pthread_mutex_lock(&p->lock);
        if (tasks > p->started) pthread_cond_broadcast(&p->wake);
        else
            for (int64_t i = 1; i < tasks; i++) pthread_cond_signal(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    drain(p, 0);
    int64_t since = now_ns();
    while (atomic_load_explicit(&p->finished, memory_order_acquire) < tasks) {
        for (int i = 0; i < 8; i++) relax();
        if (now_ns() - since < SPIN_CALLER_NS) continue;
        pthread_mutex_lock(&p->lock);
        atomic_store(&p->sleeping, 1);
        while (atomic_load(&p->finished) < tasks) pthread_cond_wait(&p->done, &p->lock);
        atomic_store(&p->sleeping, 0);
        pthread_mutex_unlock(&p->lock);
    }
}
