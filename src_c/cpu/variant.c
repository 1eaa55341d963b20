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

#include "tile.h"

#define T           float
#define NAME(x)     x##_f32
#define rf_ld2      rf_ld2_f32
#define rf_ld2_part rf_ld2_part_f32
#define rf_st2      rf_st2_f32
#define rf_st2_part rf_st2_part_f32
#include "attend.inc.h"

#define T           uint16_t
#define NAME(x)     x##_f16
#define rf_ld2      rf_ld2_f16
#define rf_ld2_part rf_ld2_part_f16
#define rf_st2      rf_st2_f16
#define rf_st2_part rf_st2_part_f16
#include "attend.inc.h"

#define T           uint16_t
#define NAME(x)     x##_bf16
#define rf_ld2      rf_ld2_bf16
#define rf_ld2_part rf_ld2_part_bf16
#define rf_st2      rf_st2_bf16
#define rf_st2_part rf_st2_part_bf16
#include "attend.inc.h"

#define RF_JOIN_(a, b) a##b
#define RF_JOIN(a, b)  RF_JOIN_(a, b)
#define RF_STR_(a)     #a
#define RF_STR(a)      RF_STR_(a)

const rf_kernels RF_JOIN(rf_kernels_, RF_VARIANT) = {
    .name = RF_STR(RF_VARIANT),
    .scratch_floats = scratch_floats,
    .attend = {attend_f32, attend_f16, attend_bf16},
    .merge = {merge_f32, merge_f16, merge_bf16},
};
