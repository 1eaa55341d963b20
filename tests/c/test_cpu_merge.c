/* merge.c: weights by the log-sum-exps, and nothing of a part that saw nothing. */
#include <math.h>

#include "check.h"
#include "rf/cpu.h"

enum { TOKENS = 300, HEADS = 5, DIM = 40, SIZE = TOKENS * HEADS * DIM };

static float a[SIZE], b[SIZE], out[SIZE], la[TOKENS * HEADS], lb[TOKENS * HEADS], l[TOKENS * HEADS];

static void merge(rf_cpu *cpu) {
    for (int i = 0; i < SIZE; i++) {
        a[i] = sinf((float)i);
        b[i] = cosf((float)i);
    }
    for (int i = 0; i < TOKENS * HEADS; i++) {
        la[i] = i % 7 == 0 ? -INFINITY : (float)(i % 11);
        lb[i] = i % 5 == 0 ? -INFINITY : (float)(i % 13);
        if (la[i] == -INFINITY) a[i * DIM + 3] = NAN; /* not read */
    }
    const rf_rows ra = {a, HEADS * DIM, DIM}, rb = {b, HEADS * DIM, DIM},
                  ro = {out, HEADS * DIM, DIM};
    rf_merge_params p = {ra, rb, ro, la, lb, l, TOKENS, HEADS, DIM, RF_F32, 0};
    CHECK(rf_cpu_merge_states(cpu, &p) == RF_OK);
    for (int i = 0; i < TOKENS * HEADS; i++) {
        double wa = exp(la[i]), wb = exp(lb[i]);
        CHECK(wa + wb > 0 ? fabs(l[i] - log(wa + wb)) < 1e-5 : l[i] == -INFINITY);
        for (int j = i * DIM; j < (i + 1) * DIM; j++) {
            double want = (wa > 0 ? wa * a[j] : 0) + (wb > 0 ? wb * b[j] : 0);
            CHECK(fabs(out[j] - (wa + wb > 0 ? want / (wa + wb) : 0)) < 1e-6);
        }
    }
    /* in place, without the log-sum-exp */
    p.out = rb;
    p.lse = NULL;
    CHECK(rf_cpu_merge_states(cpu, &p) == RF_OK);
    for (int i = 0; i < SIZE; i++) CHECK(b[i] == out[i]);
    p.num_tokens = 0;
    CHECK(rf_cpu_merge_states(cpu, &p) == RF_OK);
}

int main(void) {
    for (int threads = 1; threads < 4; threads++) {
        rf_cpu *cpu;
        CHECK(rf_cpu_create(NULL, threads, &cpu) == RF_OK);
        merge(cpu);
        rf_cpu_destroy(cpu);
    }
    return 0;
}
