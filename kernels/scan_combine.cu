// From the decay and the end of each span, started from zero, to what enters it.
#include "common.cuh"

struct Params {
    const float *decays, *ends;  // (walks, spans, runs, D): what counts is the last run of a span
    float *entries;              // (walks, spans, D)
    int walks, spans, runs, dim;
    int back;                    // from the last span to the first
};

template <int AHEAD>
__global__ void scan_combine(const Params p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.walks * p.dim) return;
    const int walk = i / p.dim;
    const int stride = p.back ? -p.dim : p.dim;
    const long long start = (long long)walk * p.spans + (p.back ? p.spans - 1 : 0);
    const long long last = ((start + 1) * p.runs - 1) * p.dim + i % p.dim;
    const float *decays = p.decays + last, *ends = p.ends + last;
    float *entries = p.entries + start * p.dim + i % p.dim;
    float state = 0.f;
    for (int first = 0; first < p.spans; first += AHEAD) {
        float decay[AHEAD], end[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.spans) {
                decay[j] = decays[(long long)j * p.runs * stride];
                end[j] = ends[(long long)j * p.runs * stride];
            }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.spans) {
                entries[(long long)j * stride] = state;
                state = follow(decay[j], end[j], state);
            }
        entries += (long long)AHEAD * stride;
        decays += (long long)AHEAD * p.runs * stride;
        ends += (long long)AHEAD * p.runs * stride;
    }
}
