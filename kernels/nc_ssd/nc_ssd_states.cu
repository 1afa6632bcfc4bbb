// The states of non-causal state space duality: sums over tokens of b (w x)^T, with B, x and the
// weights of tokens, and backwards of C dy^T. They are matrices (N, columns) for a group.
#include "nc_ssd/nc_ssd.cuh"

struct NcStates {
    Map x, B, dt, dy, C;
    Weigh weigh;
    // (2, batch, groups, state, columns): of both, times `scale`; else parts without it, in fp32
    // and with the number of the span before the batch, if `spans` is above 1.
    void *states;
    float scale;
    int batch, length, groups, dim, state, columns, blocks, chunks, span, spans;
    int backwards;  // of the first blocks in z: 0 for states, 1 for gradients
};

template <class T, int N>
struct NcStatesShared {
    static constexpr int WARPS = 4, THREADS = 32 * WARPS, STAGES = same<T, Float> ? 2 : 3;
    static constexpr int TILES = N <= 64 ? 2 : 1, WIDTH = WARPS * TILES * BLOCK;  // of a warp
    static constexpr int HEADS = WIDTH / 8;  // at most
    struct Stage {
        Element<T> x[Q * PITCH<T, WIDTH>], b[Q * PITCH<T, N>];
    };
    Stage stages[STAGES];
    float weights[2][HEADS][Q];
};

// A block has WIDTH columns and all N of a span of chunks, a warp 16 TILES columns.
template <class T, bool FAST, int N>
__global__ void __launch_bounds__(128, 2) nc_ssd_states(const NcStates p) {
    typedef NcStatesShared<T, N> Shared;
    typedef Element<T> E;
    constexpr int TILES = Shared::TILES, WIDTH = Shared::WIDTH, THREADS = Shared::THREADS;
    constexpr int STAGES = Shared::STAGES, X = PITCH<T, WIDTH>, K = PITCH<T, N>;
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;

    const int thread = threadIdx.x, lane = thread & 31, warp = warp_index();
    const int g = lane >> 2, t = lane & 3;
    const int block = blockIdx.x % p.blocks, rest = blockIdx.x / p.blocks;
    const Columns columns = {rest % p.groups, p.groups, p.dim};
    const int batch = rest / p.groups, span = blockIdx.y;
    const bool back = p.backwards + (int)blockIdx.z > 0;
    const int first = block * WIDTH, width = min(WIDTH, p.columns - first);
    const int begin = span * p.span * Q, chunks = min(p.span, p.chunks - span * p.span);

    Rows<T, WIDTH, THREADS> x = rows_of<T, WIDTH, THREADS>(back ? p.dy : p.x, batch, columns, first,
                                                           p.length, begin);
    const Map &of_b = back ? p.C : p.B;
    Rows<T, N, THREADS> b((const E *)of_b.data + batch * of_b.b + (long long)columns.group * of_b.h,
                          of_b.l, Time{p.length, 0}, begin);
    auto copy = [&](int i) {
        if (i < chunks) {
            typename Shared::Stage &stage = shared.stages[i % STAGES];
            const int rows = min(Q, p.length - begin - i * Q);
            x.copy(stage.x, rows, width);
            b.copy(stage.b, rows, p.state);
        }
        commit_copies();
    };
#pragma unroll
    for (int i = 0; i + 1 < STAGES; ++i) copy(i);

    // Weights of a chunk: a thread makes those of one position of every other head, or of both.
    const int first_head = columns.head(first), heads = columns.head(first + width - 1) + 1
        - first_head;
    const int position = thread % Q, second = thread / Q;
    const long long dt_at = batch * p.dt.b + (long long)(begin + position) * p.dt.l;
    auto load = [&](int i, int k) -> u32 {
        if (back || k >= heads || i >= chunks || begin + i * Q + position >= p.length) return 0;
        return load_bits(p.dt.data, dt_at + (long long)i * Q * p.dt.l
                         + (long long)columns.number(first_head + k) * p.dt.h, p.weigh.dt_type);
    };
    auto store = [&](int i, int k, u32 bits) {
        if (k >= heads || i >= chunks) return;
        float w = 1.f;
        if (!back) {
            const int head = columns.number(first_head + k);
            w = step_of(raw_step(bits, p.weigh.dt_type) + bias_of(p.weigh, head), p.weigh)
                * rate_of(p.weigh, head);
        }
        shared.weights[i & 1][k][position] = begin + i * Q + position < p.length ? w : 0.f;
    };
    u32 ahead[2] = {load(0, second), load(0, second + 2)};
    auto make_weights = [&](int i) {  // and load raw values of the chunk after it
        const u32 own[2] = {ahead[0], ahead[1]};
        ahead[0] = load(i + 1, second), ahead[1] = load(i + 1, second + 2);
        store(i, second, own[0]), store(i, second + 2, own[1]);
        for (int k = second + 4; k < heads; k += 2) store(i, k, load(i, k));
    };
    make_weights(0);

    int slot[2 * TILES];  // the head of 8 columns
#pragma unroll
    for (int j = 0; j < 2 * TILES; ++j)
        slot[j] = min(columns.head(first + warp * TILES * BLOCK + 8 * j) - first_head, heads - 1);
    float state[N / BLOCK][2 * TILES][4] = {};
    for (int i = 0; i < chunks; ++i) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        copy(i + STAGES - 1);
        make_weights(i + 1);
        const typename Shared::Stage &stage = shared.stages[i % STAGES];
#pragma unroll (same<T, Float> ? 1 : BLOCKS)  // which would spill
        for (int k = 0; k < BLOCKS; ++k) {
            Block16<T> v[TILES];
#pragma unroll
            for (int j = 0; j < TILES; ++j)
                v[j].template load<true>(
                    stage.x + k * BLOCK * X + (warp * TILES + j) * BLOCK, X);
#pragma unroll
            for (int j = 0; j < 2 * TILES; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    Pair<T> &pair = v[j / 2].v[j % 2 * 2 + e];
                    pair = scaled<T>(pair, *(const float2 *)(
                        shared.weights[i & 1][slot[j]] + BLOCK * k + 8 * e + 2 * t));
                }
#pragma unroll
            for (int m = 0; m < N / BLOCK; ++m) {
                Block16<T> a;
                a.template load<true, true>(stage.b + k * BLOCK * K + m * BLOCK, K);
#pragma unroll
                for (int j = 0; j < 2 * TILES; ++j)
                    multiply_rounded<T, FAST>(state[m][j], a.v[0], a.v[1], a.v[2], a.v[3],
                                              v[j / 2].v[j % 2 * 2], v[j / 2].v[j % 2 * 2 + 1]);
            }
        }
    }

    const long long number = ((long long)blockIdx.z * p.spans + span) * p.batch * p.groups
        + batch * p.groups + columns.group;
    const long long at = number * p.state * p.columns;
#pragma unroll
    for (int m = 0; m < N / BLOCK; ++m)
#pragma unroll
        for (int j = 0; j < 2 * TILES; ++j)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int n = m * BLOCK + 8 * k + g;
                const int c = first + warp * TILES * BLOCK + 8 * j + 2 * t;
                if (n >= p.state || c >= p.columns) continue;
                const float lo = state[m][j][2 * k], hi = state[m][j][2 * k + 1];
                const long long to = at + (long long)n * p.columns + c;
                if (p.spans > 1) *(float2 *)((float *)p.states + to) = make_float2(lo, hi);
                else *(Pair<T> *)((E *)p.states + to) = pack<T>(lo * p.scale, hi * p.scale);
            }
}
