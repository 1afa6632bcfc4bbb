// Forward of ss2d_scan for N = 1 on half-precision maps, where spans are not of whole images. A block
// walks a span of one route, to a map of its own. The span is cut into 8 runs, one for each 4 lanes
// of a warp, which take a slot of their own at a time, so that no lane waits for another's state.
// First the SUMMARY: what the runs do to a state. Once that tells what enters each, the scan.
#include "ss2d_scan.cuh"

struct Params {
    Scan scan;
    Map x;
    void *y;               // (K, B, H, W, D)
    float *states;         // (K, chunks, D): the state that enters each chunk, or null
    const float *entries;  // (K, spans, D): the state that enters each span
    float *decays, *ends;  // (K, spans, 8, D): of a span up to the end of each run, from a zero state
};

// Slots are staged two ahead, as memory is busy: while some warps stage those, others may still read
// the slots of two before.
constexpr int AHEAD = 1, STAGES = 2 * AHEAD + 1;

template <class T, int TILES, bool SUMMARY>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) ss2d_scan_runs(const Params params) {
    const Scan &p = params.scan;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int route = blockIdx.x, span = blockIdx.z;
    const int group = blockIdx.y * warps + warp, channel = group * 16 + 4 * t;
    const bool active = group * 16 < p.dim;
    const int first = span * p.span, count = min(p.span, p.chunks - first);  // slots of a run
    const int length = p.height * p.width;
    const Path path = make_path(p, route);

    extern __shared__ __align__(16) char shared[];
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES + PAD_BYTES;
    char *const barriers = shared, *const staged_memory = shared + 64;
    char *const own = staged_memory + STAGES * staged_bytes
        + warp * (Weights<TILES>::BYTES + (AHEAD + 1) * MAP_BYTES);
    char *const own_x = own + Weights<TILES>::BYTES;

    if (threadIdx.x < STAGES) make_barrier(barriers + threadIdx.x * BARRIER_BYTES);
    if (active) Weights<TILES>::load(p, own, route, group, lane);
    __syncthreads();
    const Stager stager;
    Place place = find_place(p, path, first * 8 + g * count), next = place;
    Place next_staged = find_place(p, path, first * 8 + stager.g * count, stager.i);
    auto stage = [&](int number) {
        const int turn = number % STAGES;
        stager.stage(p, next_staged, staged_memory + turn * staged_bytes, route);
        if (active)
            copy_map(p, path, params.x, next, channel, own_x + number % (AHEAD + 1) * MAP_BYTES, lane);
        arrive_with_copies(barriers + turn * BARRIER_BYTES);
        advance(p, path, next_staged, stager.i);
        advance(p, path, next);
    };
    for (int number = 0; number < min(AHEAD, count); ++number) stage(number);

    const long long walk = (long long)route * p.spans + span;
    float enter[4] = {}, decay[4] = {1.f, 1.f, 1.f, 1.f}, skip[4] = {};
#pragma unroll
    for (int c = 0; c < 4; ++c)
        if (!SUMMARY && channel + c < p.dim) {
            enter[c] = params.entries[walk * p.dim + channel + c];
            if (g) {
                const long long before = (walk * 8 + g - 1) * p.dim + channel + c;
                enter[c] = follow(params.decays[before], params.ends[before], enter[c]);
            }
            if (route == 0) skip[c] = p.skip[channel + c];
        }
    const Weights<TILES> weights(own);
    for (int number = 0; number < count; ++number) {
        const int turn = number % STAGES;
        const char *const staged = staged_memory + turn * staged_bytes;
        wait_for_copies(barriers + turn * BARRIER_BYTES, number / STAGES & 1);
        if (number + AHEAD < count) stage(number + AHEAD);
        if (!active) continue;

        const char *const x = own_x + number % (AHEAD + 1) * MAP_BYTES + lane * 8;
        const char *const BC = pairs_of(staged, (p.rank + 1) & ~1, g);
        uint2 y[OWN];
        const int slot = first * 8 + g * count + number;
        if (!SUMMARY && params.states && slot % 8 == 0)
            keep_states(p, params.states, route, slot / 8, channel, enter);
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (place.slot == 0) enter[c] = decay[c] = 0.f;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            float z[OWN][2];
            project_dt<T, TILES, false>(z, staged, weights.fragments, weights.bias, pair, lane,
                                        length - place.start);
            const float2 rate = *(const float2 *)(weights.rates + 4 * t + 2 * pair);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const float2 x2 = T::unpack(*(const u32 *)(x + i * 256 + pair * 4));
                const float2 both = T::unpack(*(const u32 *)(BC + i * 128));
                float out[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int n = 2 * pair + c;
                    const float l = softplus2(z[i][c]), x1 = c ? x2.y : x2.x;
                    const float a = ex2((c ? rate.y : rate.x) * l);
                    enter[n] = a * enter[n] + l * x1 * (LN2 * both.x);
                    if (SUMMARY) decay[n] *= a;
                    else out[c] = both.y * enter[n] + skip[n] * x1;
                }
                if (!SUMMARY) (pair ? y[i].y : y[i].x) = T::pack(out[0], out[1]);
            }
        }
        if (!SUMMARY)
            write_map<T>(p, path, map_of(p, params.y, route), [&](int i) {
                uint2 v = y[0];
#pragma unroll
                for (int j = 1; j < OWN; ++j)
                    if (j == i) v = y[j];
                return v;
            }, place, channel, false);
        advance(p, path, place);
    }
    if (SUMMARY && active)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int d = 1; d < 8; d *= 2) {
                const float decay_before = __shfl_up_sync(ALL, decay[c], 4 * d);
                const float enter_before = __shfl_up_sync(ALL, enter[c], 4 * d);
                if (d <= g) {
                    enter[c] = follow(decay[c], enter[c], enter_before);
                    decay[c] *= decay_before;
                }
            }
            if (channel + c < p.dim) {
                const long long at = (walk * 8 + g) * p.dim + channel + c;
                params.ends[at] = enter[c];
                params.decays[at] = decay[c];
            }
        }
}
