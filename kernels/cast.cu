// Parameters rounded to half precision, one after the other into one buffer.
#include "common.cuh"

constexpr int MOST = 6;

struct Params {
    const void *from[MOST];
    void *to;
    int starts[MOST + 1];  // in `to`, in elements, multiples of 8; of an absent one, the end
    int sizes[MOST], types[MOST];
};

template <class T>
__global__ void __launch_bounds__(256) cast(const Params p) {
    for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < p.starts[MOST];
         j += gridDim.x * blockDim.x) {
#pragma unroll
        for (int i = 0; i < MOST; ++i)
            if (j >= p.starts[i] && j - p.starts[i] < p.sizes[i]) {
                const float v = load_parameter(p.from[i], j - p.starts[i], p.types[i]);
                ((unsigned short *)p.to)[j] = (unsigned short)T::pack(v, 0.f);
            }
    }
}
