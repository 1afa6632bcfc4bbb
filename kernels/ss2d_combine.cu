// From the decay and the end of each span, started from zero, to the state that enters it.
struct Params {
    const float *decays, *ends;  // (B, K, spans, N * D)
    float *entries;              // (B, K, spans, N * D)
    int walks, spans, inner, routes;  // walks: B * K; routes of the upper half run backwards
};

template <int AHEAD>
__global__ void ss2d_combine(const Params p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.walks * p.inner) return;
    const int walk = i / p.inner, back = walk % p.routes >= 2;
    const long long stride = back ? -(long long)p.inner : p.inner;
    long long at = ((long long)walk * p.spans + (back ? p.spans - 1 : 0)) * p.inner + i % p.inner;
    float state = 0.f;
    for (int first = 0; first < p.spans; first += AHEAD) {
        float decay[AHEAD], end[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.spans) {
                decay[j] = p.decays[at + j * stride];
                end[j] = p.ends[at + j * stride];
            }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.spans) {
                p.entries[at + j * stride] = state;
                state = decay[j] * state + end[j];
            }
        at += AHEAD * stride;
    }
}
