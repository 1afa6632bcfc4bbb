// The gradients by a weight and a bias over the channels, from what each block of a backward left.
#include "common.cuh"

struct Params {
    const float *partials;      // (parts, rows + 1, D): of the weight's rows, then of the bias
    void *weight, *bias;        // (D, rows); (D), or null
    int parts, rows, dim, weight_type, bias_type;  // types: 0 fp32, 1 fp16, 2 bf16
};

// Blocks of 32 x 8 threads: 32 columns, each summed in 8 slices.
__global__ void __launch_bounds__(256) sum_parts(const Params p) {
    __shared__ float sums[8][32];
    const int columns = (p.rows + 1) * p.dim, column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.f;
    if (column < columns)
#pragma unroll 8
        for (int i = threadIdx.y; i < p.parts; i += 8)
            sum += p.partials[(long long)i * columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
    const int row = column / p.dim, c = column - row * p.dim;
    if (row < p.rows) store_parameter(p.weight, (long long)c * p.rows + row, p.weight_type, sum);
    else if (p.bias) store_parameter(p.bias, c, p.bias_type, sum);
}
