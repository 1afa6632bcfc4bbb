// x + scale * branch, and its LayerNorm or RMSNorm over the channels, of patches too.
#include "common/norm.cuh"
#include "common/patches.cuh"

struct AddNormParams {
    const void *x;                // (M, D) of X
    const void *branch;           // (M, D) of B, if ADD; else (D) of fp32, 16 bytes aligned, or null
    const float *scale;           // (samples) of the branch, or null
    const void *weight, *bias;    // (D); no bias of an RMSNorm
    void *sum;                    // (M, D) of X, or null without ADD; of O, if there is no norm
    void *normed;                 // (M, D) of O, or null: no norm
    float2 *moments;              // (M): mean and 1 / deviation, or null
    float eps;
    int positions, length, dim, parameter_type;  // length: positions of a sample
    Patches patches;              // if ORDER is not PLAIN; then there is no branch
};

// LANES to a position: a warp, or where there are few channels half of one, so that more is read at
// a time; a lane has 4 adjacent channels out of each 4 LANES.
template <class X, class B, class O, bool ADD, int PARTS, int LANES, bool RMS = false,
          int ORDER = PLAIN>
__global__ void __launch_bounds__(256, 2) add_norm(const AddNormParams p) {
    constexpr int OF_WARP = 32 / LANES;
    const int lane = threadIdx.x % LANES, warps = gridDim.x * (blockDim.x >> 5);
    extern __shared__ __align__(16) float shared[];  // weight and bias, if there is a norm
    if (p.normed) load_affine<RMS>(shared, p.weight, p.bias, p.dim, p.parameter_type);
    for (int first = (blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)) * OF_WARP;
         first < p.positions; first += warps * OF_WARP) {
        const int m = first + threadIdx.x % 32 / LANES;
        const bool valid = OF_WARP == 1 || m < p.positions;
        const long long at = (long long)m * p.dim;
        const long long from = ORDER == MERGE
            ? (long long)merged_pixel(p.patches, m) * (p.dim / 4) : at;
        const long long to = ORDER == EXPAND ? (long long)expanded_row(p.patches, m) * p.dim : at;
        const float scale = ADD && valid && p.scale ? p.scale[m / p.length] : 1.f;
        float v[PARTS][4];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = (i * LANES + lane) * 4;
            const bool there = c < p.dim && valid;
            const int source = ORDER == MERGE ? merged_channel(p.patches, c, p.dim) : c;
            unpack4(v[i], load4_last<X>(p.x, from + source, there), X{});
            if (ADD) {
                float b[4];
                unpack4(b, load4_last<B>(p.branch, at + c, there), B{});
                // What is left out is 0 times a finite number, or NaN, as in PyTorch.
#pragma unroll
                for (int e = 0; e < 4; ++e) v[i][e] += scale * b[e];
                if (there && p.normed) store4_aside<X>(p.sum, at + c, v[i]);
                else if (there) store4<O>(p.sum, at + c, v[i]);
            } else if (p.branch && there) {
                float b[4];
                unpack4(b, *(const float4 *)((const float *)p.branch + c), Float{});
#pragma unroll
                for (int e = 0; e < 4; ++e) v[i][e] += b[e];
                if (p.sum) store4<X>(p.sum, at + c, v[i]);
            }
        }
        if (!p.normed) continue;
        const float2 moments = store_norm<O, LANES, RMS>(p.normed, to, v, shared, p.dim, lane,
                                                         p.eps, valid);
        if (p.moments && lane == 0 && valid) p.moments[m] = moments;
    }
}
