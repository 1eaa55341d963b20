/* What a run would follow is read once here, so that the kernels need not look. */
#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "rf/alloc.h"
#include "rf/cpu.h"

static int fault_at(rf_fault *f, int code, int64_t index, int64_t index2, int64_t value,
                    int64_t limit) {
    *f = (rf_fault){index, index2, value, limit, code};
    return RF_ERR_BAD_ARGUMENT;
}

/* The largest of n entries; -1 for none. Kept free of exits so that it becomes vector code. */
static int32_t largest(const int32_t *x, int64_t n) {
    int32_t top = -1;
    for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* Factors that were given, one number a head: a reciprocal of each must exist. */
static int check_scales(const rf_scales *s, int64_t heads, int code, rf_fault *f) {
    if (!s->data || s->per_token) return RF_OK;
    for (int64_t h = 0; h < heads; h++) {
        float x = s->data[h * s->head_stride];
        if (!(x >= FLT_MIN && x <= FLT_MAX)) return fault_at(f, code, h, 0, 0, 0);
    }
    return RF_OK;
}

int rf_cpu_check_attention(const rf_attention_params *p, int64_t max_seqlen_q, int64_t max_seq_len,
                           int64_t mask_width, int64_t *work, rf_fault *f) {
    const int32_t *cu = p->cu_seqlens_q;
    int64_t capacity = p->table_width * p->block_size, total = 0;
    int status = check_scales(&p->k_scale, p->num_kv_heads, RF_FAULT_K_SCALE, f);
    if (status == RF_OK) status = check_scales(&p->v_scale, p->num_kv_heads, RF_FAULT_V_SCALE, f);
    if (status != RF_OK) return status;
    if (cu && cu[0] != 0) return fault_at(f, RF_FAULT_CU_START, 0, 0, cu[0], 0);
    for (int64_t i = 0; i < p->num_seqs; i++) {
        int64_t len = p->seq_lens[i], row = p->rows ? p->rows[i] : i, q_len = 1;
        if (cu) {
            if (cu[i + 1] < cu[i])
                return fault_at(f, RF_FAULT_CU_ORDER, i + 1, 0, cu[i + 1], cu[i]);
            if (cu[i + 1] > p->num_tokens)
                return fault_at(f, RF_FAULT_CU_END, i + 1, 0, cu[i + 1], p->num_tokens);
            q_len = cu[i + 1] - cu[i];
        }
        if (row < 0 || row >= p->num_rows) return fault_at(f, RF_FAULT_ROW, i, 0, row, p->num_rows);
        if (len < 0 || len > capacity) return fault_at(f, RF_FAULT_SEQ_LEN, i, 0, len, capacity);
        if (len > 0 && q_len > len) return fault_at(f, RF_FAULT_QUERY_LONGER, i, 0, q_len, len);
        if (max_seqlen_q >= 0 && q_len > max_seqlen_q)
            return fault_at(f, RF_FAULT_MAX_QUERY, i, 0, q_len, max_seqlen_q);
        if (p->mask && len > 0 && q_len > mask_width)
            return fault_at(f, RF_FAULT_MASK, i, 0, q_len, mask_width);
        if (max_seq_len >= 0 && len > max_seq_len)
            return fault_at(f, RF_FAULT_MAX_SEQ, i, 0, len, max_seq_len);
        const int32_t *blocks = p->block_table + row * p->table_stride;
        int64_t n = (len + p->block_size - 1) / p->block_size;
        if (largest(blocks, n) >= p->num_blocks)
            for (int64_t j = 0; j < n; j++)
                if (blocks[j] >= p->num_blocks)
                    return fault_at(f, RF_FAULT_BLOCK, row, j, blocks[j], p->num_blocks);
        total += len * (q_len + 1);
    }
    if (work) *work = total;
    return RF_OK;
}

int rf_cpu_check_write(const rf_write_params *p, rf_fault *f) {
    int64_t capacity = p->num_blocks * p->block_size, top = -1;
    int status = check_scales(&p->k_scale, p->num_kv_heads, RF_FAULT_K_SCALE, f);
    if (status == RF_OK && p->v.data)
        status = check_scales(&p->v_scale, p->num_kv_heads, RF_FAULT_V_SCALE, f);
    if (status != RF_OK) return status;
    for (int64_t i = 0; i < p->num_tokens; i++)
        top = p->slot_mapping[i] > top ? p->slot_mapping[i] : top;
    if (top < capacity) return RF_OK;
    for (int64_t i = 0; i < p->num_tokens; i++)
        if (p->slot_mapping[i] >= capacity)
            return fault_at(f, RF_FAULT_SLOT, i, 0, p->slot_mapping[i], capacity);
    return RF_OK;
}

static int compare(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* A block that is there twice in to[0], to[stride], ..., or in `from` (NULL: nothing) as well; -1
 * for none. Sorted in parts where there is no memory for all, so that it cannot fail: who copies
 * blocks after a step was planned could not take the step back. */
static int32_t repeated(const int32_t *to, const int32_t *from, int64_t stride, int64_t n) {
    int32_t few[64], bad = -1;
    int64_t room = 64;
    int32_t *part = n <= room ? few : rf_alloc((size_t)n * sizeof *part);
    if (part && part != few) room = n;
    if (!part) part = few;
    for (int64_t begin = 0; begin < n && bad < 0; begin += room) {
        int64_t count = n - begin < room ? n - begin : room;
        for (int64_t i = 0; i < count; i++) part[i] = to[(begin + i) * stride];
        qsort(part, (size_t)count, sizeof *part, compare);
        for (int64_t i = 1; i < count; i++)
            if (part[i] == part[i - 1]) bad = part[i];
        for (int64_t i = begin + count; i < n; i++)
            if (bsearch(&to[i * stride], part, (size_t)count, sizeof *part, compare))
                bad = to[i * stride];
        for (int64_t i = 0; from && i < n; i++)
            if (bsearch(&from[i * stride], part, (size_t)count, sizeof *part, compare))
                bad = from[i * stride];
    }
    if (part != few) rf_free(part);
    return bad;
}

/* Blocks are copied in any order, or at once on a GPU: so no destination may be written twice or be
 * read. */
int rf_cpu_check_copy(const int32_t *copies, int64_t n, int64_t num_blocks, rf_fault *f) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < 2; j++)
            if (copies[2 * i + j] < 0 || copies[2 * i + j] >= num_blocks)
                return fault_at(f, RF_FAULT_COPY_RANGE, i, j, copies[2 * i + j], num_blocks);
    int32_t bad = repeated(copies + 1, copies, 2, n);
    if (bad < 0) return RF_OK;
    int64_t at = 0;
    while (copies[2 * at + 1] != bad) at++;
    return fault_at(f, RF_FAULT_COPY_REPEATED, at, 1, bad, 0);
}

int rf_cpu_check_blocks(const int32_t *ids, int64_t n, int64_t num_blocks, int written,
                        rf_fault *f) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= num_blocks)
            return fault_at(f, RF_FAULT_BLOCK_ID, i, 0, ids[i], num_blocks);
    int32_t bad = written ? repeated(ids, NULL, 1, n) : -1;
    if (bad < 0) return RF_OK;
    int64_t at = n - 1;
    while (ids[at] != bad) at--;
    return fault_at(f, RF_FAULT_BLOCK_ID_REPEATED, at, 0, bad, 0);
}
