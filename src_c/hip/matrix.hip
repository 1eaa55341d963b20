/* Attention by matrix instructions: decode, verification and prefill of 16-bit queries over caches
 * of the same type or of 8 bits, with heads of up to 256 elements. Mathematics, rows, tiles and
 * splits are those of attention.hip.
 *
 * Work: a workgroup has a tile of up to RF_MATRIX_ROWS rows; a wave has 16 of them as the columns
 * of its tiles of sums. What waves are left take turns at the tokens: all four with up to 16 rows,
 * two and two with up to 32. Keys and values that a wave reads serve all its rows.
 *
 * A step is STEP context tokens: logits^T = keys * query^T, then out^T += values^T * p^T, where the
 * probabilities go from the sums of the first product to the operand of the second in the registers
 * of their lanes (matrix.h). Keys come as operands from memory, 16 bytes a lane and load: lane
 * (column, group) reads eight neighbouring elements of the token that is its row. Values come as
 * WIDTH neighbouring elements of the SLOTS tokens that a lane contracts, and are transposed by
 * v_perm: the columns of that patch are operands of as many products, whose row is the lane's piece
 * of the head. So a lane's sums are whole pieces of its own query row, which leave in 16 bytes.
 * Only the query lies in LDS, read again in each step; in the end the waves' states pass through
 * it. Kernels are for 64, 128 and 256 elements; where a head has fewer, its last bytes are read in
 * the place of what is past them.
 *
 * A step is steady when its blocks hold 16 tokens each that all rows see: then addresses are
 * scalar, and ids are read two steps ahead. Where registers allow (AHEAD) keys and values of the
 * next step are read as soon as those of this one are used; elsewhere other waves fill the time.
 * What a mask, a hole or an end touches, and other block sizes, look blocks up lane by lane.
 *
 * The softmax is in base 2. Probabilities are relative to a base m that is LIFT below a maximum; it
 * is replaced, and the sums rescaled, when a logit of the wave exceeds it by more than LAG, 2^LAG
 * being the most that float16 holds. So those 2^-25 times the largest are normal numbers of float16
 * still, which have all its bits and count on gfx90a (FLUSHES). Probabilities are rounded to the
 * cache's type, their sum is not.
 *
 * 8-bit elements become float16 in registers (matrix.h), keys where they are multiplied, values
 * after they are transposed; all products are of float16. A key's 16 bytes are two operands, so the
 * query lies in LDS in that order. Scales of a head move into the logits' factor and the output's;
 * those of tokens multiply logits one by one, and as values' scales they become part of the
 * exponent of the probability, since their product with it need not be a float16: p = exp2(logit +
 * log2(scale)
 * - m), with m the maximum of that, while the sum is of exp2(logit - m) and stays float32.
 *
 * Tokens must have finite values: a row that does not see one weighs them with 0. Those of tokens
 * past the ends or in holes are set to zero.
 *
 * LDS: 64 rows of the query: 8, 16 or 32 KiB.
 *
 * Nothing here was timed on a GPU. Versions tried, vector registers for 128 elements of bfloat16 on
 * gfx942 and gfx1100 (256 is the most that gfx1100 has):
 *   steady and guarded steps as two loops, 32 rows a wave     340   256, 646 spilled
 *   16 rows a wave                                            216   256, 113 spilled
 *   keys and values of one step at a time on gfx11            208   256: two copies of the sums
 *   one loop, the steps' difference in how they read          212   256, 47 spilled
 *   each product pinned to its place, query read from LDS     160   181: what is here
 *   and 32 rows a wave for prefill on gfx942                  212   7 scalars spilled
 * 8-bit caches, the same sizes: 126 and 191; for 256 elements 190 and 229. LDS for what undoes the
 * rows' powers of two beside the query, not before it, cost gfx942 one of two workgroups of 256.
 * Heads of other sizes: where each read is, kept in registers, took 14 and 12 more, computed for
 * each read none. */
#include "attention.h"
#include "matrix.h"

namespace rf {

template <int DTYPE, int DIM> struct MatrixAttention {
    static constexpr int SIZE = SIZE_OF<DTYPE>;
    static constexpr bool EIGHT = SIZE == 1;
    static constexpr int OPERANDS = EIGHT ? RF_F16 : DTYPE; /* their type */
    static constexpr int UNITS = DIM / DEPTH;               /* operands of a vector */
    /* Elements of a value's piece: a vector has PIECES of 16 lanes. gfx11 gives operands twice, and
     * has no registers for eight elements of that beside the sums of 256. */
    static constexpr int WIDTH = DIM == 64 || (DIM == 256 && WHOLE && !EIGHT) ? 4
                                 : DIM == 256 && EIGHT && !WHOLE              ? 16
                                                                              : 8;
    static constexpr int PIECES = DIM / 16 / WIDTH;
    static constexpr int TILES = DIM / 16; /* tiles of sums */
    static constexpr int STEP = DEPTH;     /* tokens */
    static constexpr float LIFT = 11, LAG = 15;
    /* Keys and values of the next step are read during this one where registers allow: words of
     * the sums, of keys and of values. */
    static constexpr bool AHEAD =
        PIECES == 1 && TILES * PER + DIM * (SUBTILES + 1) * SLOTS / DEPTH * SIZE / 4 <= 128;

    static constexpr int CHUNKS = DIM / (8 * GROUPS); /* of 8 elements, that a lane has of a row */

    union Shared {
        float unscale[RF_MATRIX_ROWS];
        Bytes16 query[RF_MATRIX_ROWS / 16][CHUNKS][WAVE];
        float state[TILES * PER + 2][WAVE];
        uint32_t arrived;
    };

    /* Of a step: one of PIECES parts. */
    struct Keys {
        unsigned w[SUBTILES][UNITS / PIECES][SLOTS * SIZE / 4];
    };
    struct Values {
        unsigned w[SLOTS][WIDTH * SIZE / 4];
    };
    /* A step. Steady: every row sees all of its tokens, and each of its 16 lie in one block, whose
     * vectors begin at k, v. Uniform. */
    struct Step {
        int first;
        int steady; /* no bool: the padding after it was copied through scratch memory */
        const char *k[SUBTILES], *v[SUBTILES];
    };

    const rf_attention_launch &a;
    Shared &lds;
    Tile tile;
    Share share;
    int begin, end, low, high; /* tokens that some row of the wave sees; that all of them see */
    unsigned k_lane, v_lane;   /* bytes from a tile's first vector to what this lane reads */
    bool capped, biased, masked;
    float factor, unscale; /* of logits: for all rows, and what undoes that of this lane's query */

    RF_DEVICE_MEMBER MatrixAttention(const rf_attention_launch &launch, Shared &shared)
        : a(launch), lds(shared) {}

    /* ---------------------------------------------------------------- what is read */

    /* A lane begins at byte `lane` of a vector, and where it has come past the end it reads what it
     * may read last once more: a query of zeros meets that, or it makes sums that nobody wants.
     * opaque: or the places of all reads are kept in registers. */
    RF_DEVICE_MEMBER void read_key(const char *p, unsigned lane, int piece,
                                   unsigned (*to)[SLOTS * SIZE / 4]) const {
        int room = a.p.head_dim * SIZE - 16 - 2 * opaque(first_slot());
        RF_UNROLL
        for (int i = 0; i < UNITS / PIECES * SLOTS * SIZE / 16; i++) {
            int on = 16 * SIZE * WIDTH * piece + 16 * DEPTH / SLOTS * i;
            Bytes16 b = load<Bytes16>(p + (lane + smaller(on, room)));
            RF_UNROLL
            for (int j = 0; j < 4; j++)
                to[(4 * i + j) / (SLOTS * SIZE / 4)][(4 * i + j) % (SLOTS * SIZE / 4)] = b.w[j];
        }
    }
    RF_DEVICE_MEMBER unsigned value_at(unsigned lane, int piece) const {
        int room = (a.p.v_head_dim - WIDTH - WIDTH * opaque(row())) * SIZE;
        return lane + smaller(16 * SIZE * WIDTH * piece, room);
    }
    RF_DEVICE_MEMBER static void read_value(const char *p, unsigned *to) {
        if constexpr (WIDTH * SIZE == 16) {
            Bytes16 b = load<Bytes16>(p);
            RF_UNROLL
            for (int j = 0; j < 4; j++) to[j] = b.w[j];
        } else if constexpr (WIDTH * SIZE == 8) {
            Bytes8 b = load<Bytes8>(p);
            to[0] = b.w[0], to[1] = b.w[1];
        } else to[0] = load<unsigned>(p);
    }

    /* A block of the sequence's, or -1. No branch: whether there is one or not, something is read.
     */
    RF_DEVICE_MEMBER int checked(int block) const {
        return (uint32_t)block < (uint64_t)a.p.num_blocks ? block : -1;
    }
    RF_DEVICE_MEMBER int block_of(int token) const {
        int inside = larger(begin, smaller(token, end - 1));
        int block = load<int32_t>(tile.blocks + rf_quotient((uint32_t)inside, a.block_size));
        return inside == token ? checked(block) : -1;
    }
    RF_DEVICE_MEMBER const char *vector_at(const rf_paged &pool, int block, int token) const {
        int offset = token - (int)(rf_quotient((uint32_t)token, a.block_size) * a.block_size.value);
        return static_cast<const char *>(pool.data) +
               (larger(block, 0) * pool.block_stride + tile.kv_head * pool.head_stride +
                offset * pool.token_stride) *
                   SIZE;
    }

    /* The blocks of a step's tiles, if it may be steady; the step, once they are known. */
    RF_DEVICE_MEMBER void read_ids(int first, int *ids) const {
        bool yes = first >= low && first + STEP <= high && a.block_size.value % 16 == 0;
        RF_UNROLL
        for (int s = 0; s < SUBTILES; s++) {
            ids[s] = -1;
            if (yes)
                ids[s] = uniform_load<int32_t>(
                    tile.blocks + rf_quotient((uint32_t)(first + 16 * s), a.block_size));
        }
    }
    RF_DEVICE_MEMBER Step step_at(int first, const int *ids) const {
        Step step;
        step.first = first;
        step.steady = 1;
        RF_UNROLL
        for (int s = 0; s < SUBTILES; s++) {
            step.steady &= checked(ids[s]) >= 0;
            step.k[s] = vector_at(a.p.k, ids[s], first + 16 * s);
            step.v[s] = vector_at(a.p.v, ids[s], first + 16 * s);
        }
        return step;
    }

    RF_DEVICE_MEMBER void read_keys(const Step &step, int piece, Keys &keys) const {
        if (step.steady) {
            RF_UNROLL
            for (int s = 0; s < SUBTILES; s++) read_key(step.k[s], k_lane, piece, keys.w[s]);
        } else {
            RF_UNROLL
            for (int s = 0; s < SUBTILES; s++) {
                int token = step.first + 16 * s + row();
                read_key(vector_at(a.p.k, block_of(token), token), 2 * first_slot(), piece,
                         keys.w[s]);
            }
        }
    }
    /* Those of tokens past the ends or in holes are zeros: 0 times NaN would be NaN. */
    RF_DEVICE_MEMBER void read_values(const Step &step, int piece, Values &values) const {
        if (step.steady) {
            int64_t stride = fresh(a).p.v.token_stride * SIZE;
            unsigned at = value_at(v_lane, piece);
            RF_UNROLL
            for (int i = 0; i < SLOTS; i++)
                read_value(step.v[slot_row(i) / 16] + slot_row(i) % 16 * stride + at, values.w[i]);
        } else {
            unsigned at = value_at(SIZE * WIDTH * row(), piece);
            RF_UNROLL
            for (int i = 0; i < SLOTS; i++) {
                int token = step.first + slot_row(i) + slot_group(), block = block_of(token);
                read_value(vector_at(a.p.v, block, token) + at, values.w[i]);
                RF_UNROLL
                for (int j = 0; j < WIDTH * SIZE / 4; j++)
                    values.w[i][j] = block < 0 ? 0 : values.w[i][j];
            }
        }
    }

    /* ---------------------------------------------------------------- scales of 8-bit caches */

    RF_DEVICE_MEMBER static bool of_tokens(const rf_scales &s) { return EIGHT && rf::of_tokens(s); }
    /* Of the tokens of this lane's sums. Where there is no block, that of some other token. */
    RF_DEVICE_MEMBER void read_scales(const rf_scales &s, const Step &step, Sums *to) const {
        const float *head = s.data + tile.kv_head * s.head_stride;
        RF_UNROLL
        for (int t = 0; t < SUBTILES; t++) {
            /* opaque: addresses in vector registers, or scalar ones spill */
            int first = opaque(step.first + 16 * t + PER * group()), block = 0;
            RF_UNROLL
            for (int i = 0; i < PER; i++) {
                int token = first + i;
                if (i == 0 || !step.steady) block = larger(block_of(token), 0);
                int before = (int)(rf_quotient((uint32_t)token, a.block_size) * a.block_size.value);
                to[t].x[i] =
                    load<float>(head + block * s.block_stride + (token - before) * s.token_stride);
            }
        }
    }

    /* ---------------------------------------------------------------- rows of a wave */

    struct Wave {
        const MatrixAttention &k;
        int index; /* of the workgroup's tiles of 16 rows, the wave's */
        Range range;
        int position;
        float factor, slope, m, l;
        Sums sums[TILES];

        RF_DEVICE_MEMBER Wave(const MatrixAttention &kernel, int first) : k(kernel), index(first) {}

        /* In the sequence: of this lane. */
        RF_DEVICE_MEMBER int row_of() const { return k.tile.row0 + 16 * index + column(); }
        /* opaque: or each lane's answer is kept in scalar registers, which spilled */
        RF_DEVICE_MEMBER bool has() const { return opaque(row_of()) < k.tile.row0 + k.tile.rows; }

        RF_DEVICE_MEMBER void start() {
            const rf_attention_params &p = k.a.p;
            m = -INF;
            l = slope = 0;
            factor = k.factor;
            if constexpr (EIGHT) factor *= k.unscale;
            range = {0, 0};
            position = 0;
            RF_UNROLL
            for (int t = 0; t < TILES; t++) RF_UNROLL
            for (int i = 0; i < PER; i++) sums[t].x[i] = 0;
            if (!has()) return;
            int token = (int)rf_quotient((uint32_t)row_of(), k.a.group);
            position = k.tile.kv_len - k.tile.q_len + token;
            range = visible(p, k.tile, row_of(), (int)k.a.group.value);
            if (p.alibi_slopes) {
                int head = (k.tile.kv_head - token) * (int)k.a.group.value + row_of();
                slope = load<float>(p.alibi_slopes + head) * LOG2E;
            }
        }

        RF_DEVICE_MEMBER bool sees(int token) const {
            bool yes = token >= range.low && token < range.high;
            int added = token - (k.tile.kv_len - k.tile.q_len);
            if (k.masked && yes && added >= 0) {
                const rf_attention_launch &b = fresh(k.a);
                int mine = position - (k.tile.kv_len - k.tile.q_len);
                yes = added < b.mask_width &&
                      load<uint8_t>(b.p.mask + (k.tile.token0 + mine) * b.p.mask_stride + added);
            }
            return yes;
        }

        RF_DEVICE_MEMBER void multiply_keys(const Keys &keys, int piece, Sums *logits) const {
            int from = opaque(WHOLE ? column() : lane()); /* or the query is kept in registers */
            unsigned nan[SUBTILES] = {};
            RF_UNROLL
            for (int s = 0; s < SUBTILES; s++) RF_UNROLL
            for (int u = 0; u < UNITS / PIECES; u++) RF_UNROLL
            for (int i = 0; i < SLOTS * SIZE / 4; i++) nan[s] |= nan_bytes<DTYPE>(keys.w[s][u][i]);
            RF_UNROLL
            for (int u = 0; u < UNITS / PIECES; u++) {
                Operand q;
                RF_UNROLL
                for (int i = 0; i < SLOTS / 8; i++) {
                    Bytes16 b = k.lds.query[index][u + piece * (UNITS / PIECES)][from + 16 * i];
                    RF_UNROLL
                    for (int j = 0; j < 4; j++) q.w[4 * i + j] = b.w[j];
                }
                RF_UNROLL
                for (int s = 0; s < SUBTILES; s++) {
                    Operand key = operand_of_words<DTYPE>(keys.w[s][u]);
                    if (EIGHT && u == 0) key.w[0] = nan[s] ? NAN_F16 : key.w[0];
                    product<OPERANDS>(key, q, logits[s]);
                }
                if (WAVE == 32 && u % 2 == 1) keep_order();
            }
        }

        /* Logits of a step become probabilities. */
        RF_DEVICE_MEMBER void weigh(const Step &step, Sums *x) {
            int mine = step.first + PER * group();
            RF_UNROLL
            for (int s = 0; s < SUBTILES; s++) RF_UNROLL
            for (int i = 0; i < PER; i++) x[s].x[i] *= factor;
            if (of_tokens(fresh(k.a).p.k_scale)) { /* kept, they would spill */
                Sums scale[SUBTILES];
                k.read_scales(fresh(k.a).p.k_scale, step, scale);
                RF_UNROLL
                for (int s = 0; s < SUBTILES; s++) RF_UNROLL
                for (int i = 0; i < PER; i++) x[s].x[i] *= scale[s].x[i];
            }
            if (k.capped) {
                float cap = fresh(k.a).p.softcap * LOG2E;
                RF_UNROLL
                for (int s = 0; s < SUBTILES; s++) RF_UNROLL
                for (int i = 0; i < PER; i++) x[s].x[i] = cap * tanh(x[s].x[i]);
            }
            if (k.biased) {
                RF_UNROLL
                for (int s = 0; s < SUBTILES; s++) RF_UNROLL
                for (int i = 0; i < PER; i++)
                    x[s].x[i] += slope * (float)(mine + 16 * s + i - position);
            }
            if (!step.steady) {
                RF_UNROLL
                for (int s = 0; s < SUBTILES; s++) RF_UNROLL
                for (int i = 0; i < PER; i++) {
                    int token = mine + 16 * s + i;
                    if (k.block_of(token) < 0 || !sees(token)) x[s].x[i] = -INF;
                }
            }
            Sums seen[SUBTILES] = {}; /* logits of the sum, where values have other weights */
            bool scaled = of_tokens(fresh(k.a).p.v_scale);
            if (scaled) {
                Sums scale[SUBTILES];
                k.read_scales(fresh(k.a).p.v_scale, step, scale);
                RF_UNROLL
                for (int s = 0; s < SUBTILES; s++) RF_UNROLL
                for (int i = 0; i < PER; i++) {
                    float moved = log2(scale[s].x[i]);
                    moved = moved < -100 ? -100.0f : moved; /* of 0; NaN stays */
                    seen[s].x[i] = x[s].x[i];
                    x[s].x[i] = x[s].x[i] == -INF ? -INF : x[s].x[i] + moved;
                }
            }
            float top = x[0].x[0];
            RF_UNROLL
            for (int s = 0; s < SUBTILES; s++) RF_UNROLL
            for (int i = 0; i < PER; i++) top = larger(x[s].x[i], top);
            if (any(top > m + LAG)) {
                top = maximum<WAVE, 16>(larger(m, top - LIFT));
                float scale = top == -INF ? 1.0f : exp2(m - top);
                m = top;
                l *= scale;
                RF_UNROLL
                for (int t = 0; t < TILES; t++) RF_UNROLL
                for (int i = 0; i < PER; i++) sums[t].x[i] *= scale;
            }
            float base = m == -INF ? 0.0f : m;
            RF_UNROLL
            for (int s = 0; s < SUBTILES; s++) RF_UNROLL
            for (int i = 0; i < PER; i++) {
                x[s].x[i] = exp2(x[s].x[i] - base);
                l += scaled ? exp2(seen[s].x[i] - base) : x[s].x[i];
            }
        }

        /* Two neighbouring elements at a time: of a word, or of half a word of 8-bit ones. */
        RF_DEVICE_MEMBER void add_values(const Values &values, int piece, const Operand &p) {
            bool nan = false;
            if constexpr (MAY_BE_NAN<DTYPE>) {
                unsigned bytes = 0;
                RF_UNROLL
                for (int i = 0; i < SLOTS; i++) RF_UNROLL
                for (int j = 0; j < WIDTH / 4; j++) bytes |= nan_bytes<DTYPE>(values.w[i][j]);
                nan = any(bytes != 0);
            }
            RF_UNROLL
            for (int j = 0; j < WIDTH; j += 2) {
                Operand even, odd;
                RF_UNROLL
                for (int i = 0; i < SLOTS / 2; i++) {
                    unsigned x = values.w[2 * i][j * SIZE / 4];
                    unsigned y = values.w[2 * i + 1][j * SIZE / 4];
                    Halves h = EIGHT ? widen_bytes<DTYPE>(
                                           j % 4 ? halves<true>(x, y) : halves<false>(x, y), nan)
                                     : Halves{halves<false>(x, y), halves<true>(x, y)};
                    even.w[i] = h.even, odd.w[i] = h.odd;
                }
                product<OPERANDS>(even, p, sums[piece * WIDTH + j]);
                product<OPERANDS>(odd, p, sums[piece * WIDTH + j + 1]);
                if (WAVE == 32) keep_order(); /* or all of the operands are made at once */
            }
        }

        RF_DEVICE_MEMBER void run(int turn, int turns) {
            int first = k.begin / 16 * 16 + turn * STEP, stride = turns * STEP, ids[SUBTILES];
            if (first >= k.end) return;
            Keys keys;
            Values values;
            Operand p;
            k.read_ids(first, ids);
            Step step = k.step_at(first, ids);
            if constexpr (AHEAD) {
                k.read_keys(step, 0, keys);
                k.read_values(step, 0, values);
            }
            k.read_ids(first + stride, ids);
            for (;;) {
                Sums x[SUBTILES] = {};
                int after = step.first + stride;
                bool more = after < k.end;
                if constexpr (AHEAD) {
                    Step next = step; /* after the last step: once more what is there */
                    if (more) next = k.step_at(after, ids);
                    k.read_ids(after + stride, ids);
                    multiply_keys(keys, 0, x);
                    keep_order();
                    k.read_keys(next, 0, keys);
                    weigh(step, x);
                    p = operand_of<OPERANDS>(x);
                    add_values(values, 0, p);
                    keep_order();
                    k.read_values(next, 0, values);
                    step = next;
                } else {
                    RF_UNROLL
                    for (int piece = 0; piece < PIECES; piece++) {
                        k.read_keys(step, piece, keys);
                        multiply_keys(keys, piece, x);
                        keep_order();
                    }
                    k.read_values(step, 0, values);
                    weigh(step, x);
                    p = operand_of<OPERANDS>(x);
                    add_values(values, 0, p);
                    RF_UNROLL
                    for (int piece = 1; piece < PIECES; piece++) {
                        keep_order();
                        k.read_values(step, piece, values);
                        add_values(values, piece, p);
                    }
                    keep_order();
                    step = k.step_at(after, ids);
                    k.read_ids(after + stride, ids);
                }
                if (!more) return;
            }
        }

        /* The states of waves with the same rows, one after the other, to that of turn 0. */
        RF_DEVICE_MEMBER void merge(int slot, int turn, int turns) {
            for (int other = 1; other < turns; other++)
                for (int s = 0; s < RF_WAVES / turns; s++) {
                    barrier(); /* nobody needs what is there: the query, or the state before */
                    if (s == slot && turn == other) give();
                    barrier();
                    if (s == slot && turn == 0) take();
                }
        }
        RF_DEVICE_MEMBER void give() const {
            float(*state)[WAVE] = k.lds.state;
            RF_UNROLL
            for (int t = 0; t < TILES; t++) RF_UNROLL
            for (int i = 0; i < PER; i++) state[t * PER + i][lane()] = sums[t].x[i];
            state[TILES * PER][lane()] = m;
            state[TILES * PER + 1][lane()] = l;
        }
        RF_DEVICE_MEMBER void take() {
            const float(*state)[WAVE] = k.lds.state;
            float its = state[TILES * PER][lane()], top = larger(its, m);
            float base = top == -INF ? 0.0f : top;
            float mine = exp2(m - base), theirs = exp2(its - base);
            m = top;
            l = l * mine + state[TILES * PER + 1][lane()] * theirs;
            RF_UNROLL
            for (int t = 0; t < TILES; t++) {
                RF_UNROLL
                for (int i = 0; i < PER; i++)
                    sums[t].x[i] = sums[t].x[i] * mine + state[t * PER + i][lane()] * theirs;
                keep_order(); /* not all of the state in registers at once */
            }
        }

        RF_DEVICE_MEMBER void finish() {
            float total = sum<WAVE, 16>(l);
            if (!has()) return;
            float scale =
                EIGHT ? UNIT<DTYPE> * of_head(fresh(k.a).p.v_scale, k.tile.kv_head) : 1.0f;
            RF_UNROLL
            for (int i = 0; i < PER * PIECES * WIDTH / 8; i++) {
                float out[8];
                int chunk;
                if constexpr (WIDTH >= 8) {
                    constexpr int chunks = WIDTH / 8;
                    int piece = i / (PER * chunks), r = i / chunks % PER, c = i % chunks;
                    chunk = (16 * piece + PER * group() + r) * chunks + c;
                    RF_UNROLL
                    for (int j = 0; j < 8; j++) out[j] = sums[WIDTH * piece + 8 * c + j].x[r];
                } else {
                    int piece = 2 * i / PER, two = 2 * i % PER;
                    chunk = 8 * piece + (PER * group() + two) / 2;
                    RF_UNROLL
                    for (int j = 0; j < 8; j++) out[j] = sums[4 * piece + j % 4].x[two + j / 4];
                }
                RF_UNROLL
                for (int j = 0; j < 8; j++) out[j] = EIGHT ? out[j] * scale : out[j];
                if (8 * chunk < fresh(k.a).p.v_head_dim)
                    leave(fresh(k.a), k.tile, k.share.splits, group_z(), row_of(), chunk, out, m,
                          total);
            }
        }

        RF_DEVICE_MEMBER void operator()(int slot, int turn, int turns) {
            start();
            run(turn, turns);
            merge(slot, turn, turns);
            if (turn == 0) finish();
        }
    };

    /* ---------------------------------------------------------------- a workgroup */

    /* A row of the query a lane and its groups; zeros past the tile's rows. */
    RF_DEVICE_MEMBER void read_query(int index, Bytes16 *chunks) const {
        const rf_attention_params &p = a.p;
        int mine = 16 * index + column();
        const char *at = nullptr;
        if (mine < tile.rows) {
            int token = (int)rf_quotient((uint32_t)(tile.row0 + mine), a.group);
            int head = (tile.kv_head - token) * (int)a.group.value + tile.row0 + mine;
            at = static_cast<const char *>(p.query.data) +
                 ((tile.token0 + token) * p.query.token_stride + head * p.query.head_stride) * 2;
        }
        RF_UNROLL
        for (int u = 0; u < CHUNKS; u++) {
            /* 16 bytes of an 8-bit key are two operands. */
            int chunk =
                EIGHT && !WHOLE ? 2 * (GROUPS * (u / 2) + group()) + u % 2 : GROUPS * u + group();
            chunks[u] = {{0, 0, 0, 0}};
            if (at && 8 * chunk < p.head_dim) chunks[u] = load<Bytes16>(at + 16 * chunk);
        }
    }

    /* Each wave has one of the tile's four times 16 rows brought to LDS. */
    RF_DEVICE_MEMBER void share_query(int index) {
        Bytes16 chunks[CHUNKS];
        read_query(wave(), chunks);
        if constexpr (EIGHT) {
            lds.unscale[16 * wave() + column()] =
                narrow_query<CHUNKS, WAVE, 16>(a.p.dtype, reinterpret_cast<unsigned(*)[4]>(chunks));
            barrier();
            unscale = lds.unscale[16 * index + column()];
            barrier();
        }
        RF_UNROLL
        for (int u = 0; u < CHUNKS; u++) lds.query[wave()][u][lane()] = chunks[u];
        barrier();
    }

    RF_DEVICE_MEMBER void run(int index, int apart) {
        int last = smaller(16 * (index + 1), tile.rows) - 1;
        begin = end = low = high = 0;
        if (16 * index <= last) {
            int group = (int)a.group.value;
            Range of_first = visible(a.p, tile, tile.row0 + 16 * index, group);
            Range of_last = visible(a.p, tile, tile.row0 + last, group);
            begin = uniform(larger(share.begin, of_first.low));
            end = uniform(smaller(share.end, of_last.high));
            low = uniform(larger(begin, of_last.low));
            high = uniform(smaller(end, of_first.high));
            if (masked) high = smaller(high, tile.kv_len - tile.q_len);
        }
        Wave{*this, index}(index, wave() / apart, RF_WAVES / apart);
    }

    RF_DEVICE_MEMBER void operator()() {
        const rf_attention_params &p = a.p;
        if (!find_tile<RF_MATRIX_ROWS>(a, tile)) return;
        tile.rows = uniform(tile.rows), tile.row0 = uniform(tile.row0);
        tile.kv_len = uniform(tile.kv_len), tile.q_len = uniform(tile.q_len);
        share = share_of(a, tile, group_z());
        share.splits = uniform(share.splits);
        if (group_z() >= share.splits) return;
        capped = p.softcap > 0;
        factor = capped ? p.scale / p.softcap : p.scale * LOG2E;
        if constexpr (EIGHT) {
            factor *= UNIT<DTYPE> * of_head(p.k_scale, tile.kv_head);
        }
        biased = p.alibi_slopes != nullptr;
        masked = p.mask != nullptr;
        k_lane = (unsigned)(row() * p.k.token_stride * SIZE) + 2 * first_slot();
        v_lane = (unsigned)(slot_group() * p.v.token_stride + row() * WIDTH) * SIZE;
        int tiles = (tile.rows + 15) / 16, apart = tiles <= 2 ? tiles : 4;
        share_query(wave() % apart);
        run(wave() % apart, apart);
        merge_if_last<RF_MATRIX_ROWS>(fresh(a), share.splits, lds.arrived);
    }
};

template <int DTYPE, int DIM> RF_DEVICE void attend_by_matrix(const rf_attention_launch &p) {
    using Kernel = MatrixAttention<DTYPE, DIM>;
    RF_SHARED(typename Kernel::Shared, lds);
    Kernel{p, lds}();
}

} // namespace rf

#define RF_MATRIX_KERNEL(name, dtype, dim)                                                         \
    RF_KERNEL(paged_attention_matrix_##name##_d##dim, rf_attention_launch) {                       \
        rf::attend_by_matrix<dtype, dim>(p);                                                       \
    }
RF_MATRIX_INSTANCES(RF_MATRIX_KERNEL)

RF_KERNEL(paged_attention_matrix_reduce, rf_attention_launch) { rf::reduce(p, RF_MATRIX_ROWS); }
