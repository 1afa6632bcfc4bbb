// What the short causal convolution and its backward share. A thread has V adjacent channels and P
// adjacent positions of a sample at a time. DIRECTIONS: bit 0, position t reads itself and those
// before it; bit 1, itself and those after it. With both, x is read once for two results.
#pragma once
#include "common/common.cuh"

constexpr int CONV_THREADS = 128;

struct ConvMap {  // (K, B, L, D), K only of results
    const void *data;
    long long k, b;  // strides, in elements
    int l, d;
};

// LAST: channels are adjacent in memory, and V may be 2. Else positions are.
template <class T_, int W_, int DIRECTIONS_, bool LAST_, int V_>
struct Conv {
    typedef T_ T;
    static constexpr int W = W_, DIRECTIONS = DIRECTIONS_, V = V_, HALO = W - 1;
    static constexpr bool LAST = LAST_;
    static constexpr int K = DIRECTIONS == 3 ? 2 : 1, P = LAST ? 8 : 4, WINDOW = P + 2 * HALO;
    static constexpr int ACROSS = LAST ? 32 : 1, ROWS = CONV_THREADS / ACROSS;
    static constexpr int SIZE = same<T, Float> ? 4 : 2;
    static __device__ __forceinline__ constexpr bool back(int k) {
        return DIRECTIONS == 2 || k == 1;
    }

    static __device__ __forceinline__ void load(float (&v)[V], const void *data, long long at) {
        const char *const from = (const char *)data + at * SIZE;
        if constexpr (V == 2 && SIZE == 4) {
            const float2 pair = *(const float2 *)from;
            v[0] = pair.x, v[1] = pair.y;
        } else if constexpr (V == 2) {
            const float2 pair = T::unpack(*(const u32 *)from);
            v[0] = pair.x, v[1] = pair.y;
        } else if constexpr (SIZE == 4) {
            v[0] = *(const float *)from;
        } else {
            v[0] = T::unpack(*(const unsigned short *)from).x;
        }
    }
    static __device__ __forceinline__ void store(const void *data, long long at,
                                                 const float (&v)[V]) {
        char *const to = (char *)data + at * SIZE;
        if constexpr (V == 2 && SIZE == 4) *(float2 *)to = make_float2(v[0], v[1]);
        else if constexpr (V == 2) *(u32 *)to = T::pack(v[0], v[1]);
        else store_result(to, 0, T::CODE, v[0]);
    }
    // What the positions from `first` on read as x: beyond the ends zeros. Loads are never skipped,
    // so that all of them are under way at once.
    template <int FROM, int TO>
    static __device__ __forceinline__ void load_window(float (&x)[WINDOW][V], const ConvMap &map,
                                                       const void *before, int sample, int first,
                                                       int channel, int length, int dim) {
#pragma unroll
        for (int i = FROM; i < TO; ++i) {
            const int position = min(max(first + i, 0), length - 1);
            load(x[i], map.data, sample * map.b + (long long)position * map.l
                                 + (long long)channel * map.d);
        }
#pragma unroll
        for (int i = FROM; i < TO; ++i)
            if (first + i < 0 || first + i >= length)
#pragma unroll
                for (int e = 0; e < V; ++e) x[i][e] = 0.f;
        if (DIRECTIONS != 3 && before)
#pragma unroll
            for (int i = FROM; i < TO; ++i) {
                const int early = back(0) ? first + i - length : -1 - first - i;
                if (early >= 0 && early < HALO)
                    load(x[i], before, (long long)(sample * HALO + HALO - 1 - early) * dim
                                       + channel);
            }
    }
    static __device__ __forceinline__ void load_weights(
        float (&weights)[K][W][V], float (&biases)[K][V], const void *weight, int weight_type,
        const void *bias, int bias_type, int channel, int dim) {
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const long long c = (long long)k * dim + channel + e;
#pragma unroll
                for (int w = 0; w < W; ++w)
                    weights[k][w][e] = load_parameter(weight, c * W + w, weight_type);
                biases[k][e] = bias ? load_parameter(bias, c, bias_type) : 0.f;
            }
    }
    // The convolution at place i of P, from the window that begins HALO positions before them.
    static __device__ __forceinline__ float convolve(const float (&x)[WINDOW][V],
                                                     const float (&weights)[W][V], float bias,
                                                     bool back, int i, int e) {
        float sum = bias;
#pragma unroll
        for (int w = 0; w < W; ++w)
            sum = fmaf(weights[w][e], x[i + HALO + (back ? HALO - w : w - HALO)][e], sum);
        return sum;
    }
};
