// The sum of the maps of the routes and, on request, its LayerNorm over the channels, and the product
// of that with SiLU of a gate.
#include "common/norm.cuh"

struct Ss2dMergeParams {
    const void *maps;             // (MAPS, M, D)
    const void *extra;            // (M, D), one more if EXTRA; may be `merged`
    void *merged;                 // (M, D) of T, or if FLOAT in fp32, or null
    void *normed;                 // (M, D) of T, or null
    const void *weight, *bias;    // (D)
    float2 *moments;              // (M): mean and 1 / deviation, or null
    float eps;
    int batch, length, images, dim, parameter_type;  // images: of a span of the scan
    const void *gate;             // (M, D) of T, gate_stride elements from one row to the next
    int gate_stride;
};

// A warp takes a position at a time; a lane has 4 adjacent channels out of each 128. In every span
// the images that the scan wrote last come first, because they are in L2. These are the last ones
// after a forward and the first ones after a backward, which is the case with an extra map.
template <class T, int MAPS, bool EXTRA, int PARTS, bool FLOAT, bool GATE = false>
__global__ void __launch_bounds__(256) ss2d_merge(const Ss2dMergeParams p) {
    typedef typename Raw<T>::type R;
    typedef typename Raw<T>::element Element;
    const int lane = threadIdx.x & 31;
    const int warps = gridDim.x * (blockDim.x >> 5);
    extern __shared__ __align__(16) float shared[];  // weight and bias, if there is a norm
    if (p.normed) load_affine(shared, p.weight, p.bias, p.dim, p.parameter_type);
    const long long map = (long long)p.batch * p.length * p.dim;
    // Nothing reads these maps again, so what is still in L2 need not go to memory. Two maps are
    // left alone, because they fit in L2 anyway. A backward is left alone because it was not
    // measured.
    const int bytes = p.dim * (int)sizeof(Element), lines = bytes / LINE_BYTES;
    const bool discards = MAPS == 4 && !EXTRA && ((size_t)p.maps | bytes) % LINE_BYTES == 0;
    const u32 spans = (p.batch + p.images - 1) / p.images, all = spans * p.images * p.length;
    for (u32 j = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); j < all; j += warps) {
        const u32 rank = j / (u32)p.length, turn = rank / spans;
        const int image = (rank - turn * spans) * p.images + (EXTRA ? turn : p.images - 1 - turn);
        if (image >= p.batch) continue;
        const int m = image * p.length + (j - rank * p.length);
        const Element *at = (const Element *)p.maps + (long long)m * p.dim;
        const long long to = (long long)m * p.dim;
        float v[PARTS][4];
        R gates[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int c = i * 128 + lane * 4;
            R in[MAPS + EXTRA];
#pragma unroll
            for (int j = 0; j < MAPS; ++j)
                in[j] = load4_last<T>(at + j * map, c, c < p.dim);
            if (GATE) gates[i] = load4<T>(p.gate, (long long)m * p.gate_stride + c, c < p.dim);
            if (EXTRA)
                in[MAPS] = c < p.dim ? *(const R *)((const Element *)p.extra + to + c) : R{};
#pragma unroll
            for (int j = 0; j < MAPS + EXTRA; ++j) {
                float add[4];
                unpack4(add, in[j], T{});
#pragma unroll
                for (int e = 0; e < 4; ++e) v[i][e] = j ? v[i][e] + add[e] : add[e];
            }
        }
        if (p.merged)
#pragma unroll
            for (int i = 0; i < PARTS; ++i) {
                const int c = i * 128 + lane * 4;
                if (c >= p.dim) continue;
                if (FLOAT) store4<Float>(p.merged, to + c, v[i]);
                else store4<T>(p.merged, to + c, v[i]);
            }
        if (!p.normed) continue;
        const auto apply_gate = [&](int i, float (&v)[4]) {
            if (!GATE) return;
            float z[4];
            unpack4(z, gates[i], T{});
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] *= z[e] * sigmoid(z[e]);
        };
        const float2 moments = store_norm<T>(p.normed, to, v, shared, p.dim, lane, p.eps, true,
                                             apply_gate);
        if (p.moments && lane == 0) p.moments[m] = moments;
        if (!discards) continue;
        __syncwarp();  // all have read
        for (int l = lane; l < MAPS * lines; l += 32)
            discard_line((const char *)(at + l / lines * map) + l % lines * LINE_BYTES);
    }
}
