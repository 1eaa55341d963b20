/* Two partial results over different keys of the same queries, each with its log-sum-exp, to one.
 *
 * Each (token, head) belongs to RF_WRITE_LANES lanes, which take its chunks of 8 elements in turn.
 * A part with log-sum-exp -inf has seen no key: what its output holds is not read. No LDS. */
#include "element.h"

namespace rf {

RF_DEVICE void merge(const rf_merge_launch &a) {
    const rf_merge_params &p = a.p;
    int64_t index = ((int64_t)group_x() * RF_WAVES + wave()) * (WAVE / RF_WRITE_LANES) +
                    lane() / RF_WRITE_LANES;
    if (index >= p.num_tokens * p.num_heads) return;
    int64_t token = rf_quotient((uint32_t)index, a.heads);
    int head = (int)(index - token * p.num_heads);
    float x = load<float>(p.lse_a + index), y = load<float>(p.lse_b + index);
    float top = x == x && y == y ? larger(x, y) : x + y; /* NaN stays */
    float base = top == -INF ? 0.0f : top;
    float of_a = exp2((x - base) * LOG2E), of_b = exp2((y - base) * LOG2E);
    float total = of_a + of_b, inverse = total == 0 ? 0.0f : 1.0f / total;
    for (int chunk = lane() % RF_WRITE_LANES; 8 * chunk < p.head_dim; chunk += RF_WRITE_LANES) {
        float u[8] = {0, 0, 0, 0, 0, 0, 0, 0}, v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, out[8];
        if (x != -INF)
            load_wide(p.a.data, token * p.a.token_stride + head * p.a.head_stride + 8 * chunk,
                      p.dtype, u);
        if (y != -INF)
            load_wide(p.b.data, token * p.b.token_stride + head * p.b.head_stride + 8 * chunk,
                      p.dtype, v);
        RF_UNROLL
        for (int i = 0; i < 8; i++) out[i] = (u[i] * of_a + v[i] * of_b) * inverse;
        store_wide(p.out.data, token * p.out.token_stride + head * p.out.head_stride + 8 * chunk,
                   p.dtype, out);
    }
    /* Written by the lane that read them last: it may be lse_a or lse_b that is written to. */
    wave_barrier();
    if (lane() % RF_WRITE_LANES == 0 && p.lse)
        store(p.lse + index, total == 0 ? -INF : base + log2(total) * LN2);
}

} // namespace rf

RF_KERNEL(merge_states, rf_merge_launch) { rf::merge(p); }
