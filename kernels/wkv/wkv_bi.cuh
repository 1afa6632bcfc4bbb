// What the kernels of bi_wkv's formula share: the sums over a span, for both directions. A block
// holds its weights relative to one exponent (is_tame), which is enough because every output reads the
// largest of them, as long as decays within it are not too strong. Where they are, each span has an
// exponent of its own (is_near); where they are too strong for that, every sum has one, and tokens are
// read again from memory.
#pragma once
#include "wkv/wkv.cuh"

// As RANGE, of a whole block.
constexpr float BLOCK_RANGE = 40.f;

template <class T, int R>
struct BiSpan {
    float e[R];  // where is_near: exp(k - most), 0 beyond the end
    Column<float> ev;  // that times the value
    float w, u, decay, most;
    int warps;  // of the block
    Sums<2> before, after;  // at first of its own tokens, then of all before and all after it

    // Found again wherever they are asked for, as registers are few. All warps of a block find the
    // same, for they have the same channels. Where is_tame, is_near is not asked for.
    __device__ __forceinline__ bool is_tame() const {
        return __all_sync(~0u, warps * R * fabsf(w) + fabsf(u) <= BLOCK_RANGE);
    }
    __device__ __forceinline__ bool is_near() const {
        return __all_sync(~0u, R * fabsf(w) + fabsf(u) <= RANGE);
    }
    __device__ __forceinline__ void load(const Place<T, R> &at, const WkvMap &k_map,
                                         const WkvMap &v_map, int length) {
        at.load(e, k_map, length, LOW);
        at.load(ev, v_map, length);
        keep_in_memory();
    }
    // The sums over its own tokens to the boards, once w and u are there.
    __device__ __forceinline__ void post(const Place<T, R> &at, const WkvMap &k_map,
                                         const WkvMap &v_map, const Board<2> (&boards)[2]) {
        warps = at.warps;
        decay = exp_of(-w);
        most = 0.5f * LOW;  // so that weights beyond the end are 0 where there is nothing else
#pragma unroll
        for (int i = 0; i < R; ++i) most = fmaxf(most, e[i]);
        const bool tame = is_tame();
        if (tame) {
            float *const tops = boards[0].data + 2 * LANES;
            tops[at.warp * Board<2>::ROW] = most;
            __syncthreads();
#pragma unroll 7
            for (int j = 0; j < at.warps; ++j) most = fmaxf(most, tops[j * Board<2>::ROW]);
        }
        before = after = Sums<2>::none();
        if (tame || is_near()) {
            before.top = after.top = most;
#pragma unroll
            for (int i = 0; i < R; ++i) {
                e[i] = exp_of(e[i] - most);
                ev[i] *= e[i];
            }
#pragma unroll
            for (int i = 0; i < R; ++i) step(before, i, 1.f);
#pragma unroll
            for (int i = R - 1; i >= 0; --i) step(after, i, 1.f);
        } else {
#pragma unroll 1
            for (int i = 0; i < at.count; ++i) {
                const float key = at.again(k_map, i), value = at.again(v_map, i);
                before.add({key - (R - 1 - i) * w, {value, 1.f}});
                after.add({key - i * w, {value, 1.f}});
            }
        }
        post(at.warp, boards, tame, before, after);
    }
    __device__ __forceinline__ void post(int warp, const Board<2> (&boards)[2], const bool tame,
                                         const Sums<2> &before, const Sums<2> &after) const {
        if (tame) {  // others may still read the exponents there
            boards[0].post_values(warp, before);
            boards[1].post_values(warp, after);
        } else {
            boards[0].post(warp, before);
            boards[1].post(warp, after);
        }
    }
    // Sums relative to one exponent, a token further on, with token i.
    __device__ __forceinline__ void step(Sums<2> &sums, int i, float factor) const {
        sums.x[0] = fmaf(decay, sums.x[0], factor * ev[i]);
        sums.x[1] = fmaf(decay, sums.x[1], factor * e[i]);
    }
    // As Board::collect, of sums that a tame block has posted relative to exp(top).
    template <int SIDE>
    __device__ __forceinline__ Sums<2> follow(const Board<2> &board, int own, float top,
                                              const Sums<2> &entry) const {
        const int count = SIDE < 0 ? own : board.warps - 1 - own;
        const float *at = board.data + (SIDE < 0 ? 0 : board.warps - 1) * Board<2>::ROW;
        const float gap = exp_of(-R * w);
        Sums<2> sums = {top, {}};
#pragma unroll 4
        for (int j = 0; j < count; ++j, at -= SIDE * Board<2>::ROW)
#pragma unroll
            for (int n = 0; n < 2; ++n) sums.x[n] = fmaf(gap, sums.x[n], at[n * LANES]);
        if (entry.top > LOW) {
            sums.top = fmaxf(top, entry.top);
            sums.scale(exp_of(top - sums.top));
            const float far = exp_of(-count * (R * w)) * exp_of(entry.top - sums.top);
#pragma unroll
            for (int n = 0; n < 2; ++n) sums.x[n] = fmaf(far, entry.x[n], sums.x[n]);
        }
        return sums;
    }
    // What the span of warp `own` gets from the other spans of a section, which have posted relative
    // to exp(top) if the block is tame, and from what is beyond the section.
    template <int SIDE>
    __device__ __forceinline__ Sums<2> collect(const Board<2> (&boards)[2], const bool tame,
                                               int own, float top, const Sums<2> &entry) const {
        const Board<2> &board = boards[SIDE < 0 ? 0 : 1];
        return tame ? follow<SIDE>(board, own, top, entry)
                    : board.template collect<SIDE>(entry, own, R, w);
    }
    // From the sums of the spans of a section, and of what is beyond it.
    __device__ __forceinline__ void enter(const Board<2> (&boards)[2], const bool tame, int warp,
                                          const float *entry_before, const float *entry_after,
                                          long long stride) {
        before = collect<-1>(boards, tame, warp, most, load_or_none<2>(entry_before, stride));
        after = collect<1>(boards, tame, warp, most, load_or_none<2>(entry_after, stride));
    }
    // Makes the exponent of the sums at least `most`; returns what e counts in them.
    __device__ __forceinline__ float raise(Sums<2> &sums) const {
        const float top = fmaxf(most, sums.top);
        sums.scale(exp_of(sums.top - top));
        sums.top = top;
        return exp_of(most - top);
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
        Sums<2> all = {u + at.again(k_map, i), {at.again(v_map, i), 1.f}};
        Sums<2> others = before;
        others.pass(i, w);
        all.add(others);
        others = after;
        others.pass(R - 1 - i, w);
        all.add(others);
#pragma unroll 1
        for (int j = 0; j < at.count; ++j)
            if (j != i)
                all.add({at.again(k_map, j) - (abs(i - j) - 1) * w, {at.again(v_map, j), 1.f}});
        return all;
    }
};
