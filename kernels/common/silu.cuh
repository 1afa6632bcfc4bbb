// The sigmoid, of which SiLU is x sigmoid(x).
#pragma once
#include "common/common.cuh"

__device__ __forceinline__ float sigmoid(float z) { return rcp(1.f + ex2(-LOG2E * z)); }
