// The first convolution of a stem (3 x 3, stride 2, padded with zeros, of 3 channels), the LayerNorm
// over its channels and GELU, from the images as they come: nothing lies in memory between.
#include "common/common.cuh"

struct StemParams {
    const void *x;                            // (B, 3, H, W) of X, by strides in elements
    long long stride_b;
    int stride_c, stride_h, stride_w;
    const void *weight, *bias;                // (C, 3, 3, 3), (C)
    const void *norm_weight, *norm_bias;      // (C)
    void *y;                                  // (B, H', W', C) of T
    float eps;
    int height, width, out_height, out_width;
    int weight_type, bias_type, norm_type;
};

// A warp has 2 rows of 16 pixels, a block 8 rows: a thread 2 x 2 of them, 8 columns apart, and a
// quarter of their channels.
constexpr int COLUMNS = 16, ROWS = 8, TAPS = 27;
constexpr int PATCH_COLUMNS = 2 * COLUMNS + 1, PATCH_ROWS = 2 * ROWS + 1;
constexpr int PATCH = PATCH_ROWS * PATCH_COLUMNS;

template <class X>
__device__ __forceinline__ float load_image(const void *x, long long i) {
    if constexpr (same<X, Float>) return ((const float *)x)[i];
    else return X::unpack(((const unsigned short *)x)[i]).x;
}

template <class X, class T, int CHANNELS>  // CHANNELS: of a thread
__global__ void __launch_bounds__(128) stem(const StemParams p) {
    constexpr int DIM = 4 * CHANNELS;
    __shared__ float4 parameters[(TAPS + 3) * CHANNELS];  // last bias, the norm's weight and bias
    __shared__ float patch[3 * PATCH];
    float *const weights = (float *)parameters;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3, pixel = lane >> 2;
    const int row = blockIdx.y * ROWS, column = blockIdx.x * COLUMNS;  // the block's first ones
    for (int j = threadIdx.x; j < TAPS * DIM; j += 128) {
        const int c = j / TAPS;
        weights[(j - c * TAPS) * DIM + c] = load_parameter(p.weight, j, p.weight_type);
    }
    for (int c = threadIdx.x; c < DIM; c += 128) {
        float *const to = weights + TAPS * DIM + c;
        to[0] = load_parameter(p.bias, c, p.bias_type);
        to[DIM] = load_parameter(p.norm_weight, c, p.norm_type);
        to[2 * DIM] = load_parameter(p.norm_bias, c, p.norm_type);
    }
    const long long image = blockIdx.z * p.stride_b;
    for (int j = threadIdx.x; j < 3 * PATCH; j += 128) {
        const int c = j / PATCH, rest = j - c * PATCH;
        const int h = 2 * row - 1 + rest / PATCH_COLUMNS, w = 2 * column - 1 + rest % PATCH_COLUMNS;
        const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
        patch[j] = inside ? load_image<X>(p.x, image + (long long)c * p.stride_c
                                          + (long long)h * p.stride_h + w * p.stride_w) : 0.f;
    }
    __syncthreads();

    float sums[4][CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; c += 4) {
        float bias[4];
        unpack4(bias, *(const float4 *)(weights + TAPS * DIM + t * CHANNELS + c), Float{});
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][c + e] = bias[e];
    }
    const float *const from = patch + 4 * warp * PATCH_COLUMNS + 2 * pixel;
#pragma unroll 1
    for (int in = 0; in < 3; ++in)
#pragma unroll
        for (int k = 0; k < 9; ++k) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)  // pixel i: of row i / 2, 8 (i % 2) columns on
                x[i] = from[in * PATCH + (i / 2 * 2 + k / 3) * PATCH_COLUMNS + i % 2 * 16 + k % 3];
#pragma unroll
            for (int c = 0; c < CHANNELS; c += 4) {
                float w[4];
                unpack4(w, *(const float4 *)(weights + (in * 9 + k) * DIM + t * CHANNELS + c),
                        Float{});
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[i][c + e] += w[e] * x[i];
            }
        }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float sum = 0.f, squares = 0.f;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) sum += sums[i][c];
#pragma unroll
        for (int d = 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        const float mean = sum / DIM;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            sums[i][c] -= mean;
            squares += sums[i][c] * sums[i][c];
        }
#pragma unroll
        for (int d = 2; d; d >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, d);
        const float rate = rsqrtf(squares / DIM + p.eps);
        const int h = row + 2 * warp + i / 2, w = column + pixel + i % 2 * 8;
        if (h >= p.out_height || w >= p.out_width) continue;
        const long long to = (((long long)blockIdx.z * p.out_height + h) * p.out_width + w) * DIM
                             + t * CHANNELS;
#pragma unroll
        for (int c = 0; c < CHANNELS; c += 4) {
            const float *const affine = weights + (TAPS + 1) * DIM + t * CHANNELS + c;
            float scale[4], shift[4], v[4];
            unpack4(scale, *(const float4 *)affine, Float{});
            unpack4(shift, *(const float4 *)(affine + DIM), Float{});
#pragma unroll
            for (int e = 0; e < 4; ++e)
                v[e] = gelu(sums[i][c + e] * rate * scale[e] + shift[e]);
            store4<T>(p.y, to + c, v);
        }
    }
}
