// Mixtures of a map with a copy of it whose channels come from the neighbours: the forward, and the
// backward, whose gradient by the map gathers what the neighbours have of it.
#include "common/common.cuh"

constexpr int MOST = 3, GROUPS = 4;  // mixtures; neighbours: left, right, above, below

struct ShiftMixParams {
    const void *x;              // (B, H, W, D)
    const void *shares[MOST];   // (D), of x in each mixture; null beyond the last one
    void *y[MOST];              // (B, H, W, D); backwards the gradients by them
    void *dx;                   // backwards
    float *partials;            // backwards: (gridDim.x, MOST, D)
    long long positions;
    int height, width, dim, head, pixels;  // head: channels that are shifted together
    int ends[GROUPS];           // of the groups of a head's channels
    int share_types[MOST];
};

// Which neighbour four channels come from: pixels to it, or none if it is outside of the map.
struct Neighbour {
    int group, pixels, height, width;

    __device__ __forceinline__ Neighbour(const ShiftMixParams &p, int channel)
        : group(0), pixels(p.pixels), height(p.height), width(p.width) {
        const int of_head = channel % p.head;
        while (group < GROUPS && of_head >= p.ends[group]) ++group;
    }
    __device__ __forceinline__ bool moves() const { return group < GROUPS; }

    // Whether it is there, and how far; of the pixel whose neighbour this is if BACK.
    template <bool BACK>
    __device__ __forceinline__ bool find(long long position, int &far) const {
        const int line = position / width, column = position - (long long)line * width;
        const int row = line % height;
        const bool down = group & 1, across = group < 2;
        const int by = down != BACK ? pixels : -pixels;
        far = across ? by : by * width;
        const int to = (across ? column : row) + by;
        return to >= 0 && to < (across ? width : height);
    }
};

template <class T, class Y>
__global__ void __launch_bounds__(256) shift_mix_fwd(const ShiftMixParams p) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (channel >= p.dim) return;
    const Neighbour neighbour(p, channel);
    float share[MOST][4];
#pragma unroll
    for (int i = 0; i < MOST; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            share[i][e] = p.shares[i] ? load_parameter(p.shares[i], channel + e, p.share_types[i])
                                      : 0.f;
    const long long step = (long long)gridDim.x * blockDim.y;
#pragma unroll 2
    for (long long m = (long long)blockIdx.x * blockDim.y + threadIdx.y; m < p.positions;
         m += step) {
        int far = 0;
        const bool there = !neighbour.moves() || neighbour.find<false>(m, far);
        float x[4], shifted[4];
        unpack4(x, load4<T>(p.x, m * p.dim + channel, true), T{});
        unpack4(shifted, load4<T>(p.x, (m + far) * p.dim + channel, there), T{});
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (!p.y[i]) continue;
            float y[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) y[e] = shifted[e] + share[i][e] * (x[e] - shifted[e]);
            store4<Y>(p.y[i], m * p.dim + channel, y);
        }
    }
}

template <class T, class Y>
__global__ void __launch_bounds__(256) shift_mix_bwd(const ShiftMixParams p) {
    extern __shared__ __align__(16) float shared[];  // (MOST, channels)
    const int channels = 4 * blockDim.x, channel = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    const bool active = channel < p.dim;
    const Neighbour neighbour(p, active ? channel : 0);
    float share[MOST][4], sums[MOST][4] = {};
#pragma unroll
    for (int i = 0; i < MOST; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            share[i][e] = active && p.shares[i]
                ? load_parameter(p.shares[i], channel + e, p.share_types[i]) : 0.f;
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long m = (long long)blockIdx.x * blockDim.y + threadIdx.y;
         active && m < p.positions; m += step) {
        int far = 0, back = 0;
        const bool there = neighbour.moves() && neighbour.find<false>(m, far);
        const bool gives = neighbour.moves() && neighbour.find<true>(m, back);
        float x[4], shifted[4], dx[4] = {};
        unpack4(x, load4<T>(p.x, m * p.dim + channel, true), T{});
        unpack4(shifted, load4<T>(p.x, (m + far) * p.dim + channel, there || !neighbour.moves()),
                T{});
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            float own[4], other[4];
            unpack4(own, load4<Y>(p.y[i], m * p.dim + channel, p.y[i]), Y{});
            unpack4(other, load4<Y>(p.y[i], (m + back) * p.dim + channel, p.y[i] && gives), Y{});
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums[i][e] += own[e] * (x[e] - shifted[e]);
                dx[e] += own[e] * (neighbour.moves() ? share[i][e] : 1.f);
                dx[e] += other[e] * (1.f - share[i][e]);
            }
        }
        store4<T>(p.dx, m * p.dim + channel, dx);
    }
    for (int turn = 0; turn < blockDim.y; ++turn) {
        __syncthreads();
        if (threadIdx.y != turn) continue;
#pragma unroll
        for (int i = 0; i < MOST; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float *const to = shared + i * channels + 4 * threadIdx.x + e;
                *to = turn ? *to + sums[i][e] : sums[i][e];
            }
    }
    __syncthreads();
    const int first = blockIdx.y * channels;
    for (int j = threadIdx.y * blockDim.x + threadIdx.x; j < MOST * channels;
         j += blockDim.x * blockDim.y) {
        const int i = j / channels, c = first + j - i * channels;
        if (c < p.dim) p.partials[((long long)blockIdx.x * MOST + i) * p.dim + c] = shared[j];
    }
}
