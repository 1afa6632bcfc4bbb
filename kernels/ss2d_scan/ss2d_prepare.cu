// Writes the parameters of ss2d_scan as its forward takes them, in one launch: x_proj_weight with
// the rows of a route padded and reordered, dt_projs_weight as fragments for the tensor cores, and
// the rest in fp32. The last blocks round other parameters, if there are any, to half precision.
#include "common/cast.cuh"

struct Ss2dPrepareParams {
    const void *x_weight;   // (K, R + 2, D)
    const void *dt_weight;  // (K, D, R)
    const void *dt_bias;    // (K, D)
    const void *A;          // (K * D, 1), or log(-A)
    const void *D;          // (K * D)
    void *weight;           // (K, P, D): dt (R), a zero row if R is odd, B, C, zeros
    u32 *fragments;         // (K, G, TILES, 2, 32), times log2(e)
    float *bias;            // (K, 16 G), times log2(e)
    float *rates;           // (K, 16 G)
    float *skip;            // (16 G): the sum over the routes
    int *zeros;             // (count): what becomes 0
    int count;
    int dim, rank, routes, row, tiles;
    int x_type, dt_type, bias_type, A_type, D_type;  // 0 fp32, 1 fp16, 2 bf16
    int logs;  // whether it is log(-A)
    int cast_blocks;
    Cast cast;
};

template <class T>
__global__ void __launch_bounds__(256) ss2d_prepare(const Ss2dPrepareParams p) {
    const int blocks = gridDim.x - p.cast_blocks;
    if ((int)blockIdx.x >= blocks) {
        round_parameters<T>(p.cast, blockIdx.x - blocks, p.cast_blocks);
        return;
    }
    const int groups = (p.dim + 15) >> 4, padded = groups * 16, pairs = (p.rank + 1) & ~1;
    const int weights = p.routes * p.row * p.dim, fragments = p.routes * groups * p.tiles * 64;
    const int biases = p.routes * padded, rates = biases;
    const int total = weights + fragments + biases + rates + padded + p.count;
    for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < total; j += blocks * blockDim.x) {
        int i = j;
        if (i < weights) {
            const int d = i % p.dim, row = i / p.dim % p.row, k = i / p.dim / p.row;
            int from = row;
            if (row >= pairs) {
                from = row < pairs + 2 ? p.rank + row - pairs : -1;
            } else if (row >= p.rank) {
                from = -1;
            }
            const float v = from < 0 ? 0.f : load_parameter(
                p.x_weight, ((long long)k * (p.rank + 2) + from) * p.dim + d, p.x_type);
            ((unsigned short *)p.weight)[i] = (unsigned short)T::pack(v, 0.f);
            continue;
        }
        i -= weights;
        if (i < fragments) {
            // Column g of tile j is channel 4 (g / 2) + 2 j + g % 2 of the group.
            const int lane = i & 31, column = i >> 5 & 1, tile = (i >> 6) % p.tiles;
            const int group = (i >> 6) / p.tiles % groups, k = (i >> 6) / p.tiles / groups;
            const int g = lane >> 2, r = 8 * tile + 2 * (lane & 3);
            const int channel = group * 16 + 4 * (g >> 1) + 2 * column + (g & 1);
            float v[2];
            for (int e = 0; e < 2; ++e)
                v[e] = channel < p.dim && r + e < p.rank ? LOG2E * load_parameter(
                    p.dt_weight, ((long long)k * p.dim + channel) * p.rank + r + e, p.dt_type)
                    : 0.f;
            p.fragments[i] = T::pack(v[0], v[1]);
            continue;
        }
        i -= fragments;
        if (i < biases) {
            const int d = i % padded, k = i / padded;
            p.bias[i] = d < p.dim ? LOG2E * load_parameter(p.dt_bias, k * p.dim + d, p.bias_type)
                                  : 0.f;
            continue;
        }
        i -= biases;
        if (i < rates) {
            const int d = i % padded, k = i / padded;
            const float A = d < p.dim ? load_parameter(p.A, k * p.dim + d, p.A_type) : 0.f;
            p.rates[i] = p.logs ? -ex2(LOG2E * A) : A;
            continue;
        }
        i -= rates;
        if (i >= padded) {
            p.zeros[i - padded] = 0;
            continue;
        }
        float sum = 0.f;
        for (int k = 0; i < p.dim && k < p.routes; ++k)
            sum += load_parameter(p.D, k * p.dim + i, p.D_type);
        p.skip[i] = sum;
    }
}
