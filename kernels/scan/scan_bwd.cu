// Backward of a walk, any state size and dtype: a lane has a tile of states and channels and takes
// four positions at a time, against the walk. README.md has the layout.
#include "scan/scan.cuh"

constexpr int QUADS = SAVED / 4, ROW = pitch_for<SAVED>;
// Of a block at most: no more fit into the shared memory of the other generations.
#if __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10
constexpr int WARPS = 12;
#else
constexpr int WARPS = 8;
#endif
constexpr int TEAM = 4;    // warps that wait for each other

// Barriers of the hardware: of team t (from 0), and between it and the team before (from 1).
constexpr int OWN = 1, STAGED = 3, FULL = 5, EMPTY = 7;

__device__ __forceinline__ void arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void wait(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

// Sums of half maps on the tensor cores, m16n8k8 in TF32. These cut a number after 10 bits: GAIN
// gives back the mean of what is cut. For sm_100 the compiler has too few registers for it.
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ / 100 != 10
template <class T> constexpr bool CORES = !same<T, Float>;
#else
template <class T> constexpr bool CORES = false;
#endif
template <class T> constexpr float GAIN = CORES<T> ? 1.00035f : 1.f;

__device__ __forceinline__ void multiply(float (&c)[4], float a0, float a1, float a2, float a3,
                                         float b0, float b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
          "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

// kept + what the lane `mask` away gives of its own.
__device__ __forceinline__ float add_other(float kept, float given, int mask) {
    return kept + __shfl_xor_sync(~0u, given, mask);
}

// Lanes with `upper` keep the second and give the first, the others the reverse.
__device__ __forceinline__ float halve(float first, float second, bool upper, int mask) {
    return add_other(upper ? second : first, upper ? first : second, mask);
}

template <class T, int STATE, bool SEQ>
__global__ void __launch_bounds__(32 * WARPS, 1) scan_bwd(const Params p) {
    constexpr int STATES = STATE < 4 ? STATE : 4;   // of a lane
    constexpr int CHANNELS = STATE == 16 ? 2 : 1;   // of a lane
    constexpr int SHARING = 32 * STATES / STATE;    // lanes that have the same states
    constexpr int WIDTH = SHARING * CHANNELS;       // channels of a warp
    constexpr int SLOT = 32 * CHANNELS * STATES;
    // Beside its tile, a lane has ITEMS times four positions of one channel, APART from each other.
    constexpr int ITEMS = QUADS * WIDTH / 32, APART = 4 * 32 / WIDTH;
    constexpr int SIZE = same<T, Float> ? 4 : 2;
    constexpr bool SUM_BY_CORES = CORES<T> && STATES == 4;
    constexpr int SPLIT = CORES<T> ? 1 : 2;  // parts of a warp's channels, for the gradient by dt
    const Place place(p);
    const int k = place.k, b = place.b, group = place.group;
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    const int warp = __shfl_sync(~0u, (int)threadIdx.x >> 5, 0);  // the same for all lanes
    const int length = p.height * p.width, width = warps * WIDTH;
    const int known = min(STATE, p.state - group * STATE);

    extern __shared__ __align__(16) float shared[];
    // The teams of warps are at different places, so that what they wait for differs: the first
    // stages dt, B and C of a chunk, each hands its sums of a chunk to the next, which follows it.
    const int teams = (warps + TEAM - 1) / TEAM, team = warp / TEAM;
    const int team_threads = min(32 * TEAM, (int)blockDim.x - 32 * TEAM * team);
    const int with_last = 32 * TEAM + team_threads;  // threads of this and the team before
    const int with_next = team_threads + min(32 * TEAM, (int)blockDim.x - 32 * TEAM * (team + 1));
    const bool is_last = team == teams - 1;
    const int all = (SEQ ? 0 : p.rank) + 2 * STATE;  // columns
    float *const handed = shared;  // (teams - 1, QUADS, columns, 4): sums of the teams so far
    float *const rings = handed + (teams - 1) * QUADS * all * 4;  // (teams, columns, ROW)
    float *const weights = rings + teams * all * ROW;             // (R, channels of the block)
    const int by_dt_size = max(3 * WIDTH * ROW, p.rank * SPLIT * SAVED);
    const int rank8 = (p.rank + 7) & ~7;
    const int region = by_dt_size + WIDTH * ROW + QUADS * SLOT + (rank8 + 5) * 32
        + (SIZE == 2 ? 1 : SEQ ? 2 : 0) * WIDTH * SAVED;
    float *const regions = weights + p.rank * width;
    float *const by_dt = regions + warp * region;        // (R, SPLIT, SAVED), last of all
    float *const decays = by_dt;                         // (WIDTH, ROW): l
    float *const inputs = decays + WIDTH * ROW;          // x l, then q
    float *const grads = inputs + WIDTH * ROW;           // dy, then e
    float *const slopes = by_dt + by_dt_size;            // of the softplus, then the gradient by z
    float *const slots = slopes + WIDTH * ROW;           // states before 4 positions, then sums
    // A lane's own, 32 apart.
    volatile float *const bias = slots + QUADS * SLOT + lane, *const skip = bias + 32;
    volatile float *const grad_bias = bias + 64, *const grad_skip = bias + 96;
    volatile u32 *const arranged = (volatile u32 *)(bias + 128);
    float *const grad_weights = slots + QUADS * SLOT + 160 + lane;
    // x and dy of a lane's positions, together if of half precision, 4 words of a lane; else, where
    // shared memory is too small, they stay in registers.
    uint4 *const bits = (uint4 *)(slots + QUADS * SLOT + (rank8 + 5) * 32) + lane;

    // The lane's tile. The order of its channels and states depends on the lane, so that sums over
    // lanes take from each what it has at the same place.
    const int in_shared = lane % SHARING, quarter = lane / SHARING;
    const int warp_channel = (place.column * warps + warp) * WIDTH;
    int columns[CHANNELS], states[STATES];
    float rate[CHANNELS][STATES], g[CHANNELS][STATES], grad_rate[CHANNELS][STATES];
#pragma unroll
    for (int i = 0; i < STATES; ++i)
        states[i] = quarter * STATES + (SUM_BY_CORES ? i : i ^ (in_shared & (STATES - 1)));
    const long long at_span
        = (place.walk(p) * p.spans + p.spans - 1 - place.span) * STATE * p.dim + warp_channel;
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
        columns[j] = in_shared + SHARING * (j ^ (quarter & (CHANNELS - 1)));
        const int d = columns[j];
        const bool valid = warp_channel + d < p.dim;
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
            rate[j][i] = valid
                ? __ldg(p.rates + ((k * p.groups + group) * STATE + states[i]) * p.dim
                                       + warp_channel + d) : 0.f;
            g[j][i] = p.entries && valid ? p.entries[at_span + states[i] * p.dim + d] : 0.f;
            grad_rate[j][i] = 0.f;
        }
    }

    const int own = lane % WIDTH, own_first = 4 * (lane / WIDTH), channel = warp_channel + own;
    const bool valid = channel < p.dim;
    bias[0] = valid ? __ldg(p.bias + k * p.dim + channel) : 0.f;
    skip[0] = valid && group == 0 ? __ldg(p.skip + k * p.dim + channel) : 0.f;
    grad_bias[0] = grad_skip[0] = 0.f;
    for (int r = 0; r < rank8; ++r) {
        grad_weights[r * 32] = 0.f;
        if (lane < WIDTH && r < p.rank)
            weights[r * width + warp * WIDTH + lane]
                = valid ? __ldg(p.weights + (k * p.rank + r) * p.dim + channel) : 0.f;
    }

    const int in_sequence = SEQ ? k * p.dim : 0;
    // What follows is calculated where it is used: the compiler would keep it in registers.
    auto hidden_route = [&] {
        int route = SEQ ? 0 : k;
        asm volatile("" : "+r"(route));
        return route;
    };
    auto hidden = [&] {
        int c = channel;
        asm volatile("" : "+r"(c));
        return c;
    };
    auto x_offset = [&] { return (b * p.x_b + (in_sequence + hidden()) * p.x_d) * SIZE; };
    auto grad_offset = [&] { return (b * p.grad_b + (in_sequence + hidden()) * p.grad_d) * SIZE; };
    auto y_offset = [&] {
        return (SEQ ? (((long long)group * p.batch + b) * p.routes * p.dim + in_sequence
                       + hidden()) * length
                    : (((long long)group * p.routes + k) * p.batch + b) * length * p.dim
                      + hidden()) * (p.y_type ? 2 : 4);
    };

    const int begin = place.span * p.span, end = min(length, begin + p.span);
    u32 x_bits[ITEMS][4], dy_bits[ITEMS][4];
    float h[CHANNELS][STATES];
    // For sums over 4 lanes: that of the first 8 of 16 rows goes to lane i of them.
    float select[2 * STATES];
#pragma unroll
    for (int i = 0; i < 2 * STATES; ++i) {
        select[i] = lane >> 2 == i ? 1.f : 0.f;
        asm volatile("" : "+f"(select[i]));  // the compiler would calculate it in every turn
    }
    using Stage = Staging<T, STATE, SEQ, true, true, SAVED, SEQ ? 8 : 4>;
    if (team == 0) arranged[0] = Stage::arrange(p, min(32 * TEAM, (int)blockDim.x));
    auto load_maps = [&](int chunk, const Path &path) {
        const int start = chunk * SAVED, count = min(SAVED, end - start);
        const Steps x_steps(path, (int)p.x_h, (int)p.x_w);
        const Steps grad_steps(path, (int)p.grad_h, (int)p.grad_w);
        const char *const x_at = (const char *)p.x + x_offset();
        const char *const grad_at = (const char *)p.grad + grad_offset();
#pragma unroll
        for (int m = 0; m < ITEMS; ++m) {
            const int i = own_first + m * APART;
            load_bits<T, SEQ>(x_bits[m], x_at, path, x_steps, start + i, count - i, valid,
                              p.vector);
            load_bits<T, SEQ>(dy_bits[m], grad_at, path, grad_steps, start + i, count - i, valid,
                              p.vector);
        }
    };
    auto load_chunk = [&](int chunk, const Path &path) {
        load_maps(chunk, path);
        const float *const from
            = p.states + (place.walk(p) * p.chunks + chunk) * STATE * p.dim + warp_channel;
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
            for (int i = 0; i < STATES; ++i)
                h[j][i] = warp_channel + columns[j] < p.dim
                    ? from[states[i] * p.dim + columns[j]] : 0.f;
    };
    // Of the state whose sums this lane has at last, and of B or of C.
    const int kept = quarter * STATES + (in_shared & (STATES - 1));
    const bool of_C = lane & STATES;
    auto offset_of = [&](const float *p) { return (int)((p - shared) * 4); };

    int chunk = (end - 1) / SAVED, ring = 0;
    load_chunk(chunk, Path(p, hidden_route(), false));
    for (; chunk >= begin / SAVED; --chunk) {
        if (SEQ && chunk < (end - 1) / SAVED) load_chunk(chunk, Path(p, 0, false));
        const int start = chunk * SAVED, count = min(SAVED, end - start), quads = (count + 3) / 4;
        float *const staged = rings + ring * all * ROW;
        ring = ring + 1 < teams ? ring + 1 : 0;
        if (team == 0) {
            Stage(p, Path(p, hidden_route(), false), place, team_threads, arranged[0]).run(
                staged, start, count);
            wait(OWN, team_threads);
        } else {
            wait(STAGED + team, with_last);
        }

        // For the warp's channels: l, x l, dy, and the slope of the softplus.
        {
            float z[4 * ITEMS];
            if constexpr (SEQ) {
                const char *const from = (const char *)p.raw + x_offset();
                const Path path(p, 0, false);
                const Steps x_steps(path, 0, 1);
#pragma unroll
                for (int m = 0; m < ITEMS; ++m) {
                    const int i = own_first + m * APART;
                    float delta[4];
                    load_steps<T, SEQ>(delta, from, path, x_steps, start + i, count - i, valid,
                                       p.vector);
#pragma unroll
                    for (int t = 0; t < 4; ++t) z[4 * m + t] = fmaf(delta[t], LOG2E, bias[0]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < 4 * ITEMS; ++i) z[i] = bias[0];
                add_product<ITEMS>(z, p.rank, weights + warp * WIDTH + own, width,
                                   staged + own_first, ROW, APART);
            }
#pragma unroll
            for (int m = 0; m < ITEMS; ++m) {
                const int i = own_first + m * APART, at = own * ROW + i;
                float x[4], dy[4], l[4], slope[4];
                to_floats<T>(x, x_bits[m]);
                to_floats<T>(dy, dy_bits[m]);
                if constexpr (SIZE == 4 && SEQ) {
                    write4((float *)(bits + 64 * m), x);
                    write4((float *)(bits + 64 * m + 32), dy);
                }
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const bool inside = valid && i + t < count, soft = !SEQ || p.softplus;
                    l[t] = z[4 * m + t];
                    if (soft) l[t] = softplus2<T>(l[t]);
                    slope[t] = !inside ? 0.f : soft ? ex2(z[4 * m + t] - l[t]) : 1.f;
                    if (!inside) l[t] = 0.f;
                    x[t] *= l[t];
                }
                if constexpr (SIZE == 2)
                    bits[32 * m] = make_uint4(
                        x_bits[m][0] | dy_bits[m][0] << 16, x_bits[m][1] | dy_bits[m][1] << 16,
                        x_bits[m][2] | dy_bits[m][2] << 16, x_bits[m][3] | dy_bits[m][3] << 16);
                write4(decays + at, l);
                write4(inputs + at, x);
                write4(grads + at, dy);
                write4(slopes + at, slope);
            }
        }
        __syncwarp();

        // Addresses in shared memory have offsets in bytes that the compiler cannot see through: it
        // would calculate each of them from its parts in every turn.
        constexpr int ROWS = SUM_BY_CORES ? 1 : STATES;  // else at constant distances
        auto at = [&](int offset) { return (float *)((char *)shared + offset); };
        int to_channel[CHANNELS], to_B[ROWS], to_slot = offset_of(slots + lane * STATES);
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) {
            to_channel[j] = offset_of(decays + columns[j] * ROW);
            asm volatile("" : "+r"(to_channel[j]));
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            to_B[i] = offset_of(staged + (p.rank + states[i]) * ROW);
            asm volatile("" : "+r"(to_B[i]));
        }
        asm volatile("" : "+r"(to_slot));
        constexpr int TO_INPUTS = WIDTH * ROW, TO_GRADS = 2 * TO_INPUTS, TO_C = STATE * ROW;

        // Along the walk: the states before each 4 positions.
#pragma unroll 1
        for (int s = 0;; ++s) {
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) {
                if constexpr (STATES == 4) write4(at(to_slot) + 128 * j, h[j]);
                else at(to_slot)[0] = h[j][0];
            }
            if (s + 1 >= quads) break;
            float l[CHANNELS][4], x[CHANNELS][4];
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) {
                read4(l[j], at(to_channel[j]));
                read4(x[j], at(to_channel[j]) + TO_INPUTS);
                to_channel[j] += 16;
            }
            to_slot += 4 * SLOT;
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                float B[4];
                read4(B, at(to_B[i % ROWS]) + i / ROWS * ROW);
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int j = 0; j < CHANNELS; ++j)
                        h[j][i] = fmaf(ex2(rate[j][i] * l[j][t]), h[j][i], x[j][t] * B[t]);
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) to_B[i] += 16;
        }

        if (!is_last) arrive(STAGED + team + 1, with_next);
        int to_sums = offset_of(slots + (quads - 1) * SLOT + kept * 4 + (of_C ? STATE * 4 : 0));
        asm volatile("" : "+r"(to_sums));
#pragma unroll 1
        for (int s = quads - 1; s >= 0; --s) {
            float l[CHANNELS][4], x[CHANNELS][4], dy[CHANNELS][4];
            float q[CHANNELS][4], e[CHANNELS][4];
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) {
                read4(l[j], at(to_channel[j]));
                read4(x[j], at(to_channel[j]) + TO_INPUTS);
                read4(dy[j], at(to_channel[j]) + TO_GRADS);
                if constexpr (STATES == 4) read4(h[j], at(to_slot) + 128 * j);
                else h[j][0] = at(to_slot)[0];
#pragma unroll
                for (int t = 0; t < 4; ++t) q[j][t] = e[j][t] = 0.f;
            }
            float sums[2][4] = {}, odd[2][4];  // by B and by C of the state that the lane keeps
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                float B[4], C[4], by[2][4];
                read4(B, at(to_B[i % ROWS]) + i / ROWS * ROW);
                read4(C, at(to_B[i % ROWS]) + i / ROWS * ROW + TO_C);
#pragma unroll
                for (int j = 0; j < CHANNELS; ++j) {
                    float a[4], ah[4];
#pragma unroll
                    for (int t = 0; t < 4; ++t) {
                        a[t] = ex2(rate[j][i] * l[j][t]);
                        ah[t] = a[t] * h[j][i];
                        h[j][i] = fmaf(x[j][t], B[t], ah[t]);
                        by[1][t] = j ? fmaf(dy[j][t], h[j][i], by[1][t]) : dy[j][t] * h[j][i];
                    }
#pragma unroll
                    for (int t = 3; t >= 0; --t) {
                        const float grad = fmaf(C[t], dy[j][t], g[j][i]), f = grad * ah[t];
                        by[0][t] = j ? fmaf(grad, x[j][t], by[0][t]) : grad * x[j][t];
                        q[j][t] = fmaf(grad, B[t], q[j][t]);
                        e[j][t] = fmaf(rate[j][i], f, e[j][t]);
                        grad_rate[j][i] = fmaf(l[j][t], f, grad_rate[j][i]);
                        g[j][i] = grad * a[t];
                    }
                }
#pragma unroll
                for (int of = 0; of < 2; ++of)
                    if constexpr (SUM_BY_CORES)
                        multiply(sums[of], by[of][0], by[of][2], by[of][1], by[of][3],
                                 select[2 * i], select[2 * i + 1]);
#pragma unroll
                for (int of = 0; of < 2 && !SUM_BY_CORES; ++of)
#pragma unroll
                    for (int t = 0; t < 4; ++t) {
                        if (i % 2 == 0) odd[of][t] = by[of][t];
                        else odd[of][t] = add_other(odd[of][t], by[of][t], 1);
                        if (i == STATES - 1 && STATES < 4 || i == 1) sums[of][t] = odd[of][t];
                        if (i == 3) sums[of][t] = add_other(sums[of][t], odd[of][t], 2);
                    }
            }

            // Over the lanes that have the same states, then over those of the same channels.
            float half[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) half[t] = halve(sums[0][t], sums[1][t], of_C, STATES);
            float *const to = at(to_sums), *const by_channel = at(to_channel[0]);
            if constexpr (STATE == 16) {
                const bool of_e = lane & 16;
                float mine[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    q[0][t] = add_other(q[0][t], q[1][t], 8);
                    e[0][t] = add_other(e[0][t], e[1][t], 8);
                    mine[t] = halve(q[0][t], e[0][t], of_e, 16);
                }
                __syncwarp();
                write4(to, half);
                write4(by_channel + (of_e ? TO_GRADS : TO_INPUTS), mine);
            } else {
                const bool later = lane & 2 * STATES, second = lane & 4 * STATES;
                const float low = halve(half[0], half[2], later, 2 * STATES);
                const float high = halve(half[1], half[3], later, 2 * STATES);
                float sum = halve(low, high, second, 4 * STATES);
#pragma unroll
                for (int mask = 8 * STATES; mask < 32; mask *= 2) sum = add_other(sum, sum, mask);
                __syncwarp();
                if (lane < 8 * STATES) to[(later ? 2 : 0) + (second ? 1 : 0)] = sum;
                write4(by_channel + TO_INPUTS, q[0]);
                write4(by_channel + TO_GRADS, e[0]);
            }
            to_slot -= 4 * SLOT, to_sums -= 4 * SLOT;
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) to_channel[j] -= 16;
#pragma unroll
            for (int i = 0; i < ROWS; ++i) to_B[i] -= 16;
        }
        __syncwarp();

        // By x and by what is below the softplus.
        const Path path(p, hidden_route(), false);
        const Steps y_steps(path, SEQ ? 0 : p.width * p.dim, SEQ ? 1 : p.dim);
        float grad_z[4 * ITEMS], by_bias = 0.f, by_skip = 0.f;
        const float own_skip = skip[0];
        const long long y_at = y_offset();
#pragma unroll
        for (int m = 0; m < ITEMS; ++m) {
            const int i = own_first + m * APART, here = own * ROW + i;
            float x[4], dy[4], l[4], q[4], e[4], slope[4], grad_x[4];
            if constexpr (SIZE == 2) {
                const uint4 both = bits[32 * m];
                const u32 words[4] = {both.x, both.y, both.z, both.w};
#pragma unroll
                for (int t = 0; t < 4; ++t)
                    x[t] = T::unpack(words[t]).x, dy[t] = T::unpack(words[t]).y;
            } else if constexpr (SEQ) {
                read4(x, (const float *)(bits + 64 * m));
                read4(dy, (const float *)(bits + 64 * m + 32));
            } else {
                to_floats<T>(x, x_bits[m]);
                to_floats<T>(dy, dy_bits[m]);
            }
            read4(l, decays + here);
            read4(q, inputs + here);
            read4(e, grads + here);
            read4(slope, slopes + here);
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                grad_x[t] = fmaf(q[t], l[t], own_skip * dy[t]);
                slope[t] *= fmaf(q[t] * LOG2E, x[t], e[t]);
                grad_z[4 * m + t] = slope[t];
                by_bias += slope[t];
                by_skip = fmaf(dy[t], x[t], by_skip);
            }
            write4(slopes + here, slope);
            store_steps<T, SEQ>(grad_x, (char *)p.grad_x + y_at, path, y_steps, start + i,
                                count - i,
                                valid, p.vector, p.y_type);
            if constexpr (SEQ)
                store_steps<T, SEQ>(slope, (char *)p.grad_raw + y_at, path, y_steps, start + i,
                                    count - i, valid, p.vector, p.y_type);
        }
        grad_bias[0] += by_bias;
        grad_skip[0] += by_skip;
        if (!SEQ && chunk > begin / SAVED) load_chunk(chunk - 1, path);  // ahead
        if constexpr (!SEQ && CORES<T>) {
            __syncwarp();
            const int g = lane >> 2, t = lane & 3;
            for (int r = 0; r < p.rank; r += 8) {  // rows and columns beyond R are not used
#pragma unroll
                for (int d = 0; d < WIDTH; d += 16) {
                    const float *const a = slopes + (d + g) * ROW + t;
                    const float *const b = staged + (r + g) * ROW + t;
                    float *const to = grad_weights + r * WIDTH + 8 * d;
                    float sum[4] = {to[0], to[32], to[64], to[96]};
#pragma unroll
                    for (int i = 0; i < SAVED; i += 8)
                        multiply(sum, a[i], a[8 * ROW + i], a[i + 4], a[8 * ROW + i + 4], b[i],
                                 b[i + 4]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) to[32 * i] = sum[i];
                }
                const float *const a = weights + min(r + g, p.rank - 1) * width + warp * WIDTH + t;
                float by[SAVED / 8][4] = {};
#pragma unroll
                for (int d = 0; d < WIDTH; d += 8) {
                    const float *const b = slopes + (d + t) * ROW + g;
#pragma unroll
                    for (int i = 0; i < SAVED; i += 8)
                        multiply(by[i / 8], a[d], 0.f, a[d + 4], 0.f, b[i], b[4 * ROW + i]);
                }
                if (r + g < p.rank)
#pragma unroll
                    for (int i = 0; i < SAVED; i += 8)
                        *(float2 *)(by_dt + (r + g) * SAVED + i + 2 * t)
                            = make_float2(by[i / 8][0], by[i / 8][1]);
            }
        } else if constexpr (!SEQ) {
#pragma unroll 1
            for (int r = 0; r < p.rank; ++r) {
                float sum = 0.f;
#pragma unroll
                for (int m = 0; m < ITEMS; ++m) {
                    float dt[4];
                    read4(dt, staged + r * ROW + own_first + m * APART);
#pragma unroll
                    for (int t = 0; t < 4; ++t) sum = fmaf(grad_z[4 * m + t], dt[t], sum);
                }
                grad_weights[r * 32] += sum;
            }
            __syncwarp();
            // By dt: a lane sums over a part of the channels, at 4 positions.
#pragma unroll 1
            for (int item = lane; item < p.rank * SPLIT * QUADS; item += 32) {
                const int s = item % QUADS, part = item / QUADS % SPLIT;
                const int first = part * (WIDTH / SPLIT);
                const float *const w = weights + item / (QUADS * SPLIT) * width + warp * WIDTH;
                float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int d = first; d < first + WIDTH / SPLIT; d += 4) {
                    float by[4];
                    read4(by, w + d);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        float z[4];
                        read4(z, slopes + (d + j) * ROW + 4 * s);
#pragma unroll
                        for (int t = 0; t < 4; ++t) sum[t] = fmaf(by[j], z[t], sum[t]);
                    }
                }
                write4(by_dt + item * 4, sum);
            }
        }
        wait(OWN + team, team_threads);

        // The sums of the warps, in their order: a column and 4 positions to a thread.
        if (team > 0) wait(FULL + team, with_last);
        if (!is_last && end - start > SAVED) wait(EMPTY + team + 1, with_next);
        const int rank = SEQ ? 0 : p.rank;
        const Steps rows(path, p.width, 1);
        const long long sample
            = (long long)((SEQ ? 0 : group * p.columns) + place.column) * p.batch + b;
        for (int task = threadIdx.x - 32 * TEAM * team; task < all * quads; task += team_threads) {
            const int s = task / all, column = task - s * all, n = (column - rank) % STATE;
            const bool of_dt = column < rank, of_C = column >= rank + STATE;
            const float *from = regions + TEAM * team * region
                + (of_dt ? (column * SPLIT * QUADS + s) * 4
                         : (slots - by_dt) + s * SLOT + (column - rank) * 4);
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
            if (team > 0) read4(sum, handed + ((team - 1) * QUADS * all + task) * 4);
#pragma unroll
            for (int w = 0; w < TEAM; ++w, from += region) {
                if (32 * w >= team_threads) break;
#pragma unroll
                for (int part = 0; part < SPLIT; ++part) {
                    if (part && !of_dt) break;
                    float v[4];
                    read4(v, from + part * QUADS * 4);
#pragma unroll
                    for (int t = 0; t < 4; ++t) sum[t] += v[t];
                }
            }
            if (!is_last) write4(handed + (team * QUADS * all + task) * 4, sum);
            if (!is_last || !of_dt && n >= known) continue;
            const float scale = (of_dt || of_C ? LN2 : 1.f)
                * (of_dt ? GAIN<T> * GAIN<T> : SUM_BY_CORES ? GAIN<T> : 1.f);
            const int at = column + (of_dt ? 0 : (of_C ? p.state - STATE : 0) + group * STATE);
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const int i = start + 4 * s + t;
                if (i >= start + count) break;
                if constexpr (SEQ)
                    store(of_C ? p.grad_C : p.grad_B,
                          ((sample * p.routes + k) * p.state + group * STATE + n) * length + i,
                          sum[t] * scale, p.part_type);
                else
                    store(p.grad_raw, ((sample * length + rows.at(path, i)) * p.routes + k)
                                      * (p.rank + 2 * p.state) + at, sum[t] * scale, p.part_type);
            }
        }
        if (team > 0 && chunk > begin / SAVED) arrive(EMPTY + team, with_last);
        if (!is_last) arrive(FULL + team + 1, with_next);
    }

    float *to = p.sums + ((((long long)b * p.spans + place.span) * p.routes + k) * p.groups + group)
                * (STATE + p.rank + 2) * p.dim + warp_channel;
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
        for (int i = 0; i < STATES; ++i)
            if (warp_channel + columns[j] < p.dim)
                to[states[i] * p.dim + columns[j]] = grad_rate[j][i] * LN2;
    to += STATE * p.dim + own;
    auto over_lanes = [&](float v) {
#pragma unroll
        for (int mask = WIDTH; mask < 32; mask *= 2) v = add_other(v, v, mask);
        return v;
    };
    const bool writes = valid && lane < WIDTH;
    if constexpr (CORES<T>) {
        for (int r = 2 * (lane & 3); r < p.rank; r += 8)
#pragma unroll
            for (int j = 0; j < WIDTH / 4; ++j) {
                const int d = j / 4 * 16 + (j & 2) * 4 + (lane >> 2), row = r + (j & 1);
                if (warp_channel + d < p.dim && row < p.rank)
                    to[(long long)row * p.dim + d - own]
                        = grad_weights[r / 8 * 8 * WIDTH + 32 * j] * GAIN<T>;
            }
        to += p.rank * p.dim;
    } else {
        for (int r = 0; r < p.rank; ++r, to += p.dim) {
            const float sum = over_lanes(grad_weights[r * 32]);
            if (writes) to[0] = sum;
        }
    }
    const float by_bias = over_lanes(grad_bias[0]), by_skip = over_lanes(grad_skip[0]);
    if (writes) to[0] = by_bias, to[p.dim] = by_skip;
}
