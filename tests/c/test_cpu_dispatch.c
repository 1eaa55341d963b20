/* dispatch.c on processors and kernels that are not here: which variant each of them gets. */
#define _GNU_SOURCE
#include "check.h"

/* What the processor has, and what its kernel says when it is asked. */
static unsigned has;
static int permits, requests;
enum { AVX2 = 7, AVX512 = 127, BF16 = 511, AMX_TILE = 1 << 9, AMX_BF16 = 1 << 10, AMX = 2047 };

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_intel;

/* In the order of the bits. */
static const char *const features[] = {"avx2",     "fma",        "f16c",
                                       "avx512f",  "avx512bw",   "avx512dq",
                                       "avx512vl", "avx512bf16", "avx512vbmi"};

static int fake_supports(const char *name) {
    for (unsigned i = 0; i < COUNT(features); i++)
        if (strcmp(features[i], name) == 0) return has >> i & 1;
    CHECK(!"a feature that the test does not know");
    return 0;
}
static int fake_is(const char *name) {
    CHECK(strcmp(name, "intel") == 0);
    return is_intel;
}
static int fake_cpuid(unsigned leaf, unsigned sub, unsigned *a, unsigned *b, unsigned *c,
                      unsigned *d) {
    CHECK(leaf == 7 && sub == 0);
    *a = *b = *c = ~0u;
    *d = (has & AMX_TILE ? 1u << 24 : 0) | (has & AMX_BF16 ? 1u << 22 : 0);
    return 1;
}
static long fake_syscall(long number, int code, int feature) {
    CHECK(number == SYS_arch_prctl && code == 0x1023 && feature == 18);
    requests++;
    return permits ? 0 : -1;
}
#define __builtin_cpu_supports fake_supports
#define __builtin_cpu_is       fake_is
#define __get_cpuid_count      fake_cpuid
#define syscall                fake_syscall
#endif
#include "dispatch.c"

static void expect(unsigned processor, int permission, const char *best, int asked) {
    has = processor;
    permits = permission;
    requests = 0;
    const rf_variant *k = rf_find_variant(NULL);
    CHECK(k && strcmp(k->name, best) == 0);
    CHECK(requests == asked); /* of the kernel: nothing, unless the processor has AMX */
    CHECK(rf_find_variant(best) == k);
    CHECK(rf_cpu_isa_available("portable"));
    CHECK(!rf_cpu_isa_available("mmx"));
}

int main(void) {
    expect(0, 1, "portable", 0);
#if defined(__x86_64__)
    expect(AVX2, 1, "avx2", 0);
    expect(AVX512, 1, "avx512", 0);
    expect(BF16, 1, "avx512bf16", 0);
    expect(BF16 | AMX_TILE, 1, "avx512bf16", 0);
    expect(BF16 | AMX_BF16, 1, "avx512bf16", 0);
    expect(AMX, 1, "amx", 1);
    /* refused: the next best, and not by name either */
    expect(AMX, 0, "avx512bf16", 1);
    CHECK(!rf_cpu_isa_available("amx"));
    for (unsigned i = 0; i < 11; i++) { /* nothing but AVX is asked for less than all of it */
        expect(AMX & ~(1u << i), 1,
               i < 3   ? "portable"
               : i < 7 ? "avx2"
               : i < 9 ? "avx512"
                       : "avx512bf16",
               0);
        CHECK(!rf_cpu_isa_available("amx"));
    }
    /* where dot products are slow, by name alone */
    is_intel = 1;
    expect(AMX, 0, "avx512", 1);
    expect(BF16, 1, "avx512", 0);
    CHECK(rf_cpu_isa_available("avx512bf16"));
    expect(AMX, 1, "amx", 1);
#endif
    for (int i = 0; rf_cpu_isa_name(i); i++) CHECK(rf_cpu_isa_available(rf_cpu_isa_name(i)));
    CHECK(rf_cpu_isa_name(-1) == NULL);
    return 0;
}
