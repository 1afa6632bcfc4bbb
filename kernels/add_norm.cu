// x + scale * branch, and its LayerNorm over the channels.
#include "common.cuh"

struct Params {
    const void *x;                // (M, D) of X
    const void *branch;           // (M, D) of B, if ADD
    const float *scale;           // (samples) of the branch, or null
    const void *weight, *bias;    // (D)
    void *sum;                    // (M, D), if ADD: of X; of O, if there is no norm
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
    if (p.normed) {
        for (int j = threadIdx.x; j < p.dim; j += blockDim.x) {
            shared[j] = load_parameter(p.weight, j, p.parameter_type);
            shared[p.dim + j] = load_parameter(p.bias, j, p.parameter_type);
        }
        __syncthreads();
    }
    for (int m = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); m < p.positions; m += warps) {
        const long long at = (long long)m * p.dim;
        const float scale = ADD && p.scale ? p.scale[m / p.length] : 1.f;
        float v[PARTS][4], sum = 0.f, squares = 0.f;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 + lane * 4;
            unpack4(v[i], load4<X>(p.x, at + c, c < p.dim), X{});
            if (ADD) {
                float b[4];
                unpack4(b, load4<B>(p.branch, at + c, c < p.dim), B{});
#pragma unroll
                // What is left out is 0 times a finite number, or NaN, as in PyTorch.
                for (int e = 0; e < 4; ++e) v[i][e] += scale * b[e];
                if (c < p.dim && p.normed) store4<X>(p.sum, at + c, v[i]);
                else if (c < p.dim) store4<O>(p.sum, at + c, v[i]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) sum += v[i][e];
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
        const float rate = rsqrtf(squares / p.dim + p.eps);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 + lane * 4;
            asm volatile("" ::: "memory");  // or all weights are loaded at once, and spill
            if (c >= p.dim) continue;
            float w[4], b[4];
            unpack4(w, *(const float4 *)(shared + c), Float{});
            unpack4(b, *(const float4 *)(shared + p.dim + c), Float{});
#pragma unroll
            for (int e = 0; e < 4; ++e) v[i][e] = v[i][e] * rate * w[e] + b[e];
            store4<O>(p.normed, at + c, v[i]);
        }
        if (p.moments && lane == 0) p.moments[m] = make_float2(mean, rate);
    }
}
