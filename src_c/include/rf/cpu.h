/* The operations on the CPU. Independent of the metadata half and of Python.
 *
 * Each operation has a check and a run. The check reads every index the run would follow and
 * reports the first one that is wrong; a run after a failed check is undefined. Shapes, types and
 * strides are the caller's to check. */
#ifndef RF_CPU_H
#define RF_CPU_H

#include <stddef.h>

#include "rf/params.h"
#include "rf/status.h"

/* Threads, scratch memory, and the chosen kernels. Any number of threads may use one at once: the
 * first takes the worker threads, the others meanwhile work alone. Results are the same bits. */
typedef struct rf_cpu rf_cpu;

/* isa: a name of rf_cpu_isa_name, or NULL for the best that this processor has. threads: workers to
 * use, the caller included; they start when first needed. RF_ERR_BAD_ARGUMENT when the processor
 * lacks the instruction set or threads < 1, RF_ERR_NO_MEMORY. */
int rf_cpu_create(const char *isa, int threads, rf_cpu **out);
/* Ends the worker threads. Nobody may be using it. NULL is allowed. */
void rf_cpu_destroy(rf_cpu *cpu);

int rf_cpu_set_threads(rf_cpu *cpu, int threads); /* RF_ERR_BAD_ARGUMENT when < 1 */
int rf_cpu_get_threads(const rf_cpu *cpu);
/* Processors that the worker threads may run on; with n = 0 those of the thread that starts them,
 * as at first. Waits for a call in flight. RF_ERR_BAD_ARGUMENT when one is not 0 .. 1023. */
int rf_cpu_set_processors(rf_cpu *cpu, const int32_t *processors, int64_t n);
/* Time that threads spent in tasks, all of them added up, of calls that used more than one: what is
 * missing to threads x elapsed time was idle. */
int64_t rf_cpu_busy_ns(const rf_cpu *cpu);

/* Processors this process may run on (its affinity mask), at least 1. */
int rf_cpu_online(void);

/* Name of variant i, best first; NULL past the last that was compiled in. */
const char *rf_cpu_isa_name(int i);
/* 1 when this processor and its kernel can run the variant. */
int rf_cpu_isa_available(const char *isa);
const char *rf_cpu_isa(const rf_cpu *cpu);
/* Takes the kernels of another variant: for tests. Nobody may be using the rf_cpu. */
int rf_cpu_set_isa(rf_cpu *cpu, const char *isa);

/* What a check found, for the message. */
enum rf_fault_code {
    RF_FAULT_NONE = 0,
    RF_FAULT_SEQ_LEN,      /* seq_lens[index] = value is outside 0 .. limit */
    RF_FAULT_ROW,          /* rows[index] = value is outside 0 .. limit - 1 */
    RF_FAULT_CU_START,     /* cu_seqlens_q[0] = value is not 0 */
    RF_FAULT_CU_ORDER,     /* cu_seqlens_q[index] = value is below its predecessor, limit */
    RF_FAULT_CU_END,       /* cu_seqlens_q[index] = value is above num_tokens, limit */
    RF_FAULT_QUERY_LONGER, /* sequence index has value query tokens, only limit in the cache */
    RF_FAULT_MAX_QUERY,    /* sequence index has value query tokens, above max_seqlen_q, limit */
    RF_FAULT_MAX_SEQ,      /* seq_lens[index] = value is above max_seq_len, limit */
    RF_FAULT_BLOCK,        /* block_table[index, index2] = value is not below num_blocks, limit */
    RF_FAULT_MASK,       /* sequence index has value query tokens, above the mask's width, limit */
    RF_FAULT_K_SCALE,    /* k_scale[index] is not positive and finite */
    RF_FAULT_V_SCALE,    /* v_scale[index] likewise */
    RF_FAULT_SLOT,       /* slot_mapping[index] = value is not below the capacity, limit */
    RF_FAULT_COPY_RANGE, /* copies[index, index2] = value is outside 0 .. limit - 1 */
    RF_FAULT_COPY_REPEATED,     /* copies[index, 1] = value is a destination or source elsewhere */
    RF_FAULT_BLOCK_ID,          /* block_ids[index] = value is outside 0 .. limit - 1 */
    RF_FAULT_BLOCK_ID_REPEATED, /* block_ids[index] = value, to be written, was there before */
};
typedef struct rf_fault {
    int64_t index, index2, value, limit;
    int32_t code;
} rf_fault;

/* O(tokens + blocks named). max_seqlen_q and max_seq_len: negative when there is no bound.
 * mask_width: bytes of the mask that each query token has, for a call with one. work (optional)
 * gets an estimate of it: key/value tokens times query tokens. */
int rf_cpu_check_attention(const rf_attention_params *p, int64_t max_seqlen_q, int64_t max_seq_len,
                           int64_t mask_width, int64_t *work, rf_fault *fault);
int rf_cpu_check_write(const rf_write_params *p, rf_fault *fault);
int rf_cpu_check_copy(const int32_t *copies, int64_t num_copies, int64_t num_blocks,
                      rf_fault *fault);
/* Block ids of a gather, or of a scatter, which writes to them: then none may be there twice. */
int rf_cpu_check_blocks(const int32_t *ids, int64_t num_ids, int64_t num_blocks, int written,
                        rf_fault *fault);

/* RF_OK, or RF_ERR_NO_MEMORY before anything was written. Rows of out outside every sequence are
 * left alone; a sequence with no visible key gets zeros. The bits of a sequence's output depend on
 * its own query, keys, values and lengths only: never on the threads, the batch or the blocks. */
int rf_cpu_attention(rf_cpu *cpu, const rf_attention_params *p);
/* The parts' outputs weighted by exp(lse), and the logarithm of the sum; zeros and -inf where
 * neither part saw a key. */
int rf_cpu_merge_states(rf_cpu *cpu, const rf_merge_params *p);
/* A slot that is named twice gets one of its tokens, unspecified which. */
int rf_cpu_write_kv(rf_cpu *cpu, const rf_write_params *p);

/* Copies whole blocks: copies[i, 0] to copies[i, 1], in each of the pools. */
int rf_cpu_copy_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                       const int32_t *copies, int64_t num_copies);
/* Row i of data, row_stride bytes from one to the next, becomes block ids[i] of all pools: the
 * bytes of the first pool's block in the order of its dimensions, then those of the second. */
int rf_cpu_gather_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                         const int32_t *ids, int64_t num_ids, char *data, int64_t row_stride);
/* The reverse: blocks become the rows of data. */
int rf_cpu_scatter_blocks(rf_cpu *cpu, const rf_copy_params *pools, int64_t num_pools,
                          const int32_t *ids, int64_t num_ids, const char *data,
                          int64_t row_stride);

#endif
