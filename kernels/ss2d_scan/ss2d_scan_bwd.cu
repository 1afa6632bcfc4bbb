// Backward of ss2d_scan for N = 1 on half-precision maps. A block takes the chunks of a route from
// the last to the first; within a chunk it calculates the states again, forward, from the one that
// the forward saved. A block and its map of dx have one route or two, as in the forward.
//
// With dh the gradient by a state, running backwards: dh_t = C_t dy_t + a_(t+1) dh_(t+1). `carry`
// is a_(t+1) dh_(t+1) of the chunk after this one.
#include "ss2d_scan/ss2d_scan.cuh"

struct Ss2dScanBwdParams {
    Scan scan;
    Map x, dy;
    const float *states;   // (K, chunks, D): the state that enters each chunk
    void *dx;              // (maps, B, H, W, D): without the part that goes through the projection
    void *dprojected;      // (columns, B, H * W, K, P): sums over the channels of a block
    float *partials;       // (spans, K D R + 2 K D + D): of dt_projs_weight, A, bias, skip
    const float *entries;  // (K, spans, D): the carry that enters each span's end, or null
    float *decays, *ends;  // (K, spans, D): of a span from no carry, if SUMMARY
};

// The gradient by `projected` of a chunk, summed over the channels of the block: a warp takes a
// tile of 16 positions x 8 columns at a time. `memory` has, for each warp, the sums of B and C by
// position, MAP_BYTES further the gradient by z as the tensor cores take it, and the fragments.
template <class T, int TILES>
__device__ __forceinline__ void add_projected(const Ss2dScanBwdParams &params,
                                              const PixelPath &path,
                                              const char *memory, int warp_bytes,
                                              int fragments_at, int working, int column,
                                              int route, const SlotPosition &place) {
    const Scan &p = params.scan;
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5, g = lane >> 2, t = lane & 3;
    const int pairs_at = (p.rank + 1) & ~1, length = p.height * p.width;
    const int stride = p.routes * p.row;
    unsigned short *const out = (unsigned short *)params.dprojected + route * p.row + 2 * t
        + ((long long)column * p.batch + place.image) * length * stride;
    for (int unit = threadIdx.x >> 5; unit < p.row >> 1; unit += warps) {
        const int s = unit & 3, tile = unit >> 2;
        const int low = s * 256 + MAP_BYTES + lane * 8, high = s < 3 ? low + 1024 : low;
        const bool has_pairs = tile == pairs_at >> 3 && t == (pairs_at & 7) >> 1;
        float c[4] = {};
        if (tile < TILES)
            for (int w = 0; w < working; ++w) {
                const char *from = memory + w * warp_bytes;
                const uint2 a = *(const uint2 *)(from + low);
                uint2 a2 = *(const uint2 *)(from + high);
                if (s == 3) a2.x = a2.y = 0u;
                const u32 *fragments = (const u32 *)(from + fragments_at) + 2 * tile * 32 + lane;
                T::mma(c, a.x, a2.x, fragments[0]);
                T::mma(c, a.y, a2.y, fragments[32]);
            }
        if (has_pairs)
            for (int w = 0; w < working; ++w) {
                const float2 *from = (const float2 *)(memory + w * warp_bytes) + OWN * g + s;
                c[0] += LN2 * from[0].x;  // delta is l ln 2
                c[1] += from[0].y;
                c[2] += s < 3 ? LN2 * from[4].x : 0.f;
                c[3] += s < 3 ? from[4].y : 0.f;
            }
        const int position = place.start() + s;
        if (position < length)
            *(u32 *)(out + path.find(position) * (long long)stride + tile * 8)
                = T::pack(c[0], c[1]);
        if (s < 3 && position + 4 < length)
            *(u32 *)(out + path.find(position + 4) * (long long)stride + tile * 8)
                = T::pack(c[2], c[3]);
    }
}

// The gradient by dt_projs_weight: 16 channels x 8 columns, summed over a chunk's positions.
template <class T, int TILES>
__device__ __forceinline__ void add_weight(float4 *dweight, const char *staged, const char *dy_slot,
                                           int lane) {
    u32 turned[OWN][2];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const uint2 dz = *(const uint2 *)(dy_slot + lane * 8 + i * 256);
        turned[i][0] = transpose_tile(dz.x);
        turned[i][1] = transpose_tile(dz.y);
    }
    const char *row = staged + lane % 16 * 16;
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        const float4 sum = dweight[j * 32];
        float c[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int i = 0; i < OWN; i += 2) {
            // The tiles of positions i and i + 1 are neighbours; there is no position 7.
            u32 b0, b1;
            load_tiles_transposed(b0, b1, row + j * UNIT_BYTES + (i + 1 < OWN ? i : i - 1) * 128);
            if (i + 1 < OWN) {
                T::mma(c, turned[i][0], turned[i][1], b0);
                T::mma(c, turned[i + 1][0], turned[i + 1][1], b1);
            } else {
                T::mma(c, turned[i][0], turned[i][1], b1);
            }
        }
        dweight[j * 32] = make_float4(c[0], c[1], c[2], c[3]);
    }
}

template <class T, int TILES, bool SUMMARY>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
ss2d_scan_bwd(const Ss2dScanBwdParams params) {
    const Scan &p = params.scan;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int map = blockIdx.x, maps = gridDim.x, column = blockIdx.y, span = blockIdx.z;
    const int groups = (p.dim + 15) >> 4, group = column * warps + warp;
    const int working = min(warps, groups - column * warps);  // warps that have channels
    const int channel = group * 16 + 4 * t;
    const bool active = group < groups;
    const int first = span * p.span, last = min(first + p.span, p.chunks);
    const int length = p.height * p.width;
    const int pairs_at = (p.rank + 1) & ~1;  // column of (ln 2 B, C)

    extern __shared__ __align__(16) char shared[];
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES + PAD_BYTES;
    constexpr int warp_bytes = 4 * MAP_BYTES + TILES * 768 + 384 + 2048;
    char *const warp_memory = shared + 2 * staged_bytes;
    char *const own = warp_memory + warp * warp_bytes;  // x and dy, twice each
    float4 *const dweight = (float4 *)(own + 4 * MAP_BYTES) + lane;  // of each tile
    u32 *const fragments = (u32 *)(own + 4 * MAP_BYTES + TILES * 512);  // transposed
    float *const bias = (float *)(fragments + TILES * 64);
    float *const rates = bias + 32, *const skip = rates + 16;
    float *const states = skip + 16;  // twice
    // For each of the lane's 4 channels: the carry; then the sums by A, bias and skip, or the
    // decay.
    float *const carry = states + 32 + lane, *const sums = carry + 128;
    const long long of_span = ((long long)map * p.spans + span) * p.dim;
    if (active)
        for (int c = 0; c < 4; ++c)
            carry[c * 32] = params.entries && channel + c < p.dim
                ? params.entries[of_span + channel + c] : 0.f;
    if (active && lane < 16)
        states[lane] = states[16 + lane] = 0.f;  // channels beyond the last stay so

    const Stager stager(threadIdx.x, blockDim.x);
    for (int route = map; route < p.routes; route += maps) {
        auto stage = [&](const PixelPath &path, int chunk, int turn) {
            const SlotPosition place = find_place(p, path, chunk * 8 + g);
            stager.stage(p, path, place, shared + turn * staged_bytes, route, g);
            if (active) {
                char *to = own + turn * 2 * MAP_BYTES;
                copy_map(p, path, params.dy, place, channel, to + MAP_BYTES, lane);
                const int c = group * 16 + lane;
                if (!SUMMARY) copy_map(p, path, params.x, place, channel, to, lane);
                if (!SUMMARY && lane < 16 && c < p.dim)
                    copy4(states + turn * 16 + lane,
                          params.states + (long long)(route * p.chunks + chunk) * p.dim + c);
            }
            commit_copies();
        };
        // Afterwards nothing reads the memory any more, and the map of the route before is written.
        __syncthreads();
        if (active) {
            const int at = route * groups + group;
            for (int j = lane; j < TILES * 64; j += 32)
                fragments[j] = transpose_tile(p.fragments[(long long)at * TILES * 64 + j]);
            bias[lane] = p.bias[at * 16 + twice(lane)];
            if (lane < 16) rates[lane] = p.rates[at * 16 + lane];
            if (lane < 16) skip[lane] = p.skip[group * 16 + lane];
#pragma unroll
            for (int j = 0; j < TILES; ++j) dweight[j * 32] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int j = 0; j < 12; ++j) sums[j * 32] = SUMMARY ? 1.f : 0.f;
        }
        stage(make_path(p, route), last - 1, 0);
        for (int chunk = last - 1, turn = 0; chunk >= first; --chunk, turn ^= 1) {
            const char *staged = shared + turn * staged_bytes;
            char *const x_slot = own + turn * 2 * MAP_BYTES, *const dy_slot = x_slot + MAP_BYTES;
            wait_copies<0>();
            __syncthreads();
            // The path is made again for each chunk: there are no registers to keep it.
            opaque(route);
            opaque(chunk);
            const SlotPosition place = find_place(p, make_path(p, route), chunk * 8 + g);
            if (chunk > first) stage(make_path(p, route), chunk - 1, turn ^ 1);

            if (active) {
                u32 packed[OWN];
                load_pairs(packed, staged, pairs_at, g);
                float2 pairs[OWN];  // (ln 2 B, C)
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    pairs[i] = T::unpack(packed[i]);
                    pairs[i].x *= LN2;
                }
                float dpairs[4][4] = {};  // of ln 2 B and C: tiles of 16 positions x 8 columns
#pragma unroll 1
                for (int pair = 0; pair < 2; ++pair) {
                    float z[1][OWN][2], dx[OWN][2], dB[OWN][2], dC[OWN][2];
                    project_dt<T, TILES, true>(z, staged, fragments, bias, pair, lane,
                                               length - place.start());
                    u32 *const x_at = (u32 *)(x_slot + lane * 8 + 4 * pair);
                    u32 *const dy_at = (u32 *)(dy_slot + lane * 8 + 4 * pair);
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int n = 2 * pair + c;
                        const float rate = rates[4 * t + n];
                        float l[OWN], a[OWN], q[OWN], x[OWN], dy[OWN], P = 1.f, h = 0.f;
#pragma unroll
                        for (int i = 0; i < OWN; ++i) {
                            l[i] = fast_softplus2(z[0][i][c]);
                            a[i] = ex2(rate * l[i]);
                            P = i ? P * a[i] : a[i];
                            const float2 dy2 = T::unpack(dy_at[i * 64]);
                            dy[i] = c ? dy2.y : dy2.x;
                            if (SUMMARY) continue;
                            const float2 x2 = T::unpack(x_at[i * 64]);
                            x[i] = c ? x2.y : x2.x;
                            q[i] = l[i] * x[i] * pairs[i].x;
                            h = i ? a[i] * h + q[i] : q[i];
                        }
                        float w = 0.f, P_back = P;
#pragma unroll
                        for (int i = OWN - 1; i >= 0; --i) w = a[i] * (pairs[i].y * dy[i] + w);
                        const int slots_after = p.slots - 1 - place.slot;
                        combine_lanes<true>(P_back, w, min(7 - g, slots_after));
                        // Whether the image ends in a later chunk.
                        const bool arrived = slots_after > 7 - g;
                        const float arrive = carry[n * 32];
                        const float leave = arrived ? P_back * arrive + w : w;
                        const float after = __shfl_down_sync(ALL, leave, 4);
                        w = slots_after == 0 ? 0.f : g == 7 ? arrive : after;
                        carry[n * 32] = __shfl_sync(ALL, leave, t);
                        if (SUMMARY) {
                            const float decay = arrived ? sums[n * 32] * P_back : 0.f;
                            sums[n * 32] = __shfl_sync(ALL, decay, t);
                            continue;
                        }
                        combine_lanes<false>(P, h, min(g, place.slot));
                        const float enter = states[turn * 16 + 4 * t + n];
                        const float out = place.slot > g ? P * enter + h : h;
                        const float before = __shfl_up_sync(ALL, out, 4);
                        h = place.slot == 0 ? 0.f : g ? before : enter;
#pragma unroll
                        for (int i = 0; i < OWN; ++i) {
                            h = a[i] * h + q[i];
                            q[i] = h - q[i];  // a_t h_(t-1)
                            dC[i][c] = dy[i] * h;
                        }
                        float dA = 0.f, dbias = 0.f;
#pragma unroll
                        for (int i = OWN - 1; i >= 0; --i) {
                            const float dh = pairs[i].y * dy[i] + w;
                            w = a[i] * dh;
                            const float moved = dh * l[i];
                            dx[i][c] = moved * pairs[i].x;
                            dB[i][c] = moved * x[i];
                            dA += moved * q[i];
                            // By z, times ln 2; the derivative of softplus is 2^(z - l).
                            z[0][i][c] = (pairs[i].x * x[i] + q[i] * (LN2 * rate))
                                      * (dh * ex2(z[0][i][c] - l[i]));
                            dbias += z[0][i][c];
                        }
                        sums[n * 32] += dA;
                        sums[(4 + n) * 32] += dbias;
                        if (route == 0) {
                            const float D = skip[4 * t + n];
                            float dD = 0.f;
#pragma unroll
                            for (int i = 0; i < OWN; ++i) {
                                dx[i][c] += D * dy[i];
                                dD += dy[i] * x[i];
                            }
                            sums[(8 + n) * 32] += dD;
                        }
                    }
                    if (!SUMMARY) {
                        // Operands of the tensor cores that sum over channels into one column.
                        const u32 one = T::pack(1.f, 1.f);
                        const u32 sum_B = g == (pairs_at & 7) ? one : 0u;
                        const u32 sum_C = g == (pairs_at & 7) + 1 ? one : 0u;
#pragma unroll
                        for (int i = 0; i < OWN; ++i) {
                            x_at[i * 64] = T::pack(dx[i][0], dx[i][1]);
                            dy_at[i * 64] = T::pack(z[0][i][0], z[0][i][1]);
                        }
#pragma unroll
                        for (int s = 0; s < 4; ++s) {
                            T::mma(dpairs[s], T::pack(dB[s][0], dB[s][1]),
                                   s < 3 ? T::pack(dB[s + 4][0], dB[s + 4][1]) : 0u, sum_B);
                            T::mma(dpairs[s], T::pack(dC[s][0], dC[s][1]),
                                   s < 3 ? T::pack(dC[s + 4][0], dC[s + 4][1]) : 0u, sum_C);
                        }
                    }
                }
                if (!SUMMARY) {
                    int again = route;  // the position is found again, to save registers
                    opaque(again);
                    const PixelPath path = make_path(p, again);
                    write_map<T>(p, path, map_of(p, params.dx, map), [&](int i) {
                        return *(const uint2 *)(x_slot + lane * 8 + i * 256);
                    }, find_place(p, path, chunk * 8 + g), channel, route != map);
                    __syncwarp();
                    // x is no longer needed: its memory takes the sums by B and C for the other
                    // warps.
                    float2 *const to = (float2 *)x_slot + OWN * g;
                    if (t == (pairs_at & 7) >> 1)
#pragma unroll
                        for (int s = 0; s < 4; ++s) {
                            to[s] = make_float2(dpairs[s][0], dpairs[s][1]);
                            if (s < 3) to[s + 4] = make_float2(dpairs[s][2], dpairs[s][3]);
                        }
                }
            }
            if (!SUMMARY) {
                __syncthreads();
                const int at = turn * 2 * MAP_BYTES;
                add_projected<T, TILES>(params, make_path(p, route), warp_memory + at, warp_bytes,
                                        4 * MAP_BYTES + TILES * 512 - at, working, column, route,
                                        place);
                if (active) add_weight<T, TILES>(dweight, staged, dy_slot, lane);
            }
        }
        if (SUMMARY || !active) continue;

        const long long KD = (long long)p.routes * p.dim, at = (long long)route * p.dim;
        float *const part = params.partials + (long long)span * (KD * (p.rank + 2) + p.dim);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const float4 sum = dweight[j * 32];
            const int r = 8 * j + 2 * t;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                // Row g of the first half is channel 4 (g / 2) + g % 2, of the second 2 more.
                const int d = group * 16 + 4 * (g >> 1) + (g & 1) + (e & 2);
                if (d < p.dim && r + (e & 1) < p.rank)
                    part[(at + d) * p.rank + r + (e & 1)] = LOG2E * element(sum, e);
            }
        }
#pragma unroll
        for (int j = 0; j < 12; ++j) {
            float sum = sums[j * 32];
#pragma unroll
            for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(ALL, sum, d);
            const int c = channel + (j & 3);
            if (g || c >= p.dim) continue;
            if (j < 4) part[KD * p.rank + at + c] = LN2 * sum;
            else if (j < 8) part[KD * (p.rank + 1) + at + c] = LOG2E * sum;
            else if (route == 0) part[KD * (p.rank + 2) + c] = sum;
        }
    }
    if (SUMMARY && active && g == 0)
        for (int c = 0; c < 4; ++c)
            if (channel + c < p.dim) {
                params.ends[of_span + channel + c] = carry[c * 32];
                params.decays[of_span + channel + c] = sums[c * 32];
            }
}
