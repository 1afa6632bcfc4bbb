// Forward of ss2d_scan for N = 1 on half-precision maps. A block walks a span of one route, to a map
// of its own; or, where spans are of whole images, of the two routes of an axis, one after the
// other, and the second is added to the map of the first.
#include "ss2d_scan.cuh"

struct Params {
    Scan scan;
    Map x;
    void *y;               // (maps, B, H, W, D): gridDim.x of them
    float *states;         // (K, chunks, D): the state that enters each chunk, or null
    const float *entries;  // (K, spans, D): the state that enters each span, or null
    float *decays, *ends;  // (K, spans, D): of a span from a zero state, if SUMMARY
};

template <class T, int TILES, bool SUMMARY>
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
    const Map sums = map_of(p, params.y, map);

    extern __shared__ __align__(16) char shared[];
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES;
    constexpr int ROUTE_BYTES = TILES * 256 + 128;  // of a warp: fragments, bias and rates
    char *const own = shared + 2 * staged_bytes + warp * (MAP_BYTES + 2 * ROUTE_BYTES);
    float4 skip = make_float4(0.f, 0.f, 0.f, 0.f);
    if (active) {
        for (int route = map, i = 0; route < p.routes; route += maps, ++i) {
            u32 *const to = (u32 *)(own + MAP_BYTES + i * ROUTE_BYTES);
            const int at = route * groups + group;
            for (int j = lane; j < TILES * 64; j += 32)
                to[j] = p.fragments[(long long)at * TILES * 64 + j];
            const float *const from = lane < 16 ? p.bias : p.rates;
            to[TILES * 64 + lane] = __float_as_uint(from[at * 16 + lane % 16]);
        }
        skip = *(const float4 *)(p.skip + channel);
    }

    float enter[4], decay[4] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
    for (int c = 0; c < 4; ++c)
        enter[c] = params.entries && channel + c < p.dim
            ? params.entries[((long long)map * p.spans + span) * p.dim + channel + c] : 0.f;

    uint2 ahead[OWN];
    Place place_ahead;
    auto stage = [&](int route, int chunk, int turn) {
        const Path path = make_path(p, route);
        if (route < p.routes)
            stage_projected(p, path, shared + turn * staged_bytes, route, chunk);
        commit_copies();
        place_ahead = find_place(p, chunk * 8 + g);
        if (active && route < p.routes)
            read_map(p, path, params.x, place_ahead, channel,
                     [&](int i, const unsigned short *from) { ahead[i] = *(const uint2 *)from; },
                     [&](int i, uint2 v) {
#pragma unroll
                         for (int j = 0; j < OWN; ++j)
                             if (j == i) ahead[j] = v;
                     });
    };
    auto advance = [&](int &route, int &chunk) {
        if (++chunk == last) chunk = first, route += maps;
    };
    stage(map, first, 0);
    for (int route = map, chunk = first, turn = 0; route < p.routes;
         advance(route, chunk), turn ^= 1) {
        const Path path = make_path(p, route);
        const bool adds = route != map;
        wait_copies<0>();
        __syncthreads();
        uint2 x[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) x[i] = ahead[i];
        const Place place = place_ahead;
        if (adds && active) read_sums(p, path, sums, place, channel, own, lane);
        commit_copies();
        int next_route = route, next = chunk;
        advance(next_route, next);
        stage(next_route, next, turn ^ 1);
        if (!active) continue;

        const u32 *const fragments = (const u32 *)(own + MAP_BYTES + adds * ROUTE_BYTES);
        const float *const bias = (const float *)(fragments + TILES * 64), *const rates = bias + 16;
        const char *staged = shared + turn * staged_bytes;
        if (params.states && g == 0) {
            float *to = params.states + ((long long)route * p.chunks + chunk) * p.dim + channel;
            if ((p.dim & 3) == 0) {
                if (channel < p.dim)
                    *(float4 *)to = make_float4(enter[0], enter[1], enter[2], enter[3]);
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (channel + c < p.dim) to[c] = enter[c];
            }
        }
        float2 pairs[OWN];
        load_pairs<T>(pairs, staged, (p.rank + 1) & ~1, g);
        uint2 y[OWN];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            float z[OWN][2], a[OWN][2], q[OWN][2], P[2], h[2];
            const float2 rate = *(const float2 *)(rates + 4 * t + 2 * pair);
            project_dt<T, TILES, false>(z, staged, fragments, bias, pair, lane,
                                        length - place.start);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const float2 x2 = T::unpack(pair ? x[i].y : x[i].x);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float l = softplus2(z[i][c]);
                    a[i][c] = ex2((c ? rate.y : rate.x) * l);
                    q[i][c] = l * (c ? x2.y : x2.x) * pairs[i].x;
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
                if (SUMMARY)
                    decay[n] = __shfl_sync(ALL, entered ? decay[n] * P[c] : 0.f, 28 + t);
            }
            if (SUMMARY) continue;
            float out[OWN][2];
#pragma unroll
            for (int i = 0; i < OWN; ++i)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    h[c] = a[i][c] * h[c] + q[i][c];
                    out[i][c] = pairs[i].y * h[c];
                }
            if (route == 0)
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const float2 x2 = T::unpack(pair ? x[i].y : x[i].x);
                    out[i][0] += element(skip, 2 * pair) * x2.x;
                    out[i][1] += element(skip, 2 * pair + 1) * x2.y;
                }
            if (adds) {
                wait_copies<1>();
                add_sums<T>(out, own, pair, lane);
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                (pair ? y[i].y : y[i].x) = T::pack(out[i][0], out[i][1]);
        }
        if (!SUMMARY) write_map(p, path, sums, y, place, channel);
    }
    if (SUMMARY && active && g == 0)
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (channel + c < p.dim) {
                const long long at = ((long long)map * p.spans + span) * p.dim + channel + c;
                params.ends[at] = enter[c];
                params.decays[at] = decay[c];
            }
}
