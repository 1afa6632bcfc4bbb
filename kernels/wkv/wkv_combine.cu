// What enters each section of a sequence, from what leaves each: the sums over all tokens before
// it (way 0) or after it (way 1).
#include "wkv/wkv.cuh"

struct WkvCombineParams {
    const float *ends;    // (ways, B, sections, N + 1, C)
    const float *before;  // (B, N + 1, C): what enters the first, or null
    float *entries;       // as ends
    const void *w;        // (C)
    // way: that of the first; tokens: of a section
    int batch, channels, sections, way, tokens, causal, w_type;
};

template <int N>
__global__ void __launch_bounds__(LANES * 16) wkv_combine(const WkvCombineParams p) {
    extern __shared__ __align__(16) float shared[];
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int sample = blockIdx.z, channel = min((int)blockIdx.x * LANES + lane, p.channels - 1);
    const bool valid = (int)blockIdx.x * LANES + lane < p.channels, back = p.way + blockIdx.y == 1;
    const int share = (p.sections + warps - 1) / warps, first = warp * share;
    const int end = min(first + share, p.sections);
    const float w = load_decay(p.w, channel, p.w_type, p.causal), tokens = p.tokens;
    const Board<N> board = {shared + lane, warps};

    // Sections in the order in which the sums pass them.
    auto place = [&](int i) {
        const long long sequence = (long long)blockIdx.y * p.batch + sample;
        return (sequence * p.sections + (back ? p.sections - 1 - i : i)) * (N + 1) * p.channels
               + channel;
    };
    Sums<N> sums = Sums<N>::none();
#pragma unroll 4
    for (int i = first; i < end; ++i) {
        sums.pass(tokens, w);
        sums.add(Sums<N>::load(p.ends + place(i), p.channels));
    }
    board.post(warp, sums);
    __syncthreads();
    const float *const before = p.before;
    sums = board.template collect<-1>(
        load_or_none<N>(before ? before + (long long)sample * (N + 1) * p.channels + channel
                               : nullptr, p.channels), warp, share * tokens, w);
#pragma unroll 4
    for (int i = first; i < end; ++i) {
        const Sums<N> own = Sums<N>::load(p.ends + place(i), p.channels);
        if (valid) sums.store(p.entries + place(i), p.channels);
        sums.pass(tokens, w);
        sums.add(own);
    }
}
