/* attention.c, variant.c and context.c: all variants and types against a double-precision loop, the
 * same bits for any number of threads, no read past the end of a cache, and no allocation whose
 * failure is not reported. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "rf/alloc.h"
#include "rf/cpu.h"

enum { SEQS = 5, HEADS = 6, KV = 2, GROUP = HEADS / KV, SLOTS = 2800, WIDTH = 1400, TOKENS = 30 };
enum { LONGEST = 1300, WIDEST = 128, GAP = 8 };
/* Few rows and many, up to more than a task has; contexts within a part and over several; enough
 * work for threads. */
static const int32_t lens[SEQS] = {0, 1, 300, 54, LONGEST};
static const int32_t longer[SEQS] = {0, 1, 300, 128, LONGEST};
static const int32_t cu[SEQS + 1] = {0, 1, 2, 3, 25, 30};

typedef struct shape {
    int dim, block;
} shape;
static const shape shapes[] = {{40, 7}, {8, 1}, {64, 16}, {96, 15}, {WIDEST, 32}};

static uint16_t to_half(float x) { /* of numbers that fit exactly */
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) == 0) return (uint16_t)(u >> 16);
    return (uint16_t)((u >> 16 & 0x8000u) | ((u & 0x7fffffffu) - 0x38000000u) >> 13);
}
static const int8_t sizes[RF_NUM_DTYPES] = {4, 2, 2, 1, 1, 1};
static double value_of(const char *data, int dtype, int64_t i) {
    if (dtype == RF_I8) return ((const int8_t *)data)[i];
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
/* Vectors of dim elements, `apart` from one to the next, the last of which ends where readable
 * memory does. Between them are NaNs. */
static char *array(int64_t vectors, int dim, int apart, int dtype, void **memory, size_t *bytes) {
    const int64_t n = (vectors - 1) * apart + dim;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (size_t)(n * sizes[dtype]);
    *bytes = (size + page - 1) / page * page + page;
    *memory = mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(*memory != MAP_FAILED);
    char *a = (char *)*memory + *bytes - page - size;
    CHECK(mprotect(a + size, page, PROT_NONE) == 0);
    memset(a, 0xff, size);
    for (int64_t i = 0; i < n; i++) {
        float x = floorf(small() * 16.0f) / 16.0f;
        uint32_t u;
        memcpy(&u, &x, sizeof u);
        const uint16_t half = dtype == RF_BF16 ? (uint16_t)(u >> 16) : to_half(x);
        if (i % apart >= dim) continue;
        if (dtype == RF_F32) memcpy(a + 4 * i, &x, sizeof x);
        else if (dtype == RF_I8) a[i] = (char)(int8_t)(x * 16.0f);
        else memcpy(a + 2 * i, &half, sizeof half);
    }
    return a;
}

typedef struct problem {
    rf_attention_params p;
    char *q, *k, *v, *out, *nan; /* nan: as k and v, but nothing else */
    void *memory[5];
    size_t bytes[5];
    int32_t table[SEQS][WIDTH];
} problem;

static size_t out_bytes(const problem *x) {
    return (size_t)(TOKENS * HEADS * x->p.v_head_dim * sizes[x->p.dtype]);
}

static void setup(problem *x, shape form, int dtype, int kv_dtype) {
    memset(x, 0, sizeof *x);
    const int dim = form.dim, block = form.block, blocks = SLOTS / block;
    const int apart = dim + GAP;
    const int64_t vectors = (int64_t)blocks * KV * block, rows = TOKENS * HEADS;
    x->q = array(rows, dim, dim, dtype, &x->memory[0], &x->bytes[0]);
    x->k = array(vectors, dim, apart, kv_dtype, &x->memory[1], &x->bytes[1]);
    x->v = array(vectors, dim, apart, kv_dtype, &x->memory[2], &x->bytes[2]);
    x->out = array(rows, dim, dim, dtype, &x->memory[3], &x->bytes[3]);
    x->nan = array(vectors, dim, apart, kv_dtype, &x->memory[4], &x->bytes[4]);
    memset(x->nan, 0xff, (size_t)(((vectors - 1) * apart + dim) * sizes[kv_dtype]));
    int32_t next = 0;
    for (int s = SEQS - 2, n = 0; n < SEQS;
         s = (s + 1) % SEQS, n++) /* many rows have the last block */
        for (int i = 0; i < WIDTH; i++) {
            int used = i * block < longer[s];
            x->table[s][i] = !used        ? INT32_MAX
                             : i % 5 == 3 ? -1
                                          : blocks - 1 - (next++ * 3) % blocks;
        }
    rf_attention_params *p = &x->p;
    p->query = (rf_rows){x->q, HEADS * dim, dim};
    p->out = (rf_rows){x->out, HEADS * dim, dim};
    p->k = (rf_paged){x->k, KV * block * apart, block * apart, apart};
    p->v = (rf_paged){x->v, KV * block * apart, apart, KV * apart}; /* the other layout */
    p->block_table = &x->table[0][0];
    p->seq_lens = lens;
    p->cu_seqlens_q = cu;
    p->table_stride = p->table_width = WIDTH;
    p->num_tokens = TOKENS;
    p->num_blocks = blocks;
    p->num_rows = p->num_seqs = SEQS;
    p->num_heads = HEADS;
    p->num_kv_heads = KV;
    p->head_dim = p->v_head_dim = dim;
    p->block_size = block;
    p->dtype = dtype;
    p->kv_dtype = kv_dtype;
    p->k_scale.value = p->v_scale.value = 0.0625f;
    p->window_left = p->window_right = -1;
    p->causal = 1;
    p->scale = 0.125f;
}

static void release(problem *x) {
    for (int i = 0; i < 5; i++) munmap(x->memory[i], x->bytes[i]);
}

typedef struct oracle {
    double out[TOKENS][HEADS][WIDEST], size[TOKENS][HEADS][WIDEST]; /* size: of magnitudes */
} oracle;

static void widen(double *to, const char *from, int dtype, int64_t n, double unit) {
    for (int64_t i = 0; i < n; i++) to[i] = unit * value_of(from, dtype, i);
}

static void solve(const problem *x, oracle *o) {
    enum { MOST = SLOTS * KV * (WIDEST + GAP) };
    static double q[TOKENS * HEADS * WIDEST], k[MOST], v[MOST], logits[LONGEST];
    const rf_attention_params *p = &x->p;
    const int dim = p->head_dim, block = p->block_size;
    const int64_t elements = p->num_blocks * p->k.block_stride - GAP;
    const double unit = p->kv_dtype == RF_I8 ? 0.0625 : 1.0;
    widen(q, x->q, p->dtype, TOKENS * HEADS * dim, 1.0);
    widen(k, x->k, p->kv_dtype, elements, unit);
    widen(v, x->v, p->kv_dtype, elements, unit);
    memset(o, 0, sizeof *o);
    for (int i = 0; i < TOKENS * HEADS; i++) {
        const int token = i / HEADS, head = i % HEADS, kv = head / GROUP;
        int s = 0;
        while (cu[s + 1] <= token) s++;
        const int visible = lens[s] - (cu[s + 1] - token) + 1;
        double *out = o->out[token][head], *size = o->size[token][head];
        double total = 0, top = -INFINITY;
        for (int pos = 0; pos < visible; pos++) {
            const int64_t at = x->table[s][pos / block], offset = pos % block;
            if (at < 0) continue;
            const double *key =
                k + at * p->k.block_stride + kv * p->k.head_stride + offset * p->k.token_stride;
            double logit = 0;
            for (int d = 0; d < dim; d++) logit += q[i * dim + d] * key[d];
            logits[pos] = logit * 0.125;
            if (logits[pos] > top) top = logits[pos];
        }
        for (int pos = 0; pos < visible; pos++) {
            const int64_t at = x->table[s][pos / block], offset = pos % block;
            if (at < 0) continue;
            const double *value =
                v + at * p->v.block_stride + kv * p->v.head_stride + offset * p->v.token_stride;
            const double w = exp(logits[pos] - top);
            total += w;
            for (int d = 0; d < dim; d++) {
                out[d] += w * value[d];
                size[d] += w * fabs(value[d]);
            }
        }
        for (int d = 0; total > 0 && d < dim; d++) {
            out[d] /= total;
            size[d] /= total;
        }
    }
}

/* rounding: what the variant's rounding of probabilities may add, times the sum of magnitudes. */
static void compare(const problem *x, const oracle *o, double rounding) {
    static const double relative[] = {2e-6, 0x1.01p-11, 0x1.01p-8};
    const int dtype = x->p.dtype, dim = x->p.v_head_dim;
    for (int token = 0; token < TOKENS; token++)
        for (int head = 0; head < HEADS; head++)
            for (int d = 0; d < dim; d++) {
                const double want = o->out[token][head][d];
                const double got = value_of(x->out, dtype, (token * HEADS + head) * dim + d);
                const double bound = 2e-6 + relative[dtype] * fabs(want);
                CHECK(fabs(got - want) <= bound + rounding * o->size[token][head][d]);
            }
}

/* Those whose bfloat16 products round probabilities to bfloat16. */
static double rounding_of(const char *isa, int dtype) {
    const int rounds = strcmp(isa, "avx512bf16") == 0 || strcmp(isa, "amx") == 0;
    return rounds && dtype == RF_BF16 ? 0x1p-8 : 0.0;
}

static void allocation_failures(rf_cpu *cpu, const problem *x, const oracle *o) {
    const size_t bytes = out_bytes(x);
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
        else compare(x, o, rounding_of(rf_cpu_isa(cpu), x->p.dtype)); /* fewer threads do as well */
        if (left > 0) break;
        CHECK(n < 100);
    }
}

/* One variant on one problem, each time after longer contexts of NaN alone, so that scratch has
 * nothing else. */
static void attend(rf_cpu *cpu, const char *isa, problem *x, const oracle *o) {
    const size_t bytes = out_bytes(x);
    char *first = malloc(bytes);
    CHECK(first);
    CHECK(rf_cpu_set_isa(cpu, isa) == RF_OK);
    for (int threads = 1; threads < 5; threads += 3) {
        CHECK(rf_cpu_set_threads(cpu, threads) == RF_OK);
        CHECK(rf_cpu_get_threads(cpu) == threads);
        memset(x->out, 0x55, bytes);
        x->p.k.data = x->p.v.data = x->nan;
        x->p.seq_lens = longer;
        CHECK(rf_cpu_attention(cpu, &x->p) == RF_OK);
        x->p.k.data = x->k;
        x->p.v.data = x->v;
        x->p.seq_lens = lens;
        CHECK(rf_cpu_attention(cpu, &x->p) == RF_OK);
        if (threads == 1) {
            compare(x, o, rounding_of(isa, x->p.dtype));
            memcpy(first, x->out, bytes);
        }
        CHECK(memcmp(first, x->out, bytes) == 0);
    }
    free(first);
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

    const char *isas[16];
    int variants = 0;
    for (int i = 0; rf_cpu_isa_name(i); i++)
        if (rf_cpu_isa_available(rf_cpu_isa_name(i))) isas[variants++] = rf_cpu_isa_name(i);
    CHECK(variants >= 1);
    CHECK(strcmp(rf_cpu_isa(cpu), isas[0]) == 0); /* the best */

    /* Every wide type over a cache of its own, and over int8. */
    for (size_t i = 0; i < COUNT(shapes); i++)
        for (int j = 0; j < 2 * RF_NUM_WIDE_DTYPES; j++) {
            static oracle o;
            problem x;
            const int dtype = j % RF_NUM_WIDE_DTYPES;
            setup(&x, shapes[i], dtype, j < RF_NUM_WIDE_DTYPES ? dtype : RF_I8);
            solve(&x, &o);
            for (int k = 0; k < variants; k++) {
                attend(cpu, isas[k], &x, &o);
                if (i == 0 && j < RF_NUM_WIDE_DTYPES) allocation_failures(cpu, &x, &o);
            }
            release(&x);
        }
    rf_cpu_destroy(cpu);
    return 0;
}
