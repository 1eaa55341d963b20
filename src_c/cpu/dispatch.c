#include "cpu.h"

#include <string.h>

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
#endif

/* Best first. */
static const rf_variant variants[] = {
#if defined(__x86_64__)
    {&rf_kernels_avx512bf16, has_avx512bf16},
    {&rf_kernels_avx512, has_avx512},
    {&rf_kernels_avx2, has_avx2},
#endif
    {&rf_kernels_portable, always},
};
#define NUM_VARIANTS ((int)(sizeof variants / sizeof variants[0]))

const char *rf_cpu_isa_name(int i) {
    return i >= 0 && i < NUM_VARIANTS ? variants[i].kernels->name : NULL;
}

int rf_cpu_isa_available(const char *isa) { return rf_find_kernels(isa) != NULL; }

const rf_kernels *rf_find_kernels(const char *isa) {
    for (int i = 0; i < NUM_VARIANTS; i++) {
        if (isa && strcmp(isa, variants[i].kernels->name) != 0) continue;
        if (variants[i].available()) return variants[i].kernels;
        if (isa) return NULL;
    }
    return NULL;
}
