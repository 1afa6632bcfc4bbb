// Rounds parameters to half precision, in a launch of its own.
#include "common/cast.cuh"

template <class T>
__global__ void __launch_bounds__(256) cast(const Cast p) {
    round_parameters<T>(p, blockIdx.x, gridDim.x);
}
