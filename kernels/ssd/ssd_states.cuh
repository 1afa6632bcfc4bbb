// What ssd_states.cu and ssd_states_groups.cu have in common.
#pragma once
#include "ssd/ssd.cuh"

struct States {
    Map x, dy, dt, B, C;
    Steps step;
    // Of each span, (batch, heads, spans, dim, state): what enters, null for zeros; what leaves,
    // and the logarithm of the decay (batch, heads, spans), null if not wanted.
    const float *entries, *grad_entries;
    float *ends, *grad_ends, *sums;
    void *states, *grad_states;  // (batch, heads, chunks, dim, state), null if not wanted
    int backwards;  // 0: states, 1: gradients, for the first blocks in z
    // A block has 16 * SLICES channels, of which there are `columns` parts, and N of the states.
    int length, heads, per_group, dim, state, columns, parts, chunks, span, spans, reverse;
};

// Stores the states of channels `channel` and 8 further, from `first` on, as a warp has them: lane
// 4 g + t the states 8 n + 2 t and the next one, of the first channel in v[n][0] and v[n][1]. Those of
// all channels begin at `states` + `to`.
template <class T, int TILES>
__device__ __forceinline__ void store_states(const States &p, void *states, long long to,
                                             int channel, int first, const float (&v)[TILES][4]) {
    const int t = threadIdx.x & 3;
    auto four = [&](int n, int k) {
        return Four<T>(pack<T>(v[2 * n][2 * k], v[2 * n][2 * k + 1]),
                       pack<T>(v[2 * n + 1][2 * k], v[2 * n + 1][2 * k + 1]));
    };
    constexpr int AT_ONCE = TILES > 2 && !same<T, Float> ? 2 : 1;  // blocks
#pragma unroll
    for (int n = 0; n < TILES / 2; n += AT_ONCE)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int c = channel + 8 * k, s = first + BLOCK * n;
            Element<T> *const at = (Element<T> *)states + to + (long long)c * p.state + s;
            if constexpr (AT_ONCE == 2) {
                store_eight<T>(at, four(n, k), four(n + 1, k), c < p.dim && s + t * 8 < p.state);
            } else {
                const Four<T> four_states = four(n, k);
                if (c < p.dim && s + first_column(t) < p.state)
                    four_states.store(at + first_column(t));
            }
        }
}
