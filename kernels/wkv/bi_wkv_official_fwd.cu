// The forward of bi_wkv in its official mode, or what each section does to the sums of both
// directions (SUMS).
#include "wkv/wkv_official.cuh"

struct OfficialFwdParams {
    WkvMap k, v;
    WkvCut cut;
    void *y;               // (B, T, C)
    const void *w, *u;     // (C)
    const float *entries;  // (2, B, sections, 3, C): what enters each from both sides; or null
    float *ends;           // (2, B, sections, 3, C): what leaves each, of its tokens alone
    float eps;
    int batch, length, channels, sections, w_type, u_type;
};

template <class T, bool SUMS>
__global__ void __launch_bounds__(LANES * OFFICIAL_WARPS, 1)
    bi_wkv_official_fwd(const OfficialFwdParams p) {
    extern __shared__ __align__(16) float shared[];
    const int warps = blockDim.y;
    // Of each token: k, v, and the sums of the tokens after it.
    const OfficialPlace<T, 5> at(p.cut, shared + Official<2>::floats(warps), p.length, p.channels);
#pragma unroll 4
    for (int i = 0; i < at.count; ++i) {
        at.word(i, 0) = at.one(p.k, i);
        at.word(i, 1) = at.one(p.v, i);
    }
    Official<2> sums;
    sums.memory = shared + at.lane;
    sums.warps = warps;
    sums.w = load_parameter(p.w, at.channel, p.w_type);
    sums.u = load_parameter(p.u, at.channel, p.u_type);
    sums.eps = p.eps;
    sums.post(at);
    __syncthreads();
    if constexpr (SUMS) {
        if (at.warp < 2 && at.valid)
            for (int way = at.warp; way < 2; way += min(2, warps))
                sums.leaves(at, way).store(
                    at.template sums_of<2>(p.ends, way, p.batch, p.sections, p.channels),
                    p.channels);
        return;
    }

    auto entry = [&](int way) {
        return load_or_none<2>(at.template sums_of<2>(p.entries, way, p.batch, p.sections,
                                                      p.channels), p.channels);
    };
    Sums<2> after = sums.enter(at, entry(0), entry(1));
#pragma unroll 1
    for (int i = at.count - 1; i >= 0; --i) {
        at.keep(i, 2, after);
        after.pass(1.f, sums.w);
        after.add(sums_of_token<2>(at.word(i, 0), at.word(i, 1)));
    }
    char *const y = at.address(p.y, p.length, p.channels);
#pragma unroll 1
    for (int i = 0; i < at.count; ++i) {
        const float k = at.word(i, 0), v = at.word(i, 1);
        const bool begins = at.begins(i);
        sums.reach(begins, k, v);
        float now;
        const Sums<2> others = sums.at_token(begins, k, at.template kept<2>(i, 2), now);
        at.store(y, i, p.channels, fmaf(now, v, others.x[0]) * rcp(now + others.x[1]));
        sums.leave(k, v);
    }
}
