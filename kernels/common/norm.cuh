// LayerNorm or RMSNorm of a position whose channels are in the registers of LANES lanes. Of each 4 LANES
// channels a lane has 4 adjacent ones.
#pragma once
#include "common/common.cuh"

// Loads weight and bias (D) into shared memory, of an RMSNorm the weight alone. Called by all
// threads of the block.
template <bool RMS = false>
__device__ __forceinline__ void load_affine(float *to, const void *weight, const void *bias,
                                            int dim, int type) {
    for (int j = threadIdx.x; j < dim; j += blockDim.x) {
        to[j] = load_parameter(weight, j, type);
        if (!RMS) to[dim + j] = load_parameter(bias, j, type);
    }
    __syncthreads();
}

// What store_norm does with 4 channels of part i before it stores them: nothing.
struct AsItIs {
    __device__ __forceinline__ void operator()(int i, float (&v)[4]) const {}
};

// Stores the norm of `v`, which has zeros beyond the last channel, at `to`, after `change` has seen
// it. Returns the mean and 1 / standard deviation, or 0 and 1 / root mean square of an RMSNorm.
template <class O, int LANES = 32, bool RMS = false, int PARTS, class F = AsItIs>
__device__ __forceinline__ float2 store_norm(void *out, long long to, float (&v)[PARTS][4],
                                             const float *affine, int dim, int lane, float eps,
                                             bool valid = true, F change = {}) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += v[i][e];
#pragma unroll
    for (int d = LANES / 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const float mean = RMS ? 0.f : sum / dim;
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            v[i][e] -= mean;
            if ((i * LANES + lane) * 4 < dim) squares += v[i][e] * v[i][e];
        }
#pragma unroll
    for (int d = LANES / 2; d; d >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, d);
    const float rate = rsqrtf(squares / dim + eps);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
        const int c = (i * LANES + lane) * 4;
        asm volatile("" ::: "memory");  // else the compiler loads all weights at once and spills
        if (c >= dim || !valid) continue;
        float w[4], b[4];
        unpack4(w, *(const float4 *)(affine + c), Float{});
        if (!RMS) unpack4(b, *(const float4 *)(affine + dim + c), Float{});
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][e] = v[i][e] * rate * w[e] + (RMS ? 0.f : b[e]);
        change(i, v[i]);
        store4<O>(out, to + c, v[i]);
    }
    return make_float2(mean, rate);
}
