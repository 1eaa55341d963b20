/* Attention to a paged context: decode, prefill and ragged mixes of both, in one kernel.
 *
 * Mathematics: rf/params.h. Softmax is online and in base 2: a state is a maximum m, the sum l of
 * exp2(logit - m), and the sums o of exp2(logit - m) * value; two states of different tokens merge.
 *
 * Work: the rows of a (sequence, key/value head) are its query tokens x the query heads that share
 * the head, and are cut into tiles of RF_WAVES * ROWS. A workgroup has one tile and one split of
 * the context tokens that its rows see. Each wave keeps up to ROWS rows in registers. A tile with
 * few rows (decoding) gives the same rows to several waves, which then take turns at the tokens;
 * one with many (prefill) gives each wave its own, and the keys that they all read come from the
 * first-level cache. So each key and value is read from memory once for all heads of its group.
 *
 * Within a wave LANES lanes share a token: each has 8 x CHUNKS elements of the query rows, of the
 * key and of the value, read in pieces of 16 bytes; WAVE / LANES tokens are read side by side and
 * STEPS of those at once. In an 8-bit cache 16 bytes are two chunks: neighbours read them from a
 * token each, and exchange halves. A logit is the sum over LANES lanes; what a value
 * adds needs no other lane. States are merged over the wave by shuffles, over waves through LDS,
 * over splits by the last workgroup of the tile to end, or by reduce below. In a latent cache the
 * key's registers serve as the value.
 *
 * Queries of 16 bits are multiplied in pairs of elements where the chip has an instruction for it
 * (PAIRED in device.h): with keys along the head, as they were read; with values along the context,
 * two neighbouring steps' tokens at a time, whose halves v_perm brings together beside a pair of
 * probabilities. 8-bit elements become float16 for that (element.h), also under bfloat16 queries,
 * whose rows are brought into float16's range by a power of two. So each probability is rounded to
 * the cache's type, over 8 bits to float16: by 2^-11 of it (bfloat16: 2^-8), or 2^-25 if that is
 * more; their sum is not, as the log-sum-exp is float32. Sums are float32, of which the instruction
 * flushes subnormals. Scales of tokens go the way that they go in matrix.hip. Without the
 * instruction, and for float32, elements become float32 one by one.
 *
 * The maximum is replaced, and the sums rescaled, when a logit of the wave exceeds it by more than
 * LAG, as in matrix.hip.
 *
 * Which tokens a lane sees in which order depends only on the sequence's own lengths, so its bits
 * do not depend on the batch. A step whose tokens every row sees has no test inside (`GUARDED`),
 * and such steps are a loop of their own: as two branches of one loop each moved the sums to
 * registers of its own. Block ids are read without a branch, and values before anything is done
 * with keys.
 *
 * LDS: 4 waves x ROWS x head size floats: 4, 8, 16, 16 and 24 KiB for the five sizes.
 *
 * Nothing here was timed on a GPU: registers, spills and occupancy are what the compiler reports
 * (tests/test_hip_objects.py). Versions tried, for gfx942 and 128 elements of bfloat16:
 *   all arguments in registers                     224 vector registers, 70 scalars spilled
 *   rare ones read again where they are needed     206, none spilled
 *   absent rows computed, not skipped by branches  292, as SLP vectorisation doubled the factors
 *   without SLP vectorisation                      177: what is here
 *   held to 128 registers, for 4 waves a SIMD      83 spilled
 * And for gfx9-generic, whose lanes have 256 registers (FEW_REGISTERS); spilled where held to 128:
 *   as elsewhere                                   169 (float32 241); 196 spilled
 *   half of the steps                              1 (float32, one step: none); 79 for 576 elements
 *   and values read when keys are used up, larger
 *   vectors shared by all lanes of a wave          112 to 128, none spilled: what is here
 * And cycles to issue a round of 4 rows x 8 tokens on gfx1030 (LLVM 22's model; memory needs 2,880
 * for 16 bits, a quarter of it for each of 4 waves that share them; 1,440 for 8 bits):
 *                                               float16   bfloat16   float8
 *   each element to float32                         936        968     1665
 *   dot2, one step function with a branch inside    658        749      843
 *   values loaded before keys are waited for        663        751
 *   two loops                                       566        686      773: what is here */
#include "attention.h"

namespace rf {

/* NARROW: queries of 16 bits. SHARING, EACH: lanes of a vector, and chunks of one of them, unless
 * the chip has few registers: then all lanes of a wave share a vector of several chunks a lane. */
template <int DTYPE, bool NARROW, int SHARING, int EACH> struct Attention {
    static constexpr int ROWS = RF_ROWS_OF(EACH);
    static constexpr int TILE = RF_TILE_ROWS(ROWS);
    static constexpr int SIZE = SIZE_OF<DTYPE>;
    static constexpr int VECTOR = SHARING * EACH; /* chunks */
    static constexpr int LANES = FEW_REGISTERS && EACH > 1 ? WAVE : SHARING;
    static constexpr int CHUNKS = (VECTOR + LANES - 1) / LANES;
    static constexpr int SIDE = WAVE / LANES; /* tokens side by side */
    static constexpr int STEPS = FEW_REGISTERS              ? SIZE * CHUNKS < 4 ? 2 : 1
                                 : CHUNKS == 1              ? 4
                                 : SIZE == 4 && CHUNKS == 3 ? 1
                                                            : 2;
    static constexpr int TOKENS = SIDE * STEPS;   /* tokens of a wave at once */
    static constexpr bool EARLY = !FEW_REGISTERS; /* values are read before keys are used */
    static constexpr bool SCALED = SIZE == 1;
    static constexpr int PAIR = SIZE == 1 ? RF_F16 : DTYPE; /* type of paired elements */
    static constexpr bool PAIRS = NARROW && PAIRED<PAIR>;
    static constexpr int WORDS = PAIRS ? 4 : 8; /* of eight elements of the query */
    static constexpr float LAG = 8;
    /* Whether steps without guards are a loop of their own. Where 8-bit elements become float32
     * one by one, mostly for float32 queries, they would fill scalar registers and objects. */
    static constexpr bool STEADY = !SCALED || PAIRS;

    union Shared {
        struct {
            float sums[RF_WAVES][ROWS][8 * VECTOR];
            float m[RF_WAVES][ROWS], l[RF_WAVES][ROWS];
        };
        uint32_t arrived;
    };

    const rf_attention_launch &a;
    Tile tile;
    Share share;
    int row0, rows; /* of this wave */
    int side, part; /* of this lane: which token, which chunks (part, part + LANES, ...) */
    bool latent, capped, biased;
    bool k_in[CHUNKS];              /* whether the key has this lane's chunk, */
    int k_at[CHUNKS], v_at[CHUNKS]; /* and the byte in the vector that it is read from */
    Range range[ROWS];
    float slope[ROWS], multiple[ROWS]; /* multiple: of logits of pairs */
    unsigned query[ROWS][CHUNKS][WORDS];
    float sums[ROWS][CHUNKS][8], m[ROWS], l[ROWS];

    RF_DEVICE_MEMBER Attention(const rf_attention_launch &launch) : a(launch) {}

    RF_DEVICE_MEMBER void start() {
        const rf_attention_params &p = a.p;
        int group = (int)a.group.value;
        float scale = p.softcap > 0 ? p.scale / p.softcap : p.scale * LOG2E;
        if constexpr (PAIRS && SCALED) scale *= UNIT<DTYPE> * of_head(p.k_scale, tile.kv_head);
        capped = p.softcap > 0;
        biased = p.alibi_slopes != nullptr;
        latent = p.v.data == p.k.data && p.v.block_stride == p.k.block_stride &&
                 p.v.head_stride == p.k.head_stride && p.v.token_stride == p.k.token_stride;
        bool k_paired = paired(p.head_dim), v_paired = paired(p.v_head_dim);
        RF_UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            int chunk = part + c * LANES;
            k_in[c] = 8 * chunk < p.head_dim;
            k_at[c] = k_in[c] ? 8 * SIZE * (k_paired ? chunk & ~1 : chunk) : 0;
            v_at[c] = 8 * chunk < p.v_head_dim ? 8 * SIZE * (v_paired ? chunk & ~1 : chunk) : 0;
        }
        RF_UNROLL
        for (int r = 0; r < ROWS; r++) {
            m[r] = -INF;
            l[r] = 0;
            slope[r] = 0;
            multiple[r] = scale;
            range[r] = {0, 0};
            RF_UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                RF_UNROLL
                for (int i = 0; i < 8; i++) sums[r][c][i] = 0;
                RF_UNROLL
                for (int i = 0; i < WORDS; i++) query[r][c][i] = 0;
            }
            if (r >= rows) continue;
            int token = (int)rf_quotient((uint32_t)(row0 + r), a.group);
            int head = tile.kv_head * group + row0 + r - token * group;
            range[r] = visible(p, tile, row0 + r, group);
            if (p.alibi_slopes) slope[r] = load<float>(p.alibi_slopes + head) * LOG2E;
            int64_t at = (tile.token0 + token) * p.query.token_stride + head * p.query.head_stride;
            RF_UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                if (!k_in[c]) continue;
                int64_t mine = at + 8 * (part + c * LANES);
                if constexpr (PAIRS) {
                    Chunk<2> x = load_chunk<2>(static_cast<const char *>(p.query.data) + 2 * mine);
                    RF_UNROLL
                    for (int i = 0; i < 4; i++) query[r][c][i] = x.w[i];
                } else {
                    float x[8];
                    load_wide(p.query.data, mine, p.dtype, x);
                    RF_UNROLL
                    for (int i = 0; i < 8; i++) query[r][c][i] = float_to_bits(x[i] * scale);
                }
            }
            if constexpr (PAIRS && SCALED)
                multiple[r] *= narrow_query<CHUNKS, LANES>(p.dtype, query[r]);
        }
    }

    /* The block of a token of the share, or -1. No branch, nor a condition that the compiler would
     * make one of: something is read in any case, and loads of several tokens are under way. */
    RF_DEVICE_MEMBER int block_of(int token) const {
        int inside = smaller(token, share.end - 1);
        int block = load<int32_t>(tile.blocks + rf_quotient((uint32_t)inside, a.block_size));
        block |= (inside - token) >> 31;
        return (uint32_t)block < (uint64_t)a.p.num_blocks ? block : -1;
    }

    /* Of row r's query token in the sequence. */
    RF_DEVICE_MEMBER int position(int r) const {
        return tile.kv_len - tile.q_len + (int)rf_quotient((uint32_t)(row0 + r), a.group);
    }

    RF_DEVICE_MEMBER bool sees(int r, int token, bool masked) const {
        bool yes = token >= range[r].low && token < range[r].high;
        int added = token - (tile.kv_len - tile.q_len);
        if (masked && yes && added >= 0) {
            const rf_attention_params &p = fresh(a).p;
            int row_token = (int)rf_quotient((uint32_t)(row0 + r), a.group);
            yes = added < fresh(a).mask_width &&
                  load<uint8_t>(p.mask + (tile.token0 + row_token) * p.mask_stride + added) != 0;
        }
        return yes;
    }

    /* 8 bits, and an even number of chunks: two of them are read at once. */
    RF_DEVICE_MEMBER static bool paired(int dim) { return SIZE == 1 && dim % 16 == 0; }

    /* This lane's chunks of STEPS tokens, whose vectors are at bytes `offset` of the pool. */
    RF_DEVICE_MEMBER static void read(const rf_paged &pool, const int64_t *offset, const int *at,
                                      int dim, Chunk<SIZE> (*to)[CHUNKS]) {
        const char *data = static_cast<const char *>(pool.data);
        if constexpr (SIZE == 1 && STEPS % 2 == 0) {
            if (paired(dim)) {
                bool odd = lane() % 2 != 0;
                RF_UNROLL
                for (int t = 0; t < STEPS; t += 2) RF_UNROLL
                for (int c = 0; c < CHUNKS; c++) {
                    int64_t first = offset[t], second = offset[t + 1];
                    Bytes16 two = load<Bytes16>(data + (odd ? second : first) + at[c]);
                    RF_UNROLL
                    for (int i = 0; i < 2; i++) {
                        unsigned low = two.w[i], high = two.w[2 + i], mine = odd ? high : low;
                        unsigned other = (unsigned)shuffle_xor_bits<1>((int)(odd ? low : high));
                        to[t][c].w[i] = odd ? other : mine;
                        to[t + 1][c].w[i] = odd ? mine : other;
                    }
                }
                return;
            }
        }
        RF_UNROLL
        for (int t = 0; t < STEPS; t++) RF_UNROLL
        for (int c = 0; c < CHUNKS; c++) to[t][c] = load_chunk<SIZE>(data + offset[t] + at[c]);
    }

    RF_DEVICE_MEMBER void read_values(const rf_paged &pool, const int64_t *block, const int *offset,
                                      int64_t *at, Chunk<SIZE> (*to)[CHUNKS]) const {
        int head = tile.kv_head;
        RF_UNROLL
        for (int t = 0; t < STEPS; t++)
            at[t] = (block[t] * pool.block_stride + head * pool.head_stride +
                     (uint32_t)offset[t] * pool.token_stride) *
                    SIZE;
        read(pool, at, v_at, fresh(a).p.v_head_dim, to);
    }
    RF_DEVICE_MEMBER static void copy_chunks(const Chunk<SIZE> (*from)[CHUNKS],
                                             Chunk<SIZE> (*to)[CHUNKS]) {
        RF_UNROLL
        for (int t = 0; t < STEPS; t++) RF_UNROLL
        for (int c = 0; c < CHUNKS; c++) to[t][c] = from[t][c];
    }

    /* Products of the query with the keys of a token. */
    RF_DEVICE_MEMBER void multiply_key(const Chunk<SIZE> *key, float *dot) const {
        RF_UNROLL
        for (int c = 0; c < CHUNKS; c++) {
            Chunk<SIZE> k = key[c];
            RF_UNROLL
            for (int i = 0; i < 2 * SIZE; i++) k.w[i] = k_in[c] ? k.w[i] : 0;
            if constexpr (PAIRS) {
                unsigned x[4];
                pairs_of(k.w, x);
                RF_UNROLL
                for (int r = 0; r < ROWS; r++) RF_UNROLL
                for (int i = 0; i < 4; i++) dot[r] = add_pair<PAIR>(query[r][c][i], x[i], dot[r]);
            } else {
                float x[8];
                widen<DTYPE>(k, x);
                RF_UNROLL
                for (int r = 0; r < ROWS; r++) RF_UNROLL
                for (int i = 0; i < 8; i++) dot[r] += bits_to_float(query[r][c][i]) * x[i];
            }
        }
    }
    /* Eight elements of a key as the query has its own. A NaN among them makes the first one NaN.
     */
    RF_DEVICE_MEMBER static void pairs_of(const unsigned *w, unsigned *x) {
        if constexpr (SIZE == 1) {
            RF_UNROLL
            for (int i = 0; i < 2; i++) {
                Halves h = widen_bytes<DTYPE>(w[i], false);
                x[2 * i] = h.even, x[2 * i + 1] = h.odd;
            }
            if constexpr (MAY_BE_NAN<DTYPE>)
                x[0] = (nan_bytes<DTYPE>(w[0]) | nan_bytes<DTYPE>(w[1])) != 0 ? NAN_F16 : x[0];
        } else {
            RF_UNROLL
            for (int i = 0; i < 4; i++) x[i] = w[i];
        }
    }

    /* Probabilities times values. Guarded: not every row sees every token, and what it does not
     * see, NaN maybe, must not reach its sums. */
    template <bool GUARDED>
    RF_DEVICE_MEMBER void add_values(const Chunk<SIZE> (*value)[CHUNKS],
                                     const float (*weight)[STEPS], const float *v_scale) {
        (void)v_scale;
        if constexpr (PAIRS) {
            bool nan = false;
            if constexpr (MAY_BE_NAN<DTYPE>) {
                unsigned bytes = 0;
                RF_UNROLL
                for (int t = 0; t < STEPS; t++) RF_UNROLL
                for (int c = 0; c < CHUNKS; c++)
                    bytes |=
                        nan_bytes<DTYPE>(value[t][c].w[0]) | nan_bytes<DTYPE>(value[t][c].w[1]);
                nan = any(bytes != 0);
            }
            RF_UNROLL
            for (int t = 0; t < STEPS; t += 2) {
                unsigned p[ROWS], seen[ROWS];
                RF_UNROLL
                for (int r = 0; r < ROWS; r++) {
                    p[r] = pair<PAIR>(weight[r][t], weight[r][t + 1]);
                    seen[r] =
                        (weight[r][t] == 0 ? 0 : 0xffff) | (weight[r][t + 1] == 0 ? 0 : 0xffff0000);
                }
                RF_UNROLL
                for (int c = 0; c < CHUNKS; c++) RF_UNROLL
                for (int i = 0; i < 8; i += 2) {
                    unsigned x = value[t][c].w[i * SIZE / 4], y = value[t + 1][c].w[i * SIZE / 4];
                    Halves h = {halves<false>(x, y), halves<true>(x, y)};
                    if constexpr (SIZE == 1) h = widen_bytes<DTYPE>(i % 4 ? h.odd : h.even, nan);
                    RF_UNROLL
                    for (int r = 0; r < ROWS; r++) {
                        unsigned even = GUARDED ? h.even & seen[r] : h.even;
                        unsigned odd = GUARDED ? h.odd & seen[r] : h.odd;
                        sums[r][c][i] = add_pair<PAIR>(even, p[r], sums[r][c][i]);
                        sums[r][c][i + 1] = add_pair<PAIR>(odd, p[r], sums[r][c][i + 1]);
                    }
                }
            }
        } else {
            RF_UNROLL
            for (int t = 0; t < STEPS; t++) RF_UNROLL
            for (int c = 0; c < CHUNKS; c++) {
                float x[8];
                widen<DTYPE>(value[t][c], x);
                RF_UNROLL
                for (int r = 0; r < ROWS; r++) {
                    if (GUARDED && weight[r][t] == 0) continue;
                    float w = SCALED ? weight[r][t] * v_scale[t] : weight[r][t];
                    RF_UNROLL
                    for (int i = 0; i < 8; i++) sums[r][c][i] += w * x[i];
                }
            }
        }
    }

    /* Tokens first + side + i * SIDE; `blocks` has theirs.
     *
     * Straight-line code: every load is made, from the pool's first block where there is none of
     * its own and from the vector's first chunk past its last, and selected afterwards; a row that
     * the wave does not have is computed with a query of zeros. */
    template <bool GUARDED> RF_DEVICE_MEMBER void step(int first, const int *blocks) {
        /* With scales there is more to keep than scalar registers. */
        const rf_attention_params &p = SCALED ? fresh(a).p : a.p;
        int head = tile.kv_head;
        Chunk<SIZE> key[STEPS][CHUNKS], value[STEPS][CHUNKS];
        float weight[ROWS][STEPS], k_scale[STEPS], v_scale[STEPS], unweighed[STEPS];
        int offset[STEPS];
        int64_t block[STEPS], at[STEPS];
        bool k_scaled = SCALED && (!PAIRS || of_tokens(fresh(a).p.k_scale));
        bool v_scaled = SCALED && (!PAIRS || of_tokens(fresh(a).p.v_scale));
        RF_UNROLL
        for (int t = 0; t < STEPS; t++) {
            uint32_t token = (uint32_t)(first + side + t * SIDE);
            block[t] = larger(blocks[t], 0);
            offset[t] = (int)(token - rf_quotient(token, a.block_size) * a.block_size.value);
            at[t] = (block[t] * p.k.block_stride + head * p.k.head_stride +
                     (uint32_t)offset[t] * p.k.token_stride) *
                    SIZE;
        }
        read(p.k, at, k_at, fresh(a).p.head_dim, key);
        if (EARLY && !latent) read_values(p.v, block, offset, at, value);
        RF_UNROLL
        for (int t = 0; t < STEPS; t++) k_scale[t] = v_scale[t] = unweighed[t] = 1;
        if (k_scaled) {
            RF_UNROLL
            for (int t = 0; t < STEPS; t++)
                k_scale[t] = scale_at(fresh(a).p.k_scale, block[t], head, offset[t]);
        }
        if (v_scaled) {
            RF_UNROLL
            for (int t = 0; t < STEPS; t++)
                v_scale[t] = scale_at(fresh(a).p.v_scale, block[t], head, offset[t]);
        }

        RF_UNROLL
        for (int t = 0; t < STEPS; t++) {
            float dot[ROWS] = {};
            multiply_key(key[t], dot);
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) {
                weight[r][t] = sum<LANES>(dot[r]);
                if (PAIRS) weight[r][t] *= multiple[r];
            }
        }
        if (!EARLY) {
            keep_order(); /* values in the registers of keys */
            if (latent) copy_chunks(key, value);
            else read_values(p.v, block, offset, at, value);
        }
        if (k_scaled) {
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) RF_UNROLL
            for (int t = 0; t < STEPS; t++) weight[r][t] *= k_scale[t];
        }
        if (capped) {
            float cap = fresh(a).p.softcap * LOG2E;
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) RF_UNROLL
            for (int t = 0; t < STEPS; t++) weight[r][t] = cap * tanh(weight[r][t]);
        }
        if (biased) {
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) RF_UNROLL
            for (int t = 0; t < STEPS; t++)
                weight[r][t] += slope[r] * (float)(first + side + t * SIDE - position(r));
        }
        if (PAIRS && v_scaled) {
            RF_UNROLL
            for (int t = 0; t < STEPS; t++) {
                float moved = log2(blocks[t] < 0 ? 1.0f : v_scale[t]);
                moved = moved < -100 ? -100.0f : moved; /* of 0; NaN stays */
                /* Rows that see a scale of NaN have it in their weight; others must not get it. */
                if (moved == moved) unweighed[t] = exp2(-moved);
                RF_UNROLL
                for (int r = 0; r < ROWS; r++) weight[r][t] += moved;
            }
        }
        if (GUARDED) {
            bool masked = fresh(a).p.mask != nullptr;
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) RF_UNROLL
            for (int t = 0; t < STEPS; t++) {
                int seen = blocks[t] >= 0 && sees(r, first + side + t * SIDE, masked);
                if (STEPS == 1) seen = opaque(seen); /* or clang 22 forgets the line below */
                if (!seen) weight[r][t] = -INF;
            }
        }

        float top[ROWS];
        bool rises = false;
        RF_UNROLL
        for (int r = 0; r < ROWS; r++) {
            top[r] = m[r];
            RF_UNROLL
            for (int t = 0; t < STEPS; t++) top[r] = larger(top[r], weight[r][t]);
            rises |= top[r] > m[r] + LAG;
        }
        if (any(rises)) {
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) {
                float lower = top[r] == -INF ? 1.0f : exp2(m[r] - top[r]);
                m[r] = top[r];
                l[r] *= lower;
                RF_UNROLL
                for (int c = 0; c < CHUNKS; c++) RF_UNROLL
                for (int i = 0; i < 8; i++) sums[r][c][i] *= lower;
            }
        }
        RF_UNROLL
        for (int r = 0; r < ROWS; r++) {
            float base = m[r] == -INF ? 0.0f : m[r];
            RF_UNROLL
            for (int t = 0; t < STEPS; t++) {
                weight[r][t] = exp2(weight[r][t] - base);
                l[r] += PAIRS && SCALED ? weight[r][t] * unweighed[t] : weight[r][t];
            }
        }
        /* here: above, values would wait for the keys that they might be */
        if (EARLY && latent) copy_chunks(key, value);
        add_values<GUARDED>(value, weight, v_scale);
    }

    /* The blocks of a step's tokens; whether every row sees all of them. */
    RF_DEVICE_MEMBER bool look_up(int first, int low, int high, int *blocks) const {
        bool hole = false;
        RF_UNROLL
        for (int t = 0; t < STEPS; t++) {
            blocks[t] = block_of(first + side + t * SIDE);
            hole |= blocks[t] < 0;
        }
        return first >= low && first + TOKENS <= high && !any(hole);
    }

    /* The steps of this wave: number `turn`, turn + turns, ... of the share. */
    RF_DEVICE_MEMBER void run(int turn, int turns) {
        /* Tokens that every row of the wave sees, whatever the mask says of the new ones. */
        int low = 0, high = share.end;
        RF_UNROLL
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) continue;
            low = larger(low, range[r].low);
            high = smaller(high, range[r].high);
        }
        if (a.p.mask) high = smaller(high, tile.kv_len - tile.q_len);
        int first = share.begin + turn * TOKENS, blocks[STEPS];
        while (first < share.end) {
            bool steady = look_up(first, low, high, blocks);
            while (STEADY && steady) { /* a loop of its own: sums stay where they are */
                step<false>(first, blocks);
                first += turns * TOKENS;
                steady = look_up(first, low, high, blocks);
            }
            if (first >= share.end) break;
            step<true>(first, blocks);
            first += turns * TOKENS;
        }
        if constexpr (PAIRS && SCALED) {
            float scale = UNIT<DTYPE> * of_head(fresh(a).p.v_scale, tile.kv_head);
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) RF_UNROLL
            for (int c = 0; c < CHUNKS; c++) RF_UNROLL
            for (int i = 0; i < 8; i++) sums[r][c][i] *= scale;
        }
    }

    RF_DEVICE_MEMBER void merge_wave() {
        RF_UNROLL
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) continue;
            float top = maximum<WAVE, LANES>(m[r]);
            float factor = top == -INF ? 0.0f : exp2(m[r] - top);
            m[r] = top;
            l[r] = sum<WAVE, LANES>(l[r] * factor);
            RF_UNROLL
            for (int c = 0; c < CHUNKS; c++) RF_UNROLL
            for (int i = 0; i < 8; i++) sums[r][c][i] = sum<WAVE, LANES>(sums[r][c][i] * factor);
        }
    }

    /* Waves first, first + stride, ... (`turns` of them) had the same rows: row r of them all. */
    RF_DEVICE_MEMBER void merge_waves(const Shared &lds, int r, int first, int stride, int turns) {
        float top = -INF, total = 0;
        for (int i = 0; i < turns; i++) top = larger(top, lds.m[first + i * stride][r]);
        float base = top == -INF ? 0.0f : top;
        for (int i = 0; i < turns; i++)
            total += lds.l[first + i * stride][r] * exp2(lds.m[first + i * stride][r] - base);
        for (int chunk = lane(); 8 * chunk < fresh(a).p.v_head_dim; chunk += WAVE) {
            float out[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            for (int i = 0; i < turns; i++) {
                int w = first + i * stride;
                float factor = exp2(lds.m[w][r] - base);
                if (lds.m[w][r] == -INF) continue;
                RF_UNROLL
                for (int j = 0; j < 8; j++) out[j] += lds.sums[w][r][8 * chunk + j] * factor;
            }
            leave(fresh(a), tile, share.splits, group_z(), row0 + r, chunk, out, top, total);
        }
    }

    RF_DEVICE_MEMBER void operator()(Shared &lds) {
        if (!find_tile<TILE>(a, tile)) return;
        share = share_of(a, tile, group_z());
        share.splits = uniform(share.splits);
        if (group_z() >= share.splits) return;
        /* Waves with rows of their own: as many as the rows need, in powers of two. */
        int apart = tile.rows <= ROWS ? 1 : tile.rows <= 2 * ROWS ? 2 : RF_WAVES;
        int turns = RF_WAVES / apart, turn = wave() / apart;
        row0 = tile.row0 + wave() % apart * ROWS;
        rows = smaller(ROWS, tile.row0 + tile.rows - row0);
        /* opaque: with one token a wave its address is the wave's, and scalar registers spill */
        side = SIDE == 1 ? opaque(0) : lane() / LANES;
        part = lane() % LANES;
        if (rows > 0) {
            start();
            run(turn, turns);
            rows = uniform(opaque(rows)); /* or what it was compared with before is kept */
            merge_wave();
            RF_UNROLL
            for (int r = 0; r < ROWS; r++) {
                if (r >= rows || side != 0) continue;
                RF_UNROLL
                for (int c = 0; c < CHUNKS; c++) {
                    if (LANES * CHUNKS > VECTOR && part + c * LANES >= VECTOR) continue;
                    RF_UNROLL
                    for (int i = 0; i < 8; i++)
                        lds.sums[wave()][r][8 * (part + c * LANES) + i] = sums[r][c][i];
                }
                lds.m[wave()][r] = m[r];
                lds.l[wave()][r] = l[r];
            }
        }
        barrier();
        for (int r = turn; r < rows; r += turns) merge_waves(lds, r, wave() % apart, apart, turns);
        merge_if_last<TILE>(fresh(a), share.splits, lds.arrived);
    }
};

} // namespace rf

#define RF_KERNEL_OF(name, dtype, narrow, size, lanes, chunks)                                     \
    RF_KERNEL(paged_attention_##name##_d##size, rf_attention_launch) {                             \
        rf::attend<rf::Attention<dtype, narrow, lanes, chunks>>(p);                                \
    }
#define RF_KERNELS_OF_SIZE(size, lanes, chunks)                                                    \
    RF_KERNEL_OF(f32, RF_F32, false, size, lanes, chunks)                                          \
    RF_KERNEL_OF(f16, RF_F16, true, size, lanes, chunks)                                           \
    RF_KERNEL_OF(bf16, RF_BF16, true, size, lanes, chunks)                                         \
    RF_KERNEL_OF(e4m3fn, RF_E4M3FN, false, size, lanes, chunks)                                    \
    RF_KERNEL_OF(e4m3fnuz, RF_E4M3FNUZ, false, size, lanes, chunks)                                \
    RF_KERNEL_OF(i8, RF_I8, false, size, lanes, chunks)                                            \
    RF_KERNEL_OF(narrow_e4m3fn, RF_E4M3FN, true, size, lanes, chunks)                              \
    RF_KERNEL_OF(narrow_e4m3fnuz, RF_E4M3FNUZ, true, size, lanes, chunks)                          \
    RF_KERNEL_OF(narrow_i8, RF_I8, true, size, lanes, chunks)
RF_SIZE_INSTANCES(RF_KERNELS_OF_SIZE)

RF_KERNEL(paged_attention_reduce_r4, rf_attention_launch) {
    rf::reduce(p, RF_TILE_ROWS(RF_ROWS_OF(1)));
}
RF_KERNEL(paged_attention_reduce_r2, rf_attention_launch) {
    rf::reduce(p, RF_TILE_ROWS(RF_ROWS_OF(2)));
}
