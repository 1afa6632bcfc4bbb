// The states that enter each chunk or leave a span, and the same backwards: the gradients by the
// states that leave each chunk. Both are S' = through S + sum_i by_i x_i b_i^T over the positions
// of a chunk: of x and B with by = dt leave, and from the end of dy and C with by = enter.
#include "ssd/ssd_states.cuh"

template <class T, int SLICES, int N, int STAGES>
struct StatesShared {
    static constexpr int WIDTH = SLICES * BLOCK;
    struct Stage {
        Element<T> x[Q * PITCH<T, WIDTH>], b[Q * PITCH<T, N>];
    };
    Stage stages[STAGES];
    Decays decays[2];
};

template <class T, bool FAST, int SLICES, int N, int STAGES>
__global__ void __launch_bounds__(32 * SLICES, live_blocks(
    32 * SLICES, N * sizeof(Element<T>) > 128 ? 256 : same<T, BFloat> ? 512 : 384))
ssd_states(const States p) {
    typedef StatesShared<T, SLICES, N, STAGES> Shared;
    typedef Element<T> E;
    constexpr int WIDTH = Shared::WIDTH, THREADS = 32 * SLICES;
    constexpr int X = PITCH<T, WIDTH>, K = PITCH<T, N>;
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;

    const int lane = threadIdx.x & 31, slice = warp_index();
    const int g = lane >> 2, t = lane & 3;
    const int column = blockIdx.x % p.columns, part = blockIdx.x / p.columns % p.parts;
    const int rest = blockIdx.x / (p.columns * p.parts);
    const int head = rest % p.heads, batch = rest / p.heads, span = blockIdx.y;
    const bool back = p.backwards + (int)blockIdx.z > 0;
    const int first_channel = column * WIDTH, channel = first_channel + slice * BLOCK + g;
    const int width = min(WIDTH, p.dim - first_channel);
    const int first_state = part * N, states_here = min(N, p.state - first_state);
    const Time time = {p.length, p.reverse};
    const int chunks = min(p.span, p.chunks - span * p.span);

    // The chunk at which it is after so many.
    auto chunk_at = [&](int i) { return span * p.span + (back ? chunks - 1 - i : i); };
    const int begin = chunk_at(0) * Q, x_stride = back ? p.dy.l : p.x.l;
    const int b_stride = back ? p.C.l : p.B.l, group = head / p.per_group;
    Rows<T, WIDTH, THREADS> x(
        (const E *)(back ? p.dy.data : p.x.data) + batch * (back ? p.dy.b : p.x.b)
        + (long long)head * (back ? p.dy.h : p.x.h) + first_channel, x_stride, time, begin);
    Rows<T, N, THREADS> b(
        (const E *)(back ? p.C.data : p.B.data) + batch * (back ? p.C.b : p.B.b)
        + (long long)group * (back ? p.C.h : p.B.h) + first_state, b_stride, time, begin);
    const long long dt_base = batch * p.dt.b + (long long)head * p.dt.h;
    const int *const index = p.step.index ? p.step.index + (long long)batch * p.length : nullptr;

    auto copy = [&](typename Shared::Stage &stage, int chunk) {
        const int rows = min(Q, p.length - chunk * Q);
        x.copy(stage.x, rows, width, back ? -1 : 1);
        b.copy(stage.b, rows, states_here, back ? -1 : 1);
        commit_copies();
    };
    copy(shared.stages[0], chunk_at(0));

    float rate = 0.f, bias = 0.f, sum = 0.f;
    RawSteps raw = {};  // of the chunk after the one at hand
    auto load = [&](int i) {
        const int start = chunk_at(i) * Q;
        return load_steps(p.dt.data, dt_base, p.dt.l, p.step.dt_type, index, time, start,
                          i < chunks ? min(Q, p.length - start) : 0);
    };
    if (slice == 0) {
        rate = load_parameter(p.step.A, head, p.step.A_type) * LOG2E;
        if (p.step.bias) bias = load_parameter(p.step.bias, head, p.step.bias_type);
        const int rows = min(Q, p.length - begin);
        make_decays<true>(shared.decays[0], load(0), bias, rate, p.step, rows);
        raw = load(1);
    }

    float state[N / 8][4];
    const long long of_span = (((long long)batch * p.heads + head) * p.spans + span)
        * p.dim * p.state;
    const float *const entries = back ? p.grad_entries : p.entries;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int c = channel + 8 * k, s = first_state + 8 * n + 2 * t;
            float2 v = make_float2(0.f, 0.f);
            if (entries && c < p.dim && s < p.state)
                v = *(const float2 *)(entries + of_span + (long long)c * p.state + s);
            state[n][2 * k] = v.x, state[n][2 * k + 1] = v.y;
        }

    void *const states = back ? p.grad_states : p.states;
    float *const ends = back ? p.grad_ends : p.ends;
    int parity = 0;
    for (int i = 0; i < chunks; ++i, parity ^= 1) {
        typename Shared::Stage &stage = shared.stages[STAGES > 1 ? parity : 0];
        const int chunk = chunk_at(i);
        const bool more = i + 1 < chunks;
        wait_copies<0>();
        __syncthreads();
        if (STAGES > 1 && more) copy(shared.stages[parity ^ 1], chunk_at(i + 1));
        if (states) {
            int own = channel;
            opaque(own);  // else its addresses stay in registers
            const long long to = (((long long)batch * p.heads + head) * p.chunks + chunk)
                * p.dim * p.state;
            store_states<T>(p, states, to, own, first_state, state);
        }
        if (!more && !ends) break;
        if (slice == 0 && more) {
            const RawSteps given = raw;
            raw = load(i + 2);
            make_decays<true>(shared.decays[parity ^ 1], given, bias, rate, p.step,
                              min(Q, p.length - chunk_at(i + 1) * Q));
        }

        int own_lane = lane, own_slice = slice;
        opaque(own_lane), opaque(own_slice);
        const Decays &decays = shared.decays[parity];
        const float through = decays.through;
        if (slice == 0)
            sum += decays.totals[0] + decays.totals[1] + decays.totals[2] + decays.totals[3];
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) state[n][e] *= through;
#pragma unroll
        for (int r = 0; r < BLOCKS; ++r) {
            Block16<T> left;
            left.template load<true, true>(stage.x + BLOCK * r * X + own_slice * BLOCK, X);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float2 by = *(const float2 *)(
                    (back ? decays.enter : decays.leave) + BLOCK * r + 8 * k + 2 * (own_lane & 3));
                left.v[2 * k] = scaled<T>(left.v[2 * k], by);
                left.v[2 * k + 1] = scaled<T>(left.v[2 * k + 1], by);
            }
#pragma unroll
            for (int n = 0; n < N / BLOCK; ++n) {
                Block16<T> right;
                right.template load<true>(stage.b + BLOCK * r * K + BLOCK * n, K);
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    multiply<T, FAST>(state[2 * n + m], left.v[0], left.v[1], left.v[2], left.v[3],
                                      right.v[2 * m], right.v[2 * m + 1]);
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (more) copy(stage, chunk_at(i + 1));
        }
    }

    if (p.sums && !back && threadIdx.x == 0 && column == 0 && part == 0)
        p.sums[((long long)batch * p.heads + head) * p.spans + span] = sum;
    if (!ends) return;
    int last_channel = channel;
    opaque(last_channel);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int c = last_channel + 8 * k, s = first_state + 8 * n + 2 * t;
            if (c < p.dim && s < p.state)
                *(float2 *)(ends + of_span + (long long)c * p.state + s) = make_float2(
                    state[n][2 * k], state[n][2 * k + 1]);
        }
}
