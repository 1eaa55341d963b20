/* Arithmetic on whole vectors outside of attention: merging results, and writing 8-bit elements.
 * Included by variant.c. Loops without intrinsics are written for the compiler to vectorise. */
#ifndef RF_ROWS_H
#define RF_ROWS_H

#include <math.h>

#include "tile.h"

/* The smallest normal number: its reciprocal is finite. */
#define RF_SMALLEST_SCALE 0x1p-126f
/* Elements of the largest vector, whole pairs of SIMD vectors. */
#define RF_ROW_FLOATS 576

#define RF_ROW(NAME, T)                                                                            \
    RF_INLINE void row_from_##NAME(float *to, const void *from, int64_t n) {                       \
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

RF_INLINE void row_from(float *to, const void *from, int64_t n, int dtype) {
    if (dtype == RF_F32) row_from_f32(to, from, n);
    else if (dtype == RF_F16) row_from_f16(to, from, n);
    else row_from_bf16n(to, from, n);
}
static void row_to(void *to, const float *from, int64_t n, int dtype) {
    if (dtype == RF_F32) row_to_f32(to, from, n);
    else if (dtype == RF_F16) row_to_f16(to, from, n);
    else row_to_bf16n(to, from, n);
}

/* ---- copying ---- */

static void stream(char *to, int64_t to_stride, const char *from, int64_t from_stride,
                   int64_t count, int64_t width, int ahead) {
    for (int64_t n = 0; n < count; n++, to += to_stride, from += from_stride)
        for (int64_t i = 0; i < width; i += 64) {
            if (ahead) __builtin_prefetch(from + i + ahead, 0, 2);
            rf_stream_line(to + i, from + i);
        }
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

static int32_t choose(int which, int32_t yes, int32_t no) {
    return (yes & -which) | (no & ~-which);
}

/* The scale that makes the largest element of a vector fit; see rf_scales. */
RF_INLINE float scale_of(const float *x, int64_t n, float largest) {
    int32_t top = 0; /* magnitudes order as integers, NaN above all */
    for (int64_t i = 0; i < n; i++) {
        int32_t m = (int32_t)(float_bits(x[i]) & 0x7fffffffu);
        top = m > top ? m : top;
    }
    if (top >= 0x7f800000) return NAN;
    if (top == 0) return 1.0f;
    float scale = bits_float((uint32_t)top) / largest;
    return scale > RF_SMALLEST_SCALE ? scale : RF_SMALLEST_SCALE;
}

/* Below, magnitudes are compared as integers and selected by masks: gcc makes branches of what
 * might save it a float operation, and a loop with branches does not become vector code.
 *
 * Adding 2^23 rounds to an integer, ties to even. */
RF_INLINE void quantise_i8(uint8_t *restrict to, const float *restrict x, int64_t n,
                           float inverse) {
    const int32_t largest = (int32_t)float_bits(127.0f);
    for (int64_t i = 0; i < n; i++) {
        int32_t u = (int32_t)float_bits(x[i] * inverse), m = u & 0x7fffffff, sign = u >> 31;
        int32_t top = m < largest ? m : largest;
        int32_t code = (int32_t)(float_bits(bits_float((uint32_t)top) + 0x1p23f) & 0xff);
        code &= -(m <= 0x7f800000); /* NaN is 0 */
        to[i] = (uint8_t)((code ^ sign) - sign);
    }
}

/* float8 with 4 bits of exponent and 3 of mantissa. Below the smallest normal, 2^(1 - bias), an
 * addition rounds to its steps of 2^(-2 - bias); the codes follow those of the normal numbers. */
RF_INLINE void quantise_f8(uint8_t *restrict to, const float *restrict x, int64_t n, float inverse,
                           float largest, int32_t bias, int unsigned_zero) {
    const float steps = bits_float((uint32_t)(127 + 21 - bias) << 23);
    const int32_t normal = (128 - bias) << 23, nan = unsigned_zero ? 0x80 : 0x7f;
    const int32_t limit = (int32_t)float_bits(largest);
    for (int64_t i = 0; i < n; i++) {
        int32_t u = (int32_t)float_bits(x[i] * inverse), m = u & 0x7fffffff, sign = u >> 24 & 0x80;
        int32_t v = m < limit ? m : limit;
        int32_t small = (int32_t)(float_bits(bits_float((uint32_t)v) + steps) - float_bits(steps));
        int32_t large = (v + 0x7ffff + (v >> 20 & 1) - ((127 - bias) << 23)) >> 20;
        int32_t code = choose(v < normal, small, large);
        if (unsigned_zero) sign &= -(code != 0);
        to[i] = (uint8_t)choose(m > 0x7f800000, nan, code | sign);
    }
}

RF_INLINE void quantise_row(uint8_t *to, const float *x, int64_t n, float inverse, int kv_dtype) {
    if (kv_dtype == RF_I8) quantise_i8(to, x, n, inverse);
    else if (kv_dtype == RF_E4M3FN) quantise_f8(to, x, n, inverse, 448.0f, 7, 0);
    else quantise_f8(to, x, n, inverse, 240.0f, 8, 1);
}

/* Keys or values of one token, n elements a head. */
RF_INLINE void quantise_heads(const rf_write_params *p, const rf_rows *from, const rf_paged *to,
                              const rf_scales *scales, int64_t n, int64_t token, int64_t block,
                              int64_t offset, int kv_dtype) {
    const int64_t size = p->dtype == RF_F32 ? 4 : 2;
    const float largest = kv_dtype == RF_I8 ? 127.0f : kv_dtype == RF_E4M3FN ? 448.0f : 240.0f;
    _Alignas(64) float x[RF_ROW_FLOATS];
    const char *row = row_at(from, token, 0, size);
    uint8_t *codes = (uint8_t *)to->data + block * to->block_stride + offset * to->token_stride;
    float *scale = scales->data;
    if (scale) scale += block * scales->block_stride + offset * scales->token_stride;
    for (int64_t h = 0; h < p->num_kv_heads; h++) {
        float factor = scales->value;
        row_from(x, row + h * from->head_stride * size, n, p->dtype);
        if (scale) {
            if (scales->per_token) scale[h * scales->head_stride] = scale_of(x, n, largest);
            factor = scale[h * scales->head_stride];
        }
        quantise_row(codes + h * to->head_stride, x, n, 1.0f / factor, kv_dtype);
    }
}

RF_INLINE void quantise_tokens(const rf_write_params *p, int64_t begin, int64_t end, int kv_dtype) {
    for (int64_t i = begin; i < end; i++) {
        int64_t slot = p->slot_mapping[i];
        if (slot < 0) continue;
        int64_t block = slot / p->block_size, at = slot - block * p->block_size;
        quantise_heads(p, &p->key, &p->k, &p->k_scale, p->head_dim, i, block, at, kv_dtype);
        if (p->v.data)
            quantise_heads(p, &p->value, &p->v, &p->v_scale, p->v_head_dim, i, block, at, kv_dtype);
    }
}

static void quantise(const rf_write_params *p, int64_t begin, int64_t end) {
    if (p->kv_dtype == RF_I8) quantise_tokens(p, begin, end, RF_I8);
    else if (p->kv_dtype == RF_E4M3FN) quantise_tokens(p, begin, end, RF_E4M3FN);
    else quantise_tokens(p, begin, end, RF_E4M3FNUZ);
}

#endif
