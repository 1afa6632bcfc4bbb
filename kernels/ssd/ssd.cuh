// Tiles of the tensor cores for state space duality, the same for half precision and fp32, and the
// decays of a chunk. Needs sm_80.
//
// A chunk has Q positions in the order of time. A tile in shared memory has rows of elements of T
// and 16 bytes after each row, so that the rows of a matrix instruction lie in different banks.
#pragma once
#include "common/pairs.cuh"

constexpr int Q = 64, BLOCK = 16, BLOCKS = 4;  // positions of a chunk, of a block of it; blocks

template <class T, int COLUMNS> constexpr int PITCH = COLUMNS + VECTOR<T>;

// In bf16 one instruction multiplies both, by rounded factors. Those of fp16 may be below its
// range.
template <class T>
__device__ __forceinline__ Pair<T> scaled(Pair<T> v, float2 by) {
    if constexpr (same<T, BFloat>) {
        u32 product;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(product) : "r"(v), "r"(pack<T>(by.x, by.y)), "r"(0x80008000u));  // -0
        return product;
    } else {
        const float2 f = unpack<T>(v);
        return pack<T>(f.x * by.x, f.y * by.y);
    }
}

// --- matrix instructions ----------------------------------------------------------------------

// A 16 x 16 block of a tile as four 8 x 8 ones: (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15),
// (8-15, 8-15); the middle ones the other way round if SWAPPED. Lane 4 g + t has elements 2 t,
// 2 t + 1 of row g of each; of a transposed one, of column g. What a factor needs is then in
// adjacent registers: all four of a first factor (rows x k) from a tile of its rows, or from a tile
// of k, TRANSPOSED and SWAPPED; of a second one (k x columns) the first two for columns 0-7 and the
// others for 8-15, from a tile of k, TRANSPOSED, or from a tile of its columns, SWAPPED.
template <class T>
struct Block16 {
    Pair<T> v[4];

    template <bool TRANSPOSED, bool SWAPPED = false>
    __device__ __forceinline__ void load(const Element<T> *at, int pitch) {
        const int lane = threadIdx.x & 31;
        if constexpr (same<T, Float>) {
            const int g = lane >> 2, t = lane & 3;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int down = SWAPPED ? i >> 1 : i & 1, right = SWAPPED ? i & 1 : i >> 1;
                const Element<T> *const from = at + down * 8 * pitch + right * 8;
                if (TRANSPOSED)
                    v[i] = make_float2(from[2 * t * pitch + g], from[(2 * t + 1) * pitch + g]);
                else
                    v[i] = *(const float2 *)(from + g * pitch + 2 * t);
            }
        } else {
            const int down = SWAPPED ? (lane & 7) + (lane >> 4) * 8 : lane & 15;
            const int right = SWAPPED ? lane & 8 : (lane >> 4) * 8;
            const u32 row = shared_address(at + down * pitch + right);
            if (TRANSPOSED)
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 "
                             "{%0, %1, %2, %3}, [%4];"
                             : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row));
            else
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row));
        }
    }
};

// c += a b in halves: a is 16 x 16, b is 16 x 8.
#define MULTIPLY(TYPE, NAME)                                                                      \
    __device__ __forceinline__ void multiply_halves(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, \
                                                    u32 b0, u32 b1, TYPE) {                       \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "      \
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                   \
            : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                      \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),         \
              "f"(c[2]), "f"(c[3]));                                                              \
    }
MULTIPLY(Half, "f16")
MULTIPLY(BFloat, "bf16")

__device__ __forceinline__ void multiply_tf32(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                              u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
}

constexpr u32 SEEN = 0xffffe000u;  // of an fp32 number, by the tensor cores

__device__ __forceinline__ u32 rounded(float f) { return __float_as_uint(f) + 0x1000u; }
// To the nearest: so what is left has either sign, and what products of it lack does not add up. A
// NaN may lose its place here, which the lower part then has.
__device__ __forceinline__ u32 upper(float f) { return rounded(f) & SEEN; }
__device__ __forceinline__ u32 lower(float f) {
    return __float_as_uint(f - __uint_as_float(upper(f)));
}

// c += a b, where a is 16 x 8 and b is 8 x 8, in registers as in a Block16. fp32 numbers are
// rounded to TF32 if FAST, else each is the sum of two, whose product lacks only the last bits.
template <class T, bool FAST>
__device__ __forceinline__ void multiply_half(float (&c)[4], Pair<T> top, Pair<T> bottom,
                                              Pair<T> right) {
    if constexpr (!same<T, Float>) {
        T::mma(c, top, bottom, right);
    // In which order k runs is the same for the product: a pair is k = t and k = t + 4.
    } else if constexpr (FAST) {
        multiply_tf32(c, rounded(top.x), rounded(bottom.x), rounded(top.y), rounded(bottom.y),
                      rounded(right.x), rounded(right.y));
    } else {
        multiply_tf32(c, lower(top.x), lower(bottom.x), lower(top.y), lower(bottom.y),
                      upper(right.x), upper(right.y));
        multiply_tf32(c, upper(top.x), upper(bottom.x), upper(top.y), upper(bottom.y),
                      lower(right.x), lower(right.y));
        multiply_tf32(c, upper(top.x), upper(bottom.x), upper(top.y), upper(bottom.y),
                      upper(right.x), upper(right.y));
    }
}

// The same with 16 in place of 8 in the middle.
template <class T, bool FAST>
__device__ __forceinline__ void multiply(float (&c)[4], Pair<T> a0, Pair<T> a1, Pair<T> a2,
                                         Pair<T> a3, Pair<T> b0, Pair<T> b1) {
    if constexpr (!same<T, Float>) {
        multiply_halves(c, a0, a1, a2, a3, b0, b1, T{});
    } else {
        multiply_half<T, FAST>(c, a0, a1, b0);
        multiply_half<T, FAST>(c, a2, a3, b1);
    }
}

// The same for sums over all tokens. The tensor cores cut their sums off and do not round them, so
// that long ones drift towards zero by more than other fp32: these are added outside of them.
template <class T, bool FAST>
__device__ __forceinline__ void multiply_rounded(float (&c)[4], Pair<T> a0, Pair<T> a1, Pair<T> a2,
                                                 Pair<T> a3, Pair<T> b0, Pair<T> b1) {
    if constexpr (same<T, Float> && !FAST) {
        float sum[4] = {};
        multiply<T, FAST>(sum, a0, a1, a2, a3, b0, b1);
#pragma unroll
        for (int e = 0; e < 4; ++e) c[e] += sum[e];
    } else {
        multiply<T, FAST>(c, a0, a1, a2, a3, b0, b1);
    }
}

// sums += a b of 16 x 16 blocks.
template <class T, bool FAST>
__device__ __forceinline__ void multiply_blocks(float (&sums)[2][4], const Block16<T> &a,
                                                const Block16<T> &b) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
        multiply<T, FAST>(sums[m], a.v[0], a.v[1], a.v[2], a.v[3], b.v[2 * m], b.v[2 * m + 1]);
}

// sums += a b^T of 16 x 16 blocks at `left` and `right`.
template <class T, bool FAST>
__device__ __forceinline__ void multiply_rows(float (&sums)[2][4], const Element<T> *left,
                                              int left_pitch, const Element<T> *right,
                                              int right_pitch) {
    Block16<T> a, b;
    a.template load<false>(left, left_pitch);
    b.template load<false, true>(right, right_pitch);
    multiply_blocks<T, FAST>(sums, a, b);
}

// --- memory -----------------------------------------------------------------------------------

// A map (batch, length, heads, ...) in elements; the last dimension has no gaps.
struct Map {
    void *data;
    long long b;
    int l, h;
};

// Where the positions of a sequence are, in the order of time.
struct Time {
    int length, reverse;
    __device__ __forceinline__ long long operator()(int i) const {
        return reverse ? length - 1 - i : i;
    }
    __device__ __forceinline__ int step(int stride) const { return reverse ? -stride : stride; }
};

// Copies the rows of one chunk after the other to tiles COUNT x COLUMNS. A thread has the same
// column of all of its rows.
template <class T, int COLUMNS, int THREADS, int COUNT = Q>
struct Rows {
    static constexpr int V = VECTOR<T>, ROW = COLUMNS / V;
    static constexpr int PARTS = ROW > THREADS ? ROW / THREADS : 1;
    static constexpr int STEP = THREADS / ROW > COUNT ? COUNT
        : THREADS / ROW > 0 ? THREADS / ROW : 1;
    const Element<T> *from;
    int step, row, column;

    // From position `start` of a sequence at `sequence` on.
    __device__ __forceinline__ Rows(const Element<T> *sequence, int stride, Time time, int start,
                                    int thread = threadIdx.x)
        : step(time.step(stride)), row(thread / ROW), column(thread % ROW * V) {
        from = sequence + time(start + row) * stride + column;
    }

    // The next `rows` rows of `columns` elements, with zeros around them, and on by `chunk` chunks.
    __device__ __forceinline__ void copy(Element<T> *tile, int rows, int columns, int chunk = 1) {
        Element<T> *const to = tile + row * PITCH<T, COLUMNS> + column;
        if (THREADS < ROW || THREADS == STEP * ROW || row < STEP) {
            if (rows == COUNT && columns == COLUMNS) {
#pragma unroll
                for (int i = 0; i < COUNT; i += STEP)
#pragma unroll
                    for (int k = 0; k < PARTS && (COUNT % STEP == 0 || row + i < COUNT); ++k)
                        copy16(to + i * PITCH<T, COLUMNS> + k * THREADS * V,
                               from + (long long)i * step + k * THREADS * V, true);
            } else {
#pragma unroll 1
                for (int i = 0; i < COUNT; i += STEP)
                    for (int k = 0; k < PARTS && (COUNT % STEP == 0 || row + i < COUNT); ++k) {
                        const bool valid = row + i < rows && column + k * THREADS * V < columns;
                        copy16(to + i * PITCH<T, COLUMNS> + k * THREADS * V,
                               valid ? from + (long long)i * step + k * THREADS * V : from, valid);
                    }
            }
        }
        from += (long long)chunk * COUNT * step;
    }
};

// Blocks of so many threads, of which `live` are to be on a multiprocessor.
__device__ constexpr int live_blocks(int threads, int live) {
    return live > threads ? live / threads : 1;
}

// --- decays -----------------------------------------------------------------------------------

// What a head multiplies by in a chunk. Sums of logarithms are in base 2, and do not go beyond a
// block, so that what is beyond it costs no digits. WITH_STEP says whether `column` and `leave`
// have dt in them.
struct Decays {
    float dt[Q];      // after bias, softplus and limits; 0 beyond the sequence
    float sum[Q];     // of the logarithms in the block up to this position and with it
    float row[Q];     // the decay from the end of the block before to this position
    float enter[Q];   // the decay from the chunk's start to this position
    float column[Q];  // the decay from this position to the end of its block
    float leave[Q];   // the decay from this position to the chunk's end
    float segment[Q];      // how often the state has restarted in the block
    float totals[BLOCKS];           // of the logarithms of each block
    float between[BLOCKS][BLOCKS];  // [r][b]: the decay through the blocks between b and r
    float through;                  // the decay of the chunk
    int packed, unused[2];          // whether the state may restart
};

// How dt is made from the raw values. The state restarts where `index` (batch, length) changes; it
// is null for one sequence.
struct Steps {
    const void *A, *bias;
    const int *index;
    int A_type, bias_type, dt_type, softplus;
    float low, high;
};

// The raw values of the two positions of a lane as they are in memory, 0 beyond a sequence, their
// indices, and the index of the position before the first one: nothing waits for a load before
// make_decays takes them.
struct RawSteps {
    u32 dt[2];
    int index[2], before;
};

// `index` is that of the sample, or null.
__device__ __forceinline__ RawSteps load_steps(const void *from, long long base, int stride,
                                               int type, const int *index, Time time, int start,
                                               int rows) {
    RawSteps raw = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int i = 2 * (threadIdx.x & 31) + e;
        if (i >= rows) continue;
        const long long at = time(start + i);
        if (type == 0) raw.dt[e] = ((const u32 *)from)[base + at * stride];
        else raw.dt[e] = ((const unsigned short *)from)[base + at * stride];
        if (index) raw.index[e] = index[at];
    }
    if (index && start > 0 && rows > 0) raw.before = index[time(start - 1)];
    return raw;
}

__device__ __forceinline__ float raw_step(u32 bits, int type) {
    if (type == 0) return __uint_as_float(bits);
    return type == 1 ? Half::unpack(bits).x : BFloat::unpack(bits).x;
}

__device__ __forceinline__ float step_of(float raw, const Steps &p, bool valid) {
    const float v = p.softplus ? precise_softplus2<Float>(raw * LOG2E) * LN2 : raw;
    // NaN stays NaN.
    return !valid ? 0.f : v < p.low ? p.low : v > p.high ? p.high : v;
}

constexpr float NOTHING = -1e30f;  // the logarithm of 0, also where others are added

// Less is 0 as a decay, and what is added to it need not be rounded so coarsely. NaN stays NaN.
__device__ __forceinline__ float log_decay(float a) { return a < -150.f ? -150.f : a; }

// Called by a warp, whose lanes have two positions each. `rate` is A log2(e).
template <bool WITH_STEP>
__device__ __forceinline__ void make_decays(Decays &d, const RawSteps &raw, float bias, float rate,
                                            const Steps &p, int rows) {
    const int lane = threadIdx.x & 31, in_block = lane & 7, i = 2 * lane;
    const float dt0 = step_of(raw_step(raw.dt[0], p.dt_type) + bias, p, i < rows);
    const float dt1 = step_of(raw_step(raw.dt[1], p.dt_type) + bias, p, i + 1 < rows);
    const float a0 = log_decay(dt0 * rate), a1 = log_decay(dt1 * rate);
    float sum1 = a0 + a1, rest = sum1;  // of a block, which 8 lanes have, up to and from a lane
#pragma unroll
    for (int by = 1; by < 8; by <<= 1) {
        const float before = __shfl_up_sync(0xffffffffu, sum1, by);
        const float after = __shfl_down_sync(0xffffffffu, rest, by);
        if (in_block >= by) sum1 += before;
        if (in_block + by < 8) rest += after;
    }
    const float before = __shfl_up_sync(0xffffffffu, sum1, 1);
    const float after = __shfl_down_sync(0xffffffffu, rest, 1);
    float sum0 = a0 + (in_block == 0 ? 0.f : before), own = sum1;
    float rest1 = in_block == 7 ? 0.f : after, rest0 = rest1 + a1;
    // Up to a position, and from it to the end of the block; these are nothing past a restart.
    float up0 = sum0, up1 = sum1;
    if (p.index) {
        int before = __shfl_up_sync(0xffffffffu, raw.index[1], 1);
        if (lane == 0) before = raw.before;
        const bool restarts = i + 1 < rows && raw.index[1] != raw.index[0];
        float count1 = (i < rows && raw.index[0] != before ? 1.f : 0.f) + (restarts ? 1.f : 0.f);
#pragma unroll
        for (int by = 1; by < 8; by <<= 1) {
            const float ahead = __shfl_up_sync(0xffffffffu, count1, by);
            if (in_block >= by) count1 += ahead;
        }
        const float count0 = count1 - (restarts ? 1.f : 0.f);
        const float all = __shfl_sync(0xffffffffu, count1, lane | 7);
        *(float2 *)(d.segment + i) = make_float2(count0, count1);
        if (count0 > 0.f) up0 = NOTHING;
        if (count1 > 0.f) up1 = NOTHING;
        if (all > 0.f) own = NOTHING;
        if (all > count0) rest0 = NOTHING;
        if (all > count1) rest1 = NOTHING;
    }
    // Blocks before, after, all; and between the row and the column that a lane has of `between`.
    float ahead = 0.f, beyond = 0.f, total = 0.f, between = 0.f;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        const float of_block = __shfl_sync(0xffffffffu, own, 8 * b + 7);
        if (b < lane >> 3) ahead += of_block;
        if (b > lane >> 3) beyond += of_block;
        if (lane == b) d.totals[b] = of_block;
        if (b > (lane & 3) && b < (lane >> 2 & 3)) between += of_block;
        total += of_block;
    }
    *(float2 *)(d.dt + i) = make_float2(dt0, dt1);
    *(float2 *)(d.sum + i) = make_float2(sum0, sum1);
    *(float2 *)(d.row + i) = make_float2(ex2(up0), ex2(up1));
    *(float2 *)(d.enter + i) = make_float2(ex2(ahead + up0), ex2(ahead + up1));
    *(float2 *)(d.column + i) = make_float2(ex2(rest0) * (WITH_STEP ? dt0 : 1.f),
                                            ex2(rest1) * (WITH_STEP ? dt1 : 1.f));
    *(float2 *)(d.leave + i) = make_float2(ex2(rest0 + beyond) * (WITH_STEP ? dt0 : 1.f),
                                           ex2(rest1 + beyond) * (WITH_STEP ? dt1 : 1.f));
    if (lane < BLOCKS * BLOCKS) d.between[lane >> 2][lane & 3] = ex2(between);
    if (lane == 0) d.through = ex2(total), d.packed = p.index != nullptr;
}

// Multiplies by the decay from position j to position i, and WITH_STEP by dt of j, the eight
// elements that a lane has of a block of rows r and columns b: (row g + 8 k, column 8 n + 2 t + e)
// is v[n][2 k + e]. Below the diagonal the decay has three factors of at most 1, so that no
// exponential is needed for each element. On the diagonal elements become 0 where j > i.
template <bool WITH_STEP>
__device__ __forceinline__ void decay_block(float (&v)[2][4], const Decays &d, int r, int b) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int i = BLOCK * r + g, j = BLOCK * b + 2 * t;
    if (b < r) {
        const float between = d.between[r][b];
        const float upper = between * d.row[i], lower = between * d.row[i + 8];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 column = *(const float2 *)(d.column + j + 8 * n);
            v[n][0] *= upper * column.x, v[n][1] *= upper * column.y;
            v[n][2] *= lower * column.x, v[n][3] *= lower * column.y;
        }
    } else {
        const float upper = d.sum[i], lower = d.sum[i + 8];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 sum = *(const float2 *)(d.sum + j + 8 * n);
            const int column = 8 * n + 2 * t;
            if (WITH_STEP) {
                const float2 dt = *(const float2 *)(d.dt + j + 8 * n);
                v[n][0] *= dt.x, v[n][1] *= dt.y, v[n][2] *= dt.x, v[n][3] *= dt.y;
            }
            v[n][0] = column <= g ? ex2(upper - sum.x) * v[n][0] : 0.f;
            v[n][1] = column < g ? ex2(upper - sum.y) * v[n][1] : 0.f;
            v[n][2] = column <= g + 8 ? ex2(lower - sum.x) * v[n][2] : 0.f;
            v[n][3] = column < g + 8 ? ex2(lower - sum.y) * v[n][3] : 0.f;
        }
        if (!d.packed) return;
        const float of_upper = d.segment[i], of_lower = d.segment[i + 8];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 of = *(const float2 *)(d.segment + j + 8 * n);
            if (of.x != of_upper) v[n][0] = 0.f;
            if (of.y != of_upper) v[n][1] = 0.f;
            if (of.x != of_lower) v[n][2] = 0.f;
            if (of.y != of_lower) v[n][3] = 0.f;
        }
    }
}

// --- the blocks of a triangle -------------------------------------------------------------------

// The ten blocks on and below the diagonal of Q x Q, two bits for the row and the column of each,
// in an order in which warps that take every third, fourth or seventh have about equally much to
// do: blocks on the diagonal take longer.
struct Triangle {
    static constexpr int COUNT = 10;
    static __device__ __forceinline__ int row(int i) { return 0x6bed3 >> 2 * i & 3; }
    static __device__ __forceinline__ int column(int i) { return 0x13a50 >> 2 * i & 3; }
};

// Stores the elements that a lane has of a block, as for decay_block.
template <class T>
__device__ __forceinline__ void store_block(Element<T> *at, int pitch, const float (&v)[2][4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        Element<T> *const to = at + g * pitch + 8 * n + 2 * t;
        *(Pair<T> *)to = pack<T>(v[n][0], v[n][1]);
        *(Pair<T> *)(to + 8 * pitch) = pack<T>(v[n][2], v[n][3]);
    }
}
