// Forward of ss2d_scan for N = 1 on half-precision maps, in spans of whole images, so that nothing
// enters one. A block walks a span of one route, to a map of its own; or of the two routes of an
// axis, in turn for every few images, so that the second is added to what the first has just written.
#include "ss2d_scan.cuh"

struct Params {
    Scan scan;
    Map x;
    void *y;               // (maps, B, H, W, D): gridDim.x of them
    float *states;         // (K, chunks, D): the state that enters each chunk, or null
    int unit;              // chunks that a route takes before it is the other one's turn
};

// Staged chunks: while some warps stage the next one, others may still read the one before.
constexpr int STAGES = 3;

template <class T, int TILES>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) ss2d_scan_fwd(const Params params) {
    const Scan &p = params.scan;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int map = blockIdx.x, maps = gridDim.x, span = blockIdx.z;
    const int groups = (p.dim + 15) >> 4, group = blockIdx.y * warps + warp;
    const int channel = group * 16 + 4 * t;
    const bool active = group < groups;
    const int first = span * p.span, last = min(first + p.span, p.chunks);
    const int length = p.height * p.width;

    extern __shared__ __align__(16) char shared[];
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES + PAD_BYTES;
    char *const barriers = shared, *const staged_memory = shared + 64;
    // Of a warp: 64 bytes of skip, then for each of its routes the fragments, bias and rates.
    constexpr int ROUTE_BYTES = Weights<TILES>::BYTES;
    const int turns = p.routes / maps;
    char *const own = staged_memory + STAGES * staged_bytes + warp * (turns * ROUTE_BYTES + 64);
    float *const skip = (float *)own;

    float enter[4] = {};
    if (threadIdx.x < STAGES) make_barrier(barriers + threadIdx.x * BARRIER_BYTES);
    if (active) {
        for (int i = 0; i < turns; ++i)
            Weights<TILES>::load(p, own + 64 + i * ROUTE_BYTES, map + i * maps, group, lane);
        if (lane < 16) skip[lane] = p.skip[group * 16 + lane];
    }
    __syncthreads();
    const Stager stager;
    uint2 ahead[OWN];
    auto stage = [&](int route, int chunk, int turn) {
        const Path path = make_path(p, route);
        stager.stage(p, find_place(p, path, chunk * 8 + stager.g, stager.i),
                     staged_memory + turn * staged_bytes, route);
        arrive_with_copies(barriers + turn * BARRIER_BYTES);
        const Place place = find_place(p, path, chunk * 8 + g);
        if (active)
            read_map(p, path, params.x, place, channel,
                     [&](int i, const unsigned short *from) { ahead[i] = *(const uint2 *)from; },
                     [&](int i, uint2 v) {
#pragma unroll
                         for (int j = 0; j < OWN; ++j)
                             if (j == i) ahead[j] = v;
                     });
    };
    int turn = 0, route = map, chunk = first, unit = first;
    u32 parity = 0;
    stage(route, chunk, turn);
    while (chunk < last) {
        const char *staged = staged_memory + turn * staged_bytes;
        wait_for_copies(barriers + turn * BARRIER_BYTES, parity);
        if (++turn == STAGES) turn = 0, parity ^= 1;
        uint2 x[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) x[i] = ahead[i];
        // Calculated again for each chunk: there are no registers to keep it.
        asm("" : "+r"(route));
        const int now = route, at = chunk;
        const Place place = find_place(p, make_path(p, now), at * 8 + g);
        if (++chunk == min(unit + params.unit, last)) {
            if (route + maps < p.routes) {
                route += maps;
                chunk = unit;
            } else {
                route = map;
                unit = chunk;
            }
        }
        if (chunk < last) stage(route, chunk, turn);
        if (!active) continue;

        const Weights<TILES> weights(own + 64 + (now == map ? 0 : ROUTE_BYTES));
        if (params.states && g == 0)
            keep_states(p, params.states, now, at, channel, enter);
        u32 pairs[OWN];  // (B, C), unpacked where they are used, for want of registers
        load_pairs(pairs, staged, (p.rank + 1) & ~1, g);
        uint2 y[OWN];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            float z[OWN][2], a[OWN][2], q[OWN][2], P[2], h[2];
            const float2 rate = *(const float2 *)(weights.rates + 4 * t + 2 * pair);
            project_dt<T, TILES, false>(z, staged, weights.fragments, weights.bias, pair, lane,
                                        length - place.start());
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const float2 x2 = T::unpack(pair ? x[i].y : x[i].x);
                const float B = LN2 * T::unpack(pairs[i]).x;
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float l = softplus2(z[i][c]);
                    a[i][c] = ex2((c ? rate.y : rate.x) * l);
                    q[i][c] = l * (c ? x2.y : x2.x) * B;
                    P[c] = i ? P[c] * a[i][c] : a[i][c];
                    h[c] = i ? a[i][c] * h[c] + q[i][c] : q[i][c];
                }
            }
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int n = 2 * pair + c;
                combine_lanes<false>(P[c], h[c], min(g, place.slot));
                const bool entered = place.slot > g;  // the image began in an earlier chunk
                const float after = entered ? P[c] * enter[n] + h[c] : h[c];
                const float before = __shfl_up_sync(ALL, after, 4);
                h[c] = place.slot == 0 ? 0.f : g ? before : enter[n];
                enter[n] = __shfl_sync(ALL, after, 28 + t);
            }
            float out[OWN][2];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const float C = T::unpack(pairs[i]).y;
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    h[c] = a[i][c] * h[c] + q[i][c];
                    out[i][c] = C * h[c];
                }
            }
            if (now == 0) {
                const float2 D = *(const float2 *)(skip + 4 * t + 2 * pair);
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const float2 x2 = T::unpack(pair ? x[i].y : x[i].x);
                    out[i][0] += D.x * x2.x;
                    out[i][1] += D.y * x2.y;
                }
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                (pair ? y[i].y : y[i].x) = T::pack(out[i][0], out[i][1]);
        }
        __syncwarp();  // what is added to is written, by other lanes of the warp
        write_map<T>(p, make_path(p, now), map_of(p, params.y, map), [&](int i) {
            uint2 v = y[0];
#pragma unroll
            for (int j = 1; j < OWN; ++j)
                if (j == i) v = y[j];
            return v;
        }, place, channel, now != map);
    }
}
