// The sum of the maps of the routes and its LayerNorm, where the forward has not done it.
#include "ss2d_merge.cuh"

struct Params {
    Merge merge;
};

template <class T, bool EXTRA>
__global__ void __launch_bounds__(256, 3) ss2d_merge(const Params params) {
    const Merge &p = params.merge;
    extern __shared__ __align__(16) float shared[];
    if (p.normed) {
        stage_norm(p, shared);
        __syncthreads();
    }
    const int warps = blockDim.x >> 5;
    for (int m = blockIdx.x * warps + (threadIdx.x >> 5); m < p.positions; m += gridDim.x * warps)
        merge_position<T, EXTRA>(p, shared, m);
}
