// What is between the products of RWKV: the square of ReLU, and a gate, the sigmoid of one map times
// another; and their backward.
#include "common/common.cuh"

struct GatesParams {
    const void *x, *other;   // of the gate: what the sigmoid takes, and what is multiplied by it
    const void *grad;        // backwards
    void *y, *dother;        // backwards the gradients by x and other
    long long size;          // a multiple of 4
};

constexpr int VECTORS = 4;   // of 4 elements, of a thread
enum { SQUARED_RELU, SIGMOID_GATE };

template <class T, int KIND, bool BACKWARD>
__global__ void __launch_bounds__(256) gates(const GatesParams p) {
    constexpr bool GATE = KIND == SIGMOID_GATE;
    // From the end, as what the product before has written last is still in L2.
    const long long block = gridDim.x - 1 - (long long)blockIdx.x;
    const long long first = (block * VECTORS * 256 + threadIdx.x) * 4;
    typename Raw<T>::type x[VECTORS], other[VECTORS], grad[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        const long long at = first + j * 1024;
        x[j] = load4<T>(p.x, at, at < p.size);
        if (GATE) other[j] = load4<T>(p.other, at, at < p.size);
        if (BACKWARD) grad[j] = load4_last<T>(p.grad, at, at < p.size);
    }
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        const long long at = first + j * 1024;
        if (at >= p.size) continue;
        float v[4], w[4] = {}, dy[4] = {}, y[4], dw[4];
        unpack4(v, x[j], T{});
        if (GATE) unpack4(w, other[j], T{});
        if (BACKWARD) unpack4(dy, grad[j], T{});
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (GATE) {
                const float s = sigmoid(v[e]);
                y[e] = BACKWARD ? dy[e] * w[e] * s * (1.f - s) : s * w[e];
                dw[e] = dy[e] * s;
            } else {
                const float r = v[e] < 0.f ? 0.f : v[e];  // NaN stays NaN
                y[e] = BACKWARD ? 2.f * r * dy[e] : r * r;
            }
        }
        store4<T>(p.y, at, y);
        if (GATE && BACKWARD) store4<T>(p.dother, at, dw);
    }
}
