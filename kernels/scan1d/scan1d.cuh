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
    // The address of a thread's first element at position 0, for blocks that begin at `channel`.
    template <class E>
    __device__ __forceinline__ const char *of(const Map &map, int channel, bool last,
                                              const E &elements, int size = E::SIZE) const {
        return (const char *)map.data
            + size * (b * map.b + k * map.k + (last ? channel : (long long)channel * map.s)
                      + elements.offset(map.s));
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
};

// The elements of a tile that a thread loads and stores: vectors of V of them, which are adjacent
// channels (LAST) or positions. The same thread has the same elements in every map. `full` says that
// there are all steps and channels of the tile.
template <class T, class S, bool LAST, bool VECTOR>
struct Elements {
    static constexpr bool WIDE = same<T, Float>;
    static constexpr int V = !VECTOR ? 1 : LAST && !WIDE ? 8 : 4, SIZE = WIDE ? 4 : 2;
    static constexpr int ROW = (LAST ? S::CHANNELS : S::STEPS) / V;  // vectors
    static constexpr int VECTORS = S::CHANNELS * S::STEPS / V;
    static constexpr int TURNS = (VECTORS + THREADS - 1) / THREADS, COUNT = TURNS * V;
    static constexpr int WORDS = (COUNT * SIZE + 3) / 4;
    static constexpr bool IDLE = VECTORS < THREADS;  // some threads have nothing
    // Different channels of a thread; element i of turn e is of channel number of(e, i).
    static constexpr int OWN = !LAST ? TURNS : V > 1 ? V : ROW > THREADS ? 2 : 1;
    static __device__ __forceinline__ constexpr int of(int e, int i) {
        return !LAST ? e : V > 1 ? i : ROW > THREADS ? e & 1 : 0;
    }
    // From the first vector to that of turn e: channels and positions.
    static __device__ __forceinline__ constexpr int channels_to(int e) {
        return !LAST ? e * (THREADS / ROW) : ROW > THREADS ? (e & 1) * THREADS : 0;
    }
    static __device__ __forceinline__ constexpr int positions_to(int e) {
        return !LAST ? 0 : ROW > THREADS ? e / 2 : e * (THREADS / (ROW > THREADS ? 1 : ROW));
    }
    // Vectors of channels would all be in two of eight groups of banks: pairs change places.
    static __device__ __forceinline__ int place(int pair) {
        return 4 * (LAST && V > 1 ? pair ^ (pair >> 3 & 3) : pair);
    }

    int channel, position;  // of the first vector
    int tile, row;          // where it is in shared memory; from a position to the next there
    bool back, none;

    __device__ __forceinline__ Elements(bool back) : back(back) {
        const int i = threadIdx.x;
        channel = LAST ? i % ROW * V : i / ROW;
        position = LAST ? i / ROW : i % ROW * V;
        none = IDLE && i >= VECTORS;
        row = back ? -S::ROW : S::ROW;
        tile = step(0, 0) * S::ROW;
        if (!(LAST && V > 1)) tile += 2 * channel;
    }
    __device__ __forceinline__ int step(int e, int i) const {
        const int m = position + positions_to(e) + (LAST ? 0 : i);
        return back ? S::STEPS - 1 - m : m;
    }
    // Where l and x of an element are in shared memory.
    __device__ __forceinline__ int at(int e, int i) const {
        const int from = tile + (positions_to(e) + (LAST ? 0 : i)) * row + 2 * channels_to(e);
        if (LAST && V > 1) return from + place((channel + i) / 2) + 2 * (i & 1);
        return from;
    }
    __device__ __forceinline__ void stage(float *to, int e, const float (&l)[V],
                                          const float (&x)[V]) const {
        if constexpr (LAST && V > 1) {
#pragma unroll
            for (int i = 0; i < V; i += 2)
                *(float4 *)(to + at(e, i)) = make_float4(l[i], x[i], l[i + 1], x[i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) *(float2 *)(to + at(e, i)) = make_float2(l[i], x[i]);
        }
    }
    __device__ __forceinline__ bool valid(int e, int channels, const Place &place) const {
        return !none && channel + channels_to(e) < channels
            && step(e, back ? V - 1 : 0) < place.count;
    }
    // The offset of the first vector from a block's first channel, at position 0.
    __device__ __forceinline__ int offset(int s) const {
        return LAST ? position * s + channel : channel * s + position;
    }
    static __device__ __forceinline__ int to_turn(int e, int s) {
        return LAST ? positions_to(e) * s + channels_to(e) : channels_to(e) * s;
    }
    static __device__ __forceinline__ long long of_place(const Place &place, int s) {
        return (long long)place.first * (LAST ? s : 1);
    }

    // `base` is the address of the first vector at position 0.
    __device__ __forceinline__ void load(u32 (&raw)[WORDS], const char *base, int s, int channels,
                                         const Place &place, bool full) const {
        base += of_place(place, s) * SIZE;
        if (TURNS > 4) opaque(s);  // offsets of turns would be kept in registers otherwise
#pragma unroll
        for (int e = 0; e < TURNS; ++e) {
            const bool inside = full ? !none : valid(e, channels, place);
            const char *const from = base + (long long)to_turn(e, s) * SIZE;
            if constexpr (V * SIZE == 16) {
                uint4 v = make_uint4(0, 0, 0, 0);
                if (inside) v = __ldg((const uint4 *)from);
                raw[4 * e] = v.x, raw[4 * e + 1] = v.y, raw[4 * e + 2] = v.z, raw[4 * e + 3] = v.w;
            } else if constexpr (V * SIZE == 8) {
                uint2 v = make_uint2(0, 0);
                if (inside) v = __ldg((const uint2 *)from);
                raw[2 * e] = v.x, raw[2 * e + 1] = v.y;
            } else {
                u32 v = 0;
                if (inside) v = WIDE ? __ldg((const u32 *)from) : load_u16(from);
                if (WIDE) raw[e] = v;
                else raw[e / 2] = e & 1 ? raw[e / 2] | v << 16 : v;
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
    // `base` is the address of the first vector in the tile; plain: `type` is that of T.
    static __device__ __forceinline__ void store(char *base, int s, int type, int e,
                                                 const float (&v)[V], bool plain) {
        const int at = to_turn(e, s);
        if (!plain && type != T::CODE) {
#pragma unroll
            for (int i = 0; i < V; ++i) store_result(base, at + i, type, v[i]);
            return;
        }
        base += (long long)at * SIZE;
        if constexpr (V == 1)
            store_result(base, 0, T::CODE, v[0]);
        else if constexpr (V == 8)
            *(uint4 *)base = make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]),
                                        T::pack(v[4], v[5]), T::pack(v[6], v[7]));
        else
            store4<T>(base, 0, v);
    }
};

// Loads B or C of a tile, and writes it to shared memory as fp32, where a lane's states begin at
// `staged`. `full`: there are all steps and states.
template <class T, class S>
struct Column {
    static constexpr int ALL = S::N * S::STEPS, SIZE = same<T, Float> ? 4 : 2;
    static constexpr int TURNS = (ALL + THREADS - 1) / THREADS, AHEAD = TURNS < 4 ? TURNS : 4;
    static constexpr bool LATE = TURNS > AHEAD;  // too many to be loaded ahead
    // From a thread's number to that of the next turn: states if positions are adjacent in memory,
    // or positions if states are.
    static constexpr int STATES_ON = THREADS / S::STEPS;
    static constexpr int STEPS_ON = THREADS / S::N < 1 ? 1 : THREADS / S::N;

    const char *base;
    int state, position;  // of the first number
    int turn, states;     // elements from a turn to the next; N
    int l;                // elements from a position to the next
    int tile, tile_turn;  // where the first number goes; and from a turn to the next
    bool rows, back;      // rows: the states of a position are adjacent

    __device__ __forceinline__ Column(const Rows &of, const BlockIndex &index, int states,
                                      bool back) : states(states), back(back) {
        rows = of.n == 1;
        const int i = threadIdx.x;
        state = rows ? i % S::N : i / S::STEPS;
        position = rows ? i / S::N : i % S::STEPS;
        l = of.l;
        turn = rows ? STEPS_ON * of.l : STATES_ON * of.n;
        base = (const char *)of.data + SIZE * (index.b * of.b + index.k * of.k
                                               + state * of.n + position * of.l);
        tile = (back ? S::STEPS - 1 - position : position) * S::BC_ROW + slot(state);
        tile_turn = rows ? (back ? -STEPS_ON : STEPS_ON) * S::BC_ROW : 2 * STATES_ON;
    }
    static __device__ __forceinline__ int slot(int state) {
        return state / S::NS * (2 * S::NS) + state % S::NS;
    }
    __device__ __forceinline__ void load(u32 (&raw)[AHEAD], const Place &place, int first,
                                         bool full) const {
        const char *const from = base + (long long)place.first * l * SIZE;
#pragma unroll
        for (int r = 0; r < AHEAD; ++r) {
            bool inside = ALL % THREADS == 0 || threadIdx.x + (first + r) * THREADS < ALL;
            if (!full) {
                const int n = state + (rows ? 0 : (first + r) * STATES_ON);
                const int m = position + (rows ? (first + r) * STEPS_ON : 0);
                inside = inside && n < states
                    && (back ? S::STEPS - 1 - m : m) < place.count;
            }
            const char *const at = from + (long long)((first + r) * turn) * SIZE;
            u32 v = 0;
            if (inside) v = SIZE == 4 ? __ldg((const u32 *)at) : load_u16(at);
            raw[r] = v;
        }
    }
    __device__ __forceinline__ void store(float *staged, const u32 (&raw)[AHEAD], int first) const {
#pragma unroll
        for (int r = 0; r < AHEAD; ++r) {
            if (ALL % THREADS && threadIdx.x + (first + r) * THREADS >= ALL) break;
            float v;
            if constexpr (SIZE == 4) v = __uint_as_float(raw[r]);
            else v = T::unpack(raw[r]).x;
            int to = tile + (first + r) * tile_turn;
            if (!rows && STATES_ON % S::NS)
                to = tile - slot(state) + slot(state + (first + r) * STATES_ON);
            staged[to] = v;
        }
    }
    __device__ __forceinline__ void load_ahead(u32 (&raw)[AHEAD], const Place &place, bool full
                                               ) const {
        if constexpr (!LATE) load(raw, place, 0, full);
    }
    __device__ __forceinline__ void stage(float *staged, u32 (&raw)[AHEAD],
                                          const Place &place) const {
        if constexpr (!LATE) {
            store(staged, raw, 0);
        } else {
#pragma unroll 1
            for (int first = 0; first < TURNS; first += AHEAD) {
                load(raw, place, first, false);
                store(staged, raw, first);
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

template <int N>
__device__ __forceinline__ void write_states(float *to, const float (&from)[N]) {
    if constexpr (N == 4) *(float4 *)to = make_float4(from[0], from[1], from[2], from[3]);
    else if constexpr (N == 2) *(float2 *)to = make_float2(from[0], from[1]);
    else *to = from[0];
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
