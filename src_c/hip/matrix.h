/* Tiles of 16 x 16 sums by the chip's matrix unit: the one place that knows how lanes share them.
 *
 * A product adds A[16 x DEPTH] * B[DEPTH x 16] to the sums. Lane i has column `column()` of B and
 * of the sums, and row `row()` of A; the lanes of a column are told apart by `group()`.
 *
 *            GROUPS  SLOTS  DEPTH   rows of the sums that a lane has
 *   MFMA        4      8      32    4 * group + i   (gfx90a, gfx942: two instructions)
 *   WMMA 11     2     16      16    8 * group + i   (the hardware's 2 * i + group: see row())
 *   WMMA 12     2      8      16    8 * group + i
 *
 * The elements that a product contracts may come in any order that A and B agree on. So an operand
 * is what a lane reads in 16 bytes: eight neighbours (gfx11: sixteen, the same in both groups). And
 * as a lane's sums are neighbouring rows of its own column, sums of one product become the operand
 * B of the next without leaving their lanes (gfx11: exchanged between the two groups). */
#ifndef RF_HIP_MATRIX_H
#define RF_HIP_MATRIX_H

#include "element.h"

namespace rf {

constexpr int GROUPS = WAVE / 16;
constexpr int PER = 16 / GROUPS;
constexpr bool WHOLE = MATRIX == WMMA_WHOLE;
constexpr int SLOTS = WHOLE ? 16 : 8;
constexpr int DEPTH = WHOLE ? 16 : 8 * GROUPS;
constexpr int SUBTILES = DEPTH / 16; /* tiles of sums that make one operand */

struct Operand {
    unsigned w[SLOTS / 2]; /* two elements each */
};
struct Sums {
    float x[PER];
};

RF_DEVICE int column() { return lane() % 16; }
RF_DEVICE int group() { return lane() / 16; }
/* So that sum i is that of row PER * group() + i. */
RF_DEVICE int row() { return WHOLE ? column() % 2 * 8 + column() / 2 : column(); }
/* The first of the DEPTH elements that this lane has, if they are in order: 8 of them, or all. */
RF_DEVICE int first_slot() { return WHOLE ? 0 : 8 * group(); }
/* Row of a tile pair's sums, 0 .. DEPTH - 1, that slot i of operand_of(sums) is: the part of it
 * that is the same in all lanes, and the other. */
RF_DEVICE constexpr int slot_row(int i) { return WHOLE ? i : i / PER * 16 + i % PER; }
RF_DEVICE int slot_group() { return WHOLE ? 0 : PER * group(); }

template <int DTYPE> RF_DEVICE void product(const Operand &a, const Operand &b, Sums &c) {
    multiply<DTYPE>(a.w, b.w, c.x);
    if constexpr (MATRIX == MFMA_16) multiply<DTYPE>(a.w + 2, b.w + 2, c.x);
}

/* ------------------------------------------------------------------------- operands */

/* The operand of what a lane has read: 16-bit elements, or 8-bit ones in the order of widen_bytes.
 */
template <int DTYPE> RF_DEVICE Operand operand_of_words(const unsigned *w) {
    Operand o;
    RF_UNROLL
    for (int i = 0; i < SLOTS / 2; i++) o.w[i] = 0;
    if constexpr (SIZE_OF<DTYPE> == 2) {
        RF_UNROLL
        for (int i = 0; i < SLOTS / 2; i++) o.w[i] = w[i];
    } else {
        RF_UNROLL
        for (int i = 0; i < SLOTS / 4; i++) {
            Halves h = widen_bytes<DTYPE>(w[i], false);
            o.w[2 * i] = h.even, o.w[2 * i + 1] = h.odd;
        }
    }
    return o;
}

template <int DTYPE> RF_DEVICE Operand operand_of(const Sums *tiles) {
    Operand o;
    RF_UNROLL
    for (int s = 0; s < SUBTILES; s++) RF_UNROLL
    for (int i = 0; i < PER / 2; i++)
        o.w[s * PER / 2 + i] = pair<DTYPE>(tiles[s].x[2 * i], tiles[s].x[2 * i + 1]);
    if constexpr (WHOLE) {
        RF_UNROLL
        for (int i = 0; i < 4; i++) {
            unsigned mine = o.w[i], other = (unsigned)shuffle_xor_bits<16>((int)mine);
            o.w[i] = group() == 0 ? mine : other;
            o.w[4 + i] = group() == 0 ? other : mine;
        }
    }
    return o;
}

} // namespace rf

#endif
