// ssd_states.cu by the matrix instructions of sm_90a, for bf16, up to 64 channels and 128 states. A
// block has a head's sequence, or a span of it, and each of its four warps 16 channels.
#include "ssd/ssd_groups.cuh"
#include "ssd/ssd_states.cuh"

struct StatesGroupsShared {
    struct Stage { Tile x, b[2]; };
    Stage stages[2];
    Decays decays[2];
};

// Calls of_pair(place, n, k) for the pairs of states that a lane has: v[n][2 * k] and the next one.
template <class OfPair>
__device__ __forceinline__ void each_pair(int channel, const States &p, OfPair of_pair) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int c = channel + 8 * k, s = 8 * n + 2 * t;
            if (c < p.dim && s < p.state) of_pair(c * p.state + s, n, k);
        }
}

__global__ void __launch_bounds__(128, 4) ssd_states_groups(const States p) {
    typedef unsigned short E;
    extern __shared__ __align__(1024) char memory[];
    StatesGroupsShared &shared = *(StatesGroupsShared *)memory;

    const int lane = threadIdx.x & 31, warp = warp_index(), g = lane >> 2, t = lane & 3;
    const int head = blockIdx.x % p.heads, batch = blockIdx.x / p.heads, span = blockIdx.y;
    const bool back = p.backwards + (int)blockIdx.z > 0;
    const int channel = BLOCK * warp + g, group = head / p.per_group;
    const Time time = {p.length, p.reverse};
    const int chunks = min(p.span, p.chunks - span * p.span);
    const Map x = back ? p.dy : p.x, b = back ? p.C : p.B;

    // The chunk at which it is after so many.
    auto chunk_at = [&](int i) { return span * p.span + (back ? chunks - 1 - i : i); };
    auto copy = [&](int i) {
        const int start = chunk_at(i) * Q, rows = min(Q, p.length - start);
        StatesGroupsShared::Stage &stage = shared.stages[i & 1];
        copy_rows<64>(&stage.x, (const E *)x.data + batch * x.b + time(start) * x.l
                      + (long long)head * x.h, time.step(x.l), rows, p.dim);
        copy_rows<128>(stage.b, (const E *)b.data + batch * b.b + time(start) * b.l
                       + (long long)group * b.h, time.step(b.l), rows, p.state);
        commit_copies();
    };
    copy(0);

    float rate = 0.f, bias = 0.f, sum = 0.f;
    RawSteps raw = {};  // of the chunk after the one at hand
    auto load = [&](int i) {
        const int start = chunk_at(i) * Q;
        return load_steps(p.dt.data, batch * p.dt.b + (long long)head * p.dt.h, p.dt.l,
                          p.step.dt_type,
                          p.step.index ? p.step.index + (long long)batch * p.length : nullptr, time,
                          start, i < chunks ? min(Q, p.length - start) : 0);
    };
    auto prepare = [&](int i, const RawSteps &given) {
        make_decays<true>(shared.decays[i & 1], given, bias, rate, p.step,
                          min(Q, p.length - chunk_at(i) * Q));
    };
    if (warp == 0) {
        rate = load_parameter(p.step.A, head, p.step.A_type) * LOG2E;
        if (p.step.bias) bias = load_parameter(p.step.bias, head, p.step.bias_type);
        prepare(0, load(0));
        raw = load(1);
    }

    const long long of_span = (((long long)batch * p.heads + head) * p.spans + span)
        * p.dim * p.state;
    float state[2][8][4] = {};
    if (const float *const entries = back ? p.grad_entries : p.entries)
        each_pair(channel, p, [&](int at, int n, int k) {
            const float2 v = *(const float2 *)(entries + of_span + at);
            state[n >> 3][n & 7][2 * k] = v.x, state[n >> 3][n & 7][2 * k + 1] = v.y;
        });

    void *const states = back ? p.grad_states : p.states;
    float *const ends = back ? p.grad_ends : p.ends;
    for (int i = 0; i < chunks; ++i) {
        StatesGroupsShared::Stage &stage = shared.stages[i & 1];
        const Decays &decays = shared.decays[i & 1];
        const bool more = i + 1 < chunks;
        wait_copies<0>();
        show_to_products();
        __syncthreads();
        if (more) copy(i + 1);
        if (states) {
            const long long to = (((long long)batch * p.heads + head) * p.chunks + chunk_at(i))
                * p.dim * p.state;
#pragma unroll
            for (int h = 0; h < 2; ++h)
                store_states<BFloat>(p, states, to, channel, 64 * h, state[h]);
        }
        if (!more && !ends) break;

        // The rows of the first factor are channels.
        u32 rows[4][4];
        const int token = (lane & 7) + (lane >> 4) * 8;
        const u32 from = shared_address(stage.x.place(token, BLOCK * warp + (lane & 8)));
#pragma unroll
        for (int k = 0; k < 4; ++k)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(rows[k][0]), "=r"(rows[k][1]), "=r"(rows[k][2]), "=r"(rows[k][3])
                         : "r"(from + k * BLOCK * 128));
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float2 by = *(const float2 *)((back ? decays.enter : decays.leave) + 8 * k
                                                + 2 * t);
            rows[k >> 1][(k & 1) * 2] = scaled<BFloat>(rows[k >> 1][(k & 1) * 2], by);
            rows[k >> 1][(k & 1) * 2 + 1] = scaled<BFloat>(rows[k >> 1][(k & 1) * 2 + 1], by);
        }
        const float through = decays.through;
        if (warp == 0)
            sum += decays.totals[0] + decays.totals[1] + decays.totals[2] + decays.totals[3];
#pragma unroll
        for (int e = 0; e < 64; ++e) state[e >> 5][e >> 2 & 7][e & 3] *= through;
        begin_products();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u64 tile = describe(stage.b[h]);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                multiply_tiles<true>(state[h], rows[k], part_of<true>(tile, k), true,
                               BFloat{});
        }
        commit_products();
        if (warp == 0 && more) {
            const RawSteps given = raw;
            raw = load(i + 2);
            prepare(i + 1, given);
        }
        wait_products<0>();
        results(state[0]), results(state[1]);
    }

    if (p.sums && !back && threadIdx.x == 0)
        p.sums[((long long)batch * p.heads + head) * p.spans + span] = sum;
    if (!ends) return;
    each_pair(channel, p, [&](int at, int n, int k) {
        *(float2 *)(ends + of_span + at) = make_float2(state[n >> 3][n & 7][2 * k],
                                             state[n >> 3][n & 7][2 * k + 1]);
    });
}
