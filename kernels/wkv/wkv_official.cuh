// What the kernels of bi_wkv's official mode share. vmamba_mm/ops/wkv/README.md has its formula:
// tokens come in blocks, and what an output has of those before it depends on where its block begins.
// Spans are cut so that a warp has whole blocks, or a block has whole warps, and a section whole
// blocks; then every sum has an exponent of its own.
#pragma once
#include "wkv/wkv.cuh"

constexpr int OFFICIAL_SPAN = 16, OFFICIAL_WARPS = 16;  // at most

struct WkvCut {
    int block;  // tokens of a block
    int group;  // tokens of whole blocks that `parts` warps share
    int parts;
    int span;   // tokens of a warp at most
};

// Where a thread is, and its values in shared memory: WORDS for each token.
template <class T, int WORDS>
struct OfficialPlace : Place<T, OFFICIAL_SPAN> {
    typedef Place<T, OFFICIAL_SPAN> Base;
    WkvCut cut;
    float *words;

    __device__ __forceinline__ OfficialPlace(const WkvCut &cut, float *memory, int length,
                                             int channels) : Base(length, channels), cut(cut) {
        words = memory + Base::warp * cut.span * WORDS * LANES + Base::lane;
        Base::first = Base::section * (Base::warps / cut.parts * cut.group) + start(Base::warp);
        Base::count = max(0, min(end(Base::warp) - start(Base::warp), length - Base::first));
        Base::written = Base::valid ? Base::count : 0;
    }
    // Of the span of a warp, from the start of the section.
    __device__ __forceinline__ int start(int warp) const {
        return warp / cut.parts * cut.group + warp % cut.parts * cut.span;
    }
    __device__ __forceinline__ int end(int warp) const {
        return min(start(warp) + cut.span, (warp / cut.parts + 1) * cut.group);
    }
    // Whether token `first` + i begins a block. Sections do.
    __device__ __forceinline__ bool begins(int i) const {
        return (start(Base::warp) + i) % cut.block == 0;
    }
    __device__ __forceinline__ float &word(int i, int n) const {
        return words[(i * WORDS + n) * LANES];
    }
    template <int N>
    __device__ __forceinline__ void keep(int i, int n, const Sums<N> &sums) const {
        sums.store(&word(i, n), LANES);
    }
    template <int N>
    __device__ __forceinline__ Sums<N> kept(int i, int n) const {
        return Sums<N>::load(&word(i, n), LANES);
    }
};

template <int N>
__device__ __forceinline__ Sums<N> sums_of_token(float exponent, float v) {
    Sums<N> sums = {exponent, {}};
    sums.x[0] = v;
    sums.x[1] = 1.f;
    return sums;
}

// What enters the span of warp `own` from the warps from..to - 1, all on its SIDE (-1: before it);
// the others are beyond the section if own is `warps` or -1.
template <int SIDE, int N, class Place>
__device__ __forceinline__ Sums<N> collect(const Place &at, const Board<N> &board, int own,
                                           int from, int to, float w) {
    const int edge = SIDE < 0 ? at.start(own) : own < 0 ? 0 : at.end(own);
    Sums<N> all = Sums<N>::none();
#pragma unroll 1
    for (int j = from; j < to; ++j) {
        Sums<N> sums = Sums<N>::load(board.data + j * Board<N>::ROW, LANES);
        sums.pass(SIDE < 0 ? edge - at.end(j) : at.start(j) - edge, w);
        all.add(sums);
    }
    return all;
}

// The sums that the outputs of a span read, at a token: with N = 4 also times distances.
template <int N>
struct Official {
    Sums<N> far, near;  // of the blocks before; of the tokens of the block before
    Sums<N> again;      // of the block's up to now but its first, which grow by w
    float growing;      // the largest exponent of all of the block's up to now, which grow likewise
    float w, u, eps;

    static __device__ __forceinline__ constexpr int floats(int warps) {
        return (3 * (N + 1) + 1) * warps * LANES;
    }
    // Boards of what warps do to the sums of tokens before, after, of the block once more; and of
    // `growing`.
    float *memory;
    int warps;
    __device__ __forceinline__ Board<N> board(int which) const {
        return {memory + which * warps * Board<N>::ROW, warps};
    }
    __device__ __forceinline__ float &growing_of(int warp) const {
        return memory[3 * warps * Board<N>::ROW + warp * LANES];
    }

    __device__ __forceinline__ void begin() {
        far = near = again = Sums<N>::none();
        growing = LOW;
    }
    // Takes token i, which comes next: before its output is calculated.
    __device__ __forceinline__ void reach(bool begins, float k, float v) {
        if (begins) {
            far.add(near);
            near = again = Sums<N>::none();
            growing = k;
        } else {
            again.pass(1.f, -w);
            again.add(sums_of_token<N>(k, v));
            growing = fmaxf(growing + w, k);
        }
    }
    // After that.
    __device__ __forceinline__ void leave(float k, float v) {
        far.pass(1.f, w);
        near.pass(1.f, w);
        near.add(sums_of_token<N>(k, v));
    }
    // The sums of the span to the boards.
    template <class Place>
    __device__ __forceinline__ void post(const Place &at) {
        begin();
        Sums<N> after = Sums<N>::none();
#pragma unroll 1
        for (int i = 0; i < at.count; ++i) {
            reach(at.begins(i), at.word(i, 0), at.word(i, 1));
            leave(at.word(i, 0), at.word(i, 1));
        }
        far.add(near);
        far.pass(at.end(at.warp) - at.start(at.warp) - at.count, w);
#pragma unroll 1
        for (int i = at.count - 1; i >= 0; --i) {
            after.pass(1.f, w);
            after.add(sums_of_token<N>(at.word(i, 0), at.word(i, 1)));
        }
        board(0).post(at.warp, far);
        board(1).post(at.warp, after);
        board(2).post(at.warp, again);
        growing_of(at.warp) = growing;
    }
    // What enters the span; returns the sums of all tokens after it.
    template <class Place>
    __device__ __forceinline__ Sums<N> enter(const Place &at, Sums<N> before, Sums<N> after) {
        const int block = at.warp / at.cut.parts * at.cut.parts;  // the first warp of its block
        before.pass(at.start(at.warp), w);
        far = collect<-1>(at, board(0), at.warp, 0, block, w);
        far.add(before);
        near = collect<-1>(at, board(0), at.warp, block, at.warp, w);
        again = collect<-1>(at, board(2), at.warp, block, at.warp, -w);
        growing = LOW;
        for (int j = block; j < at.warp; ++j)
            growing = fmaxf(growing, growing_of(j) + (at.start(at.warp) - at.end(j)) * w);
        after.pass(at.start(warps) - at.end(at.warp), w);
        after.add(collect<1>(at, board(1), at.warp, at.warp + 1, warps, w));
        return after;
    }
    // What leaves the section, of its tokens.
    template <class Place>
    __device__ __forceinline__ Sums<N> leaves(const Place &at, int way) const {
        return way == 0 ? collect<-1>(at, board(0), warps, 0, warps, w)
                        : collect<1>(at, board(1), -1, 0, warps, w);
    }
    // Numerator, denominator with eps (and their derivatives by w) over exp(top), at a token that
    // was reached, but for its own weight, exp(u + k), which goes to `now`.
    __device__ __forceinline__ Sums<N> at_token(bool begins, float k, Sums<N> after, float &now
                                                ) const {
        Sums<N> parts[3] = {far, near, after};
        parts[0].pass(1.f, w);
        parts[2].pass(1.f, w);
        float top = fmaxf(growing, u + k);
        if (!begins) top = fmaxf(top, again.top + w);
#pragma unroll
        for (int n = 0; n < 3; ++n) top = fmaxf(top, parts[n].top);
        now = exp_of(u + k - top);
        Sums<N> all = {top, {}};
        all.x[1] = eps;
#pragma unroll
        for (int n = 0; n < 3; ++n) {
            const float e = exp_of(parts[n].top - top);
#pragma unroll
            for (int j = 0; j < N; ++j)
                all.x[j] = fmaf(j < 2 ? e : -e, parts[n].x[j], all.x[j]);
        }
        const float e = exp_of(again.top - top), factor = -expm1f(w) * e;
        all.x[0] = fmaf(factor, again.x[0], all.x[0]);
        all.x[1] = fmaf(factor, again.x[1], all.x[1]);
        if constexpr (N == 4) {
            const float grown = expf(w) * e;
            all.x[2] += fmaf(factor, again.x[2], -grown * again.x[0]);
            all.x[3] += fmaf(factor, again.x[3], -grown * again.x[1]);
        }
        return all;
    }
};
