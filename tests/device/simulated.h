/* The simulated device's half of src_c/hip/device.h: a lane is a fiber on the CPU, and what a wave
 * or a workgroup does together goes through the stand-in runtime (machine.h). */
#ifndef RF_TEST_SIMULATED_H
#define RF_TEST_SIMULATED_H

#include <cmath>
#include <cstring>

#include "lane.h"

#if !defined(RF_SIMULATED_WAVE) || !defined(RF_SIMULATED_MATRIX)
#error "RF_SIMULATED_WAVE: 32 or 64; RF_SIMULATED_MATRIX: one of enum Matrix"
#endif

/* A "code object" is a shared library; its kernels are objects of this type, found by name. */
#define RF_KERNEL(name, Params)                                                                    \
    static void name##_of(const Params &p);                                                        \
    extern "C" __attribute__((visibility("default"))) const rf_sim_kernel name = {                 \
        sizeof(Params), [](const void *p) { name##_of(*static_cast<const Params *>(p)); }};        \
    static void name##_of(const Params &p)
#define RF_SHARED(Type, name) Type &name = *static_cast<Type *>(rf_sim->shared(sizeof(Type)))

extern "C" rf_sim_lane *rf_sim;

namespace rf {

#ifdef RF_MUTATE_WAVE /* a kernel that believes in another wave size */
constexpr int WAVE = RF_MUTATE_WAVE;
#else
constexpr int WAVE = RF_SIMULATED_WAVE;
#endif
#ifdef RF_SIMULATED_FEW_REGISTERS
constexpr bool FEW_REGISTERS = true;
#else
constexpr bool FEW_REGISTERS = false;
#endif
constexpr int HARDWARE_FP8 = -1;
template <bool HIGH> void fp8_pair(unsigned word, float *out);

template <class T> RF_DEVICE const T &fresh(const T &x) { return x; }
RF_DEVICE int group_x() { return rf_sim->group[0]; }
RF_DEVICE int group_y() { return rf_sim->group[1]; }
RF_DEVICE int group_z() { return rf_sim->group[2]; }
RF_DEVICE int thread() { return rf_sim->thread; }
RF_DEVICE int lane() { return thread() % WAVE; }
RF_DEVICE int wave() { return thread() / WAVE; }
RF_DEVICE void barrier() { rf_sim->barrier(); }
RF_DEVICE void wave_barrier() { rf_sim->exchange(0, 0); }
RF_DEVICE void release() { rf_sim->order->stored = false; }
RF_DEVICE void acquire() { rf_sim->order->stale = false; }
RF_DEVICE uint32_t fetch_add(uint32_t *p, uint32_t x) { return rf_sim->fetch_add(p, x); }

RF_DEVICE int uniform(int x) { return x; }
RF_DEVICE int opaque(int x) { return x; }
RF_DEVICE void keep_order() {}

template <class T> RF_DEVICE T load(const void *p) {
    T x;
    if (rf_sim->order->stale) rf_sim->too_early();
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class T> RF_DEVICE void store(void *p, T x) {
    rf_sim->order->stored = true;
    std::memcpy(p, &x, sizeof x);
}

template <class T> RF_DEVICE T uniform_load(const void *p) { return load<T>(p); }

template <int MASK> RF_DEVICE int shuffle_xor_bits(int x) { return rf_sim->exchange(x, MASK); }
RF_DEVICE bool any(bool x) { return rf_sim->any(x); }

RF_DEVICE float bits_to_float(unsigned x) { return load<float>(&x); }
RF_DEVICE unsigned float_to_bits(float x) { return load<unsigned>(&x); }
RF_DEVICE float exp2(float x) { return std::exp2(x); }
RF_DEVICE float log2(float x) { return std::log2(x); }
RF_DEVICE float round_even(float x) { return std::nearbyint(x); }
RF_DEVICE float larger(float a, float b) { return std::fmax(a, b); }
RF_DEVICE float half_to_float(unsigned x) {
    unsigned sign = (x & 0x8000) << 16, magnitude = x & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    float y = bits_to_float(magnitude << 13) * 0x1p112f;
    return bits_to_float(sign | float_to_bits(y));
}
RF_DEVICE unsigned float_to_half(float x) {
    unsigned bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude < 0x38800000) { /* subnormal: adding 1/2 rounds to multiples of 2^-24 */
        float y = bits_to_float(magnitude) + 0.5f;
        return sign | (float_to_bits(y) - 0x3f000000);
    }
    unsigned rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
    return sign | (rounded >= 0x0f800000 ? 0x7c00 : rounded >> 13);
}

/* Dot products of two: what the manuals of the instruction sets say of V_DOT2_F32_F16 and
 * V_DOT2_F32_BF16. */
#ifndef RF_SIMULATED_PAIRS
#define RF_SIMULATED_PAIRS true
#endif
template <int DTYPE> constexpr bool PAIRED = DTYPE != RF_F32 && (RF_SIMULATED_PAIRS);
template <int DTYPE> RF_DEVICE float half_element(unsigned bits) {
    return DTYPE == RF_F16 ? half_to_float(bits & 0xffff) : bits_to_float(bits << 16);
}
template <int DTYPE> RF_DEVICE float add_pair(unsigned a, unsigned b, float c) {
    c += half_element<DTYPE>(a) * half_element<DTYPE>(b);
    return c + half_element<DTYPE>(a >> 16) * half_element<DTYPE>(b >> 16);
}

/* Matrix instructions by their documented layouts ("AMD Instinct MI300" and "RDNA3", "RDNA4"
 * Instruction Set Architecture, matrix chapters; AMD's matrix instruction calculator): which lane
 * has element k of row i of A, or of column i of B, at which place; and sum (row, column). */
constexpr int MATRIX = RF_SIMULATED_MATRIX;
#ifdef RF_SIMULATED_FLUSHES
constexpr bool FLUSHES = true;
#else
constexpr bool FLUSHES = false;
#endif
constexpr int MATRIX_DEPTH = MATRIX == MFMA_32 ? 32 : 16;
RF_DEVICE int operand_lane(int i, int k) {
    if (MATRIX == MFMA_16) return i + 16 * (k / 4);
    if (MATRIX == WMMA_WHOLE) return i; /* and i + 16 */
    return i + 16 * (k / 8);
}
RF_DEVICE int operand_place(int k) {
    return MATRIX == MFMA_16 ? k % 4 : MATRIX == WMMA_WHOLE ? k : k % 8;
}
RF_DEVICE int sum_row(int lane, int place) {
    if (MATRIX == WMMA_WHOLE) return 2 * place + lane / 16;
    return (MATRIX == WMMA_HALVES ? 8 : 4) * (lane / 16) + place;
}
template <int DTYPE> RF_DEVICE float operand_element(const unsigned *words, int i, int k) {
    unsigned w = words[16 * operand_lane(i, k) + operand_place(k) / 2];
    unsigned bits = operand_place(k) % 2 ? w >> 16 : w & 0xffff;
    if (FLUSHES && (bits & (DTYPE == RF_F16 ? 0x7c00 : 0x7f80)) == 0) return 0;
    return DTYPE == RF_F16 ? half_to_float(bits) : bits_to_float(bits << 16);
}
template <int DTYPE> RF_DEVICE void multiply(const unsigned *a, const unsigned *b, float *c) {
    constexpr int words = MATRIX == MFMA_16 ? 2 : MATRIX == WMMA_WHOLE ? 8 : 4;
    constexpr int sums = MATRIX == MFMA_16 || MATRIX == MFMA_32 ? 4 : 8;
    unsigned mine[2 * words];
    std::memcpy(mine, a, sizeof(unsigned) * words);
    std::memcpy(mine + words, b, sizeof(unsigned) * words);
    const unsigned *all = rf_sim->publish(mine, 2 * words);
    if (MATRIX == WMMA_WHOLE) /* the hardware wants both halves of the wave to agree */
        for (int i = 0; i < 2 * words; i++)
            if (all[16 * lane() + i] != all[16 * (lane() ^ 16) + i])
                c[0] = bits_to_float(0x7fc00000);
    float column[MATRIX_DEPTH];
    for (int k = 0; k < MATRIX_DEPTH; k++)
        column[k] = operand_element<DTYPE>(all + words, lane() % 16, k);
    for (int place = 0; place < sums; place++)
        for (int k = 0; k < MATRIX_DEPTH; k++)
            c[place] += operand_element<DTYPE>(all, sum_row(lane(), place), k) * column[k];
}

} // namespace rf

#endif
