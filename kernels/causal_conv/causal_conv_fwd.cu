// The short causal convolution, with bias and SiLU.
#include "causal_conv/causal_conv.cuh"

struct CausalConvParams {
    ConvMap x, y;
    const void *weight, *bias;  // (K, D, W); (K, D), or null
    const void *before;         // (B, W - 1, D): the inputs before the first, or null
    void *last;                 // (B, W - 1, D): the last inputs, or null
    int batch, length, dim, silu, columns, weight_type, bias_type;
};

template <class T, int W, int DIRECTIONS, bool LAST, int V>
__global__ void __launch_bounds__(CONV_THREADS) causal_conv_fwd(const CausalConvParams p) {
    typedef Conv<T, W, DIRECTIONS, LAST, V> C;
    constexpr int P = C::P, HALO = C::HALO;
    const int column = blockIdx.x % p.columns, chunk = blockIdx.x / p.columns;
    const int channel = (column * C::ACROSS + (int)threadIdx.x % C::ACROSS) * V;
    const int row = chunk * C::ROWS + (int)threadIdx.x / C::ACROSS;
    const int of_sample = (p.length + P - 1) / P, sample = row / of_sample;
    const int first = (row - sample * of_sample) * P;
    if (channel >= p.dim || sample >= p.batch) return;

    float weights[C::K][W][V], biases[C::K][V], x[C::WINDOW][V];
    C::load_weights(weights, biases, p.weight, p.weight_type, p.bias, p.bias_type, channel, p.dim);
    C::template load_window<DIRECTIONS & 1 ? 0 : HALO, DIRECTIONS & 2 ? C::WINDOW : P + HALO>(
        x, p.x, p.before, sample, first - HALO, channel, p.length, p.dim);
#pragma unroll
    for (int k = 0; k < C::K; ++k)
#pragma unroll
        for (int i = 0; i < P; ++i) {
            if (first + i >= p.length) break;
            float y[V];
#pragma unroll
            for (int e = 0; e < V; ++e) {
                y[e] = C::convolve(x, weights[k], biases[k][e], C::back(k), i, e);
                if (p.silu) y[e] *= sigmoid(y[e]);
            }
            C::store(p.y.data, k * p.y.k + sample * p.y.b + (long long)(first + i) * p.y.l
                     + (long long)channel * p.y.d, y);
        }
    // The last inputs in time, oldest first, which may be of those before the first.
    if (DIRECTIONS != 3 && p.last && first == 0)
#pragma unroll
        for (int s = 0; s < HALO; ++s) {
            float v[C::WINDOW][V];
            const int position = C::back(0) ? HALO - 1 - s : p.length - HALO + s;
            C::template load_window<0, 1>(v, p.x, p.before, sample, position, channel, p.length,
                                          p.dim);
            C::store(p.last, (long long)(sample * HALO + s) * p.dim + channel, v[0]);
        }
}
