// Parameters rounded to half precision, by themselves.
#include "common/cast.cuh"

template <class T>
__global__ void __launch_bounds__(256) cast(const Cast p) {
    round_parameters<T>(p, blockIdx.x, gridDim.x);
}
