// What enters each span of a sequence, from what parts of the spans leave: the state, or from the
// far end (`back`) the gradient by it.
#include "common/common.cuh"

struct Scan1dCombineParams {
    const float *ends, *sums;  // (B, parts, K * D, N); (B, parts, K * D)
    const float *before;       // (B, K * D, N): what enters the first, or null for zeros
    const void *A;             // (K * D, N)
    float *entries;            // (B, spans, K * D, N)
    int batch, channels, state, parts, spans, of_span, A_type, back;  // of_span: parts of a span
};

__global__ void __launch_bounds__(128) scan1d_combine(const Scan1dCombineParams p) {
    const long long inner = (long long)p.channels * p.state;
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.batch * inner) return;
    const long long at = i % inner, b = i / inner;
    const float rate = load_parameter(p.A, at, p.A_type);
    float h = p.before ? p.before[i] : 0.f;
    for (int span = 0, part = 0; span < p.spans; ++span) {
        p.entries[(b * p.spans + (p.back ? p.spans - 1 - span : span)) * inner + at] = h;
#pragma unroll 4
        for (int n = 0; n < p.of_span && part < p.parts; ++n, ++part) {
            const long long from = b * p.parts + (p.back ? p.parts - 1 - part : part);
            h = fmaf(ex2(rate * p.sums[from * p.channels + at / p.state]), h,
                     p.ends[from * inner + at]);
        }
    }
}
