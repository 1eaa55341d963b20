/* Arithmetic on whole vectors outside of attention: merging results, and writing 8-bit elements.
 * Included by variant.c. Loops without intrinsics are written for the compiler to vectorise. */
#ifndef RF_ROWS_H
#define RF_ROWS_H

#include <float.h>
#include <math.h>

#include "tile.h"

/* Elements of the largest vector, whole pairs of SIMD vectors. */
#define RF_ROW_FLOATS 576

#define RF_ROW(NAME, T)                                                                            \
    static void row_from_##NAME(float *to, const void *from, int64_t n) {                          \
        const T *x = from;                                                                         \
        for (int64_t i = 0; i < n; i += 2 * RF_W) {                                                \
            vf a, b;                                                                               \
            if (n - i >= 2 * RF_W) rf_ld2_##NAME(x + i, &a, &b);                                   \
            else rf_ld2_part_##NAME(x + i, (int)(n - i), &a, &b);                                  \
            vf_store(to + i, a);                                                                   \
            vf_store(to + i + RF_W, b);                                                            \
        }                                                                                          \
    }                                                                                              \
    static void row_to_##NAME(void *to, const float *from, int64_t n) {                            \
        T *x = to;                                                                                 \
        for (int64_t i = 0; i < n; i += 2 * RF_W) {                                                \
            vf a = vf_load(from + i), b = vf_load(from + i + RF_W);                                \
            if (n - i >= 2 * RF_W) rf_st2_##NAME(x + i, a, b);                                     \
            else rf_st2_part_##NAME(x + i, (int)(n - i), a, b);                                    \
        }                                                                                          \
    }
RF_ROW(f32, float)
RF_ROW(f16, uint16_t)
RF_ROW(bf16n, uint16_t)

static void row_from(float *to, const void *from, int64_t n, int dtype) {
    if (dtype == RF_F32) row_from_f32(to, from, n);
    else if (dtype == RF_F16) row_from_f16(to, from, n);
    else row_from_bf16n(to, from, n);
}
static void row_to(void *to, const float *from, int64_t n, int dtype) {
    if (dtype == RF_F32) row_to_f32(to, from, n);
    else if (dtype == RF_F16) row_to_f16(to, from, n);
    else row_to_bf16n(to, from, n);
}

/* ---- merging ---- */

static const char *row_at(const rf_rows *r, int64_t token, int64_t head, int64_t size) {
    return (const char *)r->data + (token * r->token_stride + head * r->head_stride) * size;
}

static void merge_states(const rf_merge_params *p, int64_t begin, int64_t end) {
    const int64_t size = p->dtype == RF_F32 ? 4 : 2, n = p->head_dim;
    _Alignas(64) float a[RF_ROW_FLOATS], b[RF_ROW_FLOATS];
    for (int64_t t = begin; t < end; t++)
        for (int64_t h = 0; h < p->num_heads; h++) {
            float la = p->lse_a[t * p->num_heads + h], lb = p->lse_b[t * p->num_heads + h];
            const int sees_a = la != -INFINITY, sees_b = lb != -INFINITY;
            float top = la > lb ? la : lb, wa = (float)sees_a, wb = (float)sees_b;
            if (sees_a && sees_b) {
                wa = expf(la - top);
                wb = expf(lb - top);
                float sum = wa + wb;
                top += logf(sum);
                wa /= sum;
                wb /= sum;
            }
            /* a part that sees nothing is not even read */
            if (sees_a) row_from(a, row_at(&p->a, t, h, size), n, p->dtype);
            else memset(a, 0, sizeof a);
            if (sees_b) row_from(b, row_at(&p->b, t, h, size), n, p->dtype);
            else memset(b, 0, sizeof b);
            for (int64_t i = 0; i < n; i++) a[i] = wa * a[i] + wb * b[i];
            row_to((char *)(uintptr_t)row_at(&p->out, t, h, size), a, n, p->dtype);
            if (p->lse) p->lse[t * p->num_heads + h] = top;
        }
}

/* ---- 8-bit elements ---- */

static uint32_t float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
static float bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* The scale that makes the largest element of a vector fit; see rf_scales. */
static float scale_of(const float *x, int64_t n, float largest) {
    int32_t top = 0; /* magnitudes order as integers, NaN above all */
    for (int64_t i = 0; i < n; i++) {
        int32_t m = (int32_t)(float_bits(x[i]) & 0x7fffffffu);
        top = m > top ? m : top;
    }
    if (top >= 0x7f800000) return NAN;
    if (top == 0) return 1.0f;
    float scale = bits_float((uint32_t)top) / largest;
    return scale > FLT_MIN ? scale : FLT_MIN;
}

/* Adding and taking away 1.5 * 2^23 rounds to an integer, ties to even. */
static void quantise_i8(uint8_t *to, const float *x, int64_t n, float inverse) {
    for (int64_t i = 0; i < n; i++) {
        float y = x[i] * inverse;
        y = y == y ? y : 0.0f;
        y = y < 127.0f ? y : 127.0f;
        y = y > -127.0f ? y : -127.0f;
        to[i] = (uint8_t)float_bits(y + 12582912.0f);
    }
}

/* float8 with 4 bits of exponent and 3 of mantissa. Below the smallest normal, 2^(1 - bias), an
 * addition rounds to its steps of 2^(-2 - bias); the codes follow those of the normal numbers. */
RF_INLINE void quantise_f8(uint8_t *to, const float *x, int64_t n, float inverse, float largest,
                           uint32_t bias, int unsigned_zero) {
    const float steps = bits_float((127 + 21 - bias) << 23);
    const uint32_t normal = (128 - bias) << 23, nan = unsigned_zero ? 0x80 : 0x7f;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = float_bits(x[i] * inverse), sign = u >> 24 & 0x80;
        float y = bits_float(u & 0x7fffffffu);
        float z = y < largest ? y : largest;
        uint32_t v = float_bits(z);
        uint32_t small = float_bits(z + steps) - float_bits(steps);
        uint32_t large = (v + 0x7ffff + (v >> 20 & 1) - ((127 - bias) << 23)) >> 20;
        uint32_t code = v < normal ? small : large;
        if (unsigned_zero) sign = code ? sign : 0;
        code |= sign;
        to[i] = (uint8_t)(y == y ? code : nan);
    }
}

RF_INLINE void quantise_row(uint8_t *to, const float *x, int64_t n, float inverse, int kv_dtype) {
    if (kv_dtype == RF_I8) quantise_i8(to, x, n, inverse);
    else if (kv_dtype == RF_E4M3FN) quantise_f8(to, x, n, inverse, 448.0f, 7, 0);
    else quantise_f8(to, x, n, inverse, 240.0f, 8, 1);
}

static void quantise_part(const rf_write_params *p, const rf_rows *from, const rf_paged *to,
                          const rf_scales *scales, int64_t n, int64_t token, int64_t block,
                          int64_t offset) {
    const int64_t size = p->dtype == RF_F32 ? 4 : 2;
    const float largest = p->kv_dtype == RF_I8       ? 127.0f
                          : p->kv_dtype == RF_E4M3FN ? 448.0f
                                                     : 240.0f;
    _Alignas(64) float x[RF_ROW_FLOATS];
    for (int64_t h = 0; h < p->num_kv_heads; h++) {
        float scale = scales->value;
        row_from(x, row_at(from, token, h, size), n, p->dtype);
        if (scales->data) {
            float *at = scales->data + block * scales->block_stride + h * scales->head_stride +
                        offset * scales->token_stride;
            if (scales->per_token) *at = scale_of(x, n, largest);
            scale = *at;
        }
        quantise_row((uint8_t *)to->data + block * to->block_stride + h * to->head_stride +
                         offset * to->token_stride,
                     x, n, 1.0f / scale, p->kv_dtype);
    }
}

static void quantise(const rf_write_params *p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        int64_t slot = p->slot_mapping[i];
        if (slot < 0) continue;
        int64_t block = slot / p->block_size, offset = slot - block * p->block_size;
        quantise_part(p, &p->key, &p->k, &p->k_scale, p->head_dim, i, block, offset);
        if (p->v.data)
            quantise_part(p, &p->value, &p->v, &p->v_scale, p->v_head_dim, i, block, offset);
    }
}

#endif
