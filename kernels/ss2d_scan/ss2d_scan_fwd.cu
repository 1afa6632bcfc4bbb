// Forward of ss2d_scan for N = 1 on half-precision maps, in spans of whole images, so that nothing
// enters one. A block scans a span of one route and writes a map of its own. Or it scans the two
// routes of an axis, in turn for every few images, and adds the second to what the first has just
// written.
//
// With few, large images (CLUSTER) the chunks of a span go around: the sets of a block's warps, and
// the blocks of a cluster, take one chunk after the other. A warp scans its chunk from zero, takes
// the state that enters from the warp that has the chunk before, and hands on the state that
// leaves.
#ifdef CLUSTER
#include "common/cluster.cuh"
#define CLUSTER_DIMS __cluster_dims__(1, 1, CLUSTER)
#else
#define CLUSTER 0
#define CLUSTER_DIMS
#endif
#include "ss2d_scan/ss2d_scan.cuh"

struct Ss2dScanFwdParams {
    Scan scan;
    Map x;
    void *y;               // (maps, B, H, W, D): gridDim.x of them
    float *states;         // (K, chunks, D): the state that enters each chunk, or null
    int unit;              // chunks of one route before the other route has its turn
    int sets;              // how many the warps of a block form: 1 without a cluster
};

constexpr bool AROUND = CLUSTER > 0;
constexpr int BLOCKS_OF_SPAN = AROUND ? CLUSTER : 1;
// Pairs of a lane's four channels that are scanned at a time: with a cluster both, so that a warp
// waits for a state only once; else one, because there are too few registers for both.
constexpr int PAIRS = AROUND ? 2 : 1;
// Staged chunks: while some warps stage the next one, slower warps may still read the one before.
constexpr int STAGES = 3;
constexpr int BARRIERS = AROUND ? 256 : 64;  // bytes

template <class T, int TILES>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) CLUSTER_DIMS
ss2d_scan_fwd(const Ss2dScanFwdParams params) {
    const Scan &p = params.scan;
    // The number of the warp comes from a shuffle, so that the compiler knows it to be the same for
    // all lanes and keeps what follows from it, such as the paths, in uniform registers.
    const int lane = threadIdx.x & 31, warp = __shfl_sync(ALL, (int)threadIdx.x >> 5, 0);
    const int warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int sets = AROUND ? params.sets : 1, width = AROUND ? warps / sets : warps;
    const int set = AROUND ? warp / width : 0, thread = threadIdx.x - set * 32 * width;
    const int map = blockIdx.x, maps = gridDim.x, span = blockIdx.z / BLOCKS_OF_SPAN;
    const int groups = (p.dim + 15) >> 4, group = blockIdx.y * width + warp - set * width;
    const int channel = group * 16 + 4 * t;
    const bool active = group < groups;
    const int first = span * p.span, last = min(first + p.span, p.chunks);
    const int length = p.height * p.width;
    const int step = AROUND ? BLOCKS_OF_SPAN * sets : 1;  // chunks from one to the next

    extern __shared__ __align__(16) char shared[];
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES + PAD_BYTES;
    char *const barriers = shared + set * STAGES * BARRIER_BYTES;
    char *const staged_memory = shared + BARRIERS + set * STAGES * staged_bytes;
    // A warp's own memory: 64 bytes of skip, then for each of its routes the fragments, bias and
    // rates.
    constexpr int ROUTE_BYTES = Weights<TILES>::BYTES;
    const int turns = AROUND ? 1 : p.routes / maps;
    char *const own_memory = shared + BARRIERS + sets * STAGES * staged_bytes;
    char *const own = own_memory + warp * (turns * ROUTE_BYTES + 64);
    float *const skip = (float *)own;

    int chunk = first + (AROUND ? blockIdx.z % BLOCKS_OF_SPAN * sets + set : 0);
    float enter[4] = {};
    const PixelPath path0 = make_path(p, map, step);
    const PixelPath path1 = AROUND ? path0 : make_path(p, map + maps, step);
    auto path_of = [&](int route) { return AROUND || route == map ? path0 : path1; };
    if (thread < STAGES) make_barrier(barriers + thread * BARRIER_BYTES, 32 * width);
    if (active) {
        for (int i = 0; i < turns; ++i)
            Weights<TILES>::load(p, own + 64 + i * ROUTE_BYTES, map + i * maps, group, lane);
        if (lane < 16) skip[lane] = p.skip[group * 16 + lane];
    }
#if CLUSTER
    Mailbox *const mailboxes = (Mailbox *)(own_memory + warps * (ROUTE_BYTES + 64));
    Mailbox *const mailbox = mailboxes + warp;
    const bool near = set > 0 || CLUSTER == 1;  // the state that enters comes from this block
    if (lane == 0) mailbox->make(near);
    // The mailbox of the warp that has the next chunk, and whether it is in this block.
    const bool stays = set + 1 < sets || CLUSTER == 1;
    u32 next_mailbox = shared_address(mailboxes + (set + 1 < sets ? warp + width
                                                                  : warp - set * width));
    if (!stays) next_mailbox = address_in_block(next_mailbox, (blockIdx.z + 1) % CLUSTER);
    opaque(next_mailbox);  // not calculated again while another warp waits for it
    u32 taken = 0;  // parity of the phase in which the mailbox is emptied next
#endif
    __syncthreads();
#if CLUSTER
    wait_for_cluster();
    if (chunk == first && g == 7) {  // nothing enters the span
        const u32 own = shared_address(mailbox);
        if (near) put(own, lane, {});
        else send(address_in_block(own, blockIdx.z % CLUSTER), lane, {});
    }
#endif
    const Stager stager(thread, 32 * width);
    uint2 ahead[OWN];
    SlotPosition next;  // the slot that was staged last
    next.slot = p.slots;
    auto stage = [&](int route, int chunk, int turn) {
        const PixelPath path = path_of(route);
        if (!LIKELY(move(p, path, next, step))) next = find_place(p, path, chunk * 8 + g);
        stager.stage(p, path, next, staged_memory + turn * staged_bytes, route, g);
        arrive_with_copies(barriers + turn * BARRIER_BYTES);
        if (active)
            read_map(p, path, params.x, next, channel,
                     [&](int i, const unsigned short *from) { ahead[i] = *(const uint2 *)from; },
                     [&](int i, uint2 v) {
#pragma unroll
                         for (int j = 0; j < OWN; ++j)
                             if (j == i) ahead[j] = v;
                     });
    };
    int turn = 0, route = map, unit = first;
    u32 parity = 0;
    if (!AROUND || chunk < last) stage(route, chunk, turn);
    while (chunk < last) {
        const char *staged = staged_memory + turn * staged_bytes;
        wait_for_copies(barriers + turn * BARRIER_BYTES, parity);
        if (++turn == STAGES) turn = 0, parity ^= 1;
        uint2 x[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) x[i] = ahead[i];
        const int now = route, at = chunk;
        const bool second = !AROUND && now != map;  // of the two routes of an axis
        const SlotPosition place = next;
        chunk += step;
        if (!AROUND && chunk == min(unit + params.unit, last)) {
            next.slot = p.slots;  // the next slot is not found from this one
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

        const Weights<TILES> weights(own + 64 + (second ? ROUTE_BYTES : 0));
        if (!AROUND && params.states && g == 0)
            save_states(p, params.states, now, at, channel, enter);
        u32 pairs[OWN];  // (B, C), unpacked only where they are used, to save registers
        load_pairs(pairs, staged, (p.rank + 1) & ~1, g);
        uint2 y[OWN];
#pragma unroll
        for (int from = 0; from < 2; from += PAIRS) {
            float a[PAIRS][OWN][2], q[PAIRS][OWN][2], P[PAIRS][2], h[PAIRS][2];
            float z[PAIRS][OWN][2];
            project_dt<T, TILES, false>(z, staged, weights.fragments, weights.bias, from, lane,
                                        length - place.start());
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
                const int pair = from + j;
                const float2 rate = *(const float2 *)(weights.rates + 4 * t + 2 * pair);
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const float2 x2 = T::unpack(pair ? x[i].y : x[i].x);
                    const float B = LN2 * T::unpack(pairs[i]).x;
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float l = fast_softplus2(z[j][i][c]);
                        const float one = ex2((c ? rate.y : rate.x) * l);
                        a[j][i][c] = one;
                        q[j][i][c] = l * (c ? x2.y : x2.x) * B;
                        P[j][c] = i ? P[j][c] * one : one;
                        h[j][c] = i ? one * h[j][c] + q[j][i][c] : q[j][i][c];
                    }
                }
            }
            // What a lane and the lanes before it do to a state that enters the chunk is P h + q,
            // with q in `h`; Q and `before` are the same for the lanes before it alone.
            float Q[PAIRS][2], before[PAIRS][2];
            const bool entered = place.slot > g;  // the image began in an earlier chunk
#pragma unroll
            for (int j = 0; j < PAIRS; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    combine_lanes<false>(P[j][c], h[j][c], min(g, place.slot));
                    Q[j][c] = __shfl_up_sync(ALL, P[j][c], 4);
                    before[j][c] = __shfl_up_sync(ALL, h[j][c], 4);
                    if (g == 0) Q[j][c] = 1.f;
                    if (g == 0 || place.slot == 0) before[j][c] = 0.f;
                }
#if CLUSTER
            const bool sends = g == 7 && at + 1 < last;
            mailbox->take(enter, lane, taken);
#endif
#pragma unroll
            for (int j = 0; j < PAIRS; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    if (entered) h[j][c] += P[j][c] * enter[2 * (from + j) + c];
#if CLUSTER
            if (sends) {
                const float leave[4] = {h[0][0], h[0][1], h[1][0], h[1][1]};
                if (stays) put(next_mailbox, lane, leave);
                else send(next_mailbox, lane, leave);
            }
            if (lane == 0 && !near) mailbox->expect();
#endif
#pragma unroll
            for (int j = 0; j < PAIRS; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float &entering = enter[2 * (from + j) + c];
                    const float leave = h[j][c];
                    h[j][c] = before[j][c];
                    if (entered) h[j][c] += Q[j][c] * entering;
                    if (!AROUND) entering = __shfl_sync(ALL, leave, 28 + t);
                }
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
                const int pair = from + j;
                float out[OWN][2];
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const float C = T::unpack(pairs[i]).y;
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        h[j][c] = a[j][i][c] * h[j][c] + q[j][i][c];
                        out[i][c] = C * h[j][c];
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
        }
#if CLUSTER
        taken ^= 1;
        if (params.states && g == 0) save_states(p, params.states, now, at, channel, enter);
#endif
        __syncwarp();  // other lanes of the warp have written what is added to
        write_map<T, AROUND>(p, path_of(now), map_of(p, params.y, map), [&](int i) {
            uint2 v = y[0];
#pragma unroll
            for (int j = 1; j < OWN; ++j)
                if (j == i) v = y[j];
            return v;
        }, place, channel, second);
    }
}
