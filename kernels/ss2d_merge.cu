// The sum of the maps of the routes, and, if asked for, its LayerNorm over the channels.
#include "norm.cuh"

struct Params {
    const void *maps;             // (MAPS, M, D)
    const void *extra;            // (M, D), one more if EXTRA; may be `merged`
    void *merged;                 // (M, D) of OUT, or null
    void *normed;                 // (M, D) of T, or null
    const void *weight, *bias;    // (D)
    float2 *moments;              // (M): mean and 1 / deviation, or null
    float eps;
    int batch, length, images, dim, parameter_type;  // images: of a span of the scan
};

// A warp per position; a lane has 4 adjacent channels out of each 128. First come the images that
// the scan wrote last, in every span, for they are in L2: the last ones of a forward, the first
// ones of a backward, which is what has an extra map.
template <class T, int MAPS, bool EXTRA, int PARTS, bool FLOAT>
__global__ void __launch_bounds__(256) ss2d_merge(const Params p) {
    const int lane = threadIdx.x & 31;
    const int warps = gridDim.x * (blockDim.x >> 5);
    extern __shared__ __align__(16) float shared[];  // weight and bias, if there is a norm
    if (p.normed) load_affine(shared, p.weight, p.bias, p.dim, p.parameter_type);
    const long long map = (long long)p.batch * p.length * p.dim;
    const u32 spans = (p.batch + p.images - 1) / p.images, all = spans * p.images * p.length;
    for (u32 j = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); j < all; j += warps) {
        const u32 rank = j / (u32)p.length, turn = rank / spans;
        const int image = (rank - turn * spans) * p.images + (EXTRA ? turn : p.images - 1 - turn);
        if (image >= p.batch) continue;
        const int m = image * p.length + (j - rank * p.length);
        const unsigned short *at = (const unsigned short *)p.maps + (long long)m * p.dim;
        const long long to = (long long)m * p.dim;
        float v[PARTS][4];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 + lane * 4;
            uint2 in[MAPS + EXTRA];
#pragma unroll
            for (int j = 0; j < MAPS; ++j)
                in[j] = c < p.dim ? *(const uint2 *)(at + j * map + c) : make_uint2(0u, 0u);
            if (EXTRA)
                in[MAPS] = c < p.dim ? *(const uint2 *)((const unsigned short *)p.extra + to + c)
                                     : make_uint2(0u, 0u);
#pragma unroll
            for (int j = 0; j < MAPS + EXTRA; ++j) {
                const float2 lo = T::unpack(in[j].x), hi = T::unpack(in[j].y);
                v[i][0] = j ? v[i][0] + lo.x : lo.x;
                v[i][1] = j ? v[i][1] + lo.y : lo.y;
                v[i][2] = j ? v[i][2] + hi.x : hi.x;
                v[i][3] = j ? v[i][3] + hi.y : hi.y;
            }
        }
        if (p.merged)
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                const int c = i * 128 + lane * 4;
                if (c >= p.dim) continue;
                if (FLOAT)
                    *(float4 *)((float *)p.merged + to + c)
                        = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
                else
                    *(uint2 *)((unsigned short *)p.merged + to + c)
                        = make_uint2(T::pack(v[i][0], v[i][1]), T::pack(v[i][2], v[i][3]));
            }
        if (!p.normed) continue;
        const float2 moments = store_norm<T>(p.normed, to, v, shared, p.dim, lane, p.eps);
        if (p.moments && lane == 0) p.moments[m] = moments;
    }
}
