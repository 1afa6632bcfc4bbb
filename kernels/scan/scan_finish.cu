// The gradients by the parameters of a scan, in the dtypes of the parameters, from the sums that
// scan_bwd has written.
#include "common/common.cuh"

struct ScanFinishParams {
    const float *sums;  // (parts, K, G, STATE + R + 2, D): by A, weights, bias and skip
    void *dt_weight;    // (K, D, R), or null
    void *dt_bias;      // (K, D), or null
    void *A;            // (K * D, N)
    void *D;            // (K * D), or null
    const void *A_logs;  // log(-A), by which the gradient is then, or null
    int parts, dim, rank, state, states, routes, groups;  // state: N, states: STATE
    int dt_type, bias_type, A_type, D_type;  // 0 fp32, 1 fp16, 2 bf16
};

// Blocks of 32 x 8 threads: 32 columns (K, N + R + 2, D), each summed in 8 slices.
__global__ void __launch_bounds__(256) scan_finish(const ScanFinishParams p) {
    __shared__ float sums[8][32];
    const int rows = p.state + p.rank + 2, column = blockIdx.x * 32 + threadIdx.x;
    const int d = column % p.dim, row = column / p.dim % rows, k = column / p.dim / rows;
    const bool valid = k < p.routes;
    // A state is of one group, the skip of the first, all else is the sum over the groups.
    const bool of_A = row < p.state, of_skip = row == rows - 1;
    const int group = of_A ? row / p.states : 0, groups = of_A || of_skip ? 1 : p.groups;
    const long long of_group = (long long)(p.states + p.rank + 2) * p.dim;
    const long long of_part = p.routes * p.groups * of_group;
    float sum = 0.f;
    for (int g = group; valid && g < group + groups; ++g) {
        const float *const from = p.sums + (k * p.groups + g) * of_group
            + (of_A ? row - group * p.states : row - p.state + p.states) * p.dim + d;
#pragma unroll 8
        for (int i = threadIdx.y; i < p.parts; i += 8) sum += from[i * of_part];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || !valid) return;
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
    const long long channel = k * p.dim + d;
    if (of_A) {
        const long long at = channel * p.state + row;
        if (p.A_logs) sum *= -ex2(LOG2E * load_parameter(p.A_logs, at, p.A_type));
        store_parameter(p.A, at, p.A_type, sum);
    } else if (of_skip) {
        if (p.D) store_parameter(p.D, channel, p.D_type, sum);
    } else if (row == rows - 2) {
        if (p.dt_bias) store_parameter(p.dt_bias, channel, p.bias_type, sum);
    } else if (p.dt_weight) {
        store_parameter(p.dt_weight, channel * p.rank + row - p.state, p.dt_type, sum);
    }
}
