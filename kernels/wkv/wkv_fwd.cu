// The forward of wkv (causal), or what each section does to the sums (SUMS).
#include "wkv/wkv.cuh"

struct WkvFwdParams {
    WkvMap k, v;
    void *y;               // (B, T, C)
    const void *w, *u;     // (C)
    const float *entries;  // (B, sections, 3, C): what enters each; or null
    float *last;           // (B, 3, C): what leaves the last, or null
    float *ends;           // (B, sections, 3, C): what leaves each, of its tokens alone
    int batch, length, channels, sections, w_type, u_type;
};

template <class T, int R, int WARPS, bool SUMS>
__global__ void WKV_BOUNDS(WARPS) wkv_fwd(const WkvFwdParams p) {
    extern __shared__ __align__(16) float shared[];
    const Place<T, R> at(p.length, p.channels);
    const Board<2> board = {shared + at.lane, at.warps};
    const float w = load_decay(p.w, at.channel, p.w_type, true);
    float k[R], v[R];
    at.load(k, p.k, p.length);
    at.load(v, p.v, p.length);

    board.post(at.warp, span_sums<R>(k, v, at.count, w));
    __syncthreads();
    if constexpr (SUMS) {
        if (at.warp || !at.valid) return;
        board.template collect<-1>(Sums<2>::none(), at.warps, R, w)
            .store(at.template sums_of<2>(p.ends, 0, p.batch, p.sections, p.channels), p.channels);
        return;
    }

    Sums<2> sums = board.template collect<-1>(
        load_or_none<2>(at.template sums_of<2>(p.entries, 0, p.batch, p.sections, p.channels),
                        p.channels), at.warp, R, w);
    const float u = load_parameter(p.u, at.channel, p.u_type);
    char *const y = at.address(p.y, p.length, p.channels);
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (i < at.count) {
            Sums<2> all = sums;
            all.add({u + k[i], {v[i], 1.f}});
            at.store(y, i, p.channels, all.x[0] * rcp(all.x[1]));
            sums.pass(1.f, w);
            sums.add({k[i], {v[i], 1.f}});
        }
    if (p.last && at.count && at.first + at.count == p.length && at.valid)
        sums.store(p.last + (long long)at.sample * 3 * p.channels + at.channel, p.channels);
}
