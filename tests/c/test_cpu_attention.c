/* attention.c, variant.c and context.c: all variants and types against a double-precision loop, the
 * same bits for any number of threads, and no allocation whose failure is not reported. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "rf/alloc.h"
#include "rf/cpu.h"

enum { SEQS = 5, HEADS = 6, KV = 2, DIM = 40, BLOCK = 7, WIDTH = 100, BLOCKS = 400, TOKENS = 12 };
static const int32_t lens[SEQS] = {0, 1, 700, 33, 260};
static const int32_t cu[SEQS + 1] = {0, 1, 2, 3, 9, 12};

static uint16_t to_half(float x) { /* of numbers that fit exactly */
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) == 0) return (uint16_t)(u >> 16);
    return (uint16_t)((u >> 16 & 0x8000u) | ((u & 0x7fffffffu) - 0x38000000u) >> 13);
}
static double value_of(const char *data, int dtype, int64_t i) {
    if (dtype == RF_F32) return ((const float *)(const void *)data)[i];
    uint16_t h = ((const uint16_t *)(const void *)data)[i];
    if (dtype == RF_BF16) {
        uint32_t u = (uint32_t)h << 16;
        float x;
        memcpy(&x, &u, sizeof x);
        return x;
    }
    int exponent = h >> 10 & 31;
    double x = exponent ? ldexp(1024 + (h & 1023), exponent - 25) : ldexp(h & 1023, -24);
    return h & 0x8000 ? -x : x;
}
static uint32_t seed = 1;
static float small(void) { /* sixteenths from -2 to 2: exact in every type */
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)(seed >> 24) / 64.0f - 2.0f;
}
static char *array(int64_t n, int dtype) {
    char *a = malloc((size_t)n * 4);
    CHECK(a);
    for (int64_t i = 0; i < n; i++) {
        float x = floorf(small() * 16.0f) / 16.0f;
        uint32_t u;
        memcpy(&u, &x, sizeof u);
        if (dtype == RF_F32) ((float *)(void *)a)[i] = x;
        else ((uint16_t *)(void *)a)[i] = dtype == RF_BF16 ? (uint16_t)(u >> 16) : to_half(x);
    }
    return a;
}

typedef struct problem {
    rf_attention_params p;
    char *q, *k, *v, *out;
    int32_t table[SEQS][WIDTH];
} problem;

static void setup(problem *x, int dtype) {
    memset(x, 0, sizeof *x);
    x->q = array(TOKENS * HEADS * DIM, dtype);
    x->k = array(BLOCKS * KV * BLOCK * DIM, dtype);
    x->v = array(BLOCKS * KV * BLOCK * DIM, dtype);
    x->out = malloc(TOKENS * HEADS * DIM * 4);
    CHECK(x->out);
    int32_t next = 0;
    for (int s = 0; s < SEQS; s++)
        for (int i = 0; i < WIDTH; i++) {
            int used = i * BLOCK < lens[s];
            x->table[s][i] = !used ? INT32_MAX : i % 5 == 3 ? -1 : (next++ * 7) % BLOCKS;
        }
    rf_attention_params *p = &x->p;
    p->query = (rf_rows){x->q, HEADS * DIM, DIM};
    p->out = (rf_rows){x->out, HEADS * DIM, DIM};
    p->k = (rf_paged){x->k, KV * BLOCK * DIM, BLOCK * DIM, DIM};
    p->v = (rf_paged){x->v, KV * BLOCK * DIM, DIM, KV * DIM}; /* the other layout */
    p->block_table = &x->table[0][0];
    p->seq_lens = lens;
    p->cu_seqlens_q = cu;
    p->table_stride = p->table_width = WIDTH;
    p->num_tokens = TOKENS;
    p->num_blocks = BLOCKS;
    p->num_rows = p->num_seqs = SEQS;
    p->num_heads = HEADS;
    p->num_kv_heads = KV;
    p->head_dim = p->v_head_dim = DIM;
    p->block_size = BLOCK;
    p->dtype = p->kv_dtype = dtype;
    p->causal = 1;
    p->window_left = p->window_right = -1;
    p->scale = 0.125f;
}

static void release(problem *x) {
    free(x->q);
    free(x->k);
    free(x->v);
    free(x->out);
}

static double expected(const problem *x, int s, int token, int head, int d) {
    int own = lens[s] - (cu[s + 1] - token), kv = head / (HEADS / KV);
    double sum = 0, total = 0, top = -INFINITY;
    for (int pass = 0; pass < 2; pass++)
        for (int pos = 0; pos <= own && pos < lens[s]; pos++) {
            int64_t block = x->table[s][pos / BLOCK], offset = pos % BLOCK;
            if (block < 0) continue;
            double logit = 0;
            for (int i = 0; i < DIM; i++)
                logit += value_of(x->q, x->p.dtype, (token * HEADS + head) * DIM + i) *
                         value_of(x->k, x->p.dtype, ((block * KV + kv) * BLOCK + offset) * DIM + i);
            logit *= 0.125;
            if (pass == 0) top = logit > top ? logit : top;
            else {
                double w = exp(logit - top);
                total += w;
                sum +=
                    w * value_of(x->v, x->p.dtype, ((block * BLOCK + offset) * KV + kv) * DIM + d);
            }
        }
    return total > 0 ? sum / total : 0;
}

static void compare(const problem *x) {
    /* half a unit in the last place; and some variants round probabilities to bfloat16, which moves
     * a result by a part of the values' magnitude, 2 at most */
    static const double relative[] = {2e-6, 0x1.01p-11, 0x1.01p-8}, more[] = {0, 0, 2 * 0x1p-8};
    for (int s = 0; s < SEQS; s++)
        for (int token = cu[s]; token < cu[s + 1]; token++)
            for (int head = 0; head < HEADS; head++)
                for (int d = 0; d < DIM; d += 13) {
                    double want = expected(x, s, token, head, d);
                    double got = value_of(x->out, x->p.dtype, (token * HEADS + head) * DIM + d);
                    CHECK(fabs(got - want) <=
                          2e-6 + more[x->p.dtype] + relative[x->p.dtype] * fabs(want));
                }
}

static void allocation_failures(rf_cpu *cpu, const problem *x, size_t bytes) {
    for (int64_t n = 1;; n++) {
        rf_cpu *fresh; /* with no scratch from an earlier call */
        CHECK(rf_cpu_create(rf_cpu_isa(cpu), 3, &fresh) == RF_OK);
        memset(x->out, 0x55, bytes);
        rf_alloc_fail_after(n);
        int status = rf_cpu_attention(fresh, &x->p);
        int64_t left = rf_alloc_fail_after(0);
        rf_cpu_destroy(fresh);
        CHECK(status == RF_OK || status == RF_ERR_NO_MEMORY);
        if (status != RF_OK)
            for (size_t i = 0; i < bytes; i++) CHECK(x->out[i] == 0x55);
        else compare(x); /* threads that cannot start are done without */
        if (left > 0) break;
        CHECK(n < 100);
    }
}

int main(void) {
    rf_cpu *cpu = NULL;
    CHECK(rf_cpu_create("mmx", 1, &cpu) == RF_ERR_BAD_ARGUMENT);
    CHECK(rf_cpu_create(NULL, 0, &cpu) == RF_ERR_BAD_ARGUMENT);
    rf_alloc_fail_after(1);
    CHECK(rf_cpu_create(NULL, 1, &cpu) == RF_ERR_NO_MEMORY);
    rf_alloc_fail_after(0);
    CHECK(cpu == NULL);
    rf_cpu_destroy(NULL);
    CHECK(rf_cpu_online() >= 1);
    CHECK(rf_cpu_create(NULL, 1, &cpu) == RF_OK);
    CHECK(rf_cpu_set_threads(cpu, 0) == RF_ERR_BAD_ARGUMENT);
    CHECK(rf_cpu_set_isa(cpu, "mmx") == RF_ERR_BAD_ARGUMENT);

    int variants = 0;
    for (int i = 0; rf_cpu_isa_name(i); i++) {
        if (!rf_cpu_isa_available(rf_cpu_isa_name(i))) continue;
        if (variants++ == 0) CHECK(strcmp(rf_cpu_isa(cpu), rf_cpu_isa_name(i)) == 0); /* the best */
        for (int dtype = 0; dtype < RF_NUM_WIDE_DTYPES; dtype++) {
            problem x;
            setup(&x, dtype);
            size_t bytes = (size_t)TOKENS * HEADS * DIM * (dtype == RF_F32 ? 4 : 2);
            char *first = malloc(bytes);
            CHECK(first);
            for (int threads = 1; threads < 5; threads++) {
                CHECK(rf_cpu_set_isa(cpu, rf_cpu_isa_name(i)) == RF_OK);
                CHECK(rf_cpu_set_threads(cpu, threads) == RF_OK);
                CHECK(rf_cpu_get_threads(cpu) == threads);
                memset(x.out, 0x55, bytes);
                CHECK(rf_cpu_attention(cpu, &x.p) == RF_OK);
                if (threads == 1) {
                    compare(&x);
                    memcpy(first, x.out, bytes);
                }
                CHECK(memcmp(first, x.out, bytes) == 0);
            }
            allocation_failures(cpu, &x, bytes);
            free(first);
            release(&x);
        }
    }
    CHECK(variants >= 1);
    rf_cpu_destroy(cpu);
    return 0;
}
