// What the kernels for any N share. One scan runs along a route of ss2d_scan over one image, or
// (SEQ) along a sequence of selective_scan; it may be divided into spans. A block has adjacent
// channels of one scan, all in the same chunk of positions.
//
// Everything is in base-2 logarithms, as in ss2d_scan_fwd.cu: l = delta / ln 2, and the decay is
// 2^(A l). The kernels calculate with the state h / ln 2, and C takes the factor ln 2. The gradient
// by the state, g, is therefore calculated as g ln 2.
#pragma once
#include "common/common.cuh"

// Whether routes are given as tables of positions, and are not the four of the cross scan.
#ifndef ORDERED
#define ORDERED 0
#endif

constexpr int SAVED = 24;  // positions between two saved states
template <int POSITIONS> constexpr int pitch_for = POSITIONS + 4;  // 16-byte rows, few conflicts

struct ScanParams {
    const void *x;         // map (B, D, H, W) by strides; SEQ: u (B, K * D, L)
    const void *raw;       // (B, L, K, R + 2 N): dt, B, C; SEQ: delta, like u
    const void *B, *C;     // SEQ: (B, K, N, L)
    const float *weights;  // (K, R, D): dt_projs_weight, times log2(e)
    const float *bias;     // (K, D), times log2(e)
    const float *rates;    // (K, G * STATE, D): A, zero beyond N
    const float *skip;     // (K, D)
    const float *entries;  // (scans, spans, STATE, D): what enters each span, or null for zeros
    float *states;         // (scans, chunks, STATE, D): what enters each SAVED positions, or null
    float *decays, *ends;  // (scans, spans, STATE, D): of a span from zero, if SUMMARY
    void *y;               // (G, K, B, L, D) in row-major order of the image, or null; SEQ: like u
    const void *grad;      // by y: (B, D, H, W) by strides; SEQ: like u
    void *grad_x;          // like y
    void *grad_raw;        // (parts, B, L, K, R + 2 N); SEQ: grad_delta, like y
    void *grad_B, *grad_C;  // SEQ: (columns, B, K, N, L)
    float *sums;           // (B, spans, K, G, STATE + R + 2, D): by A, weights, bias and skip
    const int *orders;     // (K, L), if ORDERED: the pixel that each step of a route visits
    // Strides in elements; if ORDERED, x_w and grad_w are those of pixels, and x_h and grad_h 0.
    long long x_b, x_d, x_h, x_w, grad_b, grad_d, grad_h, grad_w;
    int batch, dim, height, width, rank, state, routes, groups;  // state: N, groups: G of STATE
    int span, spans, chunks, columns;  // span: positions, a multiple of SAVED; columns: of blocks
    int softplus, y_type, part_type, vector;  // types as in load_parameter; vector: SEQ, aligned
    u32 magic_height, magic_width;
};

// Loads 16 bits straight into a 32-bit register. C++ would first make an int of the short, and that
// instruction would wait for the load.
template <class T>
__device__ __forceinline__ float load(const void *p, long long i) {
    if constexpr (same<T, Float>) return __ldg((const float *)p + i);
    else return T::unpack(__ldg((const unsigned short *)p + i)).x;
}

// From position i of a scan to the offset in elements. A route that runs against its axis has
// negative strides. If ORDERED, a route is looked up: all threads of a warp read the same number.
struct SequencePath {
    int inner_length, rows;
    u32 magic;  // 2^32 / inner_length, rounded up; 0 for 1
    bool column, back;
    const int *order;

    __device__ __forceinline__ SequencePath(const ScanParams &p, int route, bool reversed) {
        if (ORDERED) {
            inner_length = p.height * p.width, rows = 1, magic = 0;
            column = false, back = reversed;
            order = p.orders + (long long)route * inner_length;
            return;
        }
        order = nullptr;
        column = route & 1;
        back = (route >= 2) != reversed;
        inner_length = column ? p.height : p.width;
        rows = column ? p.width : p.height;
        magic = column ? p.magic_height : p.magic_width;
    }
    __device__ __forceinline__ int row(int i) const {
        return magic ? (int)__umulhi((u32)i, magic) : i;
    }
    __device__ __forceinline__ int pixel(int i) const {  // if ORDERED
        return __ldg(order + (back ? inner_length - 1 - i : i));
    }
};

// The offsets of a path's positions in a tensor, from the strides of its H and W.
struct Steps {
    int inner, outer, first;
    __device__ __forceinline__ Steps(const SequencePath &path, int stride_h, int stride_w) {
        inner = path.column ? stride_h : stride_w;
        outer = path.column ? stride_w : stride_h;
        first = path.back ? (path.rows - 1) * outer + (path.inner_length - 1) * inner : 0;
        if (path.back && !ORDERED) inner = -inner, outer = -outer;
    }
    __device__ __forceinline__ int at(const SequencePath &path, int i) const {
        if (ORDERED) return path.pixel(i) * inner;
        const int row = path.row(i);
        return first + row * outer + (i - row * path.inner_length) * inner;
    }
    __device__ __forceinline__ void next(const SequencePath &path, int &offset, int &rest) const {
        offset += inner;
        if (++rest == path.inner_length) {
            rest = 0;
            offset += outer - path.inner_length * inner;
        }
    }
};

// Loads N (4 or 8) positions of a channel from `start` on, as their bits. There are zeros beyond
// `count`, and only zeros if not `valid`.
template <class T, bool SEQ, int N>
__device__ __forceinline__ void load_bits(
    u32 (&x)[N], const void *base, const SequencePath &path, const Steps &steps, int start,
    int count, bool valid, bool vector) {
    constexpr bool WIDE = same<T, Float>;
    constexpr int SIZE = WIDE ? 4 : 2;
    auto load = [&](const char *at) -> u32 {
        if constexpr (WIDE) return __ldg((const u32 *)at);
        else return load_u16(at);
    };
    if (SEQ && vector && count >= N && !path.back) {
        u32 words[N] = {};
        const char *from = (const char *)base + (long long)start * SIZE;
        if (valid) {
            if constexpr (N * SIZE == 8) {
                const uint2 u = __ldg((const uint2 *)from);
                words[0] = u.x, words[1] = u.y;
            } else {
#pragma unroll
                for (int i = 0; i < N * SIZE / 4; i += 4) {
                    const uint4 u = __ldg((const uint4 *)from + i / 4);
                    words[i] = u.x, words[i + 1] = u.y, words[i + 2] = u.z, words[i + 3] = u.w;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i)
            x[i] = WIDE ? words[i] : i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
        return;
    }
    if constexpr (ORDERED && !SEQ) {
        int pixels[N];
#pragma unroll
        for (int i = 0; i < N; ++i) pixels[i] = i < count ? path.pixel(start + i) : 0;
#pragma unroll
        for (int i = 0; i < N; ++i)
            x[i] = i < count && valid
                ? load((const char *)base + (long long)pixels[i] * steps.inner * SIZE) : 0u;
        return;
    }
    const int row = path.row(start);
    int rest = start - row * path.inner_length;
    int offset = steps.first + row * steps.outer + rest * steps.inner;
    if (count >= N && rest + N <= path.inner_length) {  // within a row
        const long long step = (long long)steps.inner * SIZE;
        const char *from = (const char *)base + (long long)offset * SIZE;
#pragma unroll
        for (int i = 0; i < N; ++i, from += step) x[i] = valid ? load(from) : 0u;
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = i < count && valid ? load((const char *)base + (long long)offset * SIZE) : 0u;
        steps.next(path, offset, rest);
    }
}

template <class T, int N>
__device__ __forceinline__ void to_floats(float (&x)[N], const u32 (&bits)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (same<T, Float>) x[i] = __uint_as_float(bits[i]);
        else x[i] = T::unpack(bits[i]).x;
    }
}

template <class T, bool SEQ, int N>
__device__ __forceinline__ void load_steps(
    float (&x)[N], const void *base, const SequencePath &path, const Steps &steps, int start,
    int count, bool valid, bool vector) {
    u32 bits[N];
    load_bits<T, SEQ>(bits, base, path, steps, start, count, valid, vector);
    to_floats<T>(x, bits);
}

// The counterpart of load_steps, for a contiguous result of type T or another.
template <class T, bool SEQ, int N>
__device__ __forceinline__ void store_steps(
    const float (&y)[N], void *base, const SequencePath &path, const Steps &steps, int start,
    int count, bool valid, bool vector, int type) {
    constexpr int SIZE = same<T, Float> ? 4 : 2;
    if (!valid) return;
    if (SEQ && vector && count >= N && type == T::CODE) {
        char *to = (char *)base + (long long)start * SIZE;
        if constexpr (same<T, Float>) {
#pragma unroll
            for (int i = 0; i < N; i += 4)
                ((float4 *)to)[i / 4] = make_float4(y[i], y[i + 1], y[i + 2], y[i + 3]);
        } else {
#pragma unroll
            for (int i = 0; i < N; i += 4)
                ((uint2 *)to)[i / 4] = make_uint2(T::pack(y[i], y[i + 1]),
                                                  T::pack(y[i + 2], y[i + 3]));
        }
        return;
    }
    if constexpr (ORDERED && !SEQ) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < count) store_result(base, steps.at(path, start + i), type, y[i]);
        return;
    }
    const int row = path.row(start);
    int rest = start - row * path.inner_length;
    int offset = steps.first + row * steps.outer + rest * steps.inner;
    if (count >= N && rest + N <= path.inner_length && type == T::CODE) {
        const long long step = (long long)steps.inner * SIZE;
        char *to = (char *)base + (long long)offset * SIZE;
#pragma unroll
        for (int i = 0; i < N; ++i, to += step) store_result(to, 0, T::CODE, y[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i < count) store_result(base, offset, type, y[i]);
        steps.next(path, offset, rest);
    }
}

// Which scan, span and channels a block has.
struct BlockIndex {
    int b, k, group, span, column;
    __device__ __forceinline__ BlockIndex(const ScanParams &p) {
        int i = blockIdx.x;
        column = i % p.columns, i /= p.columns;
        span = i % p.spans, i /= p.spans;
        group = i % p.groups, i /= p.groups;
        k = i % p.routes, b = i / p.routes;
    }
    __device__ __forceinline__ long long scan_number(const ScanParams &p) const {
        return ((long long)b * p.routes + k) * p.groups + group;
    }
};

// Stages the columns dt (R) and then, as the template says, B and C (STATE each) of `count`
// positions from `start` on, as fp32, with C times ln 2. Up to LENGTH there are zeros beyond them.
// A thread stages NUMBERS numbers in a turn.
template <class T, int STATE, bool SEQ, bool WITH_B, bool WITH_C, int LENGTH, int NUMBERS>
struct Staging {
    static constexpr int COLUMNS = STATE * (WITH_B + WITH_C);
    static constexpr int SIZE = same<T, Float> ? 4 : 2;
    const ScanParams &p;
    const SequencePath &path;
    const BlockIndex &index;
    const Steps steps;
    int threads, columns, row, column, together, turns;  // the first `threads` of the block stage

    // Quotients of the sizes, packed into one number so that they take one word of shared memory.
    static __device__ __forceinline__ u32 arrange(const ScanParams &p, int threads) {
        const int columns = (SEQ ? 0 : p.rank) + COLUMNS;
        const int width = min(columns, threads), together = threads / width;
        const int at_once = NUMBERS * (SEQ ? threads : together);
        const int all = SEQ ? COLUMNS * LENGTH : LENGTH;
        return threadIdx.x / width << 24 | threadIdx.x % width << 15 | together << 6
               | (all + at_once - 1) / at_once;
    }
    __device__ __forceinline__ Staging(const ScanParams &p, const SequencePath &path,
                                       const BlockIndex &index, int threads, u32 arranged)
        : p(p), path(path), index(index), steps(path, p.width, 1), threads(threads) {
        columns = (SEQ ? 0 : p.rank) + COLUMNS;
        row = arranged >> 24, column = arranged >> 15 & 511, together = arranged >> 6 & 511;
        turns = arranged & 63;
    }
    // Calls visit(m, valid, column, position) for the numbers of a turn.
    template <class F>
    __device__ __forceinline__ void each(int turn, int first, F visit) const {
#pragma unroll
        for (int m = 0; m < NUMBERS; ++m) {
            if constexpr (SEQ) {
                const int j = threadIdx.x + (NUMBERS * turn + m) * threads;
                visit(m, j < COLUMNS * LENGTH, j / LENGTH, j % LENGTH);
            } else {
                const int i = row + (NUMBERS * turn + m) * together;
                visit(m, row < together && i < LENGTH && first + column < columns, first + column,
                      i);
            }
        }
    }
    // Finds the number n of a column among those of B or C, negative for one of dt. Returns whether
    // there is such a column in memory.
    __device__ __forceinline__ bool locate(int column, bool &is_C, int &n) const {
        const int of = column - (SEQ ? 0 : p.rank);
        is_C = of >= (WITH_B ? STATE : 0);
        n = of - (WITH_B && is_C ? STATE : 0);
        return n < min(STATE, p.state - index.group * STATE);
    }
    __device__ __forceinline__ void load(u32 (&bits)[NUMBERS], int start, int count, int turn,
                                         int first) const {
        each(turn, first, [&](int m, bool inside, int column, int i) {
            bool is_C;
            int n;
            const bool known = locate(column, is_C, n) && inside;
            i = start + min(i, count - 1);
            long long at;
            if constexpr (SEQ)
                at = (((long long)index.b * p.routes + index.k) * p.state + index.group * STATE
                      + (known ? n : 0)) * p.width + (path.back ? p.width - 1 - i : i);
            else
                at = ((long long)index.b * p.height * p.width * p.routes + index.k)
                     * (p.rank + 2 * p.state)
                     + (long long)steps.at(path, i) * (p.routes * (p.rank + 2 * p.state))
                     + (!known ? 0 : n < 0 ? column
                        : p.rank + (is_C ? p.state : 0) + index.group * STATE + n);
            const char *const base = (const char *)(!SEQ ? p.raw : is_C ? p.C : p.B);
            if constexpr (SIZE == 4) bits[m] = __ldg((const u32 *)(base + at * SIZE));
            else bits[m] = load_u16(base + at * SIZE);
        });
    }
    __device__ __forceinline__ void store(float *staged, const u32 (&bits)[NUMBERS],
                                          int count, int turn,
                                          int first) const {
        each(turn, first, [&](int m, bool inside, int column, int i) {
            bool is_C;
            int n;
            const bool known = locate(column, is_C, n);
            float v;
            if constexpr (SIZE == 4) v = __uint_as_float(bits[m]);
            else v = T::unpack(bits[m]).x;
            if (is_C) v *= LN2;
            if (inside) staged[column * pitch_for<LENGTH> + i] = known && i < count ? v : 0.f;
        });
    }
    __device__ __forceinline__ void run(float *staged, int start, int count) const {
        for (int first = 0; first < (SEQ ? 1 : columns); first += min(columns, threads))
            for (int turn = 0; turn < turns; ++turn) {
                u32 bits[NUMBERS];
                load(bits, start, count, turn, first);
                store(staged, bits, count, turn, first);
            }
    }
};

__device__ __forceinline__ void read4(float *to, const float *from) {
    const float4 a = *(const float4 *)from;
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
}

__device__ __forceinline__ void write4(float *to, const float *from) {
    *(float4 *)to = make_float4(from[0], from[1], from[2], from[3]);
}

// Adds the product of a channel's `weights`, `pitch` apart, with columns of dt, `column` apart, at
// M times 4 positions, `apart` from each other.
template <int M>
__device__ __forceinline__ void add_product(float (&z)[4 * M], int rank, const float *weights,
                                            int pitch, const float *dt, int column, int apart) {
#pragma unroll 2
    for (int r = 0; r < rank; ++r) {
        const float w = weights[r * pitch];
#pragma unroll
        for (int j = 0; j < M; ++j) {
            float v[4];
            read4(v, dt + r * column + j * apart);
#pragma unroll
            for (int i = 0; i < 4; ++i) z[4 * j + i] = fmaf(w, v[i], z[4 * j + i]);
        }
    }
}
