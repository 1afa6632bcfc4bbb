// A branch times a factor for each channel (layer scale), and its backward with the gradients by the
// factors and by the bias of the product before.
#include "common/common.cuh"

struct LayerScaleParams {
    const void *branch;  // (M, D) of T
    const void *gamma;   // (D)
    float *scaled;       // (M, D): the product, in fp32, as factors may be small; forward
    const void *grad;    // (M, D) of T: by the product; backward, as all that follow
    void *dbranch;       // (M, D) of T; may be `grad`
    float *partials;     // (gridDim.x, 2, D): of gamma, and of the sums of dbranch
    int rows, dim, gamma_type;
};

// Blocks of 32 x 8 threads: a thread has 4 adjacent columns, and every so many rows.
template <class T, bool FORWARD>
__global__ void __launch_bounds__(256) layer_scale(const LayerScaleParams p) {
    __shared__ float shared[8][2][128];
    const int column = (blockIdx.y * 32 + threadIdx.x) * 4;
    float gamma[4], dgamma[4] = {}, sums[4] = {};
    if (column < p.dim) {
#pragma unroll
        for (int e = 0; e < 4; ++e) gamma[e] = load_parameter(p.gamma, column + e, p.gamma_type);
#pragma unroll 4
        for (int row = blockIdx.x * 8 + threadIdx.y; row < p.rows; row += gridDim.x * 8) {
            const long long at = (long long)row * p.dim + column;
            float branch[4], grad[4];
            unpack4(branch, load4_last<T>(p.branch, at, true), T{});
            if (FORWARD) {
#pragma unroll
                for (int e = 0; e < 4; ++e) branch[e] *= gamma[e];
                store4<Float>(p.scaled, at, branch);
                continue;
            }
            unpack4(grad, load4<T>(p.grad, at, true), T{});
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                dgamma[e] += grad[e] * branch[e];
                grad[e] *= gamma[e];
                sums[e] += grad[e];
            }
            store4<T>(p.dbranch, at, grad);
        }
    }
    if (FORWARD) return;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        shared[threadIdx.y][0][threadIdx.x * 4 + e] = dgamma[e];
        shared[threadIdx.y][1][threadIdx.x * 4 + e] = sums[e];
    }
    __syncthreads();
    const int j = threadIdx.y * 32 + threadIdx.x, which = j / 128;
    const int c = blockIdx.y * 128 + j % 128;
    if (c >= p.dim) return;
    float sum = shared[0][which][j % 128];
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += shared[i][which][j % 128];
    p.partials[((long long)blockIdx.x * 2 + which) * p.dim + c] = sum;
}
