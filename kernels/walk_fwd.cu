// Forward of a walk, any state size and dtype; or what a span does to the state (ENDS) and to the
// gradient by the state (GRADIENTS, against the walk). README.md has the layout.
#include "walk.cuh"

#if __CUDA_ARCH__ >= 1000
constexpr int WIDE = 3;  // blocks of a multiprocessor; four would spill there
#else
constexpr int WIDE = 4;
#endif
constexpr int RUN = 0, ENDS = 1, GRADIENTS = 2;

template <class T, int STATE, int V, bool SEQ, int MODE>
__global__ void __launch_bounds__(96, STATE == 16 ? WIDE : 6) walk_fwd(const Params p) {
    const Place place(p);
    const int k = place.k, b = place.b, group = place.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, width = blockDim.x * V;
    const int own = warp * 32 * V + lane;  // and 32 further for each v
    const int channel = place.column * width + own, channels = p.dim - channel;
    const int length = p.height * p.width;

    extern __shared__ __align__(16) float shared[];
    float *const staged = shared;
    float *const weights = staged + (p.rank + (MODE == RUN ? 2 : 1) * STATE) * PITCH;
    // Bias, skip and two addresses: a register less each.
    volatile float *const bias = weights + p.rank * width + own, *const skip = bias + width;
    volatile long long *const x_base
        = (long long *)(weights + (p.rank + 2) * width) + threadIdx.x;
    volatile long long *const y_base = x_base + blockDim.x;
    constexpr int STATES = pitch<STATE>;
    float *const rates = weights + (p.rank + 2) * width + 4 * blockDim.x + own * STATES;
    const float *const B_staged = staged + p.rank * PITCH;

    float h[V][STATE], total[V];
    const int first = place.span * p.span, last = min(length, first + p.span);
    const int begin = MODE == GRADIENTS ? length - last : first, end = begin + last - first;
    const int place_of_span = MODE == GRADIENTS ? p.spans - 1 - place.span : place.span;
    const long long at_span = (place.walk(p) * p.spans + place_of_span) * STATE * p.dim + channel;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const bool valid = 32 * v < channels;
        const int d = channel + 32 * v;
        for (int r = 0; r < p.rank; ++r)
            weights[r * width + own + 32 * v]
                = valid ? __ldg(p.weights + (k * p.rank + r) * p.dim + d) : 0.f;
#pragma unroll
        for (int n = 0; n < STATE; ++n) {
            rates[32 * STATES * v + n] = valid
                ? __ldg(p.rates + ((k * p.groups + group) * STATE + n) * p.dim + d) : 0.f;
            h[v][n] = MODE == RUN && p.entries && valid
                ? p.entries[at_span + n * p.dim + 32 * v] : 0.f;
        }
        bias[32 * v] = valid ? __ldg(p.bias + k * p.dim + d) : 0.f;
        skip[32 * v] = valid && group == 0 ? __ldg(p.skip + k * p.dim + d) : 0.f;
        total[v] = 0.f;
    }

    const Path path(p, SEQ ? 0 : k, MODE == GRADIENTS);
    constexpr int SIZE = same<T, Float> ? 4 : 2;
    const bool of_grad = MODE == GRADIENTS;
    const long long stride_b = of_grad ? p.grad_b : p.x_b, stride_d = of_grad ? p.grad_d : p.x_d;
    const Steps x_steps(path, (int)(of_grad ? p.grad_h : p.x_h), (int)(of_grad ? p.grad_w : p.x_w));
    const int in_sequence = SEQ ? k * p.dim : 0;
    *x_base = (b * stride_b + (in_sequence + channel) * stride_d) * SIZE;
    const Steps y_steps(path, SEQ ? 0 : p.width * p.dim, SEQ ? 1 : p.dim);
    const long long y_first = SEQ
        ? (((long long)group * p.batch + b) * p.routes * p.dim + in_sequence + channel) * length
        : (((long long)group * p.routes + k) * p.batch + b) * length * p.dim + channel;
    *y_base = y_first * (p.y_type ? 2 : 4);

    for (int start = begin; start < end; start += CHUNK) {
        const int chunk_count = min(CHUNK, end - start);
        __syncthreads();
        stage<T, STATE, SEQ, MODE != GRADIENTS, MODE != ENDS>(
            p, staged, path, b, k, group, start, chunk_count);
        if (MODE == RUN && p.states) {
            float *to = p.states + (place.walk(p) * p.chunks + start / CHUNK) * STATE * p.dim
                        + channel;
#pragma unroll
            for (int n = 0; n < STATE; ++n)
#pragma unroll
                for (int v = 0; v < V; ++v)
                    if (32 * v < channels) to[n * p.dim + 32 * v] = h[v][n];
        }
        __syncthreads();

#pragma unroll 1
        for (int s = 0; s < chunk_count; s += STEP) {
            const int count = chunk_count - s;
            float x[V][STEP], l[V][STEP], y[V][STEP];
            load_steps<T, V, SEQ>(x, (const char *)(of_grad ? p.grad : p.x) + *x_base, stride_d, path, x_steps, start + s, count, channels,
                                  p.vector);
            log_decays<T, V, SEQ>(l, p, *x_base, bias, staged + s, weights + own, width, path,
                                  x_steps, start + s, count, channels);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float own_skip = skip[32 * v];
#pragma unroll
                for (int i = 0; i < STEP; ++i) {
                    if (MODE == RUN) y[v][i] = own_skip * x[v][i];
                    else total[v] += l[v][i];
                    if (MODE != GRADIENTS) x[v][i] *= l[v][i];
                }
            }
#pragma unroll
            for (int n = 0; n < STATE; ++n) {
                float B[STEP], C[STEP];  // GRADIENTS has C in place of B
                read8(B, B_staged + n * PITCH + s);
                if (MODE == RUN) read8(C, B_staged + (STATE + n) * PITCH + s);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float rate = rates[32 * STATES * v + n];
                    float t = h[v][n];
#pragma unroll
                    for (int i = 0; i < STEP; ++i) {
                        const float a = ex2(rate * l[v][i]);
                        if (MODE == GRADIENTS) {
                            t = a * fmaf(B[i], x[v][i], t);
                        } else {
                            t = fmaf(a, t, x[v][i] * B[i]);
                            if (MODE == RUN) y[v][i] = fmaf(C[i], t, y[v][i]);
                        }
                    }
                    h[v][n] = t;
                }
            }
            if (MODE == RUN && p.y)
                store_steps<T, V, SEQ>(y, (char *)p.y + *y_base, SEQ ? length : 1, path, y_steps, start + s,
                                       count, channels, p.vector, p.y_type);
        }
    }
    if (MODE != RUN) {
#pragma unroll
        for (int n = 0; n < STATE; ++n)
#pragma unroll
            for (int v = 0; v < V; ++v)
                if (32 * v < channels) {
                    const long long at = at_span + n * p.dim + 32 * v;
                    p.ends[at] = h[v][n];
                    p.decays[at] = ex2(rates[32 * STATES * v + n] * total[v]);
                }
    }
}
