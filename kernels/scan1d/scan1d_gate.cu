// The gate of a mixer: the directions' sum times silu(z). Its backward goes to the sum and to z.
#include "common/common.cuh"

struct Scan1dGateParams {
    const void *ys;    // (K, B, L, D)
    const void *z;     // (B, L, D) by strides
    const void *grad;  // (B, L, D): by the result
    void *sum;         // (B, L, D): of ys; written by the forward unless it is null
    void *out;         // (B, L, D): the result; of the backward the gradient by the sum
    void *dz;          // (B, L, D) by strides
    long long z_b, dz_b;
    int z_l, dz_l;
    int batch, length, dim, routes;
    float scale;
};

template <class T, int V>
struct GateVector {  // of V adjacent elements
    static constexpr int SIZE = same<T, Float> ? 4 : 2;
    static __device__ __forceinline__ void load(float (&v)[V], const void *p, long long at) {
        if constexpr (V == 4) unpack4(v, load4<T>(p, at, true), T{});
        else if constexpr (SIZE == 4) v[0] = ((const float *)p)[at];
        else v[0] = T::unpack(((const unsigned short *)p)[at]).x;
    }
    static __device__ __forceinline__ void store(void *p, long long at, const float (&v)[V]) {
        if constexpr (V == 4) store4<T>(p, at, v);
        else store_result(p, at, T::CODE, v[0]);
    }
};

template <class T, int V, bool BACKWARD>
__global__ void __launch_bounds__(256) scan1d_gate(const Scan1dGateParams p) {
    typedef GateVector<T, V> G;
    const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    const long long all = (long long)p.batch * p.length * p.dim;
    if (i >= all) return;
    const int row = (int)(i / p.dim), c = (int)(i - (long long)row * p.dim);
    const int b = row / p.length, l = row - b * p.length;
    float z[V], sum[V];
    G::load(z, p.z, b * p.z_b + (long long)l * p.z_l + c);
    if (BACKWARD) {
        float grad[V], dz[V];
        G::load(sum, p.sum, i);
        G::load(grad, p.grad, i);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const float s = rcp(1.f + ex2(-LOG2E * z[e]));
            dz[e] = p.scale * grad[e] * sum[e] * s * fmaf(z[e], 1.f - s, 1.f);
            grad[e] *= p.scale * z[e] * s;
        }
        G::store(p.out, i, grad);
        G::store(p.dz, b * p.dz_b + (long long)l * p.dz_l + c, dz);
        return;
    }
    G::load(sum, p.ys, i);
    for (int k = 1; k < p.routes; ++k) {
        float more[V];
        G::load(more, p.ys, k * all + i);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += more[e];
    }
    if (p.sum) G::store(p.sum, i, sum);
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] *= p.scale * z[e] * rcp(1.f + ex2(-LOG2E * z[e]));
    G::store(p.out, i, sum);
}
