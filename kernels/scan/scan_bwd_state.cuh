// What a block of scan_bwd.cu has in registers and in shared memory, and how it gets there.
#pragma once
#include "scan/scan.cuh"

constexpr int QUADS = SAVED / 4, ROW = pitch_for<SAVED>;
// Warps of a block at most. The shared memory of the other generations has no room for more.
#if __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10
constexpr int WARPS = 12;
#else
constexpr int WARPS = 8;
#endif
constexpr int TEAM = 4;    // warps that wait for each other

// The named barriers of the hardware: the number of the first one of each kind. WITHIN is for the
// warps of one team; team t takes WITHIN + t. The other kinds are between a team and the one before
// it: team t, from 1 on, takes for example STAGED + t.
enum Barrier { WITHIN = 1, STAGED = 3, FULL = 5, EMPTY = 7 };

__device__ __forceinline__ void arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void wait(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

// For half-precision maps, sums are made on the tensor cores, by m16n8k8 in TF32. TF32 truncates a
// number after 10 bits, and GAIN makes up for what is lost on average. For sm_100 the compiler runs
// out of registers, so there the tensor cores are not used.
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

// Adds to `own` what the lane that differs in the bits of `mask` gives as its `given`.
__device__ __forceinline__ float add_exchanged(float own, float given, int mask) {
    return own + __shfl_xor_sync(~0u, given, mask);
}

// Lanes with `upper` keep the second number and give away the first; the lanes without it keep the
// first and give away the second.
__device__ __forceinline__ float halve(float first, float second, bool upper, int mask) {
    return add_exchanged(upper ? second : first, upper ? first : second, mask);
}

template <class T, int STATE, bool SEQ>
struct Backward {
    static constexpr int STATES = STATE < 4 ? STATE : 4;   // of a lane
    static constexpr int CHANNELS = STATE == 16 ? 2 : 1;   // of a lane
    static constexpr int SHARING = 32 * STATES / STATE;    // lanes that have the same states
    static constexpr int WIDTH = SHARING * CHANNELS;       // channels of a warp
    static constexpr int SLOT = 32 * CHANNELS * STATES;
    // Beside its tile, a lane has ITEMS times four positions of one channel, APART from each other.
    static constexpr int ITEMS = QUADS * WIDTH / 32, APART = 4 * 32 / WIDTH;
    static constexpr int SIZE = same<T, Float> ? 4 : 2;
    static constexpr bool SUM_BY_CORES = CORES<T> && STATES == 4;
    static constexpr int SPLIT = CORES<T> ? 1 : 2;  // parts of the channels, for the gradient by dt
    static constexpr int TO_INPUTS = WIDTH * ROW, TO_GRADS = 2 * TO_INPUTS, TO_C = STATE * ROW;
    static constexpr int ROWS = SUM_BY_CORES ? 1 : STATES;  // of B, else at constant distances
    using Stage = Staging<T, STATE, SEQ, true, true, SAVED, SEQ ? 8 : 4>;

    const BlockIndex index;
    int k, b, group, lane, warps, warp, length, width, known;

    // The teams of warps are at different places, so that what they wait for differs: the first
    // stages dt, B and C of a chunk, each hands its sums of a chunk to the next, which follows it.
    int teams, team, team_threads;
    int all;                   // columns: dt, B, C

    // Shared memory, of the block ...
    float *shared;
    float *handed;        // (teams - 1, QUADS, columns, 4): sums of the teams so far
    float *rings;         // (teams, columns, ROW)
    float *weights;       // (R, channels of the block)
    float *regions;       // of the warps, `region` apart
    int region;
    // ... of the warp ...
    float *by_dt;         // (R, SPLIT, SAVED), last of all
    float *decays;        // (WIDTH, ROW): l
    float *inputs;        // x l, then q
    float *grads;         // dy, then e
    float *slopes;        // of the softplus, then the gradient by z
    float *slots;         // states before 4 positions, then sums
    // ... and of the lane, 32 apart.
    volatile float *bias, *skip, *grad_bias, *grad_skip;
    volatile u32 *arranged;
    float *grad_weights;
    // x and dy of a lane's positions, together if of half precision, 4 words of a lane; else, where
    // shared memory is too small, they stay in registers.
    uint4 *bits;

    // The lane's tile. The order of its channels and states depends on the lane, so that sums over
    // lanes take from each what it has at the same place.
    int in_shared, quarter, warp_channel;
    int columns[CHANNELS], states[STATES];
    float rate[CHANNELS][STATES], g[CHANNELS][STATES], grad_rate[CHANNELS][STATES];
    float h[CHANNELS][STATES];
    // For sums over 4 lanes: that of the first 8 of 16 rows goes to lane i of them.
    float select[2 * STATES];

    // The lane's positions of one channel, beside the tile.
    int own, own_first, channel, in_sequence, begin, end;
    bool valid;
    u32 x_bits[ITEMS][4], dy_bits[ITEMS][4];

    __device__ __forceinline__ Backward(const ScanParams &p, float *shared)
        : index(p), shared(shared) {
        k = index.k, b = index.b, group = index.group;
        lane = threadIdx.x & 31, warps = blockDim.x >> 5;
        warp = __shfl_sync(~0u, (int)threadIdx.x >> 5, 0);  // the same for all lanes
        length = p.height * p.width, width = warps * WIDTH;
        known = min(STATE, p.state - group * STATE);

        teams = (warps + TEAM - 1) / TEAM, team = warp / TEAM;
        team_threads = min(32 * TEAM, (int)blockDim.x - 32 * TEAM * team);
        all = (SEQ ? 0 : p.rank) + 2 * STATE;
        handed = shared;
        rings = handed + (teams - 1) * QUADS * all * 4;
        weights = rings + teams * all * ROW;
        const int by_dt_size = max(3 * WIDTH * ROW, p.rank * SPLIT * SAVED);
        const int rank8 = (p.rank + 7) & ~7;
        region = by_dt_size + WIDTH * ROW + QUADS * SLOT + (rank8 + 5) * 32
            + (SIZE == 2 ? 1 : SEQ ? 2 : 0) * WIDTH * SAVED;
        regions = weights + p.rank * width;
        by_dt = regions + warp * region;
        decays = by_dt;
        inputs = decays + WIDTH * ROW;
        grads = inputs + WIDTH * ROW;
        slopes = by_dt + by_dt_size;
        slots = slopes + WIDTH * ROW;
        bias = slots + QUADS * SLOT + lane, skip = bias + 32;
        grad_bias = bias + 64, grad_skip = bias + 96;
        arranged = (volatile u32 *)(bias + 128);
        grad_weights = slots + QUADS * SLOT + 160 + lane;
        bits = (uint4 *)(slots + QUADS * SLOT + (rank8 + 5) * 32) + lane;

        in_shared = lane % SHARING, quarter = lane / SHARING;
        warp_channel = (index.column * warps + warp) * WIDTH;
#pragma unroll
        for (int i = 0; i < STATES; ++i)
            states[i] = quarter * STATES + (SUM_BY_CORES ? i : i ^ (in_shared & (STATES - 1)));
        const long long at_span
            = (index.scan_number(p) * p.spans + p.spans - 1 - index.span) * STATE * p.dim
              + warp_channel;
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) {
            columns[j] = in_shared + SHARING * (j ^ (quarter & (CHANNELS - 1)));
            const int d = columns[j];
            const bool inside = warp_channel + d < p.dim;
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                rate[j][i] = inside
                    ? __ldg(p.rates + ((k * p.groups + group) * STATE + states[i]) * p.dim
                                           + warp_channel + d) : 0.f;
                g[j][i] = p.entries && inside ? p.entries[at_span + states[i] * p.dim + d] : 0.f;
                grad_rate[j][i] = 0.f;
            }
        }

        own = lane % WIDTH, own_first = 4 * (lane / WIDTH), channel = warp_channel + own;
        valid = channel < p.dim;
        bias[0] = valid ? __ldg(p.bias + k * p.dim + channel) : 0.f;
        skip[0] = valid && group == 0 ? __ldg(p.skip + k * p.dim + channel) : 0.f;
        grad_bias[0] = grad_skip[0] = 0.f;
        for (int r = 0; r < rank8; ++r) {
            grad_weights[r * 32] = 0.f;
            if (lane < WIDTH && r < p.rank)
                weights[r * width + warp * WIDTH + lane]
                    = valid ? __ldg(p.weights + (k * p.rank + r) * p.dim + channel) : 0.f;
        }

        in_sequence = SEQ ? k * p.dim : 0;
        begin = index.span * p.span, end = min(length, begin + p.span);
#pragma unroll
        for (int i = 0; i < 2 * STATES; ++i) {
            select[i] = lane >> 2 == i ? 1.f : 0.f;
            opaque(select[i]);  // the compiler would calculate it in every turn
        }
    }

    // Threads of this and the team before, or the team after.
    __device__ __forceinline__ int with_last() const { return 32 * TEAM + team_threads; }
    __device__ __forceinline__ int with_next() const {
        return team_threads + min(32 * TEAM, (int)blockDim.x - 32 * TEAM * (team + 1));
    }
    __device__ __forceinline__ bool is_last() const { return team == teams - 1; }

    // What follows is calculated where it is used: the compiler would keep it in registers.
    __device__ __forceinline__ SequencePath path(const ScanParams &p) const {
        int route = SEQ ? 0 : k;
        opaque(route);
        return SequencePath(p, route, false);
    }
    __device__ __forceinline__ int hidden_channel() const {
        int c = channel;
        opaque(c);
        return c;
    }
    __device__ __forceinline__ long long x_offset(const ScanParams &p) const {
        return (b * p.x_b + (in_sequence + hidden_channel()) * p.x_d) * SIZE;
    }
    __device__ __forceinline__ long long grad_offset(const ScanParams &p) const {
        return (b * p.grad_b + (in_sequence + hidden_channel()) * p.grad_d) * SIZE;
    }
    __device__ __forceinline__ long long y_offset(const ScanParams &p) const {
        return (SEQ ? (((long long)group * p.batch + b) * p.routes * p.dim + in_sequence
                       + hidden_channel()) * length
                    : (((long long)group * p.routes + k) * p.batch + b) * length * p.dim
                      + hidden_channel()) * (p.y_type ? 2 : 4);
    }

    // Addresses in shared memory have offsets in bytes that the compiler cannot see through: it
    // would calculate each of them from its parts in every turn.
    __device__ __forceinline__ int offset_of(const float *p) const {
        return (int)((p - shared) * 4);
    }
    __device__ __forceinline__ float *at(int offset) const {
        return (float *)((char *)shared + offset);
    }

    // A chunk of positions, and where a lane is in it: what the passes over it share. The methods
    // take the parameters again and again: with a reference of its own to them the compiler keeps
    // them in registers.
    struct Chunk {
        int number, start, count, quads;
        float *staged;
        int to_channel[CHANNELS], to_B[ROWS], to_slot;
    };

    __device__ __forceinline__ void load_maps(const ScanParams &p, int chunk,
                                              const SequencePath &path);
    __device__ __forceinline__ void load_chunk(const ScanParams &p, int chunk,
                                               const SequencePath &path);
    __device__ __forceinline__ void project(const ScanParams &p, const Chunk &c);
    __device__ __forceinline__ void locate(const ScanParams &p, Chunk &c);
    __device__ __forceinline__ void store_states(const Chunk &c);
    __device__ __forceinline__ void step_forward(Chunk &c);
    __device__ __forceinline__ void run_back(Chunk &c);
    __device__ __forceinline__ void store_maps(const ScanParams &p, const Chunk &c,
                                               const SequencePath &path,
                                               float (&grad_z)[4 * ITEMS]);
    __device__ __forceinline__ void multiply_dt(const ScanParams &p, const Chunk &c,
                                                const float (&grad_z)[4 * ITEMS]);
    __device__ __forceinline__ void sum_warps(const ScanParams &p, const Chunk &c,
                                              const SequencePath &path);
    __device__ __forceinline__ void store_sums(const ScanParams &p);
};

template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::load_maps(
    const ScanParams &p, int chunk, const SequencePath &path) {
    const int start = chunk * SAVED, count = min(SAVED, end - start);
    const Steps x_steps(path, (int)p.x_h, (int)p.x_w);
    const Steps grad_steps(path, (int)p.grad_h, (int)p.grad_w);
    const char *const x_at = (const char *)p.x + x_offset(p);
    const char *const grad_at = (const char *)p.grad + grad_offset(p);
#pragma unroll
    for (int m = 0; m < ITEMS; ++m) {
        const int i = own_first + m * APART;
        load_bits<T, SEQ>(x_bits[m], x_at, path, x_steps, start + i, count - i, valid,
                          p.vector);
        load_bits<T, SEQ>(dy_bits[m], grad_at, path, grad_steps, start + i, count - i, valid,
                          p.vector);
    }
}

template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::load_chunk(
    const ScanParams &p, int chunk, const SequencePath &path) {
    load_maps(p, chunk, path);
    const float *const from
        = p.states + (index.scan_number(p) * p.chunks + chunk) * STATE * p.dim + warp_channel;
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
        for (int i = 0; i < STATES; ++i)
            h[j][i] = warp_channel + columns[j] < p.dim
                ? from[states[i] * p.dim + columns[j]] : 0.f;
}
