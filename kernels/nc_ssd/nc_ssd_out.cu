// The result of non-causal state space duality: C times the state, and the skip.
#include "nc_ssd/nc_ssd.cuh"

struct NcOutput {
    Map x, C, y;
    const void *states;  // (batch, groups, state, columns), times 1 / scale
    const void *D;       // (H), or null
    float scale;
    int length, groups, dim, state, columns, pitch, chunks, span, D_type;
};

constexpr int WARPS = 8, PIECE = 32;  // columns that a warp has at a time

template <class T, int N>
struct NcOutputShared {
    Element<T> C[2][Q * PITCH<T, N>];
    Element<T> state[1];  // (N, pitch)
};

// A block has the state of a group, and a span of chunks of its tokens. Of a chunk, a warp has 16
// tokens of every other piece.
template <class T, bool FAST, int N>
__global__ void __launch_bounds__(32 * WARPS, same<T, Float> ? 1 : N > 64 ? 2 : 3)
nc_ssd_out(const NcOutput p) {
    typedef NcOutputShared<T, N> Shared;
    typedef Element<T> E;
    constexpr int V = VECTOR<T>, K = PITCH<T, N>, THREADS = 32 * WARPS;
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;
    E *const state = (E *)(memory + sizeof(shared.C));

    const int thread = threadIdx.x, lane = thread & 31, warp = warp_index();
    const int g = lane >> 2, t = lane & 3, own = warp % BLOCKS, half = warp / BLOCKS;
    const Columns columns = {(int)blockIdx.x % p.groups, p.groups, p.dim};
    const int batch = blockIdx.x / p.groups;
    const int begin = blockIdx.y * p.span, end = min(p.chunks, begin + p.span);

    Rows<T, N, THREADS> C((const E *)p.C.data + batch * p.C.b + (long long)columns.group * p.C.h,
                          p.C.l, Time{p.length, 0}, begin * Q);
    C.copy(shared.C[0], min(Q, p.length - begin * Q), p.state);
    const E *const states = (const E *)p.states + (long long)blockIdx.x * p.state * p.columns;
    const int row = (p.pitch - V) / V;  // vectors
    for (int i = thread; i < N * row; i += THREADS) {
        const int n = i / row, c = i % row * V;
        const bool valid = n < p.state && c < p.columns;
        copy16(state + n * p.pitch + c, valid ? states + (long long)n * p.columns + c : states,
               valid);
    }
    commit_copies();

    for (int chunk = begin; chunk < end; ++chunk) {
        const E *const from = shared.C[(chunk - begin) & 1];
        wait_copies<0>();
        __syncthreads();
        if (chunk + 1 < end)
            C.copy(shared.C[(chunk - begin + 1) & 1], min(Q, p.length - (chunk + 1) * Q), p.state);
        commit_copies();
        const int token = chunk * Q + own * BLOCK + g;  // and 8 further on
        if (chunk * Q + own * BLOCK >= p.length) continue;
        const E *const x_at = (const E *)p.x.data + batch * p.x.b + (long long)token * p.x.l;
        E *const y_at = (E *)p.y.data + batch * p.y.b + (long long)token * p.y.l;
        typename Raw<T>::type ahead[2][2];
        auto load = [&](int first) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int at = first + i * BLOCK + first_column(t);
                    const bool valid = p.D && at < p.columns && token + 8 * k < p.length;
                    ahead[i][k] = load4<T>(x_at, 8 * k * p.x.l + columns(at, p.x.h), valid);
                }
        };
        load(half * PIECE);
#pragma unroll 1
        for (int first = half * PIECE; first < p.columns; first += 2 * PIECE) {
            typename Raw<T>::type x[2][2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int k = 0; k < 2; ++k) x[i][k] = ahead[i][k];
            load(first + 2 * PIECE);
            float sums[2][2][4] = {};
#pragma unroll 2
            for (int n = 0; n < N / BLOCK; ++n) {  // all at once would spill
                Block16<T> c;
                c.template load<false>(from + own * BLOCK * K + n * BLOCK, K);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    Block16<T> s;
                    s.template load<true>(state + n * BLOCK * p.pitch + first + i * BLOCK, p.pitch);
#pragma unroll
                    for (int m = 0; m < 2; ++m)
                        multiply<T, FAST>(sums[i][m], c.v[0], c.v[1], c.v[2], c.v[3], s.v[2 * m],
                                          s.v[2 * m + 1]);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = first + i * BLOCK + first_column(t);
                const float skip = p.D && at < p.columns
                    ? load_parameter(p.D, columns.number(columns.head(at)), p.D_type) : 0.f;
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const Four<Float> four(
                        make_float2(sums[i][0][2 * k], sums[i][0][2 * k + 1]),
                        make_float2(sums[i][1][2 * k], sums[i][1][2 * k + 1]));
                    float y[4] = {four.lo.x, four.lo.y, four.hi.x, four.hi.y}, v[4];
                    unpack4(v, x[i][k], T{});
#pragma unroll
                    for (int e = 0; e < 4; ++e) y[e] = y[e] * p.scale + skip * v[e];
                    if (at < p.columns && token + 8 * k < p.length)
                        store4<T>(y_at, 8 * k * p.y.l + columns(at, p.y.h), y);
                }
            }
        }
    }
}
