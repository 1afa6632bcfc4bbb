// The backward of wkv (causal), or what each section does to the gradients by the sums (SUMS).
//
// With r = dy / denominator, the gradients are sums over the outputs that read a token, r and r y
// times the weights, which are sums like those of the forward from the other end. Times distances,
// they give the gradient by w.
#include "wkv/wkv.cuh"

struct WkvBwdParams {
    WkvMap k, v, dy;
    const void *w, *u;     // (C)
    const float *entries;  // (B, sections, 3, C): what enters each, or null
    const float *drives;   // (B, sections, 5, C): the gradients that enter each from its end, or null
    const float *dlast;    // (B, 3, C): by what leaves the last section, or null
    void *dk, *dv;         // (B, T, C)
    float *dentry;         // (B, 3, C): by what enters the first, or null
    float *parts;          // (B, sections, 2, C): by w and u
    float *ends;           // (B, sections, 5, C): what leaves each section at its start
    int batch, length, channels, sections, w_type, u_type;
};

template <class T, int R, int WARPS, bool SUMS>
__global__ void WKV_BOUNDS(WARPS) wkv_bwd(const WkvBwdParams p) {
    extern __shared__ __align__(16) float shared[];
    const Place<T, R> at(p.length, p.channels);
    const Board<4> board = {shared + at.lane, at.warps};
    const Board<2> first_board = {shared + at.lane, at.warps};
    // Of each token the result and the exponent of its sums, the value, and dy or r.
    float *const memory = shared + at.warps * Board<4>::ROW;
    const Column<float2> kept((float2 *)memory, at.warp * R, at.lane);
    const Column<float> v(memory + 2 * at.warps * R * LANES, at.warp * R, at.lane);
    const Column<float> r(memory + 3 * at.warps * R * LANES, at.warp * R, at.lane);
    float k[R];
    at.load(r, p.dy, p.length);
    keep_in_memory();
    at.load(k, p.k, p.length);
    at.load(v, p.v, p.length);
    keep_in_memory();
    const float w = load_decay(p.w, at.channel, p.w_type, true);
    first_board.post(at.warp, span_sums<R>(k, v, at.count, w));
    __syncthreads();
    const float *const entry = at.template sums_of<2>(p.entries, 0, p.batch, p.sections,
                                                      p.channels);
    Sums<2> sums = first_board.template collect<-1>(load_or_none<2>(entry, p.channels), at.warp, R,
                                                    w);
    const float u = load_parameter(p.u, at.channel, p.u_type);
    float least = 0.f;  // of the exponents of what this span gives to the tokens before it
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (i < at.count) {
            Sums<2> all = sums;
            all.add({u + k[i], {v[i], 1.f}});
            const float inverse = rcp(all.x[1]);
            r[i] *= inverse;
            kept[i] = make_float2(all.x[0] * inverse, all.top);
            least = i ? fminf(least, all.top + i * w) : all.top;
            sums.pass(1.f, w);
            sums.add({k[i], {v[i], 1.f}});
        }
    keep_in_memory();
    Sums<4> end = Sums<4>::none();
    const bool is_last = at.count && at.first + at.count == p.length;
    if (p.dlast && is_last) {
        const float *const from = p.dlast + (long long)at.sample * 3 * p.channels + at.channel;
        end = {-sums.top, {from[0], -from[p.channels], 0.f, 0.f}};
    }
    Sums<4> own = {-least, {}};
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (i < at.count) {
            const float2 y_top = kept[i];
            const float e = exp_of(least - y_top.y - i * w) * r[i];
            own.x[0] += e;
            own.x[1] = fmaf(e, y_top.x, own.x[1]);
            own.x[2] = fmaf(i, e, own.x[2]);
            own.x[3] = fmaf(i * e, y_top.x, own.x[3]);
        }
    if (at.count) {
        Sums<4> beyond = end;
        beyond.pass(at.count, w);
        own.add(beyond);
    } else {
        own.top = LOW;
    }
    __syncthreads();
    board.post(at.warp, own);
    __syncthreads();
    if constexpr (SUMS) {
        if (at.warp || !at.valid) return;
        board.template collect<1>(Sums<4>::none(), -1, R, w)
            .store(at.template sums_of<4>(p.ends, 0, p.batch, p.sections, p.channels), p.channels);
        return;
    }

    Sums<4> drive = board.template collect<1>(
        load_or_none<4>(at.template sums_of<4>(p.drives, 0, p.batch, p.sections, p.channels),
                        p.channels), at.warp, R, w);
    if (is_last) drive = end;
    float by_w = 0.f, by_u = 0.f;
    char *const dk = at.address(p.dk, p.length, p.channels);
    char *const dv = at.address(p.dv, p.length, p.channels);
#pragma unroll
    for (int i = R - 1; i >= 0; --i)
        if (i < at.count) {
            const float2 y_top = kept[i];
            const float e = exp_of(k[i] + drive.top);
            const float now = exp_of(u + k[i] - y_top.y) * r[i];
            const float by_now = now * (v[i] - y_top.x);
            by_u += by_now;
            by_w -= e * fmaf(v[i], drive.x[2], -drive.x[3]);
            at.store(dk, i, p.channels, fmaf(e, fmaf(v[i], drive.x[0], -drive.x[1]), by_now));
            at.store(dv, i, p.channels, fmaf(e, drive.x[0], now));
            drive.pass(1.f, w);
            drive.add({-y_top.y, {r[i], r[i] * y_top.x, 0.f, 0.f}});
        }
    if (p.dentry && at.section == 0 && at.warp == 0) {
        const Sums<2> before = load_or_none<2>(entry, p.channels);
        drive.scale(exp_of(before.top + drive.top));
        by_w -= fmaf(before.x[0], drive.x[2], -before.x[1] * drive.x[3]);
        const float of_a = drive.x[0], of_b = -drive.x[1];
        if (at.valid) {
            float *const by = p.dentry + (long long)at.sample * 3 * p.channels + at.channel;
            by[0] = of_a;
            by[p.channels] = of_b;
            by[2 * p.channels] = fmaf(of_a, before.x[0], of_b * before.x[1]);
        }
    }
    add_parameters(shared, at, p.parts, p.sections, p.channels, by_w * w, by_u);
}
