// The backward of bi_wkv by the formula of its paper, or what each section does to the gradients by
// the sums of both directions (SUMS). wkv_bwd.cu says how the gradients come about.
#include "wkv/wkv_bi.cuh"

struct BiWkvBwdParams {
    WkvMap k, v, dy;
    const void *w, *u;     // (C)
    const float *entries;  // (2, B, sections, 3, C): what enters each from both sides; or null
    const float *drives;   // (2, B, sections, 5, C): the gradients that do; or null
    void *dk, *dv;         // (B, T, C)
    float *parts;          // (B, sections, 2, C): by w and u
    float *ends;           // (2, B, sections, 5, C): the gradients that leave each
    int batch, length, channels, sections, w_type, u_type;
};

// The sums of gradients r and r y, and of these times distances, a token further on, with one more.
__device__ __forceinline__ void step(Sums<4> &sums, float decay, float r, float ry) {
    sums.x[2] = decay * (sums.x[2] + sums.x[0]);
    sums.x[3] = decay * (sums.x[3] + sums.x[1]);
    sums.x[0] = fmaf(decay, sums.x[0], r);
    sums.x[1] = fmaf(decay, sums.x[1], ry);
}

#if __CUDA_ARCH__ >= 1200  // has shared memory for one block
#undef WKV_BOUNDS
#define WKV_BOUNDS(WARPS) __launch_bounds__(LANES *(WARPS))
#endif

template <class T, int R, int WARPS, bool SUMS>
__global__ void WKV_BOUNDS(WARPS) bi_wkv_bwd(const BiWkvBwdParams p) {
    extern __shared__ __align__(16) float shared[];
    const Place<T, R> at(p.length, p.channels);
    const Board<2> boards[2] = {{shared + at.lane, at.warps},
                                {shared + at.warps * Board<2>::ROW + at.lane, at.warps}};
    const Board<4> drive_board = {shared + at.lane, at.warps};
    float *const memory = shared + 2 * at.warps * Board<2>::ROW;
    const Column<float2> kept((float2 *)memory, at.warp * R, at.lane);
    BiSpan<T, R> span = {
        {}, Column<float>(memory + 2 * at.warps * R * LANES, at.warp * R, at.lane)};
    const Column<float> dy(memory + 3 * at.warps * R * LANES, at.warp * R, at.lane);
    at.load(dy, p.dy, p.length);
    keep_in_memory();
    span.load(at, p.k, p.v, p.length);
    const float w = span.w = load_parameter(p.w, at.channel, p.w_type);
    const float u = span.u = load_parameter(p.u, at.channel, p.u_type);
    span.sum(at, p.k, p.v);
    boards[0].post(at.warp, span.before);
    boards[1].post(at.warp, span.after);
    __syncthreads();
    span.enter(boards, at.warp,
               at.template sums_of<2>(p.entries, 0, p.batch, p.sections, p.channels),
               at.template sums_of<2>(p.entries, 1, p.batch, p.sections, p.channels), p.channels);
    __syncthreads();

    // What the span gives to the tokens after it (before) and before it (after).
    Sums<4> before = Sums<4>::none(), after = Sums<4>::none();
    float factor = 0.f;
    if (span.is_near) {
        before.top = after.top = -span.align(factor);
#pragma unroll
        for (int i = R - 1; i >= 0; --i) {
            kept[i] = make_float2(span.after.x[0], span.after.x[1]);
            span.step(span.after, i, factor);
        }
        keep_in_memory();
        const float own = exp_of(u) * factor;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float2 later = kept[i];
            const float inverse = rcp(fmaf(own, span.e[i], span.before.x[1] + later.y));
            const float y = fmaf(own, span.ev[i], span.before.x[0] + later.x) * inverse;
            const float r = i < at.count ? dy[i] * inverse : 0.f;
            kept[i] = make_float2(r, y);
            step(before, span.decay, r, r * y);
            span.step(span.before, i, factor);
        }
        keep_in_memory();
#pragma unroll
        for (int i = R - 1; i >= 0; --i) step(after, span.decay, kept[i].x, kept[i].x * kept[i].y);
    } else {
        // Here `kept` has the logarithm of the denominator in place of r.
#pragma unroll 1
        for (int i = 0; i < at.count; ++i) {
            const Sums<2> all = span.at_token(at, p.k, p.v, i);
            const float y = all.x[0] * rcp(all.x[1]), log = fmaf(LN2, lg2(all.x[1]), all.top);
            const float by = at.one(p.dy, i), far = R - 1 - i;
            kept[i] = make_float2(log, y);
            before.add({-log - far * w, {by, by * y, far * by, far * by * y}});
            after.add({-log - i * w, {by, by * y, i * by, i * by * y}});
        }
    }
    // One direction after the other, for there is memory for one.
    drive_board.post(at.warp, before);
    __syncthreads();
    if constexpr (SUMS) {
        if (at.warp == 0 && at.valid)
            drive_board.template collect<-1>(Sums<4>::none(), at.warps, R, w).store(
                at.template sums_of<4>(p.ends, 0, p.batch, p.sections, p.channels), p.channels);
    } else {
        before = drive_board.template collect<-1>(
            load_or_none<4>(at.template sums_of<4>(p.drives, 0, p.batch, p.sections, p.channels),
                            p.channels), at.warp, R, w);
    }
    __syncthreads();
    drive_board.post(at.warp, after);
    __syncthreads();
    if constexpr (SUMS) {
        if (at.warp == 0 && at.valid)
            drive_board.template collect<1>(Sums<4>::none(), -1, R, w).store(
                at.template sums_of<4>(p.ends, 1, p.batch, p.sections, p.channels), p.channels);
        return;
    }
    after = drive_board.template collect<1>(
        load_or_none<4>(at.template sums_of<4>(p.drives, 1, p.batch, p.sections, p.channels),
                        p.channels), at.warp, R, w);
    float by_w = 0.f, by_u = 0.f;
    char *const dk = at.address(p.dk, p.length, p.channels);
    char *const dv = at.address(p.dv, p.length, p.channels);
    if (span.is_near) {
        before.scale(exp_of(span.most + before.top));
        after.scale(exp_of(span.most + after.top));
        const float bonus = exp_of(u);
        auto pass = [&](Sums<4> &sums, int i) {
            const float2 r_y = kept[i];
            step(sums, span.decay, factor * r_y.x, factor * r_y.x * r_y.y);
        };
        auto add_by_w = [&](const Sums<4> &sums, int i) {
            by_w -= fmaf(span.ev[i], sums.x[2], -span.e[i] * sums.x[3]);
        };
        // The sums of what comes after a token, for every fourth one; they are found again between
        // these, for registers have no room for all.
        float2 marks[(R + 3) / 4];
#pragma unroll
        for (int i = R - 1; i >= 0; --i) {
            if (i % 4 == 3 || i == R - 1) marks[i / 4] = make_float2(after.x[0], after.x[1]);
            add_by_w(after, i);
            pass(after, i);
        }
#pragma unroll
        for (int part = 0; part < R; part += 4) {
            keep_in_memory();
            const int size = min(4, R - part);
            float2 later[4];
            later[size - 1] = marks[part / 4];
#pragma unroll
            for (int i = size - 1; i > 0; --i) {
                const float2 r_y = kept[part + i];
                const float own = factor * r_y.x;
                later[i - 1] = make_float2(fmaf(span.decay, later[i].x, own),
                                           fmaf(span.decay, later[i].y, own * r_y.y));
            }
#pragma unroll
            for (int j = 0; j < size; ++j) {
                const int i = part + j;
                const float2 r_y = kept[i];
                const float now = bonus * factor * r_y.x;
                const float by_now = now * fmaf(-span.e[i], r_y.y, span.ev[i]);
                const float by_r = before.x[0] + later[j].x, by_ry = before.x[1] + later[j].y;
                by_u += by_now;
                at.store(dk, i, p.channels,
                         fmaf(span.ev[i], by_r, fmaf(-span.e[i], by_ry, by_now)));
                at.store(dv, i, p.channels, span.e[i] * (by_r + now));
                add_by_w(before, i);
                pass(before, i);
            }
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < at.count; ++i) {
            const float k = at.one(p.k, i), v = at.one(p.v, i);
            float by_value = 0.f, by_key = 0.f;
            auto add = [&](const Sums<4> &sums) {
                const float e = exp_of(k + sums.top);
                by_value = fmaf(e, sums.x[0], by_value);
                by_key = fmaf(e, fmaf(v, sums.x[0], -sums.x[1]), by_key);
                by_w -= e * fmaf(v, sums.x[2], -sums.x[3]);
            };
            Sums<4> others = before;
            others.pass(i, w);
            add(others);
            others = after;
            others.pass(R - 1 - i, w);
            add(others);
#pragma unroll 1
            for (int j = 0; j < at.count; ++j) {
                const float2 log_y = kept[j];
                const float between = abs(i - j) - 1;
                const float by = exp_of(k + (i == j ? u : -between * w) - log_y.x)
                                 * at.one(p.dy, j);
                const float by_exponent = by * (v - log_y.y);
                by_value += by;
                by_key += by_exponent;
                if (i == j) by_u += by_exponent;
                else by_w -= between * by_exponent;
            }
            at.store(dk, i, p.channels, by_key);
            at.store(dv, i, p.channels, by_value);
        }
    }
    add_parameters(shared, at, p.parts, p.sections, p.channels, by_w, by_u);
}
