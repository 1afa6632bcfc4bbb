// Backward of the LayerNorm after ss2d_scan.
#include "common.cuh"

struct Params {
    const void *grad, *merged;  // (M, D): by the norm's output; its input
    const float2 *moments;      // (M): mean and 1 / deviation
    const void *weight;         // (D)
    void *dmerged;              // (M, D)
    float *partials;            // (blocks, 2, D): of weight and bias
    int positions, dim, parameter_type;
};

// TEAM warps per position; a lane has 4 adjacent channels out of each 128 * TEAM.
template <class T, int PARTS, int TEAM>
__global__ void __launch_bounds__(256) ss2d_norm_bwd(const Params p) {
    wait_for_memory();
    constexpr int TEAMS = 8 / TEAM;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int team = warp / TEAM, first = ((warp % TEAM) * 32 + lane) * 4;
    __shared__ float2 exchange[2][8];
    extern __shared__ __align__(16) char shared[];  // (2, D) floats
    float w[PARTS][4], dw[PARTS][4] = {}, db[PARTS][4] = {};
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = i * 128 * TEAM + first + e;
            w[i][e] = c < p.dim ? load_parameter(p.weight, c, p.parameter_type) : 0.f;
        }
    int turn = 0;
    const float per = 1.f / p.dim;
    for (int start = blockIdx.x * TEAMS; start < p.positions; start += gridDim.x * TEAMS) {
        const int m = start + team;
        const bool valid = m < p.positions;
        const long long at = (long long)m * p.dim;
        float g[PARTS][4], y[PARTS][4], sum = 0.f, product = 0.f;
        const float2 moments = valid ? p.moments[m] : make_float2(0.f, 0.f);
        uint2 grad[PARTS], merged[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 * TEAM + first;
            const bool in = valid && c < p.dim;
            grad[i] = in ? *(const uint2 *)((const unsigned short *)p.grad + at + c)
                         : make_uint2(0u, 0u);
            merged[i] = in ? *(const uint2 *)((const unsigned short *)p.merged + at + c)
                           : make_uint2(0u, 0u);
        }
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const float2 g0 = T::unpack(grad[i].x), g1 = T::unpack(grad[i].y);
            const float2 y0 = T::unpack(merged[i].x), y1 = T::unpack(merged[i].y);
            g[i][0] = g0.x, g[i][1] = g0.y, g[i][2] = g1.x, g[i][3] = g1.y;
            y[i][0] = y0.x, y[i][1] = y0.y, y[i][2] = y1.x, y[i][3] = y1.y;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                y[i][e] = (y[i][e] - moments.x) * moments.y;
                dw[i][e] += g[i][e] * y[i][e];
                db[i][e] += g[i][e];
                g[i][e] *= w[i][e];
                sum += g[i][e];
                product += g[i][e] * y[i][e];
            }
        }
#pragma unroll
        for (int d = 16; d; d >>= 1) {
            sum += __shfl_xor_sync(0xffffffffu, sum, d);
            product += __shfl_xor_sync(0xffffffffu, product, d);
        }
        if (TEAM > 1) {
            if (lane == 0) exchange[turn][warp] = make_float2(sum, product);
            __syncthreads();
            sum = product = 0.f;
#pragma unroll
            for (int i = 0; i < TEAM; ++i) {
                const float2 v = exchange[turn][team * TEAM + i];
                sum += v.x;
                product += v.y;
            }
            turn ^= 1;
        }
        sum *= per;
        product *= per;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 * TEAM + first;
            float o[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) o[e] = (g[i][e] - sum - y[i][e] * product) * moments.y;
            if (valid && c < p.dim)
                *(uint2 *)((unsigned short *)p.dmerged + at + c)
                    = make_uint2(T::pack(o[0], o[1]), T::pack(o[2], o[3]));
        }
    }
    float *const sums = (float *)shared;
    for (int turn = 0; turn < TEAMS; ++turn) {
        __syncthreads();
        if (team != turn) continue;
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int c = i * 128 * TEAM + first + e;
                if (c >= p.dim) continue;
                sums[c] = turn ? sums[c] + dw[i][e] : dw[i][e];
                sums[p.dim + c] = turn ? sums[p.dim + c] + db[i][e] : db[i][e];
            }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < 2 * p.dim; j += blockDim.x)
        p.partials[(long long)blockIdx.x * 2 * p.dim + j] = sums[j];
}
