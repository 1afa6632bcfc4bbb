// The gradients by the parameters of ss2d_scan and of the norm that follows, in the dtypes of the
// parameters. They come from the partial sums that the blocks of the backwards have written, and
// from the matrix product for x_proj_weight.
#include "common/common.cuh"

struct Ss2dFinishParams {
    const float *partials;  // (parts, K D R + 2 K D + D): of dt_projs_weight, A, bias, skip
    const void *product;    // (K, P, D): rows as ss2d_prepare has them
    const float *norm;      // (norm_parts, 2, D): of the norm's weight and bias, or null
    void *x_weight, *dt_weight, *bias, *A, *D, *norm_weight, *norm_bias;
    int parts, norm_parts, dim, rank, routes, row;
    int x_type, dt_type, bias_type, A_type, D_type, norm_weight_type, norm_bias_type;
    const void *A_logs;     // log(-A), by which the gradient is then, or null
};  // types: 0 fp32, 1 fp16, 2 bf16

// Blocks of 32 x 8 threads: 32 columns of the partials, each summed in 8 slices; after these blocks
// come those for the norm, alike, and those for x_proj_weight, an element to a thread.
template <class T>
__global__ void __launch_bounds__(256) ss2d_finish(const Ss2dFinishParams p) {
    __shared__ float sums[8][32];
    const int KD = p.routes * p.dim, of_scan = KD * (p.rank + 2) + p.dim;
    const int of_norm = p.norm ? 2 * p.dim : 0;
    const int scan_blocks = (of_scan + 31) >> 5, norm_blocks = (of_norm + 31) >> 5;
    int block = (int)blockIdx.x - scan_blocks - norm_blocks;
    if (block >= 0) {
        const int i = block * 256 + threadIdx.y * 32 + threadIdx.x;
        const int rows = p.rank + 2, r = i / p.dim % rows;
        if (i >= p.routes * rows * p.dim) return;
        const int from = r < p.rank ? r : r + (p.rank & 1);
        const long long at = ((long long)(i / p.dim / rows) * p.row + from) * p.dim + i % p.dim;
        store_parameter(p.x_weight, i, p.x_type, load_parameter(p.product, at, T::CODE));
        return;
    }
    block += norm_blocks;
    const bool norm = block >= 0;
    const float *const partials = norm ? p.norm : p.partials;
    const int columns = norm ? of_norm : of_scan, parts = norm ? p.norm_parts : p.parts;
    const int column = (norm ? block : blockIdx.x) * 32 + threadIdx.x;
    float sum = 0.f;
    if (column < columns)
#pragma unroll 8
        for (int i = threadIdx.y; i < parts; i += 8) sum += partials[(long long)i * columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
    if (norm) {
        if (column < p.dim) store_parameter(p.norm_weight, column, p.norm_weight_type, sum);
        else store_parameter(p.norm_bias, column - p.dim, p.norm_bias_type, sum);
        return;
    }
    const int KDR = KD * p.rank;
    if (column < KDR) store_parameter(p.dt_weight, column, p.dt_type, sum);
    else if (column < KDR + KD) {
        const int i = column - KDR;
        if (p.A_logs) sum *= -ex2(LOG2E * load_parameter(p.A_logs, i, p.A_type));
        store_parameter(p.A, i, p.A_type, sum);
    }
    else if (column < KDR + 2 * KD) store_parameter(p.bias, column - KDR - KD, p.bias_type, sum);
    else
        for (int k = 0; k < p.routes; ++k)
            store_parameter(p.D, k * p.dim + column - KDR - 2 * KD, p.D_type, sum);
}
