/* write.c: every byte of the slots and blocks named, and no other. */
#include <string.h>

#include "check.h"
#include "rf/cpu.h"

enum { TOKENS = 400, KV = 3, DIM = 24, BLOCK = 5, BLOCKS = 100 };

static float key[TOKENS * KV * DIM], k[BLOCKS * KV * BLOCK * DIM], want[BLOCKS * KV * BLOCK * DIM];
static float value[TOKENS * KV * DIM], v[BLOCKS * KV * BLOCK * DIM];
static int64_t slots[TOKENS];

static void write(rf_cpu *cpu, int nhd) {
    rf_write_params p = {0};
    int64_t head = nhd ? DIM : BLOCK * DIM, token = nhd ? KV * DIM : DIM;
    p.key = (rf_rows){key, KV * DIM, DIM};
    p.value = (rf_rows){value, KV * DIM, DIM};
    p.k = (rf_paged){k, KV * BLOCK * DIM, head, token};
    p.v = (rf_paged){v, KV * BLOCK * DIM, head, token};
    p.slot_mapping = slots;
    p.num_blocks = BLOCKS;
    p.num_kv_heads = KV;
    p.head_dim = p.v_head_dim = DIM;
    p.block_size = BLOCK;
    p.dtype = RF_F32;
    for (p.num_tokens = 0; p.num_tokens <= TOKENS; p.num_tokens += 100) {
        memset(k, 0, sizeof k);
        memset(v, 0, sizeof v);
        memset(want, 0, sizeof want);
        for (int64_t i = 0; i < p.num_tokens; i++)
            for (int64_t h = 0; h < KV && slots[i] >= 0; h++)
                memcpy(want + slots[i] / BLOCK * KV * BLOCK * DIM + h * head +
                           slots[i] % BLOCK * token,
                       key + (i * KV + h) * DIM, DIM * sizeof(float));
        CHECK(rf_cpu_write_kv(cpu, &p) == RF_OK);
        CHECK(memcmp(k, want, sizeof k) == 0);
        for (size_t i = 0; i < sizeof v / sizeof *v; i++) CHECK(v[i] == -k[i]);
    }
}

static void copy(rf_cpu *cpu) {
    int32_t pairs[BLOCKS];
    for (int32_t i = 0; i < BLOCKS; i++) pairs[i] = i * 37 % BLOCKS;
    for (size_t i = 0; i < sizeof k / sizeof *k; i++) k[i] = v[i] = want[i] = (float)i;
    const int64_t size = sizeof(float), block = KV * BLOCK * DIM;
    rf_copy_params pools[2] = {
        {(char *)k, block * size, 0, 0, 1, 1, block * size},
        /* of v only the first 16 elements of each vector */
        {(char *)v, block * size, BLOCK * DIM * size, DIM * size, KV, BLOCK, 16 * size},
    };
    CHECK(rf_cpu_copy_blocks(cpu, pools, 2, pairs, BLOCKS / 2) == RF_OK);
    for (int32_t i = 0; i < BLOCKS; i += 2)
        memcpy(want + pairs[i + 1] * block, want + pairs[i] * block, (size_t)(block * size));
    CHECK(memcmp(k, want, sizeof k) == 0);
    for (int64_t i = 0; i < BLOCKS * block; i++) CHECK(v[i] == (i % DIM < 16 ? want[i] : (float)i));
    CHECK(rf_cpu_copy_blocks(cpu, pools, 2, pairs, 0) == RF_OK);
    CHECK(rf_cpu_copy_blocks(cpu, pools, 0, pairs, 3) == RF_OK);
}

int main(void) {
    for (int i = 0; i < TOKENS * KV * DIM; i++) value[i] = -(key[i] = (float)(i + 1));
    for (int64_t i = 0; i < TOKENS; i++) slots[i] = i % 9 == 4 ? -i : i * 37 % (BLOCKS * BLOCK);
    for (int threads = 1; threads < 4; threads++) {
        rf_cpu *cpu;
        CHECK(rf_cpu_create(NULL, threads, &cpu) == RF_OK);
        write(cpu, 0);
        write(cpu, 1);
        copy(cpu);
        rf_cpu_destroy(cpu);
    }
    return 0;
}
