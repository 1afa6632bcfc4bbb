// The exact GELU; `y` may be `x`.
#include "common/common.cuh"

struct GeluParams {
    const void *x;
    void *y;
    long long size;  // a multiple of 4
};

constexpr int VECTORS = 4;  // of 4 elements, of a thread

// Blocks begin at the end: what the matrix product before has written last is still in L2, and so is
// what the product after this kernel reads first.
template <class T>
__global__ void __launch_bounds__(256) gelu_map(const GeluParams p) {
    const long long block = gridDim.x - 1 - blockIdx.x;
    const long long first = (block * VECTORS * 256 + threadIdx.x) * 4;
    typename Raw<T>::type in[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j)
        in[j] = load4<T>(p.x, first + j * 1024, first + j * 1024 < p.size);
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
        float v[4];
        unpack4(v, in[j], T{});
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = gelu(v[e]);
        if (first + j * 1024 < p.size) store4<T>(p.y, first + j * 1024, v);
    }
}
