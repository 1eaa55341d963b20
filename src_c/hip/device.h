/* The one place that knows what a kernel runs on: an AMD GPU (compiled with no HIP header and no
 * device library), the simulated device of the tests, or CUDA. Kernels use what is declared here
 * and have no #ifdef of their own.
 *
 *   RF_KERNEL(name, Params) { ... p ... }   a kernel of RF_WAVES waves; its arguments are `p`
 *   RF_SHARED(Type, name)                   LDS of the workgroup, not initialised
 *   fresh(p)                                the arguments, read again instead of kept in registers
 *   group_x() group_y() group_z()           index of the workgroup
 *   lane(), wave()                          index in the wave, index of the wave (uniform)
 *   barrier()                               of the workgroup, LDS included
 *   wave_barrier()                          of the wave: what its lanes read before is read
 *   release()                               what the wave has stored, the whole device sees before
 *   acquire()                               what it stores next; the wave sees what others released
 *   fetch_add(p, x)                         *p, to which x is added at once; releases, too
 *   shuffle_xor<mask>(x), any(x)            all lanes of the wave must take part
 *   load<T>(p), store(p, x)                 any alignment of the element's own or better
 *   exp2, log2, half_to_float ...           the hardware's
 *   larger(x, y)                            of two floats; that of a number and a NaN is the number
 *   uniform(x)                              x, which is the same in all lanes
 *   uniform_load<T>(p)                      *p, which nobody writes meanwhile; p likewise
 *   halves<high>(a, b)                      the low or the high 16 bits of a, then those of b
 *   add_halves(a, b), multiply_halves(a, b) two float16 each
 *   PAIRED<dtype>, add_pair<dtype>(a, b, c) whether the chip multiplies pairs of that 16-bit type;
 *                                           c + a's low half * b's + a's high half * b's
 *   opaque(x)                               x, of which the compiler does not know that it is
 *   keep_order()                            the compiler moves no instruction across
 *   MATRIX, multiply<dtype>(a, b, c)        the chip's matrix unit (matrix.h); c += a * b
 *   FLUSHES                                 whether it takes subnormal numbers for 0
 *   FEW_REGISTERS                           whether a lane has 256 vector registers, not 512 or
 *                                           more: kernels keep to 128, so that there are two waves
 *   HARDWARE_FP8, fp8_pair<high>(word, out) the float8 encoding that the chip itself converts to
 *                                           float, two of a word's four bytes at once; -1: neither
 */
#ifndef RF_HIP_DEVICE_H
#define RF_HIP_DEVICE_H

#if defined(__HIP__) && (defined(__AMDGCN__) || defined(__HIP_DEVICE_COMPILE__))
#define RF_AMD 1
#elif defined(__CUDACC__)
#define RF_CUDA 1
#endif

#if defined(RF_AMD)
#define RF_DEVICE_MEMBER inline __attribute__((device, always_inline))
#define RF_UNROLL        _Pragma("unroll")
#elif defined(RF_CUDA)
#define RF_DEVICE_MEMBER __device__ __forceinline__
#define RF_UNROLL        _Pragma("unroll")
#else
#define RF_DEVICE_MEMBER inline
#define RF_UNROLL
#endif
#define RF_DEVICE static RF_DEVICE_MEMBER
#define RF_INLINE RF_DEVICE

#include "rf/hip.h"

namespace rf {

/* Matrix units, by what a lane has of an operand and of the sums. */
enum Matrix {
    NO_MATRIX,
    MFMA_16,    /* gfx90a, gfx942: 16x16x16 */
    MFMA_32,    /* gfx950: 16x16x32 */
    WMMA_WHOLE, /* gfx11: 16x16x16, both halves of a wave give the same operands */
    WMMA_HALVES /* gfx12: 16x16x16 */
};

#if defined(RF_AMD) /* ------------------------------------------------------------ AMD */

#if defined(__GFX9__)
constexpr int WAVE = 64;
#elif defined(__GFX10__) || defined(__GFX11__) || defined(__GFX12__)
constexpr int WAVE = 32;
#else
#error "the wave size of this architecture is not known here"
#endif

/* The arguments are read where they lie, not copied: most of them are needed only at times. */
#define RF_KERNEL(name, Params)                                                                    \
    RF_DEVICE void name##_of(const Params &p);                                                     \
    extern "C" __attribute__((global, visibility("protected"), RF_THREADS)) void name(             \
        const Params) {                                                                            \
        name##_of(                                                                                 \
            *(const Params *)(rf::Constant<Params> *)__builtin_amdgcn_kernarg_segment_ptr());      \
    }                                                                                              \
    RF_DEVICE void name##_of(const Params &p)
/* gfx900, gfx906, gfx908 and what serves them; from gfx90a on there are 512. */
#if defined(__GFX9__) && !defined(__gfx90a__) && !defined(__gfx942__) && !defined(__gfx950__) &&   \
    !defined(__gfx9_4_generic__)
constexpr bool FEW_REGISTERS = true;
#define RF_WAVES_A_SIMD , amdgpu_waves_per_eu(2) /* or a few kernels take 130 */
#else
constexpr bool FEW_REGISTERS = false;
#define RF_WAVES_A_SIMD
#endif
#define RF_THREADS                                                                                 \
    amdgpu_flat_work_group_size(rf::WAVE *RF_WAVES, rf::WAVE *RF_WAVES) RF_WAVES_A_SIMD
template <class T> using Constant = const __attribute__((address_space(4))) T;
/* The same arguments, read again: what is needed at times only must not fill scalar registers. */
template <class T> RF_DEVICE const T &fresh(const T &x) {
    Constant<T> *p = (Constant<T> *)&x;
    asm volatile("" : "+s"(p));
    return *(const T *)p;
}
#define RF_SHARED(Type, name) static __attribute__((shared)) Type name

RF_DEVICE int group_x() { return (int)__builtin_amdgcn_workgroup_id_x(); }
RF_DEVICE int group_y() { return (int)__builtin_amdgcn_workgroup_id_y(); }
RF_DEVICE int group_z() { return (int)__builtin_amdgcn_workgroup_id_z(); }
RF_DEVICE int thread() { return (int)__builtin_amdgcn_workitem_id_x(); }
RF_DEVICE int lane() { return thread() & (WAVE - 1); }
RF_DEVICE int wave() { return __builtin_amdgcn_readfirstlane(thread() / WAVE); }
RF_DEVICE void barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
RF_DEVICE void wave_barrier() { __builtin_amdgcn_wave_barrier(); }
RF_DEVICE void release() { __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent"); }
RF_DEVICE void acquire() { __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent"); }
RF_DEVICE uint32_t fetch_add(uint32_t *p, uint32_t x) {
    typedef __attribute__((address_space(1))) uint32_t *Global;
    return __hip_atomic_fetch_add((Global)p, x, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_AGENT);
}

/* The pointers of an argument struct are global ones, which clang does not always find out. The
 * words may lie at any address: the hardware asks for no alignment. */
template <int SIZE> struct Word;
template <> struct Word<1> {
    typedef unsigned char type;
};
template <> struct Word<2> {
    typedef unsigned short type __attribute__((aligned(1)));
};
template <> struct Word<4> {
    typedef unsigned type __attribute__((aligned(1)));
};
template <> struct Word<8> {
    typedef unsigned type __attribute__((ext_vector_type(2), aligned(1)));
};
template <> struct Word<16> {
    typedef unsigned type __attribute__((ext_vector_type(4), aligned(1)));
};
template <class T> RF_DEVICE T load(const void *p) {
    typedef const __attribute__((address_space(1))) typename Word<sizeof(T)>::type *Global;
    return __builtin_bit_cast(T, *(Global)p);
}
template <class T> RF_DEVICE void store(void *p, T x) {
    typedef __attribute__((address_space(1))) typename Word<sizeof(T)>::type *Global;
    *(Global)p = __builtin_bit_cast(typename Word<sizeof(T)>::type, x);
}

/* Within 16 lanes without LDS: permuted quads, a mirrored half row, a rotated row. */
template <int CONTROL> RF_DEVICE int row_move(int x) {
    return __builtin_amdgcn_mov_dpp(x, CONTROL, 0xf, 0xf, true);
}
#if !defined(__GFX9__)
/* clang 19 may sink a permlanex16 and what its source is made of into a branch that some lanes do
 * not take, and it would read the old registers of those. The empty statement keeps it here. (Found
 * by running the gfx1100 object on an emulator; no simulation of the source can show it.) */
RF_DEVICE int other_row(int x) {
    unsigned y =
        __builtin_amdgcn_permlanex16((unsigned)x, (unsigned)x, 0x76543210, 0xfedcba98, true, true);
    asm volatile("" : "+v"(y));
    return (int)y;
}
#endif
template <int MASK> RF_DEVICE int shuffle_xor_bits(int x) {
    if constexpr (MASK == 1) return row_move<0xb1>(x);
    else if constexpr (MASK == 2) return row_move<0x4e>(x);
    else if constexpr (MASK == 4) return row_move<0x141>(row_move<0x1b>(x)); /* ^ 7 after ^ 3 */
    else if constexpr (MASK == 8) return row_move<0x128>(x);
#if !defined(__GFX9__)
    else if constexpr (MASK == 16) return other_row(x);
#endif
    else return __builtin_amdgcn_ds_bpermute((lane() ^ MASK) << 2, x);
}

/* What clang 15, the hipcc of Debian 12, calls otherwise. */
#if __has_builtin(__builtin_amdgcn_ballot_w64)
RF_DEVICE bool any(bool x) {
    if constexpr (WAVE == 64) return __builtin_amdgcn_ballot_w64(x) != 0;
    else return __builtin_amdgcn_ballot_w32(x) != 0;
}
RF_DEVICE float exp2(float x) { return __builtin_amdgcn_exp2f(x); }
RF_DEVICE float log2(float x) { return __builtin_amdgcn_logf(x); }
#else
RF_DEVICE bool any(bool x) { return __builtin_amdgcn_uicmp((unsigned)x, 0u, 33) != 0; } /* ne */
RF_DEVICE float exp2(float x) { return __builtin_exp2f(x); }
RF_DEVICE float log2(float x) { return __builtin_log2f(x); }
#endif

RF_DEVICE float bits_to_float(unsigned x) { return __builtin_bit_cast(float, x); }
RF_DEVICE unsigned float_to_bits(float x) { return __builtin_bit_cast(unsigned, x); }
RF_DEVICE float round_even(float x) { return __builtin_rintf(x); }
RF_DEVICE float larger(float a, float b) { return __builtin_fmaxf(a, b); }
RF_DEVICE float half_to_float(unsigned x) {
    return (float)__builtin_bit_cast(_Float16, (unsigned short)x);
}
RF_DEVICE unsigned float_to_half(float x) {
    return __builtin_bit_cast(unsigned short, (_Float16)x);
}

#if defined(__gfx942__)
constexpr int HARDWARE_FP8 = RF_E4M3FNUZ;
/* clang 19 encodes gfx12's conversion with registers from v128 on in its short form, which cannot
 * name them: it would read the upper half of others. clang 22 does not; those between were not
 * seen. (Found by running the gfx1201 object on an emulator.) */
#elif defined(__gfx950__) || (defined(__GFX12__) && __clang_major__ >= 22)
constexpr int HARDWARE_FP8 = RF_E4M3FN;
#else
constexpr int HARDWARE_FP8 = -1;
#endif
#if defined(__gfx942__) || defined(__gfx950__) || defined(__GFX12__)
template <bool HIGH> RF_DEVICE void fp8_pair(unsigned word, float *out) {
    auto pair = __builtin_amdgcn_cvt_pk_f32_fp8((int)word, HIGH);
    out[0] = pair[0];
    out[1] = pair[1];
}
#else
template <bool HIGH> __attribute__((device)) void fp8_pair(unsigned word, float *out);
#endif

RF_DEVICE int uniform(int x) { return __builtin_amdgcn_readfirstlane(x); }
template <class T> RF_DEVICE T uniform_load(const void *p) {
    uint64_t at = (uint64_t)p;
    uint64_t low = (unsigned)__builtin_amdgcn_readfirstlane((int)at);
    uint64_t high = (unsigned)__builtin_amdgcn_readfirstlane((int)(at >> 32));
    return *(Constant<T> *)(high << 32 | low);
}
RF_DEVICE int opaque(int x) {
    asm volatile("" : "+v"(x));
    return x;
}
RF_DEVICE void keep_order() { __builtin_amdgcn_sched_barrier(0); }
template <bool HIGH> RF_DEVICE unsigned halves(unsigned a, unsigned b) {
    return __builtin_amdgcn_perm(b, a, HIGH ? 0x07060302 : 0x05040100);
}
RF_DEVICE unsigned add_halves(unsigned a, unsigned b) {
    typedef _Float16 Two __attribute__((ext_vector_type(2)));
    return __builtin_bit_cast(unsigned, __builtin_bit_cast(Two, a) + __builtin_bit_cast(Two, b));
}
RF_DEVICE unsigned multiply_halves(unsigned a, unsigned b) {
    typedef _Float16 Two __attribute__((ext_vector_type(2)));
    return __builtin_bit_cast(unsigned, __builtin_bit_cast(Two, a) * __builtin_bit_cast(Two, b));
}

/* Dot products of two, v_dot2_f32_f16 and v_dot2_f32_bf16: products are exact, sums are float32,
 * rounded once or twice; float32 subnormals are flushed, and bfloat16's. float16's count, except on
 * gfx90a, whose unit takes them for 0 (AMD, "MI200 MFMA behavior specifics"): not used there, since
 * the smallest float8 elements become such. gfx9-generic has chips without the instruction. */
#if defined(__gfx1030__) || defined(__gfx1031__) || defined(__gfx1032__) ||                        \
    defined(__gfx1033__) || defined(__gfx1034__) || defined(__gfx1035__) ||                        \
    defined(__gfx1036__) || defined(__gfx10_3_generic__)
#define RF_GFX10_3 1
#endif
#if defined(__gfx942__) || defined(__gfx950__) || defined(RF_GFX10_3) || defined(__GFX11__) ||     \
    defined(__GFX12__)
#define RF_DOT2_F16 1
#endif
#if defined(__gfx950__) || defined(__GFX11__) || defined(__GFX12__)
#define RF_DOT2_BF16 1
#endif
template <int DTYPE> constexpr bool PAIRED = false;
#if defined(RF_DOT2_F16)
template <> constexpr bool PAIRED<RF_F16> = true;
#endif
#if defined(RF_DOT2_BF16)
template <> constexpr bool PAIRED<RF_BF16> = true;
#endif
template <int DTYPE> RF_DEVICE float add_pair(unsigned a, unsigned b, float c) {
#if defined(RF_DOT2_F16)
    typedef _Float16 Two __attribute__((ext_vector_type(2)));
    if constexpr (DTYPE == RF_F16)
        return __builtin_amdgcn_fdot2(__builtin_bit_cast(Two, a), __builtin_bit_cast(Two, b), c,
                                      false);
#endif
#if defined(RF_DOT2_BF16)
    typedef short Both __attribute__((ext_vector_type(2)));
    if constexpr (DTYPE == RF_BF16)
        return __builtin_amdgcn_fdot2_f32_bf16(__builtin_bit_cast(Both, a),
                                               __builtin_bit_cast(Both, b), c, false);
#endif
    (void)a, (void)b;
    return c;
}

#if defined(__gfx950__)
constexpr int MATRIX = MFMA_32;
#elif defined(__gfx90a__) || defined(__gfx942__)
constexpr int MATRIX = MFMA_16;
#elif defined(__GFX11__)
constexpr int MATRIX = WMMA_WHOLE;
#elif defined(__GFX12__)
constexpr int MATRIX = WMMA_HALVES;
#else
constexpr int MATRIX = NO_MATRIX;
#endif
#if defined(__gfx90a__) /* AMD, "MI200 MFMA behavior specifics" */
constexpr bool FLUSHES = true;
#else
constexpr bool FLUSHES = false;
#endif
template <class T, int N> using Lanes = T __attribute__((ext_vector_type(N)));
template <class To, int WORDS> RF_DEVICE To operand(const unsigned *w) {
    Lanes<unsigned, WORDS> v;
    RF_UNROLL
    for (int i = 0; i < WORDS; i++) v[i] = w[i];
    return __builtin_bit_cast(To, v);
}
#if defined(__gfx90a__) || defined(__gfx942__) || defined(__gfx950__)
typedef Lanes<float, 4> MatrixSums;
#else
typedef Lanes<float, 8> MatrixSums;
#endif
template <int DTYPE>
RF_DEVICE MatrixSums matrix_instruction(const unsigned *a, const unsigned *b, MatrixSums c) {
#if defined(__gfx950__)
    if constexpr (DTYPE == RF_F16)
        return __builtin_amdgcn_mfma_f32_16x16x32_f16(
            operand<Lanes<_Float16, 8>, 4>(a), operand<Lanes<_Float16, 8>, 4>(b), c, 0, 0, 0);
    else
        return __builtin_amdgcn_mfma_f32_16x16x32_bf16(operand<Lanes<__bf16, 8>, 4>(a),
                                                       operand<Lanes<__bf16, 8>, 4>(b), c, 0, 0, 0);
#elif defined(__gfx90a__) || defined(__gfx942__)
    if constexpr (DTYPE == RF_F16)
        return __builtin_amdgcn_mfma_f32_16x16x16f16(operand<Lanes<_Float16, 4>, 2>(a),
                                                     operand<Lanes<_Float16, 4>, 2>(b), c, 0, 0, 0);
    else
        return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(
            operand<Lanes<short, 4>, 2>(a), operand<Lanes<short, 4>, 2>(b), c, 0, 0, 0);
#elif defined(__GFX11__)
    if constexpr (DTYPE == RF_F16)
        return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(operand<Lanes<_Float16, 16>, 8>(a),
                                                          operand<Lanes<_Float16, 16>, 8>(b), c);
    else
        return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(operand<Lanes<short, 16>, 8>(a),
                                                           operand<Lanes<short, 16>, 8>(b), c);
#elif defined(__GFX12__)
    if constexpr (DTYPE == RF_F16)
        return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(
            operand<Lanes<_Float16, 8>, 4>(a), operand<Lanes<_Float16, 8>, 4>(b), c);
    else
        return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(operand<Lanes<short, 8>, 4>(a),
                                                                 operand<Lanes<short, 8>, 4>(b), c);
#else
    (void)a, (void)b;
    return c;
#endif
}
template <int DTYPE> RF_DEVICE void multiply(const unsigned *a, const unsigned *b, float *c) {
    constexpr int N = sizeof(MatrixSums) / sizeof(float);
    MatrixSums sums;
    RF_UNROLL
    for (int i = 0; i < N; i++) sums[i] = c[i];
    sums = matrix_instruction<DTYPE>(a, b, sums);
    asm volatile("" : "+v"(sums)); /* here, not where the sums are used: operands would pile up */
    RF_UNROLL
    for (int i = 0; i < N; i++) c[i] = sums[i];
}

#elif defined(RF_CUDA) /* --------------------------------------------------------- CUDA */

constexpr int WAVE = 32;
#define RF_KERNEL(name, Params)                                                                    \
    extern "C" __global__ __launch_bounds__(rf::WAVE *RF_WAVES) void name(                         \
        const __grid_constant__ Params p)
#define RF_SHARED(Type, name) __shared__ Type name
template <class T> RF_DEVICE const T &fresh(const T &x) { return x; }

RF_DEVICE int group_x() { return (int)blockIdx.x; }
RF_DEVICE int group_y() { return (int)blockIdx.y; }
RF_DEVICE int group_z() { return (int)blockIdx.z; }
RF_DEVICE int thread() { return (int)threadIdx.x; }
RF_DEVICE int lane() { return thread() & (WAVE - 1); }
RF_DEVICE int wave() { return __shfl_sync(~0u, thread() / WAVE, 0); }
RF_DEVICE void barrier() { __syncthreads(); }
RF_DEVICE void wave_barrier() { __syncwarp(); }
RF_DEVICE int uniform(int x) { return x; }
RF_DEVICE void release() { __threadfence(); }
RF_DEVICE void acquire() { __threadfence(); }
RF_DEVICE uint32_t fetch_add(uint32_t *p, uint32_t x) { return atomicAdd(p, x); }
RF_DEVICE int opaque(int x) { return x; }
template <class T> RF_DEVICE T load(const void *p) { /* CUDA wants every access aligned */
    T x;
    constexpr int step = alignof(T) < 4 ? alignof(T) : 4;
    if (reinterpret_cast<size_t>(p) % alignof(T) == 0) return *static_cast<const T *>(p);
    for (unsigned i = 0; i < sizeof(T) / step; i++)
        if constexpr (step == 4) {
            const unsigned short *h = static_cast<const unsigned short *>(p) + 2 * i;
            reinterpret_cast<unsigned *>(&x)[i] = h[0] | (unsigned)h[1] << 16;
        } else reinterpret_cast<char *>(&x)[i] = static_cast<const char *>(p)[i];
    return x;
}
template <class T> RF_DEVICE void store(void *p, T x) {
    if (reinterpret_cast<size_t>(p) % alignof(T) == 0) *static_cast<T *>(p) = x;
    else
        for (unsigned i = 0; i < sizeof(T); i++)
            static_cast<char *>(p)[i] = reinterpret_cast<const char *>(&x)[i];
}
template <int MASK> RF_DEVICE int shuffle_xor_bits(int x) { return __shfl_xor_sync(~0u, x, MASK); }
RF_DEVICE bool any(bool x) { return __any_sync(~0u, x) != 0; }
RF_DEVICE float bits_to_float(unsigned x) { return __uint_as_float(x); }
RF_DEVICE unsigned float_to_bits(float x) { return __float_as_uint(x); }
RF_DEVICE float exp2(float x) { return ::exp2f(x); }
RF_DEVICE float log2(float x) { return ::log2f(x); }
RF_DEVICE float round_even(float x) { return ::rintf(x); }
RF_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }
RF_DEVICE float half_to_float(unsigned x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short)x));
    return y;
}
RF_DEVICE unsigned float_to_half(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

constexpr bool FEW_REGISTERS = false;
constexpr bool FLUSHES = false;
template <int DTYPE> constexpr bool PAIRED = false;
template <int DTYPE> __device__ float add_pair(unsigned a, unsigned b, float c);

constexpr int HARDWARE_FP8 = -1;
template <bool HIGH> __device__ void fp8_pair(unsigned word, float *out);

#else /* ------------------------------------------------------- the simulated device */

} // namespace rf
#include "simulated.h" /* tests/device */
namespace rf {

#endif /* ------------------------------------------------------------- all of them */

#if !defined(RF_AMD) /* one after the other what AMD does with both at once */
template <bool HIGH> RF_DEVICE unsigned halves(unsigned a, unsigned b) {
    return HIGH ? a >> 16 | (b & 0xffff0000) : (a & 0xffff) | b << 16;
}
RF_DEVICE unsigned add_halves(unsigned a, unsigned b) {
    unsigned low = float_to_half(half_to_float(a & 0xffff) + half_to_float(b & 0xffff));
    return low | float_to_half(half_to_float(a >> 16) + half_to_float(b >> 16)) << 16;
}
RF_DEVICE unsigned multiply_halves(unsigned a, unsigned b) {
    unsigned low = float_to_half(half_to_float(a & 0xffff) * half_to_float(b & 0xffff));
    return low | float_to_half(half_to_float(a >> 16) * half_to_float(b >> 16)) << 16;
}
#endif

template <int MASK> RF_DEVICE float shuffle_xor(float x) {
    return bits_to_float((unsigned)shuffle_xor_bits<MASK>((int)float_to_bits(x)));
}

constexpr float INF = __builtin_huge_valf();
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

RF_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
RF_DEVICE int larger(int a, int b) { return a > b ? a : b; }

/* Over FROM lanes each, which have equal values, to TO lanes each: the others' sum or maximum. */
template <int TO, int FROM = 1> RF_DEVICE float sum(float x) {
    if constexpr (FROM < TO) return sum<TO, 2 * FROM>(x + shuffle_xor<FROM>(x));
    else return x;
}
template <int TO, int FROM = 1> RF_DEVICE float maximum(float x) {
    if constexpr (FROM < TO) return maximum<TO, 2 * FROM>(larger(x, shuffle_xor<FROM>(x)));
    else return x;
}

} // namespace rf

#endif
