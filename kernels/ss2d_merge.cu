// The sum of the row and the column map, and, if asked for, its LayerNorm over the channels.
#include "common.cuh"

struct Params {
    const void *rows, *columns;   // (M, D); columns may be null
    void *merged;                 // (M, D) of OUT, or null
    void *normed;                 // (M, D) of T, or null
    const void *weight, *bias;    // (D)
    float *mean, *scale;          // (M) of the norm, or null
    float eps;
    int positions, dim, parameter_type;
};

// A warp per position; a lane has 4 adjacent channels out of each 128.
template <class T, int PARTS, bool FLOAT>
__global__ void __launch_bounds__(256) ss2d_merge(const Params p) {
    const int lane = threadIdx.x & 31;
    const int warps = gridDim.x * (blockDim.x >> 5);
    for (int m = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); m < p.positions; m += warps) {
        const long long at = (long long)m * p.dim;
        float v[PARTS][4];
        uint2 a[PARTS], b[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 + lane * 4;
            a[i] = b[i] = make_uint2(0u, 0u);
            if (c < p.dim) {
                a[i] = *(const uint2 *)((const unsigned short *)p.rows + at + c);
                if (p.columns) b[i] = *(const uint2 *)((const unsigned short *)p.columns + at + c);
            }
        }
        float sum = 0.f, squares = 0.f;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const float2 a0 = T::unpack(a[i].x), a1 = T::unpack(a[i].y);
            const float2 b0 = T::unpack(b[i].x), b1 = T::unpack(b[i].y);
            v[i][0] = a0.x + b0.x; v[i][1] = a0.y + b0.y;
            v[i][2] = a1.x + b1.x; v[i][3] = a1.y + b1.y;
#pragma unroll
            for (int e = 0; e < 4; ++e) sum += v[i][e];
        }
        if (p.merged)
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                const int c = i * 128 + lane * 4;
                if (c >= p.dim) continue;
                if (FLOAT)
                    *(float4 *)((float *)p.merged + at + c)
                        = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
                else
                    *(uint2 *)((unsigned short *)p.merged + at + c)
                        = make_uint2(T::pack(v[i][0], v[i][1]), T::pack(v[i][2], v[i][3]));
            }
        if (!p.normed) continue;
#pragma unroll
        for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        const float mean = sum / p.dim;
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                v[i][e] -= mean;
                if (i * 128 + lane * 4 < p.dim) squares += v[i][e] * v[i][e];
            }
#pragma unroll
        for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, d);
        const float scale = rsqrtf(squares / p.dim + p.eps);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 + lane * 4;
            if (c >= p.dim) continue;
            float o[4];
#pragma unroll
            for (int e = 0; e < 4; ++e)
                o[e] = v[i][e] * scale * load_parameter(p.weight, c + e, p.parameter_type)
                       + load_parameter(p.bias, c + e, p.parameter_type);
            *(uint2 *)((unsigned short *)p.normed + at + c)
                = make_uint2(T::pack(o[0], o[1]), T::pack(o[2], o[3]));
        }
        if (p.mean && lane == 0) {
            p.mean[m] = mean;
            p.scale[m] = scale;
        }
    }
}
