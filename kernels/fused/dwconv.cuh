// What the depthwise 3 x 3 convolution and its backward share. A thread has 4 adjacent channels of
// ROWS rows and moves along a segment of their columns. blockDim.x threads are side by side in
// channels.
#pragma once
#include "common/common.cuh"

// A map (B, H, W, D), with gaps between the pixels or without.
struct Pixels {
    const void *data;
    long long stride_b;
    int stride_pixel;
    int batch, height, width, dim;
};

// Where a thread works: the first of its rows and of its columns, and the end of them.
template <int ROWS>
struct Strip {
    long long image;  // offset of it in the map
    int number, row, column, end;

    __device__ __forceinline__ Strip(const Pixels &x, int i, int segments, int columns) {
        const int strips = (x.height + ROWS - 1) / ROWS;
        column = i % segments * columns;
        row = i / segments % strips * ROWS;
        number = i / segments / strips;
        image = number * x.stride_b;
        end = min(column + columns, x.width);
    }
};

__device__ __forceinline__ int count_strips(const Pixels &x, int rows, int segments) {
    return x.batch * ((x.height + rows - 1) / rows) * segments;
}

// One column of a thread's rows and of those above and below; zeros outside the map.
template <class T, int ROWS>
__device__ __forceinline__ void load_column(typename Raw<T>::type (&to)[ROWS + 2], const Pixels &x,
                                            long long image, int row, int column, int channel) {
    const bool inside = column >= 0 && column < x.width;
#pragma unroll
    for (int r = 0; r < ROWS + 2; ++r) {
        const int h = row + r - 1;
        to[r] = load4<T>(x.data, image + (long long)(h * x.width + column) * x.stride_pixel
                         + channel, inside && h >= 0 && h < x.height);
    }
}

// What is added to a map before the convolution: scale * branch.
struct Branch {
    const void *data;    // (B, H, W, D), without gaps
    const float *scale;  // (B), or null for 1
};

// One column as load_column has it, of the branch.
template <class T, int ROWS>
__device__ __forceinline__ void load_branch(typename Raw<T>::type (&to)[ROWS + 2], const Branch &of,
                                            const Pixels &x, int number, int row, int column,
                                            int channel) {
    const Pixels pixels = {of.data, 0, x.dim, 0, x.height, x.width, x.dim};
    load_column<T, ROWS>(to, pixels, (long long)number * x.height * x.width * x.dim, row, column,
                         channel);
}

template <class T>
__device__ __forceinline__ void add_branch(float (&x)[4], typename Raw<T>::type branch,
                                           float scale) {
    float v[4];
    unpack4(v, branch, T{});
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] += scale * v[e];
}

// The weights (D, 9) of the block's channels, to shared memory by (tap, channel).
__device__ __forceinline__ void load_weights(float *to, const void *weight, int type, int dim) {
    const int channels = 4 * blockDim.x, first = blockIdx.y * channels;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int j = thread; j < 9 * channels; j += blockDim.x * blockDim.y) {
        const int c = j / 9;
        if (first + c < dim)
            to[(j - c * 9) * channels + c] = load_parameter(weight, (long long)first * 9 + j, type);
    }
    __syncthreads();
}
