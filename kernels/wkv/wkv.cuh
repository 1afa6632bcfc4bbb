// What the kernels of wkv and bi_wkv share. A lane has a channel, a warp a span of up to R adjacent
// tokens of it in registers, and the warps of a block have spans that follow one another: a section.
// Long sequences are several sections.
#pragma once
#include "common/common.cuh"

constexpr int LANES = 32;
// For a block of at most so many warps. Two blocks of up to 14 warps are on a multiprocessor, with 72
// registers a thread.
#define WKV_BOUNDS(WARPS) __launch_bounds__(LANES *(WARPS), (WARPS) > 14 ? 1 : 2)
// The exponent of an empty sum: a difference of infinities would be NaN.
constexpr float LOW = -1e30f;
// Within a span, decays and the bonus may be factors of up to exp of this where exponents are held
// relative to one number for the span.
constexpr float RANGE = 30.f;

__device__ __forceinline__ float exp_of(float x) { return ex2(LOG2E * x); }

// What a thread has stored or loaded before this and loads after it does not stay in registers. For
// whole warps.
__device__ __forceinline__ void keep_in_memory() { __syncwarp(); }

// A thread's own part of shared memory, one element for each token of its span.
template <class E>
struct Column {
    E *data;
    __device__ __forceinline__ Column(E *all, int row, int lane) : data(all + row * LANES + lane) {}
    __device__ __forceinline__ E &operator[](int i) const { return data[i * LANES]; }
};

struct WkvMap {  // (B, T, C)
    const void *data;
    long long b;  // strides, in elements
    int t, c;
};

// exp(top) * x: sums of N values of tokens. Of four, the last two are the first two times the
// distance of their tokens.
template <int N>
struct Sums {
    float top, x[N];
    static __device__ __forceinline__ Sums none() { return {LOW, {}}; }
    // What they are so many tokens further on.
    __device__ __forceinline__ void pass(float tokens, float w) {
        top -= tokens * w;
        if constexpr (N == 4) {
            x[2] = fmaf(tokens, x[0], x[2]);
            x[3] = fmaf(tokens, x[1], x[3]);
        }
    }
    __device__ __forceinline__ void scale(float by) {
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] *= by;
    }
    // One of the two factors is 1.
    __device__ __forceinline__ void add(const Sums &more) {
        const float ahead = top - more.top, e = exp_of(-fabsf(ahead));
        const float mine = ahead < 0.f ? e : 1.f, theirs = ahead < 0.f ? 1.f : e;
        top = fmaxf(top, more.top);
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] = fmaf(theirs, more.x[n], mine * x[n]);
    }
    // From memory or to it: the values, then top, `stride` apart.
    template <class Stride>
    static __device__ __forceinline__ Sums load(const float *from, Stride stride) {
        Sums sums;
#pragma unroll
        for (int n = 0; n < N; ++n) sums.x[n] = from[n * stride];
        sums.top = from[N * stride];
        return sums;
    }
    template <class Stride>
    __device__ __forceinline__ void store(float *to, Stride stride) const {
#pragma unroll
        for (int n = 0; n < N; ++n) to[n * stride] = x[n];
        to[N * stride] = top;
    }
};

// The sums of all warps of a block, in shared memory: (warps, N + 1, LANES).
template <int N>
struct Board {
    static constexpr int ROW = (N + 1) * LANES;
    float *data;  // of the lane
    int warps;

    __device__ __forceinline__ void post(int warp, const Sums<N> &sums) const {
        sums.store(data + warp * ROW, LANES);
    }
    __device__ __forceinline__ void post_values(int warp, const Sums<N> &sums) const {
#pragma unroll
        for (int n = 0; n < N; ++n) data[warp * ROW + n * LANES] = sums.x[n];
    }
    // What enters the span of warp `own` from those before (SIDE -1) or after it (1), and from
    // `entry` beyond them; spans are `gap` tokens. Of warp `warps`, or -1, it is what leaves all.
    template <int SIDE>
    __device__ __forceinline__ Sums<N> collect(Sums<N> entry, int own, float gap, float w) const {
        const int count = SIDE < 0 ? own : warps - 1 - own;
        const float *at = data + (own + SIDE) * ROW;  // the nearest
        const float gap_w = gap * w;
        entry.pass(count * gap, w);
        float top = entry.top, far = 0.f;
#pragma unroll 4
        for (int j = 0; j < count; ++j, far += gap_w)
            top = fmaxf(top, at[SIDE * j * ROW + N * LANES] - far);
        entry.scale(exp_of(entry.top - top));
        entry.top = top;
        far = 0.f;
#pragma unroll(N == 2 ? 4 : 2)
        for (int j = 0; j < count; ++j, far += gap) {
            Sums<N> sums = Sums<N>::load(at + SIDE * j * ROW, LANES);
            sums.pass(far, w);
            const float e = exp_of(sums.top - top);
#pragma unroll
            for (int n = 0; n < N; ++n) entry.x[n] = fmaf(e, sums.x[n], entry.x[n]);
        }
        return entry;
    }
};

// Where a thread is.
template <class T, int R>
struct Place {
    int lane, warp, warps, sample, section, channel, first, count;
    int written;  // tokens whose results it writes: `count`, or 0
    bool valid;   // there is such a channel; the others read the last one and write nothing

    __device__ __forceinline__ Place(int length, int channels) {
        lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
        section = blockIdx.y, sample = blockIdx.z;
        channel = blockIdx.x * LANES + lane;
        valid = channel < channels;
        channel = min(channel, channels - 1);
        first = (section * warps + warp) * R;
        count = max(0, min(R, length - first));
        written = valid ? count : 0;
    }
    static constexpr int SIZE = same<T, Float> ? 4 : 2;
    // `beyond` the end, where the last token is read again: loads are never skipped, so all are under
    // way at once.
    template <class Array>
    __device__ __forceinline__ void load(Array &to, const WkvMap &map, int length,
                                         float beyond = 0.f) const {
        const int begin = min(first, length - 1), last = length - 1 - begin;
        const char *at = address(map, begin);
        const int step = map.t * SIZE;
        if (last >= R - 1) {
#pragma unroll
            for (int i = 0; i < R; ++i) to[i] = value(at + (long long)step * i);
            return;
        }
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float found = value(at);
            to[i] = i < count ? found : beyond;
            at += i < last ? step : 0;
        }
    }
    // That of token `first` + i.
    __device__ __forceinline__ float one(const WkvMap &map, int i) const {
        return value(address(map, first + i));
    }
    // The same in few registers: nothing of the address is kept for the next one.
    __device__ __forceinline__ float again(const WkvMap &map, int i) const {
        int token = first + i, from = channel;
        opaque(token);
        opaque(from);
        return value((const char *)map.data
                     + (sample * map.b + (long long)token * map.t + (long long)from * map.c) * SIZE);
    }
    __device__ __forceinline__ const char *address(const WkvMap &map, int token) const {
        return (const char *)map.data
               + (sample * map.b + (long long)token * map.t + (long long)(unsigned)channel * map.c) * SIZE;
    }
    static __device__ __forceinline__ float value(const char *at) {
        if constexpr (SIZE == 4) return *(const float *)at;
        else return T::unpack(*(const unsigned short *)at).x;
    }
    // The address of token `first` in a result (B, T, C).
    __device__ __forceinline__ char *address(void *result, int length, int channels) const {
        return (char *)result
               + (((long long)sample * length + first) * channels + (unsigned)channel) * SIZE;
    }
    // That of token `first` + i, from the address of `first`.
    __device__ __forceinline__ void store(char *to, int i, int channels, float v) const {
        write(to + (long long)(channels * SIZE) * i, i, v);
    }
    // To the address of token `first` + i, which may be opaque.
    __device__ __forceinline__ void write(char *to, int i, float v) const {
        if constexpr (SIZE == 4) {
            if (i < written) asm volatile("st.global.f32 [%0], %1;" :: "l"(to), "f"(v) : "memory");
        } else {
            const unsigned short bits = (unsigned short)T::pack(v, 0.f);
            if (i < written)
                asm volatile("st.global.u16 [%0], %1;" :: "l"(to), "h"(bits) : "memory");
        }
    }
    // Sums of a section in memory (ways, B, sections, N + 1, C); null stays null.
    template <int N, class Pointer>
    __device__ __forceinline__ Pointer sums_of(Pointer data, int way, int batch, int sections,
                                               int channels) const {
        return data ? data + (((long long)way * batch + sample) * sections + section)
                             * (N + 1) * channels + (unsigned)channel
                    : nullptr;
    }
};

// From global memory, where the exponent of an empty sum may be minus infinity.
template <int N>
__device__ __forceinline__ Sums<N> load_or_none(const float *from, long long stride) {
    if (!from) return Sums<N>::none();
    Sums<N> sums = Sums<N>::load(from, stride);
    sums.top = fmaxf(sums.top, LOW);
    return sums;
}

// The decay of a channel: exp(w) of the causal op. Infinity would be NaN times 0.
__device__ __forceinline__ float load_decay(const void *w, int channel, int type, bool causal) {
    const float raw = load_parameter(w, channel, type);
    return causal ? fminf(expf(raw), 1e20f) : raw;
}

// Sums over the tokens of a span, as those after it see them.
template <int R, class Values>
__device__ __forceinline__ Sums<2> span_sums(const float (&k)[R], const Values &v, int count,
                                             float w) {
    Sums<2> sums = Sums<2>::none();
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (i < count) sums.top = fmaxf(sums.top, k[i] - (R - 1 - i) * w);
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (i < count) {
            const float e = exp_of(k[i] - (R - 1 - i) * w - sums.top);
            sums.x[0] = fmaf(e, v[i], sums.x[0]);
            sums.x[1] += e;
        }
    return sums;
}

// The gradients by w and u, summed over the warps of a block, to its part of (B, sections, 2, C).
template <class Place>
__device__ __forceinline__ void add_parameters(float *shared, const Place &at, float *parts,
                                               int sections, int channels, float by_w, float by_u) {
    __syncthreads();
    float2 *const sums = (float2 *)shared + at.lane;
    sums[at.warp * LANES] = make_float2(by_w, by_u);
    __syncthreads();
    if (at.warp || !at.valid) return;
    for (int j = 1; j < at.warps; ++j) {
        by_w += sums[j * LANES].x;
        by_u += sums[j * LANES].y;
    }
    float *const to = parts + ((long long)at.sample * sections + at.section) * 2 * channels
                      + (unsigned)at.channel;
    to[0] = by_w;
    to[channels] = by_u;
}
