/* pool.c: every task runs once, whatever threads there are, in children of the process too. */
#define _GNU_SOURCE /* sched_setaffinity */
#include <sched.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "pool.h"
#include "rf/status.h"

#define MOST 5000
typedef struct counts {
    _Atomic int runs[MOST];
    _Atomic int workers[16];
    int threads; /* what rf_pool_ready promised */
} counts;

static void count(void *arg, int64_t task, int worker) {
    counts *c = arg;
    atomic_fetch_add(&c->runs[task], 1);
    CHECK(worker >= 0 && worker < 16 && worker < c->threads);
    CHECK(atomic_fetch_add(&c->workers[worker], 1) == 0); /* no worker is in two tasks */
    for (volatile int i = 0; i < (int)(task % 7) * 50; i++) {
    }
    atomic_fetch_sub(&c->workers[worker], 1);
}

static void region(rf_pool *p, int64_t tasks) {
    static counts c; /* regions of a pool never overlap */
    memset(&c, 0, sizeof c);
    c.threads = rf_pool_ready(p, tasks < 64 ? tasks : 2); /* more have started: all may come */
    CHECK(c.threads >= 1);
    rf_pool_run(p, count, &c, tasks);
    for (int64_t i = 0; i < MOST; i++) CHECK(c.runs[i] == (i < tasks));
}

static void regions(rf_pool *p) {
    CHECK(rf_pool_enter(p));
    CHECK(!rf_pool_enter(p)); /* taken */
    for (int64_t tasks = 0; tasks < 20; tasks++) region(p, tasks);
    for (int i = 0; i < 300; i++) region(p, 1 + i % 9);
    region(p, MOST);
    rf_pool_leave(p);
}

static void sleep_between(rf_pool *p) { /* long enough for the workers to stop polling */
    for (int i = 0; i < 20; i++) {
        usleep(1000);
        CHECK(rf_pool_enter(p));
        region(p, 50);
        rf_pool_leave(p);
    }
}

static void change_threads(rf_pool *p) {
    static const int threads[] = {1, 4, 2, 8, 3, 1, 5};
    for (unsigned i = 0; i < sizeof threads / sizeof *threads; i++) {
        rf_pool_set_threads(p, threads[i]);
        CHECK(rf_pool_threads(p) == threads[i]);
        regions(p);
    }
}

#if defined(__linux__) && !defined(RF_EMULATED)
static _Atomic int bound_to; /* the processor that workers find themselves bound to, or -1 */

static void look(void *arg, int64_t task, int worker) {
    (void)arg, (void)task;
    cpu_set_t set;
    if (worker != 0 && sched_getaffinity(0, sizeof set, &set) == 0)
        atomic_store(&bound_to, CPU_COUNT(&set) == 1 && CPU_ISSET(0, &set) ? 0 : -1);
    while (atomic_load(&bound_to) == -2) usleep(100); /* until a worker has come */
}

static int workers_bound(rf_pool *p) {
    atomic_store(&bound_to, -2);
    CHECK(rf_pool_enter(p));
    CHECK(rf_pool_ready(p, 50) > 1);
    rf_pool_run(p, look, NULL, 50);
    rf_pool_leave(p);
    return atomic_load(&bound_to) == 0;
}

static void bind(rf_pool *p) {
    cpu_set_t before, one;
    uint64_t set[RF_MAX_PROCESSORS / 64] = {1}, none[RF_MAX_PROCESSORS / 64] = {0};
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    if (!CPU_ISSET(0, &before) || CPU_COUNT(&before) < 2) return;
    CHECK(!workers_bound(p));
    rf_pool_set_processors(p, set); /* moves those that run */
    CHECK(workers_bound(p));
    regions(p);
    rf_pool_set_processors(p, none);
    CHECK(!workers_bound(p));
    CPU_ZERO(&one);
    CPU_SET(0, &one); /* a caller that is bound has workers that are not, if it says so */
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    set[0] = 3;
    rf_pool_set_processors(p, set);
    CHECK(!workers_bound(p));
    rf_pool_set_processors(p, none);
    CHECK(workers_bound(p));
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
}
#endif

static void fork_once(rf_pool *p, int depth) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(60);
        regions(p);
        if (depth > 0) fork_once(p, depth - 1);
        regions(p);
        _exit(0);
    }
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
}

static void fork_while_taken(rf_pool *p) { /* as if another thread had been inside */
    CHECK(rf_pool_enter(p));
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(60);
        regions(p);
        _exit(0);
    }
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    rf_pool_leave(p);
}

int main(void) {
    rf_pool p;
    CHECK(rf_pool_init(&p, 0) == RF_ERR_BAD_ARGUMENT);
    CHECK(rf_pool_init(&p, 3) == RF_OK);
    regions(&p);
    sleep_between(&p);
#if !defined(RF_EMULATED)
    fork_once(&p, 2);
    fork_while_taken(&p);
#else /* qemu-user starts no threads in the child of a process that had some */
    (void)fork_once, (void)fork_while_taken;
#endif
#if defined(__linux__) && !defined(RF_EMULATED)
    bind(&p);
#endif
    change_threads(&p);
    rf_pool_destroy(&p);
    CHECK(rf_pool_init(&p, 2) == RF_OK); /* never used */
    rf_pool_destroy(&p);
    return 0;
}
