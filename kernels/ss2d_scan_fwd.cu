// Forward of ss2d_scan for N = 1 on half-precision maps: each route's own map. A block walks one
// route of some images; a warp has 16 channels.
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
    u32 *const fragments = (u32 *)(shared + 2 * staged_bytes + warp * (TILES * 256 + 64));
    float *const bias = (float *)(fragments + TILES * 64);
    float4 rates = make_float4(0.f, 0.f, 0.f, 0.f), skip = rates;
    if (active) {
        for (int j = lane; j < TILES * 64; j += 32)
            fragments[j] = p.fragments[((long long)route * groups + group) * TILES * 64 + j];
        if (lane < 16) bias[lane] = p.bias[(route * groups + group) * 16 + lane];
        rates = *(const float4 *)(p.rates + route * groups * 16 + channel);
        skip = *(const float4 *)(p.skip + channel);
    }

    uint2 ahead[OWN];
    auto stage = [&](int b, int chunk, int turn) {
        stage_projected(p, path, shared + turn * staged_bytes, b, route, chunk);
        commit_copies();
        if (active)
            read_map(p, path, params.x, b, channel, chunk * CHUNK + OWN * g,
                     [&](int i, const unsigned short *from) { ahead[i] = *(const uint2 *)from; },
                     [&](int i, uint2 v) {
#pragma unroll
                         for (int j = 0; j < OWN; ++j)
                             if (j == i) ahead[j] = v;
                     });
    };
    const int first_image = blockIdx.z * p.images, images = min(p.images, p.batch - first_image);
    float enter[4];
    stage(first_image, first, 0);
    for (int item = 0, b = first_image, chunk = first; item < images * (last - first); ++item) {
        const int turn = item & 1;
        wait_copies<0>();
        __syncthreads();
        uint2 x[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) x[i] = ahead[i];
        const bool end = chunk + 1 == last;
        const int next = end ? first : chunk + 1, next_b = b + end;
        if (next_b < first_image + images) stage(next_b, next, turn ^ 1);

        if (active) {
            const long long walk = (long long)b * p.routes + route;
            if (chunk == first)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    enter[c] = params.entries && channel + c < p.dim
                        ? params.entries[(walk * p.spans + span) * p.dim + channel + c] : 0.f;
            const int start = chunk * CHUNK + OWN * g;
            const char *staged = shared + turn * staged_bytes;
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
            float2 pairs[OWN];
            load_pairs<T>(pairs, staged, (p.rank + 1) & ~1, g);
            uint2 y[OWN];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                float l[OWN][2], out[OWN][2];
                project_dt<T, TILES, false>(l, staged, fragments, bias, pair, lane,
                                            length - start);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int n = 2 * pair + c;
                    const float rate = element(rates, n);
                    float a[OWN], q[OWN], P = 1.f, h = 0.f;
#pragma unroll
                    for (int i = 0; i < OWN; ++i) {
                        const float2 x2 = T::unpack(pair ? x[i].y : x[i].x);
                        l[i][c] = softplus2(l[i][c]);
                        a[i] = ex2(rate * l[i][c]);
                        q[i] = l[i][c] * (c ? x2.y : x2.x) * pairs[i].x;
                        P = i ? P * a[i] : a[i];
                        h = i ? a[i] * h + q[i] : q[i];
                    }
                    combine_lanes<false>(P, h, g);
                    const float after = P * enter[n] + h;
                    if (SUMMARY) {
                        // The decay of all positions so far, in place of y.
                        const float all = __shfl_sync(ALL, P, 28 + t);
                        (n == 0 ? skip.x : n == 1 ? skip.y : n == 2 ? skip.z : skip.w)
                            = chunk == first ? all : element(skip, n) * all;
                    } else {
                        const float before = __shfl_up_sync(ALL, after, 4);
                        h = g ? before : enter[n];
#pragma unroll
                        for (int i = 0; i < OWN; ++i) {
                            h = a[i] * h + q[i];
                            out[i][c] = pairs[i].y * h;
                        }
                        if (route == 0)
#pragma unroll
                            for (int i = 0; i < OWN; ++i) {
                                const float2 x2 = T::unpack(pair ? x[i].y : x[i].x);
                                out[i][c] += element(skip, n) * (c ? x2.y : x2.x);
                            }
                    }
                    enter[n] = __shfl_sync(ALL, after, 28 + t);
                }
                if (!SUMMARY)
#pragma unroll
                    for (int i = 0; i < OWN; ++i)
                        (pair ? y[i].y : y[i].x) = T::pack(out[i][0], out[i][1]);
            }
            if (!SUMMARY)
                write_map(p, path, (unsigned short *)params.y
                          + ((long long)route * p.batch + b) * length * p.dim, y, channel, start);
            else if (end && g == 0)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (channel + c < p.dim) {
                        const long long at = (walk * p.spans + span) * p.dim + channel + c;
                        params.ends[at] = enter[c];
                        params.decays[at] = element(skip, c);
                    }
        }
        chunk = next;
        b = next_b;
    }
}
