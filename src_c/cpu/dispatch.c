#define _GNU_SOURCE /* syscall */
#include "cpu.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static int always(void) { return 1; }

#if defined(__x86_64__)
/* The builtin also asks whether the operating system saves the registers. */
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static int has_avx512bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi");
}
/* Intel's dot product of bfloat16 takes twice as long as a multiply-add: without its AMX a Xeon
 * does prefill by AVX-512 in 0.61 of the time, decode in 0.8 to 1, verification in as much. */
static int has_slow_dot(void) { return __builtin_cpu_is("intel"); }

/* AMX-TILE and AMX-BF16, which not every compiler's builtin knows. */
static int processor_has_amx(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1);
}
/* The 8 KiB of tile registers are for a process that asks, with all its threads and children. Linux
 * refuses before 5.16, and where a thread's signal stack has no room for them; sandboxes may. */
static int kernel_permits_amx(void) {
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
static int has_amx(void) { return has_avx512bf16() && processor_has_amx() && kernel_permits_amx(); }

#if defined(RF_EMULATE_AMX)
int rf_emulate_amx(void);
static int has_or_emulates_amx(void) {
    return processor_has_amx() ? has_amx() : has_avx512bf16() && rf_emulate_amx();
}
#endif
#endif

/* Those of the float types, and of bfloat16. */
#define CACHES(p) {&(p)[0], &(p)[1], &(p)[2], &(p)[3]}
#define WITH_BF16(name, ...)                                                                       \
    {[RF_F32] = CACHES(rf_products_##name[RF_F32]),                                                \
     [RF_F16] = CACHES(rf_products_##name[RF_F16]),                                                \
     [RF_BF16] = __VA_ARGS__}
#define PRODUCTS(name) WITH_BF16(name, CACHES(rf_products_##name[RF_BF16]))
#define BOTH(...)      __VA_ARGS__, __VA_ARGS__

/* Best first, but for those that are slow here. With few rows AMX gains nothing over AVX-512, and
 * processors that have AMX take twice as long for a dot product of bfloat16 as for a multiply-add;
 * over float8 caches those have tables, which need VBMI. */
#define AMX_FEW                                                                                    \
    {&rf_products_avx512[RF_BF16][0], &rf_products_float8[0], &rf_products_float8[1],              \
     &rf_products_avx512[RF_BF16][3]}
#define AMX_VARIANT                                                                                \
    "amx", &rf_kernels_avx512, WITH_BF16(avx512, AMX_FEW),                                         \
        WITH_BF16(avx512, CACHES(rf_products_amx)), .write_ahead = 4096
static const rf_variant variants[] = {
#if defined(__x86_64__)
#if defined(RF_EMULATE_AMX)
    {AMX_VARIANT, .available = has_or_emulates_amx, .is_slow = always},
#else
    {AMX_VARIANT, .available = has_amx},
#endif
    {"avx512bf16", &rf_kernels_avx512, BOTH(WITH_BF16(avx512, CACHES(rf_products_avx512bf16))),
     .available = has_avx512bf16, .is_slow = has_slow_dot},
    {"avx512", &rf_kernels_avx512, BOTH(PRODUCTS(avx512)), .available = has_avx512},
    {"avx2", &rf_kernels_avx2, BOTH(PRODUCTS(avx2)), .available = has_avx2},
#endif
    {"portable", &rf_kernels_portable, BOTH(PRODUCTS(portable)), .available = always},
};
#define NUM_VARIANTS ((int)(sizeof variants / sizeof variants[0]))

/* Variant i, best first: those that are slow here are last, for who asks by name. */
static const rf_variant *variant_at(int i) {
    for (int slow = 0; slow < 2; slow++)
        for (int j = 0; j < NUM_VARIANTS; j++)
            if ((variants[j].is_slow && variants[j].is_slow()) == slow && i-- == 0)
                return &variants[j];
    return NULL;
}

const char *rf_cpu_isa_name(int i) {
    const rf_variant *v = variant_at(i);
    return v ? v->name : NULL;
}

int rf_cpu_isa_available(const char *isa) { return rf_find_variant(isa) != NULL; }

const rf_variant *rf_find_variant(const char *isa) {
    const rf_variant *v;
    for (int i = 0; (v = variant_at(i)) != NULL; i++) {
        if (isa && strcmp(isa, v->name) != 0) continue;
        if (v->available()) return v;
        if (isa) return NULL;
    }
    return NULL;
}
