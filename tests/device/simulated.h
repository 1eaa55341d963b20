/* The simulated device's half of src_c/hip/device.h: a lane is a fiber on the CPU, and what a wave
 * or a workgroup does together goes through the stand-in runtime (machine.h). */
#ifndef RF_TEST_SIMULATED_H
#define RF_TEST_SIMULATED_H

#include <cmath>
#include <cstring>

#include "lane.h"

#ifndef RF_SIMULATED_WAVE
#error "RF_SIMULATED_WAVE: 32 or 64"
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

template <class T> RF_DEVICE T load(const void *p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
template <class T> RF_DEVICE void store(void *p, T x) { std::memcpy(p, &x, sizeof x); }

template <int MASK> RF_DEVICE int shuffle_xor_bits(int x) { return rf_sim->exchange(x, MASK); }
RF_DEVICE bool any(bool x) { return rf_sim->any(x); }

RF_DEVICE float bits_to_float(unsigned x) { return load<float>(&x); }
RF_DEVICE unsigned float_to_bits(float x) { return load<unsigned>(&x); }
RF_DEVICE float exp2(float x) { return std::exp2(x); }
RF_DEVICE float log2(float x) { return std::log2(x); }
RF_DEVICE float round_even(float x) { return std::nearbyint(x); }
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

} // namespace rf

#endif
