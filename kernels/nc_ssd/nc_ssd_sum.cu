// The states of whole sequences from those of spans, in the dtype of products.
#include "common/common.cuh"

struct NcSum {
    const float *parts;  // (jobs, spans, size)
    void *states;        // (jobs, size)
    float scale;
    int spans, size;     // a multiple of 4
};

// A thread has four numbers of a state.
template <class T>
__global__ void __launch_bounds__(128) nc_ssd_sum(const NcSum p) {
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= p.size) return;
    const float *const from = p.parts + (long long)blockIdx.y * p.spans * p.size + i;
    float sum[4] = {};
#pragma unroll 4
    for (int k = 0; k < p.spans; ++k) {
        float v[4];
        unpack4(v, *(const float4 *)(from + (long long)k * p.size), Float{});
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += v[e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] *= p.scale;
    store4<T>(p.states, (long long)blockIdx.y * p.size + i, sum);
}
