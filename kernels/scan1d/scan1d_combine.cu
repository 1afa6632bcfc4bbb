// What enters each span of a sequence: the state, or from the far end the gradient by it.
#include "common/common.cuh"

struct Scan1dCombineParams {
    const float *ends, *sums;  // (B, spans, K * D, N); (B, spans, K * D)
    const float *before;       // (B, K * D, N), or null for zeros
    const void *A;             // (K * D, N)
    float *entries, *after;     // (B, spans, K * D, N); (B, K * D, N): what leaves the last, or null
    int batch, channels, state, spans, A_type, back;
};

__global__ void __launch_bounds__(128) scan1d_combine(const Scan1dCombineParams p) {
    const long long inner = (long long)p.channels * p.state;
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.batch * inner) return;
    const long long at = i % inner, b = i / inner;
    const float rate = load_parameter(p.A, at, p.A_type);
    float h = p.before ? p.before[i] : 0.f;
#pragma unroll 4
    for (int n = 0; n < p.spans; ++n) {
        const long long span = b * p.spans + (p.back ? p.spans - 1 - n : n);
        p.entries[span * inner + at] = h;
        h = fmaf(ex2(rate * p.sums[span * p.channels + at / p.state]), h,
                 p.ends[span * inner + at]);
    }
    if (p.after) p.after[i] = h;
}
