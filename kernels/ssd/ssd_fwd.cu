// State space duality, forward. A thread block has HEADS heads of a group in one sequence, or in a
// span of it, and of each head SLICES * 16 channels. It goes through time in chunks of Q positions.
// 16 channels have PARTS warps, each with a part of the rows of y and with a part of the states: in
// registers and, if there are several, rounded in shared memory for all of these warps.
//
// Where the last blocks would leave most multiprocessors without work, as many sequences are in two
// parts. The first parts begin before all else and leave their states in memory, where the second
// ones, which begin after all else, find them.
#include "ssd/ssd.cuh"

struct Forward {
    Map x, z, y, dt, B, C;  // of B and C, h is the stride of a group
    Steps step;
    const void *D;
    const float *entries;  // the states that enter spans (batch, heads, spans, dim, state), or null
    float *last;           // the final state (batch, heads, dim, state), or null
    int D_type, D_full;    // D_full: of each channel
    // Blocks of HEADS heads in a sample and in a group. The last of a group has some heads of the
    // one before too, if they do not come out even.
    int teams, of_group;
    int length, heads, per_group, dim, state, columns, span, spans, reverse;
    int sequences, cuts, first;  // so many of all are in two parts: `first` chunks, and the rest
    float *halves;               // (cuts, HEADS, dim, state): what leaves the first parts
    int *ready;                  // (cuts): 1 once a first part has left; zeros at the start
    int *tickets;                // how many blocks have begun; zero at the start
};

// Two warps to 16 channels have no registers to spare for sequences in two parts.
template <int PARTS>
__device__ __forceinline__ int cuts(const Forward &p) {
    if constexpr (PARTS > 1) return 0;
    else return p.cuts;
}

// The states that enter the chunk, for warps that have not all of them in registers.
template <class T, int PARTS, int WIDTH, int N, int HEADS>
struct SharedStates {
    Element<T> states[HEADS][WIDTH * PITCH<T, N>];
    __device__ __forceinline__ Element<T> *of(int head) { return states[head]; }
};
template <class T, int WIDTH, int N, int HEADS>
struct SharedStates<T, 1, WIDTH, N, HEADS> {
    __device__ __forceinline__ Element<T> *of(int) { return nullptr; }
};

template <class T, int PARTS, int SLICES, int N, int HEADS, int STAGES>
struct ForwardShared : SharedStates<T, PARTS, SLICES * BLOCK, N, HEADS> {
    static constexpr int WIDTH = SLICES * BLOCK;
    struct Stage {
        Element<T> x[HEADS][Q * PITCH<T, WIDTH>];
        Element<T> B[Q * PITCH<T, N>], C[Q * PITCH<T, N>];
    };
    Stage stages[STAGES];
    Element<T> scores[HEADS][Q * PITCH<T, Q>];
    Decays decays[2][HEADS];
    int block, unused[3];  // the number of this block in the order in which they begin
};

// Multiplies four channels by the SiLU of what is at `from`.
template <class T>
__device__ __forceinline__ void gate(Four<T> &v, const Element<T> *from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float2 z = load_pair<T>(from + 2 * i);
        Pair<T> &of = i ? v.hi : v.lo;
        const float2 y = unpack<T>(of);
        of = pack<T>(y.x * (z.x * rcp(1.f + ex2(-z.x * LOG2E))),
                     y.y * (z.y * rcp(1.f + ex2(-z.y * LOG2E))));
    }
}

// Threads of a multiprocessor, whose registers are enough for what a thread has of states and y.
template <class T, int PARTS, int N>
constexpr int LIVE = (N * sizeof(Element<T>) / PARTS
                      <= (PARTS == 1 && !same<T, Float> ? 256 : 128) ? 384 : 256)
    + 128 * (PARTS - 1)
    - (__CUDA_ARCH__ >= 1200 && PARTS > 1 && same<T, Float> ? 128 : 0);  // else it spills there

template <class T, bool FAST, int PARTS, int SLICES, int N, int HEADS, int STAGES>
__global__ void __launch_bounds__(32 * PARTS * SLICES * HEADS,
                                  live_blocks(32 * PARTS * SLICES * HEADS, LIVE<T, PARTS, N>))
ssd_fwd(const Forward p) {
    typedef ForwardShared<T, PARTS, SLICES, N, HEADS, STAGES> Shared;
    typedef Element<T> E;
    constexpr int WIDTH = Shared::WIDTH, OF_HEAD = PARTS * SLICES, WARPS = OF_HEAD * HEADS;
    constexpr int THREADS = 32 * WARPS, ROWS = BLOCKS / PARTS, OWN_STATES = N / PARTS;
    constexpr int X = PITCH<T, WIDTH>, K = PITCH<T, N>, S = PITCH<T, Q>;
    // Warps among which the blocks of C B^T are divided: those that do not make decays, if these
    // are at least two. Of two warps, the one that makes decays has a third of the blocks.
    constexpr int WORKERS = WARPS - HEADS > 1 ? WARPS - HEADS : WARPS > 2 ? WARPS : 1;
    // Blocks at a time: more products that need not wait for one another.
    constexpr int TOGETHER = WORKERS % 3 == 0 && WORKERS < Triangle::COUNT && N <= 128 ? 2 : 1;
    static_assert(OWN_STATES % BLOCK == 0, "a warp has blocks of states");
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;

    const int lane = threadIdx.x & 31, warp = warp_index();
    const int g = lane >> 2, t = lane & 3, own = warp / OF_HEAD, slice = warp % SLICES;
    const int part = PARTS > 1 ? warp / SLICES % PARTS : 0;
    const bool makes_decays = warp % OF_HEAD == OF_HEAD - 1;
    const int first_block = WORKERS == 1 ? 0 : WORKERS == WARPS ? warp
        : makes_decays ? Triangle::COUNT : warp - own;
    const int own_blocks = WARPS != 2 ? ~0 : HEADS == 2 ? (warp ? 0x2aa : 0x155)
        : makes_decays ? 0x124 : 0x2db;
    int block = blockIdx.x;
    if (cuts<PARTS>(p)) {
        // A second part waits for a first one, whose block must have begun.
        if (threadIdx.x == 0) shared.block = atomicAdd(p.tickets, 1);
        __syncthreads();
        block = shared.block;
    }
    const bool is_first = PARTS == 1 && block < cuts<PARTS>(p);
    const bool is_second = cuts<PARTS>(p) && block >= p.sequences;
    const int sequence = block - cuts<PARTS>(p) + (is_first ? p.sequences : 0);
    const int column = sequence % p.columns, rest = sequence / p.columns;
    const int team = rest % p.teams, batch = rest / p.teams, group = team / p.of_group;
    const int first_head = min(group * p.per_group + team % p.of_group * HEADS,
                               (group + 1) * p.per_group - HEADS);
    const int span = blockIdx.y, head = first_head + own;
    const int first_channel = column * WIDTH, channel = slice * BLOCK;
    const int width = min(WIDTH, p.dim - first_channel);
    const Time time = {p.length, p.reverse};
    const int begin = (is_second ? p.first : span * p.span) * Q;
    const int end = is_first ? p.first * Q : min(p.length, begin + p.span * Q);

    Rows<T, WIDTH, THREADS> x((const E *)p.x.data + batch * p.x.b + (long long)first_head * p.x.h
                              + first_channel, p.x.l, time, begin);
    Rows<T, N, THREADS> B((const E *)p.B.data + batch * p.B.b + (long long)group * p.B.h, p.B.l,
                          time, begin);
    Rows<T, N, THREADS> C((const E *)p.C.data + batch * p.C.b + (long long)group * p.C.h, p.C.l,
                          time, begin);
    const long long dt_base = batch * p.dt.b + (long long)head * p.dt.h;
    const int *const index = p.step.index ? p.step.index + (long long)batch * p.length : nullptr;
    // Every PARTS-th block of rows is of this warp.
    const int first_row = part * BLOCK, first_state = part * OWN_STATES;
    constexpr int ROW_STEP = PARTS * BLOCK;
    // Of a lane: position g of the first block, and the first of four channels.
    const int own_channel = first_channel + channel + first_column(t);
    int y_step = time.step(p.y.l);
    opaque(y_step);  // else it is calculated for each store
    E *y_at = (E *)p.y.data + batch * p.y.b + time(begin + first_row + g) * p.y.l
        + (long long)head * p.y.h
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

    // A factor by which x gives what skips the states: D on the diagonal, of channels 0-7 and 8-15;
    // in half precision as a sum of two numbers.
    constexpr int SKIPS = same<T, Float> ? 1 : 2;
    Pair<T> skip[2][SKIPS];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const int c = first_channel + channel + 8 * m + g;
        float D = !p.D || c >= p.dim ? 0.f : load_parameter(
            p.D, p.D_full ? (long long)head * p.dim + c : head, p.D_type);
#pragma unroll
        for (int k = 0; k < SKIPS; ++k) {
            skip[m][k] = pack<T>(g == 2 * t ? D : 0.f, g == 2 * t + 1 ? D : 0.f);
            D -= unpack<T>(pack<T>(D, 0.f)).x;
        }
    }
    // The channels of a lane: rows g, g + 8 of the states; of y, columns 2 t, 2 t + 1, 8 + 2 t ...
    float state[OWN_STATES / BLOCK][2][4];
    E *const own_states = shared.of(own) + channel * K;
    const long long states_of_head = (long long)p.dim * p.state;
    const int cut = sequence + cuts<PARTS>(p) - p.sequences;
    const float *entry = p.entries ? p.entries + (
        ((long long)batch * p.heads + head) * p.spans + span) * states_of_head : nullptr;
    if (is_second) {
        entry = p.halves + (cut * HEADS + own) * states_of_head;
        while (!load_acquire(p.ready + cut)) {}
    }
#pragma unroll
    for (int n = 0; n < OWN_STATES / BLOCK; ++n) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int c = first_channel + channel + 8 * k + g;
                const int s = first_state + BLOCK * n + 8 * m + 2 * t;
                float2 v = make_float2(0.f, 0.f);
                if (entry && c < p.dim && s < p.state)
                    v = *(const float2 *)(entry + (long long)c * p.state + s);
                state[n][m][2 * k] = v.x, state[n][m][2 * k + 1] = v.y;
            }
        if (PARTS > 1 && entry) store_block<T>(own_states + first_state + BLOCK * n, K, state[n]);
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

        // What the state that enters gives.
        const Decays &decays = shared.decays[parity][own];
        float y[ROWS][2][4] = {};
        if (start > begin || entry) {
#pragma unroll
            for (int n = 0; n < N / BLOCK; ++n) {
                Block16<T> right;
                if constexpr (PARTS > 1) {
                    right.template load<false, true>(own_states + BLOCK * n, K);
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        right.v[i] = pack<T>(state[n][i & 1][i & 2], state[n][i & 1][i & 2 | 1]);
                }
#pragma unroll
                for (int o = 0; o < ROWS; ++o) {
                    Block16<T> left;
                    left.template load<false>(
                        stage.C + (first_row + ROW_STEP * o) * K + BLOCK * n, K);
#pragma unroll
                    for (int m = 0; m < 2; ++m)
                        multiply<T, FAST>(y[o][m], left.v[0], left.v[1], left.v[2], left.v[3],
                                          right.v[2 * m], right.v[2 * m + 1]);
                }
            }
#pragma unroll
            for (int o = 0; o < ROWS; ++o) {
                const int row = first_row + ROW_STEP * o + g;
                const float upper = decays.enter[row], lower = decays.enter[row + 8];
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int e = 0; e < 4; ++e) y[o][m][e] *= e < 2 ? upper : lower;
            }
        }

        // C B^T on and below the diagonal, for all heads, and with the decays of each.
        for (int i = first_block; i < Triangle::COUNT; i += TOGETHER * WORKERS) {
            if (!(own_blocks >> i & 1)) continue;
            const bool more = i + WORKERS < Triangle::COUNT;
            float scores[TOGETHER][2][4] = {};
#pragma unroll
            for (int n = 0; n < N / BLOCK; ++n)
#pragma unroll
                for (int u = 0; u < TOGETHER; ++u) {
                    if (u > 0 && !more) break;
                    multiply_rows<T, FAST>(
                        scores[u],
                        stage.C + BLOCK * Triangle::row(i + u * WORKERS) * K + BLOCK * n, K,
                        stage.B + BLOCK * Triangle::column(i + u * WORKERS) * K + BLOCK * n, K);
                }
#pragma unroll
            for (int u = 0; u < TOGETHER; ++u) {
                if (u > 0 && !more) break;
                const int r = Triangle::row(i + u * WORKERS), b = Triangle::column(i + u * WORKERS);
#pragma unroll 1
                for (int k = 0; k < HEADS; ++k) {
                    float v[2][4];
#pragma unroll
                    for (int m = 0; m < 2; ++m)
#pragma unroll
                        for (int e = 0; e < 4; ++e) v[m][e] = scores[u][m][e];
                    decay_block<true>(v, shared.decays[parity][k], r, b);
                    store_block<T>(shared.scores[k] + BLOCK * r * S + BLOCK * b, S, v);
                }
            }
        }
        __syncthreads();

        // What the chunk itself gives.
        const E *const own_x = stage.x[own] + channel;
        Block16<T> inputs[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
            inputs[b].template load<true>(own_x + BLOCK * b * X, X);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int o = 0; o < ROWS; ++o) {
                // Which of PARTS rows this warp has decides for blocks near the diagonal.
                if (b >= PARTS * (o + 1) || b > PARTS * o && b > PARTS * o + part) continue;
                Block16<T> left;
                left.template load<false>(
                    shared.scores[own] + (first_row + ROW_STEP * o) * S + BLOCK * b, S);
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    multiply<T, FAST>(y[o][m], left.v[0], left.v[1], left.v[2], left.v[3],
                                      inputs[b].v[2 * m], inputs[b].v[2 * m + 1]);
            }
        if (p.D) {
#pragma unroll
            for (int o = 0; o < ROWS; ++o) {
                Block16<T> left;
                left.template load<false>(own_x + (first_row + ROW_STEP * o) * X, X);
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int k = 0; k < SKIPS; ++k)
                        multiply_half<T, FAST>(y[o][m], left.v[2 * m], left.v[2 * m + 1],
                                               skip[m][k]);
            }
        }
        Four<T> out[ROWS][2];
#pragma unroll
        for (int o = 0; o < ROWS; ++o)
#pragma unroll
            for (int k = 0; k < 2; ++k)
                out[o][k] = Four<T>(pack<T>(y[o][0][2 * k], y[o][0][2 * k + 1]),
                                    pack<T>(y[o][1][2 * k], y[o][1][2 * k + 1]));
        if (p.z.data) {
#pragma unroll
            for (int o = 0; o < ROWS; ++o)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int row = first_row + ROW_STEP * o + 8 * k + g;
                    if (row < rows && own_channel < p.dim)
                        gate(out[o][k], (const E *)p.z.data + batch * p.z.b
                             + time(start + row) * p.z.l + (long long)head * p.z.h + own_channel);
                }
        }
#pragma unroll
        for (int o = 0; o < ROWS; ++o)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int row = first_row + ROW_STEP * o + 8 * k + g;
                if (row < rows && own_channel < p.dim) out[o][k].store(y_at);
                y_at += (long long)(k ? ROW_STEP - 8 : 8) * y_step;  // at last by Q
            }

        // The state that leaves.
        const bool more = start + Q < end;
        if (more || p.last || is_first) {
            const float decay = decays.through;
#pragma unroll
            for (int n = 0; n < OWN_STATES / BLOCK; ++n)
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int e = 0; e < 4; ++e) state[n][m][e] *= decay;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                Pair<T> *const left = inputs[b].v;
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float2 by = *(const float2 *)(decays.leave + BLOCK * b + 8 * k + 2 * t);
                    left[k] = scaled<T>(left[k], by), left[2 + k] = scaled<T>(left[2 + k], by);
                }
#pragma unroll
                for (int n = 0; n < OWN_STATES / BLOCK; ++n) {
                    Block16<T> right;
                    right.template load<true>(
                        stage.B + BLOCK * b * K + first_state + BLOCK * n, K);
#pragma unroll
                    for (int m = 0; m < 2; ++m)
                        multiply<T, FAST>(state[n][m], left[0], left[2], left[1], left[3],
                                          right.v[2 * m], right.v[2 * m + 1]);
                }
            }
            if (PARTS > 1 && more) {
#pragma unroll
                for (int n = 0; n < OWN_STATES / BLOCK; ++n)
                    store_block<T>(own_states + first_state + BLOCK * n, K, state[n]);
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (start + Q < end) copy(stage, start + Q);
        }
    }

    if (!is_first && (!p.last || end < p.length)) return;
    float *const last = is_first ? p.halves + (cut * HEADS + own) * states_of_head
        : p.last + ((long long)batch * p.heads + head) * states_of_head;
#pragma unroll
    for (int n = 0; n < OWN_STATES / BLOCK; ++n)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int c = first_channel + channel + 8 * k + g;
                const int s = first_state + BLOCK * n + 8 * m + 2 * t;
                if (c < p.dim && s < p.state)
                    *(float2 *)(last + (long long)c * p.state + s) = make_float2(
                        state[n][m][2 * k], state[n][m][2 * k + 1]);
            }
    if (is_first) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) store_release(p.ready + cut, 1);
    }
}
