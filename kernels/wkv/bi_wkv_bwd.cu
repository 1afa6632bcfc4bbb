// The backward of bi_wkv by the formula of its paper, or what each section does to the gradients by
// the sums of both directions (SUMS). wkv_bwd.cu says how the gradients come about, but for that by w:
// the distance of two tokens in it is the number of tokens between them. So it is the sum over tokens
// s of what those before s give to the outputs after s, and what those after s give to the outputs
// before it: the sums of weights times the sums of gradients.
#include "wkv/wkv_bi.cuh"

struct BiWkvBwdParams {
    WkvMap k, v, dy;
    const void *w, *u;     // (C)
    const float *entries;  // (2, B, sections, 3, C): what enters each from both sides; or null
    const float *drives;   // (2, B, sections, 3, C): the gradients that do; or null
    void *dk, *dv;         // (B, T, C)
    float *parts;          // (B, sections, 2, C): by w and u
    float *ends;           // (2, B, sections, 3, C): the gradients that leave each
    int batch, length, channels, sections, w_type, u_type;
};

// Sums of values of tokens, a token further on, with one more.
__device__ __forceinline__ void step(float (&sums)[2], float decay, float2 more) {
    sums[0] = fmaf(decay, sums[0], more.x);
    sums[1] = fmaf(decay, sums[1], more.y);
}

#undef WKV_BOUNDS
#if __CUDA_ARCH__ >= 1200  // has shared memory for one block
#define WKV_BOUNDS(WARPS) __launch_bounds__(LANES *(WARPS))
#else  // more registers than 96 for 16 warps, or 72, do no good: with them it spills
#define WKV_BOUNDS(WARPS) \
    __launch_bounds__(LANES *((WARPS) > 14 ? 20 : (WARPS)), (WARPS) < 14 ? 3 : (WARPS) > 14 ? 1 : 2)
#endif

template <class T, int R, int WARPS, bool SUMS>
__global__ void WKV_BOUNDS(WARPS) bi_wkv_bwd(const BiWkvBwdParams p) {
    extern __shared__ __align__(16) float shared[];
    const Place<T, R> at(p.length, p.channels);
    const Board<2> boards[2] = {{shared + at.lane, at.warps},
                                {shared + at.warps * Board<2>::ROW + at.lane, at.warps}};
    // Of each token r and r y, the value times the weight, and dy or what its own weight gives.
    float *const own_memory = shared + 2 * at.warps * Board<2>::ROW + at.warp * 4 * R * LANES;
    const Column<float2> kept((float2 *)own_memory, 0, at.lane);
    BiSpan<T, R> span = {{}, Column<float>(own_memory, 2 * R, at.lane)};
    const Column<float> dy(own_memory, 3 * R, at.lane);
    at.load(dy, p.dy, p.length);
    keep_in_memory();
    span.load(at, p.k, p.v, p.length);
    const float w = span.w = load_parameter(p.w, at.channel, p.w_type);
    const float u = span.u = load_parameter(p.u, at.channel, p.u_type);
    span.post(at, p.k, p.v, boards);
    __syncthreads();
    auto enter = [&](const bool tame) __attribute__((always_inline)) {
        span.enter(boards, tame, at.warp,
                   at.template sums_of<2>(p.entries, 0, p.batch, p.sections, p.channels),
                   at.template sums_of<2>(p.entries, 1, p.batch, p.sections, p.channels),
                   p.channels);
        __syncthreads();
    };
    // What the span gives to the tokens after it (before) and before it (after), sums of the
    // gradients by numerators, r, and by denominators but for the sign, r y, becomes what others give
    // to it.
    auto exchange = [&](const bool tame, float top, Sums<2> &before, Sums<2> &after)
                        __attribute__((always_inline)) {
        span.post(at.warp, boards, tame, before, after);
        __syncthreads();
        if constexpr (SUMS) {
            if (at.warp || !at.valid) return;
            span.template collect<-1>(boards, tame, at.warps, -top, Sums<2>::none()).store(
                at.template sums_of<2>(p.ends, 0, p.batch, p.sections, p.channels), p.channels);
            span.template collect<1>(boards, tame, -1, -top, Sums<2>::none()).store(
                at.template sums_of<2>(p.ends, 1, p.batch, p.sections, p.channels), p.channels);
        } else {
            before = span.template collect<-1>(
                boards, tame, at.warp, -top, load_or_none<2>(
                    at.template sums_of<2>(p.drives, 0, p.batch, p.sections, p.channels),
                    p.channels));
            after = span.template collect<1>(
                boards, tame, at.warp, -top, load_or_none<2>(
                    at.template sums_of<2>(p.drives, 1, p.batch, p.sections, p.channels),
                    p.channels));
        }
    };
    // Of a span with one exponent. `plain` is a constant: all have the same one. Where not, that of
    // the sums of a side is at least `most`.
    auto run_near = [&](const bool plain, const bool tame) __attribute__((always_inline)) {
        enter(tame);
        Sums<2> before = Sums<2>::none(), after = Sums<2>::none();
        // For the gradient by w: that of pairs within the span; and the sums over its tokens of the
        // sums of weights before and after each, times the decay from there to the end and the start.
        float by_w = 0.f, by_u = 0.f, to_end[2] = {}, to_start[2] = {};
        float factor = 1.f, top = span.most;  // of sums; e counts times factor
        float of_before = 1.f, of_after = 1.f, as_before = 1.f, as_after = 1.f;
        if (!plain) {
            as_before = span.raise(span.before);
            as_after = span.raise(span.after);
            top = fmaxf(span.before.top, span.after.top);
            of_before = exp_of(span.before.top - top);
            of_after = exp_of(span.after.top - top);
            factor = exp_of(span.most - top);
        }
#pragma unroll
        for (int i = R - 1; i >= 0; --i) {
            const float2 later = make_float2(span.after.x[0], span.after.x[1]);
            kept[i] = later;
            step(to_start, span.decay, later);
            span.step(span.after, i, as_after);
            if (i % 4 == 0) keep_in_memory();
        }
        keep_in_memory();
        const float own = exp_of(u) * factor;
        float passed = 1.f, by_w_before = 0.f, by_w_after = 0.f;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float2 later = kept[i];
            const float e = span.e[i], ev = span.ev[i];
            const float numerator = fmaf(of_before, span.before.x[0], of_after * later.x);
            const float denominator = fmaf(of_before, span.before.x[1], of_after * later.y);
            const float inverse = rcp(fmaf(own, e, denominator));
            const float y = fmaf(own, ev, numerator) * inverse;
            const float r = dy[i] * inverse;  // dy is 0 beyond the end
            const float2 drive = make_float2(r, r * y);
            kept[i] = drive;
            // By the exponent of its own weight: e (v - y), exactly 0 if the token is alone.
            const float by_now = own * drive.x * (inverse * fmaf(ev, denominator, -e * numerator));
            dy[i] = by_now;
            by_u += by_now;
            by_w_before = fmaf(drive.x, to_end[0], fmaf(-drive.y, to_end[1], by_w_before));
            by_w_after = fmaf(later.x, before.x[0], fmaf(-later.y, before.x[1], by_w_after));
            step(to_end, span.decay, make_float2(span.before.x[0], span.before.x[1]));
            span.step(span.before, i, as_before);
            step(before.x, span.decay, drive);
            after.x[0] = fmaf(passed, drive.x, after.x[0]);
            after.x[1] = fmaf(passed, drive.y, after.x[1]);
            passed *= span.decay;
            if (i % 3 == 2) keep_in_memory();  // else too many tokens are under way for registers
        }
        by_w = -span.decay * fmaf(of_before, by_w_before, of_after * by_w_after);
        before.top = after.top = -top;
        keep_in_memory();
        exchange(tame, top, before, after);
        if constexpr (SUMS) return;

        by_w_before = fmaf(after.x[0], to_end[0], -after.x[1] * to_end[1]);
        by_w_after = fmaf(before.x[0], to_start[0], -before.x[1] * to_start[1]);
        if (!plain) {
            by_w_before *= exp_of(after.top + span.before.top);
            by_w_after *= exp_of(before.top + span.after.top);
            before.scale(exp_of(span.most + before.top));
            after.scale(exp_of(span.most + after.top));
        }
        by_w -= span.decay * (by_w_before + by_w_after);
        const float bonus = exp_of(u);
        auto kept_of = [&](int i) {
            const float2 drive = kept[i];
            return plain ? drive : make_float2(factor * drive.x, factor * drive.y);
        };
        // The sums of what comes after a token, for every fourth one; they are found again between
        // these, for registers have no room for all.
        float2 marks[(R + 3) / 4];
        // Where addresses are found again for each token, that is a tenth of all.
        char *to = at.address(p.dk, p.length, p.channels);
        const long long apart = (char *)p.dv - (char *)p.dk;
        opaque(to);
#pragma unroll
        for (int i = R - 1; i >= 0; --i) {
            if (i % 4 == 3 || i == R - 1) marks[i / 4] = make_float2(after.x[0], after.x[1]);
            step(after.x, span.decay, kept_of(i));
            if (i % 4 == 0) keep_in_memory();
        }
#pragma unroll
        for (int part = 0; part < R; part += 4) {
            keep_in_memory();
            const int size = min(4, R - part);
            float2 later[4], drives[4];
            later[size - 1] = marks[part / 4];
#pragma unroll
            for (int j = 0; j < size; ++j) drives[j] = kept_of(part + j);
#pragma unroll
            for (int j = size - 1; j > 0; --j)
                later[j - 1] = make_float2(fmaf(span.decay, later[j].x, drives[j].x),
                                           fmaf(span.decay, later[j].y, drives[j].y));
#pragma unroll
            for (int j = 0; j < size; ++j) {
                const int i = part + j;
                const float by_r = before.x[0] + later[j].x, by_ry = before.x[1] + later[j].y;
                at.write(to, i, fmaf(span.ev[i], by_r, fmaf(-span.e[i], by_ry, dy[i])));
                at.write(to + apart, i, span.e[i] * fmaf(bonus, drives[j].x, by_r));
                to += p.channels * at.SIZE;
                opaque(to);
                step(before.x, span.decay, drives[j]);
            }
        }
        add_parameters(shared, at, p.parts, p.sections, p.channels, by_w, by_u);
    };
    // Of one where every sum has an exponent of its own.
    auto run_far = [&]() __attribute__((always_inline)) {
        enter(false);
        Sums<2> before = Sums<2>::none(), after = Sums<2>::none();
        float by_w = 0.f, by_u = 0.f;
        // Here `kept` has the logarithm of the denominator in place of r.
#pragma unroll 1
        for (int i = 0; i < at.count; ++i) {
            const Sums<2> all = span.at_token(at, p.k, p.v, i);
            const float y = all.x[0] * rcp(all.x[1]), log = fmaf(LN2, lg2(all.x[1]), all.top);
            const float by = at.again(p.dy, i);
            kept[i] = make_float2(log, y);
            before.add({-log - (R - 1 - i) * w, {by, by * y}});
            after.add({-log - i * w, {by, by * y}});
        }
        exchange(false, 0.f, before, after);
        if constexpr (SUMS) return;

        char *const dk = at.address(p.dk, p.length, p.channels);
        char *const dv = at.address(p.dv, p.length, p.channels);
#pragma unroll 1
        for (int i = 0; i < at.count; ++i) {
            const float k = at.again(p.k, i), v = at.again(p.v, i);
            const float now = exp_of(k + u - kept[i].x) * at.again(p.dy, i);
            float by_value = now, by_key = now * (v - kept[i].y);
            by_u += by_key;
            // The weights of what is on one side of the token, and the gradients from the other.
#pragma unroll 1
            for (int side = 0; side < 2; ++side) {
                Sums<2> weight = side ? span.after : span.before, drive = side ? before : after;
                weight.pass(side ? R - 1 - i : i, w);
                drive.pass(side ? i : R - 1 - i, w);
#pragma unroll 1
                for (int j = 0; j < at.count; ++j) {
                    if (j == i) continue;
                    const float between = (abs(i - j) - 1) * w;
                    if (j < i == !side) {
                        weight.add({at.again(p.k, j) - between, {at.again(p.v, j), 1.f}});
                    } else {
                        const float2 log_y = kept[j];
                        const float by = at.again(p.dy, j);
                        drive.add({-log_y.x - between, {by, by * log_y.y}});
                    }
                }
                const float e = exp_of(k + drive.top);
                by_value = fmaf(e, drive.x[0], by_value);
                by_key = fmaf(e, fmaf(v, drive.x[0], -drive.x[1]), by_key);
                by_w -= exp_of(drive.top + weight.top - w)
                        * fmaf(drive.x[0], weight.x[0], -drive.x[1] * weight.x[1]);
            }
            at.store(dk, i, p.channels, by_key);
            at.store(dv, i, p.channels, by_value);
        }
        add_parameters(shared, at, p.parts, p.sections, p.channels, by_w, by_u);
    };
    const bool tame = span.is_tame();
    if (tame && !p.entries) run_near(true, true);
    else if (tame || span.is_near()) run_near(false, tame);
    else run_far();
}
