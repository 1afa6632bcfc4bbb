// State space duality, forward. A thread block has HEADS heads of a group in one sequence, or in a
// span of it, and of each head SLICES * TILES * 16 channels. It goes through time in chunks of Q
// positions, with the states in registers.
#include "ssd/ssd.cuh"

struct Forward {
    Map x, z, y, dt, B, C;  // of B and C, h is the stride of a group
    Steps step;
    const void *D;
    const float *entries;  // the states that enter spans (batch, heads, spans, dim, state), or null
    float *last;           // the final state (batch, heads, dim, state), or null
    int D_type, D_full;    // D_full: of each channel
    int length, heads, per_group, dim, state, columns, span, spans, reverse;
};

template <class T, int TILES, int SLICES, int N, int HEADS, int STAGES>
struct ForwardShared {
    static constexpr int WIDTH = SLICES * TILES * BLOCK;
    struct Stage {
        Element<T> x[HEADS][Q * PITCH<T, WIDTH>];
        Element<T> B[Q * PITCH<T, N>], C[Q * PITCH<T, N>];
    };
    Stage stages[STAGES];
    Element<T> scores[HEADS][Q * PITCH<T, Q>];
    Decays decays[2][HEADS];
};

// Multiplies four channels by the SiLU of what is at `from`.
template <class T>
__device__ __forceinline__ void gate(Four<T> &v, const Element<T> *from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float2 z = load_pair<T>(from + 2 * i);
        Pair<T> &of = i ? v.hi : v.lo;
        of = scaled<T>(of, make_float2(z.x * rcp(1.f + ex2(-z.x * LOG2E)),
                                       z.y * rcp(1.f + ex2(-z.y * LOG2E))));
    }
}

template <class T, bool FAST, int TILES, int SLICES, int N, int HEADS, int STAGES>
__global__ void __launch_bounds__(32 * SLICES * HEADS,
                                  live_blocks(32 * SLICES * HEADS, TILES * (N < 64 ? 64 : N)
                                              * sizeof(Element<T>) / 2))
ssd_fwd(const Forward p) {
    typedef ForwardShared<T, TILES, SLICES, N, HEADS, STAGES> Shared;
    typedef Element<T> E;
    constexpr int WIDTH = Shared::WIDTH, WARPS = SLICES * HEADS, THREADS = 32 * WARPS;
    constexpr int X = PITCH<T, WIDTH>, K = PITCH<T, N>, S = PITCH<T, Q>;
    // Blocks of rows; fewer where there are few registers beside the states.
    constexpr int TOGETHER = TILES * N > 128 || TILES > 1 ? 2 : BLOCKS;
    // Warps among which the blocks of C B^T are divided: those that do not make decays, if these
    // are at least two. Of two warps, the one that makes decays has a third of the blocks.
    constexpr int WORKERS = SLICES > 1 && WARPS - HEADS > 1 ? WARPS - HEADS : WARPS > 2 ? WARPS : 1;
    // Items at a time: more products that need not wait for one another.
    constexpr int TOGETHER_ITEMS = WORKERS == 3 && TILES * N <= 128 ? 2 : 1;
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;

    const int lane = threadIdx.x & 31, warp = warp_index();
    const int g = lane >> 2, t = lane & 3, own = warp / SLICES, slice = warp % SLICES;
    const bool makes_decays = slice == SLICES - 1;
    const int first_item = WORKERS == 1 ? 0 : WORKERS == WARPS ? warp
        : makes_decays ? Item::COUNT : warp - own;
    const int own_items = WARPS != 2 ? ~0 : SLICES == 1 ? (warp ? 0x2a : 0x15)
        : makes_decays ? 0x28 : 0x17;
    const int column = blockIdx.x % p.columns, rest = blockIdx.x / p.columns;
    const int first_head = rest % (p.heads / HEADS) * HEADS, batch = rest / (p.heads / HEADS);
    const int span = blockIdx.y, head = first_head + own;
    const int first_channel = column * WIDTH, channel = slice * TILES * BLOCK;
    const int width = min(WIDTH, p.dim - first_channel);
    const int group = first_head / p.per_group;
    const Time time = {p.length, p.reverse};
    const int begin = span * p.span * Q, end = min(p.length, begin + p.span * Q);

    Rows<T, WIDTH, THREADS> x((const E *)p.x.data + batch * p.x.b + (long long)first_head * p.x.h
                              + first_channel, p.x.l, time, begin);
    Rows<T, N, THREADS> B((const E *)p.B.data + batch * p.B.b + (long long)group * p.B.h, p.B.l,
                          time, begin);
    Rows<T, N, THREADS> C((const E *)p.C.data + batch * p.C.b + (long long)group * p.C.h, p.C.l,
                          time, begin);
    const long long dt_base = batch * p.dt.b + (long long)head * p.dt.h;
    const int *const index = p.step.index ? p.step.index + (long long)batch * p.length : nullptr;
    // Of a lane: position g of the chunk, and the first of four channels.
    const int own_channel = first_channel + channel + first_column(t);
    const int y_step = time.step(p.y.l);
    E *y_at = (E *)p.y.data + batch * p.y.b + time(begin + g) * p.y.l + (long long)head * p.y.h
        + own_channel;

    auto copy = [&](typename Shared::Stage &stage, int start) {
        const int rows = min(Q, end - start);
#pragma unroll
        for (int k = 0; k < HEADS; ++k) {
            x.copy(stage.x[k], rows, width, k + 1 == HEADS);
            x.from += k + 1 < HEADS ? p.x.h : -(long long)(HEADS - 1) * p.x.h;
        }
        B.copy(stage.B, rows, p.state);
        C.copy(stage.C, rows, p.state);
        commit_copies();
    };
    copy(shared.stages[0], begin);

    // A warp of each head, which has fewer blocks to multiply, makes its decays, a chunk ahead.
    float rate = 0.f, bias = 0.f;
    RawSteps raw = {};  // of the chunk after the one at hand
    if (makes_decays) {
        rate = load_parameter(p.step.A, head, p.step.A_type) * LOG2E;
        if (p.step.bias) bias = load_parameter(p.step.bias, head, p.step.bias_type);
        const int rows = min(Q, end - begin);
        make_decays<true>(shared.decays[0][own],
                          load_steps(p.dt.data, dt_base, p.dt.l, p.step.dt_type, index, time,
                                     begin, rows),
                          bias, rate, p.step, rows);
        raw = load_steps(p.dt.data, dt_base, p.dt.l, p.step.dt_type, index, time, begin + Q,
                         min(Q, end - begin - Q));
    }

    // The channels of a lane: rows g, g + 8 of each tile of states; of y, columns 2 t, 2 t + 1.
    float skip[TILES][2][2];
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int c = first_channel + channel + BLOCK * i + 8 * n + 2 * t + e;
                skip[i][n][e] = !p.D || c >= p.dim ? 0.f : load_parameter(
                    p.D, p.D_full ? (long long)head * p.dim + c : head, p.D_type);
            }
    float state[TILES][N / 8][4];
    const long long states_of_head = (long long)p.dim * p.state;
    const float *const entry = p.entries ? p.entries + (
        ((long long)batch * p.heads + head) * p.spans + span) * states_of_head : nullptr;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int c = first_channel + channel + BLOCK * i + 8 * k + g, s = 8 * n + 2 * t;
                float2 v = make_float2(0.f, 0.f);
                if (entry && c < p.dim && s < p.state)
                    v = *(const float2 *)(entry + (long long)c * p.state + s);
                state[i][n][2 * k] = v.x, state[i][n][2 * k + 1] = v.y;
            }

    int parity = 0;
    for (int start = begin; start < end; start += Q, parity ^= 1) {
        typename Shared::Stage &stage = shared.stages[STAGES > 1 ? parity : 0];
        const int rows = min(Q, end - start);
        wait_copies<0>();
        __syncthreads();
        if (STAGES > 1 && start + Q < end) copy(shared.stages[parity ^ 1], start + Q);
        if (makes_decays && start + Q < end) {
            const RawSteps given = raw;
            raw = load_steps(p.dt.data, dt_base, p.dt.l, p.step.dt_type, index, time,
                             start + 2 * Q, min(Q, end - start - 2 * Q));
            make_decays<true>(shared.decays[parity ^ 1][own], given, bias, rate, p.step,
                              min(Q, end - start - Q));
        }

        // C B^T on and below the diagonal, for all heads, and with the decays of each.
        for (int i = first_item; i < Item::COUNT; i += TOGETHER_ITEMS * WORKERS) {
            if (!(own_items >> i & 1)) continue;
            const Item items[2] = {Item(i), Item(i + WORKERS)};
            // Of two items the first one has two blocks, which the compiler does not know.
            const int counts[2] = {TOGETHER_ITEMS > 1 ? 2 : items[0].count, items[1].count};
            float scores[TOGETHER_ITEMS][2][2][4] = {};
#pragma unroll
            for (int n = 0; n < N / BLOCK; ++n)
#pragma unroll
                for (int u = 0; u < TOGETHER_ITEMS; ++u) {
                    Block16<T> left, right;
                    left.template load<false>(stage.C + BLOCK * items[u].row * K + BLOCK * n, K);
#pragma unroll
                    for (int q = 0; q < 2; ++q) {
                        if (q >= counts[u]) break;
                        right.template load<false, true>(
                            stage.B + BLOCK * (items[u].first + q) * K + BLOCK * n, K);
#pragma unroll
                        for (int m = 0; m < 2; ++m)
                            multiply<T, FAST>(scores[u][q][m], left.v[0], left.v[1], left.v[2],
                                              left.v[3], right.v[2 * m], right.v[2 * m + 1]);
                    }
                }
#pragma unroll
            for (int u = 0; u < TOGETHER_ITEMS; ++u)
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    if (q >= counts[u]) break;
                    const int row = items[u].row, block = items[u].first + q;
#pragma unroll 1
                    for (int k = 0; k < HEADS; ++k) {
                        float v[2][4];
#pragma unroll
                        for (int m = 0; m < 2; ++m)
#pragma unroll
                            for (int e = 0; e < 4; ++e) v[m][e] = scores[u][q][m][e];
                        decay_block<true>(v, shared.decays[parity][k], row, block);
                        store_block<T>(shared.scores[k] + BLOCK * row * S + BLOCK * block, S, v);
                    }
                }
        }
        __syncthreads();

        const Decays &decays = shared.decays[parity][own];
        const E *const own_x = stage.x[own] + channel;
        Block16<T> inputs[BLOCKS][TILES];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int i = 0; i < TILES; ++i)
                inputs[b][i].template load<true>(own_x + BLOCK * b * X + BLOCK * i, X);
#pragma unroll (TOGETHER < BLOCKS ? 1 : BLOCKS)
        for (int first = 0; first < BLOCKS; first += TOGETHER) {
            float y[TOGETHER][TILES][2][4] = {};
            // What the state that enters gives.
            if (start > begin || entry) {
#pragma unroll
                for (int n = 0; n < N / BLOCK; ++n) {
                    Pair<T> right[TILES][2][2];
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
#pragma unroll
                        for (int k = 0; k < 2; ++k)
#pragma unroll
                            for (int m = 0; m < 2; ++m)
                                right[i][k][m] = pack<T>(state[i][2 * n + m][2 * k],
                                                         state[i][2 * n + m][2 * k + 1]);
#pragma unroll
                    for (int r = 0; r < TOGETHER; ++r) {
                        Block16<T> left;
                        left.template load<false>(stage.C + BLOCK * (first + r) * K + BLOCK * n, K);
#pragma unroll
                        for (int i = 0; i < TILES; ++i)
#pragma unroll
                            for (int k = 0; k < 2; ++k)
                                multiply<T, FAST>(y[r][i][k], left.v[0], left.v[1], left.v[2],
                                                  left.v[3], right[i][k][0], right[i][k][1]);
                    }
                }
#pragma unroll
                for (int r = 0; r < TOGETHER; ++r) {
                    const int row = BLOCK * (first + r) + g;
                    const float upper = decays.enter[row], lower = decays.enter[row + 8];
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
#pragma unroll
                        for (int k = 0; k < 2; ++k)
#pragma unroll
                            for (int e = 0; e < 4; ++e) y[r][i][k][e] *= e < 2 ? upper : lower;
                }
            }
            // What the chunk itself gives.
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
                for (int r = 0; r < TOGETHER; ++r) {
                    if (b > first + r) continue;
                    Block16<T> left;
                    left.template load<false>(
                        shared.scores[own] + BLOCK * (first + r) * S + BLOCK * b, S);
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
#pragma unroll
                        for (int k = 0; k < 2; ++k)
                            multiply<T, FAST>(y[r][i][k], left.v[0], left.v[1], left.v[2],
                                              left.v[3], inputs[b][i].v[2 * k],
                                              inputs[b][i].v[2 * k + 1]);
                }
#pragma unroll
            for (int r = 0; r < TOGETHER; ++r)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int row = BLOCK * (first + r) + 8 * k;
                    const bool valid = row + g < rows;
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
                        Pair<T> half[2];
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            const float2 given = load_pair<T>(
                                own_x + (row + g) * X + BLOCK * i + 8 * n + 2 * t);
                            half[n] = pack<T>(y[r][i][n][2 * k] + skip[i][n][0] * given.x,
                                              y[r][i][n][2 * k + 1] + skip[i][n][1] * given.y);
                        }
                        Four<T> out(half[0], half[1]);
                        if (!valid || own_channel + BLOCK * i >= p.dim) continue;
                        if (p.z.data)
                            gate(out, (const E *)p.z.data + batch * p.z.b
                                 + time(start + row + g) * p.z.l + (long long)head * p.z.h
                                 + own_channel + BLOCK * i);
                        out.store(y_at + (long long)row * y_step + BLOCK * i);
                    }
                }
        }
        y_at += (long long)Q * y_step;

        // The state that leaves.
        if (start + Q < end || p.last) {
            const float decay = decays.through;
#pragma unroll
            for (int i = 0; i < TILES; ++i)
#pragma unroll
                for (int n = 0; n < N / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) state[i][n][e] *= decay;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                float2 by[2];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int j = BLOCK * b + 8 * k + 2 * t;
                    const float2 leave = *(const float2 *)(decays.leave + j);
                    const float2 dt = *(const float2 *)(decays.dt + j);
                    by[k] = make_float2(leave.x * dt.x, leave.y * dt.y);
                }
#pragma unroll
                for (int i = 0; i < TILES; ++i)
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        inputs[b][i].v[k] = scaled<T>(inputs[b][i].v[k], by[k & 1]);
#pragma unroll
                for (int n = 0; n < N / BLOCK; ++n) {
                    Block16<T> right;
                    right.template load<true>(stage.B + BLOCK * b * K + BLOCK * n, K);
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
#pragma unroll
                        for (int m = 0; m < 2; ++m)
                            multiply<T, FAST>(state[i][2 * n + m], inputs[b][i].v[0],
                                              inputs[b][i].v[2], inputs[b][i].v[1],
                                              inputs[b][i].v[3], right.v[2 * m],
                                              right.v[2 * m + 1]);
                }
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (start + Q < end) copy(stage, start + Q);
        }
    }

    if (!p.last || end < p.length) return;
    float *const last = p.last + ((long long)batch * p.heads + head) * states_of_head;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int c = first_channel + channel + BLOCK * i + 8 * k + g, s = 8 * n + 2 * t;
                if (c < p.dim && s < p.state)
                    *(float2 *)(last + (long long)c * p.state + s) = make_float2(
                        state[i][n][2 * k], state[i][n][2 * k + 1]);
            }
}
