// Backward of a walk, any state size and dtype: one channel a thread, against the walk. README.md
// has the layout.
#include "walk.cuh"

// Sums of 16 quantities over the lanes of a warp. `add` takes four at a time (j of 4), `store`
// leaves the first 8 sums in one place and the others in another, which `place` chooses by lane.
template <bool EXACT>
struct Sums {
#if __CUDA_ARCH__ >= 800
    // On the tensor cores, m16n8k8 in TF32: the quantities are the first factor, a row for each 4
    // lanes; the second has ones in column 2 j for two of them and in column 2 j + 1 for the others.
    // The cores cut a number after 10 bits: EXACT takes it in two parts; else GAIN gives back the
    // mean of what is cut.
    static constexpr float GAIN = EXACT ? 1.f : 1.00035f;
    float c[4] = {0.f, 0.f, 0.f, 0.f};

    __device__ __forceinline__ void product(u32 even, u32 odd, float v0, float v1, float v2,
                                            float v3) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
            "{%6, %8, %7, %9}, {%4, %5}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(even), "r"(odd), "r"(__float_as_uint(v0)), "r"(__float_as_uint(v1)),
              "r"(__float_as_uint(v2)), "r"(__float_as_uint(v3)));
    }
    static __device__ __forceinline__ float head(float v) {
        return __uint_as_float(__float_as_uint(v) & 0xffffe000u);
    }
    __device__ __forceinline__ void add(int j, const u32 (&select)[8], float v0, float v1,
                                        float v2, float v3) {
        const u32 even = select[2 * j], odd = select[2 * j + 1];
        if (EXACT) {
            const float h0 = head(v0), h1 = head(v1), h2 = head(v2), h3 = head(v3);
            product(even, odd, h0, h1, h2, h3);
            product(even, odd, v0 - h0, v1 - h1, v2 - h2, v3 - h3);
        } else {
            product(even, odd, v0, v1, v2, v3);
        }
    }
    // Lane 4 g + t has what lanes 4 g to 4 g + 3 gave with j = t; each exchange halves it.
    static __device__ __forceinline__ float *place(float *first, float *second, int lane) {
        return (lane & 2 ? second : first) + 4 * (lane & 1) + (lane >> 3);
    }
    __device__ __forceinline__ void store(float *to, int lane) {
#pragma unroll
        for (int half = 2; half; --half) {
            const bool upper = lane & 8 * half;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const float given = upper ? c[i] : c[i + half];
                c[i] = (upper ? c[i + half] : c[i]) + __shfl_xor_sync(~0u, given, 8 * half);
            }
        }
        c[0] += __shfl_xor_sync(~0u, c[0], 4);
        if (!(lane & 4)) *to = c[0];
    }
#else
    static constexpr float GAIN = 1.f;
    float v[16];

    __device__ __forceinline__ void add(int j, const u32 (&)[8], float v0, float v1, float v2,
                                        float v3) {
        v[4 * j] = v0, v[4 * j + 1] = v1, v[4 * j + 2] = v2, v[4 * j + 3] = v3;
    }
    static __device__ __forceinline__ float *place(float *first, float *second, int lane) {
        return (lane & 16 ? second : first) + (lane >> 1 & 7);
    }
    __device__ __forceinline__ void store(float *to, int lane) {
#pragma unroll
        for (int turn = 0; turn < 4; ++turn) {
            const int half = 8 >> turn;
            const bool upper = lane & 2 * half;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i >= half) break;
                const float given = upper ? v[i] : v[i + half];
                v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(~0u, given, 2 * half);
            }
        }
        v[0] += __shfl_xor_sync(~0u, v[0], 1);
        if (!(lane & 1)) *to = v[0];
    }
#endif
};

// Of a multiprocessor: two where its shared memory holds two of 192 threads and 16 states.
#if __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10
constexpr int BLOCKS = 2;
#else
constexpr int BLOCKS = 1;
#endif

template <class T, int STATE, bool SEQ>
__global__ void __launch_bounds__(192, BLOCKS) walk_bwd(const Params p) {
    constexpr int OWN = (CHUNK / STEP + 1) * STATE + 4;
    constexpr bool EXACT = same<T, Float>;
    constexpr int SIZE = EXACT ? 4 : 2;
    // States to a turn of the loops over them, as the registers allow.
    constexpr int UNROLL = SEQ || STATE < 16 ? 1 : 2, ALONG = same<T, Float> ? 2 : 4;
    constexpr int READ = same<T, Float> ? 8 : 16;
    const Place place(p);
    const int k = place.k, b = place.b, group = place.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int own = threadIdx.x, width = blockDim.x;
    const int channel = place.column * width + own;
    const int length = p.height * p.width;
    const int known = min(STATE, p.state - group * STATE);
    // Of `partial`: dt in pairs, then B and C, before each of them a row that nobody reads.
    const int rank2 = (p.rank + 1) & ~1, columns = rank2 + 2 * (STATE + 1);

    extern __shared__ __align__(16) float shared[];
    float *const staged = shared;  // dt, B, C of a chunk
    float *const partial = staged + (p.rank + 2 * STATE) * PITCH;  // (warps, columns, STEP)
    // A thread's own numbers, adjacent: one address for all. An odd distance between threads keeps
    // them in different banks.
    float *const mine = partial + (width >> 5) * columns * STEP
                        + own * ((OWN + 2 * p.rank) | 1);
    float *const carry = mine;          // gradient by the state, times the decay that follows
    float *const kept = carry + STATE;  // the states before each STEP but the first
    volatile float *const bias = kept + (CHUNK / STEP - 1) * STATE;
    volatile float *const skip = bias + 1, *const grad_bias = bias + 2, *const grad_skip = bias + 3;
    constexpr int GRAD_RATES = CHUNK / STEP * STATE + 4;
    float *const grad_rates = mine + GRAD_RATES;
    float *const weights = mine + OWN, *const grad_weights = weights + p.rank;
    const float *const B_staged = staged + p.rank * PITCH;
    float *const own_partial = partial + warp * columns * STEP;
    float *const pair_place = Sums<EXACT>::place(own_partial + (rank2 + STATE + 1) * STEP,
                                                 own_partial + rank2 * STEP, lane);

    const bool valid = channel < p.dim;
    for (int r = 0; r < p.rank; ++r) {
        weights[r] = valid ? __ldg(p.weights + (k * p.rank + r) * p.dim + channel) : 0.f;
        grad_weights[r] = 0.f;
    }
    bias[0] = valid ? __ldg(p.bias + k * p.dim + channel) : 0.f;
    skip[0] = valid && group == 0 ? __ldg(p.skip + k * p.dim + channel) : 0.f;
    grad_bias[0] = grad_skip[0] = 0.f;
    const long long at_span
        = (place.walk(p) * p.spans + p.spans - 1 - place.span) * STATE * p.dim + channel;
#pragma unroll 4
    for (int n = 0; n < STATE; ++n) {
        carry[n] = p.entries && valid ? p.entries[at_span + n * p.dim] : 0.f;
        grad_rates[n] = 0.f;
    }
    const float *const rates
        = p.rates + (k * p.groups + group) * STATE * p.dim + min(channel, p.dim - 1);
    // Loops over the states have offsets in bytes that the compiler cannot see through: it would
    // calculate each of them from its parts in every turn.
    auto offset_of = [&](const float *p) { return (int)((p - shared) * 4); };
    auto in_shared = [&](int offset) { return (float *)((char *)shared + offset); };
    u32 select[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) select[j] = lane >> 2 == j ? 0x3f800000u : 0u;  // 1.0

    const Path path(p, SEQ ? 0 : k, false);
    const int in_sequence = SEQ ? k * p.dim : 0;
    // Offsets in bytes, calculated where they are used: the compiler would keep them in registers.
    auto hidden = [&] {
        int c = channel;
        asm volatile("" : "+r"(c));
        return c;
    };
    auto x_offset = [&] { return (b * p.x_b + (in_sequence + hidden()) * p.x_d) * SIZE; };
    auto states_of = [&](int chunk) {
        return p.states + (place.walk(p) * p.chunks + chunk) * STATE * p.dim + hidden();
    };
    auto grad_offset = [&] { return (b * p.grad_b + (in_sequence + hidden()) * p.grad_d) * SIZE; };
    auto y_offset = [&] {
        return (SEQ ? (((long long)group * p.batch + b) * p.routes * p.dim + in_sequence
                       + hidden()) * length
                    : (((long long)group * p.routes + k) * p.batch + b) * length * p.dim
                      + hidden()) * (p.y_type ? 2 : 4);
    };
    const Steps x_steps(path, (int)p.x_h, (int)p.x_w);
    const Steps grad_steps(path, (int)p.grad_h, (int)p.grad_w);
    const Steps y_steps(path, SEQ ? 0 : p.width * p.dim, SEQ ? 1 : p.dim);

    const int begin = place.span * p.span, end = min(length, begin + p.span);
    for (int chunk = (end - 1) / CHUNK; chunk >= begin / CHUNK; --chunk) {
        const int start = chunk * CHUNK, in_chunk = min(CHUNK, end - start);
        const int last = (in_chunk - 1) / STEP;
        __syncthreads();
        stage<T, STATE, SEQ, true, true>(p, staged, path, b, k, group, start, in_chunk);
        __syncthreads();

        u32 x_bits[STEP], dy_bits[STEP];  // loaded ahead
        auto load_ahead = [&](int s) {
            load_bits<T, SEQ>(x_bits, (const char *)p.x + x_offset(), path, x_steps,
                              start + s * STEP, in_chunk - s * STEP, valid, p.vector);
            load_bits<T, SEQ>(dy_bits, (const char *)p.grad + grad_offset(), path, grad_steps,
                              start + s * STEP, in_chunk - s * STEP, valid, p.vector);
        };

        // Along the walk: the state before each STEP.
        load_bits<T, SEQ>(x_bits, (const char *)p.x + x_offset(), path, x_steps, start, in_chunk,
                          valid, p.vector);
        {
            const float *const states = states_of(chunk);
#pragma unroll READ
            for (int n = 0; n < STATE; ++n) kept[n] = valid ? states[n * p.dim] : 0.f;
        }
#pragma unroll 1
        for (int s = 0; s < last; ++s) {
            float x[STEP], l[STEP];
            to_floats<T>(x, x_bits);
            if (s + 1 < last)
                load_bits<T, SEQ>(x_bits, (const char *)p.x + x_offset(), path, x_steps,
                                  start + (s + 1) * STEP, STEP, valid, p.vector);
            else
                load_ahead(last);
            log_decays<T, SEQ>(l, p, x_offset(), bias[0], staged + s * STEP, weights, 1, path,
                               x_steps, start + s * STEP, STEP, valid);
#pragma unroll
            for (int i = 0; i < STEP; ++i) x[i] *= l[i];
            int turns = known, to_entered = offset_of(kept + max(s - 1, 0) * STATE);
            int to_kept = offset_of(kept + s * STATE), to_B = offset_of(B_staged + s * STEP);
            asm volatile("" : "+r"(turns), "+r"(to_entered), "+r"(to_kept), "+r"(to_B));
            const float *rate_at = rates;
            float rate = __ldg(rate_at);
#pragma unroll ALONG
            for (; turns > 0; --turns) {
                const float next_rate = __ldg(rate_at += p.dim);  // at last of what follows A
                float B[STEP], h = in_shared(to_entered)[0];
                read8(B, in_shared(to_B));
#pragma unroll
                for (int i = 0; i < STEP; ++i) h = fmaf(ex2(rate * l[i]), h, x[i] * B[i]);
                in_shared(to_kept)[0] = h;
                rate = next_rate;
                to_entered += 4, to_kept += 4, to_B += PITCH * 4;
            }
        }
        if (last == 0) load_ahead(0);

#pragma unroll 1
        for (int s = last; s >= 0; --s) {
            const int from = start + s * STEP, count = in_chunk - s * STEP;
            float x[STEP], dy[STEP], l[STEP], q[STEP], e_sum[STEP];
            to_floats<T>(x, x_bits);
            to_floats<T>(dy, dy_bits);
            log_decays<T, SEQ>(l, p, x_offset(), bias[0], staged + s * STEP, weights, 1, path,
                               x_steps, from, count, valid);
            if (s == 0) {
                const float *const states = states_of(chunk);
#pragma unroll READ
                for (int n = 0; n < STATE; ++n) kept[n] = valid ? states[n * p.dim] : 0.f;
            }
            const float *const entered = kept + max(s - 1, 0) * STATE;
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                x[i] *= l[i];
                q[i] = e_sum[i] = 0.f;
            }
            // What a turn needs was read or calculated in the turn before, so that special functions
            // and loads run beside the two chains; the sums over lanes are stored a turn late.
            const float *rate_at = rates + p.dim;
            float rate = __ldg(rates), next_rate = __ldg(rate_at), h = entered[0], g = carry[0];
            float a[STEP], B[STEP], C[STEP];
            read8(B, B_staged + s * STEP);
            read8(C, B_staged + s * STEP + STATE * PITCH);
#pragma unroll
            for (int i = 0; i < STEP; ++i) a[i] = ex2(rate * l[i]);
            Sums<EXACT> before;
            int turns = known, to_own = offset_of(mine), to_entered = offset_of(entered);
            int to_B = offset_of(B_staged + s * STEP), to_sums = offset_of(pair_place);
            asm volatile("" : "+r"(turns), "+r"(to_own), "+r"(to_entered), "+r"(to_B), "+r"(to_sums));
#pragma unroll UNROLL
            for (; turns > 0; --turns) {
                // The last turns read what follows A in memory, and do not use it.
                const float rate_after = __ldg(rate_at += p.dim);
                const float h_after = in_shared(to_entered)[1], g_after = in_shared(to_own)[1];
                const float sum_before = in_shared(to_own)[GRAD_RATES];
                to_B += turns > 1 ? PITCH * 4 : 0;
                float next_a[STEP], ah[STEP], sum = 0.f;
                Sums<EXACT> sums;
#pragma unroll
                for (int i = 0; i < STEP; i += 4) {
                    float by_C[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        ah[i + j] = a[i + j] * h;
                        h = fmaf(x[i + j], B[i + j], ah[i + j]);
                        by_C[j] = dy[i + j] * h;
                        next_a[i + j] = ex2(next_rate * l[i + j]);
                    }
                    sums.add(i / 4, select, by_C[0], by_C[1], by_C[2], by_C[3]);
                }
#pragma unroll
                for (int i = STEP - 4; i >= 0; i -= 4) {
                    float by_B[4];
#pragma unroll
                    for (int j = 3; j >= 0; --j) {
                        g = fmaf(C[i + j], dy[i + j], g);
                        const float e = g * ah[i + j];
                        e_sum[i + j] = fmaf(rate, e, e_sum[i + j]);
                        sum = fmaf(l[i + j], e, sum);
                        q[i + j] = fmaf(g, B[i + j], q[i + j]);
                        by_B[j] = g * x[i + j];
                        g *= a[i + j];
                        a[i + j] = next_a[i + j];
                    }
                    read4(B + i, in_shared(to_B) + i);
                    read4(C + i, in_shared(to_B) + STATE * PITCH + i);
                    sums.add(2 + i / 4, select, by_B[0], by_B[1], by_B[2], by_B[3]);
                }
                before.store(in_shared(to_sums), lane);
                in_shared(to_own)[0] = g;
                in_shared(to_own)[GRAD_RATES] = sum_before + sum;
                before = sums;
                rate = next_rate, next_rate = rate_after, h = h_after, g = g_after;
                to_own += 4, to_entered += 4, to_sums += STEP * 4;
            }
            before.store(in_shared(to_sums), lane);

            // By delta, then by what is below the softplus (into e_sum), and by x (into q).
            if (!SEQ && s > 0) load_ahead(s - 1);
            float by_bias = 0.f, by_skip = 0.f;
            const float own_skip = skip[0];
            float grad_x[STEP], grad_z[STEP];
            if constexpr (SEQ) {
                // Again, from the cache: x in registers all along is too much.
                load_steps<T, SEQ>(x, (const char *)p.x + x_offset(), path, x_steps, from, count,
                                   valid, p.vector);
                if (s > 0) load_ahead(s - 1);
            } else {
                // Where delta is below 1e-30, so is all that this x leads to.
#pragma unroll
                for (int i = 0; i < STEP; ++i) x[i] *= reciprocal(fmaxf(l[i], 1e-30f));
            }
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                grad_x[i] = fmaf(q[i], l[i], own_skip * dy[i]);
                const float by_delta = fmaf(q[i] * LOG2E, x[i], e_sum[i]);
                grad_z[i] = !SEQ || p.softplus ? by_delta * softplus_slope(l[i]) : by_delta;
                by_bias += grad_z[i];
                by_skip = fmaf(dy[i], x[i], by_skip);
            }
            grad_bias[0] += by_bias;
            grad_skip[0] += by_skip;
            store_steps<T, SEQ>(grad_x, (char *)p.grad_x + y_offset(), path,
                                   y_steps, from, count, valid, p.vector, p.y_type);
            if constexpr (SEQ)
                store_steps<T, SEQ>(grad_z, (char *)p.grad_raw + y_offset(), path,
                                       y_steps, from, count, valid, p.vector, p.y_type);
            else {
                float *const dt_place
                    = Sums<EXACT>::place(own_partial, own_partial + STEP, lane);
#pragma unroll 1
                for (int r = 0; r < p.rank; r += 2) {
                    const bool two = r + 1 < p.rank;
                    const float w0 = weights[r], w1 = two ? weights[r + 1] : 0.f;
                    float dt0[STEP], dt1[STEP], sum0 = 0.f, sum1 = 0.f;
                    read8(dt0, staged + r * PITCH + s * STEP);
                    read8(dt1, staged + (r + 1) * PITCH + s * STEP);  // B if not `two`, unused
                    Sums<EXACT> sums;
#pragma unroll
                    for (int i = 0; i < STEP; ++i) {
                        sum0 = fmaf(grad_z[i], dt0[i], sum0);
                        sum1 = fmaf(grad_z[i], dt1[i], sum1);
                    }
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float w = j < 2 ? w0 : w1;
                        const float *z = grad_z + 4 * (j & 1);
                        sums.add(j, select, w * z[0], w * z[1], w * z[2], w * z[3]);
                    }
                    grad_weights[r] += sum0;
                    if (two) grad_weights[r + 1] += sum1;
                    sums.store(dt_place + r * STEP, lane);
                }
            }

            // The sums of the block's warps, in their order: a position and several columns each.
            __syncthreads();
            constexpr float GAIN = Sums<EXACT>::GAIN;
            const int i = own % STEP;
            const Steps rows(path, p.width, 1);
            const int part = (SEQ ? 0 : group * p.columns) + place.column;
            const long long sample = (long long)part * p.batch + b;
            const long long at = SEQ
                ? ((sample * p.routes + k) * p.state + group * STATE) * length + from + i
                : ((sample * length + rows.at(path, min(from + i, length - 1))) * p.routes + k)
                  * (p.rank + 2 * p.state);
            for (int column = own / STEP; i < count && column < columns; column += width / STEP) {
                const bool of_dt = column < rank2, of_C = column > rank2 + STATE;
                const int n = column - rank2 - (of_C ? STATE + 2 : 1);
                if (of_dt ? column >= p.rank : n < 0 || n >= known) continue;
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < 6; ++w)
                    if (w < width >> 5) sum += partial[(w * columns + column) * STEP + i];
                sum *= of_dt || of_C ? GAIN * LN2 : GAIN;
                if constexpr (SEQ)
                    store(of_C ? p.grad_C : p.grad_B, at + (long long)n * length, sum, p.part_type);
                else
                    store(p.grad_raw, at + (of_dt ? column : p.rank + (of_C ? p.state : 0)
                                            + group * STATE + n), sum, p.part_type);
            }
            __syncthreads();
        }
    }
    if (!valid) return;
    float *to = p.sums + ((((long long)b * p.spans + place.span) * p.routes + k) * p.groups + group)
                * (STATE + p.rank + 2) * p.dim + channel;
#pragma unroll
    for (int n = 0; n < STATE; ++n) to[n * p.dim] = grad_rates[n] * LN2;
    to += STATE * p.dim;
    for (int r = 0; r < p.rank; ++r) to[r * p.dim] = grad_weights[r];
    to += p.rank * p.dim;
    to[0] = grad_bias[0];
    to[p.dim] = grad_skip[0];
}
