// The batch norm of inference, the sum with a residual and ReLU, of a map with the channels last.
#include "common/common.cuh"

struct BatchNormParams {
    const void *x, *residual;              // (M, D); the latter may be null
    const void *mean, *variance;           // (D)
    const void *weight, *bias;             // (D)
    void *y;                               // (M, D)
    float eps;
    int positions, dim, relu;
    int statistics_type, weight_type;
};

constexpr int AHEAD = 4;  // positions of a thread that are under way

// A thread has 4 channels of every gridDim.x * blockDim.y-th position, from the end: what the
// convolution has written last is still in L2.
template <class T>
__global__ void __launch_bounds__(256) batch_norm(const BatchNormParams p) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (channel >= p.dim) return;
    float scale[4], offset[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int c = channel + e;
        scale[e] = load_parameter(p.weight, c, p.weight_type)
            * rsqrtf(load_parameter(p.variance, c, p.statistics_type) + p.eps);
        offset[e] = load_parameter(p.bias, c, p.weight_type)
            - load_parameter(p.mean, c, p.statistics_type) * scale[e];
    }
    const int step = gridDim.x * blockDim.y;
    for (int m = p.positions - 1 - (int)(blockIdx.x * blockDim.y + threadIdx.y); m >= 0;
         m -= AHEAD * step) {
        typename Raw<T>::type x[AHEAD], residual[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const long long at = (long long)(m - i * step) * p.dim + channel;
            x[i] = load4_last<T>(p.x, at, m >= i * step);
            residual[i] = load4_last<T>(p.residual, at, p.residual && m >= i * step);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (m < i * step) continue;
            float v[4], other[4];
            unpack4(v, x[i], T{});
            unpack4(other, residual[i], T{});
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                v[e] = v[e] * scale[e] + offset[e] + other[e];
                if (p.relu && v[e] < 0.f) v[e] = 0.f;  // NaN stays NaN
            }
            store4<T>(p.y, (long long)(m - i * step) * p.dim + channel, v);
        }
    }
}
