/* The floor of what sharing.py measures: the same results in plain C loops, with no checks, no
 * Python and no second sequence. Compiled by sharing.py with the system's compiler. */
#include <stdint.h>
#include <string.h>

/* Take n ids off a stack and put them back. */
int64_t plain_bulk(int32_t *stack, int64_t height, int32_t *ids, int64_t n) {
    for (int64_t i = 0; i < n; i++) ids[i] = stack[--height];
    for (int64_t i = 0; i < n; i++) stack[height++] = ids[i];
    return height;
}

/* Slots of tokens first .. first + tokens - 1 of n sequences of one length. */
void plain_slots(const int32_t *table, int64_t width, int64_t n, int64_t first, int64_t tokens,
                 int64_t block_size, int64_t *slots) {
    for (int64_t s = 0; s < n; s++) {
        for (int64_t t = first; t < first + tokens; t++) {
            *slots++ = table[s * width + t / block_size] * block_size + t % block_size;
        }
    }
}

/* One token more for n sequences: a block of a stack where one is needed, the slot, the length. */
int64_t plain_decode(int32_t *table, int64_t width, int64_t n, int32_t *lengths, int64_t block_size,
                     int32_t *stack, int64_t height, int64_t *slots, int64_t *positions) {
    for (int64_t s = 0; s < n; s++) {
        const int64_t position = lengths[s]++, index = position / block_size;
        if (position % block_size == 0) table[s * width + index] = stack[--height];
        positions[s] = position;
        slots[s] = table[s * width + index] * block_size + position % block_size;
    }
    return height;
}

/* Rows of n sequences of `blocks` blocks, one after the other. */
void plain_rows(const int32_t *table, int64_t width, int64_t n, int64_t blocks, int32_t *out) {
    for (int64_t s = 0; s < n; s++) {
        memcpy(out + s * blocks, table + s * width, (size_t)blocks * sizeof *out);
    }
}

/* Compare two prompts and copy one. */
int plain_match(const int32_t *a, const int32_t *b, int64_t n) {
    return memcmp(a, b, (size_t)n * sizeof *a) == 0;
}
