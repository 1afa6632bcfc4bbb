// State space duality, backward, from the states that enter the chunks and the gradients by those
// that leave them. A thread block has one chunk of one group, and goes through the group's heads,
// or through a part of them; so the gradients by B and C, sums over heads, stay in registers.
// vmamba_mm/ops/ssd/README.md has the equations.
#include "ssd/ssd_bwd.cuh"

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
        const float2 parts = finish_steps(
            shared, shared.decays, ddt, load_parameter(p.step.A, head, p.step.A_type), p.step,
            count);
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
            pass_pairs(products, grads, passed, shared, decays, r, b);
            store_block<T>(shared.weights(r, b), S, products);
            if (turn < KEPT) {
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    of_pairs[turn % KEPT][e >> 2][e & 3] += grads[e >> 2][e & 3];
            } else {
                add_block(sums_of(i), grads);
            }
            sum_pairs(passed, shared, r, b);
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
#pragma unroll (N == 128 ? 1 : 4)
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
