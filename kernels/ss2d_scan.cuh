// What the forward and the backward of ss2d_scan share. README.md has the mathematics and the
// layout: a warp has 16 channels and takes 56 positions at a time; lane 4 g + t owns the 7
// consecutive positions 7 g .. of the channels 4 t ..
#include "common.cuh"

constexpr int OWN = 7, CHUNK = 8 * OWN;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr u32 ALL = 0xffffffffu;
constexpr int UNIT_BYTES = CHUNK * 16;  // of 8 staged columns, for a chunk
constexpr int MAP_BYTES = CHUNK * 32;   // of a warp's channels, for a chunk

// The pixels of a route in the order of its scan.
struct Path {
    int inner_length, inner, outer, origin;
    u32 magic;  // 2^32 / inner_length, rounded up; 0 for 1

    // `rest` is the place within the row.
    __device__ __forceinline__ int find(int i, int &rest) const {
        const int row = magic ? (int)__umulhi((u32)i, magic) : i;
        rest = i - row * inner_length;
        return origin + row * outer + rest * inner;
    }
    __device__ __forceinline__ void next(int &pixel, int &rest) const {
        pixel += inner;
        if (++rest == inner_length) {
            rest = 0;
            pixel += outer - inner_length * inner;
        }
    }
};

// What a scan needs in both directions of time.
struct Scan {
    const void *projected;  // (B, H * W, K, P): dt (R), a zero if R is odd, (B, C), padding
    const u32 *fragments;   // (K, G, TILES, 2, 32): dt_projs_weight as the tensor cores take it
    const float *bias;      // (K, 16 G), times log2(e)
    const float *rates;     // (K, 16 G): A
    const float *skip;      // (16 G): the sum of D over the routes
    int batch, dim, height, width, rank, routes, row;  // row: P
    int span, spans, chunks, images;                   // images: of a block
    u32 magic_height, magic_width;
};

// A map (B, H, W, D) by strides in elements; a pixel is h * W + w.
struct Map {
    const void *data;
    long long stride_b;
    int stride_pixel, stride_d;
    int vector;  // whether 4 adjacent channels are 8 aligned bytes
    int unused;
};

__device__ __forceinline__ Path make_path(const Scan &p, int route) {
    Path path;
    const bool column = route & 1;
    path.inner_length = column ? p.height : p.width;
    path.inner = column ? p.width : 1;
    path.outer = column ? 1 : p.width;
    path.magic = column ? p.magic_height : p.magic_width;
    path.origin = 0;
    if (route >= 2) {
        path.origin = p.height * p.width - 1;
        path.inner = -path.inner;
        path.outer = -path.outer;
    }
    return path;
}

// Stage `projected` of a chunk: 16-byte units by (unit of the row, position % 7, position / 7), so
// that the rows of a tensor-core tile are next to one another.
__device__ __forceinline__ void stage_projected(const Scan &p, const Path &path, char *to,
                                                const char *image, int route, int chunk) {
    const int items = (p.row >> 3) * CHUNK, length = p.height * p.width;
    for (int j = threadIdx.x; j < items; j += blockDim.x) {
        const int unit = j / CHUNK, position = j - unit * CHUNK;
        const int g = position / OWN, i = position - g * OWN;
        const bool valid = chunk * CHUNK + position < length;
        int rest;
        const int pixel = path.find(valid ? chunk * CHUNK + position : 0, rest);
        copy16(to + ((unit * OWN + i) * 8 + g) * 16,
               image + ((long long)pixel * p.routes + route) * p.row * 2 + unit * 16, valid);
    }
}

// Stage a lane's own 7 x 4 elements of a map, zeros beyond the end; `to` is the lane's.
__device__ __forceinline__ void stage_map(const Scan &p, const Path &path, const Map &map, char *to,
                                          int b, int channel, int start) {
    const int count = channel < p.dim ? p.height * p.width - start : 0;
    const unsigned short *base
        = (const unsigned short *)map.data + b * map.stride_b + (long long)channel * map.stride_d;
    int rest, pixel = path.find(count > 0 ? start : 0, rest);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const unsigned short *at = base + (long long)pixel * map.stride_pixel;
        if (map.vector) {
            copy8(to + i * 256, i < count ? at : base, i < count);
        } else {
            u32 v[4];
#pragma unroll
            for (int c = 0; c < 4; ++c)
                v[c] = i < count && channel + c < p.dim ? at[(long long)c * map.stride_d] : 0;
            *(uint2 *)(to + i * 256) = make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
        }
        path.next(pixel, rest);
    }
}

// Write a lane's elements of 4 adjacent channels; `out` is the (H * W, D) map of the image.
__device__ __forceinline__ void write_map(const Scan &p, const Path &path, unsigned short *out,
                                          const uint2 (&v)[OWN], int channel, int start) {
    const int count = channel < p.dim ? p.height * p.width - start : 0;
    int rest, pixel = path.find(count > 0 ? start : 0, rest);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        if (i < count) {
            unsigned short *at = out + (long long)pixel * p.dim + channel;
            if ((p.dim & 3) == 0) {
                *(uint2 *)at = v[i];
            } else {
                at[0] = v[i].x;
                if (channel + 1 < p.dim) at[1] = v[i].x >> 16;
                if (channel + 2 < p.dim) at[2] = v[i].y;
                if (channel + 3 < p.dim) at[3] = v[i].y >> 16;
            }
        }
        path.next(pixel, rest);
    }
}

// z = log2(e) (W dt + bias) of a lane's positions and of its channels 2 pair, 2 pair + 1. A row of
// a 16 x 8 tile may be any position: row g is 7 g + s, and row g + 8 is 7 g + 4 + s.
template <class T, int TILES>
__device__ __forceinline__ void project_dt(float (&z)[OWN][2], const char *staged,
                                           const u32 *fragments, const float *bias, int pair,
                                           int lane) {
    const float2 start = *(const float2 *)(bias + 4 * (lane & 3) + 2 * pair);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        float c[4] = {start.x, start.y, start.x, start.y};
        // Lanes 0 to 7 name the rows of positions s, 8 to 15 those of s + 4; there is no 7.
        const int i = s + (lane & 8 ? (s < 3 ? 4 : 3) : 0);
        const char *row = staged + (i * 8 + (lane & 7)) * 16;
#pragma unroll
        for (int k = 0; k < TILES; ++k) {
            u32 a0, a1;
            load_tiles(a0, a1, row + k * UNIT_BYTES);
            T::mma(c, a0, a1, fragments[(2 * k + pair) * 32 + lane]);
        }
        z[s][0] = c[0];
        z[s][1] = c[1];
        if (s < 3) {
            z[s + 4][0] = c[2];
            z[s + 4][1] = c[3];
        }
    }
}

// The pair (B, C) of a lane's positions, packed; column: of the staged row.
__device__ __forceinline__ void load_pairs(u32 (&pairs)[OWN], const char *staged, int column,
                                           int g) {
    const char *pair = staged + (column >> 3) * UNIT_BYTES + g * 16 + (column & 7) * 2;
#pragma unroll
    for (int i = 0; i < OWN; ++i) pairs[i] = *(const u32 *)(pair + i * 128);
}

// Lane g has the map h -> P h + q over its positions; combine it with those of the lanes that come
// before it in time: lower g, or higher if BACK. Gives the inclusive map.
template <bool BACK>
__device__ __forceinline__ void combine_lanes(float &P, float &q, int g) {
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
        const float P2 = BACK ? __shfl_down_sync(ALL, P, 4 * d) : __shfl_up_sync(ALL, P, 4 * d);
        const float q2 = BACK ? __shfl_down_sync(ALL, q, 4 * d) : __shfl_up_sync(ALL, q, 4 * d);
        if (BACK ? g + d < 8 : g >= d) {
            q = P * q2 + q;
            P *= P2;
        }
    }
}
