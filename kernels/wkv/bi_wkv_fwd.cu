// The forward of bi_wkv by the formula of its paper, or what each section does to the sums of both
// directions (SUMS).
#include "wkv/wkv_bi.cuh"

struct BiWkvFwdParams {
    WkvMap k, v;
    void *y;               // (B, T, C)
    const void *w, *u;     // (C)
    const float *entries;  // (2, B, sections, 3, C): what enters each from both sides; or null
    float *ends;           // (2, B, sections, 3, C): what leaves each, of its tokens alone
    int batch, length, channels, sections, w_type, u_type;
};

template <class T, int R, int WARPS, bool SUMS>
__global__ void WKV_BOUNDS(WARPS) bi_wkv_fwd(const BiWkvFwdParams p) {
    extern __shared__ __align__(16) float shared[];
    const Place<T, R> at(p.length, p.channels);
    const Board<2> boards[2] = {{shared + at.lane, at.warps},
                                {shared + at.warps * Board<2>::ROW + at.lane, at.warps}};
    float *const own_memory = shared + 2 * at.warps * Board<2>::ROW + at.warp * 3 * R * LANES;
    BiSpan<T, R> span = {{}, Column<float>(own_memory, 2 * R, at.lane)};
    span.load(at, p.k, p.v, p.length);
    span.w = load_parameter(p.w, at.channel, p.w_type);
    span.u = load_parameter(p.u, at.channel, p.u_type);
    span.post(at, p.k, p.v, boards);
    __syncthreads();
    const bool tame = span.is_tame();
    if constexpr (SUMS) {
        if (at.warp || !at.valid) return;
        span.template collect<-1>(boards, tame, at.warps, span.most, Sums<2>::none())
            .store(at.template sums_of<2>(p.ends, 0, p.batch, p.sections, p.channels), p.channels);
        span.template collect<1>(boards, tame, -1, span.most, Sums<2>::none())
            .store(at.template sums_of<2>(p.ends, 1, p.batch, p.sections, p.channels), p.channels);
        return;
    }

    span.enter(boards, tame, at.warp,
               at.template sums_of<2>(p.entries, 0, p.batch, p.sections, p.channels),
               at.template sums_of<2>(p.entries, 1, p.batch, p.sections, p.channels), p.channels);
    char *const y = at.address(p.y, p.length, p.channels);
    if (tame || span.is_near()) {
        if (p.entries || !tame) {  // else all have one exponent already
            float factor;
            span.align(factor);
#pragma unroll
            for (int i = 0; i < R; ++i) span.e[i] *= factor, span.ev[i] *= factor;
        }
        const float bonus = exp_of(span.u);
        // The sums after each token go to shared memory, from which only this thread reads them.
        const Column<float2> later((float2 *)own_memory, 0, at.lane);
#pragma unroll
        for (int i = R - 1; i >= 0; --i) {
            later[i] = make_float2(span.after.x[0], span.after.x[1]);
            span.step(span.after, i, 1.f);
        }
        keep_in_memory();
        char *to = y;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float2 after = later[i];
            const float numerator = fmaf(bonus, span.ev[i], span.before.x[0] + after.x);
            const float denominator = fmaf(bonus, span.e[i], span.before.x[1] + after.y);
            at.write(to, i, numerator * rcp(denominator));
            to += p.channels * at.SIZE;
            span.step(span.before, i, 1.f);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < at.count; ++i) {
            const Sums<2> all = span.at_token(at, p.k, p.v, i);
            at.store(y, i, p.channels, all.x[0] * rcp(all.x[1]));
        }
    }
}
