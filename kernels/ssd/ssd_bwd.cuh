// What ssd_bwd.cu keeps in shared memory, and the steps of a head.
#pragma once
#include "ssd/ssd.cuh"

struct Backward {
    Map x, dy, dt, B, C, dx, ddt, dB, dC;
    Steps step;
    const void *D, *states, *grad_states;  // of states null if all are zeros, for N <= 64
    float *BC_parts;    // (2, splits, batch, length, groups, state) in place of dB and dC, or null
    float *head_parts;  // by A and by the bias (2, batch, chunks, heads)
    float *D_parts;     // (batch, chunks, heads, dim), null without D
    int D_type, D_full;
    int batch, length, heads, per_group, groups, dim, state, chunks, splits, per_split, reverse;
};

template <class T, int P, int N>
struct BackwardShared {
    static constexpr int SLICES = N / BLOCK;  // of N; a warp has one, or a part of its positions
    static constexpr int PARTS = SLICES < 4 ? 4 / SLICES : 1, WARPS = SLICES * PARTS;
    // Turns of the warps with blocks of pairs, and those whose sums are in registers.
    static constexpr int TURNS = (Triangle::COUNT + WARPS - 1) / WARPS;
    static constexpr int KEPT = N == 32 || N == 64 ? TURNS : 1;
    static constexpr int OTHERS = Triangle::COUNT - KEPT * WARPS;
    Element<T> B[Q * PITCH<T, N>], C[Q * PITCH<T, N>];
    Element<T> x[Q * PITCH<T, P>], dy[Q * PITCH<T, P>];
    Element<T> state[P * PITCH<T, N>], grad_state[P * PITCH<T, N>];
    // Blocks on and below the diagonal: the weights of x in y, at the end the gradients by C B^T;
    // and C B^T, in the places of blocks above it, and beside it, divided by `scales` of [r][b].
    Element<T> pairs[Q * PITCH<T, Q>], diagonal[BLOCK * PITCH<T, Q>];
    float scales[BLOCKS][BLOCKS];
    // Sums over heads of the gradients by C B^T, of the blocks for which there are no registers.
    float4 sums[OTHERS > 0 ? OTHERS : 1][2][32];
    Decays decays;
    // What passes from position j to position i, summed over j in block b of [b][i], over i in
    // block r of [r][j] (without dt), over both, and over the pairs of a block that a position is
    // between.
    float rows[BLOCKS][Q], columns[BLOCKS][Q], blocks[BLOCKS][BLOCKS], within[Q];
    float reads[SLICES][Q], leaves[SLICES][Q];  // what passes from and to the states
    float steps[Q];                             // raw dt with the bias
    float dots[WARPS], largest[WARPS];

    __device__ __forceinline__ Element<T> *weights(int r, int b) {
        return pairs + BLOCK * r * PITCH<T, Q> + BLOCK * b;
    }
    __device__ __forceinline__ Element<T> *products(int r, int b) {
        return r == b ? diagonal + BLOCK * b : weights(b, r);
    }
};

__device__ __forceinline__ float sum_over_rows(float v) {  // lanes with the same columns
    v += __shfl_xor_sync(0xffffffffu, v, 4);
    v += __shfl_xor_sync(0xffffffffu, v, 8);
    return v + __shfl_xor_sync(0xffffffffu, v, 16);
}

// For each column of a block on the diagonal, the sum over elements of rows at or below it and
// columns before it: the pairs whose decay has that of the column's position in it.
__device__ __forceinline__ void sum_within(float *to, const float (&v)[2][4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    float sums[2][2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        float ahead = 0.f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float sum = v[n][2 * k] + v[n][2 * k + 1];
#pragma unroll
            for (int by = 1; by < 4; by <<= 1) {
                const float before = __shfl_up_sync(0xffffffffu, sum, by);
                if (t >= by) sum += before;
            }
            const float up = __shfl_up_sync(0xffffffffu, sum, 1);
            const float before = ahead + (t > 0 ? up : 0.f);
            const int row = g + 8 * k, column = 8 * n + 2 * t;
            if (row >= column) sums[n][0] += before;
            if (row > column) sums[n][1] += before + v[n][2 * k];
            ahead = __shfl_sync(0xffffffffu, sum, lane | 3);
        }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float sum = sum_over_rows(sums[n][e]);
            if (g == 0) to[8 * n + 2 * t + e] = sum;
        }
}

// What a block of pairs, row i and column j, does in a head: `products` are those of C_i and B_j, and
// become the weights of x_j in y_i; `grads` are those of dy_i and x_j, and become the gradients by the
// products; `passed` is what passes from j to i. Its sums are left in `sums`, which has the names of
// BackwardShared, by this and by sum_pairs, in between which there are registers for other things.
template <class Sums>
__device__ __forceinline__ void pass_pairs(float (&products)[2][4], float (&grads)[2][4],
                                           float (&passed)[2][4], Sums &sums,
                                           const Decays &decays, int r, int b) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    decay_block<false>(products, decays, r, b);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) passed[n][e] = products[n][e] * grads[n][e];
    decay_block<false>(grads, decays, r, b);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const float2 dt = *(const float2 *)(decays.dt + BLOCK * b + 8 * n + 2 * t);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float sum = sum_over_rows(passed[n][e] + passed[n][2 + e]);
            if (g == 0) sums.columns[r][BLOCK * b + 8 * n + 2 * t + e] = sum;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float step = e & 1 ? dt.y : dt.x;
            products[n][e] *= step, grads[n][e] *= step, passed[n][e] *= step;
        }
    }
}

template <class Sums>
__device__ __forceinline__ void sum_pairs(const float (&passed)[2][4], Sums &sums, int r, int b) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (b == r) {
        sum_within(sums.within + BLOCK * r, passed);
        return;
    }
    const float upper = sum_over_columns(passed[0][0] + passed[0][1] + passed[1][0] + passed[1][1]);
    const float lower = sum_over_columns(passed[0][2] + passed[0][3] + passed[1][2] + passed[1][3]);
    const float sum = sum_over_rows(upper + lower);
    if (t == 0) sums.rows[b][BLOCK * r + g] = upper, sums.rows[b][BLOCK * r + 8 + g] = lower;
    if (lane == 0) sums.blocks[r][b] = sum;
}

// The largest magnitude that a warp has of a block, for all of its lanes; NaN counts as nothing.
__device__ __forceinline__ float largest_of(const float (&v)[2][4]) {
    float most = 0.f;
#pragma unroll
    for (int e = 0; e < 8; ++e) most = fmaxf(most, fabsf(v[e >> 2][e & 3]));
#pragma unroll
    for (int by = 16; by; by >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, by));
    return most;
}

// A power of two by which numbers up to `most` are divided to use the range of fp16; the other types
// need none.
template <class T>
__device__ __forceinline__ float scale_for(float most) {
    if constexpr (!same<T, Half>) return 1.f;
    const u32 exponent = min(max(__float_as_uint(most) >> 23, 107u), 227u) - 13;
    return __uint_as_float(exponent << 23);
}

__device__ __forceinline__ void multiply_all(float (&v)[2][4], float by) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e >> 2][e & 3] *= by;
}

// Sums of a block's numbers, 8 of a lane.
__device__ __forceinline__ void add_block(float4 *sums, const float (&v)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const float4 sum = sums[32 * n];
        sums[32 * n] = make_float4(sum.x + v[n][0], sum.y + v[n][1], sum.z + v[n][2],
                                   sum.w + v[n][3]);
    }
}

__device__ __forceinline__ void take_block(float (&v)[2][4], const float4 *sums) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const float4 sum = sums[32 * n];
        v[n][0] = sum.x, v[n][1] = sum.y, v[n][2] = sum.z, v[n][3] = sum.w;
    }
}

// What store_block stored.
template <class T>
__device__ __forceinline__ void load_block(float (&v)[2][4], const Element<T> *at, int pitch) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float2 pair = load_pair<T>(at + (g + 8 * k) * pitch + 8 * n + 2 * t);
            v[n][2 * k] = pair.x, v[n][2 * k + 1] = pair.y;
        }
}

// sums += a b of 16 x 16 blocks, of which the first one is at `left`, TRANSPOSED or not.
template <class T, bool FAST, bool TRANSPOSED>
__device__ __forceinline__ void multiply_by(float (&sums)[2][4], const Element<T> *left,
                                            int left_pitch, const Block16<T> &b) {
    Block16<T> a;
    a.template load<TRANSPOSED, TRANSPOSED>(left, left_pitch);
    multiply_blocks<T, FAST>(sums, a, b);
}

// Of a product of 16 x 16, the elements (g, g) and (g + 8, g + 8), in lanes with t = g / 2; else 0.
__device__ __forceinline__ float2 on_diagonal(const float (&v)[2][4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (t != g >> 1) return make_float2(0.f, 0.f);
    return g & 1 ? make_float2(v[0][1], v[1][3]) : make_float2(v[0][0], v[1][2]);
}

// Adds a block of 16 rows, times the decays and the steps of rows, to `sums`; and stores for each
// row its product with the row of `with`, times the decay.
template <class T>
__device__ __forceinline__ void add_rows(float (&sums)[2][4], float *dots, const float (&v)[2][4],
                                         const Element<T> *with, int pitch, const float *decays,
                                         const float *steps) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int row = g + 8 * k;
        const float decay = decays[row], weight = steps ? decay * steps[row] : decay;
        float dot = 0.f;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const float2 other = load_pair<T>(with + row * pitch + 8 * m + 2 * t);
            dot += other.x * v[m][2 * k] + other.y * v[m][2 * k + 1];
            sums[m][2 * k] += weight * v[m][2 * k];
            sums[m][2 * k + 1] += weight * v[m][2 * k + 1];
        }
        dot = sum_over_columns(dot);
        if (t == 0) dots[row] = decay * dot;
    }
}

// Adds to `sums` the rows times the states, by blocks of 16 x 16 and as in add_rows.
template <class T, bool FAST, int P, int N, int OWN>
__device__ __forceinline__ void add_states(float (&sums)[OWN][2][4], float *dots,
                                           const Element<T> *rows, const Element<T> *states,
                                           const Element<T> *with, const float *decays,
                                           const float *steps, bool with_states) {
    constexpr int GROUP = OWN > 2 && N * sizeof(Element<T>) > 128 ? 2 : OWN;  // registers are few
#pragma unroll
    for (int first = 0; first < OWN; first += GROUP) {
        float products[GROUP][2][4] = {};
#pragma unroll (N > 64 ? 2 : P / BLOCK)
        for (int n = 0; with_states && n < P / BLOCK; ++n) {
            Block16<T> right;
            right.template load<true>(states + BLOCK * n * PITCH<T, N>, PITCH<T, N>);
#pragma unroll
            for (int o = 0; o < GROUP; ++o)
                multiply_by<T, FAST, false>(
                    products[o], rows + BLOCK * (first + o) * PITCH<T, P> + BLOCK * n, PITCH<T, P>,
                    right);
        }
#pragma unroll
        for (int o = 0; o < GROUP; ++o) {
            const int at = BLOCK * (first + o);
            add_rows<T>(sums[first + o], dots + at, products[o], with + at * PITCH<T, N>,
                        PITCH<T, N>, decays + at, steps ? steps + at : nullptr);
        }
    }
}

// Called by a warp, whose lanes have two positions each: the gradient by raw dt, and a chunk's
// share of those by A and by the bias.
template <class Sums>
__device__ __forceinline__ float2 finish_steps(const Sums &sums, const Decays &decays, float2 &ddt,
                                               float A, const Steps &p, int count) {
    const int lane = threadIdx.x & 31, own = lane >> 3;
    float direct[2], down[2] = {}, across[2] = {}, reads[2] = {}, leaves[2] = {}, within[2] = {};
    float between = 0.f, through = 0.f;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int i = 2 * lane + e;
        direct[e] = 0.f;
        for (int r = own; r < BLOCKS; ++r) {
            const float v = sums.columns[r][i];
            direct[e] += v;
            if (r > own) across[e] += v * decays.dt[i];
        }
        for (int b = 0; b < own; ++b) down[e] += sums.rows[b][i];
#pragma unroll 4
        for (int s = 0; s < Sums::SLICES; ++s) {
            reads[e] += sums.reads[s][i];
            leaves[e] += sums.leaves[s][i];
        }
        within[e] = sums.within[i];
        direct[e] += leaves[e];
        leaves[e] *= decays.dt[i];
    }
    for (int r = own + 1; r < BLOCKS; ++r)
        for (int b = 0; b < own; ++b) between += sums.blocks[r][b];
#pragma unroll 4
    for (int w = 0; w < Sums::WARPS; ++w) through += sums.dots[w];
    between += through * decays.through;

    // Sums from a lane on, and before it: of its block, and of the chunk.
    float down_from = down[0] + down[1], across_up = across[0] + across[1];
    float reads_from = reads[0] + reads[1], leaves_up = leaves[0] + leaves[1];
#pragma unroll
    for (int by = 1; by < 32; by <<= 1) {
        const float d = __shfl_down_sync(0xffffffffu, down_from, by);
        const float a = __shfl_up_sync(0xffffffffu, across_up, by);
        const float r = __shfl_down_sync(0xffffffffu, reads_from, by);
        const float l = __shfl_up_sync(0xffffffffu, leaves_up, by);
        if (by < 8 && (lane & 7) + by < 8) down_from += d;
        if (by < 8 && (lane & 7) >= by) across_up += a;
        if (lane + by < 32) reads_from += r;
        if (lane >= by) leaves_up += l;
    }
    float across_before = __shfl_up_sync(0xffffffffu, across_up, 1);
    float leaves_before = __shfl_up_sync(0xffffffffu, leaves_up, 1);
    float down_after = __shfl_down_sync(0xffffffffu, down_from, 1);
    float reads_after = __shfl_down_sync(0xffffffffu, reads_from, 1);
    if ((lane & 7) == 0) across_before = 0.f;
    if (lane == 0) leaves_before = 0.f;
    if ((lane & 7) == 7) down_after = 0.f;
    if (lane == 31) reads_after = 0.f;

    float2 parts = make_float2(0.f, 0.f);
    float grads[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int i = 2 * lane + e;
        const float given = sums.steps[i];
        // The gradient by the logarithm of the decay.
        const float by_decay = between + within[e]
            + (e ? down[1] + down_after : down_from) + (e ? reads[1] + reads_after : reads_from)
            + across_before + leaves_before + (e ? across[0] + leaves[0] : 0.f);
        float grad = direct[e] + A * by_decay;
        const float v = p.softplus ? precise_softplus2<Float>(given * LOG2E) * LN2 : given;
        if (v < p.low || v > p.high) grad = 0.f;
        if (p.softplus) grad *= rcp(1.f + ex2(-given * LOG2E));
        grads[e] = grad;
        if (i < count) {
            parts.x += by_decay * decays.dt[i];
            parts.y += grad;
        }
    }
    ddt = make_float2(grads[0], grads[1]);
#pragma unroll
    for (int by = 16; by; by >>= 1) {
        parts.x += __shfl_xor_sync(0xffffffffu, parts.x, by);
        parts.y += __shfl_xor_sync(0xffffffffu, parts.y, by);
    }
    return parts;
}

// Blocks that a multiprocessor is to have registers for, not more than its shared memory has room
// for.
template <class T, int P, int N>
__device__ constexpr int backward_blocks() {
    const int blocks = N <= 16 ? 5 : N <= 64 ? 3 : N <= 128 && !same<T, Float> ? 2 : 1;
    const int fit = (__CUDA_ARCH__ >= 900 ? 227 : 163) * 1024
        / (int)sizeof(BackwardShared<T, P, N>);
    return fit < 1 ? 1 : fit < blocks ? fit : blocks;
}
