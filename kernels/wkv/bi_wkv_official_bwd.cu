// The published backward of bi_wkv in its official mode: by w and u the derivatives of the result, by
// k and v what the paper's weights over the official denominators give. MODE: what each section does
// to the sums (ENDS), to the gradients by them (DRIVES), or the gradients.
#include "wkv/wkv_official.cuh"

constexpr int RUN = 0, ENDS = 1, DRIVES = 2;

struct OfficialBwdParams {
    WkvMap k, v, dy;
    WkvCut cut;
    const void *w, *u;     // (C)
    const float *entries;  // (2, B, sections, 5, C): what enters each from both sides; or null
    const float *drives;   // (2, B, sections, 3, C): the gradients that do; or null
    void *dk, *dv;         // (B, T, C)
    float *parts;          // (B, sections, 2, C): by w and u
    float *ends;           // (2, B, sections, 5 or, of DRIVES, 3, C): what leaves each
    float eps;
    int batch, length, channels, sections, w_type, u_type;
};

template <class T, int MODE>
__global__ void __launch_bounds__(LANES * OFFICIAL_WARPS, 1)
    bi_wkv_official_bwd(const OfficialBwdParams p) {
    extern __shared__ __align__(16) float shared[];
    const int warps = blockDim.y;
    // Of each token: k, v, the sums of the tokens after it; then in their place the exponent of its
    // sums, y, dy / denominator, and the gradients so far. A denominator may be negative.
    const OfficialPlace<T, 7> at(p.cut, shared + Official<4>::floats(warps), p.length, p.channels);
#pragma unroll 4
    for (int i = 0; i < at.count; ++i) {
        at.word(i, 0) = at.one(p.k, i);
        at.word(i, 1) = at.one(p.v, i);
    }
    Official<4> sums;
    sums.memory = shared + at.lane;
    sums.warps = warps;
    const float w = sums.w = load_parameter(p.w, at.channel, p.w_type);
    const float u = sums.u = load_parameter(p.u, at.channel, p.u_type);
    sums.eps = p.eps;
    sums.post(at);
    __syncthreads();
    if constexpr (MODE == ENDS) {
        if (at.warp < 2 && at.valid)
            for (int way = at.warp; way < 2; way += min(2, warps))
                sums.leaves(at, way).store(
                    at.template sums_of<4>(p.ends, way, p.batch, p.sections, p.channels),
                    p.channels);
        return;
    }

    auto entry = [&](int way) {
        return load_or_none<4>(at.template sums_of<4>(p.entries, way, p.batch, p.sections,
                                                      p.channels), p.channels);
    };
    Sums<4> after = sums.enter(at, entry(0), entry(1));
    __syncthreads();
#pragma unroll 1
    for (int i = at.count - 1; i >= 0; --i) {
        at.keep(i, 2, after);
        after.pass(1.f, w);
        after.add(sums_of_token<4>(at.word(i, 0), at.word(i, 1)));
    }
    float by_w = 0.f, by_u = 0.f;
    Sums<2> drive_before = Sums<2>::none(), drive_after = Sums<2>::none();
#pragma unroll 1
    for (int i = 0; i < at.count; ++i) {
        const float k = at.word(i, 0), v = at.word(i, 1), dy = at.one(p.dy, i);
        const bool begins = at.begins(i);
        sums.reach(begins, k, v);
        float weight;
        const Sums<4> others = sums.at_token(begins, k, at.template kept<4>(i, 2), weight);
        sums.leave(k, v);
        const float inverse = rcp(weight + others.x[1]);
        const float y = fmaf(weight, v, others.x[0]) * inverse, r = dy * inverse;
        by_w = fmaf(r, fmaf(-y, others.x[3], others.x[2]), by_w);
        // v - y by what the others have: of a single token, it is that of eps beside its weight.
        const float now = weight * r, by_now = now * (fmaf(v, others.x[1], -others.x[0]) * inverse);
        by_u += by_now;
        at.word(i, 2) = others.top;
        at.word(i, 3) = y;
        at.word(i, 4) = r;
        at.word(i, 5) = by_now;
        at.word(i, 6) = now;
        drive_before.pass(1.f, w);
        drive_before.add({-others.top, {r, r * y}});
    }
    drive_before.pass(at.end(at.warp) - at.start(at.warp) - at.count, w);
#pragma unroll 1
    for (int i = at.count - 1; i >= 0; --i) {
        drive_after.pass(1.f, w);
        drive_after.add({-at.word(i, 2), {at.word(i, 4), at.word(i, 4) * at.word(i, 3)}});
    }
    const Board<2> boards[2] = {{shared + at.lane, warps},
                                {shared + warps * Board<2>::ROW + at.lane, warps}};
    boards[0].post(at.warp, drive_before);
    boards[1].post(at.warp, drive_after);
    __syncthreads();
    if constexpr (MODE == DRIVES) {
        if (at.warp || !at.valid) return;
        collect<-1>(at, boards[0], warps, 0, warps, w)
            .store(at.template sums_of<2>(p.ends, 0, p.batch, p.sections, p.channels), p.channels);
        collect<1>(at, boards[1], -1, 0, warps, w)
            .store(at.template sums_of<2>(p.ends, 1, p.batch, p.sections, p.channels), p.channels);
        return;
    }

    auto drive = [&](int way) {
        return load_or_none<2>(at.template sums_of<2>(p.drives, way, p.batch, p.sections,
                                                      p.channels), p.channels);
    };
    drive_before = drive(0);
    drive_before.pass(at.start(at.warp), w);
    drive_before.add(collect<-1>(at, boards[0], at.warp, 0, at.warp, w));
    drive_after = drive(1);
    drive_after.pass(at.start(warps) - at.end(at.warp), w);
    drive_after.add(collect<1>(at, boards[1], at.warp, at.warp + 1, warps, w));
    // Adds what outputs give token i, and goes on to the next one.
    auto add = [&](Sums<2> &drive, int i) {
        const float e = exp_of(at.word(i, 0) + drive.top);
        at.word(i, 5) += e * fmaf(at.word(i, 1), drive.x[0], -drive.x[1]);
        at.word(i, 6) += e * drive.x[0];
        drive.pass(1.f, w);
        drive.add({-at.word(i, 2), {at.word(i, 4), at.word(i, 4) * at.word(i, 3)}});
    };
#pragma unroll 1
    for (int i = at.count - 1; i >= 0; --i) add(drive_after, i);
    char *const dk = at.address(p.dk, p.length, p.channels);
    char *const dv = at.address(p.dv, p.length, p.channels);
#pragma unroll 1
    for (int i = 0; i < at.count; ++i) {
        add(drive_before, i);
        at.store(dk, i, p.channels, at.word(i, 5));
        at.store(dv, i, p.channels, at.word(i, 6));
    }
    add_parameters(shared, at, p.parts, p.sections, p.channels, by_w, by_u);
}
