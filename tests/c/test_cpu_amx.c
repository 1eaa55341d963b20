/* The kernels of AMX: that they use it for what they should, and, where it is emulated, that the
 * emulator is what the manual says. What they compute is in test_cpu_attention.c. */
#include <math.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "rf/cpu.h"

extern long rf_emulated_amx_products;
int rf_emulate_amx(void);

enum { DIM = 64, HEADS = 4, CONTEXT = 64, NOT_HERE = 77 };

/* Tile products of `tokens` query tokens over one key/value head. */
static long products(rf_cpu *cpu, int dtype, int kv_dtype, int tokens) {
    static float query[16 * HEADS * DIM], cache[CONTEXT * DIM], out[16 * HEADS * DIM];
    const int32_t block = 0, len = CONTEXT, cu[2] = {0, tokens};
    rf_attention_params p = {
        .query = {query, HEADS * DIM, DIM},
        .out = {out, HEADS * DIM, DIM},
        .k = {cache, CONTEXT * DIM, CONTEXT * DIM, DIM},
        .v = {cache, CONTEXT * DIM, CONTEXT * DIM, DIM},
        .k_scale = {.value = 1.0f},
        .v_scale = {.value = 1.0f},
        .block_table = &block,
        .seq_lens = &len,
        .cu_seqlens_q = cu,
        .table_stride = 1,
        .table_width = 1,
        .num_tokens = tokens,
        .num_blocks = 1,
        .num_rows = 1,
        .num_seqs = 1,
        .num_heads = HEADS,
        .num_kv_heads = 1,
        .head_dim = DIM,
        .v_head_dim = DIM,
        .block_size = CONTEXT,
        .dtype = dtype,
        .kv_dtype = kv_dtype,
        .window_left = -1,
        .window_right = -1,
        .scale = 1.0f,
    };
    const long before = rf_emulated_amx_products;
    CHECK(rf_cpu_attention(cpu, &p) == RF_OK);
    return rf_emulated_amx_products - before;
}

/* ---- instructions ---- */

typedef struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} config;

#define LOAD(reg, at, stride)                                                                      \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #reg ::"r"(at), "r"((int64_t)(stride))           \
                     : "memor"                                                                     \
                       "y")
#define STORE(reg, at, stride)                                                                     \
    __asm__ volatile("tilestored %%tmm" #reg ", (%0,%1,1)" ::"r"(at), "r"((int64_t)(stride))       \
                     : "memory")
static void configure(const config *c) { __asm__ volatile("ldtilecfg %0" ::"m"(*c)); }

/* C of 2 x 1, A of 2 x 4 elements, B of 2 pairs of rows x 1. */
static const config small = {.palette = 1, .row_bytes = {4, 8, 4}, .rows = {2, 2, 2}};

static uint16_t bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    CHECK((u & 0xffff) == 0);
    return (uint16_t)(u >> 16);
}
/* c + the sum of a[i] b[i]: the first row of the product; the second is of zeros. */
static float dot(float c, const float a[4], const float b[4]) {
    uint16_t rows[2][4] = {{0}}, pairs[4];
    float out[2][2] = {{c, 9.0f}, {c, 9.0f}};
    for (int i = 0; i < 4; i++) {
        rows[0][i] = bf16(a[i]);
        pairs[i] = bf16(b[i]);
    }
    configure(&small);
    LOAD(0, out, 8);
    LOAD(1, rows, 8);
    LOAD(2, pairs, 4);
    __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
    STORE(0, out, 8);
    __asm__ volatile("tilerelease");
    CHECK(out[0][1] == 9.0f && out[1][1] == 9.0f); /* 4 bytes a row, and no more */
    CHECK(out[1][0] == (fabsf(c) < 0x1p-126f ? 0.0f : c));
    return out[0][0];
}

static void rounding(void) {
    CHECK(dot(1, (float[]){1, 2, 3, 4}, (float[]){5, 6, 7, 8}) == 71);
    /* even and odd elements apart, C last: each way of adding gives another sum */
    CHECK(dot(0x1p24f, (float[]){1, 1, 0, 0}, (float[]){1, 1, 0, 0}) == 0x1p24f + 2);
    CHECK(dot(0, (float[]){0x1p24f, 1, 1, 1}, (float[]){1, 1, 1, 1}) == 0x1p24f + 2);
    CHECK(dot(0, (float[]){0x1p24f, 0, 1, 0}, (float[]){1, 0, 1, 0}) == 0x1p24f);
    CHECK(dot(1, (float[]){-0x1p30f, 0x1p30f, 0, 0}, (float[]){1, 1, 0, 0}) == 1);
    CHECK(dot(0x1p24f, (float[]){3, 0, 0, 0}, (float[]){1, 0, 0, 0}) == 0x1p24f + 4); /* to even */
    /* denormals in and out are zero */
    CHECK(dot(0, (float[]){0x1p-127f, 0, 0, 0}, (float[]){0x1p20f, 0, 0, 0}) == 0);
    CHECK(dot(0, (float[]){0x1p-70f, 0, 0, 0}, (float[]){0x1p-60f, 0, 0, 0}) == 0);
    CHECK(dot(0x1p-130f, (float[]){0, 0, 0, 0}, (float[]){0, 0, 0, 0}) == 0);
    CHECK(dot(0, (float[]){0x1p-63f, 0, 0, 0}, (float[]){0x1p-63f, 0, 0, 0}) == 0x1p-126f);
    CHECK(isnan(dot(0, (float[]){INFINITY, 0, 0, 0}, (float[]){0, 0, 0, 0})));
}

static void unconfigured(void) { __asm__ volatile("tilezero %tmm0"); }
static void released(void) {
    configure(&small);
    __asm__ volatile("tilerelease");
    __asm__ volatile("tilezero %tmm0");
}
static void missing_register(void) {
    configure(&small);
    __asm__ volatile("tilezero %tmm3");
}
static void misfit(void) { /* A of two pairs, B of one */
    config c = small;
    c.rows[2] = 1;
    configure(&c);
    __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
}
static void same_register(void) {
    configure(&small);
    __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1"); /* no assembler takes it otherwise */
}
static void too_many_rows(void) {
    config c = small;
    c.rows[0] = 17;
    configure(&c);
}
static void unknown_palette(void) {
    config c = small;
    c.palette = 2;
    configure(&c);
}
static void another_instruction(void) { __asm__ volatile("ud2"); }

/* The processor would trap, and so does the emulator. */
static void traps(void (*what)(void)) {
    int status = 0;
    fflush(NULL);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* not a sanitizer's */
        what();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status)); /* SIGILL, or on AMX itself for a bad configuration SIGSEGV */
}

int main(void) {
    rf_cpu *cpu = NULL;
    signal(SIGILL, SIG_DFL); /* not a sanitizer's */
    if (!rf_cpu_isa_available("amx")) return NOT_HERE;
    CHECK(rf_cpu_create("amx", 1, &cpu) == RF_OK);
    rounding();
    void (*const wrong[])(void) = {unconfigured,    released,           missing_register,
                                   misfit,          same_register,      too_many_rows,
                                   unknown_palette, another_instruction};
    for (size_t i = 0; i < COUNT(wrong); i++) traps(wrong[i]);

    if (rf_emulated_amx_products == 0) return 0; /* AMX itself: nobody counts */
    /* 4 tokens x 4 heads are 16 rows. Scores: 4 x 1 tiles, summed over 2; values: 1 x 4 over 2. */
    CHECK(products(cpu, RF_BF16, RF_BF16, 4) == 16);
    CHECK(products(cpu, RF_BF16, RF_BF16, 16) == 64);
    CHECK(products(cpu, RF_BF16, RF_I8, 4) == 16);
    CHECK(products(cpu, RF_BF16, RF_E4M3FN, 4) == 16);
    CHECK(products(cpu, RF_BF16, RF_E4M3FNUZ, 4) == 16);
    CHECK(products(cpu, RF_BF16, RF_BF16, 2) == 0); /* few rows: vectors */
    CHECK(products(cpu, RF_F32, RF_F32, 4) == 0);
    CHECK(products(cpu, RF_F32, RF_I8, 4) == 0);
    CHECK(products(cpu, RF_F16, RF_F16, 4) == 0);
    rf_cpu_destroy(cpu);
    return 0;
}
