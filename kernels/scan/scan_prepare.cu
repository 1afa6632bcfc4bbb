// Writes the parameters of a scan as the kernels read them: in fp32, with adjacent channels, for
// base-2 logarithms.
#include "common/common.cuh"

struct ScanPrepareParams {
    const void *dt_weight;  // (K, D, R)
    const void *dt_bias;    // (K, D), or null
    const void *A;          // (K * D, N), or log(-A)
    const void *D;          // (K * D), or null
    float *weights;         // (K, R, D), times log2(e)
    float *bias;            // (K, D), times log2(e)
    float *rates;           // (K, P, D), zero from N on
    float *skip;            // (K, D); if `merged`, the sum over K for the first, else zeros
    int dim, rank, state, padded, routes, merged;  // padded: P
    int dt_type, bias_type, A_type, D_type;
    int logs;  // whether it is log(-A)
};

__global__ void scan_prepare(const ScanPrepareParams p) {
    const int plain = p.routes * p.dim, weights = plain * p.rank, rates = plain * p.padded;
    const int total = weights + rates + 2 * plain;
    for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < total; j += gridDim.x * blockDim.x) {
        int i = j;
        if (i < weights) {
            const int d = i % p.dim, r = i / p.dim % p.rank, k = i / p.dim / p.rank;
            p.weights[i] = LOG2E * load_parameter(
                p.dt_weight, ((long long)k * p.dim + d) * p.rank + r, p.dt_type);
            continue;
        }
        i -= weights;
        if (i < rates) {
            const int d = i % p.dim, n = i / p.dim % p.padded, k = i / p.dim / p.padded;
            const float A = n < p.state ? load_parameter(
                p.A, ((long long)k * p.dim + d) * p.state + n, p.A_type) : 0.f;
            p.rates[i] = p.logs && n < p.state ? -ex2(LOG2E * A) : A;
            continue;
        }
        i -= rates;
        if (i < plain) {
            p.bias[i] = p.dt_bias ? LOG2E * load_parameter(p.dt_bias, i, p.bias_type) : 0.f;
            continue;
        }
        i -= plain;
        float sum = 0.f;
        if (p.D && !p.merged) sum = load_parameter(p.D, i, p.D_type);
        if (p.D && p.merged && i < p.dim)
            for (int k = 0; k < p.routes; ++k)
                sum += load_parameter(p.D, k * p.dim + i, p.D_type);
        p.skip[i] = sum;
    }
}
