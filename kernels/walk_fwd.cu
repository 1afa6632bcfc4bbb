// Forward of a walk, any state size and dtype; or what a span does to the state (ENDS) and to the
// gradient by the state (GRADIENTS, against the walk). README.md has the layout.
#include "walk.cuh"

constexpr int RUN = 0, ENDS = 1, GRADIENTS = 2;

template <class T, int STATE, int V, bool SEQ, int MODE>
__global__ void __launch_bounds__(96, STATE == 16 ? 4 : 6) walk_fwd(const Params p) {
    const Place place(p);
    const int k = place.k, b = place.b, group = place.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, width = blockDim.x * V;
    const int own = warp * 32 * V + lane;  // and 32 further for each v
    const int channel = place.column * width + own, channels = p.dim - channel;
    const int length = p.height * p.width;

    extern __shared__ __align__(16) float shared[];
    float *const staged = shared;
    float *const weights = staged + (p.rank + (MODE == RUN ? 2 : 1) * STATE) * PITCH;
    float *const rates = weights + p.rank * width;
    const float *const B_staged = staged + p.rank * PITCH;

    float h[V][STATE], bias[V], skip[V], total[V];
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
            rates[n * width + own + 32 * v] = valid
                ? __ldg(p.rates + ((k * p.groups + group) * STATE + n) * p.dim + d) : 0.f;
            h[v][n] = MODE == RUN && p.entries && valid
                ? p.entries[at_span + n * p.dim + 32 * v] : 0.f;
        }
        bias[v] = valid ? __ldg(p.bias + k * p.dim + d) : 0.f;
        skip[v] = valid && group == 0 ? __ldg(p.skip + k * p.dim + d) : 0.f;
        total[v] = 0.f;
    }

    const Path path(p, SEQ ? 0 : k, MODE == GRADIENTS);
    constexpr int SIZE = same<T, Float> ? 4 : 2;
    const bool of_grad = MODE == GRADIENTS;
    const long long stride_b = of_grad ? p.grad_b : p.x_b, stride_d = of_grad ? p.grad_d : p.x_d;
    const Steps x_steps(path, (int)(of_grad ? p.grad_h : p.x_h), (int)(of_grad ? p.grad_w : p.x_w));
    const int in_sequence = SEQ ? k * p.dim : 0;
    const void *const x_base = (const char *)(of_grad ? p.grad : p.x)
        + (b * stride_b + (in_sequence + channel) * stride_d) * SIZE;
    const void *const delta_base = (const char *)p.raw
        + (b * p.x_b + (in_sequence + channel) * p.x_d) * SIZE;
    const Steps y_steps(path, SEQ ? 0 : p.width * p.dim, SEQ ? 1 : p.dim);
    const long long y_first = SEQ
        ? (((long long)group * p.batch + b) * p.routes * p.dim + in_sequence + channel) * length
        : (((long long)group * p.routes + k) * p.batch + b) * length * p.dim + channel;
    void *const y_base = (char *)p.y + y_first * (p.y_type ? 2 : 4);

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
            load_steps<T, V, SEQ>(x, x_base, stride_d, path, x_steps, start + s, count, channels,
                                  p.vector);
            if constexpr (SEQ) {
                load_steps<T, V, SEQ>(l, delta_base, p.x_d, path, x_steps, start + s, count,
                                      channels, p.vector);
#pragma unroll
                for (int v = 0; v < V; ++v)
#pragma unroll
                    for (int i = 0; i < STEP; ++i) {
                        l[v][i] = fmaf(l[v][i], LOG2E, bias[v]);
                        if (p.softplus) l[v][i] = softplus2<T>(l[v][i]);
                    }
            } else {
#pragma unroll
                for (int v = 0; v < V; ++v)
#pragma unroll
                    for (int i = 0; i < STEP; ++i) l[v][i] = bias[v];
#pragma unroll 2
                for (int r = 0; r < p.rank; ++r) {
                    float dt[STEP];
                    read8(dt, staged + r * PITCH + s);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        const float w = weights[r * width + own + 32 * v];
#pragma unroll
                        for (int i = 0; i < STEP; ++i) l[v][i] = fmaf(w, dt[i], l[v][i]);
                    }
                }
#pragma unroll
                for (int v = 0; v < V; ++v)
#pragma unroll
                    for (int i = 0; i < STEP; ++i) l[v][i] = softplus2<T>(l[v][i]);
            }
            if (count < STEP)
#pragma unroll
                for (int i = 0; i < STEP; ++i)
                    if (i >= count)
#pragma unroll
                        for (int v = 0; v < V; ++v) l[v][i] = 0.f;
#pragma unroll
            for (int v = 0; v < V; ++v)
#pragma unroll
                for (int i = 0; i < STEP; ++i) {
                    if (MODE == RUN) y[v][i] = skip[v] * x[v][i];
                    else total[v] += l[v][i];
                    if (MODE != GRADIENTS) x[v][i] *= l[v][i];
                }
#pragma unroll
            for (int n = 0; n < STATE; ++n) {
                if (n % 2 == 0) __syncwarp();  // keeps the compiler from loading all n at once
                float B[STEP], C[STEP];  // GRADIENTS has C in place of B
                read8(B, B_staged + n * PITCH + s);
                if (MODE == RUN) read8(C, B_staged + (STATE + n) * PITCH + s);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float rate = rates[n * width + own + 32 * v];
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
                store_steps<T, V, SEQ>(y, y_base, SEQ ? length : 1, path, y_steps, start + s,
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
                    p.decays[at] = ex2(rates[n * width + own + 32 * v] * total[v]);
                }
    }
}
