// Backward of a LayerNorm or RMSNorm, and of the sum that came before it, or of the product with a
// gate, or with SiLU of it, that came after it; of patches too.
#include "common/patches.cuh"

struct NormBwdParams {
    const void *grad;             // (M, D) of G, by the norm's output
    const void *input;            // (M, D) of X: the norm's input
    const float2 *moments;        // (M): mean and 1 / deviation; the mean is 0 in an RMSNorm
    const void *weight;           // (D)
    const void *extra_grad;       // (M, D) of X: a gradient by that input to be added, or null; ...
    const float *scale;           // (samples) of the branch, or null
    void *dinput;                 // (M, D) of X
    void *dbranch;                // (M, D) of B, or null; ... with a gate both are null
    float *partials;              // (blocks, 2, D): of weight and bias
    int positions, length, dim, parameter_type;
    const void *bias;             // (D), with a gate
    const void *gate;             // (M, D) of X, gate_stride elements from one row to the next
    void *dgate;                  // (M, D) of X, dgate_stride elements from one row to the next
    int gate_stride, dgate_stride;
    void *result;                 // (M, D) of X, with SILU: the product, calculated again
    Patches patches;              // if ORDER is not PLAIN; then neither sum nor gate
};

// TEAM warps per position, or where there are few channels half of one; LANES of a warp are of one
// position, and a lane has 4 adjacent channels out of each 4 * LANES * TEAM.
template <class G, class X, class B, int PARTS, int TEAM, int LANES, bool RMS = false,
          bool GATE = false, bool SILU = false, int ORDER = PLAIN>
__global__ void __launch_bounds__(256, same<X, Float> && PARTS > 3 ? 1 : 2)
norm_bwd(const NormBwdParams p) {
    constexpr int TEAMS = 256 / LANES / TEAM, STEP = 4 * LANES * TEAM;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int team = warp / TEAM, first = ((warp % TEAM) * LANES + lane) * 4;
    __shared__ float2 exchange[2][8];
    extern __shared__ __align__(16) char shared[];  // (2, D) floats
    float w[PARTS][4], dw[PARTS][4] = {}, db[PARTS][4] = {};
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = i * STEP + first + e;
            w[i][e] = c < p.dim ? load_parameter(p.weight, c, p.parameter_type) : 0.f;
        }
    float *const bias = (float *)shared;  // until the sums take its place
    if (GATE) {
        for (int c = threadIdx.x; c < p.dim; c += blockDim.x)
            bias[c] = load_parameter(p.bias, c, p.parameter_type);
        __syncthreads();
    }
    int turn = 0;
    const float per = 1.f / p.dim;
    for (int start = blockIdx.x * TEAMS; start < p.positions; start += gridDim.x * TEAMS) {
        const int m = start + team;
        const bool valid = m < p.positions;
        const long long at = (long long)m * p.dim;
        const long long of_grad = ORDER == EXPAND
            ? (long long)expanded_row(p.patches, m) * p.dim : at;
        const long long of_input = ORDER == MERGE
            ? (long long)merged_pixel(p.patches, m) * (p.dim / 4) : at;
        float g[PARTS][4], y[PARTS][4], sum = 0.f, product = 0.f;
        const float2 moments = valid ? p.moments[m] : make_float2(0.f, 0.f);
        typename Raw<G>::type grad[PARTS];
        typename Raw<X>::type input[PARTS], extra[PARTS], gate[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * STEP + first;
            const bool in = valid && c < p.dim;
            const int source = ORDER == MERGE ? merged_channel(p.patches, c, p.dim) : c;
            grad[i] = load4_last<G>(p.grad, of_grad + c, in);
            input[i] = load4_last<X>(p.input, of_input + source, in);
            if (GATE)
                gate[i] = load4_last<X>(p.gate, (long long)m * p.gate_stride + c, in);
            else if (ORDER == PLAIN)
                extra[i] = load4_last<X>(p.extra_grad, at + c, in && p.extra_grad);
        }
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            unpack4(g[i], grad[i], G{});
            unpack4(y[i], input[i], X{});
            float z[4], dz[4], result[4];
            if (GATE) unpack4(z, gate[i], X{});
            const int c = i * STEP + first;
            const bool in = valid && c < p.dim;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                y[i][e] = (y[i][e] - moments.x) * moments.y;
                if (GATE) {
                    const float normed = in ? y[i][e] * w[i][e] + bias[c + e] : 0.f;
                    dz[e] = in ? g[i][e] * normed : 0.f;
                    if (SILU) {
                        const float s = sigmoid(z[e]);
                        dz[e] *= s * fmaf(z[e], 1.f - s, 1.f);
                        z[e] *= s;
                        result[e] = normed * z[e];
                    }
                    g[i][e] *= z[e];
                }
                dw[i][e] += g[i][e] * y[i][e];
                db[i][e] += g[i][e];
                g[i][e] *= w[i][e];
                sum += g[i][e];
                product += g[i][e] * y[i][e];
            }
            if (SILU && in) store4<X>(p.result, at + c, result);
            if (GATE && in) store4<X>(p.dgate, (long long)m * p.dgate_stride + c, dz);
        }
#pragma unroll
        for (int d = LANES / 2; d; d >>= 1) {
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
        sum *= RMS ? 0.f : per;
        product *= per;
        const float scale = p.scale && valid ? p.scale[m / p.length] : 1.f;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * STEP + first;
            float o[4];
            if (!GATE && ORDER == PLAIN) unpack4(o, extra[i], X{});
#pragma unroll
            for (int e = 0; e < 4; ++e)
                o[e] = (GATE || ORDER != PLAIN ? 0.f : o[e]) + (g[i][e] - sum - y[i][e] * product) * moments.y;
            if (!valid || c >= p.dim) continue;
            if (GATE || ORDER != PLAIN || !p.dbranch) {
                const int source = ORDER == MERGE ? merged_channel(p.patches, c, p.dim) : c;
                store4<X>(p.dinput, of_input + source, o);
                continue;
            }
            store4_aside<X>(p.dinput, at + c, o);
#pragma unroll
            for (int e = 0; e < 4; ++e) o[e] *= scale;
            store4<B>(p.dbranch, at + c, o);
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
                const int c = i * STEP + first + e;
                if (c >= p.dim) continue;
                sums[c] = turn ? sums[c] + dw[i][e] : dw[i][e];
                sums[p.dim + c] = turn ? sums[p.dim + c] + db[i][e] : db[i][e];
            }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < 2 * p.dim; j += blockDim.x)
        p.partials[(long long)blockIdx.x * 2 * p.dim + j] = sums[j];
}
