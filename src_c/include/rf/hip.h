/* What a HIP launch needs beside an operation's arguments: one struct a kernel, packed by the host
 * and read by the device. The kernels do not trust what they read from device memory, which the
 * host cannot check without waiting for it: an index out of range is masked or skipped. */
#ifndef RF_HIP_H
#define RF_HIP_H

#include "rf/params.h"

#ifndef RF_INLINE /* the kernels' device.h makes them device functions */
#define RF_INLINE static inline
#endif

/* Waves of a workgroup of every kernel: it has RF_WAVES x the device's wave size threads. */
#define RF_WAVES 4
/* Rows (query token x query head of one key/value head) of a wave at most; of a workgroup. */
#define RF_WAVE_ROWS            4
#define RF_TILE_ROWS(wave_rows) (RF_WAVES * (wave_rows))
/* A sequence with no more rows than this may have its context split over workgroups. */
#define RF_SPLIT_ROWS 64
/* Rows of a workgroup of the kernels with matrix instructions. */
#define RF_MATRIX_ROWS 64
/* With deterministic results: context tokens that are worth a workgroup, and workgroups at most. */
#define RF_PART_TOKENS 512
#define RF_MAX_SPLITS  32
/* Tiles x key/value heads of a launch whose splits the last workgroup to arrive may merge. */
#define RF_ARRIVALS 16384
/* Context tokens that a split begins at a multiple of, counted from where its tile's begins. */
#define RF_SPLIT_STEP 64

/* n / value by a multiplication, for 0 <= n < 2^31. */
typedef struct rf_divisor {
    uint32_t value, magic, shift;
} rf_divisor;

/* Granlund and Montgomery, "Division by invariant integers using multiplication", 1994. */
RF_INLINE rf_divisor rf_divisor_of(uint32_t value) {
    rf_divisor d = {value, 0, 0};
    while (d.shift < 31 && (1u << d.shift) < value) d.shift++;
    d.magic = (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << d.shift) - value)) / value + 1);
    return d;
}
RF_INLINE uint32_t rf_quotient(uint32_t n, rf_divisor d) {
    return ((uint32_t)(((uint64_t)n * d.magic) >> 32) + n) >> d.shift;
}

/* Grid: x tile of a sequence's rows x key/value head, heads first; z split. MI300 and MI350 give
 * their eight dies, each with a second-level cache of its own, workgroups in turn (ROCm's
 * rocm-libraries #4279 works around it): with a multiple of eight heads, all tiles that read a
 * head's keys and values are on one die. */
typedef struct rf_attention_launch {
    rf_attention_params p;
    /* With max_splits > 1: for [num_seqs, split_rows, num_kv_heads, max_splits] rows v_head_dim
     * sums of exp2(logit - max) * value; then for as many two floats, the max and the sum of
     * exp2(logit - max). Logits in base 2. */
    float *partial;
    float *partial_state;
    /* A counter a workgroup along x, zero before and after: the last split of its tile to arrive
     * merges them. NULL: a second kernel does. */
    uint32_t *arrivals;
    rf_divisor block_size, group, heads; /* heads: of keys and values */
    int32_t split_rows;                  /* rows that a split sequence has at most */
    int32_t max_splits;                  /* of a tile's context; 1: the output is written at once */
    int32_t part_tokens; /* context tokens a split at least, unless max_splits bounds it */
    int32_t one_tile;    /* 1: the tile is the sequence, none has more rows than one */
    int32_t mask_width;  /* columns of the mask: new tokens past them are hidden */
} rf_attention_launch;
static_assert(sizeof(rf_attention_launch) == 440, "rf_attention_launch is shared with device code");

/* Number of splits of n context tokens, and where each begins. Depends on nothing else, so that a
 * sequence's bits do not depend on the batch. */
RF_INLINE int32_t rf_splits(int32_t n, int32_t part_tokens, int32_t max_splits) {
    int64_t splits = ((int64_t)n + part_tokens - 1) / part_tokens;
    return splits < 1 ? 1 : splits > max_splits ? max_splits : (int32_t)splits;
}
RF_INLINE int32_t rf_split_size(int32_t n, int32_t splits) {
    int32_t size = n / splits + (n % splits != 0);
    return (size + RF_SPLIT_STEP - 1) / RF_SPLIT_STEP * RF_SPLIT_STEP;
}

/* Grid: x the vectors of keys and values; RF_WRITE_LANES lanes each. */
#define RF_WRITE_LANES 8
typedef struct rf_write_launch {
    rf_write_params p;
    rf_divisor block_size, heads;
    int64_t num_vectors; /* num_tokens x num_kv_heads x 2, or x 1 in a latent cache */
} rf_write_launch;
static_assert(sizeof(rf_write_launch) == 272, "rf_write_launch is shared with device code");

/* Grid: x the vectors, RF_WRITE_LANES lanes each. */
typedef struct rf_merge_launch {
    rf_merge_params p;
    rf_divisor heads;
    int32_t reserved;
} rf_merge_launch;
static_assert(sizeof(rf_merge_launch) == 136, "rf_merge_launch is shared with device code");

/* Copies of blocks within pools, from pools to a dense buffer (gather) and back (scatter), many
 * pools in one launch. Block ids come with the launch, or lie in device memory.
 * Grid: x pieces of a block, y copy, z pool. */
#define RF_COPY_POOLS 24
#define RF_COPY_PAIRS 96
typedef struct rf_copy_launch {
    rf_copy_params pools[RF_COPY_POOLS];
    char *dense[RF_COPY_POOLS]; /* gather, scatter: where the pool's part of a row begins, */
    int64_t dense_stride;       /* and bytes from one block's row to the next */
    const int32_t *pairs;       /* [num_copies, 2] source and destination; [num_copies] blocks */
    int32_t inline_pairs[2 * RF_COPY_PAIRS]; /* read where pairs is NULL */
    int64_t num_blocks;
    int32_t num_copies;
    int32_t direction; /* enum rf_copy_direction */
} rf_copy_launch;
enum rf_copy_direction { RF_COPY_WITHIN = 0, RF_COPY_GATHER = 1, RF_COPY_SCATTER = 2 };
static_assert(sizeof(rf_copy_launch) == 2336, "rf_copy_launch is shared with device code");

/* Changed entries of a block table that lies on the device, carried by the launch. */
#define RF_TABLE_ENTRIES 256
typedef struct rf_table_launch {
    int32_t *table;
    int64_t stride; /* elements a row */
    int32_t rows, columns;
    int32_t num_entries;
    int32_t reserved;
    int32_t row[RF_TABLE_ENTRIES], column[RF_TABLE_ENTRIES], value[RF_TABLE_ENTRIES];
} rf_table_launch;
static_assert(sizeof(rf_table_launch) == 3104, "rf_table_launch is shared with device code");

/* The kernels that are built, for the device code and for who asks for them:
 * X(suffix of the name, enum rf_dtype of the cache). */
#define RF_STORAGE_INSTANCES(X)                                                                    \
    X(f32, RF_F32)                                                                                 \
    X(f16, RF_F16)                                                                                 \
    X(bf16, RF_BF16)                                                                               \
    X(e4m3fn, RF_E4M3FN)                                                                           \
    X(e4m3fnuz, RF_E4M3FNUZ)                                                                       \
    X(i8, RF_I8)
/* X(largest of head_dim and v_head_dim, lanes a vector, chunks of 8 elements a lane). */
#define RF_SIZE_INSTANCES(X)                                                                       \
    X(64, 8, 1)                                                                                    \
    X(128, 16, 1)                                                                                  \
    X(256, 32, 1)                                                                                  \
    X(512, 32, 2)                                                                                  \
    X(576, 32, 3)
#define RF_HIP_MAX_HEAD_DIM 576
/* Kernels with matrix instructions, on chips that have them: X(suffix, enum rf_dtype of the cache,
 * largest of head_dim and v_head_dim), smaller before larger. Both are whole pieces of 16 bytes in
 * the cache. The query has the cache's type, or a 16-bit one over an 8-bit cache. All else is for
 * the kernels above. */
#define RF_MATRIX_INSTANCES(X)                                                                     \
    X(f16, RF_F16, 64)                                                                             \
    X(f16, RF_F16, 128)                                                                            \
    X(f16, RF_F16, 256)                                                                            \
    X(bf16, RF_BF16, 64)                                                                           \
    X(bf16, RF_BF16, 128)                                                                          \
    X(bf16, RF_BF16, 256)                                                                          \
    X(e4m3fn, RF_E4M3FN, 64)                                                                       \
    X(e4m3fn, RF_E4M3FN, 128)                                                                      \
    X(e4m3fn, RF_E4M3FN, 256)                                                                      \
    X(e4m3fnuz, RF_E4M3FNUZ, 64)                                                                   \
    X(e4m3fnuz, RF_E4M3FNUZ, 128)                                                                  \
    X(e4m3fnuz, RF_E4M3FNUZ, 256)                                                                  \
    X(i8, RF_I8, 64)                                                                               \
    X(i8, RF_I8, 128)                                                                              \
    X(i8, RF_I8, 256)
/* Rows of a wave in an instance with that many chunks a lane: registers are what bounds them. */
#define RF_ROWS_OF(chunks) ((chunks) == 1 ? RF_WAVE_ROWS : RF_WAVE_ROWS / 2)

#endif
