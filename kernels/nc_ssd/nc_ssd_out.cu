// The result of non-causal state space duality: C times the state, and the skip; then, if there is
// a NORM, the LayerNorm over all channels of a token, times z.
#include "nc_ssd/nc_ssd.cuh"

struct NcOutput {
    Map x, C, y;
    const void *states;  // (batch, groups, state, columns), times 1 / scale
    const void *D;       // (H), or null
    float scale;
    // `width` columns of a block: all if there is a norm; `stages` tiles of C.
    int length, groups, dim, state, columns, width, pitch, chunks, span, stages, D_type;
    Map z;               // with a norm, of one group; (batch, length, columns)
    const void *norm_weight, *norm_bias;  // (columns)
    float2 *moments;     // (batch, length): mean and 1 / deviation, or null
    int norm_type;
    float eps;
};

constexpr int WARPS = 8, PIECE = 32;  // columns that a warp has at a time

template <class T, int N>
struct NcOutputShared {
    float sums[2][Q], squares[2][Q];  // of each token, by both warps that have it
    // (stages, Q, PITCH) of T: C; (N, pitch): the state; (2, columns) floats: the norm's weight and
    // bias.
    char rest[16];
};

// Calls `use(k, column, valid, y)` for four adjacent columns of token + 8 k, where `token` is that
// of the lane, for each piece of the warp in columns `begin` to `end`. `C` are its 16 rows of a
// tile, `state` is that of column 0, `x_at` is the token's x.
template <class T, bool FAST, int N, class Use>
__device__ __forceinline__ void multiply_pieces(const NcOutput &p, const Columns &columns,
                                                const Element<T> *C, const Element<T> *state,
                                                const Element<T> *x_at, int token, int half,
                                                int begin, int end, Use use) {
    const int t = threadIdx.x & 3;
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
    load(begin + half * PIECE);
#pragma unroll 1
    for (int first = begin + half * PIECE; first < end; first += 2 * PIECE) {
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
            c.template load<false>(C + n * BLOCK, PITCH<T, N>);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Block16<T> s;
                s.template load<true>(state + n * BLOCK * p.pitch + first + i * BLOCK, p.pitch);
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    multiply_rounded<T, FAST>(sums[i][m], c.v[0], c.v[1], c.v[2], c.v[3],
                                              s.v[2 * m], s.v[2 * m + 1]);
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
                use(k, at, at < p.columns && token + 8 * k < p.length, y);
            }
        }
    }
}

// A block has the state of a group, or some columns of it, and a span of chunks of its tokens. Of a
// chunk, a warp has 16 tokens of every other piece. What a norm needs of all pieces takes the product
// once more.
template <class T, bool FAST, int N, bool NORM>
__global__ void __launch_bounds__(32 * WARPS, same<T, Float> ? 1 : N > 64 || NORM ? 2 : 3)
nc_ssd_out(const NcOutput p) {
    typedef NcOutputShared<T, N> Shared;
    typedef Element<T> E;
    constexpr int V = VECTOR<T>, K = PITCH<T, N>, THREADS = 32 * WARPS;
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *(Shared *)memory;
    E *const tiles = (E *)shared.rest, *const own_state = tiles + p.stages * Q * K;
    float *const affine = (float *)(own_state + N * p.pitch);

    const int thread = threadIdx.x, lane = thread & 31, warp = warp_index();
    const int g = lane >> 2, t = lane & 3, own = warp % BLOCKS, half = warp / BLOCKS;
    const Columns columns = {(int)blockIdx.x % p.groups, p.groups, p.dim};
    const int batch = blockIdx.x / p.groups;
    const int begin = blockIdx.y * p.span, end = min(p.chunks, begin + p.span);

    Rows<T, N, THREADS> C((const E *)p.C.data + batch * p.C.b + (long long)columns.group * p.C.h,
                          p.C.l, Time{p.length, 0}, begin * Q);
    C.copy(tiles, min(Q, p.length - begin * Q), p.state);
    const int left = NORM ? 0 : blockIdx.z * p.width;
    const int right = NORM ? p.columns : min(p.columns, left + p.width);
    const E *const state = own_state - left;  // that of column 0, if it were there
    const E *const states = (const E *)p.states + (long long)blockIdx.x * p.state * p.columns;
    const int row = (p.pitch - V) / V;  // vectors
    for (int i = thread; i < N * row; i += THREADS) {
        const int n = i / row, c = left + i % row * V;
        const bool valid = n < p.state && c < right;
        copy16(own_state + n * p.pitch + c - left,
               valid ? states + (long long)n * p.columns + c : states, valid);
    }
    commit_copies();
    if (NORM)
        for (int i = thread; i < p.columns; i += THREADS) {
            affine[i] = load_parameter(p.norm_weight, i, p.norm_type);
            affine[p.columns + i] = load_parameter(p.norm_bias, i, p.norm_type);
        }

    for (int chunk = begin; chunk < end; ++chunk) {
        E *const from = tiles + (chunk - begin) % p.stages * Q * K;
        if (p.stages == 1 && chunk > begin) {
            __syncthreads();
            C.copy(from, min(Q, p.length - chunk * Q), p.state);
            commit_copies();
        }
        wait_copies<0>();
        __syncthreads();
        if (p.stages > 1 && chunk + 1 < end)
            C.copy(tiles + (chunk - begin + 1) % p.stages * Q * K,
                   min(Q, p.length - (chunk + 1) * Q), p.state);
        commit_copies();
        const int position = own * BLOCK + g, token = chunk * Q + position;  // and 8 further on
        if (!NORM && chunk * Q + own * BLOCK >= p.length) continue;
        const E *const x_at = (const E *)p.x.data + batch * p.x.b + (long long)token * p.x.l;
        const E *const C_at = from + own * BLOCK * K;
        E *const y_at = (E *)p.y.data + batch * p.y.b + (long long)token * p.y.l;

        if constexpr (!NORM) {
            multiply_pieces<T, FAST, N>(p, columns, C_at, state, x_at, token, half, left,
                                        right, [&](int k, int at, bool valid, const float (&y)[4]) {
                if (valid) store4<T>(y_at, 8 * k * p.y.l + columns(at, p.y.h), y);
            });
        } else {
            // Sums of both halves of the columns, for the two tokens of a lane.
            auto add_halves = [&](float (&v)[2], float (&of)[2][Q]) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    v[k] += __shfl_xor_sync(0xffffffffu, v[k], 1);
                    v[k] += __shfl_xor_sync(0xffffffffu, v[k], 2);
                    if (t == 0) of[half][position + 8 * k] = v[k];
                }
            };
            auto read_halves = [&](float (&v)[2], const float (&of)[2][Q]) {
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    v[k] = (of[0][position + 8 * k] + of[1][position + 8 * k]) / p.columns;
            };
            float mean[2] = {}, rate[2] = {};
            // In half precision squares are summed beside the values: their mean cancels no more
            // than what rounding takes. In fp32 it is a third product.
            multiply_pieces<T, FAST, N>(p, columns, C_at, state, x_at, token, half, left,
                                        right, [&](int k, int at, bool valid, const float (&y)[4]) {
                if (!valid) return;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    mean[k] += y[e];
                    if (!same<T, Float>) rate[k] += y[e] * y[e];
                }
            });
            add_halves(mean, shared.sums);
            if (!same<T, Float>) add_halves(rate, shared.squares);
            __syncthreads();
            read_halves(mean, shared.sums);
            if constexpr (same<T, Float>) {
                multiply_pieces<T, FAST, N>(p, columns, C_at, state, x_at, token, half, left,
                                        right, [&](int k, int at, bool valid, const float (&y)[4]) {
                    if (!valid) return;
#pragma unroll
                    for (int e = 0; e < 4; ++e) rate[k] += (y[e] - mean[k]) * (y[e] - mean[k]);
                });
                add_halves(rate, shared.squares);
                __syncthreads();
                read_halves(rate, shared.squares);
            } else {
                read_halves(rate, shared.squares);
#pragma unroll
                for (int k = 0; k < 2; ++k) rate[k] = fmaxf(rate[k] - mean[k] * mean[k], 0.f);
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                rate[k] = rsqrtf(rate[k] + p.eps);
                if (p.moments && half == 0 && t == 0 && token + 8 * k < p.length)
                    p.moments[(long long)batch * p.length + token + 8 * k]
                        = make_float2(mean[k], rate[k]);
            }
            const E *const z_at = (const E *)p.z.data + batch * p.z.b + (long long)token * p.z.l;
            multiply_pieces<T, FAST, N>(p, columns, C_at, state, x_at, token, half, left,
                                        right, [&](int k, int at, bool valid, const float (&y)[4]) {
                if (!valid) return;
                float z[4], w[4], b[4], v[4];
                unpack4(z, load4<T>(z_at, 8 * k * p.z.l + at, true), T{});
                unpack4(w, *(const float4 *)(affine + at), Float{});
                unpack4(b, *(const float4 *)(affine + p.columns + at), Float{});
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    v[e] = ((y[e] - mean[k]) * rate[k] * w[e] + b[e]) * z[e];
                store4<T>(y_at, 8 * k * p.y.l + columns(at, p.y.h), v);
            });
        }
    }
}
