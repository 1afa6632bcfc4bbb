// The sum of the routes' maps at a position, and, if asked for, its LayerNorm over the channels.
#pragma once
#include "common.cuh"

struct Merge {
    const void *maps;             // (K, M, D)
    const void *extra;            // (M, D), one more if EXTRA; may be `merged`
    void *merged;                 // (M, D) of T, or fp32 if to_float; or null
    void *normed;                 // (M, D) of T, or null
    const void *weight, *bias;    // (D)
    float2 *moments;              // (M): mean and 1 / deviation, or null
    float eps;
    int positions, dim, routes, parameter_type, to_float;
};

// The norm's parameters into shared memory, 2 D floats.
__device__ __forceinline__ void stage_norm(const Merge &p, float *shared) {
    for (int j = threadIdx.x; j < p.dim; j += blockDim.x) {
        shared[j] = load_parameter(p.weight, j, p.parameter_type);
        shared[p.dim + j] = load_parameter(p.bias, j, p.parameter_type);
    }
}

// By a warp: a lane has 4 adjacent channels out of each 128. Beyond 512 channels what was read is
// read again (from the caches) for each step of the norm.
template <class T, bool EXTRA>
__device__ __forceinline__ void merge_position(const Merge &p, const float *shared, int m) {
    constexpr int PARTS = 4, BLOCK = PARTS * 128;
    const int lane = threadIdx.x & 31;
    const long long map = (long long)p.positions * p.dim, row = (long long)m * p.dim;
    const unsigned short *const maps = (const unsigned short *)p.maps + row;
    float v[PARTS][4], sum = 0.f, squares = 0.f;
    auto load = [&](int start) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = start + i * 128 + lane * 4;
            uint2 in[4 + EXTRA];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                in[j] = j < p.routes && c < p.dim ? load_from_l2(maps + j * map + c)
                                                  : make_uint2(0u, 0u);
            if (EXTRA)
                in[4] = c < p.dim ? *(const uint2 *)((const unsigned short *)p.extra + row + c)
                                  : make_uint2(0u, 0u);
#pragma unroll
            for (int j = 0; j < 4 + EXTRA; ++j) {
                const float2 lo = T::unpack(in[j].x), hi = T::unpack(in[j].y);
                v[i][0] = j ? v[i][0] + lo.x : lo.x;
                v[i][1] = j ? v[i][1] + lo.y : lo.y;
                v[i][2] = j ? v[i][2] + hi.x : hi.x;
                v[i][3] = j ? v[i][3] + hi.y : hi.y;
            }
        }
    };
    for (int start = 0; start < p.dim; start += BLOCK) {
        load(start);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = start + i * 128 + lane * 4;
#pragma unroll
            for (int e = 0; e < 4; ++e) sum += v[i][e];
            if (!p.merged || c >= p.dim) continue;
            if (p.to_float)
                *(float4 *)((float *)p.merged + row + c)
                    = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
            else
                *(uint2 *)((unsigned short *)p.merged + row + c)
                    = make_uint2(T::pack(v[i][0], v[i][1]), T::pack(v[i][2], v[i][3]));
        }
    }
    if (!p.normed) return;
#pragma unroll
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const float mean = sum / p.dim;
    for (int start = 0; start < p.dim; start += BLOCK) {
        if (p.dim > BLOCK) load(start);
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (start + i * 128 + lane * 4 < p.dim)
                    squares += (v[i][e] - mean) * (v[i][e] - mean);
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, d);
    const float scale = rsqrtf(squares / p.dim + p.eps);
    for (int start = 0; start < p.dim; start += BLOCK) {
        if (p.dim > BLOCK) load(start);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = start + i * 128 + lane * 4;
            if (c >= p.dim) continue;
            const float4 w = *(const float4 *)(shared + c), b = *(const float4 *)(shared + p.dim + c);
            *(uint2 *)((unsigned short *)p.normed + row + c)
                = make_uint2(T::pack((v[i][0] - mean) * scale * w.x + b.x,
                                     (v[i][1] - mean) * scale * w.y + b.y),
                             T::pack((v[i][2] - mean) * scale * w.z + b.z,
                                     (v[i][3] - mean) * scale * w.w + b.w));
        }
    }
    if (p.moments && lane == 0) p.moments[m] = make_float2(mean, scale);
}
