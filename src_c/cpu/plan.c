/* See plan.h. */
#include "plan.h"

#include <string.h>

/* Work of attending `rows` rows to `tokens` tokens of one head: reading a token costs about as much
 * as four rows of arithmetic. */
static int64_t cost_of(int64_t tokens, int64_t rows) { return tokens * (rows + 4); }

/* Query tokens of a task, of a sequence with q_len of them. */
static int64_t query_tile(const rf_attention_params *p, int64_t q_len, int64_t block_rows) {
    const int64_t group = p->num_heads / p->num_kv_heads;
    const int blocks = block_rows && q_len * group >= RF_BLOCK_ROWS_FROM;
    int64_t n = (blocks ? block_rows : RF_MAX_ROWS) / group;
    return n > 1 ? n : 1;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts_of(int64_t tokens) { return (tokens + RF_PART - 1) / RF_PART; }

int64_t rf_plan_cost(const rf_attention_params *p) {
    int64_t group = p->num_heads / p->num_kv_heads, tile = query_tile(p, 1, 0), total = 0;
    for (int64_t i = 0; i < p->num_seqs; i++) {
        rf_seq s = rf_seq_of(p, i);
        for (int64_t q0 = 0; q0 < s.q_len; q0 += tile) {
            int64_t n = smaller(tile, s.q_len - q0);
            int64_t seen = rf_visible(p, &s, q0 + n - 1) - rf_first(p, &s, q0);
            total += cost_of((seen > 0 ? seen : 0) + 1, n * group) * p->num_kv_heads;
        }
    }
    return total;
}

/* Adds the tasks of query tokens q0 .. q0 + n - 1 of sequence i and of heads from .. to - 1;
 * without pl->tasks only counts. */
static void add_tasks(rf_plan *pl, const rf_attention_params *p, int64_t i, const rf_seq *s,
                      int64_t q0, int64_t n, int64_t from, int64_t to) {
    int64_t rows = n * (p->num_heads / p->num_kv_heads);
    int64_t first = rf_first(p, s, q0), last = rf_visible(p, s, q0 + n - 1);
    int64_t tokens = last > first ? last - first : 0, first_part = first / RF_PART;
    int64_t parts = tokens ? parts_of(last) - first_part : 0;
    int64_t cost = cost_of(tokens + 1, rows);
    /* Heads stay together, as they lie in memory, while the context has the parts to be split
     * instead. Two threads take 0.87 of the time of splitting by heads first for one context of
     * 8,192 tokens (HND), and for 8 of 2,048 or 8,192 as long in HND, 0.65 to 0.85 in NHD. */
    const int64_t most = pl->key.max_cost;
    int64_t heads = smaller(RF_MAX_ROWS / rows, RF_MAX_HEADS);
    if (most / cost < heads) heads = smaller(heads, (parts > 1 ? parts : 1) * most / cost);
    if (heads < 1) heads = 1;
    int64_t pieces = smaller(parts, (heads * cost - 1) / most + 1);
    if (pieces < 1) pieces = 1;
    int64_t scratch = pl->key.kernels->scratch_floats(p, rows, heads);
    if (scratch > pl->scratch_floats) pl->scratch_floats = scratch;
    for (int64_t head = from; head < to; head += heads) {
        int64_t h = smaller(heads, to - head);
        if (pieces > 1) {
            if (pl->merges)
                pl->merges[pl->num_merges] = (rf_merge){
                    pl->state_floats, (int32_t)i,   (int32_t)head,       (int32_t)h,
                    (int32_t)q0,      (int32_t)n,   (int32_t)first_part, (int32_t)parts,
                    (int32_t)pieces,  .pending = 0, /* set by each call */
                };
            pl->state_floats += parts * rf_state_floats(rf_head_rows(rows) * h, p->v_head_dim);
        }
        for (int64_t j = 0; j < pieces; j++, pl->num_tasks++) {
            if (!pl->tasks) continue;
            pl->tasks[pl->num_tasks] = (rf_task){
                (int32_t)i,
                (int32_t)head,
                (int32_t)h,
                (int32_t)q0,
                (int32_t)n,
                (int32_t)(first_part + parts * j / pieces),
                (int32_t)(first_part + parts * (j + 1) / pieces),
                pieces > 1 ? (int32_t)pl->num_merges : -1,
            };
        }
        if (pieces > 1) pl->num_merges++;
    }
}

static void make_tasks(rf_plan *pl, const rf_attention_params *p) {
    pl->num_tasks = pl->num_merges = pl->state_floats = pl->scratch_floats = 0;
    /* Long prompts first, and of each the last queries, which see most: threads end on small tasks.
     * A head at a time, whose keys and values stay in a core's second level. */
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < p->num_seqs; i++) {
            rf_seq s = rf_seq_of(p, i);
            if ((s.q_len > 1) != (pass == 0)) continue;
            const int64_t tile = query_tile(p, s.q_len, pl->key.block_rows);
            const int64_t heads = s.q_len > tile ? 1 : p->num_kv_heads;
            for (int64_t head = 0; head < p->num_kv_heads; head += heads)
                for (int64_t q0 = (s.q_len - 1) / tile * tile; q0 >= 0; q0 -= tile)
                    if (s.q_len > 0)
                        add_tasks(pl, p, i, &s, q0, smaller(tile, s.q_len - q0), head,
                                  head + heads);
        }
    pl->scratch_floats = (pl->scratch_floats + 15) & ~(int64_t)15;
}

static size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

int rf_plan_make(rf_plan *pl, const rf_attention_params *p, const rf_variant *variant,
                 int64_t max_cost) {
    const rf_blocks *blocks =
        rf_products_of(variant, RF_BLOCK_ROWS_FROM, p->dtype, p->kv_dtype)->blocks;
    rf_plan_key key;
    memset(&key, 0, sizeof key); /* it is compared with its padding */
    key.kernels = variant->kernels;
    key.block_rows = blocks ? blocks->rows : 0;
    key.max_cost = max_cost;
    key.num_seqs = p->num_seqs;
    key.num_heads = p->num_heads;
    key.num_kv_heads = p->num_kv_heads;
    key.head_dim = p->head_dim;
    key.v_head_dim = p->v_head_dim;
    key.causal = p->causal;
    key.window_left = p->window_left;
    key.window_right = p->window_right;
    key.ragged = p->cu_seqlens_q != NULL;
    const size_t lens = (size_t)p->num_seqs * sizeof(int32_t);
    const size_t cu = key.ragged ? lens + sizeof(int32_t) : 0;
    if (pl->lens && memcmp(&key, &pl->key, sizeof key) == 0 &&
        memcmp(pl->lens, p->seq_lens, lens) == 0 &&
        (!cu || memcmp(pl->cu, p->cu_seqlens_q, cu) == 0))
        return RF_OK;

    pl->key = key;
    pl->lens = pl->cu = NULL;
    pl->tasks = NULL;
    pl->merges = NULL;
    make_tasks(pl, p); /* counts */
    const size_t tasks = align64((size_t)pl->num_tasks * sizeof(rf_task));
    const size_t merges = align64((size_t)pl->num_merges * sizeof(rf_merge));
    int status = rf_buffer_reserve(&pl->memory, tasks + merges + align64(lens) + align64(cu));
    if (status != RF_OK) {
        pl->num_tasks = 0;
        return status;
    }
    char *at = pl->memory.data;
    pl->tasks = (rf_task *)(void *)at;
    pl->merges = (rf_merge *)(void *)(at + tasks);
    make_tasks(pl, p);
    pl->lens = memcpy(at + tasks + merges, p->seq_lens, lens);
    if (cu) pl->cu = memcpy(at + tasks + merges + align64(lens), p->cu_seqlens_q, cu);
    return RF_OK;
}
