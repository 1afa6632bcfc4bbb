// Rounds parameters to half precision and writes them one after the other into one buffer.
#pragma once
#include "common/common.cuh"

constexpr int MOST = 7;

struct Cast {
    const void *sources[MOST];
    void *to;              // 16 bytes aligned
    int starts[MOST + 1];  // elements in `to`, multiples of 8; the end for an absent parameter
    int sizes[MOST], types[MOST];
};

// Called by all threads of `blocks` blocks, of which this is number `block`. A thread rounds 8
// elements of one parameter at a time.
template <class T>
__device__ __forceinline__ void round_parameters(const Cast &p, int block, int blocks) {
    const int step = blocks * blockDim.x * 8;
    for (int j = (block * blockDim.x + threadIdx.x) * 8; j < p.starts[MOST]; j += step) {
        const void *from = p.sources[0];
        int start = 0, size = p.sizes[0], type = p.types[0];
#pragma unroll
        for (int i = 1; i < MOST; ++i)
            if (j >= p.starts[i])
                from = p.sources[i], start = p.starts[i], size = p.sizes[i], type = p.types[i];
        const int at = j - start;
        float v[8];
        if (type == 0 && at + 8 <= size && ((unsigned long long)from & 15) == 0) {
            const float4 *const source = (const float4 *)((const float *)from + at);
            const float4 lo = source[0], hi = source[1];
            v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w;
            v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e)
                v[e] = at + e < size ? load_parameter(from, at + e, type) : 0.f;
        }
        *(uint4 *)((unsigned short *)p.to + j) = make_uint4(
            T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7]));
    }
}
