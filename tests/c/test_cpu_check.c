/* check.c: each fault is found, named, and nothing else is. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "rf/alloc.h"
#include "rf/cpu.h"

static const int32_t table[2][3] = {{0, 1, 99}, {-7, 3, 99}};

static rf_attention_params good(void) {
    static const int32_t lens[2] = {5, 8}, cu[3] = {0, 2, 3};
    rf_attention_params p = {0};
    p.block_table = &table[0][0];
    p.table_stride = 3;
    p.table_width = 2;
    p.num_rows = 2;
    p.num_blocks = 4;
    p.block_size = 4;
    p.num_seqs = 2;
    p.num_tokens = 3;
    p.seq_lens = lens;
    p.cu_seqlens_q = cu;
    return p;
}

static rf_fault fault_of(const rf_attention_params *p, int64_t max_q, int64_t max_len) {
    rf_fault f = {0};
    CHECK(rf_cpu_check_attention(p, max_q, max_len, -1, NULL, &f) == RF_ERR_BAD_ARGUMENT);
    return f;
}

#define EXPECT(f, c, i, v, l)                                                                      \
    CHECK((f).code == (c) && (f).index == (i) && (f).value == (v) && (f).limit == (l))

static void attention(void) {
    rf_attention_params p = good();
    rf_fault f = {0};
    int64_t work = 0;
    CHECK(rf_cpu_check_attention(&p, -1, -1, -1, &work, &f) == RF_OK);
    CHECK(work > 0);
    CHECK(rf_cpu_check_attention(&p, 2, 8, -1, NULL, &f) == RF_OK);
    f = fault_of(&p, 1, -1);
    EXPECT(f, RF_FAULT_MAX_QUERY, 0, 2, 1);
    f = fault_of(&p, -1, 7);
    EXPECT(f, RF_FAULT_MAX_SEQ, 1, 8, 7);

    int32_t lens[2] = {9, 8};
    p.seq_lens = lens;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_SEQ_LEN, 0, 9, 8);
    lens[0] = -1;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_SEQ_LEN, 0, -1, 8);
    lens[0] = 1;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_QUERY_LONGER, 0, 2, 1);
    lens[0] = 0; /* an empty sequence may have query tokens: padding of a batch */
    CHECK(rf_cpu_check_attention(&p, -1, -1, -1, NULL, &f) == RF_OK);

    p = good();
    int32_t cu[3] = {1, 2, 3};
    p.cu_seqlens_q = cu;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_CU_START, 0, 1, 0);
    cu[0] = 0;
    cu[2] = 1;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_CU_ORDER, 2, 1, 2);
    cu[2] = 4;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_CU_END, 2, 4, 3);

    p = good();
    int32_t rows[2] = {1, 2};
    p.rows = rows;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_ROW, 1, 2, 2);
    rows[1] = -1;
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_ROW, 1, -1, 2);

    p = good();
    p.num_blocks = 3; /* the entry past the end, 99, is not read; the negative one is fine */
    f = fault_of(&p, -1, -1);
    EXPECT(f, RF_FAULT_BLOCK, 1, 3, 3);
    CHECK(f.index2 == 1);
}

static void features(void) {
    rf_attention_params p = good();
    rf_fault f = {0};
    const uint8_t mask[8] = {0};
    p.mask = mask;
    CHECK(rf_cpu_check_attention(&p, -1, -1, 2, NULL, &f) == RF_OK);
    CHECK(rf_cpu_check_attention(&p, -1, -1, 1, NULL, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_MASK, 0, 2, 1);
    const int32_t lens[2] = {0, 8}; /* who has no tokens in the cache needs no columns */
    p.seq_lens = lens;
    CHECK(rf_cpu_check_attention(&p, -1, -1, 1, NULL, &f) == RF_OK);

    p = good();
    p.num_kv_heads = 3;
    float scales[3] = {1.0f, 0x1p-126f, 0x1.fffffep127f};
    p.k_scale.data = p.v_scale.data = scales;
    p.k_scale.head_stride = p.v_scale.head_stride = 1;
    CHECK(rf_cpu_check_attention(&p, -1, -1, -1, NULL, &f) == RF_OK);
    const float bad[] = {0.0f, -1.0f, 0x1p-126f / 2, INFINITY, NAN};
    for (int i = 0; i < 5; i++) {
        scales[2] = bad[i];
        CHECK(rf_cpu_check_attention(&p, -1, -1, -1, NULL, &f) == RF_ERR_BAD_ARGUMENT);
        EXPECT(f, RF_FAULT_K_SCALE, 2, 0, 0);
    }
    p.k_scale.data = NULL;
    CHECK(rf_cpu_check_attention(&p, -1, -1, -1, NULL, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_V_SCALE, 2, 0, 0);
    p.v_scale.per_token = 1; /* what the cache holds is not an argument */
    CHECK(rf_cpu_check_attention(&p, -1, -1, -1, NULL, &f) == RF_OK);
}

static void write(void) {
    int64_t slots[3] = {0, -5, 31};
    rf_write_params p = {0};
    rf_fault f = {0};
    p.slot_mapping = slots;
    p.num_tokens = 3;
    p.num_blocks = 2;
    p.block_size = 16;
    CHECK(rf_cpu_check_write(&p, &f) == RF_OK);
    slots[2] = 32;
    CHECK(rf_cpu_check_write(&p, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_SLOT, 2, 32, 32);
    p.num_tokens = 0;
    CHECK(rf_cpu_check_write(&p, &f) == RF_OK);
    float scale = -1.0f;
    p.num_kv_heads = 1;
    p.k_scale.data = p.v_scale.data = &scale;
    CHECK(rf_cpu_check_write(&p, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_K_SCALE, 0, 0, 0);
    p.k_scale.per_token = 1;
    CHECK(rf_cpu_check_write(&p, &f) == RF_OK); /* no values: a latent cache */
    p.v.data = &scale;
    CHECK(rf_cpu_check_write(&p, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_V_SCALE, 0, 0, 0);
}

static void blocks(void) {
    int32_t ids[200];
    rf_fault f = {0};
    for (int i = 0; i < 200; i++) ids[i] = 199 - i;
    CHECK(rf_cpu_check_blocks(ids, 200, 200, 1, &f) == RF_OK);
    CHECK(rf_cpu_check_blocks(ids, 0, 0, 1, &f) == RF_OK);
    CHECK(rf_cpu_check_blocks(ids, 200, 199, 0, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_BLOCK_ID, 0, 199, 199);
    ids[3] = -1;
    CHECK(rf_cpu_check_blocks(ids, 200, 200, 0, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_BLOCK_ID, 3, -1, 200);
    ids[3] = 0;
    CHECK(rf_cpu_check_blocks(ids, 200, 200, 0, &f) == RF_OK); /* two may be read */
    CHECK(rf_cpu_check_blocks(ids, 200, 200, 1, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_BLOCK_ID_REPEATED, 199, 0, 0);
    ids[5] = ids[2];
    CHECK(rf_cpu_check_blocks(ids, 9, 200, 1, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_BLOCK_ID_REPEATED, 5, 197, 0);
    rf_alloc_fail_after(1);
    CHECK(rf_cpu_check_blocks(ids, 200, 200, 1, &f) == RF_ERR_BAD_ARGUMENT); /* does without */
    EXPECT(f, RF_FAULT_BLOCK_ID_REPEATED, 199, 0, 0);
    CHECK(rf_alloc_fail_after(0) == 0);
}

static void copy(void) {
    int32_t pairs[200];
    rf_fault f = {0};
    for (int i = 0; i < 200; i++) pairs[i] = i;
    CHECK(rf_cpu_check_copy(pairs, 100, 200, &f) == RF_OK);
    CHECK(rf_cpu_check_copy(pairs, 0, 0, &f) == RF_OK);
    CHECK(rf_cpu_check_copy(pairs, 100, 199, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_COPY_RANGE, 99, 199, 199);
    rf_alloc_fail_after(1);
    CHECK(rf_cpu_check_copy(pairs, 100, 200, &f) == RF_OK); /* does without */
    CHECK(rf_alloc_fail_after(0) == 0);
    pairs[10] = 1; /* a destination is read */
    CHECK(rf_cpu_check_copy(pairs, 100, 200, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_COPY_REPEATED, 0, 1, 0);
    pairs[10] = 12; /* two may read the same */
    CHECK(rf_cpu_check_copy(pairs, 100, 200, &f) == RF_OK);
    pairs[11] = 13;
    CHECK(rf_cpu_check_copy(pairs, 7, 200, &f) == RF_ERR_BAD_ARGUMENT);
    EXPECT(f, RF_FAULT_COPY_REPEATED, 5, 13, 0);
}

int main(void) {
    attention();
    features();
    write();
    copy();
    blocks();
    return 0;
}
