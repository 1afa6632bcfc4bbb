// Calculates the state that enters each span, from the decays of the spans and the states at their
// ends when each starts from zero.
#include "common/common.cuh"

struct ScanCombineParams {
    const float *decays, *ends;  // (scans, sources, D)
    float *entries;              // (scans, spans, D)
    int scans, spans, dim, back; // back: from the last span to the first
    int sources;                 // spans, or one less: nothing enters from the last one
};

template <int AHEAD>
__global__ void scan_combine(const ScanCombineParams p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.scans * p.dim) return;
    const int scan = i / p.dim;
    const long long stride = p.back ? -(long long)p.dim : p.dim;
    const int begin = p.back ? p.spans - 1 : 0;
    long long at = ((long long)scan * p.spans + begin) * p.dim + i % p.dim;
    long long from = at - (long long)scan * (p.spans - p.sources) * p.dim;
    float state = 0.f;
    for (int first = 0; first < p.spans; first += AHEAD) {
        float decay[AHEAD], end[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.sources) {
                decay[j] = p.decays[from + j * stride];
                end[j] = p.ends[from + j * stride];
            } else {
                decay[j] = end[j] = 0.f;
            }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.spans) {
                p.entries[at + j * stride] = state;
                state = follow(decay[j], end[j], state);
            }
        at += AHEAD * stride, from += AHEAD * stride;
    }
}
