// State space duality, backward, as ssd_bwd.cu, by the matrix instructions of sm_90a: for bf16, up to
// 64 channels and 128 states, which is what models of Mamba-2 have. A thread block has one chunk of
// one group, and goes through the group's heads, or through a part of them. Of its three groups of
// four warps the first has the pairs of positions, the second the rows of C, the third those of B and
// x; each warp has 16 rows. What a head needs is copied while the one before it is calculated.
#include "ssd/ssd_bwd.cuh"
#include "ssd/ssd_groups.cuh"

// What the warps leave of a head, in the names of BackwardShared.
struct HeadSums {
    static constexpr int SLICES = 1, WARPS = 4;
    float rows[BLOCKS][Q], columns[BLOCKS][Q], blocks[BLOCKS][BLOCKS], within[Q];
    float reads[SLICES][Q], leaves[SLICES][Q], steps[Q], dots[WARPS];
    float skips[BLOCKS][Q];  // of a block's rows: the products of x and dy by channel
    float D[Q];
};

struct GroupsShared {
    Tile B[2], C[2];
    struct Stage { Tile x, dy, state[2], grad_state[2]; };
    Stage stages[2];
    Tile weights;  // of x in y; at the end the gradients by C B^T
    Decays decays[2];
    HeadSums sums[2];
};

// A warp's 16 rows of a tile, as the first factor of products 16 deep.
__device__ __forceinline__ void load_rows(u32 (&v)[4][4], Tile &tile, int block) {
    const int lane = threadIdx.x & 31;
    const u32 row = shared_address(tile.place(BLOCK * block + (lane & 15), 0)) & ~127u;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[k][0]), "=r"(v[k][1]), "=r"(v[k][2]), "=r"(v[k][3])
                     : "r"(row + ((2 * k + (lane >> 4) ^ (lane & 7)) << 4)));
}

// Rows times a factor each, for g and for g + 8.
__device__ __forceinline__ void scale_rows(u32 (&to)[4][4], const u32 (&v)[4][4], float upper,
                                           float lower) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float2 f = BFloat::unpack(v[i >> 2][i & 3]);
        const float by = i & 1 ? lower : upper;
        to[i >> 2][i & 3] = BFloat::pack(by * f.x, by * f.y);
    }
}

// Products of the elements of a row, for g and for g + 8, in all lanes that have it.
__device__ __forceinline__ float2 dot_rows(const float (&d)[8][4], const u32 (&v)[4][4]) {
    float2 dots = make_float2(0.f, 0.f);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const float2 upper = BFloat::unpack(v[n >> 1][(n & 1) * 2]);
        const float2 lower = BFloat::unpack(v[n >> 1][(n & 1) * 2 + 1]);
        dots.x += d[n][0] * upper.x + d[n][1] * upper.y;
        dots.y += d[n][2] * lower.x + d[n][3] * lower.y;
    }
    return make_float2(sum_over_columns(dots.x), sum_over_columns(dots.y));
}

// d += a b of 16 x 64 rows of a warp, in registers, and the two tiles of b.
__device__ __forceinline__ void multiply_states(float (&d)[2][8][4], const u32 (&a)[4][4],
                                                const Tile (&b)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u64 tile = describe(b[h]);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            multiply_tiles<true>(d[h], a[k], part_of<true>(tile, k), true,
                               BFloat{});
    }
}

// d = a b^T, 128 deep.
__device__ __forceinline__ void multiply_by_states(float (&d)[8][4], const Tile (&a)[2],
                                                   const Tile (&b)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u64 left = describe(a[h]), right = describe(b[h]);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            multiply_tiles<false, false>(d, part_of<false>(left, k), part_of<false>(right, k),
                                         h + k > 0, BFloat{});
    }
}

// d += a b with a = pairs or, TRANSPOSED, their transpose, and the two tiles of b.
template <bool TRANSPOSED>
__device__ __forceinline__ void multiply_pairs(float (&d)[2][8][4], const Tile &pairs,
                                               const Tile (&b)[2]) {
    const u64 left = describe(pairs);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u64 right = describe(b[h]);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            multiply_tiles<TRANSPOSED, true>(d[h], part_of<TRANSPOSED>(left, k),
                                             part_of<true>(right, k), true, BFloat{});
    }
}

__device__ __forceinline__ void store_pairs(Tile &tile, int r, int b, const float (&v)[2][4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        char *const to = tile.place(BLOCK * r + g, BLOCK * b + 8 * n + 2 * t);
        *(u32 *)to = BFloat::pack(v[n][0], v[n][1]);
        *(u32 *)(to + 8 * 128) = BFloat::pack(v[n][2], v[n][3]);
    }
}

// For each channel the sum over a warp's rows of x times dy.
__device__ __forceinline__ void sum_skips(float *to, const u32 (&x)[4][4], const u32 (&dy)[4][4]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    float sums[8][2];  // of channels 8 n + 2 t + e
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        sums[n][0] = sums[n][1] = 0.f;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float2 one = BFloat::unpack(x[n >> 1][(n & 1) * 2 + k]);
            const float2 other = BFloat::unpack(dy[n >> 1][(n & 1) * 2 + k]);
            sums[n][0] += one.x * other.x, sums[n][1] += one.y * other.y;
        }
    }
    // Lanes with the same channels give half of what they have to each other: n = g remains.
#pragma unroll
    for (int half = 4; half; half >>= 1) {
        const bool upper = g & half;
#pragma unroll
        for (int n = 0; n < half; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float given = upper ? sums[n][e] : sums[n + half][e];
                const float own = upper ? sums[n + half][e] : sums[n][e];
                sums[n][e] = own + __shfl_xor_sync(0xffffffffu, given, 4 * half);
            }
    }
    *(float2 *)(to + 8 * g + 2 * t) = make_float2(sums[0][0], sums[0][1]);
}

// Calls of_head(head, parity, whether another one follows) when what a head needs has come, after
// copy(head, parity) for the next one.
template <class Copy, class OfHead>
__device__ __forceinline__ void for_heads(int first, int end, Copy copy, OfHead of_head) {
    for (int head = first, parity = 0; head < end; ++head, parity ^= 1) {
        const bool more = head + 1 < end;
        wait_copies<0>();
        show_to_products();
        __syncthreads();
        if (more) copy(head + 1, parity ^ 1);
        of_head(head, parity, more);
    }
    __syncthreads();
}

__global__ void __launch_bounds__(384, 1) ssd_bwd_groups(const Backward p) {
    typedef unsigned short E;
    extern __shared__ __align__(1024) char memory[];
    GroupsShared &shared = *(GroupsShared *)memory;

    const int lane = threadIdx.x & 31, warp = warp_index(), role = warp >> 2, own = warp & 3;
    const int g = lane >> 2, t = lane & 3, row = BLOCK * own + g;
    const int split = blockIdx.x % p.splits, group = blockIdx.x / p.splits % p.groups;
    const int chunk = blockIdx.y, batch = blockIdx.z;
    const int start = chunk * Q, count = min(Q, p.length - start);
    const Time time = {p.length, p.reverse};

    auto copy_tokens = [&](Tile &tile, const Map &map, int head) {
        copy_rows<64>(&tile, (const E *)map.data + batch * map.b + time(start) * map.l
                      + (long long)head * map.h, time.step(map.l), count, p.dim);
    };
    auto copy_shared = [&](Tile (&tiles)[2], const Map &map) {
        copy_rows<128>(tiles, (const E *)map.data + batch * map.b + time(start) * map.l
                       + (long long)group * map.h, time.step(map.l), count, p.state);
    };
    auto copy_states = [&](Tile (&tiles)[2], const void *states, int head) {
        copy_rows<128>(tiles, (const E *)states + (((long long)batch * p.heads + head) * p.chunks
                                                   + chunk) * p.dim * p.state,
                       p.state, p.dim, p.state);
    };
    auto copy = [&](int head, int parity) {
        GroupsShared::Stage &stage = shared.stages[parity];
        if (role == 0) copy_tokens(stage.x, p.x, head), copy_tokens(stage.dy, p.dy, head);
        if (role == 1) copy_states(stage.state, p.states, head);
        if (role == 2) copy_states(stage.grad_state, p.grad_states, head);
        commit_copies();
    };
    auto load = [&](int head) {
        return load_steps(p.dt.data, batch * p.dt.b + (long long)head * p.dt.h, p.dt.l,
                          p.step.dt_type,
                          p.step.index ? p.step.index + (long long)batch * p.length : nullptr, time,
                          start, count);
    };
    auto prepare = [&](int head, const RawSteps &raw, int parity) {
        const float A = load_parameter(p.step.A, head, p.step.A_type);
        const float bias = p.step.bias
            ? load_parameter(p.step.bias, head, p.step.bias_type) : 0.f;
        make_decays<false>(shared.decays[parity], raw, bias, A * LOG2E, p.step, count);
        *(float2 *)(shared.sums[parity].steps + 2 * lane) = make_float2(
            raw_step(raw.dt[0], p.step.dt_type) + bias,
            raw_step(raw.dt[1], p.step.dt_type) + bias);
        for (int c = lane; c < Q; c += 32)
            shared.sums[parity].D[c] = !p.D || c >= p.dim ? 0.f : load_parameter(
                p.D, p.D_full ? (long long)head * p.dim + c : head, p.D_type);
    };
    // The gradients by dt, and shares of those by A, by the bias and by D.
    auto finish = [&](int head, int parity) {
        const HeadSums &sums = shared.sums[parity];
        float2 ddt;
        const float2 parts = finish_steps(
            sums, shared.decays[parity], ddt, load_parameter(p.step.A, head, p.step.A_type), p.step,
            count);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = 2 * lane + e;
            if (i < count)
                store_parameter(p.ddt.data, batch * p.ddt.b + time(start + i) * p.ddt.l
                                + (long long)head * p.ddt.h, p.step.dt_type, e ? ddt.y : ddt.x);
        }
        const long long of_head = ((long long)batch * p.chunks + chunk) * p.heads + head;
        if (lane < 2)
            p.head_parts[lane * (long long)p.batch * p.chunks * p.heads + of_head]
                = lane ? parts.y : parts.x;
        for (int c = lane; p.D && c < p.dim; c += 32)
            p.D_parts[of_head * p.dim + c] = sums.skips[0][c] + sums.skips[1][c] + sums.skips[2][c]
                + sums.skips[3][c];
        __syncwarp();  // before the decays are written anew
    };

    const int first_head = group * p.per_group + split * p.per_split;
    const int end_head = min(first_head + p.per_split, (group + 1) * p.per_group);
    if (role == 1) copy_shared(shared.C, p.C);
    if (role == 2) copy_shared(shared.B, p.B);
    commit_copies();
    copy(first_head, 0);
    if (warp == 0) prepare(first_head, load(first_head), 0);
    for (int i = threadIdx.x; i < 64 * 64 / 8; i += 384)  // also above the diagonal
        ((uint4 *)shared.weights.data)[i] = make_uint4(0, 0, 0, 0);
    wait_copies<1>();
    show_to_products();
    __syncthreads();

    // Adds to the gradients by C or B what is from the rows before or after, and stores them.
    auto store = [&](float (&of_rows)[2][8][4], const Map &map, int half) {
        commit_products();
        wait_products<0>();
        results(of_rows[0]), results(of_rows[1]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const long long at = time(start + row + 8 * k);
            const long long part = (long long)half * p.splits + split;
            float *const parts = p.BC_parts
                + (((part * p.batch + batch) * p.length + at) * p.groups + group) * p.state;
            E *const whole = (E *)map.data + batch * map.b + at * map.l + (long long)group * map.h;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float(&v)[8][4] = of_rows[i >> 2];
                const int n = i % 4 * 2, s = BLOCK * i + first_column(t);
                const float2 left = make_float2(v[n][2 * k], v[n][2 * k + 1]);
                const float2 right = make_float2(v[n + 1][2 * k], v[n + 1][2 * k + 1]);
                const bool valid = row + 8 * k < count && s < p.state;
                if (p.BC_parts) {
                    const Four<Float> four(left, right);
                    if (valid) four.store(parts + s);
                } else {
                    const Four<BFloat> four(BFloat::pack(left.x, left.y),
                                            BFloat::pack(right.x, right.y));
                    if (valid) four.store(whole + s);
                }
            }
        }
    };
    if (role == 0) {
        // C B^T, and the sums over heads of the gradients by it.
        float scores[8][4], of_pairs[8][4] = {};
        begin_products();
        multiply_by_states(scores, shared.C, shared.B);
        commit_products();
        wait_products<0>();
        results(scores);
        for_heads(first_head, end_head, copy, [&](int head, int parity, bool more) {
            GroupsShared::Stage &stage = shared.stages[parity];
            const Decays &decays = shared.decays[parity];
            HeadSums &sums = shared.sums[parity];
            RawSteps next = {};
            if (own == 0 && more) next = load(head + 1);
            begin_products();
            float grads[8][4];
            const u64 left = describe(stage.dy), right = describe(stage.x);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                multiply_tiles<false, false>(grads, part_of<false>(left, k),
                                             part_of<false>(right, k), k > 0, BFloat{});
            commit_products();
            wait_products<0>();
            results(grads);
            // The weights of x in y, and the gradients by C B^T.
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                if (b > own) break;
                float products[2][4], of_products[2][4], passed[2][4];
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    products[e >> 2][e & 3] = scores[2 * b + (e >> 2)][e & 3];
                    of_products[e >> 2][e & 3] = grads[2 * b + (e >> 2)][e & 3];
                }
                pass_pairs(products, of_products, passed, sums, decays, own, b);
                store_pairs(shared.weights, own, b, products);
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    of_pairs[2 * b + (e >> 2)][e & 3] += of_products[e >> 2][e & 3];
                sum_pairs(passed, sums, own, b);
            }
            show_to_products();
            asm volatile("bar.arrive %0, %1;" :: "n"(1), "n"(256) : "memory");
            if (own == 0) {
                if (head > first_head) finish(head - 1, parity ^ 1);
                if (more) prepare(head + 1, next, parity ^ 1);
            }
        });
        if (own == 0) finish(end_head - 1, (end_head - first_head - 1) & 1);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            if (b > own) break;
            float v[2][4];
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e >> 2][e & 3] = of_pairs[2 * b + (e >> 2)][e & 3];
            store_pairs(shared.weights, own, b, v);
        }
        show_to_products();
        __syncthreads();
    } else if (role == 1) {
        float of_rows[2][8][4] = {};
        for_heads(first_head, end_head, copy, [&](int head, int parity, bool more) {
            GroupsShared::Stage &stage = shared.stages[parity];
            const Decays &decays = shared.decays[parity];
            HeadSums &sums = shared.sums[parity];
            // What C reads from the state that enters.
            u32 dy[4][4], scaled[4][4];
            float read[8][4];
            begin_products();
            multiply_by_states(read, shared.C, stage.state);
            commit_products();
            load_rows(dy, stage.dy, own);
            const float upper = decays.enter[row], lower = decays.enter[row + 8];
            scale_rows(scaled, dy, upper, lower);
            begin_products();
            multiply_states(of_rows, scaled, stage.state);
            commit_products();
            // While these run: the product of the state and its gradient.
            float dot = 0.f;
            const char *const from = (const char *)stage.state + (threadIdx.x & 127) * 16;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint4 a = *(const uint4 *)(from + i * 2048);
                const uint4 b = *(const uint4 *)(from + i * 2048 + sizeof(stage.state));
                const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float2 one = BFloat::unpack(left[k]), other = BFloat::unpack(right[k]);
                    dot += one.x * other.x + one.y * other.y;
                }
            }
#pragma unroll
            for (int by = 16; by; by >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, by);
            if (lane == 0) sums.dots[own] = dot;
            wait_products<1>();
            results(read);
            const float2 dots = dot_rows(read, dy);
            if (t == 0) sums.reads[0][row] = upper * dots.x, sums.reads[0][row + 8] = lower * dots.y;
            wait_products<0>();
        });
        __syncthreads();
        begin_products();
        multiply_pairs<false>(of_rows, shared.weights, shared.B);
        store(of_rows, p.dC, 1);
    } else {
        float of_rows[2][8][4] = {};
        for_heads(first_head, end_head, copy, [&](int head, int parity, bool more) {
            GroupsShared::Stage &stage = shared.stages[parity];
            const Decays &decays = shared.decays[parity];
            HeadSums &sums = shared.sums[parity];
            // What B leaves in the state that leaves, and the gradient by x.
            u32 x[4][4], dy[4][4], scaled[4][4];
            float of_x[8][4];
            begin_products();
            multiply_by_states(of_x, shared.B, stage.grad_state);
            commit_products();
            load_rows(x, stage.x, own);
            if (p.D) {
                load_rows(dy, stage.dy, own);
                sum_skips(sums.skips[own], x, dy);
            }
            const float upper = decays.leave[row], lower = decays.leave[row + 8];
            const float upper_step = upper * decays.dt[row];
            const float lower_step = lower * decays.dt[row + 8];
            scale_rows(scaled, x, upper_step, lower_step);
            begin_products();
            multiply_states(of_rows, scaled, stage.grad_state);
            commit_products();
            wait_products<1>();
            results(of_x);
            const float2 dots = dot_rows(of_x, x);
            if (t == 0)
                sums.leaves[0][row] = upper * dots.x, sums.leaves[0][row + 8] = lower * dots.y;
#pragma unroll
            for (int e = 0; e < 32; ++e)
                of_x[e >> 2][e & 3] *= e & 2 ? lower_step : upper_step;
            asm volatile("bar.sync %0, %1;" :: "n"(1), "n"(256) : "memory");
            begin_products();
            const u64 weights = describe(shared.weights), right = describe(stage.dy);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                multiply_tiles<true, true>(of_x, part_of<true>(weights, k), part_of<true>(right, k),
                                           true, BFloat{});
            commit_products();
            load_rows(dy, stage.dy, own);
            wait_products<0>();
            results(of_x);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 skip = *(const float2 *)(sums.D + 8 * n + 2 * t);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float2 v = BFloat::unpack(dy[n >> 1][(n & 1) * 2 + k]);
                    of_x[n][2 * k] += skip.x * v.x, of_x[n][2 * k + 1] += skip.y * v.y;
                }
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                E *const to = (E *)p.dx.data + batch * p.dx.b + time(start + row + 8 * k) * p.dx.l
                    + (long long)head * p.dx.h;
#pragma unroll
                for (int n = 0; n < 8; n += 4) {
                    auto four = [&](int n) {
                        return Four<BFloat>(BFloat::pack(of_x[n][2 * k], of_x[n][2 * k + 1]),
                                            BFloat::pack(of_x[n + 1][2 * k], of_x[n + 1][2 * k + 1]));
                    };
                    store_eight<BFloat>(to + 8 * n, four(n), four(n + 2),
                                        row + 8 * k < count && 8 * n + 8 * t < p.dim);
                }
            }
        });
        __syncthreads();
        begin_products();
        multiply_pairs<true>(of_rows, shared.weights, shared.C);
        store(of_rows, p.dB, 0);
    }
}
