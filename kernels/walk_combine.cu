// From the decay and the end of each span, started from zero, to what enters it; in walk order.
struct Params {
    const float *decays, *ends;  // (walks, spans, inner)
    float *entries;              // (walks, spans, inner)
    int walks, spans, inner;
};

template <int AHEAD>
__global__ void walk_combine(const Params p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.walks * p.inner) return;
    long long at = (long long)(i / p.inner) * p.spans * p.inner + i % p.inner;
    float state = 0.f;
    for (int first = 0; first < p.spans; first += AHEAD) {
        float decay[AHEAD], end[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.spans) {
                decay[j] = p.decays[at + (long long)j * p.inner];
                end[j] = p.ends[at + (long long)j * p.inner];
            }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j < p.spans) {
                p.entries[at + (long long)j * p.inner] = state;
                state = fmaf(decay[j], state, end[j]);
            }
        at += (long long)AHEAD * p.inner;
    }
}
