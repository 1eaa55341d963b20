/* The kernels of one instruction set: this file is compiled once for each, with RF_VARIANT naming
 * the table and the compiler's flags choosing the vectors. */
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define RF_HAVE_DOT 1
#else
#define RF_HAVE_DOT 0
#endif

#include "attend.h"
#include "rows.h"

#define RF_JOIN_(a, b) a##b
#define RF_JOIN(a, b)  RF_JOIN_(a, b)
#define RF_STR_(a)     #a
#define RF_STR(a)      RF_STR_(a)

const rf_kernels RF_JOIN(rf_kernels_, RF_VARIANT) = {
    .name = RF_STR(RF_VARIANT),
    .scratch_floats = scratch_floats,
    .attend = attend,
    .merge = merge,
    .merge_states = merge_states,
    .quantise = quantise,
};
