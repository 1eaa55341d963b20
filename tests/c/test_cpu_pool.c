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
enum { NOWHERE = 0, ON_0 = 1, ON_1 = 2, ON_BOTH = 3 };

static void bind_this(int where) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (where & ON_0) CPU_SET(0, &set);
    if (where & ON_1) CPU_SET(1, &set);
    CHECK(sched_setaffinity(0, sizeof set, &set) == 0);
}

static int where_this(void) {
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
    return (CPU_ISSET(0, &set) ? ON_0 : 0) | (CPU_ISSET(1, &set) ? ON_1 : 0);
}

static _Atomic int found; /* where the worker may run, of processors 0 and 1; NOWHERE: not yet */

static void look(void *arg, int64_t task, int worker) {
    (void)task;
    if (worker != 0) {
        if (arg) bind_this(*(int *)arg);
        atomic_store(&found, where_this());
    }
    while (atomic_load(&found) == NOWHERE) usleep(100); /* until the worker has come */
}

/* What the only worker finds in a region for which it has to be woken; it binds itself first, if
 * told to. */
static int worker_of(rf_pool *p, int caller, int *bind_it_to) {
    while (rf_pool_polling(p)) usleep(100);
    bind_this(caller);
    atomic_store(&found, NOWHERE);
    CHECK(rf_pool_enter(p));
    CHECK(rf_pool_ready(p, 50) == 2);
    rf_pool_run(p, look, bind_it_to, 50);
    rf_pool_leave(p);
    return atomic_load(&found);
}

static void bind(rf_pool *p) {
    uint64_t set[RF_MAX_PROCESSORS / 64] = {0};
    cpu_set_t before;
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    if (where_this() != ON_BOTH) return;
    rf_pool_set_threads(p, 2);

    /* Kept off the caller's processor, wherever that goes, from the first region on. */
    CHECK(worker_of(p, ON_BOTH, NULL) != NOWHERE);
    CHECK(worker_of(p, ON_0, NULL) == ON_1);
    CHECK(worker_of(p, ON_1, NULL) == ON_0);
    CHECK(worker_of(p, ON_0, NULL) == ON_1);
    regions(p);

    /* Who binds it from outside is obeyed, and may let it go again. */
    int where = ON_0;
    CHECK(worker_of(p, ON_0, &where) == ON_0);
    CHECK(worker_of(p, ON_1, NULL) == ON_0);
    CHECK(worker_of(p, ON_0, NULL) == ON_0); /* it has no other */
    where = ON_BOTH;
    CHECK(worker_of(p, ON_0, &where) == ON_BOTH);
    CHECK(worker_of(p, ON_1, NULL) == ON_0);
    CHECK(worker_of(p, ON_0, NULL) == ON_1);

    set[0] = ON_0;
    rf_pool_set_processors(p, set); /* moves the one that runs */
    CHECK(worker_of(p, ON_0, NULL) == ON_0);
    CHECK(worker_of(p, ON_1, NULL) == ON_0);
    regions(p);
    set[0] = NOWHERE; /* where the caller may run */
    rf_pool_set_processors(p, set);
    CHECK(worker_of(p, ON_0, NULL) == ON_0);
    CHECK(worker_of(p, ON_1, NULL) == ON_0);
    set[0] = ON_BOTH; /* a caller that is bound has workers that are not, if it says so */
    rf_pool_set_processors(p, set);
    CHECK(worker_of(p, ON_0, NULL) == ON_1);
    CHECK(worker_of(p, ON_1, NULL) == ON_0);

    set[0] = NOWHERE;
    rf_pool_set_processors(p, set);
    rf_pool_set_threads(p, 3);
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
