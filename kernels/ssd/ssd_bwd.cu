// State space duality, backward, from the states that enter the chunks and the gradients by those
// that leave them. A thread block has one chunk of one group, and goes through the group's heads,
// or through a part of them; so the gradients by B and C, sums over heads, stay in registers.
// vmamba_mm/ops/ssd/README.md has the equations.
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

__device__ __forceinline__ float sum_over_columns(float v) {  // of a row, which 4 lanes have
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

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
template <class T, int P, int N>
__device__ __forceinline__ float2 finish_steps(const BackwardShared<T, P, N> &shared, float2 &ddt,
                                               float A, const Steps &p, int count) {
    const int lane = threadIdx.x & 31, own = lane >> 3;
    const Decays &decays = shared.decays;
    float direct[2], down[2] = {}, across[2] = {}, reads[2] = {}, leaves[2] = {}, within[2] = {};
    float between = 0.f, through = 0.f;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int i = 2 * lane + e;
        direct[e] = 0.f;
        for (int r = own; r < BLOCKS; ++r) {
            const float v = shared.columns[r][i];
            direct[e] += v;
            if (r > own) across[e] += v * decays.dt[i];
        }
        for (int b = 0; b < own; ++b) down[e] += shared.rows[b][i];
#pragma unroll 4
        for (int s = 0; s < N / BLOCK; ++s) {
            reads[e] += shared.reads[s][i];
            leaves[e] += shared.leaves[s][i];
        }
        within[e] = shared.within[i];
        direct[e] += leaves[e];
        leaves[e] *= decays.dt[i];
    }
    for (int r = own + 1; r < BLOCKS; ++r)
        for (int b = 0; b < own; ++b) between += shared.blocks[r][b];
#pragma unroll 4
    for (int w = 0; w < BackwardShared<T, P, N>::WARPS; ++w) through += shared.dots[w];
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
        const float given = shared.steps[i];
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

template <class T, bool FAST, int P, int N>
__global__ void __launch_bounds__(32 * BackwardShared<T, P, N>::WARPS,
                                  backward_blocks<T, P, N>())
ssd_bwd(const Backward p) {
    typedef BackwardShared<T, P, N> Shared;
    typedef Element<T> E;
    constexpr int WARPS = Shared::WARPS, THREADS = 32 * WARPS, SLICES = Shared::SLICES;
    constexpr int OWN = BLOCKS / Shared::PARTS;  // blocks of positions of a warp
    constexpr int X = PITCH<T, P>, K = PITCH<T, N>, S = PITCH<T, Q>;
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;

    const int thread = threadIdx.x, lane = thread & 31, warp = warp_index();
    const int g = lane >> 2, t = lane & 3, slice = warp % SLICES;
    const int part = Shared::PARTS > 1 ? warp / SLICES : 0;
    const int split = blockIdx.x % p.splits, group = blockIdx.x / p.splits % p.groups;
    const int chunk = blockIdx.y, batch = blockIdx.z;
    const int start = chunk * Q, count = min(Q, p.length - start);
    const Time time = {p.length, p.reverse};
    const bool with_states = N > 64 || p.states;

    Rows<T, N, THREADS>((const E *)p.B.data + batch * p.B.b + (long long)group * p.B.h, p.B.l, time,
                        start).copy(shared.B, count, p.state);
    Rows<T, N, THREADS>((const E *)p.C.data + batch * p.C.b + (long long)group * p.C.h, p.C.l, time,
                        start).copy(shared.C, count, p.state);

    auto copy = [&](int head) {
        int own = thread;
        opaque(own);  // else addresses stay in registers from one head to the next
        Rows<T, P, THREADS>((const E *)p.x.data + batch * p.x.b + (long long)head * p.x.h, p.x.l,
                            time, start, own).copy(shared.x, count, p.dim);
        Rows<T, P, THREADS>((const E *)p.dy.data + batch * p.dy.b + (long long)head * p.dy.h,
                            p.dy.l, time, start, own).copy(shared.dy, count, p.dim);
        if (with_states) {
            const long long of_chunk = (((long long)batch * p.heads + head) * p.chunks + chunk)
                * p.dim * p.state;
            Rows<T, N, THREADS, P>((const E *)p.states + of_chunk, p.state, Time{0, 0}, 0, own)
                .copy(shared.state, p.dim, p.state);
            Rows<T, N, THREADS, P>((const E *)p.grad_states + of_chunk, p.state, Time{0, 0}, 0, own)
                .copy(shared.grad_state, p.dim, p.state);
        }
        commit_copies();
    };
    auto prepare = [&](int head) {
        const RawSteps raw = load_steps(
            p.dt.data, batch * p.dt.b + (long long)head * p.dt.h, p.dt.l, p.step.dt_type,
            p.step.index ? p.step.index + (long long)batch * p.length : nullptr, time, start,
            count);
        const float A = load_parameter(p.step.A, head, p.step.A_type);
        const float bias = p.step.bias
            ? load_parameter(p.step.bias, head, p.step.bias_type) : 0.f;
        make_decays<false>(shared.decays, raw, bias, A * LOG2E, p.step, count);
        *(float2 *)(shared.steps + 2 * lane) = make_float2(
            raw_step(raw.dt[0], p.step.dt_type) + bias,
            raw_step(raw.dt[1], p.step.dt_type) + bias);
    };
    // The gradients by dt, and shares of those by A and by the bias, from what the warps have left.
    auto finish = [&](int head) {
        float2 ddt;
        const float2 parts = finish_steps<T, P, N>(
            shared, ddt, load_parameter(p.step.A, head, p.step.A_type), p.step, count);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = 2 * lane + e;
            if (i < count)
                store_parameter(p.ddt.data, batch * p.ddt.b + time(start + i) * p.ddt.l
                                + (long long)head * p.ddt.h, p.step.dt_type, e ? ddt.y : ddt.x);
        }
        if (lane < 2)
            p.head_parts[(((long long)lane * p.batch + batch) * p.chunks + chunk) * p.heads + head]
                = lane ? parts.y : parts.x;
        __syncwarp();  // before the decays are written anew
    };

    // The gradients by C B^T are the sums over heads of those by a head's.
    constexpr int TURNS = Shared::TURNS, KEPT = Shared::KEPT;
    float dB[OWN][2][4] = {}, dC[OWN][2][4] = {}, of_pairs[KEPT][2][4] = {};
    auto sums_of = [&](int block) -> float4 * {
        int own = lane;
        opaque(own);
        return shared.sums[block - KEPT * WARPS][0] + own;
    };
    for (int i = warp + KEPT * WARPS; i < Triangle::COUNT; i += WARPS)
        sums_of(i)[0] = sums_of(i)[32] = make_float4(0.f, 0.f, 0.f, 0.f);
    const int first_head = group * p.per_group + split * p.per_split;
    const int end_head = min(first_head + p.per_split, (group + 1) * p.per_group);
    for (int head = first_head;; ++head) {
        const bool more = head < end_head;
        if (more) copy(head);
        if (warp == 0) {  // while the copies are under way
            if (head > first_head) finish(head - 1);
            if (more) prepare(head);
        }
        if (!more) break;
        wait_copies<0>();
        __syncthreads();

        // C B^T on and below the diagonal, which all heads of the group share.
#pragma unroll 1
        for (int i = warp; head == first_head && i < Triangle::COUNT; i += WARPS) {
            const int r = Triangle::row(i), b = Triangle::column(i);
            float products[2][4] = {};
#pragma unroll
            for (int n = 0; n < N / BLOCK; ++n)
                multiply_rows<T, FAST>(products, shared.C + BLOCK * r * K + BLOCK * n, K,
                                       shared.B + BLOCK * b * K + BLOCK * n, K);
            const float scale = scale_for<T>(same<T, Half> ? largest_of(products) : 1.f);
            if (same<T, Half>) multiply_all(products, 1.f / scale);
            store_block<T>(shared.products(r, b), S, products);
            if (lane == 0) shared.scales[r][b] = scale;
            __syncwarp();
        }

        // The weights of x in y, and the gradients by C B^T.
        const Decays &decays = shared.decays;
#pragma unroll (KEPT == TURNS ? TURNS : 1)
        for (int turn = 0; turn < TURNS; ++turn) {
            int i = warp + turn * WARPS;
            if (i >= Triangle::COUNT) break;
            opaque(i);  // else what follows from it stays in registers
            const int r = Triangle::row(i), b = Triangle::column(i);
            float products[2][4], grads[2][4] = {}, passed[2][4];
#pragma unroll
            for (int n = 0; n < P / BLOCK; ++n)
                multiply_rows<T, FAST>(grads, shared.dy + BLOCK * r * X + BLOCK * n, X,
                                       shared.x + BLOCK * b * X + BLOCK * n, X);
            load_block<T>(products, shared.products(r, b), S);
            if (same<T, Half>) multiply_all(products, shared.scales[r][b]);
            decay_block<false>(products, decays, r, b);
            float down[2] = {};
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
                    if (g == 0) shared.columns[r][BLOCK * b + 8 * n + 2 * t + e] = sum;
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float step = e & 1 ? dt.y : dt.x;
                    products[n][e] *= step, grads[n][e] *= step, passed[n][e] *= step;
                    down[e >> 1] += passed[n][e];
                }
            }
            store_block<T>(shared.weights(r, b), S, products);
            if (turn < KEPT) {
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    of_pairs[turn % KEPT][e >> 2][e & 3] += grads[e >> 2][e & 3];
            } else {
                add_block(sums_of(i), grads);
            }
            if (b < r) {
                down[0] = sum_over_columns(down[0]), down[1] = sum_over_columns(down[1]);
                const float sum = sum_over_rows(down[0] + down[1]);
                if (t == 0) {
                    shared.rows[b][BLOCK * r + g] = down[0];
                    shared.rows[b][BLOCK * r + 8 + g] = down[1];
                }
                if (lane == 0) shared.blocks[r][b] = sum;
            } else {
                sum_within(shared.within + BLOCK * r, passed);
            }
        }
        __syncthreads();

        // The gradients by C and B: of a row, what C reads from the state that enters, and what B
        // leaves in the one that leaves.
        int first_row = BLOCK * OWN * part, first_state = BLOCK * slice;
        opaque(first_state);
        add_states<T, FAST, P, N>(dC, shared.reads[slice] + first_row,
                                  shared.dy + first_row * X, shared.state + first_state,
                                  shared.C + first_row * K + first_state,
                                  decays.enter + first_row, nullptr, with_states);
        add_states<T, FAST, P, N>(dB, shared.leaves[slice] + first_row,
                                  shared.x + first_row * X, shared.grad_state + first_state,
                                  shared.B + first_row * K + first_state,
                                  decays.leave + first_row, decays.dt + first_row, with_states);
        // The gradient by x. A warp has one block of rows, and two tiles of channels at a time.
        constexpr int STEP = WARPS / BLOCKS, TILES = P / BLOCK > STEP ? 2 : 1;
        int r = warp % BLOCKS;
        opaque(r);
        int row = BLOCK * r + g;
        opaque(row);
        for (int first = warp / BLOCKS; first < P / BLOCK; first += TILES * STEP) {
            float dx[TILES][2][4] = {};
            const E *const of_tile = shared.grad_state + BLOCK * first * K;
#pragma unroll
            for (int n = 0; with_states && n < N / BLOCK; ++n) {
                Block16<T> left, right;
                left.template load<false>(shared.B + BLOCK * r * K + BLOCK * n, K);
#pragma unroll
                for (int u = 0; u < TILES; ++u) {
                    right.template load<false, true>(of_tile + BLOCK * u * STEP * K + BLOCK * n, K);
                    multiply_blocks<T, FAST>(dx[u], left, right);
                }
            }
            const float upper = decays.leave[row] * decays.dt[row];
            const float lower = decays.leave[row + 8] * decays.dt[row + 8];
#pragma unroll
            for (int u = 0; u < TILES; ++u)
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int e = 0; e < 4; ++e) dx[u][m][e] *= e < 2 ? upper : lower;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                if (b < r) continue;
                Block16<T> left, right;
                left.template load<true, true>(shared.weights(b, r), S);
#pragma unroll
                for (int u = 0; u < TILES; ++u) {
                    right.template load<true>(
                        shared.dy + BLOCK * b * X + BLOCK * (first + u * STEP), X);
                    multiply_blocks<T, FAST>(dx[u], left, right);
                }
            }
#pragma unroll
            for (int u = 0; u < TILES; ++u) {
                const int channel = BLOCK * (first + u * STEP);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const int c = channel + 8 * m + 2 * t;
                    if (!p.D || channel + 8 * m >= p.dim) continue;
                    const long long at = p.D_full ? (long long)head * p.dim + c : head;
                    const float skip0 = load_parameter(p.D, at, p.D_type);
                    const float skip1 = p.D_full ? load_parameter(p.D, at + 1, p.D_type) : skip0;
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        const float2 dy = load_pair<T>(shared.dy + (row + 8 * k) * X + c);
                        dx[u][m][2 * k] += skip0 * dy.x, dx[u][m][2 * k + 1] += skip1 * dy.y;
                    }
                }
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const Four<T> v(pack<T>(dx[u][0][2 * k], dx[u][0][2 * k + 1]),
                                    pack<T>(dx[u][1][2 * k], dx[u][1][2 * k + 1]));
                    const int c = channel + first_column(t);
                    if (row + 8 * k < count && c < p.dim)
                        v.store((E *)p.dx.data + batch * p.dx.b
                                + time(start + row + 8 * k) * p.dx.l + (long long)head * p.dx.h
                                + c);
                }
            }
        }
        // Sums of products are on the diagonals of matrix products: of x and dy by channels, ...
        for (int tile = warp; p.D && BLOCK * tile < p.dim; tile += WARPS) {
            float products[2][4] = {};
#pragma unroll
            for (int r = 0; r < BLOCKS; ++r) {
                const int at = BLOCK * r * X + BLOCK * tile;
                Block16<T> right;
                right.template load<true>(shared.dy + at, X);
                multiply_by<T, FAST, true>(products, shared.x + at, X, right);
            }
            const float2 sums = on_diagonal(products);
            const int c = BLOCK * tile + g;
            float *const to = p.D_parts + (((long long)batch * p.chunks + chunk) * p.heads + head)
                * p.dim + c;
            if (t == g >> 1) *to = sums.x;
            if (t == g >> 1 && c + 8 < p.dim) to[8] = sums.y;
        }
        // ... and of a state and its gradient.
        float products[2][4] = {};
#pragma unroll (N > 64 ? 1 : 4)
        for (int i = warp; with_states && i < P / BLOCK * (N / BLOCK); i += WARPS) {
            const int at = BLOCK * (i % (P / BLOCK)) * K + BLOCK * (i / (P / BLOCK));
            multiply_rows<T, FAST>(products, shared.state + at, K, shared.grad_state + at, K);
        }
        const float2 sums = on_diagonal(products);
        float dot = sums.x + sums.y;
#pragma unroll
        for (int by = 16; by; by >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, by);
        if (lane == 0) shared.dots[warp] = dot;
        __syncthreads();
    }

    // To the gradients by C and B comes what is from the rows before, and from those after.
    auto take = [&](int turn, float (&v)[2][4]) {
        if (turn < KEPT) {
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e >> 2][e & 3] = of_pairs[turn % KEPT][e >> 2][e & 3];
        } else if (warp + turn * WARPS < Triangle::COUNT) {
            take_block(v, sums_of(warp + turn * WARPS));
        }
    };
    float scale = 1.f;
    if constexpr (same<T, Half>) {
        float most = 0.f;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            float v[2][4] = {};
            take(turn, v);
            most = fmaxf(most, largest_of(v));
        }
        if (lane == 0) shared.largest[warp] = most;
        __syncthreads();
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared.largest[w]);
        scale = scale_for<T>(most);
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int i = warp + turn * WARPS;
        if (i >= Triangle::COUNT) break;
        float v[2][4];
        take(turn, v);
        if (same<T, Half>) multiply_all(v, 1.f / scale);
        store_block<T>(shared.weights(Triangle::row(i), Triangle::column(i)), S, v);
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < OWN && same<T, Half>; ++o)
        multiply_all(dB[o], 1.f / scale), multiply_all(dC[o], 1.f / scale);
#pragma unroll (N > 64 ? 1 : BLOCKS)
    for (int b = 0; b < BLOCKS; ++b) {
        Block16<T> of_B, of_C;
        of_B.template load<true>(shared.B + BLOCK * (b * K + slice), K);
        of_C.template load<true>(shared.C + BLOCK * (b * K + slice), K);
#pragma unroll
        for (int o = 0; o < OWN; ++o) {
            const int r = part * OWN + o;
            if (b <= r) multiply_by<T, FAST, false>(dC[o], shared.weights(r, b), S, of_B);
            if (b >= r) multiply_by<T, FAST, true>(dB[o], shared.weights(b, r), S, of_C);
        }
    }
#pragma unroll
    for (int o = 0; o < OWN && same<T, Half>; ++o)
        multiply_all(dB[o], scale), multiply_all(dC[o], scale);

#pragma unroll
    for (int o = 0; o < OWN; ++o)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int row = BLOCK * (part * OWN + o) + 8 * k + g;
            const int s = BLOCK * slice + first_column(t);
            const long long at = time(start + row);
            const float2 left_B = make_float2(dB[o][0][2 * k], dB[o][0][2 * k + 1]);
            const float2 right_B = make_float2(dB[o][1][2 * k], dB[o][1][2 * k + 1]);
            const float2 left_C = make_float2(dC[o][0][2 * k], dC[o][0][2 * k + 1]);
            const float2 right_C = make_float2(dC[o][1][2 * k], dC[o][1][2 * k + 1]);
            const bool valid = row < count && s < p.state;
            if (p.BC_parts) {
                const long long to = ((((long long)split * p.batch + batch) * p.length + at)
                                      * p.groups + group) * p.state + s;
                const long long half = (long long)p.splits * p.batch * p.length * p.groups
                    * p.state;
                const Four<Float> b(left_B, right_B), c(left_C, right_C);
                if (valid) b.store(p.BC_parts + to), c.store(p.BC_parts + half + to);
            } else {
                const Four<T> b(pack<T>(left_B.x, left_B.y), pack<T>(right_B.x, right_B.y));
                const Four<T> c(pack<T>(left_C.x, left_C.y), pack<T>(right_C.x, right_C.y));
                if (!valid) continue;
                b.store((E *)p.dB.data + batch * p.dB.b + at * p.dB.l + (long long)group * p.dB.h
                        + s);
                c.store((E *)p.dC.data + batch * p.dC.b + at * p.dC.l + (long long)group * p.dC.h
                        + s);
            }
        }
}
