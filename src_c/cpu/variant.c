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

/* Not a flag of the compiler's: it needs to know nothing of AMX, see amx.h. */
#ifndef RF_HAVE_AMX
#define RF_HAVE_AMX 0
#endif

#include "attend.h"
#include "rows.h"

#if RF_HAVE_AMX
/* With the tile registers where they are used: for many rows of bfloat16. */
static void attend_amx(const rf_attention_params *p, const rf_task *task, float *scratch,
                       float *states, int32_t first_part) {
    const int64_t rows = task->num_q * (p->num_heads / p->num_kv_heads);
    const int used = p->dtype == RF_BF16 && rows >= RF_MANY_ROWS;
    if (used) amx_begin();
    attend(p, task, scratch, states, first_part);
    if (used) amx_end();
}
#define RF_ATTEND attend_amx
#else
#define RF_ATTEND attend
#endif

#define RF_JOIN_(a, b) a##b
#define RF_JOIN(a, b)  RF_JOIN_(a, b)
#define RF_STR_(a)     #a
#define RF_STR(a)      RF_STR_(a)

const rf_kernels RF_JOIN(rf_kernels_, RF_VARIANT) = {
    .name = RF_STR(RF_VARIANT),
    .scratch_floats = scratch_floats,
    .attend = RF_ATTEND,
    .merge = merge,
    .merge_states = merge_states,
    .quantise = quantise,
};
