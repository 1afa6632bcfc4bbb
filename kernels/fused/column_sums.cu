// Sums over the rows of a matrix and, on the way, the backward of the exact GELU.
#include "common/common.cuh"

struct ColumnSumsParams {
    const void *grad;    // (M, D): what is summed, or the gradient by GELU's result
    const void *input;   // (M, D): GELU's input, if GELU
    void *result;        // (M, D): GELU of it, calculated again, if GELU
    void *dinput;        // (M, D): the gradient by the input, which is summed, if GELU; may be `grad`
    float *partials;     // (gridDim.x, D)
    int rows, dim;
};

// Blocks of 32 x 8 threads: a thread has 4 adjacent columns, and every so many rows.
template <class T, bool GELU>
__global__ void __launch_bounds__(256) column_sums(const ColumnSumsParams p) {
    __shared__ float shared[8][128];
    const int column = (blockIdx.y * 32 + threadIdx.x) * 4;
    float sums[4] = {};
    if (column < p.dim)
#pragma unroll 4
        for (int row = blockIdx.x * 8 + threadIdx.y; row < p.rows; row += gridDim.x * 8) {
            // With GELU rows are taken from the end, because what the product before has written
            // last is still in L2.
            const long long at = (long long)(GELU ? p.rows - 1 - row : row) * p.dim + column;
            float grad[4];
            unpack4(grad, load4<T>(p.grad, at, true), T{});
            if (GELU) {
                float x[4], y[4];
                unpack4(x, load4_last<T>(p.input, at, true), T{});
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float below = 0.5f + 0.5f * erff(x[e] * 0.7071067811865476f);
                    const float density = 0.3989422804014327f
                                          * ex2(x[e] * x[e] * -0.7213475204444817f);
                    y[e] = x[e] * below;
                    grad[e] *= below + x[e] * density;
                }
                store4<T>(p.result, at, y);
                store4<T>(p.dinput, at, grad);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[e] += grad[e];
        }
#pragma unroll
    for (int e = 0; e < 4; ++e) shared[threadIdx.y][threadIdx.x * 4 + e] = sums[e];
    __syncthreads();
    const int j = threadIdx.y * 32 + threadIdx.x, c = blockIdx.y * 128 + j;
    if (j >= 128 || c >= p.dim) return;
    float sum = shared[0][j];
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += shared[i][j];
    p.partials[(long long)blockIdx.x * p.dim + c] = sum;
}
