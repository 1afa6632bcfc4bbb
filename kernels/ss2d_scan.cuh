// What the forward and the backward of ss2d_scan share. README.md has the mathematics and the
// layout. The images of the batch are one sequence, cut into slots of 7 positions, so that a slot is
// of one image. A warp has 16 channels and takes a chunk of 8 slots at a time: lane 4 g + t owns the
// positions of slot g and the channels 4 t .. 4 t + 3.
#include "common.cuh"

constexpr int OWN = 7, CHUNK = 8 * OWN;
constexpr u32 ALL = 0xffffffffu;
constexpr int UNIT_BYTES = CHUNK * 16;  // of 8 staged columns, for a chunk
constexpr int PAD_BYTES = 128;          // after the last one, see project_dt
constexpr int MAP_BYTES = CHUNK * 32;   // of a warp's channels, for a chunk

// The pixels of a route in the order of its scan.
struct Path {
    int inner_length, inner, outer, origin;
    int jump;   // from the end of a row to the next one
    u32 magic;  // 2^32 / inner_length, rounded up; 0 for 1, where all is in one row

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
    int aligned;                     // whether rows and columns are multiples of 7 long
    u32 magic_height, magic_width, magic_slots;
};

// A position of a slot, its first if nothing else is said: the image, the slot's number there, the
// pixel, and how many there are from it to the end of the row. Beyond the batch the slot's number is
// so high that the image has ended long before.
struct Place {
    int image, slot, pixel, wrap;

    // The position of the slot's first in the image's scan.
    __device__ __forceinline__ int start() const { return slot * OWN; }
};

__device__ __forceinline__ void locate(const Scan &p, const Path &path, Place &place, int i) {
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

__device__ __forceinline__ Place find_place(const Scan &p, const Path &path, int slot, int i = 0) {
    Place place;
    place.image = p.magic_slots ? (int)__umulhi((u32)slot, p.magic_slots) : slot;
    place.slot = slot - place.image * p.slots;
    if (place.slot < 0) {  // the product is one too high at most
        --place.image;
        place.slot += p.slots;
    }
    locate(p, path, place, i);
    return place;
}

// To the next slot, as find_place does for its first position.
__device__ __forceinline__ void advance(const Scan &p, const Path &path, Place &place) {
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
    if (path.inner_length == 1) path.inner = path.outer;
    path.jump = path.outer - path.inner_length * path.inner;
    return path;
}

// Stages `projected` of a chunk: 16-byte units by (unit of the row, position of the slot, slot), so
// that the rows of a tensor-core tile are next to one another. A thread has one position; it takes
// two warps.
struct Stager {
    int g, i, unit, step;

    // Of the threads that stage together, this one's number and how many there are.
    __device__ __forceinline__ Stager(u32 thread, u32 threads) {
        const int position = thread % CHUNK;
        g = position / OWN, i = position % OWN;
        unit = thread / CHUNK, step = threads / CHUNK;
        if (unit >= step) unit = 1 << 20;  // nothing to do
    }

    // `place` is of position i of slot g.
    __device__ __forceinline__ void stage(const Scan &p, const Place &place, char *to,
                                          int route) const {
        const int units = p.row >> 3;
        if (unit >= units) return;
        const int length = p.height * p.width;
        const char *from = (const char *)p.projected + ((long long)place.image * length
              + place.pixel) * (p.routes * p.row * 2) + (route * p.row + unit * 8) * 2;
        to += ((unit * OWN + i) * 8 + g) * 16;
#pragma unroll 1
        for (int u = unit; u < units; u += step) {
            copy16(to, from, place.start() + i < length);
            to += step * UNIT_BYTES;
            from += step * 16;
        }
    }
};

__device__ __forceinline__ float element(const float4 &v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Whether no row ends within a slot of the warp; asked of all lanes, or those of one kind would wait
// for those of the other.
__device__ __forceinline__ bool is_straight(const Scan &p, const Place &place) {
    return p.aligned || __all_sync(ALL, place.wrap >= OWN);
}

// Calls f(i, pixel) for the positions of a slot, where all rows are 7 long or more, so that at most
// one ends here; ALIGNED: whether none does.
template <bool ALIGNED, class F>
__device__ __forceinline__ void for_pixels(const Path &path, const Place &place, F f) {
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        f(i, place.pixel + i * path.inner + (ALIGNED || i < place.wrap ? 0 : path.jump));
}

// A lane's own 7 x 4 elements of a map, zeros beyond the end: take(i, pointer) for 8 aligned bytes
// within the map, put(i, value) else.
template <class Take, class Put>
__device__ __forceinline__ void read_map(const Scan &p, const Path &path, const Map &map,
                                         const Place &place, int channel, Take take, Put put) {
    const int count = channel < p.dim ? p.height * p.width - place.start() : 0;
    const unsigned short *base = (const unsigned short *)map.data + place.image * map.stride_b
          + (long long)channel * map.stride_d;
    auto at = [&](int i, int pixel) { take(i, base + pixel * map.stride_pixel); };
    const bool straight = is_straight(p, place);
    if (map.vector && count >= OWN && path.inner_length >= OWN) {
        if (straight) for_pixels<true>(path, place, at);
        else for_pixels<false>(path, place, at);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < OWN; ++i) {
        u32 v[4] = {};
        if (i < count) {
            const unsigned short *from = base + path.find(place.start() + i) * map.stride_pixel;
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (channel + c < p.dim) v[c] = from[(long long)c * map.stride_d];
        }
        put(i, make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16));
    }
}

// Map number `number` of (maps, B, H, W, D).
__device__ __forceinline__ Map map_of(const Scan &p, void *maps, int number) {
    const long long image = (long long)p.height * p.width * p.dim;
    return {(unsigned short *)maps + number * p.batch * image, image, p.dim, 1, (p.dim & 3) == 0, 0};
}

// Writes a lane's elements, get(i) for each position, to such a map, or adds them to what is there.
template <class T, class Get>
__device__ __forceinline__ void write_map(const Scan &p, const Path &path, const Map &map,
                                          Get get, const Place &place, int channel, bool adds) {
    const int count = channel < p.dim ? p.height * p.width - place.start() : 0;
    unsigned short *const out = (unsigned short *)map.data + place.image * map.stride_b + channel;
    auto put = [&](int i, int pixel) { *(uint2 *)(out + pixel * p.dim) = get(i); };
    auto add = [&](int i, int pixel) { T::add(out + pixel * p.dim, get(i)); };
    const bool straight = is_straight(p, place);
    if (map.vector && count >= OWN && path.inner_length >= OWN) {
        if (straight && adds) for_pixels<true>(path, place, add);
        else if (straight) for_pixels<true>(path, place, put);
        else if (adds) for_pixels<false>(path, place, add);
        else for_pixels<false>(path, place, put);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < min(count, OWN); ++i) {
        const int pixel = path.find(place.start() + i);
        if (map.vector) {  // an addition to two bytes alone is a loop
            if (adds) add(i, pixel);
            else put(i, pixel);
            continue;
        }
        unsigned short *const to = out + pixel * p.dim;
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

// A lane's own elements of a map, to its place in the warp's shared memory.
__device__ __forceinline__ void copy_map(const Scan &p, const Path &path, const Map &map,
                                         const Place &place, int channel, char *memory, int lane) {
    char *const to = memory + lane * 8;
    read_map(p, path, map, place, channel,
             [&](int i, const unsigned short *from) { copy8(to + i * 256, from); },
             [&](int i, uint2 v) { *(uint2 *)(to + i * 256) = v; });
}

// What a warp needs of the parameters of a route, in its shared memory: the fragments, and of its 16
// channels bias and rate.
template <int TILES>
struct Weights {
    static constexpr int BYTES = TILES * 256 + 128;
    const u32 *fragments;
    const float *bias, *rates;

    __device__ __forceinline__ Weights(const char *memory)
        : fragments((const u32 *)memory), bias((const float *)(memory + TILES * 256)),
          rates(bias + 16) {}

    static __device__ __forceinline__ void load(const Scan &p, char *memory, int route, int group,
                                                int lane) {
        const int at = route * ((p.dim + 15) >> 4) + group;
        u32 *const fragments = (u32 *)memory;
        for (int j = lane; j < TILES * 64; j += 32)
            fragments[j] = p.fragments[(long long)at * TILES * 64 + j];
        ((float *)(fragments + TILES * 64))[lane] = (lane < 16 ? p.bias : p.rates)[at * 16 + lane % 16];
    }
};

// The states of a lane's channels that enter a chunk, to what is kept of them: (K, chunks, D).
__device__ __forceinline__ void keep_states(const Scan &p, float *states, int route, int chunk,
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

// z = log2(e) (W dt + bias) of a lane's positions and of its channels 2 pair, 2 pair + 1; far below
// zero beyond the end, so that nothing happens there. A row of a 16 x 8 tile may be any position:
// row g is 7 g + s, and row g + 8 is 7 g + 4 + s.
template <class T, int TILES, bool TURNED>
__device__ __forceinline__ void project_dt(float (&z)[OWN][2], const char *staged,
                                           const u32 *fragments, const float *bias, int pair,
                                           int lane, int count) {
    const float2 start = *(const float2 *)(bias + 4 * (lane & 3) + 2 * pair);
    const float biases[4] = {start.x, start.y, start.x, start.y};
    // Lanes 0 to 7 name the rows of positions s, 8 to 15 those of s + 4: of 7, which there is not,
    // any memory.
    u32 rows = shared_address(staged + (lane & 7) * 16 + (lane & 8) * 64);
    float c[4][4];
#pragma unroll 8
    for (int k = 0; k < TILES; ++k) {
        u32 fragment = fragments[(2 * k + pair) * 32 + lane];
        if (TURNED) fragment = transpose_tile(fragment);
        asm volatile("" : "+r"(rows));  // one tile after the other, for want of registers
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            u32 a0, a1;
            load_tiles(a0, a1, rows + s * 128);
            if (k) T::mma(c[s], a0, a1, fragment);
            else T::mma(c[s], a0, a1, fragment, biases);
        }
        rows += UNIT_BYTES;
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) z[i][e] = c[i & 3][(i >> 2) * 2 + e];
    if (count < OWN)
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if (i >= count) z[i][0] = z[i][1] = -1e4f;
}

// Where (B, C) of a lane's positions are, packed, 128 bytes apart; column: of the staged row.
__device__ __forceinline__ const char *pairs_of(const char *staged, int column, int g) {
    return staged + (column >> 3) * UNIT_BYTES + g * 16 + (column & 7) * 2;
}

__device__ __forceinline__ void load_pairs(u32 (&pairs)[OWN], const char *staged, int column,
                                           int g) {
    const char *const from = pairs_of(staged, column, g);
#pragma unroll
    for (int i = 0; i < OWN; ++i) pairs[i] = *(const u32 *)(from + i * 128);
}

// Lane g has the map h -> P h + q over its positions; combine it with those of up to `reach` lanes
// that come before it in time: lower g, or higher if BACK.
template <bool BACK>
__device__ __forceinline__ void combine_lanes(float &P, float &q, int reach) {
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
        const float P2 = BACK ? __shfl_down_sync(ALL, P, 4 * d) : __shfl_up_sync(ALL, P, 4 * d);
        const float q2 = BACK ? __shfl_down_sync(ALL, q, 4 * d) : __shfl_up_sync(ALL, q, 4 * d);
        if (d <= reach) {
            q = P * q2 + q;
            P *= P2;
        }
    }
}
