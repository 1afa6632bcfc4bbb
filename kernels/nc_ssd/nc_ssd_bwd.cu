// Backward of non-causal state space duality, from the state and the gradient by it: tokens need
// nothing of one another.
#include "nc_ssd/nc_ssd.cuh"

struct NcBackward {
    Map x, dy, dt, B, dx, ddt, dB, dC;
    Weigh weigh;
    const void *states;  // (2, batch, groups, state, columns): state and gradient, times 1 / scale
    const void *D;       // (H), or null
    float *parts;        // (batch, chunks, 3, H): of the gradients by A, dt_bias and D
    float scale;
    int batch, length, groups, dim, state, columns, heads, chunks, D_type;  // heads: of a group
};

constexpr int WARPS = 8, WIDTH = 64;  // columns at a time

template <class T, int N>
struct NcBackwardShared {
    static constexpr int STAGES = same<T, Float> && N > 64 ? 1 : 2;  // of 227 KB
    struct Stage {
        Element<T> x[Q * PITCH<T, WIDTH>], dy[Q * PITCH<T, WIDTH>];
        Element<T> state[N * PITCH<T, WIDTH>], grad[N * PITCH<T, WIDTH>];
    };
    Stage stages[STAGES];
    Element<T> B[Q * PITCH<T, N>];
    // (heads, Q) of weights; (2, 2, heads, Q): gradients by weights and by D of each position, of
    // the columns of two warps.
    float rows[1];
};

// A block has a chunk of tokens of a group, and goes through the columns. A warp has 16 tokens, and
// half of the states or of the columns at hand.
template <class T, bool FAST, int N>
__global__ void __launch_bounds__(32 * WARPS, same<T, Float> || N > 64 ? 1 : 2)
nc_ssd_bwd(const NcBackward p) {
    typedef NcBackwardShared<T, N> Shared;
    typedef Element<T> E;
    constexpr int V = VECTOR<T>, X = PITCH<T, WIDTH>, K = PITCH<T, N>, THREADS = 32 * WARPS;
    constexpr int SLICES = N / BLOCK, OWN = (SLICES + 1) / 2;  // of states; of a warp
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;

    const int thread = threadIdx.x, lane = thread & 31, warp = warp_index();
    const int g = lane >> 2, t = lane & 3, own = warp % BLOCKS, half = warp / BLOCKS;
    const Columns columns = {(int)blockIdx.x % p.groups, p.groups, p.dim};
    const int chunk = blockIdx.x / p.groups, batch = blockIdx.y;
    const int start = chunk * Q, count = min(Q, p.length - start);
    float *const weights = shared.rows, *const dots = weights + p.heads * Q;

    const long long of_group = (long long)batch * p.groups + columns.group;
    const E *const states = (const E *)p.states + of_group * p.state * p.columns;
    const long long to_grads = (long long)p.batch * p.groups * p.state * p.columns;
    Rows<T, N, THREADS>((const E *)p.B.data + batch * p.B.b + (long long)columns.group * p.B.h,
                        p.B.l, Time{p.length, 0}, start).copy(shared.B, count, p.state);
    auto copy = [&](typename Shared::Stage &stage, int first) {
        const int width = min(WIDTH, p.columns - first);
        rows_of<T, WIDTH, THREADS>(p.x, batch, columns, first, p.length, start).copy(
            stage.x, count, width);
        rows_of<T, WIDTH, THREADS>(p.dy, batch, columns, first, p.length, start).copy(
            stage.dy, count, width);
        int begin = thread;
        opaque(begin);  // else addresses stay in registers
        for (int i = begin; i < N * WIDTH / V; i += THREADS) {
            const int n = i / (WIDTH / V), c = i % (WIDTH / V) * V;
            const bool valid = n < p.state && c < width;
            const E *const from = states + (valid ? (long long)n * p.columns + first + c : 0);
            copy16(stage.state + n * X + c, from, valid);
            copy16(stage.grad + n * X + c, from + to_grads, valid);
        }
        commit_copies();
    };
    copy(shared.stages[0], 0);
    for (int i = thread; i < p.heads * Q; i += THREADS) {
        const int head = columns.number(i / Q), position = i % Q;
        float w = 0.f;
        if (position < count) {
            const long long at = batch * p.dt.b + (long long)(start + position) * p.dt.l
                + (long long)head * p.dt.h;
            w = step_of(load_parameter(p.dt.data, at, p.weigh.dt_type) + bias_of(p.weigh, head),
                        p.weigh) * rate_of(p.weigh, head);
        }
        weights[i] = w;
    }
    for (int i = thread; i < 4 * p.heads * Q; i += THREADS) dots[i] = 0.f;

    float dB[OWN][2][4] = {}, dC[OWN][2][4] = {};
    const int row = own * BLOCK + g;  // and 8 further on
    int parity = 0;
    for (int first = 0; first < p.columns; first += WIDTH, parity ^= 1) {
        const typename Shared::Stage &stage = shared.stages[Shared::STAGES > 1 ? parity : 0];
        if (Shared::STAGES == 1 && first) {
            __syncthreads();
            copy(shared.stages[0], first);
        }
        wait_copies<0>();
        __syncthreads();
        if (Shared::STAGES > 1 && first + WIDTH < p.columns)
            copy(shared.stages[parity ^ 1], first + WIDTH);

        // The gradients by C and B.
#pragma unroll
        for (int k = 0; k < WIDTH / BLOCK; ++k) {
            Block16<T> dy, x;
            dy.template load<false>(stage.dy + own * BLOCK * X + k * BLOCK, X);
            x.template load<false>(stage.x + own * BLOCK * X + k * BLOCK, X);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float *const w = weights
                    + min(columns.head(first + k * BLOCK + 8 * j), p.heads - 1) * Q + row;
                x.v[2 * j] = scaled<T>(x.v[2 * j], make_float2(w[0], w[0]));
                x.v[2 * j + 1] = scaled<T>(x.v[2 * j + 1], make_float2(w[8], w[8]));
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int n = half * OWN + i;
                if (n >= SLICES) continue;
                Block16<T> s, grad;
                s.template load<false, true>(stage.state + n * BLOCK * X + k * BLOCK, X);
                grad.template load<false, true>(stage.grad + n * BLOCK * X + k * BLOCK, X);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    multiply_rounded<T, FAST>(dC[i][m], dy.v[0], dy.v[1], dy.v[2], dy.v[3],
                                              s.v[2 * m], s.v[2 * m + 1]);
                    multiply_rounded<T, FAST>(dB[i][m], x.v[0], x.v[1], x.v[2], x.v[3],
                                              grad.v[2 * m], grad.v[2 * m + 1]);
                }
            }
        }

        // The gradients by x and by weights.
        float sums[2][2][4] = {};
#pragma unroll
        for (int n = 0; n < SLICES; ++n) {
            Block16<T> b;
            b.template load<false>(shared.B + own * BLOCK * K + n * BLOCK, K);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Block16<T> grad;
                grad.template load<true>(stage.grad + n * BLOCK * X + (2 * half + i) * BLOCK, X);
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    multiply_rounded<T, FAST>(sums[i][m], b.v[0], b.v[1], b.v[2], b.v[3],
                                              grad.v[2 * m], grad.v[2 * m + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int c = (2 * half + i) * BLOCK + first_column(t), column = first + c;
            const int block = first + (2 * half + i) * BLOCK;  // whose first 8 columns even t have
            if (block >= p.columns) continue;
            const int head = min(columns.head(column), p.heads - 1);
            const bool one = block + 8 >= p.columns
                || columns.head(block) == columns.head(block + 8);
            const float skip = p.D ? load_parameter(p.D, columns.number(head), p.D_type) : 0.f;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int at = row + 8 * k;
                const Four<Float> four(
                    make_float2(sums[i][0][2 * k], sums[i][0][2 * k + 1]),
                    make_float2(sums[i][1][2 * k], sums[i][1][2 * k + 1]));
                float v[4] = {four.lo.x, four.lo.y, four.hi.x, four.hi.y};
                const float2 x0 = load_pair<T>(stage.x + at * X + c);
                const float2 x1 = load_pair<T>(stage.x + at * X + c + 2);
                const float2 dy0 = load_pair<T>(stage.dy + at * X + c);
                const float2 dy1 = load_pair<T>(stage.dy + at * X + c + 2);
                const float w = weights[head * Q + at];
                float by_weight = (v[0] * x0.x + v[1] * x0.y + v[2] * x1.x + v[3] * x1.y) * p.scale;
                float by_D = dy0.x * x0.x + dy0.y * x0.y + dy1.x * x1.x + dy1.y * x1.y;
                const float dx[4] = {v[0] * p.scale * w + skip * dy0.x,
                                     v[1] * p.scale * w + skip * dy0.y,
                                     v[2] * p.scale * w + skip * dy1.x,
                                     v[3] * p.scale * w + skip * dy1.y};
                if (at < count && column < p.columns)
                    store4<T>(p.dx.data, batch * p.dx.b + (long long)(start + at) * p.dx.l
                              + columns(column, p.dx.h), dx);
                by_weight += __shfl_xor_sync(0xffffffffu, by_weight, 2);
                by_D += __shfl_xor_sync(0xffffffffu, by_D, 2);
                const float other_weight = __shfl_xor_sync(0xffffffffu, by_weight, 1);
                const float other_D = __shfl_xor_sync(0xffffffffu, by_D, 1);
                if (one) by_weight += other_weight, by_D += other_D;
                if (t == 0 || t == 1 && !one) {
                    float *const to = dots + (half * p.heads + head) * Q + at;
                    to[0] += by_weight;
                    to[2 * p.heads * Q] += by_D;
                }
                __syncwarp();
            }
        }
    }

#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int n = (half * OWN + i) * BLOCK + first_column(t);
        if (half * OWN + i >= SLICES) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int at = row + 8 * k;
            auto store = [&](const Map &map, const float (&v)[2][4]) {
                const Four<T> four(
                    pack<T>(v[0][2 * k] * p.scale, v[0][2 * k + 1] * p.scale),
                    pack<T>(v[1][2 * k] * p.scale, v[1][2 * k + 1] * p.scale));
                if (at < count && n < p.state)
                    four.store((E *)map.data + batch * map.b + (long long)(start + at) * map.l
                               + (long long)columns.group * map.h + n);
            };
            store(p.dC, dC[i]);
            store(p.dB, dB[i]);
        }
    }
    __syncthreads();

    // The gradients by dt, and a chunk's share of those by A, dt_bias and D: a warp has a head.
    for (int i = warp; i < p.heads; i += WARPS) {
        const int head = columns.number(i);
        const float rate = rate_of(p.weigh, head), bias = bias_of(p.weigh, head);
        float by_A = 0.f, by_bias = 0.f, by_D = 0.f;
#pragma unroll
        for (int at = lane; at < Q; at += 32) {
            const float *const from = dots + i * Q + at;
            const float by_weight = from[0] + from[p.heads * Q];
            by_D += from[2 * p.heads * Q] + from[3 * p.heads * Q];
            if (at >= count) continue;
            const float raw = bias + load_parameter(
                p.dt.data, batch * p.dt.b + (long long)(start + at) * p.dt.l
                + (long long)head * p.dt.h, p.weigh.dt_type);
            by_A += by_weight * step_of(raw, p.weigh);
            float grad = by_weight * rate;
            if (p.weigh.softplus) grad *= rcp(1.f + ex2(-raw * LOG2E));
            by_bias += grad;
            store_parameter(p.ddt.data, batch * p.ddt.b + (long long)(start + at) * p.ddt.l
                            + (long long)head * p.ddt.h, p.weigh.dt_type, grad);
        }
#pragma unroll
        for (int by = 16; by; by >>= 1) {
            by_A += __shfl_xor_sync(0xffffffffu, by_A, by);
            by_bias += __shfl_xor_sync(0xffffffffu, by_bias, by);
            by_D += __shfl_xor_sync(0xffffffffu, by_D, by);
        }
        if (lane < 3)
            p.parts[(((long long)batch * p.chunks + chunk) * 3 + lane) * p.heads * p.groups + head]
                = lane == 0 ? (p.weigh.positive ? -by_A : by_A) : lane == 1 ? by_bias : by_D;
    }
}
