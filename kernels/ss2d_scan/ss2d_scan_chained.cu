// Forward of ss2d_scan for N = 1 on half-precision maps, where spans are not of whole images. A block
// has a span of one route and a map of its own to write, and makes two passes over the span. The
// first finds what the span does to a state, which the blocks of later spans wait for. The second
// starts from the state that enters the span, and writes the map. While some blocks wait for memory
// in their second pass, other blocks calculate in their first.
//
// The span is divided into 8 runs, one for each 4 lanes of a warp. These lanes take one slot of their
// own run at a time, so that no lane waits for the state of another.
#include "ss2d_scan/ss2d_scan.cuh"

struct Ss2dScanChainedParams {
    Scan scan;
    Map x;
    void *y;               // (K, B, H, W, D)
    float *states;         // (K, chunks, D): the state that enters each chunk, or null
    float *decays, *ends;  // (K, spans, D): of each span, from a zero state
    int *ready;            // (K, spans, G): 1 once the warp has written them; zeros at the start
    int *tickets;          // how many blocks have begun; zero at the start
};

// Staged slots of each run. One is staged while slower warps may still read the one before. Three
// would be enough; with four the number of the next one takes fewer instructions.
constexpr int STAGES = 4;

template <class T, int TILES>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
ss2d_scan_chained(const Ss2dScanChainedParams params) {
    const Scan &p = params.scan;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    extern __shared__ __align__(16) char shared[];
    char *const barriers = shared, *const staged_memory = shared + 64;
    int *const ticket = (int *)(barriers + STAGES * BARRIER_BYTES);
    // A block waits for earlier spans, so those must be in the hands of blocks that have begun.
    if (threadIdx.x == 0) *ticket = atomicAdd(params.tickets, 1);
    if (threadIdx.x < STAGES) make_barrier(barriers + threadIdx.x * BARRIER_BYTES, blockDim.x);
    __syncthreads();
    const int route = *ticket % gridDim.x, column = *ticket / gridDim.x % gridDim.y;
    const int span = *ticket / gridDim.x / gridDim.y;

    const int groups = (p.dim + 15) >> 4, group = column * warps + warp;
    const int channel = group * 16 + 4 * t;
    const bool active = group < groups;
    const int first = span * p.span, count = min(p.span, p.chunks - first);  // slots of a run
    const int length = p.height * p.width;
    int again = route;  // the path is made again each time: there are no registers to keep it
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES + PAD_BYTES;
    // A warp's own memory: x of two slots of each lane, fragments, bias and rates, 64 bytes of
    // skip.
    char *const own_x = staged_memory + STAGES * staged_bytes
        + warp * (2 * MAP_BYTES + Weights<TILES>::BYTES + 64);
    char *const own = own_x + 2 * MAP_BYTES;
    float *const skip = (float *)(own + Weights<TILES>::BYTES);
    if (active) {
        Weights<TILES>::load(p, own, route, group, lane);
        if (lane < 16) skip[lane] = route == 0 ? p.skip[group * 16 + lane] : 0.f;
    }
    __syncwarp();

    const Stager stager(threadIdx.x, blockDim.x);
    SlotPosition next;  // the slot that was staged last
    auto stage = [&](int step) {
        opaque(again);
        const PixelPath path = make_path(p, again);
        const int number = step - (step < count ? 0 : count);
        if (number == 0) next = find_place(p, path, first * 8 + g * count);
        else advance(p, path, next);
        const int turn = step & 3;
        stager.stage(p, path, next, staged_memory + turn * staged_bytes, route, g);
        if (active)
            copy_map(p, path, params.x, next, channel, own_x + (step & 1) * MAP_BYTES, lane);
        arrive_with_copies(barriers + turn * BARRIER_BYTES);
    };
    stage(0);

    const Weights<TILES> weights(own);
    float enter[4] = {}, decay[4] = {1.f, 1.f, 1.f, 1.f};
    auto scan_slot = [&](int step, const SlotPosition &place, const bool SUMMARY)
            __attribute__((always_inline)) {
        const char *const staged = staged_memory + (step & 3) * staged_bytes;
        const char *const x = own_x + (step & 1) * MAP_BYTES + lane * 8;
        const char *const BC = pairs_of(staged, (p.rank + 1) & ~1, g);
        uint2 y[OWN];
        if (!SUMMARY && params.states) {
            const int slot = first * 8 + g * count + step - count;
            if (slot % 8 == 0) save_states(p, params.states, route, slot / 8, channel, enter);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (place.slot == 0) enter[c] = decay[c] = 0.f;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            asm volatile("" ::: "memory");  // one pair after the other, to save registers
            float z[1][OWN][2];
            project_dt<T, TILES, false>(z, staged, weights.fragments, weights.bias, pair, lane,
                                        length - place.start());
            const float2 rate = *(const float2 *)(weights.rates + 4 * t + 2 * pair);
            const float2 D = *(const float2 *)(skip + 4 * t + 2 * pair);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const float2 x2 = T::unpack(*(const u32 *)(x + i * 256 + pair * 4));
                const float2 both = T::unpack(*(const u32 *)(BC + i * 128));
                float out[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int n = 2 * pair + c;
                    const float l = fast_softplus2(z[0][i][c]), x1 = c ? x2.y : x2.x;
                    const float a = ex2((c ? rate.y : rate.x) * l);
                    enter[n] = a * enter[n] + l * x1 * (LN2 * both.x);
                    if (SUMMARY) decay[n] *= a;
                    else out[c] = both.y * enter[n] + (c ? D.y : D.x) * x1;
                }
                if (!SUMMARY) (pair ? y[i].y : y[i].x) = T::pack(out[0], out[1]);
            }
        }
        if (!SUMMARY)
            write_map<T>(p, make_path(p, again), map_of(p, params.y, route), [&](int i) {
                uint2 v = y[0];
#pragma unroll
                for (int j = 1; j < OWN; ++j)
                    if (j == i) v = y[j];
                return v;
            }, place, channel, false);
    };

    // Lanes 4 g .. 4 g + 3 have what run g does to a state; afterwards they have what all runs up to
    // and with g do to it.
    auto gather = [&](float (&decay)[4], float (&end)[4]) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
            for (int d = 1; d < 8; d *= 2) {
                const float decay_before = __shfl_up_sync(ALL, decay[c], 4 * d);
                const float end_before = __shfl_up_sync(ALL, end[c], 4 * d);
                if (d <= g) {
                    end[c] = follow(decay[c], end[c], end_before);
                    decay[c] *= decay_before;
                }
            }
    };
    // Writes what the span does to a state, waits until the spans before it in the image have
    // written theirs, and calculates from both the state that enters each run.
    auto exchange = [&]() {
        gather(decay, enter);
        const long long of_route = (long long)route * p.spans;
        if (g == 7) {
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (channel + c < p.dim) {
                    params.decays[(of_route + span) * p.dim + channel + c] = decay[c];
                    params.ends[(of_route + span) * p.dim + channel + c] = enter[c];
                }
            __threadfence();
        }
        __syncwarp();
        if (lane == 0) store_release(params.ready + (of_route + span) * groups + group, 1);

        float decays[4] = {1.f, 1.f, 1.f, 1.f}, ends[4] = {};
        const int image = find_place(p, make_path(p, again), first * 8).image;
        const int origin = image * p.slots / 8 / p.span;  // the span where it begins
        const int share = (span - origin + 7) >> 3;
        const int from = origin + g * share, to = min(from + share, span);
        for (int s = from; s < to; ++s)
            while (!load_acquire(params.ready + (of_route + s) * groups + group)) {}
#pragma unroll 4
        for (int s = from; s < to; ++s)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (channel + c < p.dim) {
                    const long long at = (of_route + s) * p.dim + channel + c;
                    const float factor = params.decays[at];
                    ends[c] = follow(factor, params.ends[at], ends[c]);
                    decays[c] *= factor;
                }
        __syncwarp();
        gather(decays, ends);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float entered = __shfl_sync(ALL, ends[c], 28 + t);
            const float decay_before = __shfl_up_sync(ALL, decay[c], 4);
            const float end_before = __shfl_up_sync(ALL, enter[c], 4);
            enter[c] = g ? follow(decay_before, end_before, entered) : entered;
        }
    };

    auto pass = [&](int from, const bool SUMMARY) __attribute__((always_inline)) {
        for (int step = from; step < from + count; ++step) {
            wait_for_copies(barriers + (step & 3) * BARRIER_BYTES, step >> 2 & 1);
            const SlotPosition place = next;
            if (step + 1 < 2 * count) stage(step + 1);
            if (active) scan_slot(step, place, SUMMARY);
        }
    };
    pass(0, true);
    if (active) exchange();
    pass(count, false);
}
