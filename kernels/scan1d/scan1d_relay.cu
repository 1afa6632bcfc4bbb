// selective_scan along sequences, forward, where channels are too few to fill the GPU: the warps of
// a block have the same channels and take turns in time. A warp runs its tile from zero, with decays
// and drives in registers; waits for the state that enters it; hands on what leaves it at once; and
// runs the tile from the state that entered. So nothing is read and no exponential is calculated
// twice. Time is in the order of the scan; positions of a channel are adjacent in memory.
#include "scan1d/scan1d.cuh"

// A lane has NS states of two channels, its own one and its neighbour's, which has the same two the
// other way round; LANES adjacent lanes share them. Of maps, B and C a lane has OWN steps of a
// tile's STEPS: of its own channel, and of the row with that number.
constexpr int NS = 4, LANES = 4, N = NS * LANES, CHANNELS = 2 * 32 / LANES;
constexpr int STEPS = 8, OWN = 4, WARPS = THREADS / 32;
// In shared memory: l and x of two steps of a channel are adjacent, the channels of two steps a row;
// B and C of a step are a row. With these gaps no two lanes write to one bank.
constexpr int ROW = 4 * CHANNELS + 8, BC_ROW = 2 * N + 4;
constexpr int TILE = STEPS / 2 * ROW, BC_TILE = STEPS * BC_ROW, ENTRY = 32 * 2 * NS;

struct Scan1dRelayParams {
    const void *u, *delta, *z, *B, *C;
    void *y;
    const void *A, *D, *bias;  // (K * D, N); (K * D) or null
    const float *first;        // (B, K * D, N): the state before the first step, or null for zeros
    float *last;               // (B, K * D, N): the state after the last step, or null
    long long b, k, row_b, row_k;  // strides, in elements: of maps, and of B and C
    int s;                         // from a channel to the next, or from a row of B or C
    int dim, length, state, routes, columns, tiles;
    int softplus, y_type, A_type, D_type, bias_type;  // types as in load_parameter
};

// OWN elements of a lane, adjacent in memory, of which the first `count` in time exist.
template <class T, bool VECTOR, bool BACK>
__device__ __forceinline__ typename Raw<T>::type load_own(const char *from, int count) {
    typedef typename Raw<T>::type R;
    R raw{};
    if constexpr (VECTOR) {
        if (count > 0) raw = __ldg((const R *)from);
    } else {
        u32 v[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            v[i] = 0;
            if ((BACK ? OWN - 1 - i : i) < count)
                v[i] = same<T, Float> ? __ldg((const u32 *)from + i) : load_u16(from + 2 * i);
        }
        if constexpr (same<T, Float>)
            raw = make_float4(__uint_as_float(v[0]), __uint_as_float(v[1]), __uint_as_float(v[2]),
                              __uint_as_float(v[3]));
        else
            raw = make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
    }
    return raw;
}

// The same as numbers, in the order of time.
template <class T, bool BACK>
__device__ __forceinline__ void in_time(float (&v)[OWN], const typename Raw<T>::type &raw) {
    float as_they_lie[OWN];
    unpack4(as_they_lie, raw, T());
#pragma unroll
    for (int i = 0; i < OWN; ++i) v[i] = as_they_lie[BACK ? OWN - 1 - i : i];
}

// A lane's numbers in shared memory: those of a warp are in different banks.
__device__ __forceinline__ void put(float *to, const float (&v)[2][NS]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) write_states(to + 128 * c, v[c]);
}
__device__ __forceinline__ void get(float (&v)[2][NS], const float *from) {
#pragma unroll
    for (int c = 0; c < 2; ++c) read(v[c], from + 128 * c);
}

// Completes a phase of a barrier of one thread; it sees to what the warp has written before.
__device__ __forceinline__ void hand_on(char *barrier, int lane) {
    __syncwarp();
    if (lane == 0)
        asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(shared_address(barrier))
                     : "memory");
}

// Blocks of a multiprocessor. Elsewhere the compiler finds no registers for three.
template <class T, bool VECTOR>
constexpr int BLOCKS = VECTOR && !same<T, Float> && __CUDA_ARCH__ >= 900 ? 3 : 2;

template <class T, bool VECTOR, bool BACK>
__global__ void __launch_bounds__(THREADS, BLOCKS<T, VECTOR>) scan1d_relay(
    const Scan1dRelayParams p) {
    typedef typename Raw<T>::type R;
    constexpr int SIZE = sizeof(R) / OWN, ON = (BACK ? -STEPS : STEPS) * WARPS;  // to the next tile

    extern __shared__ __align__(16) float shared[];
    // The compiler then knows that the lanes of a warp agree on this.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int lane = threadIdx.x % 32, j = lane % LANES, part = j / 2 * OWN;
    const int place = lane / LANES * 2 + j % 2, other = place ^ 1;  // of the lane's channels
    float *const tile = shared + warp * (TILE + BC_TILE), *const staged = tile + TILE;
    float *const own_tile = tile + part / 2 * ROW + place * 4;
    float *const own_rows = staged + part * BC_ROW + place;
    float *const entries = shared + WARPS * (TILE + BC_TILE) + 4 * lane;
    float *const handed = entries + warp * ENTRY, *const own_rates = handed + WARPS * ENTRY;
    const float *const taken = entries + (warp + WARPS - 1) % WARPS * ENTRY;

    R *const own_u = (R *)(shared + WARPS * (TILE + BC_TILE + 2 * ENTRY)) + threadIdx.x;
    char *const barriers = (char *)(shared + WARPS * (TILE + BC_TILE + 2 * ENTRY + 4 * 32));
    if (threadIdx.x < WARPS) make_barrier(barriers + threadIdx.x * BARRIER_BYTES, 1);
    __syncthreads();

    const int sequence = blockIdx.x / p.columns, k = sequence % p.routes, b = sequence / p.routes;
    const int first_channel = blockIdx.x % p.columns * CHANNELS, own = first_channel + place;
    const bool valid = own < p.dim, valid_row = place < p.state;
    const long long channel = (long long)k * p.dim + own;
    // Where (B, K * D, N) has the states of a channel of the block.
    auto of_states = [&](int place) {
        return (((long long)b * p.routes + k) * p.dim + first_channel + place) * p.state;
    };
    {
        float rates[2][NS];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int at = first_channel + (c ? other : place);
#pragma unroll
            for (int n = 0; n < NS; ++n)
                rates[c][n] = at < p.dim && j * NS + n < p.state
                    ? load_parameter(p.A, ((long long)k * p.dim + at) * p.state + j * NS + n,
                                     p.A_type) : 0.f;
        }
        put(own_rates, rates);
        // The state before the first step lies where the first warp looks for it.
        if (warp == WARPS - 1) {
            float start[2][NS];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int at = c ? other : place;
                load_states(start[c], p.first + of_states(at), j * NS, p.state,
                            p.first && first_channel + at < p.dim);
            }
            put(handed, start);
            hand_on(barriers + warp * BARRIER_BYTES, lane);
        }
    }
    const float bias = valid && p.bias ? LOG2E * load_parameter(p.bias, channel, p.bias_type) : 0.f;
    const float skip = valid && p.D ? load_parameter(p.D, channel, p.D_type) : 0.f;
    const int first = BACK ? p.length - OWN - part - warp * STEPS : part + warp * STEPS;
    // From a channel to the next it is as far as from a row of B or C to the next.
    const long long sequence_at = b * p.b + k * p.k + (long long)first_channel * p.s;
    const long long rows_at = b * p.row_b + k * p.row_k;
    int at = place * p.s + first;
    auto address = [&](const void *data, long long from) {
        return (const char *)data + SIZE * from + (long long)at * SIZE;
    };
    R u_raw, l_raw, B_raw, C_raw;
    auto load = [&](int count) {
        const int of_channel = valid ? count : 0, of_row = valid_row ? count : 0;
        u_raw = load_own<T, VECTOR, BACK>(address(p.u, sequence_at), of_channel);
        l_raw = load_own<T, VECTOR, BACK>(address(p.delta, sequence_at), of_channel);
        B_raw = load_own<T, VECTOR, BACK>(address(p.B, rows_at), of_row);
        C_raw = load_own<T, VECTOR, BACK>(address(p.C, rows_at), of_row);
        at += ON;
    };
    load(p.length - warp * STEPS - part);

#pragma unroll 1
    for (int turn = warp; turn < p.tiles; turn += WARPS) {
        const int count = valid ? p.length - turn * STEPS - part : 0;  // of the lane's elements
        {
            float u[OWN], l[OWN], B[OWN], C[OWN];
            in_time<T, BACK>(u, u_raw);
            in_time<T, BACK>(l, l_raw);
            in_time<T, BACK>(B, B_raw);
            in_time<T, BACK>(C, C_raw);
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                own_rows[i * BC_ROW] = B[i], own_rows[i * BC_ROW + N] = C[i];
#pragma unroll
            for (int i = 0; i < OWN; ++i) l[i] = fmaf(l[i], LOG2E, bias);
            if (p.softplus)
#pragma unroll
                for (int i = 0; i < OWN; ++i) l[i] = precise_softplus2<T>(l[i]);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                if ((VECTOR ? 0 : i) >= count) l[i] = 0.f;
                u[i] *= LN2 * l[i];
            }
#pragma unroll
            for (int i = 0; i < OWN; i += 2)
                *(float4 *)(own_tile + i / 2 * ROW) = make_float4(l[i], u[i], l[i + 1], u[i + 1]);
        }
        *own_u = u_raw;
        __syncwarp();
        load(p.length - (turn + WARPS) * STEPS - part);

        // From zero; the decay of the whole tile.
        float a[STEPS - 1][2][NS], driven[STEPS - 1][2][NS], end[2][NS], decay[2][NS];
        {
            float rates[2][NS], total[2] = {};
            get(rates, own_rates);
#pragma unroll
            for (int t = 0; t < STEPS; t += 2) {
                float4 lx[2];
                lx[0] = *(const float4 *)(tile + t / 2 * ROW + place * 4);
                lx[1] = *(const float4 *)(tile + t / 2 * ROW + other * 4);
#pragma unroll
                for (int s = t; s < t + 2; ++s) {
                    float B[NS];
                    read(B, staged + s * BC_ROW + j * NS);
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float l = s > t ? lx[c].z : lx[c].x, x = s > t ? lx[c].w : lx[c].y;
                        total[c] += l;
#pragma unroll
                        for (int n = 0; n < NS; ++n) {
                            const float by = ex2(rates[c][n] * l), drive = x * B[n];
                            end[c][n] = s ? fmaf(by, end[c][n], drive) : drive;
                            if (s < STEPS - 1) {
                                a[s % (STEPS - 1)][c][n] = by;
                                driven[s % (STEPS - 1)][c][n] = drive;
                            }
                        }
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
                for (int n = 0; n < NS; ++n) {
                    decay[c][n] = ex2(rates[c][n] * total[c]);
                    opaque(decay[c][n]), opaque(end[c][n]);  // before it waits
                }
        }
        float h[2][NS];
        wait_for_copies(barriers + (warp + WARPS - 1) % WARPS * BARRIER_BYTES, turn / WARPS & 1);
        get(h, taken);
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int n = 0; n < NS; ++n) end[c][n] = fmaf(decay[c][n], h[c][n], end[c][n]);
        put(handed, end);
        hand_on(barriers + warp * BARRIER_BYTES, lane);

        // From the state that entered. A lane ends up with the sums for its elements.
        float y[STEPS];
#pragma unroll
        for (int t = 0; t < STEPS; ++t) {
            float C[NS], sum[2];
            read(C, staged + t * BC_ROW + N + j * NS);
            if (t == STEPS - 1) get(h, handed);
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
                for (int n = 0; n < NS; ++n) {
                    const int s = t % (STEPS - 1);
                    if (t < STEPS - 1) h[c][n] = fmaf(a[s][c][n], h[c][n], driven[s][c][n]);
                    sum[c] = n ? fmaf(C[n], h[c][n], sum[c]) : C[n] * h[c][n];
                }
            y[t] = sum[0] + __shfl_xor_sync(~0u, sum[1], 1);
        }
        sum_over_lanes<2, 2, STEPS>(y, lane);
        {
            float u[OWN], out[OWN];
            in_time<T, BACK>(u, *own_u);
#pragma unroll
            for (int i = 0; i < OWN; ++i) y[i] = fmaf(skip, u[i], y[i]);
            if (p.z) {
                float z[OWN];
                in_time<T, BACK>(z, load_own<T, VECTOR, BACK>(address(p.z, sequence_at - 2 * ON), count));
#pragma unroll
                for (int i = 0; i < OWN; ++i) y[i] *= z[i] * sigmoid(z[i]);
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i) out[i] = y[BACK ? OWN - 1 - i : i];
            if (VECTOR && p.y_type == T::CODE) {
                if (count > 0) store4<T>(p.y, sequence_at + at - 2 * ON, out);
            } else {
#pragma unroll
                for (int i = 0; i < OWN; ++i)
                    if ((VECTOR ? 0 : BACK ? OWN - 1 - i : i) < count)
                        store_result(p.y, sequence_at + at - 2 * ON + i, p.y_type, out[i]);
            }
        }
        __syncwarp();  // before the next tile comes
    }
    if (p.last && warp == (p.tiles - 1) % WARPS) {
        float end[2][NS];
        get(end, handed);
#pragma unroll
        for (int c = 0; c < 2; ++c)
            store_states(p.last + of_states(c ? other : place), end[c], j * NS, p.state,
                         first_channel + (c ? other : place) < p.dim);
    }
}
