// x + scale * branch, and its LayerNorm over the channels.
#include "norm.cuh"

struct Params {
    const void *x;                // (M, D) of X
    const void *branch;           // (M, D) of B, if ADD; else (D) of fp32, 16 bytes aligned, or null
    const float *scale;           // (samples) of the branch, or null
    const void *weight, *bias;    // (D)
    void *sum;                    // (M, D) of X, or null without ADD; of O, if there is no norm
    void *normed;                 // (M, D) of O, or null: no norm
    float2 *moments;              // (M): mean and 1 / deviation, or null
    float eps;
    int positions, length, dim, parameter_type;  // length: positions of a sample
};

// A warp per position; a lane has 4 adjacent channels out of each 128.
template <class X, class B, class O, bool ADD, int PARTS>
__global__ void __launch_bounds__(256, 2) add_norm(const Params p) {
    const int lane = threadIdx.x & 31;
    const int warps = gridDim.x * (blockDim.x >> 5);
    extern __shared__ __align__(16) float shared[];  // weight and bias, if there is a norm
    if (p.normed) load_affine(shared, p.weight, p.bias, p.dim, p.parameter_type);
    for (int m = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); m < p.positions; m += warps) {
        const long long at = (long long)m * p.dim;
        const float scale = ADD && p.scale ? p.scale[m / p.length] : 1.f;
        float v[PARTS][4];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 + lane * 4;
            unpack4(v[i], load4<X>(p.x, at + c, c < p.dim), X{});
            if (ADD) {
                float b[4];
                unpack4(b, load4<B>(p.branch, at + c, c < p.dim), B{});
                // What is left out is 0 times a finite number, or NaN, as in PyTorch.
#pragma unroll
                for (int e = 0; e < 4; ++e) v[i][e] += scale * b[e];
                if (c < p.dim && p.normed) store4<X>(p.sum, at + c, v[i]);
                else if (c < p.dim) store4<O>(p.sum, at + c, v[i]);
            } else if (p.branch && c < p.dim) {
                float b[4];
                unpack4(b, *(const float4 *)((const float *)p.branch + c), Float{});
#pragma unroll
                for (int e = 0; e < 4; ++e) v[i][e] += b[e];
                if (p.sum) store4<X>(p.sum, at + c, v[i]);
            }
        }
        if (!p.normed) continue;
        const float2 moments = store_norm<O>(p.normed, at, v, shared, p.dim, lane, p.eps);
        if (p.moments && lane == 0) p.moments[m] = moments;
    }
}
