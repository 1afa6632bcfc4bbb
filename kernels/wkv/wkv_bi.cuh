// What the kernels of bi_wkv's formula share: the sums over a span, for both directions. A span
// holds its weights relative to one exponent (is_near), or, where decays within a span are too
// strong for that, every sum has an exponent of its own, and tokens are read again from memory.
#pragma once
#include "wkv/wkv.cuh"

template <class T, int R>
struct BiSpan {
    float e[R];  // where is_near: exp(k - most), 0 beyond the end
    Column<float> ev;  // that times the value
    float w, u, decay, most;
    bool is_near;
    Sums<2> before, after;  // at first of its own tokens, then of all before and all after it

    __device__ __forceinline__ void load(const Place<T, R> &at, const WkvMap &k_map,
                                         const WkvMap &v_map, int length) {
        at.load(e, k_map, length);
        at.load(ev, v_map, length);
        keep_in_memory();
    }
    // The sums over its own tokens, once w and u are there.
    __device__ __forceinline__ void sum(const Place<T, R> &at, const WkvMap &k_map,
                                        const WkvMap &v_map) {
        is_near = __all_sync(~0u, R * fabsf(w) + fabsf(u) <= RANGE);
        decay = exp_of(-w);
        most = LOW;
#pragma unroll
        for (int i = 0; i < R; ++i) if (i < at.count) most = fmaxf(most, e[i]);
        before = after = Sums<2>::none();
        if (is_near) {
            before.top = after.top = most;
#pragma unroll
            for (int i = 0; i < R; ++i) {
                e[i] = i < at.count ? exp_of(e[i] - most) : 0.f;
                ev[i] *= e[i];
            }
#pragma unroll
            for (int i = 0; i < R; ++i) step(before, i, 1.f);
#pragma unroll
            for (int i = R - 1; i >= 0; --i) step(after, i, 1.f);
        } else {
#pragma unroll 1
            for (int i = 0; i < at.count; ++i) {
                const float key = at.one(k_map, i), value = at.one(v_map, i);
                before.add({key - (R - 1 - i) * w, {value, 1.f}});
                after.add({key - i * w, {value, 1.f}});
            }
        }
    }
    // Sums relative to one exponent, a token further on, with token i.
    __device__ __forceinline__ void step(Sums<2> &sums, int i, float factor) const {
        sums.x[0] = fmaf(decay, sums.x[0], factor * ev[i]);
        sums.x[1] = fmaf(decay, sums.x[1], factor * e[i]);
    }
    // From the sums of the spans of a section, and of what is beyond it.
    __device__ __forceinline__ void enter(const Board<2> (&boards)[2], int warp,
                                          const float *entry_before, const float *entry_after,
                                          long long stride) {
        before = boards[0].template collect<-1>(load_or_none<2>(entry_before, stride), warp, R, w);
        after = boards[1].template collect<1>(load_or_none<2>(entry_after, stride), warp, R, w);
    }
    // Makes the sums relative to one exponent, which is returned; times `factor`, so is e.
    __device__ __forceinline__ float align(float &factor) {
        const float top = fmaxf(most, fmaxf(before.top, after.top));
        factor = exp_of(most - top);
        before.scale(exp_of(before.top - top));
        after.scale(exp_of(after.top - top));
        return top;
    }
    // Numerator and denominator at token i over exp(top), where not is_near.
    __device__ __forceinline__ Sums<2> at_token(const Place<T, R> &at, const WkvMap &k_map,
                                                const WkvMap &v_map, int i) const {
        Sums<2> all = {u + at.one(k_map, i), {at.one(v_map, i), 1.f}};
        Sums<2> others = before;
        others.pass(i, w);
        all.add(others);
        others = after;
        others.pass(R - 1 - i, w);
        all.add(others);
#pragma unroll 1
        for (int j = 0; j < at.count; ++j)
            if (j != i)
                all.add({at.one(k_map, j) - (abs(i - j) - 1) * w, {at.one(v_map, j), 1.f}});
        return all;
    }
};
