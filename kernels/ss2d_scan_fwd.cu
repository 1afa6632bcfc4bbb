// Forward of ss2d_scan for N = 1 on half-precision maps: each route's own map. A block walks one
// route of one image after another; a warp has 16 channels.
#include "ss2d_scan.cuh"

struct Params {
    Scan scan;
    Map x;
    void *y;               // (K, B, H, W, D)
    float *states;         // (B, K, chunks, D): the state that enters each chunk, or null
    const float *entries;  // (B, K, spans, D): the state that enters each span, or null
    float *decays, *ends;  // (B, K, spans, D): of a span from a zero state, if SUMMARY
};

template <class T, int TILES, bool SUMMARY>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) ss2d_scan_fwd(const Params params) {
    const Scan &p = params.scan;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int route = blockIdx.x, span = blockIdx.y % p.spans;
    const int groups = (p.dim + 15) >> 4, group = blockIdx.y / p.spans * warps + warp;
    const int channel = group * 16 + 4 * t;
    const bool active = group < groups;
    const int first = span * p.span, last = min(first + p.span, p.chunks);
    const int length = p.height * p.width;
    const Path path = make_path(p, route);

    extern __shared__ __align__(16) char shared[];
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES;
    char *const own = shared + 2 * staged_bytes + warp * (2 * MAP_BYTES + TILES * 256 + 64);
    char *const maps = own + lane * 8;
    u32 *const fragments = (u32 *)(own + 2 * MAP_BYTES);
    float *const bias = (float *)(fragments + TILES * 64);
    if (active) {
        for (int j = lane; j < TILES * 64; j += 32)
            fragments[j] = p.fragments[((long long)route * groups + group) * TILES * 64 + j];
        if (lane < 16) bias[lane] = p.bias[(route * groups + group) * 16 + lane];
    }
    float4 rates = make_float4(0.f, 0.f, 0.f, 0.f), skip = rates;
    if (active) {
        rates = *(const float4 *)(p.rates + route * groups * 16 + channel);
        if (route == 0) skip = *(const float4 *)(p.skip + channel);
    }

    for (int b = blockIdx.z * p.images; b < min(p.batch, (int)(blockIdx.z + 1) * p.images); ++b) {
        const char *image = (const char *)p.projected + (long long)b * length * p.routes * p.row * 2;
        const long long walk = (long long)b * p.routes + route;
        float enter[4] = {0.f, 0.f, 0.f, 0.f}, decay[4] = {1.f, 1.f, 1.f, 1.f};
        if (params.entries)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (channel + c < p.dim)
                    enter[c] = params.entries[(walk * p.spans + span) * p.dim + channel + c];

        auto stage = [&](int chunk, int turn) {
            stage_projected(p, path, shared + turn * staged_bytes, image, route, chunk);
            if (active)
                stage_map(p, path, params.x, maps + turn * MAP_BYTES, b, channel,
                          chunk * CHUNK + OWN * g);
            commit_copies();
        };
        stage(first, 0);
        for (int chunk = first; chunk < last; ++chunk) {
            const int turn = (chunk - first) & 1;
            wait_copies<0>();
            __syncthreads();
            if (chunk + 1 < last) stage(chunk + 1, turn ^ 1);
            if (!active) continue;
            const int start = chunk * CHUNK + OWN * g;
            const char *staged = shared + turn * staged_bytes, *x = maps + turn * MAP_BYTES;
            if (params.states && g == 0) {
                float *to = params.states + (walk * p.chunks + chunk) * p.dim + channel;
                if ((p.dim & 3) == 0) {
                    if (channel < p.dim)
                        *(float4 *)to = make_float4(enter[0], enter[1], enter[2], enter[3]);
                } else {
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        if (channel + c < p.dim) to[c] = enter[c];
                }
            }
            u32 pairs[OWN];
            load_pairs(pairs, staged, (p.rank + 1) & ~1, g);
            uint2 y[OWN];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                float l[OWN][2];
                project_dt<T, TILES>(l, staged, fragments, bias, pair, lane);
#pragma unroll
                for (int i = 0; i < OWN; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c) l[i][c] = softplus2(l[i][c]);
                if (start + OWN > length)
#pragma unroll
                    for (int i = 0; i < OWN; ++i)
                        if (start + i >= length) l[i][0] = l[i][1] = 0.f;
                float out[OWN][2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int n = 2 * pair + c;
                    const float rate = n == 0 ? rates.x : n == 1 ? rates.y : n == 2 ? rates.z
                                                                                   : rates.w;
                    const float D = n == 0 ? skip.x : n == 1 ? skip.y : n == 2 ? skip.z : skip.w;
                    float a[OWN], q[OWN], P = 1.f, h = 0.f;
#pragma unroll
                    for (int i = 0; i < OWN; ++i) {
                        const float2 x2 = T::unpack(*(const u32 *)(x + i * 256 + 4 * pair));
                        const float v = c ? x2.y : x2.x;
                        a[i] = ex2(rate * l[i][c]);
                        q[i] = l[i][c] * v * (LN2 * T::unpack(pairs[i]).x);
                        out[i][c] = D * v;
                        P = i ? P * a[i] : a[i];
                        h = i ? a[i] * h + q[i] : q[i];
                    }
                    combine_lanes<false>(P, h, g);
                    const float after = P * enter[n] + h;
                    if (SUMMARY) {
                        decay[n] *= __shfl_sync(ALL, P, 28 + t);
                    } else {
                        const float before = __shfl_up_sync(ALL, after, 4);
                        h = g ? before : enter[n];
#pragma unroll
                        for (int i = 0; i < OWN; ++i) {
                            h = a[i] * h + q[i];
                            out[i][c] += T::unpack(pairs[i]).y * h;
                        }
                    }
                    enter[n] = __shfl_sync(ALL, after, 28 + t);
                }
#pragma unroll
                for (int i = 0; i < OWN; ++i)
                    (pair ? y[i].y : y[i].x) = T::pack(out[i][0], out[i][1]);
            }
            if (!SUMMARY)
                write_map(p, path, (unsigned short *)params.y
                          + ((long long)route * p.batch + b) * length * p.dim, y, channel, start);
        }
        if (SUMMARY && active && g == 0)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (channel + c < p.dim) {
                    const long long at = (walk * p.spans + span) * p.dim + channel + c;
                    params.ends[at] = enter[c];
                    params.decays[at] = decay[c];
                }
        __syncthreads();
    }
}
