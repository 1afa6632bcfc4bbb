// Forward of ss2d_scan on half-precision maps. README.md has the mathematics and the layout.
//
// A block walks one axis (rows or columns) of one image; each of its warps has 16 channels and runs
// both directions of the axis, 64 positions at a time. Lane 4 g + t owns 8 consecutive positions
// (by g) of 4 channels (by t). dt_projs_weight * dt comes from the tensor cores in this layout:
// a row of a 16 x 8 tile may be any position, so row g is 8 g + s, and row g + 8 is 8 g + 4 + s.
//
// All is in base-2 logarithms: z = log2(e) (W dt + bias), l = log2(1 + 2^z) = delta / ln 2, the
// decay exp(delta A) is 2^(A l), and C takes the ln 2.
#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr u32 ALL = 0xffffffffu;

// Positions of a walk are counted along the axis; `Path` turns them into offsets in elements.
struct Path {
    int length, inner_length, inner, outer;  // outer: of the next row after the end of one
    u32 magic;                               // 2^32 / inner_length, rounded up; 0 for 1

    // `rest` is the place within the row.
    __device__ __forceinline__ int find(int i, int &rest) const {
        const int row = magic ? (int)__umulhi((u32)i, magic) : i;
        rest = i - row * inner_length;
        return row * outer + rest * inner;
    }
    __device__ __forceinline__ void next(int &offset, int &rest) const {
        offset += inner;
        if (++rest == inner_length) {
            rest = 0;
            offset += outer - inner_length * inner;
        }
    }
};

struct Params {
    const void *x;           // (B, H, W, D) by strides, channels adjacent
    const void *projected;   // (B, H * W, K, P): dt (R), then N pairs (B, C), then padding
    void *y_rows, *y_columns;  // (B, H, W, D), contiguous
    const u32 *fragments;    // (K, G, TILES, 2, 32): dt_projs_weight as the tensor cores take it
    const float *bias;       // (K, 16 G), in base 2
    const float *rates;      // (K, N, 16 G): A
    const float *skip;       // (16 G): the sum of D over the routes
    float *states;           // (B, K, chunks, N, D): the state that enters each chunk
    const float *entries;    // (B, K, spans, N, D): the state that enters each span, or null
    float *decays, *ends;    // (B, K, spans, N, D): of a span from a zero state, if SUMMARY
    long long stride_b, stride_h, stride_w;  // of x, in elements; within an image below 2^31
    int batch, dim, height, width, rank, state, routes, row;  // state: N, row: P
    int span, spans, chunks, vector, save, images;  // images: of a block
    u32 magic_height, magic_width;
};

__device__ __forceinline__ float softplus2(float z) {
    return fmaxf(z, 0.f) + lg2(1.f + ex2(-fabsf(z)));
}

__device__ __forceinline__ Path make_path(const Params &p, int axis, int stride_h, int stride_w) {
    Path path;
    path.length = p.height * p.width;
    path.inner_length = axis ? p.height : p.width;
    path.inner = axis ? stride_h : stride_w;
    path.outer = axis ? stride_w : stride_h;
    path.magic = axis ? p.magic_height : p.magic_width;
    return path;
}

// Stage `projected` of a chunk for directions from..to: 16-byte units by (direction, unit of the
// row, position % 8, position / 8), so that a row of ldmatrix's tile is next to the last one.
__device__ __forceinline__ void stage(const Params &p, char *buffer, const char *image, int axis,
                                      int chunk, int from, int to) {
    const Path path = make_path(p, axis, p.width, 1);
    const int units = p.row >> 3;
    const int position = threadIdx.x & 63, i = chunk * 64 + position;
    const bool valid = i < path.length;
    int rest;
    const int row = path.find(valid ? i : 0, rest);
    const char *source = image + ((long long)row * p.routes + axis) * p.row * 2;
    char *target = buffer + ((position & 7) * 8 + (position >> 3)) * 16;
    for (int j = from * units + (threadIdx.x >> 6); j < to * units; j += blockDim.x >> 6) {
        const int direction = j >= units, unit = j - direction * units;
        copy16(target + j * 1024, source + direction * p.row * 4 + unit * 16, valid);
    }
    commit_copies();
}

// One direction over a chunk. RUN adds to y; ADVANCE writes the state after the chunk to `carry`.
template <class T, int TILES, int STATE, bool BACK, bool RUN, bool ADVANCE, bool SUMMARY>
__device__ __forceinline__ void scan(
    const Params &p, const u32 *fragments, const float *bias, const char *staged, const float *rates,
    const float *enter, float *carry, float *decay, const u32 (&x)[8][2],
    int count, int lane, float (&y)[8][4]) {
    const int g = lane >> 2, t = lane & 3, units = p.row >> 3;
    staged += (BACK ? units : 0) * 64 * 16;

    const float4 bias4 = *(const float4 *)(bias + 4 * t);
    float l[8][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        float z[2][4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            z[0][c] = c & 1 ? bias4.y : bias4.x;
            z[1][c] = c & 1 ? bias4.w : bias4.z;
        }
        // Lanes 0 to 7 name the rows of positions s, 8 to 15 those of s + 4.
        const char *row = staged + ((s + 4 * (lane >> 3 & 1)) * 8 + (lane & 7)) * 16;
#pragma unroll
        for (int k = 0; k < TILES; ++k) {
            u32 a0, a1;
            load_tiles(a0, a1, row + k * 1024);
            T::mma(z[0], a0, a1, fragments[2 * k * 32 + lane]);
            T::mma(z[1], a0, a1, fragments[(2 * k + 1) * 32 + lane]);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            l[s + 4 * (c >> 1)][c & 1] = softplus2(z[0][c]);
            l[s + 4 * (c >> 1)][2 + (c & 1)] = softplus2(z[1][c]);
        }
    }
    if (count < 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i >= count)
#pragma unroll
                for (int c = 0; c < 4; ++c) l[i][c] = 0.f;
    }

    const int pairs = (p.rank + 1) & ~1;  // column of the first pair (B, C)
    const int states = STATE ? STATE : p.state;
#pragma unroll STATE ? STATE : 1
    for (int n = 0; n < states; ++n) {
        const int column = pairs + 2 * n;
        const char *pair = staged + ((column >> 3) * 64 + g) * 16 + (column & 7) * 2;
        float2 BC[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            BC[i] = T::unpack(*(const u32 *)(pair + i * 128));
            BC[i].y *= LN2;
        }
        const int own = n * 16 + 4 * t;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float rate = rates[own + c], entered = enter[own + c];
            float a[8], b[8], P = 1.f, h = 0.f;
#pragma unroll
            for (int o = 0; o < 8; ++o) {
                const int i = BACK ? 7 - o : o;
                const float2 pair2 = T::unpack(x[i][c >> 1]);
                a[i] = ex2(rate * l[i][c]);
                b[i] = l[i][c] * ((c & 1 ? pair2.y : pair2.x) * BC[i].x);
                P = o ? P * a[i] : a[i];
                h = o ? a[i] * h + b[i] : b[i];
            }
#pragma unroll
            for (int d = 1; d < 8; d *= 2) {
                const float P2 = BACK ? __shfl_down_sync(ALL, P, 4 * d)
                                      : __shfl_up_sync(ALL, P, 4 * d);
                const float h2 = BACK ? __shfl_down_sync(ALL, h, 4 * d)
                                      : __shfl_up_sync(ALL, h, 4 * d);
                if (BACK ? g + d < 8 : g >= d) {
                    h = P * h2 + h;
                    P *= P2;
                }
            }
            const float after = P * entered + h;
            if (RUN) {
                const float before = BACK ? __shfl_down_sync(ALL, after, 4)
                                          : __shfl_up_sync(ALL, after, 4);
                h = (BACK ? g == 7 : g == 0) ? entered : before;
#pragma unroll
                for (int o = 0; o < 8; ++o) {
                    const int i = BACK ? 7 - o : o;
                    h = a[i] * h + b[i];
                    y[i][c] += BC[i].y * h;
                }
            }
            if (ADVANCE) {
                __syncwarp();
                if (g == (BACK ? 0 : 7)) {
                    carry[own + c] = after;
                    if (SUMMARY) decay[own + c] *= P;
                }
                __syncwarp();
            }
        }
    }
}

template <class T, int TILES, int STATE, bool SUMMARY>
__global__ void __launch_bounds__(192, STATE ? 2 : 1) ss2d_scan_fwd(const Params p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int axes = p.routes == 1 ? 1 : 2;
    const int axis = blockIdx.z % axes, span = blockIdx.z / axes;
    const int groups = (p.dim + 15) >> 4, group = blockIdx.y * warps + warp;
    const int first_channel = group * 16, channel = first_channel + 4 * t;
    const bool active = group < groups, owns = channel < p.dim;
    const bool vector = p.vector;
    const int directions = p.routes == 4 ? 2 : 1;
    const int first = span * p.span, last = min(first + p.span, p.chunks);
    const int states = STATE ? STATE : p.state;
    const int length = p.height * p.width;

    extern __shared__ __align__(16) char shared[];
    const int buffer_bytes = directions * (p.row >> 3) * 1024;
    auto buffer = [&](int turn) { return shared + turn * buffer_bytes; };
    // Of a warp: for each direction bias, A and fragments; the state, and room for another.
    const int of_direction = 16 + states * 16 + TILES * 64;
    float *own = (float *)(shared + 2 * buffer_bytes)
                 + warp * (2 * of_direction + 2 * states * 16);
    float *carry = own + 2 * of_direction, *decay = carry + states * 16;
    if (active) {
        for (int d = 0; d < directions; ++d) {
            const int k = axis + 2 * d;
            float *to = own + d * of_direction;
            if (lane < 16) to[lane] = p.bias[(k * groups + group) * 16 + lane];
            for (int j = lane; j < states * 16; j += 32)
                to[16 + j] = p.rates[((k * states + (j >> 4)) * groups + group) * 16 + (j & 15)];
            for (int j = lane; j < TILES * 64; j += 32)
                ((u32 *)to)[16 + states * 16 + j]
                    = p.fragments[((long long)k * groups + group) * TILES * 64 + j];
        }
    }
    const float *const along = own, *const against = own + of_direction;
    auto fragments_of = [&](const float *d) { return (const u32 *)d + 16 + states * 16; };

    for (int b = blockIdx.x * p.images; b < min(p.batch, (int)(blockIdx.x + 1) * p.images); ++b) {
    const char *image = (const char *)p.projected + (long long)b * length * p.routes * p.row * 2;
    auto at_span = [&](int k) {
        return (((long long)b * p.routes + k) * p.spans + span) * states * p.dim;
    };
    auto at_chunk = [&](int k, int chunk) {
        return (((long long)b * p.routes + k) * p.chunks + chunk) * states * p.dim;
    };
    auto enter_span = [&](int k) {
        __syncwarp();
        for (int j = lane; j < states * 16; j += 32) {
            const int c = first_channel + (j & 15);
            carry[j] = p.entries && c < p.dim
                ? p.entries[at_span(k) + (long long)(j >> 4) * p.dim + c] : 0.f;
            if (SUMMARY) decay[j] = 1.f;
        }
        __syncwarp();
    };
    auto copy_out = [&](float *to, const float *from) {
        for (int j = lane; j < states * 16; j += 32) {
            const int c = first_channel + (j & 15);
            if (c < p.dim) to[(long long)(j >> 4) * p.dim + c] = from[j];
        }
    };

    const unsigned short *x = (const unsigned short *)p.x + b * p.stride_b + channel;
    u32 ahead[8][2], here[8][2];
    auto load_x = [&](int chunk) {
        const Path path = make_path(p, axis, (int)p.stride_h, (int)p.stride_w);
        const int start = chunk * 64 + 8 * g, count = owns ? length - start : 0;
        int rest, offset = path.find(start < length ? start : 0, rest);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            ahead[i][0] = ahead[i][1] = 0;
            if (i < count) {
                const unsigned short *at = x + offset;
                if (vector) {
                    const uint2 v = *(const uint2 *)at;
                    ahead[i][0] = v.x;
                    ahead[i][1] = v.y;
                } else {
                    u32 v[4];
#pragma unroll
                    for (int c = 0; c < 4; ++c) v[c] = channel + c < p.dim ? at[c] : 0;
                    ahead[i][0] = v[0] | v[1] << 16;
                    ahead[i][1] = v[2] | v[3] << 16;
                }
            }
            path.next(offset, rest);
        }
    };
    float y[8][4];

    // Against the axis: the states that enter the chunks (and for SUMMARY the span's).
    if (directions == 2) {
        enter_span(axis + 2);
        stage(p, buffer(0), image, axis, last - 1, 1, 2);
        load_x(last - 1);
        for (int chunk = last - 1; chunk >= first; --chunk) {
            const int turn = (last - 1 - chunk) & 1;
            wait_copies<0>();
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 8; ++i) here[i][0] = ahead[i][0], here[i][1] = ahead[i][1];
            if (chunk > first) {
                stage(p, buffer(turn ^ 1), image, axis, chunk - 1, 1, 2);
                load_x(chunk - 1);
            }
            if (!active) continue;
            if (!SUMMARY) copy_out(p.states + at_chunk(axis + 2, chunk), carry);
            if (SUMMARY || chunk > first)
                scan<T, TILES, STATE, true, false, true, SUMMARY>(
                    p, fragments_of(against), against, buffer(turn), against + 16, carry,
                    carry, decay, here, min(8, length - chunk * 64 - 8 * g), lane, y);
        }
        if (SUMMARY && active) {
            copy_out(p.ends + at_span(axis + 2), carry);
            copy_out(p.decays + at_span(axis + 2), decay);
        }
        __syncthreads();
    }

    // Along the axis, both directions.
    const int directions_now = SUMMARY ? 1 : directions;
    enter_span(axis);
    stage(p, buffer(0), image, axis, first, 0, directions_now);
    load_x(first);
    for (int chunk = first; chunk < last; ++chunk) {
        const int turn = (chunk - first) & 1;
        wait_copies<0>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; ++i) here[i][0] = ahead[i][0], here[i][1] = ahead[i][1];
        if (chunk + 1 < last) {
            stage(p, buffer(turn ^ 1), image, axis, chunk + 1, 0, directions_now);
            load_x(chunk + 1);
        }
        if (!active) continue;
        const int start = chunk * 64 + 8 * g, count = min(8, length - start);
        if (SUMMARY) {
            scan<T, TILES, STATE, false, false, true, SUMMARY>(
                p, fragments_of(along), along, buffer(turn), along + 16, carry, carry,
                decay, here, count, lane, y);
            continue;
        }
        if (p.save) copy_out(p.states + at_chunk(axis, chunk), carry);
        float4 skip = make_float4(0.f, 0.f, 0.f, 0.f);
        if (axis == 0) skip = *(const float4 *)(p.skip + channel);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float2 lo = T::unpack(here[i][0]), hi = T::unpack(here[i][1]);
            y[i][0] = lo.x * skip.x;
            y[i][1] = lo.y * skip.y;
            y[i][2] = hi.x * skip.z;
            y[i][3] = hi.y * skip.w;
        }
        scan<T, TILES, STATE, false, true, true, false>(
            p, fragments_of(along), along, buffer(turn), along + 16, carry, carry,
            decay, here, count, lane, y);
        if (directions == 2) {
            // What the first loop wrote; into shared memory, where `decay` is free.
            const float *from = p.states + at_chunk(axis + 2, chunk);
            __syncwarp();
            for (int j = lane; j < states * 16; j += 32) {
                const int c = first_channel + (j & 15);
                decay[j] = c < p.dim ? from[(long long)(j >> 4) * p.dim + c] : 0.f;
            }
            __syncwarp();
            scan<T, TILES, STATE, true, true, false, false>(
                p, fragments_of(against), against, buffer(turn), against + 16, decay,
                carry, decay, here, count, lane, y);
        }
        if (!owns) continue;
        unsigned short *out = (unsigned short *)(axis ? p.y_columns : p.y_rows)
                              + (long long)b * length * p.dim + channel;
        const Path path = make_path(p, axis, p.width * p.dim, p.dim);
        int rest, offset = path.find(start < length ? start : 0, rest);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < count) {
                unsigned short *at = out + offset;
                const u32 lo = T::pack(y[i][0], y[i][1]), hi = T::pack(y[i][2], y[i][3]);
                if (vector) {
                    *(uint2 *)at = make_uint2(lo, hi);
                } else {
                    at[0] = lo;
                    if (channel + 1 < p.dim) at[1] = lo >> 16;
                    if (channel + 2 < p.dim) at[2] = hi;
                    if (channel + 3 < p.dim) at[3] = hi >> 16;
                }
            }
            path.next(offset, rest);
        }
    }
    if (SUMMARY && active) {
        copy_out(p.ends + at_span(axis), carry);
        copy_out(p.decays + at_span(axis), decay);
    }
    __syncthreads();
    }
}
