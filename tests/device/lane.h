/* Between a kernel compiled for the simulated device and the stand-in runtime that runs it. */
#ifndef RF_TEST_LANE_H
#define RF_TEST_LANE_H

#include <cstddef>

/* What a lane owes before others may see what it stored, or it what they did. */
struct rf_sim_order {
    bool stored; /* something, and did not release it */
    bool stale;  /* the workgroup has arrived, the lane not acquired what others released */
};

/* The lane that runs now, and what it can ask of its wave and its workgroup. */
struct rf_sim_lane {
    int thread;
    rf_sim_order *order; /* the lane's */
    int group[3];
    int (*exchange)(int value, int mask); /* the value of lane index ^ mask; all lanes take part */
    bool (*any)(bool value);
    /* The words (16 at most) that each lane of the wave gave: those of lane i at i * 16. */
    const unsigned *(*publish)(const unsigned *words, int count);
    void (*barrier)();
    void *(*shared)(size_t size); /* the workgroup's LDS */
    /* Adds at once, after all that the workgroup's lanes have stored was released. */
    unsigned (*fetch_add)(unsigned *p, unsigned x);
    void (*too_early)(); /* a load, before what others released is acquired */
};

struct rf_sim_kernel {
    size_t size; /* of the arguments */
    void (*run)(const void *arguments);
};

#endif
