// The states that enter the spans of a sequence, from what each does to a state; and the same
// backwards, for the gradients by the states that leave spans.
#include "ssd/ssd.cuh"

struct Combine {
    const float *ends, *grad_ends, *sums;   // of each span, as from ssd_states
    const float *before, *grad_before;      // what enters the first span, null for zeros
    float *entries, *grad_entries;          // what enters each
    float *last, *grad_last;                // what leaves the last one, null if not wanted
    int count, spans, size, backwards;      // sequences times heads; numbers of a state
};

// A thread has four numbers of a state.
__global__ void __launch_bounds__(128) ssd_combine(const Combine p) {
    const bool back = p.backwards + (int)blockIdx.y > 0;
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= (long long)p.count * p.size) return;
    const long long sequence = i / p.size, first = sequence * p.spans * p.size + i % p.size;
    const float *const ends = (back ? p.grad_ends : p.ends) + first;
    float *const entries = (back ? p.grad_entries : p.entries) + first;
    const float *const before = back ? p.grad_before : p.before;
    float *const last = back ? p.grad_last : p.last;
    const float *const sums = p.sums + sequence * p.spans;
    float v[4] = {};
    if (before) unpack4(v, *(const float4 *)(before + i), Float{});
#pragma unroll 4
    for (int k = 0; k < p.spans; ++k) {
        const int span = back ? p.spans - 1 - k : k;
        const long long at = (long long)span * p.size;
        store4<Float>(entries, at, v);
        if (k + 1 == p.spans && !last) break;
        float end[4];
        unpack4(end, *(const float4 *)(ends + at), Float{});
        const float through = ex2(sums[span]);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = through * v[e] + end[e];
    }
    if (last) store4<Float>(last, i, v);
}
