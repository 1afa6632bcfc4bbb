// Softmax attention within the lines of a map (its rows, its columns, or all of a small map), whose
// scores fall with the distance: what forward and backward share. Needs sm_80.
//
// A block has adjacent heads of one line, and a head TILES warps, each with 16 pixels of the line.
// All of the line is in shared memory, filled up with zeros to 16 TILES pixels.
#pragma once
#include "ssd/ssd.cuh"

// Vectors of heads (B, H, W, n, P): `pixel` elements from a pixel to the next.
struct Heads {
    const void *data;
    int pixel;
};

struct Lines {
    int heads, length;   // n; pixels of a line
    int image, count;    // pixels of an image, and its lines
    int next, step;      // pixels from a line to the next, and within a line
    int width;           // of a PLANE, a line that is a whole map
    int groups;          // blocks of a line, for groups of heads
    const float *decay;  // (n), logarithms
    const float *turns;  // (pixels of an image, P / 2, 2): cosines and sines; null for none
};

// Where a block works.
struct Place {
    long long image;  // its first pixel
    int first, head;  // the first pixel of the line in the image; the first head

    __device__ __forceinline__ Place(const Lines &p, int heads) {
        const int line = blockIdx.x / p.groups, number = line / p.count;
        image = (long long)number * p.image;
        first = (line - number * p.count) * p.next;
        head = (blockIdx.x - line * p.groups) * heads;
    }
};

// Two adjacent channels turned by an angle, or BACK.
template <bool BACK>
__device__ __forceinline__ float2 turned(float2 x, float cosine, float sine) {
    if (BACK) sine = -sine;
    return make_float2(x.x * cosine - x.y * sine, x.y * cosine + x.x * sine);
}

template <class T>
__device__ __forceinline__ typename Raw<T>::type turned(typename Raw<T>::type raw, float4 turns) {
    float v[4];
    unpack4(v, raw, T{});
    const float2 lo = turned<false>(make_float2(v[0], v[1]), turns.x, turns.y);
    const float2 hi = turned<false>(make_float2(v[2], v[3]), turns.z, turns.w);
    if constexpr (same<T, Float>) return make_float4(lo.x, lo.y, hi.x, hi.y);
    else return make_uint2(T::pack(lo.x, lo.y), T::pack(hi.x, hi.y));
}

template <class T, int P, int TILES>
struct Tile {
    static constexpr int ROWS = 16 * TILES, SIZE = ROWS * PITCH<T, P>;  // elements of a head
};

// The line of each head to tiles, one head after the other with `stride` elements between them:
// queries and keys turned, values, and for the backward `more`, the gradients by the result.
template <class T, int P, int TILES, bool MORE>
__device__ __forceinline__ void load_line(Element<T> *tiles, int stride, const Heads &q,
                                          const Heads &k, const Heads &v, const Heads &more,
                                          const Lines &p, const Place &place, int heads) {
    typedef typename Raw<T>::type R;
    constexpr int FOURS = P / 4, SIZE = Tile<T, P, TILES>::SIZE;
    const int columns = heads * FOURS;
#pragma unroll 2
    for (int i = threadIdx.x; i < Tile<T, P, TILES>::ROWS * columns; i += blockDim.x) {
        const int row = i / columns, column = i - row * columns;
        const int head = column / FOURS, channel = column % FOURS * 4;
        const bool valid = row < p.length;
        const int pixel = place.first + row * p.step;
        const long long at = place.image + pixel;
        const int from = (place.head + head) * P + channel;
        R raw[4] = {load4<T>(q.data, at * q.pixel + from, valid),
                    load4<T>(k.data, at * k.pixel + from, valid),
                    load4<T>(v.data, at * v.pixel + from, valid)};
        if (MORE) raw[3] = load4<T>(more.data, at * more.pixel + from, valid);
        if (p.turns && valid) {
            const float4 turns = *(const float4 *)(p.turns + (long long)pixel * P + channel);
            raw[0] = turned<T>(raw[0], turns);
            raw[1] = turned<T>(raw[1], turns);
        }
        Element<T> *const to = tiles + head * stride + row * PITCH<T, P> + channel;
#pragma unroll
        for (int j = 0; j < (MORE ? 4 : 3); ++j) *(R *)(to + j * SIZE) = raw[j];
    }
}

// How far pixels of a line are apart.
template <bool PLANE>
struct Coordinates {
    float row, column;

    __device__ __forceinline__ Coordinates(int i, int width) {
        const int r = PLANE ? i / width : 0;
        row = r, column = i - r * width;
    }
    __device__ __forceinline__ float distance(const Coordinates &other) const {
        const float along = fabsf(column - other.column);
        return PLANE ? along + fabsf(row - other.row) : along;
    }
};

// sums += a b^T, where the 16 rows of a are in registers and those of b in a tile.
template <class T, int P>
__device__ __forceinline__ void multiply_line(float (&sums)[2][4], const Block16<T> (&a)[P / 16],
                                              const Element<T> *b) {
#pragma unroll
    for (int c = 0; c < P / 16; ++c) {
        Block16<T> right;
        right.template load<false, true>(b + 16 * c, PITCH<T, P>);
        multiply_blocks<T, false>(sums, a[c], right);
    }
}

template <class T, int P>
__device__ __forceinline__ void load_rows(Block16<T> (&a)[P / 16], const Element<T> *from) {
#pragma unroll
    for (int c = 0; c < P / 16; ++c) a[c].template load<false>(from + 16 * c, PITCH<T, P>);
}

// y += a b, where a is 16 x 16, as sums of a product, and the 16 rows of b are in a tile.
template <class T, int P>
__device__ __forceinline__ void add_product(float (&y)[P / 16][2][4], const float (&a)[2][4],
                                            const Element<T> *b) {
    Block16<T> left;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        left.v[i] = pack<T>(a[i >> 1][2 * (i & 1)], a[i >> 1][2 * (i & 1) + 1]);
#pragma unroll
    for (int c = 0; c < P / 16; ++c) {
        Block16<T> right;
        right.template load<true>(b + 16 * c, PITCH<T, P>);
        multiply_blocks<T, false>(y[c], left, right);
    }
}

// The largest, or the sum, of what the four lanes of a row have.
__device__ __forceinline__ float largest_of_row(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

__device__ __forceinline__ float sum_of_row(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// The weights of the softmax of the warp's 16 rows, in place of the products of queries and keys,
// without their factors 2^-top / sum.
template <int TILES, bool PLANE>
__device__ __forceinline__ void weigh(float (&s)[TILES][2][4], float (&top)[2], float (&sum)[2],
                                      const Lines &p, int row, float scale, float decay) {
    const int t = threadIdx.x & 3;
    const Coordinates<PLANE> at[2] = {{row, p.width}, {row + 8, p.width}};
    top[0] = top[1] = NOTHING;
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        const bool whole = 16 * j + 16 <= p.length;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = 16 * j + 8 * m + 2 * t + e;
                const Coordinates<PLANE> of(column, p.width);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float &score = s[j][m][2 * h + e];
                    score = score * scale + decay * at[h].distance(of);
                    if (!whole && column >= p.length) score = NOTHING;
                    top[h] = fmaxf(top[h], score);
                }
            }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        top[h] = largest_of_row(top[h]);
        sum[h] = 0.f;
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; ++e) {
                    s[j][m][e] = ex2(s[j][m][e] - top[h]);
                    sum[h] += s[j][m][e];
                }
        sum[h] = sum_of_row(sum[h]);
    }
}
