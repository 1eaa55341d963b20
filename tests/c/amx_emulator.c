/* AMX on processors without it: its instructions trap, and the handler does what they would have
 * done. So the tests run the kernels as they are released, to the bits of each instruction.
 *
 * By the pseudocode of Intel's Software Developer's Manual, volume 2 (LDTILECFG, TILELOADD,
 * TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS) and 1, chapter 18. What the processor would refuse
 * (registers without a configuration, tiles that do not fit each other) is refused here, too: the
 * trap stays an illegal instruction. A trap takes microseconds, the instruction 16 cycles. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Of each thread, as the registers are. */
static _Thread_local tile_config config;
static _Thread_local uint8_t tiles[TILES][ROWS][ROW_BYTES];

static struct sigaction previous;
long rf_emulated_amx_products; /* to see that they are used at all */

int rf_emulate_amx(void);

static int configured(int tile) { return config.palette == 1 && tile < TILES && config.rows[tile]; }

static int load_config(const void *from) {
    tile_config c;
    memcpy(&c, from, sizeof c);
    for (int i = 0; i < 14; i++)
        if (c.reserved[i]) return 0;
    if (c.palette > 1 || c.start_row) return 0;
    for (int i = 0; i < 16; i++) {
        const int used = c.rows[i] || c.row_bytes[i];
        if (used && (i >= TILES || !c.rows[i] || !c.row_bytes[i])) return 0;
        if (c.rows[i] > ROWS || c.row_bytes[i] > ROW_BYTES) return 0;
    }
    if (c.palette == 0) memset(&c, 0, sizeof c);
    config = c;
    memset(tiles, 0, sizeof tiles);
    return 1;
}

static int load(int t, const char *from, int64_t stride) {
    if (!configured(t)) return 0;
    uint8_t read[ROWS][ROW_BYTES] = {{0}};
    for (int r = 0; r < config.rows[t]; r++)
        memcpy(read[r], from + r * stride, config.row_bytes[t]);
    memcpy(tiles[t], read, sizeof read);
    return 1;
}

static int store(int t, char *to, int64_t stride) {
    if (!configured(t)) return 0;
    for (int r = 0; r < config.rows[t]; r++)
        memcpy(to + r * stride, tiles[t][r], config.row_bytes[t]);
    return 1;
}

static float wide(uint32_t half) { /* a bfloat16 in the upper bits */
    float x;
    memcpy(&x, &half, sizeof x);
    return x;
}

/* The sums of even and of odd elements apart, each by fused steps, then added, then added to C. */
__attribute__((noinline)) static void dot(int c, int a, int b) {
    const int columns = config.row_bytes[c] / 4;
    float even_b[ROWS][16], odd_b[ROWS][16];
    for (int k = 0; k < ROWS; k++)
        for (int n = 0; n < 16; n++) {
            uint32_t pair;
            memcpy(&pair, tiles[b][k] + 4 * n, sizeof pair);
            even_b[k][n] = wide(pair << 16);
            odd_b[k][n] = wide(pair & 0xffff0000u);
        }
    for (int m = 0; m < config.rows[c]; m++) {
        float even[16] = {0}, odd[16] = {0}, sum[16];
        for (int k = 0; k < config.row_bytes[a] / 4; k++) {
            uint32_t pair;
            memcpy(&pair, tiles[a][m] + 4 * k, sizeof pair);
            const float even_a = wide(pair << 16), odd_a = wide(pair & 0xffff0000u);
            for (int n = 0; n < 16; n++) {
                even[n] = __builtin_fmaf(even_a, even_b[k][n], even[n]);
                odd[n] = __builtin_fmaf(odd_a, odd_b[k][n], odd[n]);
            }
        }
        memcpy(sum, tiles[c][m], sizeof sum);
        for (int n = 0; n < 16; n++) sum[n] += even[n] + odd[n];
        memset(tiles[c][m], 0, ROW_BYTES);
        memcpy(tiles[c][m], sum, (size_t)columns * 4);
    }
    for (int m = config.rows[c]; m < ROWS; m++) memset(tiles[c][m], 0, ROW_BYTES);
}

static int multiply(int c, int a, int b) {
    if (!configured(a) || !configured(b) || !configured(c) || a == b || b == c || a == c) return 0;
    if (config.rows[a] != config.rows[c] || config.row_bytes[b] != config.row_bytes[c]) return 0;
    if (config.row_bytes[a] / 4 != config.rows[b]) return 0;
    if (config.row_bytes[a] % 4 || config.row_bytes[b] % 4) return 0;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9fc0); /* rounds to nearest even, denormals are zero, nothing traps */
    dot(c, a, b);
    _mm_setcsr(before);
    __atomic_add_fetch(&rf_emulated_amx_products, 1, __ATOMIC_RELAXED);
    return 1;
}

/* A VEX instruction of three bytes of prefix, opcode, ModRM and what that has behind it. */
typedef struct instruction {
    int prefix; /* 0: none, 1: 66, 2: F3, 3: F2 */
    int opcode;
    int mod, reg, rm, other; /* other: the register in the prefix */
    char *base;              /* of memory: all but the index */
    int64_t index;           /* times its scale */
    int indexed;
    int64_t length;
} instruction;

static int decode(const uint8_t *at, const greg_t *registers, instruction *i) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return 0; /* the map 0F 38 */
    if (at[2] & 0x84) return 0;                         /* W, L */
    const int r = ~at[1] >> 4 & 8, x = ~at[1] >> 3 & 8, b = ~at[1] >> 2 & 8;
    *i = (instruction){.prefix = at[2] & 3, .opcode = at[3], .mod = at[4] >> 6, .length = 5};
    i->other = ~(at[2] >> 3) & 15;
    i->reg = (at[4] >> 3 & 7) | r;
    i->rm = (at[4] & 7) | b;
    if (i->mod == 3) return 1;
    int64_t base = 0, displacement = 0;
    int base_register = i->rm, wide_displacement = i->mod == 2;
    if ((at[4] & 7) == 4) {
        const int sib = at[i->length++], index = (sib >> 3 & 7) | x;
        base_register = (sib & 7) | b;
        if (index != 4) i->index = (int64_t)((uint64_t)registers[order[index]] << (sib >> 6));
        i->indexed = 1;
    }
    if (i->mod == 0 && (base_register & 7) == 5) {
        wide_displacement = 1;
        if (!i->indexed) base = registers[REG_RIP] + i->length + 4;
    } else base = registers[order[base_register]];
    if (wide_displacement) {
        int32_t d;
        memcpy(&d, at + i->length, sizeof d);
        displacement = d;
        i->length += 4;
    } else if (i->mod == 1) displacement = (int8_t)at[i->length++];
    i->base = (char *)(uintptr_t)(base + displacement);
    return 1;
}

static int execute(const instruction *i) {
    const int memory = i->mod != 3;
    switch (i->opcode << 4 | i->prefix) {
    case 0x490: /* LDTILECFG, TILERELEASE */
        if (memory && i->reg == 0) return load_config(i->base + i->index);
        if (memory || i->reg || i->rm) return 0;
        memset(&config, 0, sizeof config);
        memset(tiles, 0, sizeof tiles);
        return 1;
    case 0x493: /* TILEZERO */
        if (memory || !configured(i->reg)) return 0;
        memset(tiles[i->reg], 0, sizeof tiles[i->reg]);
        return 1;
    case 0x4b3: return i->indexed && load(i->reg, i->base, i->index);
    case 0x4b2: return i->indexed && store(i->reg, i->base, i->index);
    case 0x5c2: return !memory && multiply(i->reg, i->rm, i->other);
    default: return 0;
    }
}

static void on_illegal_instruction(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    instruction i;
    (void)number, (void)info;
    if (decode((const uint8_t *)(uintptr_t)registers[REG_RIP], registers, &i) && execute(&i))
        registers[REG_RIP] += i.length;
    else sigaction(SIGILL, &previous, NULL); /* traps again, and is another's */
}

/* 1 when the handler is in place. Others may have put theirs in its place since: ask again. */
int rf_emulate_amx(void) {
    struct sigaction now, ours = {.sa_flags = SA_SIGINFO};
    ours.sa_sigaction = on_illegal_instruction;
    sigemptyset(&ours.sa_mask);
    if (sigaction(SIGILL, NULL, &now) != 0) return 0;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_illegal_instruction) return 1;
    previous = now;
    return sigaction(SIGILL, &ours, NULL) == 0;
}
