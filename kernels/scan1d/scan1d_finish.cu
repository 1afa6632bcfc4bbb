// The gradients by A, D and bias, summed over samples and spans, and those by B and C, summed over
// the blocks side by side in channels: each in the dtype of its tensor, in one launch.
#include "common/common.cuh"

struct Scan1dFinishParams {
    const float *A_parts, *D_parts, *BC_parts;  // as in Scan1dParams
    void *A, *D, *bias, *B, *C;                 // D and bias may be null
    long long B_b, B_k, C_b, C_k;  // strides of the gradients by B and C, in elements
    int B_n, B_l, C_n, C_l;
    int parts, channels, state, columns, batch, routes, length;  // parts: B spans
    int slots, lane_states;  // 2 NS LANES and NS of scan1d_bwd
    int parameter_blocks, A_type, D_type, bias_type, B_type, C_type;
};

constexpr int POSITIONS = 32, AHEAD = 8;

// Blocks of 256 threads. The first `parameter_blocks` have 32 columns each of A (K * D, N), D and
// bias, in 8 slices. Each other has 32 positions of a sequence (B, K).
__global__ void __launch_bounds__(256) scan1d_finish(const Scan1dFinishParams p) {
    extern __shared__ __align__(16) float shared[];
    if ((int)blockIdx.x < p.parameter_blocks) {
        float *const sums = shared;  // (8, 32)
        const int of_A = p.channels * p.state, lane = threadIdx.x % 32, slice = threadIdx.x / 32;
        const int column = blockIdx.x * 32 + lane;
        const bool is_A = column < of_A, valid = column < of_A + 2 * p.channels;
        const float *const from = is_A ? p.A_parts + column : p.D_parts + (column - of_A);
        const long long step = is_A ? of_A : 2 * p.channels;
        float sum = 0.f;
        if (valid)
#pragma unroll 8
            for (int i = slice; i < p.parts; i += 8) sum += from[i * step];
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (slice || !valid) return;
#pragma unroll
        for (int i = 1; i < 8; ++i) sum += sums[i * 32 + lane];
        if (is_A) store_parameter(p.A, column, p.A_type, sum);
        else if (column < of_A + p.channels) {
            if (p.D) store_parameter(p.D, column - of_A, p.D_type, sum);
        } else if (p.bias) {
            store_parameter(p.bias, column - of_A - p.channels, p.bias_type, sum);
        }
        return;
    }
    const int blocks = (p.length + POSITIONS - 1) / POSITIONS;
    const int block = blockIdx.x - p.parameter_blocks, sequence = block / blocks;
    const int b = sequence / p.routes, k = sequence % p.routes;
    const int first = block % blocks * POSITIONS, count = min(POSITIONS, p.length - first);
    const int pitch = p.slots + 1;
    const long long step = (long long)p.batch * p.routes * p.length * p.slots;
    for (int i = threadIdx.x; i < count * p.slots; i += blockDim.x) {
        const float *from = p.BC_parts + ((long long)sequence * p.length + first) * p.slots + i;
        float sum = 0.f;
        for (int column = 0; column < p.columns; column += AHEAD) {
            float v[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a, from += step) v[a] = column + a < p.columns ? *from : 0.f;
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) sum += v[a];
        }
        shared[i / p.slots * pitch + i % p.slots] = sum;
    }
    __syncthreads();
    const bool rows = p.B_n == 1;  // the states of a position are adjacent
    for (int i = threadIdx.x; i < 2 * p.state * POSITIONS; i += blockDim.x) {
        const int w = rows ? i % (2 * p.state) : i / POSITIONS;
        const int m = rows ? i / (2 * p.state) : i % POSITIONS;
        if (m >= count) continue;
        const bool is_C = w >= p.state;
        const int n = is_C ? w - p.state : w, of = p.lane_states;
        const float v = shared[m * pitch + n / of * 2 * of + is_C * of + n % of];
        if (is_C)
            store_parameter(p.C, b * p.C_b + k * p.C_k + n * p.C_n + (first + m) * p.C_l, p.C_type,
                            v);
        else
            store_parameter(p.B, b * p.B_b + k * p.B_k + n * p.B_n + (first + m) * p.B_l, p.B_type,
                            v);
    }
}
