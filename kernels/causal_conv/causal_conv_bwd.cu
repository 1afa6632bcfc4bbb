// The backward of the short causal convolution with SiLU, which calculates its sums again.
#include "causal_conv/causal_conv.cuh"

struct CausalConvBwdParams {
    ConvMap x, dy, dx;
    ConvMap more;               // of the same gradient, which is added to dy, or null
    const void *weight, *bias;  // (K, D, W); (K, D), or null
    const void *before;         // (B, W - 1, D), or null
    const void *dlast;          // (B, W - 1, D): the gradient by the last inputs, or null
    void *dbefore;              // (B, W - 1, D), or null
    float *partials;            // (chunks, W + 1, K * D): by weight and bias
    int batch, length, dim, silu, columns, chunks, weight_type, bias_type;
};

constexpr int CONV_BLOCKS = __CUDA_ARCH__ < 860 ? 2 : 3;  // of a multiprocessor

template <class T, int W, int DIRECTIONS, bool LAST, int V>
__global__ void __launch_bounds__(CONV_THREADS, CONV_BLOCKS) causal_conv_bwd(const CausalConvBwdParams p) {
    typedef Conv<T, W, DIRECTIONS, LAST, V> C;
    constexpr int P = C::P, HALO = C::HALO, K = C::K, SUMS = K * (W + 1) * V;
    extern __shared__ __align__(16) float shared[];
    const int column = blockIdx.x % p.columns, chunk = blockIdx.x / p.columns;
    const int channel = (column * C::ACROSS + (int)threadIdx.x % C::ACROSS) * V;
    const int of_sample = (p.length + P - 1) / P, rows = p.batch * of_sample;
    const bool valid = channel < p.dim;

    float weights[K][W][V] = {}, biases[K][V] = {}, sums[SUMS] = {};
    if (valid)
        C::load_weights(weights, biases, p.weight, p.weight_type, p.bias, p.bias_type, channel,
                        p.dim);
    for (int row = chunk * C::ROWS + (int)threadIdx.x / C::ACROSS; valid && row < rows;
         row += p.chunks * C::ROWS) {
        const int sample = row / of_sample, first = (row - sample * of_sample) * P;
        float x[C::WINDOW][V], dx[P][V] = {};
        C::template load_window<0, C::WINDOW>(x, p.x, p.before, sample, first - HALO, channel,
                                              p.length, p.dim);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const bool back = C::back(k);
            // The gradient by the sums at those of P, and at those after them in time.
            float g[P + HALO][V];
            auto load_all = [&](float (&to)[P + HALO][V], const ConvMap &map) {
#pragma unroll
                for (int i = 0; i < P + HALO; ++i) {
                    const int position = min(max(first + (back ? i - HALO : i), 0), p.length - 1);
                    C::load(to[i], map.data, k * map.k + sample * map.b
                            + (long long)position * map.l + (long long)channel * map.d);
                }
            };
            load_all(g, p.dy);
            if (p.more.data) {
                float more[P + HALO][V];
                load_all(more, p.more);
#pragma unroll
                for (int i = 0; i < P + HALO; ++i)
#pragma unroll
                    for (int e = 0; e < V; ++e) g[i][e] += more[i][e];
            }
#pragma unroll
            for (int i = 0; i < P + HALO; ++i) {
                const int place = back ? i - HALO : i, position = first + place;
                const bool inside = position >= 0 && position < p.length;
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    if (p.silu) {
                        // The windows of positions beyond P end within that of P.
                        float sum = biases[k][e];
#pragma unroll
                        for (int w = 0; w < W; ++w)
                            sum = fmaf(weights[k][w][e],
                                       x[place + HALO + (back ? HALO - w : w - HALO)][e], sum);
                        const float s = sigmoid(sum);
                        g[i][e] *= s * fmaf(sum, 1.f - s, 1.f);
                    }
                    if (!inside) g[i][e] = 0.f;
                }
            }
#pragma unroll
            for (int i = 0; i < P; ++i)
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    const float own = g[back ? i + HALO : i][e];
#pragma unroll
                    for (int w = 0; w < W; ++w) {
                        dx[i][e] = fmaf(weights[k][w][e], g[back ? i + w : i + HALO - w][e],
                                        dx[i][e]);
                        float &sum = sums[(k * (W + 1) + w) * V + e];
                        sum = fmaf(own, x[i + HALO + (back ? HALO - w : w - HALO)][e], sum);
                    }
                    sums[(k * (W + 1) + W) * V + e] += own;
                }
            // By the inputs before the first: number s of them is read through weight w by the
            // position at time s - w.
            if (DIRECTIONS != 3 && p.dbefore && (back ? first + P >= p.length : first == 0))
#pragma unroll
                for (int s = 0; s < HALO; ++s) {
                    float by[V] = {};
#pragma unroll
                    for (int w = 0; w <= s; ++w) {
                        const int position = back ? p.length - 1 - (s - w) : s - w;
                        if (position < 0 || position >= p.length) continue;
                        // All of these are among the positions that this thread has g of.
#pragma unroll
                        for (int i = 0; i < P + HALO; ++i)
                            if ((back ? first + i - HALO : first + i) == position)
#pragma unroll
                                for (int e = 0; e < V; ++e)
                                    by[e] = fmaf(weights[k][w][e], g[i][e], by[e]);
                    }
                    // Those that are still among the last ones.
                    float rest[V] = {};
                    if (p.dlast && s >= p.length)
                        C::load(rest, p.dlast, (long long)(sample * HALO + s - p.length) * p.dim
                                + channel);
#pragma unroll
                    for (int e = 0; e < V; ++e) by[e] += rest[e];
                    C::store(p.dbefore, (long long)(sample * HALO + s) * p.dim + channel, by);
                }
        }
#pragma unroll
        for (int i = 0; i < P; ++i) {
            const int position = first + i;
            if (position >= p.length) break;
            const int s = C::back(0) ? HALO - 1 - position : position - p.length + HALO;
            if (DIRECTIONS != 3 && p.dlast && s >= 0 && s < HALO) {
                float by[V];
                C::load(by, p.dlast, (long long)(sample * HALO + s) * p.dim + channel);
#pragma unroll
                for (int e = 0; e < V; ++e) dx[i][e] += by[e];
            }
            C::store(p.dx.data, sample * p.dx.b + (long long)position * p.dx.l
                     + (long long)channel * p.dx.d, dx[i]);
        }
    }

    // Over the threads of the same channels, in a fixed order.
#pragma unroll
    for (int i = 0; i < SUMS; ++i) shared[i * CONV_THREADS + threadIdx.x] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < SUMS * C::ACROSS; i += CONV_THREADS) {
        const int across = i % C::ACROSS, n = i / C::ACROSS, e = n % V, row = n / V % (W + 1);
        const int k = n / V / (W + 1), c = (column * C::ACROSS + across) * V + e;
        float sum = 0.f;
        for (int thread = across; thread < CONV_THREADS; thread += C::ACROSS)
            sum += shared[n * CONV_THREADS + thread];
        if (c < p.dim)
            p.partials[((long long)chunk * (W + 1) + row) * (K * p.dim) + k * p.dim + c] = sum;
    }
}
