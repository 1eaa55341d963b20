/* copy.c: every byte of the blocks named, and no other. */
#include <string.h>

#include "check.h"
#include "rf/cpu.h"

enum { KV = 3, DIM = 24, BLOCK = 5, BLOCKS = 100, SIZE = KV * BLOCK * DIM };

static float k[BLOCKS * SIZE], v[BLOCKS * SIZE], want[BLOCKS * SIZE];

static const int64_t size = sizeof(float);
static const rf_copy_params pools[2] = {
    {(char *)k, SIZE * sizeof(float), 0, 0, 1, 1, SIZE * sizeof(float)},
    /* of v only the first 16 elements of each vector */
    {(char *)v, SIZE * sizeof(float), BLOCK *DIM * sizeof(float), DIM * sizeof(float), KV, BLOCK,
     16 * sizeof(float)},
};

static void reset(void) {
    for (int i = 0; i < BLOCKS * SIZE; i++) k[i] = v[i] = want[i] = (float)i;
}

static void copy(rf_cpu *cpu) {
    int32_t pairs[BLOCKS];
    for (int32_t i = 0; i < BLOCKS; i++) pairs[i] = i * 37 % BLOCKS;
    reset();
    CHECK(rf_cpu_copy_blocks(cpu, pools, 2, pairs, BLOCKS / 2) == RF_OK);
    for (int32_t i = 0; i < BLOCKS; i += 2)
        memcpy(want + pairs[i + 1] * SIZE, want + pairs[i] * SIZE, SIZE * sizeof(float));
    CHECK(memcmp(k, want, sizeof k) == 0);
    for (int64_t i = 0; i < BLOCKS * SIZE; i++) CHECK(v[i] == (i % DIM < 16 ? want[i] : (float)i));
    CHECK(rf_cpu_copy_blocks(cpu, pools, 2, pairs, 0) == RF_OK);
    CHECK(rf_cpu_copy_blocks(cpu, pools, 0, pairs, 3) == RF_OK);
}

static void rows(rf_cpu *cpu) {
    enum { NUM = 40, WIDTH = (SIZE + KV * BLOCK * 16) + 1 };
    static float data[NUM * WIDTH];
    int32_t ids[NUM], others[NUM];
    for (int32_t i = 0; i < NUM; i++) {
        ids[i] = i * 37 % BLOCKS;
        others[i] = (i * 11 + 3) % BLOCKS;
    }
    reset();
    for (int i = 0; i < NUM * WIDTH; i++) data[i] = -1.0f;
    CHECK(rf_cpu_gather_blocks(cpu, pools, 2, ids, NUM, (char *)data, WIDTH * size) == RF_OK);
    for (int i = 0; i < NUM; i++) {
        const float *row = data + i * WIDTH;
        CHECK(memcmp(row, k + ids[i] * SIZE, SIZE * sizeof(float)) == 0);
        for (int j = 0; j < KV * BLOCK * 16; j++)
            CHECK(row[SIZE + j] == v[ids[i] * SIZE + j / 16 * DIM + j % 16]);
        CHECK(row[WIDTH - 1] == -1.0f);
    }
    for (int i = 0; i < BLOCKS * SIZE; i++) k[i] = v[i] = -2.0f;
    CHECK(rf_cpu_scatter_blocks(cpu, pools, 2, others, NUM, (char *)data, WIDTH * size) == RF_OK);
    for (int i = 0; i < BLOCKS * SIZE; i++) {
        float original = -2.0f;
        for (int j = 0; j < NUM; j++)
            if (others[j] == i / SIZE) original = (float)(ids[j] * SIZE + i % SIZE);
        CHECK(k[i] == original);
        CHECK(v[i] == (i % DIM < 16 ? original : -2.0f));
    }
    CHECK(rf_cpu_gather_blocks(cpu, pools, 2, ids, 0, NULL, 0) == RF_OK);
}

int main(void) {
    for (int threads = 1; threads < 4; threads++) {
        rf_cpu *cpu;
        CHECK(rf_cpu_create(NULL, threads, &cpu) == RF_OK);
        copy(cpu);
        rows(cpu);
        rf_cpu_destroy(cpu);
    }
    return 0;
}
