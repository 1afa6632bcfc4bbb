// What the forward and the backward of ss2d_scan share. README.md has the mathematics and the
// layout. The images of the batch are one sequence, divided into slots of 7 positions, each within
// one image. A warp has 16 channels and takes a chunk of 8 slots at a time: lane 4 g + t owns the
// positions of slot g and the channels 4 t .. 4 t + 3.
#pragma once
#include "common/common.cuh"

#define LIKELY(condition) __builtin_expect(condition, 1)  // moves the other branch out of line

constexpr int OWN = 7, CHUNK = 8 * OWN;
constexpr u32 ALL = 0xffffffffu;
constexpr int UNIT_BYTES = CHUNK * 16;  // of 8 staged columns, for a chunk
constexpr int PAD_BYTES = 128;          // after the last one, see project_dt
constexpr int MAP_BYTES = CHUNK * 32;   // of a warp's channels, for a chunk

// The pixels of a route in the order of its scan.
struct alignas(16) PixelPath {
    int inner_length, inner;
    int jump;   // from the end of a row to the next one
    u32 magic;  // 2^32 / inner_length, rounded up; 0 for 1, where all is in one row
    int outer, origin;
    int far_pixel, far_rest;  // of `move`: how far the pixel goes, and how far in its row

    __device__ __forceinline__ int find(int i) const {
        const int row = (int)__umulhi((u32)i, magic);
        return origin + row * outer + (i - row * inner_length) * inner;
    }
};

// What a scan needs in both directions of time.
struct Scan {
    const void *projected;  // (B, H * W, K, P): dt (R), a zero if R is odd, (B, C), zeros
    const u32 *fragments;   // (K, G, TILES, 2, 32): dt_projs_weight as the tensor cores take it
    const float *bias;      // (K, 16 G), times log2(e)
    const float *rates;     // (K, 16 G): A
    const float *skip;      // (16 G): the sum of D over the routes
    int batch, dim, height, width, rank, routes, row;  // row: P
    int slots, chunks, span, spans;  // slots of an image, chunks of the batch and of a block's span
    u32 magic_height, magic_width, magic_slots;
};

// A position of a slot, by default its first: the image, the number of the slot in the image, the
// pixel, and how many pixels there are from this one to the end of the row (`wrap`). Beyond the
// batch the number of the slot is so high that the image has ended long before.
struct SlotPosition {
    int image, slot, pixel, wrap;

    // Where the first position of the slot is in the scan of the image.
    __device__ __forceinline__ int start() const { return slot * OWN; }
};

__device__ __forceinline__ void locate(const Scan &p, const PixelPath &path, SlotPosition &place,
                                       int i) {
    if (place.image >= p.batch) {
        place = {0, 1 << 27, 0, 1 << 30};
        return;
    }
    const int at = place.start() + i;
    const int row = (int)__umulhi((u32)at, path.magic);
    const int rest = at - row * path.inner_length;
    place.pixel = path.origin + row * path.outer + rest * path.inner;
    place.wrap = path.inner_length - rest;
}

__device__ __forceinline__ SlotPosition find_place(const Scan &p, const PixelPath &path, int slot,
                                                   int i = 0) {
    SlotPosition place;
    place.image = p.magic_slots ? (int)__umulhi((u32)slot, p.magic_slots) : slot;
    place.slot = slot - place.image * p.slots;
    if (place.slot < 0) {  // the product is one too high at most
        --place.image;
        place.slot += p.slots;
    }
    locate(p, path, place, i);
    return place;
}

// Moves to the slot that is `chunks` chunks further, the number that make_path was called with, and
// returns whether the image has such a slot; without one nothing changes.
__device__ __forceinline__ bool move(const Scan &p, const PixelPath &path, SlotPosition &place,
                                     int chunks) {
    if (place.slot + 8 * chunks >= p.slots) return false;
    place.slot += 8 * chunks;
    place.pixel += path.far_pixel;
    place.wrap -= path.far_rest;
    if (place.wrap <= 0) {
        place.pixel += path.jump;
        place.wrap += path.inner_length;
    }
    return true;
}

// Moves to the first position of the next slot, as find_place would find it.
__device__ __forceinline__ void advance(const Scan &p, const PixelPath &path, SlotPosition &place) {
    if (++place.slot == p.slots) {
        ++place.image;
        place.slot = 0;
        locate(p, path, place, 0);
        return;
    }
    place.pixel += OWN * path.inner;
    place.wrap -= OWN;
#pragma unroll 1
    while (place.wrap <= 0) {
        place.pixel += path.jump;
        place.wrap += path.inner_length;
    }
}

// A map (B, H, W, D) by strides in elements; a pixel is h * W + w.
struct Map {
    const void *data;
    int stride_b, stride_pixel, stride_d;
    int vector;  // whether 4 adjacent channels are 8 aligned bytes
};

__device__ __forceinline__ PixelPath make_path(const Scan &p, int route, int chunks = 0) {
    PixelPath path;
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
    if (path.inner_length == 1) path.inner = path.outer;
    path.jump = path.outer - path.inner_length * path.inner;
    const int far = chunks * CHUNK, rows = (int)__umulhi((u32)far, path.magic);
    path.far_pixel = far * path.inner + rows * path.jump;
    path.far_rest = far - rows * path.inner_length;
    return path;
}

// Stages `projected` of a chunk: 16-byte units by (unit of the row, position of the slot, slot), so
// that the rows of a tensor-core tile are next to one another. A thread has one position of its
// slot; it takes two warps.
struct Stager {
    int i, unit, step;

    // `thread` is the number of this thread among the `threads` threads that stage together.
    __device__ __forceinline__ Stager(u32 thread, u32 threads) {
        i = (thread & 3) + (thread >> 3 & 4);
        unit = thread >> 6, step = threads >> 6;
        if (unit >= step || i >= OWN) unit = 1 << 20;  // nothing to do
    }

    __device__ __forceinline__ void stage(const Scan &p, const PixelPath &path,
                                          const SlotPosition &place, char *to, int route,
                                          int g) const {
        const int units = p.row >> 3;
        if (unit >= units) return;
        const int length = p.height * p.width, position = place.start() + i;
        int pixel = place.pixel + i * path.inner + (i < place.wrap ? 0 : path.jump);
        if (path.inner_length < OWN) pixel = path.find(position);  // more than one row may end
        const char *from = (const char *)p.projected + ((long long)place.image * length + pixel)
              * (p.routes * p.row * 2) + (route * p.row + unit * 8) * 2;
        to += ((unit * OWN + i) * 8 + g) * 16;
#pragma unroll 1
        for (int u = unit; u < units; u += step) {
            copy16(to, from, position < length);
            to += step * UNIT_BYTES;
            from += step * 16;
        }
    }
};

__device__ __forceinline__ float element(const float4 &v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Calls f(i, pointer) for the positions of a slot. All rows must have 7 pixels or more, so that at
// most one row ends here. `image` is that of a map with `stride` elements from a pixel to the next.
template <class E, class F>
__device__ __forceinline__ void for_pixels(const PixelPath &path, const SlotPosition &place,
                                           E *image, int stride, F f) {
    E *at = image + place.pixel * stride;
    const int near = path.inner * stride, far = near + path.jump * stride;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        f(i, at);
        at += i + 1 == place.wrap ? far : near;
    }
}

// Reads a lane's own 7 x 4 elements of a map, with zeros beyond the end. Calls take(i, pointer)
// where the 4 elements are 8 aligned bytes within the map, else put(i, value).
template <class Take, class Put>
__device__ __forceinline__ void read_map(const Scan &p, const PixelPath &path, const Map &map,
                                         const SlotPosition &place, int channel, Take take,
                                         Put put) {
    const int count = channel < p.dim ? p.height * p.width - place.start() : 0;
    const unsigned short *image = (const unsigned short *)map.data
          + (long long)place.image * map.stride_b + (long long)channel * map.stride_d;
    if (LIKELY(map.vector && count >= OWN && path.inner_length >= OWN))
        return for_pixels(path, place, image, map.stride_pixel, take);
#pragma unroll 1
    for (int i = 0; i < OWN; ++i) {
        u32 v[4] = {};
        if (i < count) {
            const unsigned short *from = image + path.find(place.start() + i) * map.stride_pixel;
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (channel + c < p.dim) v[c] = from[(long long)c * map.stride_d];
        }
        put(i, make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16));
    }
}

// Map number `number` of (maps, B, H, W, D).
__device__ __forceinline__ Map map_of(const Scan &p, void *maps, int number) {
    const int image = p.height * p.width * p.dim;
    return {(unsigned short *)maps + (long long)number * p.batch * image, image, p.dim, 1,
            (p.dim & 3) == 0};
}

// Writes a lane's elements, get(i) for each position, to such a map, or adds them to what is there.
// READ_SOON: the map is read again soon, so that it should be the last to leave L2.
template <class T, bool READ_SOON = false, class Get>
__device__ __forceinline__ void write_map(const Scan &p, const PixelPath &path, const Map &map,
                                          Get get, const SlotPosition &place, int channel,
                                          bool adds) {
    const int count = channel < p.dim ? p.height * p.width - place.start() : 0;
    unsigned short *const image = (unsigned short *)map.data
          + (long long)place.image * map.stride_b + channel;
    auto put = [&](int i, unsigned short *to) {
        if (READ_SOON) store_for_reuse(to, get(i));
        else *(uint2 *)to = get(i);
    };
    auto add = [&](int i, unsigned short *to) { T::add(to, get(i)); };
    if (LIKELY(map.vector && count >= OWN && path.inner_length >= OWN))
        return adds ? for_pixels(path, place, image, p.dim, add)
                    : for_pixels(path, place, image, p.dim, put);
#pragma unroll 1
    for (int i = 0; i < min(count, OWN); ++i) {
        unsigned short *const to = image + path.find(place.start() + i) * p.dim;
        if (map.vector) {  // an addition to two bytes alone is a loop
            if (adds) add(i, to);
            else put(i, to);
            continue;
        }
        const uint2 v = get(i);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const u32 word = c < 2 ? v.x : v.y;
            const unsigned short value = c & 1 ? word >> 16 : word;
            if (channel + c >= p.dim) continue;
            if (adds) T::add(to + c, value);
            else to[c] = value;
        }
    }
}

// Copies a lane's own elements of a map to where the lane has them in the warp's shared memory.
__device__ __forceinline__ void copy_map(const Scan &p, const PixelPath &path, const Map &map,
                                         const SlotPosition &place, int channel, char *memory,
                                         int lane) {
    char *const to = memory + lane * 8;
    read_map(p, path, map, place, channel,
             [&](int i, const unsigned short *from) { copy8(to + i * 256, from); },
             [&](int i, uint2 v) { *(uint2 *)(to + i * 256) = v; });
}

// The channel whose bias is at this place: of each two channels they are there twice.
__device__ __forceinline__ int twice(int lane) { return lane / 4 * 2 + lane % 2; }

// The parameters of a route that a warp needs, in its shared memory: the fragments, and bias and
// rate of its 16 channels.
template <int TILES>
struct Weights {
    static constexpr int BYTES = TILES * 256 + 192;
    const u32 *fragments;
    const float *bias, *rates;  // the biases of each two channels are there twice, for project_dt

    __device__ __forceinline__ Weights(const char *memory)
        : fragments((const u32 *)memory), bias((const float *)(memory + TILES * 256)),
          rates(bias + 32) {}

    static __device__ __forceinline__ void load(const Scan &p, char *memory, int route, int group,
                                                int lane) {
        const int at = route * ((p.dim + 15) >> 4) + group;
        u32 *const fragments = (u32 *)memory;
        for (int j = lane; j < TILES * 64; j += 32)
            fragments[j] = p.fragments[(long long)at * TILES * 64 + j];
        float *const bias = (float *)(fragments + TILES * 64);
        bias[lane] = p.bias[at * 16 + twice(lane)];
        if (lane < 16) bias[32 + lane] = p.rates[at * 16 + lane];
    }
};

// Saves the states of a lane's channels that enter a chunk, in `states` (K, chunks, D).
__device__ __forceinline__ void save_states(const Scan &p, float *states, int route, int chunk,
                                            int channel, const float (&enter)[4]) {
    float *const to = states + (long long)(route * p.chunks + chunk) * p.dim + channel;
    if ((p.dim & 3) == 0) {
        if (channel < p.dim)
            *(float4 *)to = make_float4(enter[0], enter[1], enter[2], enter[3]);
    } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (channel + c < p.dim) to[c] = enter[c];
    }
}

// Calculates z = log2(e) (W dt + bias) for a lane's positions and for its channels 2 pair and 2
// pair + 1, for PAIRS pairs. Beyond the end z is far below zero, so that nothing happens there. A
// row of a 16 x 8 tile may be any position: row g is 7 g + s, and row g + 8 is 7 g + 4 + s.
template <class T, int TILES, bool TURNED, int PAIRS>
__device__ __forceinline__ void project_dt(float (&z)[PAIRS][OWN][2], const char *staged,
                                           const u32 *fragments, const float *bias, int pair,
                                           int lane, int count) {
    // Lanes 0 to 7 name the rows of positions s, lanes 8 to 15 those of s + 4. Position 7 does not
    // exist, and its rows may be any memory.
    u32 rows = shared_address(staged + (lane & 7) * 16 + (lane & 8) * 64);
    float c[PAIRS][4][4];
#pragma unroll 8
    for (int k = 0; k < TILES; ++k) {
        u32 b[PAIRS];
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            b[j] = fragments[(2 * k + pair + j) * 32 + lane];
            if (TURNED) b[j] = transpose_tile(b[j]);
        }
        opaque(rows);  // one tile after the other: there are too few registers for more
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            u32 a0, a1;
            load_tiles(a0, a1, rows + s * 128);
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
                if (k) {
                    T::mma(c[j][s], a0, a1, b[j]);
                } else {
                    const float4 start = *(const float4 *)(bias + 8 * (lane & 3) + 4 * (pair + j));
                    const float biases[4] = {start.x, start.y, start.z, start.w};
                    T::mma(c[j][s], a0, a1, b[j], biases);
                }
            }
        }
        rows += UNIT_BYTES;
    }
#pragma unroll
    for (int j = 0; j < PAIRS; ++j)
#pragma unroll
        for (int i = 0; i < OWN; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) z[j][i][e] = c[j][i & 3][(i >> 2) * 2 + e];
    if (!LIKELY(count >= OWN))
#pragma unroll
        for (int j = 0; j < PAIRS; ++j)
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                if (i >= count) z[j][i][0] = z[j][i][1] = -1e4f;
}

// Returns where (B, C) of a lane's positions are, packed and 128 bytes apart. `column` is that of
// the staged row.
__device__ __forceinline__ const char *pairs_of(const char *staged, int column, int g) {
    return staged + (column >> 3) * UNIT_BYTES + g * 16 + (column & 7) * 2;
}

__device__ __forceinline__ void load_pairs(u32 (&pairs)[OWN], const char *staged, int column,
                                           int g) {
    const char *const from = pairs_of(staged, column, g);
#pragma unroll
    for (int i = 0; i < OWN; ++i) pairs[i] = *(const u32 *)(from + i * 128);
}

// Lane g has the map h -> P h + q over its positions. Combines it with the maps of up to `reach`
// lanes that come before it in time, which have a lower g, or with BACK a higher one.
template <bool BACK>
__device__ __forceinline__ void combine_lanes(float &P, float &q, int reach) {
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
        const float P2 = BACK ? __shfl_down_sync(ALL, P, 4 * d) : __shfl_up_sync(ALL, P, 4 * d);
        const float q2 = BACK ? __shfl_down_sync(ALL, q, 4 * d) : __shfl_up_sync(ALL, q, 4 * d);
        if (!BACK) {  // fewer instructions
            q += P * (d <= reach ? q2 : 0.f);
            P *= d <= reach ? P2 : 1.f;
        } else if (d <= reach) {  // fewer registers, which the backward wants
            q += P * q2;
            P *= P2;
        }
    }
}
