/* write.c: every byte of the slots named, and no other. */
#include <math.h>
#include <stdlib.h>
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
    p.dtype = p.kv_dtype = RF_F32;
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

/* A write that is large enough to go past the caches, to a pool whose vectors are whole lines and
 * to one whose vectors are not. */
static void stream(rf_cpu *cpu) {
    enum { N = 5000, D = 16, B = 8 };
    const size_t bytes = (size_t)N * KV * D * sizeof(float);
    char *memory = malloc(2 * bytes + 128), *from = malloc(bytes);
    int64_t *at = malloc(N * sizeof *at);
    CHECK(memory && from && at);
    for (size_t i = 0; i < bytes; i++) from[i] = (char)(i * 7 + i / 251);
    for (int64_t i = 0; i < N; i++) at[i] = (i / B * 7 % (N / B)) * B + i % B;
    for (size_t shift = 0; shift < 64; shift += 16) {
        char *to = memory + (64 - ((uintptr_t)memory & 63)) + shift, *second = to + bytes;
        rf_write_params p = {0};
        p.key = p.value = (rf_rows){from, KV * D, D};
        p.k = (rf_paged){to, KV * B * D, B * D, D};
        p.v = (rf_paged){second, KV * B * D, D, KV * D};
        p.slot_mapping = at;
        p.num_tokens = N;
        p.num_blocks = N / B;
        p.num_kv_heads = KV;
        p.head_dim = p.v_head_dim = D;
        p.block_size = B;
        p.dtype = p.kv_dtype = RF_F32;
        memset(to, 0, 2 * bytes);
        CHECK(rf_cpu_write_kv(cpu, &p) == RF_OK);
        for (int64_t i = 0; i < N; i++)
            for (int64_t h = 0; h < KV; h++) {
                const char *row = from + (i * KV + h) * D * 4;
                int64_t block = at[i] / B * KV * B, token = at[i] % B;
                CHECK(memcmp(to + (block + h * B + token) * D * 4, row, D * 4) == 0);
                CHECK(memcmp(second + (block + token * KV + h) * D * 4, row, D * 4) == 0);
            }
    }
    free(memory);
    free(from);
    free(at);
}

/* 8-bit elements by their definition, with scales of each form. */
static void quantise(rf_cpu *cpu) {
    static uint8_t codes[BLOCKS * KV * BLOCK * DIM];
    static float scales[BLOCKS * KV * BLOCK];
    const float largest[] = {448.0f, 240.0f, 127.0f};
    for (int type = RF_E4M3FN; type <= RF_I8; type++) {
        rf_write_params p = {0};
        p.key = (rf_rows){key, KV * DIM, DIM};
        p.k = (rf_paged){codes, KV * BLOCK * DIM, BLOCK * DIM, DIM};
        p.k_scale = (rf_scales){scales, KV * BLOCK, BLOCK, 1, 0.0f, 1};
        p.slot_mapping = slots;
        p.num_tokens = TOKENS;
        p.num_blocks = BLOCKS;
        p.num_kv_heads = KV;
        p.head_dim = DIM;
        p.block_size = BLOCK;
        p.dtype = RF_F32;
        p.kv_dtype = type;
        memset(codes, 0, sizeof codes);
        CHECK(rf_cpu_write_kv(cpu, &p) == RF_OK);
        for (int64_t i = 0; i < TOKENS; i++)
            for (int64_t h = 0; h < KV && slots[i] >= 0; h++) {
                /* keys rise by 1 from element to element: the last is the largest */
                int64_t at = (slots[i] / BLOCK * KV + h) * BLOCK + slots[i] % BLOCK;
                float last = key[(i * KV + h) * DIM + DIM - 1];
                CHECK(fabsf(scales[at] * largest[type - RF_E4M3FN] - last) <= 1e-6f * last);
                CHECK(codes[at * DIM + DIM - 1] == (type == RF_E4M3FN ? 0x7e : 0x7f));
            }
        p.k_scale = (rf_scales){NULL, 0, 0, 0, 1.0f, 0}; /* saturates */
        CHECK(rf_cpu_write_kv(cpu, &p) == RF_OK);
        CHECK(codes[slots[0] * DIM] == (type == RF_E4M3FN ? 0x38 : type == RF_I8 ? 1 : 0x40));
        CHECK(codes[((slots[399] / BLOCK * KV) * BLOCK + slots[399] % BLOCK) * DIM] ==
              (type == RF_E4M3FN ? 0x7e : 0x7f));
    }
}

int main(void) {
    for (int i = 0; i < TOKENS * KV * DIM; i++) value[i] = -(key[i] = (float)(i + 1));
    for (int64_t i = 0; i < TOKENS; i++) slots[i] = i % 9 == 4 ? -i : i * 37 % (BLOCKS * BLOCK);
    for (int threads = 1; threads < 4; threads++) {
        rf_cpu *cpu;
        CHECK(rf_cpu_create(NULL, threads, &cpu) == RF_OK);
        write(cpu, 0);
        write(cpu, 1);
        stream(cpu);
        quantise(cpu);
        rf_cpu_destroy(cpu);
    }
    return 0;
}
