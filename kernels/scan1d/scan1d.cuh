// What the kernels of selective_scan along sequences share. A sequence is one of (B, K); a block has
// adjacent channels of it and a span of its time, which it goes through tile by tile. A thread has
// NS states of two adjacent channels (a pair), and LANES adjacent lanes share a pair, so a pair has
// NS * LANES states, of which those from N on are zero.
//
// Time is in the order of the scan: step t of a tile is position STEPS - 1 - t of its memory if the
// scan runs backwards. Logarithms are in base 2: l = delta / ln 2, and the decay is 2^(rate l).
#pragma once
#include "common/common.cuh"

constexpr int THREADS = 128;
constexpr int RUN = 0, STATES = 1, GRADIENTS = 2;  // modes of the forward kernel

// A sequence of maps. Either the channels of a position are adjacent, or the positions of a channel.
struct Map {
    const void *data;
    long long b, k;  // strides, in elements
    int s;           // from a position to the next, or from a channel to the next
};

struct Rows {  // B or C
    const void *data;
    long long b, k;  // strides, in elements
    int n, l;
};

struct Scan1dParams {
    Map u, delta, z, y;      // y is written by the forward; the backward reads it if there is z
    Map grad, du, ddelta, dz;  // by y, and those that are calculated
    Rows B, C;
    const void *A, *D, *bias;  // (K * D, N); (K * D) or null
    const float *entries;    // (B, spans, K * D, N): the state that enters a span, or null for zeros
    const float *grad_entries;  // the same of the gradient by the state, from the far end
    float *last;             // (B, K * D, N): the state after the last step, or null
    float *first_grad;       // (B, K * D, N): the gradient by the state before the first, or null
    float *states;           // (B, tiles, K * D, N): what enters each tile, from zero in each span
    float *cums;             // (B, tiles, K * D): sums of l of a span before each tile, or null
    float *ends, *sums;      // (B, spans, K * D, N): what a span leaves, from zero; its sum of l
    float *BC_parts;         // (columns, B, K, L, 2 NS LANES): sums over the channels of a block
    float *A_parts, *D_parts;  // (B, spans, K * D, N); (B, spans, 2, K * D): by D and bias
    int dim, length, state, routes, reverse;  // reverse: a bit for each of the routes
    int columns, span, spans, tiles;  // blocks side by side; steps of a span; of a sequence
    int softplus, y_type, A_type, D_type, bias_type;  // types as in load_parameter
};

template <int NS_, int LANES_>
struct Shape {
    static constexpr int NS = NS_, LANES = LANES_;
    static constexpr int PAIRS = THREADS / LANES, CHANNELS = 2 * PAIRS, N = NS * LANES;
    static constexpr int STEPS = LANES < 4 ? 4 * LANES : 16;  // of a tile
    // l and x = delta u of two channels are four adjacent numbers, the pairs of a step a row.
    static constexpr int ROW = 2 * CHANNELS + 4;
    // B and C of a lane's states are adjacent, the lanes of a step a row.
    static constexpr int BC_ROW = 2 * N + 4;
    static constexpr int TILE = STEPS * ROW, BC_TILE = STEPS * BC_ROW;

    // A vector of channels has four pairs: they would all be in two of eight groups of banks.
    static __device__ __forceinline__ int place(int pair) { return 4 * (pair ^ (pair >> 3 & 3)); }
    static __device__ __forceinline__ int at(int step, int channel) {
        return step * ROW + place(channel >> 1) + 2 * (channel & 1);
    }
};

// Which sequence, span and channels a block has.
struct BlockIndex {
    int b, k, span, column;
    __device__ __forceinline__ BlockIndex(const Scan1dParams &p) {
        int i = blockIdx.x;
        column = i % p.columns, i /= p.columns;
        span = i % p.spans, i /= p.spans;
        k = i % p.routes, b = i / p.routes;
    }
    __device__ __forceinline__ const char *of(const Map &map, int channel, bool last,
                                              int size) const {
        return (const char *)map.data
            + size * (b * map.b + k * map.k + (last ? channel : (long long)channel * map.s));
    }
    __device__ __forceinline__ long long of_span(const Scan1dParams &p) const {
        return ((long long)b * p.spans + span) * (p.routes * p.dim) + k * p.dim;
    }
    __device__ __forceinline__ long long of_tile(const Scan1dParams &p, int tile) const {
        return ((long long)b * p.tiles + tile) * (p.routes * p.dim) + k * p.dim;
    }
};

// Where a tile lies in memory: its first position there, and how many of its steps there are.
struct Place {
    int first, count;
    bool back;
};

__device__ __forceinline__ u32 load_u16(const void *p) {
    u32 v;
    asm("ld.global.nc.u16 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ float sigmoid(float z) { return rcp(1.f + ex2(-LOG2E * z)); }

// The elements of a tile that a thread loads and stores: vectors of V of them, which are adjacent
// channels (LAST) or positions. The same thread has the same elements in every map.
template <class T, class S, bool LAST, bool VECTOR>
struct Elements {
    static constexpr bool WIDE = same<T, Float>;
    static constexpr int V = !VECTOR ? 1 : LAST && !WIDE ? 8 : 4, SIZE = WIDE ? 4 : 2;
    static constexpr int ROW = (LAST ? S::CHANNELS : S::STEPS) / V;  // vectors
    static constexpr int VECTORS = S::CHANNELS * S::STEPS / V;
    static constexpr int TURNS = (VECTORS + THREADS - 1) / THREADS, COUNT = TURNS * V;
    static constexpr int WORDS = (COUNT * SIZE + 3) / 4;
    // Different channels of a thread, where element i of turn e is of channel number of(e, i).
    static constexpr int OWN = !LAST ? TURNS : V > 1 ? V : S::CHANNELS > THREADS ? 2 : 1;
    static __device__ __forceinline__ constexpr int of(int e, int i) {
        return !LAST ? e : V > 1 ? i : S::CHANNELS > THREADS ? e & 1 : 0;
    }

    static __device__ __forceinline__ int index(int e) { return threadIdx.x + e * THREADS; }
    static __device__ __forceinline__ int channel(int e) {
        return LAST ? index(e) % ROW * V : index(e) / ROW;
    }
    static __device__ __forceinline__ int position(int e) {
        return LAST ? index(e) / ROW : index(e) % ROW * V;
    }
    static __device__ __forceinline__ int step(int e, int i, bool back) {
        const int m = position(e) + (LAST ? 0 : i);
        return back ? S::STEPS - 1 - m : m;
    }
    static __device__ __forceinline__ bool valid(int e, int channels, const Place &place) {
        return (VECTORS % THREADS == 0 || index(e) < VECTORS) && channel(e) < channels
            && step(e, place.back ? V - 1 : 0, place.back) < place.count;
    }
    static __device__ __forceinline__ int offset(int e, int s, const Place &place) {
        const int m = place.first + position(e);
        return LAST ? m * s + channel(e) : channel(e) * s + m;
    }

    static __device__ __forceinline__ void load(u32 (&raw)[WORDS], const char *base, int s,
                                                int channels, const Place &place) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) raw[i] = 0;
#pragma unroll
        for (int e = 0; e < TURNS; ++e) {
            if (!valid(e, channels, place)) continue;
            const char *const from = base + (long long)offset(e, s, place) * SIZE;
            if constexpr (V * SIZE == 16) {
                const uint4 v = __ldg((const uint4 *)from);
                raw[4 * e] = v.x, raw[4 * e + 1] = v.y, raw[4 * e + 2] = v.z, raw[4 * e + 3] = v.w;
            } else if constexpr (V * SIZE == 8) {
                const uint2 v = __ldg((const uint2 *)from);
                raw[2 * e] = v.x, raw[2 * e + 1] = v.y;
            } else if constexpr (WIDE) {
                raw[e] = __ldg((const u32 *)from);
            } else {
                raw[e / 2] |= load_u16(from) << 16 * (e & 1);
            }
        }
    }
    static __device__ __forceinline__ float get(const u32 (&raw)[WORDS], int e, int i) {
        const int j = e * V + i;
        if constexpr (WIDE) {
            return __uint_as_float(raw[j]);
        } else {
            const float2 v = T::unpack(raw[j / 2]);
            return j & 1 ? v.y : v.x;
        }
    }
    static __device__ __forceinline__ void store(char *base, int s, int type, int e,
                                                 const float (&v)[V], const Place &place) {
        const long long at = offset(e, s, place);
        if constexpr (V == 1) {
            store_result(base, at, type, v[0]);
        } else if (type != T::CODE) {
#pragma unroll
            for (int i = 0; i < V; ++i) store_result(base, at + i, type, v[i]);
        } else if constexpr (V == 8) {
            *(uint4 *)(base + at * SIZE) = make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]),
                                                      T::pack(v[4], v[5]), T::pack(v[6], v[7]));
        } else {
            store4<T>(base, at, v);
        }
    }
};

// Loads B and C of a tile, and writes them to shared memory as fp32.
template <class T, class S, bool WITH_B, bool WITH_C>
struct Columns {
    static constexpr int WIDTH = S::N * (WITH_B + WITH_C), ALL = WIDTH * S::STEPS;
    static constexpr int TURNS = (ALL + THREADS - 1) / THREADS, AHEAD = TURNS < 8 ? TURNS : 8;
    static constexpr bool LATE = TURNS > AHEAD;  // too many to be loaded ahead
    const char *B, *C;
    int B_n, B_l, C_n, C_l, state;
    bool rows;  // the states of a position are adjacent

    __device__ __forceinline__ Columns(const Scan1dParams &p, const BlockIndex &index) {
        constexpr int SIZE = same<T, Float> ? 4 : 2;
        B = (const char *)p.B.data + SIZE * (index.b * p.B.b + index.k * p.B.k);
        C = (const char *)p.C.data + SIZE * (index.b * p.C.b + index.k * p.C.k);
        B_n = p.B.n, B_l = p.B.l, C_n = p.C.n, C_l = p.C.l, state = p.state;
        rows = B_n == 1;
    }
    __device__ __forceinline__ void find(int i, int &w, int &m) const {
        w = rows ? i % WIDTH : i / S::STEPS;
        m = rows ? i / WIDTH : i % S::STEPS;
    }
    __device__ __forceinline__ void load(u32 (&raw)[AHEAD], const Place &place, int first) const {
#pragma unroll
        for (int r = 0; r < AHEAD; ++r) {
            const int i = threadIdx.x + (first + r) * THREADS;
            int w, m;
            find(i, w, m);
            const bool is_C = !WITH_B || w >= S::N;
            const int n = w - (WITH_B && is_C ? S::N : 0), position = place.first + m;
            const int t = place.back ? S::STEPS - 1 - m : m;
            raw[r] = 0;
            if ((ALL % THREADS == 0 || i < ALL) && n < state && t < place.count) {
                const long long at = n * (is_C ? C_n : B_n) + position * (is_C ? C_l : B_l);
                const char *const base = is_C ? C : B;
                if constexpr (same<T, Float>) raw[r] = __ldg((const u32 *)base + at);
                else raw[r] = load_u16(base + 2 * at);
            }
        }
    }
    __device__ __forceinline__ void store(float *staged, const u32 (&raw)[AHEAD], bool back,
                                          int first) const {
#pragma unroll
        for (int r = 0; r < AHEAD; ++r) {
            const int i = threadIdx.x + (first + r) * THREADS;
            if (ALL % THREADS && i >= ALL) break;
            int w, m;
            find(i, w, m);
            const bool is_C = !WITH_B || w >= S::N;
            const int n = w - (WITH_B && is_C ? S::N : 0), t = back ? S::STEPS - 1 - m : m;
            float v;
            if constexpr (same<T, Float>) v = __uint_as_float(raw[r]);
            else v = T::unpack(raw[r]).x;
            staged[t * S::BC_ROW + n / S::NS * (2 * S::NS) + is_C * S::NS + n % S::NS] = v;
        }
    }
    __device__ __forceinline__ void load_ahead(u32 (&raw)[AHEAD], const Place &place) const {
        if constexpr (!LATE) load(raw, place, 0);
    }
    __device__ __forceinline__ void stage(float *staged, u32 (&raw)[AHEAD],
                                          const Place &place) const {
        if constexpr (!LATE) {
            store(staged, raw, place.back, 0);
        } else {
            for (int first = 0; first < TURNS; first += AHEAD) {
                load(raw, place, first);
                store(staged, raw, place.back, first);
            }
        }
    }
};

template <int N>
__device__ __forceinline__ void read(float (&to)[N], const float *from) {
    if constexpr (N == 4) {
        const float4 v = *(const float4 *)from;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (N == 2) {
        const float2 v = *(const float2 *)from;
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = *from;
    }
}

// Numbers of a lane's states of a channel, in memory (.., N).
template <int NS>
__device__ __forceinline__ void load_states(float (&to)[NS], const float *from, int first,
                                            int state, bool valid) {
    if (NS == 4 && state % 4 == 0 && valid && first < state) {
        const float4 v = *(const float4 *)(from + first);
        to[0] = v.x, to[1 % NS] = v.y, to[2 % NS] = v.z, to[3 % NS] = v.w;
        return;
    }
#pragma unroll
    for (int n = 0; n < NS; ++n) to[n] = valid && first + n < state ? from[first + n] : 0.f;
}

template <int NS>
__device__ __forceinline__ void store_states(float *to, const float (&from)[NS], int first,
                                             int state, bool valid) {
    if (NS == 4 && state % 4 == 0) {
        if (valid && first < state)
            *(float4 *)(to + first)
                = make_float4(from[0], from[1 % NS], from[2 % NS], from[3 % NS]);
        return;
    }
#pragma unroll
    for (int n = 0; n < NS; ++n)
        if (valid && first + n < state) to[first + n] = from[n];
}

// Sums each of V numbers over WIDTH lanes whose numbers differ in the bits from STRIDE on. Of the
// sums, a lane gets the V / WIDTH that have its place among those lanes, in v[0], v[1], ..; with
// fewer numbers than lanes, WIDTH / V adjacent ones get the same.
template <int WIDTH, int STRIDE, int V, int SIZE>
__device__ __forceinline__ void sum_over_lanes(float (&v)[SIZE], int lane) {
    if constexpr (WIDTH > 1) {
        constexpr int MASK = WIDTH / 2 * STRIDE;
        if constexpr (V > 1) {
            const bool upper = lane & MASK;
#pragma unroll
            for (int i = 0; i < V / 2; ++i) {
                const float sent = upper ? v[i] : v[i + V / 2], kept = upper ? v[i + V / 2] : v[i];
                v[i] = kept + __shfl_xor_sync(~0u, sent, MASK);
            }
            sum_over_lanes<WIDTH / 2, STRIDE, V / 2>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(~0u, v[0], MASK);
            sum_over_lanes<WIDTH / 2, STRIDE, 1>(v, lane);
        }
    }
}

// Bias (times log2 e) and skip of a block's channels, to shared memory.
template <class S>
__device__ __forceinline__ void load_channels(float *bias, float *skip, const Scan1dParams &p,
                                              int k, int first) {
    for (int c = threadIdx.x; c < S::CHANNELS; c += THREADS) {
        const bool valid = first + c < p.dim;
        const long long at = (long long)k * p.dim + first + c;
        bias[c] = valid && p.bias ? LOG2E * load_parameter(p.bias, at, p.bias_type) : 0.f;
        skip[c] = valid && p.D ? load_parameter(p.D, at, p.D_type) : 0.f;
    }
}

template <class T>
__device__ __forceinline__ float find_l(float raw, float bias, bool softplus) {
    const float z = fmaf(raw, LOG2E, bias);
    return softplus ? precise_softplus2<T>(z) : z;
}
