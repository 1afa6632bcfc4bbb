// Backward of the attention of the pixels of a line to one another. The weights are calculated
// again: by queries, whose gradients they give, and then by keys, for those of keys and values. So
// nothing is added up across warps.
#include "masa/masa.cuh"

struct MasaBwdParams {
    Heads q, k, v, dy;
    void *dq, *dk, *dv;  // (B, H, W, n, P)
    int keys_pixel, values_pixel;  // elements from a pixel of dq and dk to the next, and of dv
    Lines lines;
    int adds;            // whether the gradients by queries and keys are added to what is there
};

// Store the gradients by 16 queries or keys, turned back, or those by values.
template <class T, int P, bool TURNS>
__device__ __forceinline__ void store_rows(void *grad, int grad_pixel, float (&d)[P / 16][2][4],
                                           float scale, bool adds, const Lines &p,
                                           const Place &place, int head, int start) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = start + g + 8 * h, pixel = place.first + row * p.step;
        const bool valid = row < p.length;
        Element<T> *const to = (Element<T> *)grad + (place.image + pixel) * grad_pixel + head * P;
#pragma unroll
        for (int c = 0; c < P / 16; ++c) {
            Pair<T> pairs[2];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int channel = 16 * c + 8 * m + 2 * t;
                float2 v = make_float2(d[c][m][2 * h] * scale, d[c][m][2 * h + 1] * scale);
                if (TURNS && p.turns && valid) {
                    const float2 turn = *(const float2 *)(p.turns + (long long)pixel * P + channel);
                    v = turned<true>(v, turn.x, turn.y);
                }
                if (TURNS && adds && valid) {
                    const float2 there = load_pair<T>(to + channel);
                    v.x += there.x, v.y += there.y;
                }
                pairs[m] = pack<T>(v.x, v.y);
            }
            const Four<T> four(pairs[0], pairs[1]);
            if (valid) four.store(to + 16 * c + first_column(t));
        }
    }
}

template <class T, int P, int TILES, bool PLANE>
__global__ void __launch_bounds__(128) masa_bwd(const MasaBwdParams p) {
    extern __shared__ __align__(16) char shared[];
    constexpr int SIZE = Tile<T, P, TILES>::SIZE, ROWS = 16 * TILES;
    const int heads = blockDim.x / (32 * TILES);
    Element<T> *const tiles = (Element<T> *)shared;
    const Place place(p.lines, heads);
    load_line<T, P, TILES, true>(tiles, 4 * SIZE, p.q, p.k, p.v, p.dy, p.lines, place,
                                 min(heads, p.lines.heads - place.head));
    __syncthreads();
    const int warp = warp_index(), g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const int head = place.head + warp / TILES, start = warp % TILES * 16;
    const bool active = head < p.lines.heads;
    const Element<T> *const q = tiles + warp / TILES * 4 * SIZE, *const k = q + SIZE;
    const Element<T> *const v = k + SIZE, *const dy = v + SIZE;
    // Of each query the logarithm of the sum of its weights, and the sum of weights times their
    // gradients.
    float *const logs = (float *)(tiles + heads * 4 * SIZE) + warp / TILES * 2 * ROWS;
    float *const means = logs + ROWS;
    const float root = rsqrtf((float)P), scale = LOG2E * root;
    const float decay = active ? LOG2E * p.lines.decay[head] : 0.f;

    if (active) {
        float s[TILES][2][4] = {}, top[2], sum[2], ds[TILES][2][4] = {};
        Block16<T> rows[P / 16];
        load_rows<T, P>(rows, q + start * PITCH<T, P>);
#pragma unroll
        for (int j = 0; j < TILES; ++j) multiply_line<T, P>(s[j], rows, k + 16 * j * PITCH<T, P>);
        weigh<TILES, PLANE>(s, top, sum, p.lines, start + g, scale, decay);
        load_rows<T, P>(rows, dy + start * PITCH<T, P>);
        float mean[2] = {};
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            multiply_line<T, P>(ds[j], rows, v + 16 * j * PITCH<T, P>);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) mean[e >> 1] += s[j][m][e] * ds[j][m][e];
        }
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            factor[h] = 1.f / sum[h];
            mean[h] = sum_of_row(mean[h]) * factor[h];
            const int row = start + g + 8 * h;
            if (t == 0) {  // beyond the line weights are 0
                logs[row] = row < p.lines.length ? top[h] + lg2(sum[h]) : -NOTHING;
                means[row] = mean[h];
            }
        }
        float dq[P / 16][2][4] = {};
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    ds[j][m][e] = s[j][m][e] * factor[e >> 1] * (ds[j][m][e] - mean[e >> 1]);
            add_product<T, P>(dq, ds[j], k + 16 * j * PITCH<T, P>);
        }
        store_rows<T, P, true>(p.dq, p.keys_pixel, dq, root, p.adds, p.lines, place, head, start);
    }
    __syncthreads();
    if (!active || start >= p.lines.length) return;

    Block16<T> keys[P / 16], values[P / 16];
    load_rows<T, P>(keys, k + start * PITCH<T, P>);
    load_rows<T, P>(values, v + start * PITCH<T, P>);
    float dk[P / 16][2][4] = {}, dv[P / 16][2][4] = {};
    const Coordinates<PLANE> at[2] = {{start + g, p.lines.width}, {start + g + 8, p.lines.width}};
#pragma unroll 1
    for (int j = 0; j < TILES; ++j) {  // 16 queries
        float s[2][4] = {}, ds[2][4] = {};
        multiply_line<T, P>(s, keys, q + 16 * j * PITCH<T, P>);
        multiply_line<T, P>(ds, values, dy + 16 * j * PITCH<T, P>);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int query = 16 * j + 8 * m + 2 * t + (e & 1);
                const Coordinates<PLANE> of(query, p.lines.width);
                s[m][e] = ex2(s[m][e] * scale + decay * at[e >> 1].distance(of) - logs[query]);
                ds[m][e] = s[m][e] * (ds[m][e] - means[query]);
            }
        add_product<T, P>(dv, s, dy + 16 * j * PITCH<T, P>);
        add_product<T, P>(dk, ds, q + 16 * j * PITCH<T, P>);
    }
    store_rows<T, P, true>(p.dk, p.keys_pixel, dk, root, p.adds, p.lines, place, head, start);
    store_rows<T, P, false>(p.dv, p.values_pixel, dv, 1.f, false, p.lines, place, head, start);
}
