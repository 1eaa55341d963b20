/* Eight elements at a time: as they lie in memory, and as float. */
#ifndef RF_HIP_ELEMENT_H
#define RF_HIP_ELEMENT_H

#include "device.h"

namespace rf {

template <int DTYPE> constexpr int SIZE_OF = DTYPE == RF_F32 ? 4 : DTYPE < RF_E4M3FN ? 2 : 1;

struct alignas(8) Bytes8 {
    unsigned w[2];
};
struct alignas(16) Bytes16 {
    unsigned w[4];
};

/* Eight elements: 8, 16 or 32 bytes. */
template <int SIZE> struct Chunk {
    unsigned w[2 * SIZE];
};

template <int SIZE> RF_DEVICE Chunk<SIZE> load_chunk(const void *p) {
    Chunk<SIZE> c;
    if constexpr (SIZE == 1) {
        Bytes8 b = load<Bytes8>(p);
        c.w[0] = b.w[0], c.w[1] = b.w[1];
    } else {
        RF_UNROLL
        for (int i = 0; i < SIZE / 2; i++) {
            Bytes16 b = load<Bytes16>(static_cast<const char *>(p) + 16 * i);
            RF_UNROLL
            for (int j = 0; j < 4; j++) c.w[4 * i + j] = b.w[j];
        }
    }
    return c;
}
template <int SIZE> RF_DEVICE void store_chunk(void *p, const Chunk<SIZE> &c) {
    if constexpr (SIZE == 1) {
        store(p, Bytes8{{c.w[0], c.w[1]}});
    } else {
        RF_UNROLL
        for (int i = 0; i < SIZE / 2; i++)
            store(static_cast<char *>(p) + 16 * i,
                  Bytes16{{c.w[4 * i], c.w[4 * i + 1], c.w[4 * i + 2], c.w[4 * i + 3]}});
    }
}
template <int SIZE> RF_DEVICE Chunk<SIZE> zero_chunk() {
    Chunk<SIZE> c;
    RF_UNROLL
    for (int i = 0; i < 2 * SIZE; i++) c.w[i] = 0;
    return c;
}

/* ------------------------------------------------------------------------- float8 */

/* A byte's seven bits of exponent and fraction, moved to those of a float16, are the value divided
 * by 2^8 (bias 15 instead of 7) or 2^7 (instead of 8), subnormals included. */
template <int DTYPE> RF_DEVICE float widen_fp8(unsigned byte) {
    float x = half_to_float((byte & 0x80) << 8 | (byte & 0x7f) << 7);
    /* 0x80 of NaN, else 0: not a condition, of which each would take scalar registers. */
    unsigned nan =
        DTYPE == RF_E4M3FN ? ((byte & 0x7f) + 1) & 0x80 : ~((byte & 0x7f) + 0x7f) & byte & 0x80;
    return bits_to_float(float_to_bits(x * (DTYPE == RF_E4M3FN ? 256.0f : 128.0f)) |
                         nan * 0xff8000);
}

/* Nearest, ties to even; too large saturates; NaN stays NaN. The cache's bits are the same from
 * every device, so the chips' own conversions, which differ in -0 and overflow, are not used. */
template <int DTYPE> RF_DEVICE unsigned narrow_fp8(float x) {
    constexpr int bias = DTYPE == RF_E4M3FN ? 7 : 8;
    constexpr unsigned largest = DTYPE == RF_E4M3FN ? 0x7e : 0x7f;
    constexpr unsigned nan = DTYPE == RF_E4M3FN ? 0x7f : 0x80;
    unsigned bits = float_to_bits(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return DTYPE == RF_E4M3FN ? sign | nan : nan;
    unsigned code;
    if (magnitude < (unsigned)(128 - bias) << 23) {
        /* Subnormal, or zero: adding 2^(23 - bias - 2) rounds to multiples of 2^(1 - bias - 3). */
        float scaled = bits_to_float(magnitude) + bits_to_float((unsigned)(127 + 21 - bias) << 23);
        code = float_to_bits(scaled) & 0xf;
    } else {
        magnitude -= (unsigned)(127 - bias) << 23;
        magnitude += 0x7ffff + (magnitude >> 20 & 1);
        code = magnitude >> 20;
        if (code > largest) code = largest;
    }
    if constexpr (DTYPE == RF_E4M3FNUZ)
        if (code == 0) return 0; /* there is no -0 */
    return sign | code;
}

RF_DEVICE unsigned narrow_i8(float x) {
    float r = round_even(x);
    if (r != r) return 0;
    r = r > 127.0f ? 127.0f : r < -127.0f ? -127.0f : r;
    return (unsigned)(int)r & 0xff;
}

/* ------------------------------------------------------------------------- chunks */

template <int DTYPE> RF_DEVICE void widen(const Chunk<SIZE_OF<DTYPE>> &c, float *out) {
    RF_UNROLL
    for (int i = 0; i < 2 * SIZE_OF<DTYPE>; i++) {
        unsigned w = c.w[i];
        if constexpr (DTYPE == RF_F32) {
            out[i] = bits_to_float(w);
        } else if constexpr (DTYPE == RF_F16) {
            out[2 * i] = half_to_float(w & 0xffff);
            out[2 * i + 1] = half_to_float(w >> 16);
        } else if constexpr (DTYPE == RF_BF16) {
            out[2 * i] = bits_to_float(w << 16);
            out[2 * i + 1] = bits_to_float(w & 0xffff0000);
        } else if constexpr (DTYPE == RF_I8) {
            RF_UNROLL
            for (int j = 0; j < 4; j++)
                out[4 * i + j] = (float)(signed char)(unsigned char)(w >> 8 * j);
        } else if constexpr (DTYPE == HARDWARE_FP8) {
            fp8_pair<false>(w, out + 4 * i);
            fp8_pair<true>(w, out + 4 * i + 2);
        } else {
            RF_UNROLL
            for (int j = 0; j < 4; j++) out[4 * i + j] = widen_fp8<DTYPE>(w >> 8 * j & 0xff);
        }
    }
}

template <int DTYPE> RF_DEVICE unsigned narrow(float x) {
    if constexpr (DTYPE == RF_F32) return float_to_bits(x);
    else if constexpr (DTYPE == RF_F16) return float_to_half(x);
    else if constexpr (DTYPE == RF_BF16) {
        unsigned bits = float_to_bits(x);
        if (x != x) return bits >> 16 | 0x40;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    } else if constexpr (DTYPE == RF_I8) return narrow_i8(x);
    else return narrow_fp8<DTYPE>(x);
}
template <int DTYPE> RF_DEVICE Chunk<SIZE_OF<DTYPE>> narrow_chunk(const float *x) {
    constexpr int per_word = 4 / SIZE_OF<DTYPE>;
    Chunk<SIZE_OF<DTYPE>> c;
    RF_UNROLL
    for (int i = 0; i < 2 * SIZE_OF<DTYPE>; i++) {
        unsigned w = 0;
        RF_UNROLL
        for (int j = 0; j < per_word; j++)
            w |= narrow<DTYPE>(x[per_word * i + j]) << j * 8 * SIZE_OF<DTYPE>;
        c.w[i] = w;
    }
    return c;
}

/* Eight elements at `element` of an array whose type (a wide one) is known at run time only. */
RF_DEVICE void load_wide(const void *data, int64_t element, int dtype, float *out) {
    if (dtype == RF_F32)
        widen<RF_F32>(load_chunk<4>(static_cast<const char *>(data) + 4 * element), out);
    else if (dtype == RF_F16)
        widen<RF_F16>(load_chunk<2>(static_cast<const char *>(data) + 2 * element), out);
    else widen<RF_BF16>(load_chunk<2>(static_cast<const char *>(data) + 2 * element), out);
}
RF_DEVICE void store_wide(void *data, int64_t element, int dtype, const float *x) {
    if (dtype == RF_F32)
        store_chunk(static_cast<char *>(data) + 4 * element, narrow_chunk<RF_F32>(x));
    else if (dtype == RF_F16)
        store_chunk(static_cast<char *>(data) + 2 * element, narrow_chunk<RF_F16>(x));
    else store_chunk(static_cast<char *>(data) + 2 * element, narrow_chunk<RF_BF16>(x));
}

/* ------------------------------------------------------------------------- pairs of float16 */

/* 8-bit elements become float16, which holds each of them exactly: two of a word's four at a time,
 * those of its even and those of its odd bytes. Times UNIT that is the element: float8's exponent
 * and fraction go to the places of float16's, as above. Its smallest are subnormal there: where the
 * matrix unit takes such for 0, UNIT is multiplied with at once. */
struct Halves {
    unsigned even, odd;
};
template <int DTYPE>
constexpr float UNIT = FLUSHES || DTYPE == RF_I8 ? 1
                       : DTYPE == RF_E4M3FN      ? 256
                                                 : 128;
template <int DTYPE> constexpr bool MAY_BE_NAN = DTYPE == RF_E4M3FN || DTYPE == RF_E4M3FNUZ;
constexpr unsigned NAN_F16 = 0x7e00;

/* 0x80 in each byte that is NaN. */
template <int DTYPE> RF_DEVICE unsigned nan_bytes(unsigned w) {
    unsigned magnitude = w & 0x7f7f7f7f;
    if constexpr (DTYPE == RF_E4M3FN) return (magnitude + 0x01010101) & 0x80808080;
    else if constexpr (DTYPE == RF_E4M3FNUZ) return ~(magnitude + 0x7f7f7f7f) & w & 0x80808080;
    else return 0;
}
/* Without `nan` there is none in the word. */
template <int DTYPE> RF_DEVICE Halves widen_bytes(unsigned w, bool nan) {
    if constexpr (DTYPE == RF_I8) {
        /* 1024 + 128 + the element, less 1152: a byte is the last of float16's fraction there. */
        unsigned above = w ^ 0x80808080;
        return {add_halves((above & 0x00ff00ff) | 0x64006400, 0xe480e480),
                add_halves((above >> 8 & 0x00ff00ff) | 0x64006400, 0xe480e480)};
    } else {
        Halves h = {(w << 8 & 0x80008000) | (w << 7 & 0x3f803f80),
                    (w & 0x80008000) | (w >> 1 & 0x3f803f80)};
        if constexpr (FLUSHES) {
            constexpr unsigned units = DTYPE == RF_E4M3FN ? 0x5c005c00 : 0x58005800; /* 256, 128 */
            h = {multiply_halves(h.even, units), multiply_halves(h.odd, units)};
        }
        if (nan) {
            unsigned bytes = nan_bytes<DTYPE>(w);
            h.even |= (bytes >> 7 & 0x00010001) * NAN_F16;
            h.odd |= (bytes >> 15 & 0x00010001) * NAN_F16;
        }
        return h;
    }
}
/* Two numbers that are not negative, rounded to the nearest 16-bit ones. */
template <int DTYPE> RF_DEVICE unsigned pair(float x, float y) {
    if constexpr (DTYPE == RF_F16) return float_to_half(x) | float_to_half(y) << 16;
    else return halves<true>(float_to_bits(x) + 0x8000, float_to_bits(y) + 0x8000);
}

} // namespace rf

#endif
