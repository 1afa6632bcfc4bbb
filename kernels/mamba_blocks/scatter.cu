// Gradients of both directions, which lie side by side in fp32, to a tensor for each parameter, in
// its dtype; by the logarithm of A from that by A.
#include "common/common.cuh"

constexpr int MOST = 14;

struct Scatter {
    const void *base;      // 16 bytes aligned
    void *targets[MOST];
    int starts[MOST + 1];  // of the quads of a parameter among all; the end for an absent one
    int offsets[MOST];     // bytes from `base` on, multiples of 16
    int factors[MOST];     // the same of what an element is multiplied by, or -1
    int types[MOST];
};

// A thread takes four elements of one parameter at a time, whose size is a multiple of four.
__global__ void __launch_bounds__(256) scatter(const Scatter p) {
    const int step = gridDim.x * blockDim.x;
    for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < p.starts[MOST]; j += step) {
        void *to = p.targets[0];
        int start = 0, offset = p.offsets[0], factor = p.factors[0], type = p.types[0];
#pragma unroll
        for (int i = 1; i < MOST; ++i)
            if (j >= p.starts[i])
                to = p.targets[i], start = p.starts[i], offset = p.offsets[i],
                factor = p.factors[i], type = p.types[i];
        const int at = 4 * (j - start);
        float v[4];
        unpack4(v, load4<Float>((const char *)p.base + offset, at, true), Float());
        if (factor >= 0) {
            float w[4];
            unpack4(w, load4<Float>((const char *)p.base + factor, at, true), Float());
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] *= w[e];
        }
        if (type == 0) {
            store4<Float>(to, at, v);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) store_parameter(to, at + e, type, v[e]);
        }
    }
}
