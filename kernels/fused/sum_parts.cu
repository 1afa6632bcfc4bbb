// The gradients by weights and biases of channels, summed over the partial sums that the blocks of
// a backward have written.
#include "common/common.cuh"

constexpr int MOST = 6, SLICES = 32, AHEAD = 12;

struct SumPartsParams {  // of each job
    const float *partials[MOST];  // (parts, rows + 1, D): of the weight's rows, then of the bias
    void *weights[MOST], *biases[MOST];  // (D, rows); (D), or null
    int parts[MOST], rows[MOST], dims[MOST];
    int weight_types[MOST], bias_types[MOST];  // 0 fp32, 1 fp16, 2 bf16
};

// A block has 32 columns of a job, and a warp a slice, every 32nd part of them. The time is that
// of reads that wait for one another, so a thread has 12 under way.
__global__ void __launch_bounds__(32 * SLICES) sum_parts(const SumPartsParams p) {
    __shared__ float sums[SLICES][32];
    int j = 0, block = blockIdx.x;
    for (int blocks; block >= (blocks = ((p.rows[j] + 1) * p.dims[j] + 31) / 32); ++j)
        block -= blocks;
    const int parts = p.parts[j], rows = p.rows[j], dim = p.dims[j];
    const int columns = (rows + 1) * dim, column = block * 32 + threadIdx.x;
    float sum = 0.f;
    if (column < columns) {
        const float *from = p.partials[j] + (int)threadIdx.y * columns + column;
#pragma unroll 1
        for (int part = threadIdx.y; part < parts; part += SLICES * AHEAD) {
            float v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i, from += SLICES * columns)
                v[i] = part + SLICES * i < parts ? *from : 0.f;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) sum += v[i];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
#pragma unroll
    for (int i = 1; i < SLICES; ++i) sum += sums[i][threadIdx.x];
    const int row = column / dim, c = column - row * dim;
    void *const weight = p.weights[j], *const bias = p.biases[j];
    if (row < rows) store_parameter(weight, (long long)c * rows + row, p.weight_types[j], sum);
    else if (bias) store_parameter(bias, c, p.bias_types[j], sum);
}
