// The parameters of a Mamba block in one buffer, in the forms that the block's kernels read: factors
// of matrix products in the dtype of the map, the others in fp32, A from its logarithm.
#include "common/common.cuh"

constexpr int MOST = 16;
constexpr int COPY = 0, NEGATIVE_EXP = 1, FACTOR = 2;  // kinds

struct Gather {
    const void *sources[MOST];
    void *to;             // 16 bytes aligned
    int starts[MOST + 1]; // of the quads of a parameter among all; the end for an absent one
    int offsets[MOST];    // bytes in `to`, multiples of 16
    int types[MOST], kinds[MOST];
};

// A thread takes four elements of one parameter at a time, whose size is a multiple of four.
template <class T>
__global__ void __launch_bounds__(256) gather(const Gather p) {
    const int step = gridDim.x * blockDim.x;
    for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < p.starts[MOST]; j += step) {
        const void *from = p.sources[0];
        int start = 0, offset = p.offsets[0], type = p.types[0], kind = p.kinds[0];
#pragma unroll
        for (int i = 1; i < MOST; ++i)
            if (j >= p.starts[i])
                from = p.sources[i], start = p.starts[i], offset = p.offsets[i],
                type = p.types[i], kind = p.kinds[i];
        const int at = 4 * (j - start);
        float v[4];
        if (type == 0) {
            unpack4(v, load4<Float>(from, at, true), Float());
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] = load_parameter(from, at + e, type);
        }
        if (kind == NEGATIVE_EXP) {
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] = -ex2(v[e] * LOG2E);
        }
        char *const to = (char *)p.to + offset;
        if (kind == FACTOR) store4<T>(to, at, v);
        else store4<Float>(to, at, v);
    }
}
