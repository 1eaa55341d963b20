/* The kernels of one instruction set: this file is compiled once for each, with RF_VARIANT naming
 * the tables and the compiler's flags choosing the vectors. */
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

#include "attend.h"
#include "fma.h"
#include "rows.h"

#define RF_JOIN_(a, b) a##b
#define RF_JOIN(a, b)  RF_JOIN_(a, b)

const rf_kernels RF_JOIN(rf_kernels_, RF_VARIANT) = {
    .scratch_floats = scratch_floats,
    .attend = attend,
    .merge = merge,
    .merge_states = merge_states,
    .quantise = quantise,
    .stream = stream,
};

rf_products_of_caches RF_JOIN(rf_products_, RF_VARIANT)[RF_NUM_WIDE_DTYPES] = {
    [RF_F32] = {RF_FMA(f32, f32), RF_FMA_8BIT(f32)},
    [RF_F16] = {RF_FMA(f16, f16), RF_FMA_8BIT(f16)},
    [RF_BF16] = {RF_FMA(bf16, bf16), RF_FMA_8BIT(bf16n)},
};
