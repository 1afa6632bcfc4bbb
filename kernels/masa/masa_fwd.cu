// Attention of the pixels of a line to one another, for all lines of all maps.
#include "masa/masa.cuh"

struct MasaParams {
    Heads q, k, v;
    void *y;  // (B, H, W, n, P), without gaps
    Lines lines;
};

template <class T, int P, int TILES, bool PLANE>
__global__ void __launch_bounds__(128) masa_fwd(const MasaParams p) {
    extern __shared__ __align__(16) char shared[];
    constexpr int SIZE = Tile<T, P, TILES>::SIZE;
    Element<T> *const tiles = (Element<T> *)shared;
    const Place place(p.lines, blockDim.x / (32 * TILES));
    load_line<T, P, TILES, false>(tiles, 3 * SIZE, p.q, p.k, p.v, p.v, p.lines, place,
                                  min((int)blockDim.x / (32 * TILES), p.lines.heads - place.head));
    __syncthreads();
    const int warp = warp_index(), g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const int head = place.head + warp / TILES, start = warp % TILES * 16;
    if (head >= p.lines.heads || start >= p.lines.length) return;
    const Element<T> *const q = tiles + warp / TILES * 3 * SIZE, *const k = q + SIZE;
    const Element<T> *const v = k + SIZE;

    float s[TILES][2][4] = {}, top[2], sum[2];
    Block16<T> rows[P / 16];
    load_rows<T, P>(rows, q + start * PITCH<T, P>);
#pragma unroll
    for (int j = 0; j < TILES; ++j) multiply_line<T, P>(s[j], rows, k + 16 * j * PITCH<T, P>);
    weigh<TILES, PLANE>(s, top, sum, p.lines, start + g, LOG2E * rsqrtf((float)P),
                        LOG2E * p.lines.decay[head]);
    float y[P / 16][2][4] = {};
#pragma unroll
    for (int j = 0; j < TILES; ++j) add_product<T, P>(y, s[j], v + 16 * j * PITCH<T, P>);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = start + g + 8 * h;
        const float factor = 1.f / sum[h];
        const long long pixel = place.image + place.first + row * p.lines.step;
        Element<T> *const to = (Element<T> *)p.y + (pixel * p.lines.heads + head) * P;
#pragma unroll
        for (int c = 0; c < P / 16; ++c) {
            const Four<T> four(pack<T>(y[c][0][2 * h] * factor, y[c][0][2 * h + 1] * factor),
                               pack<T>(y[c][1][2 * h] * factor, y[c][1][2 * h + 1] * factor));
            if (row < p.lines.length) four.store(to + 16 * c + first_column(t));
        }
    }
}
