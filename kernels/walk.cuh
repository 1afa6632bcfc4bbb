// What the walk kernels share: one thread is one channel of one walk. A walk is a route
// of ss2d_scan over one image, or (SEQ) a sequence of selective_scan; it may be cut into spans.
// A block has WARP-wide groups of adjacent channels of one walk, all at the same position.
//
// All is in base-2 logarithms, as in ss2d_scan_fwd.cu: l = delta / ln 2, the decay is 2^(A l), the
// kept state is h / ln 2, and C takes the ln 2 (so the kept gradient by h is g ln 2).
#pragma once
#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int CHUNK = 48;  // positions between two barriers, and between two saved states
constexpr int STEP = 8;    // positions that a thread takes at a time
constexpr int PITCH = CHUNK + 4;  // of a staged column: 16-byte rows, few bank conflicts
// A thread's STATE numbers in shared memory are adjacent and padded: constant offsets (the compiler
// would keep an address for each in a register) without bank conflicts.
template <int STATE> constexpr int pitch_of = STATE | 1;

struct Params {
    const void *x;         // map (B, D, H, W) by strides; SEQ: u (B, K * D, L)
    const void *raw;       // (B, L, K, R + 2 N): dt, B, C; SEQ: delta, like u
    const void *B, *C;     // SEQ: (B, K, N, L)
    const float *weights;  // (K, R, D): dt_projs_weight, times log2(e)
    const float *bias;     // (K, D), times log2(e)
    const float *rates;    // (K, G * STATE, D): A, zero beyond N
    const float *skip;     // (K, D)
    const float *entries;  // (walks, spans, STATE, D): what enters each span, or null for zeros
    float *states;         // (walks, chunks, STATE, D): the state that enters each chunk, or null
    float *decays, *ends;  // (walks, spans, STATE, D): of a span from zero, if SUMMARY
    void *y;               // (G, K, B, L, D) in row-major order of the image, or null; SEQ: like u
    const void *grad;      // by y: (B, D, H, W) by strides; SEQ: like u
    void *grad_x;          // like y
    void *grad_raw;        // (parts, B, L, K, R + 2 N); SEQ: grad_delta, like y
    void *grad_B, *grad_C;  // SEQ: (columns, B, K, N, L)
    float *sums;           // (B, spans, K, G, STATE + R + 2, D): by A, weights, bias and skip
    long long x_b, x_d, x_h, x_w, grad_b, grad_d, grad_h, grad_w;  // strides in elements
    int batch, dim, height, width, rank, state, routes, groups;  // state: N, groups: G of STATE
    int span, spans, chunks, columns;  // span: positions, a multiple of CHUNK; columns: of blocks
    int softplus, y_type, part_type, vector;  // types as in load_parameter; vector: SEQ, aligned
    u32 magic_height, magic_width;
};

struct Float {};  // fp32 maps, beside Half and BFloat

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
template <class T> constexpr int type_of = same<T, Float> ? 0 : same<T, Half> ? 1 : 2;

template <class T>
__device__ __forceinline__ float load(const void *p, long long i) {
    if constexpr (same<T, Float>) return __ldg((const float *)p + i);
    else return T::unpack(__ldg((const unsigned short *)p + i)).x;
}

__device__ __forceinline__ void store(void *p, long long i, float v, int type) {
    if (type == 0) ((float *)p)[i] = v;
    else if (type == 1) ((unsigned short *)p)[i] = (unsigned short)Half::pack(v, 0.f);
#if __CUDA_ARCH__ >= 800
    else ((unsigned short *)p)[i] = (unsigned short)BFloat::pack(v, 0.f);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(1 + 2^z): e P(e) with e = 2^-|z|, so that tiny results keep their digits.
template <class T>
__device__ __forceinline__ float softplus2(float z) {
    const float e = ex2(-fabsf(z));
    float p;
    if constexpr (same<T, Float>) {  // relative error 2e-7
        p = fmaf(0.00754890637f, e, -0.0425659567f);
        p = fmaf(p, e, 0.112854391f);
        p = fmaf(p, e, -0.197117448f);
        p = fmaf(p, e, 0.275640696f);
        p = fmaf(p, e, -0.358408302f);
        p = fmaf(p, e, 0.480692923f);
        p = fmaf(p, e, -0.721340179f);
        p = fmaf(p, e, 1.44269502f);
    } else {  // 9e-6
        p = fmaf(-0.034434747f, e, 0.146029979f);
        p = fmaf(p, e, -0.30303365f);
        p = fmaf(p, e, 0.469173133f);
        p = fmaf(p, e, -0.720426023f);
        p = fmaf(p, e, 1.44268286f);
    }
    return fmaf(p, e, fmaxf(z, 0.f));
}

// The derivative of softplus where its value is delta: 1 - exp(-delta).
__device__ __forceinline__ float softplus_slope(float l) {
    const float u = l * LN2;
    float p = fmaf(-u, 1.f / 6, 1.f);
    p = fmaf(-u * (1.f / 5), p, 1.f);
    p = fmaf(-u * (1.f / 4), p, 1.f);
    p = fmaf(-u * (1.f / 3), p, 1.f);
    p = fmaf(-u * (1.f / 2), p, 1.f);
    float small = u * p, large = 1.f - ex2(-l);
    asm("" : "+f"(small), "+f"(large));  // both, rather than a branch
    return u < 0.25f ? small : large;
}

// Position i of a walk -> offset in elements. A route against its axis has negative strides.
struct Path {
    int inner_length, rows;
    u32 magic;  // 2^32 / inner_length, rounded up; 0 for 1
    bool column, back;

    __device__ __forceinline__ Path(const Params &p, int route, bool reversed) {
        column = route & 1;
        back = (route >= 2) != reversed;
        inner_length = column ? p.height : p.width;
        rows = column ? p.width : p.height;
        magic = column ? p.magic_height : p.magic_width;
    }
    __device__ __forceinline__ int row(int i) const {
        return magic ? (int)__umulhi((u32)i, magic) : i;
    }
};

struct Steps {  // of a path over a tensor with the strides of H and W
    int inner, outer, first;
    __device__ __forceinline__ Steps(const Path &path, int stride_h, int stride_w) {
        inner = path.column ? stride_h : stride_w;
        outer = path.column ? stride_w : stride_h;
        first = path.back ? (path.rows - 1) * outer + (path.inner_length - 1) * inner : 0;
        if (path.back) inner = -inner, outer = -outer;
    }
    __device__ __forceinline__ int at(const Path &path, int i) const {
        const int row = path.row(i);
        return first + row * outer + (i - row * path.inner_length) * inner;
    }
    __device__ __forceinline__ void next(const Path &path, int &offset, int &rest) const {
        offset += inner;
        if (++rest == path.inner_length) {
            rest = 0;
            offset += outer - path.inner_length * inner;
        }
    }
};

// STEP positions from `start` of a channel, as their bits; zeros beyond `count` and if not `valid`.
template <class T, bool SEQ>
__device__ __forceinline__ void load_bits(
    u32 (&x)[STEP], const void *base, const Path &path, const Steps &steps, int start, int count,
    bool valid, bool vector) {
    constexpr bool WIDE = same<T, Float>;
    constexpr int SIZE = WIDE ? 4 : 2;
    auto load = [&](const void *p, int i) -> u32 {
        return WIDE ? __ldg((const u32 *)p + i) : __ldg((const unsigned short *)p + i);
    };
    if (SEQ && vector && count >= STEP && !path.back) {
        uint4 u[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        const uint4 *from = (const uint4 *)((const char *)base + (long long)start * SIZE);
        if (valid) {
            u[0] = __ldg(from);
            if (WIDE) u[1] = __ldg(from + 1);
        }
        const u32 words[8] = {u[0].x, u[0].y, u[0].z, u[0].w, u[1].x, u[1].y, u[1].z, u[1].w};
#pragma unroll
        for (int i = 0; i < STEP; ++i)
            x[i] = WIDE ? words[i] : i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
        return;
    }
    const int row = path.row(start);
    int rest = start - row * path.inner_length;
    int offset = steps.first + row * steps.outer + rest * steps.inner;
    if (count >= STEP && rest + STEP <= path.inner_length) {  // within a row
        const long long step = (long long)steps.inner * SIZE;
        const char *from = (const char *)base + (long long)offset * SIZE;
#pragma unroll
        for (int i = 0; i < STEP; ++i, from += step) x[i] = valid ? load(from, 0) : 0u;
        return;
    }
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
        x[i] = i < count && valid ? load(base, offset) : 0u;
        steps.next(path, offset, rest);
    }
}

template <class T>
__device__ __forceinline__ void to_floats(float (&x)[STEP], const u32 (&bits)[STEP]) {
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
        if constexpr (same<T, Float>) x[i] = __uint_as_float(bits[i]);
        else x[i] = T::unpack(bits[i]).x;
    }
}

template <class T, bool SEQ>
__device__ __forceinline__ void load_steps(
    float (&x)[STEP], const void *base, const Path &path, const Steps &steps, int start, int count,
    bool valid, bool vector) {
    u32 bits[STEP];
    load_bits<T, SEQ>(bits, base, path, steps, start, count, valid, vector);
    to_floats<T>(x, bits);
}

// The counterpart, for a contiguous result of type T or another.
template <class T, bool SEQ>
__device__ __forceinline__ void store_steps(
    const float (&y)[STEP], void *base, const Path &path, const Steps &steps, int start, int count,
    bool valid, bool vector, int type) {
    constexpr int SIZE = same<T, Float> ? 4 : 2;
    if (!valid) return;
    if (SEQ && vector && count >= STEP && type == type_of<T>) {
        uint4 *to = (uint4 *)((char *)base + (long long)start * SIZE);
        if constexpr (same<T, Float>) {
#pragma unroll
            for (int j = 0; j < 2; ++j)
                to[j] = make_uint4(__float_as_uint(y[4 * j]), __float_as_uint(y[4 * j + 1]),
                                   __float_as_uint(y[4 * j + 2]), __float_as_uint(y[4 * j + 3]));
        } else {
            *to = make_uint4(T::pack(y[0], y[1]), T::pack(y[2], y[3]), T::pack(y[4], y[5]),
                             T::pack(y[6], y[7]));
        }
        return;
    }
    const int row = path.row(start);
    int rest = start - row * path.inner_length;
    int offset = steps.first + row * steps.outer + rest * steps.inner;
    if (count >= STEP && rest + STEP <= path.inner_length && type == type_of<T>) {
        const long long step = (long long)steps.inner * SIZE;
        char *to = (char *)base + (long long)offset * SIZE;
#pragma unroll
        for (int i = 0; i < STEP; ++i, to += step) store(to, 0, y[i], type_of<T>);
        return;
    }
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
        if (i < count) store(base, offset, y[i], type);
        steps.next(path, offset, rest);
    }
}

// Columns dt (R), then B and C (STATE each, as wanted) of `count` positions from `start` as fp32,
// C times ln 2; zeros beyond.
template <class T, int STATE, bool SEQ, bool WITH_B, bool WITH_C>
__device__ __forceinline__ void stage(const Params &p, float *staged, const Path &path, int b,
                                      int k, int group, int start, int count) {
    const int known = min(STATE, p.state - group * STATE);
    if constexpr (SEQ) {
        const long long base = (((long long)b * p.routes + k) * p.state + group * STATE) * p.width;
        constexpr int COLUMNS = STATE * (WITH_B + WITH_C);
#pragma unroll 4
        for (int j = threadIdx.x; j < COLUMNS * CHUNK; j += blockDim.x) {
            const int column = j / CHUNK, i = j % CHUNK;
            const bool is_C = !WITH_B || column >= STATE;
            const int n = WITH_B && column >= STATE ? column - STATE : column;
            const int at = path.back ? p.width - 1 - start - i : start + i;
            const float v = n < known && i < count
                ? load<T>(is_C ? p.C : p.B, base + (long long)n * p.width + at) : 0.f;
            staged[column * PITCH + i] = is_C ? v * LN2 : v;
        }
    } else {
        const int columns = p.rank + STATE * (WITH_B + WITH_C), row = p.rank + 2 * p.state;
        const Steps steps(path, p.width, 1);
        const long long image = (long long)b * p.height * p.width;
        for (int first = 0; first < columns; first += blockDim.x) {
            const int width = min(columns - first, (int)blockDim.x);
            const int column = first + threadIdx.x % width, together = blockDim.x / width;
            int source = column;
            bool valid = true, is_C = false;
            if (column >= p.rank) {
                const int n = (column - p.rank) % STATE;
                is_C = !WITH_B || column - p.rank >= STATE;
                source = p.rank + (is_C ? p.state : 0) + group * STATE + n;
                valid = n < known;
            }
            const float scale = is_C ? LN2 : 1.f;
            int i = threadIdx.x / width;
            if (i >= together) i = CHUNK;
#pragma unroll 4
            for (; i < CHUNK; i += together) {
                const long long at = image + (i < count ? steps.at(path, start + i) : 0);
                staged[column * PITCH + i] = valid && i < count
                    ? scale * load<T>(p.raw, (at * p.routes + k) * row + source) : 0.f;
            }
        }
    }
}

__device__ __forceinline__ void read4(float *to, const float *from) {
    const float4 a = *(const float4 *)from;
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
}

__device__ __forceinline__ void read8(float (&to)[8], const float *from) {
    read4(to, from);
    read4(to + 4, from + 4);
}

// l of STEP positions; zero beyond `count`. `weights` are the thread's, `pitch` apart; `offset` is
// what SEQ adds to the address of delta.
template <class T, bool SEQ>
__device__ __forceinline__ void log_decays(
    float (&l)[STEP], const Params &p, long long offset, float bias, const float *dt_staged,
    const float *weights, int pitch, const Path &path, const Steps &steps, int start, int count,
    bool valid) {
    if constexpr (SEQ) {
        load_steps<T, SEQ>(l, (const char *)p.raw + offset, path, steps, start, count, valid,
                           p.vector);
#pragma unroll
        for (int i = 0; i < STEP; ++i) {
            l[i] = fmaf(l[i], LOG2E, bias);
            if (p.softplus) l[i] = softplus2<T>(l[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < STEP; ++i) l[i] = bias;
#pragma unroll 2
        for (int r = 0; r < p.rank; ++r) {
            float dt[STEP];
            read8(dt, dt_staged + r * PITCH);
            const float w = weights[r * pitch];
#pragma unroll
            for (int i = 0; i < STEP; ++i) l[i] = fmaf(w, dt[i], l[i]);
        }
#pragma unroll
        for (int i = 0; i < STEP; ++i) l[i] = softplus2<T>(l[i]);
    }
    if (count < STEP)
#pragma unroll
        for (int i = 0; i < STEP; ++i)
            if (i >= count) l[i] = 0.f;
}

// Which walk, span and channels a block has.
struct Place {
    int b, k, group, span, column;
    __device__ __forceinline__ Place(const Params &p) {
        int i = blockIdx.x;
        column = i % p.columns, i /= p.columns;
        span = i % p.spans, i /= p.spans;
        group = i % p.groups, i /= p.groups;
        k = i % p.routes, b = i / p.routes;
    }
    __device__ __forceinline__ long long walk(const Params &p) const {
        return ((long long)b * p.routes + k) * p.groups + group;
    }
};
