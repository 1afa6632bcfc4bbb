// Backward of the depthwise 3 x 3 convolution with SiLU: the gradient by the input of SiLU, which
// is calculated again, and the gradients by weight and bias. If it ADDS, there is no SiLU, and these
// are all; the input may be a sum with a BRANCH.
#include "fused/dwconv.cuh"

struct DwconvBwdParams {
    Pixels x;
    const void *weight, *bias;  // (D, 9); (D), or null
    const void *dy;             // (B, H, W, D)
    void *dz;                   // (B, H, W, D), null if it ADDS
    float *partials;            // (gridDim.x, 10, D): of the 9 weights, and of the bias
    int segments, columns, weight_type, bias_type;
    Branch branch;              // if it ADDS a BRANCH
};

template <class T, int ROWS, bool ADDS = false, bool BRANCH = false>
__global__ void __launch_bounds__(128, !same<T, Float> || !ADDS ? 0 : BRANCH ? 2 : 3)  // else it spills
dwconv_bwd(const DwconvBwdParams p) {
    extern __shared__ __align__(16) float shared[];  // (10, channels)
    load_weights(shared, p.weight, p.weight_type, p.x.dim);
    const int channels = 4 * blockDim.x, channel = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    const bool active = channel < p.x.dim;
    const int strips = active ? count_strips(p.x, ROWS, p.segments) : 0;

    float w[9][4], dw[9][4] = {}, bias[4] = {}, db[4] = {};
#pragma unroll
    for (int k = 0; k < 9; ++k)
        unpack4(w[k], *(const float4 *)(shared + k * channels + 4 * threadIdx.x), Float{});
    if (active && p.bias)
#pragma unroll
        for (int e = 0; e < 4; ++e) bias[e] = load_parameter(p.bias, channel + e, p.bias_type);

    for (int i = blockIdx.x * blockDim.y + threadIdx.y; i < strips; i += gridDim.x * blockDim.y) {
        const Strip<ROWS> strip(p.x, i, p.segments, p.columns);
        typedef typename Raw<T>::type R;
        R window[3][ROWS + 2], dys[ROWS], branch[3][ROWS + 2];
        load_column<T, ROWS>(window[1], p.x, strip.image, strip.row, strip.column - 1, channel);
        load_column<T, ROWS>(window[2], p.x, strip.image, strip.row, strip.column, channel);
        const float scale = BRANCH && p.branch.scale ? p.branch.scale[strip.number] : 1.f;
        auto load_next = [&](int j, int column) {
            if (BRANCH)
                load_branch<T, ROWS>(branch[j], p.branch, p.x, strip.number, strip.row, column,
                                     channel);
        };
        load_next(1, strip.column - 1);
        load_next(2, strip.column);
        for (int column = strip.column; column < strip.end; ++column) {
            const long long first = ((long long)strip.number * p.x.height + strip.row) * p.x.width
                                    + column;
#pragma unroll
            for (int r = 0; r < ROWS + 2; ++r) {
                window[0][r] = window[1][r];
                window[1][r] = window[2][r];
                if (BRANCH) branch[0][r] = branch[1][r], branch[1][r] = branch[2][r];
            }
            load_column<T, ROWS>(window[2], p.x, strip.image, strip.row, column + 1, channel);
            load_next(2, column + 1);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                dys[r] = load4_last<T>(p.dy, (first + r * p.x.width) * p.x.dim + channel,
                                       strip.row + r < p.x.height);
            float x[3][ROWS + 2][4];
#pragma unroll
            for (int j = 0; j < 3; ++j)
#pragma unroll
                for (int r = 0; r < ROWS + 2; ++r) {
                    unpack4(x[j][r], window[j][r], T{});
                    if (BRANCH) add_branch<T>(x[j][r], branch[j][r], scale);
                }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float dz[4];
                unpack4(dz, dys[r], T{});
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (!ADDS) {
                        float z = bias[e];
#pragma unroll
                        for (int k = 0; k < 9; ++k) z += w[k][e] * x[k % 3][r + k / 3][e];
                        const float s = sigmoid(z);
                        dz[e] *= s + z * s * (1.f - s);
                    }
                    db[e] += dz[e];
#pragma unroll
                    for (int k = 0; k < 9; ++k) dw[k][e] += dz[e] * x[k % 3][r + k / 3][e];
                }
                if (!ADDS && strip.row + r < p.x.height)
                    store4<T>(p.dz, (first + r * p.x.width) * p.x.dim + channel, dz);
            }
        }
    }
    for (int turn = 0; turn < blockDim.y; ++turn) {
        __syncthreads();
        if (threadIdx.y != turn) continue;
#pragma unroll
        for (int k = 0; k < 10; ++k)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float *const to = shared + k * channels + 4 * threadIdx.x + e;
                const float own = k < 9 ? dw[k < 9 ? k : 0][e] : db[e];
                *to = turn ? *to + own : own;
            }
    }
    __syncthreads();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, first = blockIdx.y * channels;
    for (int j = thread; j < 10 * channels; j += blockDim.x * blockDim.y) {
        const int k = j / channels, c = first + j - k * channels;
        if (c < p.x.dim)
            p.partials[((long long)blockIdx.x * 10 + k) * p.x.dim + c] = shared[j];
    }
}
