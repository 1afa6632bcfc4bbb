// selective_scan along sequences, forward, where channels are too few to fill the GPU: the warps of
// a block have the same channels and take turns in time. A warp runs its tile from zero, with decays
// and drives in registers; waits for the state that enters it; hands on what leaves it at once; and
// runs the tile from the state that entered. So nothing is read and no exponential is calculated
// twice. Time is in the order of the scan; positions of a channel are adjacent in memory.
#include "scan1d/scan1d.cuh"

// A lane has NS states of a channel, and LANES adjacent lanes share one.
constexpr int NS = 8, LANES = 2, N = NS * LANES, CHANNELS = 32 / LANES;
constexpr int STEPS = 8, OWN = STEPS / LANES;  // of a tile; of a lane's part of a map
constexpr int WARPS = THREADS / 32;
// In shared memory: l and x of two steps of a channel are adjacent, the channels of two steps a row;
// B and C of a step are a row. With these gaps no two lanes write to one bank.
constexpr int ROW = 4 * CHANNELS + 8, BC_ROW = 2 * N + 4;
constexpr int TILE = STEPS / 2 * ROW, BC_TILE = STEPS * BC_ROW, ENTRY = 32 * NS;

struct Scan1dRelayParams {
    const void *u, *delta, *z, *B, *C;
    void *y;
    const void *A, *D, *bias;  // (K * D, N); (K * D) or null
    const float *first;        // (B, K * D, N): the state before the first step, or null for zeros
    float *last;               // (B, K * D, N): the state after the last step, or null
    long long b, k, s;         // strides of maps, in elements; s: from a channel to the next
    long long row_b, row_k, row_n;  // of B and C
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
__device__ __forceinline__ void put(float *to, const float (&v)[NS]) {
#pragma unroll
    for (int n = 0; n < NS; n += 4)
        *(float4 *)(to + 32 * n) = make_float4(v[n], v[n + 1], v[n + 2], v[n + 3]);
}
__device__ __forceinline__ void get(float (&v)[NS], const float *from) {
#pragma unroll
    for (int n = 0; n < NS; n += 4) {
        const float4 four = *(const float4 *)(from + 32 * n);
        v[n] = four.x, v[n + 1] = four.y, v[n + 2] = four.z, v[n + 3] = four.w;
    }
}

// Barriers of two warps. The one that hands on does not wait.
__device__ __forceinline__ void hand_on(int barrier) {
    asm volatile("bar.arrive %0, %1;" :: "r"(barrier), "r"(64) : "memory");
}
__device__ __forceinline__ void take_over(int barrier) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(64) : "memory");
}

template <class T>
constexpr int BLOCKS = same<T, Float> ? 2 : 3;  // of a multiprocessor

template <class T, bool VECTOR, bool BACK>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>) scan1d_relay(const Scan1dRelayParams p) {
    typedef typename Raw<T>::type R;
    constexpr int SIZE = sizeof(R) / OWN, ON = (BACK ? -STEPS : STEPS) * WARPS;  // to the next tile

    extern __shared__ __align__(16) float shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, j = lane % LANES;
    const int before = (warp + WARPS - 1) % WARPS;
    float *const tile = shared + warp * (TILE + BC_TILE), *const staged = tile + TILE;
    float *const entries = shared + WARPS * (TILE + BC_TILE) + 4 * lane;
    float *const own_rates = entries + (WARPS + warp) * ENTRY;

    const int sequence = blockIdx.x / p.columns, k = sequence % p.routes, b = sequence / p.routes;
    const int own = blockIdx.x % p.columns * CHANNELS + lane / LANES;  // channel
    const bool valid = own < p.dim;
    const long long channel = (long long)k * p.dim + own;
    float rates[NS], start[NS];
#pragma unroll
    for (int n = 0; n < NS; ++n)
        rates[n] = valid && j * NS + n < p.state
            ? load_parameter(p.A, channel * p.state + j * NS + n, p.A_type) : 0.f;
    const long long of_state = ((long long)b * p.routes * p.dim + channel) * p.state;
    load_states(start, p.first + of_state, j * NS, p.state, p.first && valid);
    // The state before the first step lies where the first warp takes over.
    if (warp == WARPS - 1) put(entries + warp * ENTRY, start);
    put(own_rates, rates);
    const float bias = valid && p.bias ? LOG2E * load_parameter(p.bias, channel, p.bias_type) : 0.f;
    const float skip = valid && p.D ? load_parameter(p.D, channel, p.D_type) : 0.f;

    // A lane's elements of a tile: steps from j * OWN on, of a channel and of a row of B and C.
    const int first = BACK ? p.length - OWN - j * OWN - warp * STEPS : j * OWN + warp * STEPS;
    long long at = b * p.b + k * p.k + own * p.s + first;
    long long row_at = b * p.row_b + k * p.row_k + lane / LANES * p.row_n + first;
    const bool valid_row = lane / LANES < p.state;

    R u_raw, l_raw, B_raw, C_raw;
    auto load = [&](long long at, long long row_at, int count) {
        const int of_map = valid ? count : 0, of_row = valid_row ? count : 0;
        u_raw = load_own<T, VECTOR, BACK>((const char *)p.u + SIZE * at, of_map);
        l_raw = load_own<T, VECTOR, BACK>((const char *)p.delta + SIZE * at, of_map);
        B_raw = load_own<T, VECTOR, BACK>((const char *)p.B + SIZE * row_at, of_row);
        C_raw = load_own<T, VECTOR, BACK>((const char *)p.C + SIZE * row_at, of_row);
    };
    load(at, row_at, p.length - warp * STEPS - j * OWN);
    __syncthreads();

#pragma unroll 1
    for (int turn = warp; turn < p.tiles; turn += WARPS) {
        const int count = valid ? p.length - turn * STEPS - j * OWN : 0;  // of the lane's elements
        {
            float u[OWN], l[OWN], B[OWN], C[OWN];
            in_time<T, BACK>(u, u_raw);
            in_time<T, BACK>(l, l_raw);
            in_time<T, BACK>(B, B_raw);
            in_time<T, BACK>(C, C_raw);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                l[i] = find_l<T>(l[i], bias, p.softplus);
                if ((VECTOR ? 0 : i) >= count) l[i] = 0.f;
                u[i] *= LN2 * l[i];
                staged[(j * OWN + i) * BC_ROW + lane / LANES] = B[i];
                staged[(j * OWN + i) * BC_ROW + N + lane / LANES] = C[i];
            }
#pragma unroll
            for (int i = 0; i < OWN; i += 2)
                *(float4 *)(tile + (j * OWN + i) / 2 * ROW + lane / LANES * 4)
                    = make_float4(l[i], u[i], l[i + 1], u[i + 1]);
        }
        const R own_u = u_raw;
        __syncwarp();
        if (turn + WARPS < p.tiles)
            load(at + ON, row_at + ON, p.length - (turn + WARPS) * STEPS - j * OWN);

        float rates[NS], h[NS], end[NS], total = 0.f;
        get(rates, own_rates);
        float a[STEPS - 1][NS], driven[STEPS - 1][NS];
#pragma unroll
        for (int t = 0; t < STEPS; ++t) {
            const float2 lx = *(const float2 *)(tile + t / 2 * ROW + lane / LANES * 4 + t % 2 * 2);
            const float *const B_row = staged + t * BC_ROW + j * NS;
            total += lx.x;
#pragma unroll
            for (int n = 0; n < NS; n += 4) {
                float B[4];
                read(B, B_row + n);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float by = ex2(rates[n + i] * lx.x), drive = lx.y * B[i];
                    end[n + i] = t ? fmaf(by, end[n + i], drive) : drive;
                    if (t < STEPS - 1) a[t % (STEPS - 1)][n + i] = by;
                    if (t < STEPS - 1) driven[t % (STEPS - 1)][n + i] = drive;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NS; ++n) h[n] = ex2(rates[n] * total);
        if (turn > 0) take_over(1 + before);
        float entry[NS];
        get(entry, entries + before * ENTRY);
#pragma unroll
        for (int n = 0; n < NS; ++n) end[n] = fmaf(h[n], entry[n], end[n]), h[n] = entry[n];
        put(entries + warp * ENTRY, end);
        if (turn + 1 < p.tiles) hand_on(1 + warp);

        float y[STEPS];
#pragma unroll
        for (int t = 0; t < STEPS; ++t) {
            const float *const C_row = staged + t * BC_ROW + N + j * NS;
            if (t == STEPS - 1) get(h, entries + warp * ENTRY);
#pragma unroll
            for (int n = 0; n < NS; n += 4) {
                float C[4];
                read(C, C_row + n);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int s = t % (STEPS - 1);
                    if (t < STEPS - 1) h[n + i] = fmaf(a[s][n + i], h[n + i], driven[s][n + i]);
                    y[t] = n + i ? fmaf(C[i], h[n + i], y[t]) : C[i] * h[n + i];
                }
            }
        }
        if (p.last && turn + 1 == p.tiles)
            store_states(p.last + of_state, h, j * NS, p.state, valid);
        sum_over_lanes<LANES, 1, STEPS>(y, lane);  // of the lane's elements
        {
            float u[OWN], out[OWN];
            in_time<T, BACK>(u, own_u);
#pragma unroll
            for (int i = 0; i < OWN; ++i) y[i] = fmaf(skip, u[i], y[i]);
            if (p.z) {
                float z[OWN];
                in_time<T, BACK>(z, load_own<T, VECTOR, BACK>((const char *)p.z + SIZE * at, count));
#pragma unroll
                for (int i = 0; i < OWN; ++i) y[i] *= z[i] * sigmoid(z[i]);
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i) out[i] = y[BACK ? OWN - 1 - i : i];
            if (VECTOR && p.y_type == T::CODE) {
                if (count > 0) store4<T>(p.y, at, out);
            } else {
#pragma unroll
                for (int i = 0; i < OWN; ++i)
                    if ((VECTOR ? 0 : BACK ? OWN - 1 - i : i) < count)
                        store_result(p.y, at + i, p.y_type, out[i]);
            }
        }
        at += ON, row_at += ON;
        __syncwarp();  // before the next tile comes
    }
}
