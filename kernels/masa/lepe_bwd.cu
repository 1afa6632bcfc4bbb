// The gradients by weight and bias of the depthwise 5 x 5 convolution beside attention.
#include "masa/lepe.cuh"

struct LepeBwdParams {
    LepeMap x, dy;
    float *partials;  // (gridDim.x, 26, D): of the 25 weights, and of the bias
    int batch, height, width, dim;
};

// A thread has 2 adjacent channels of strips of ROWS rows. Each column of x meets the gradients of
// five columns.
template <class T, int ROWS>
__global__ void __launch_bounds__(128, __CUDA_ARCH__ < 860 ? 3 : 0)  // else it spills there
lepe_bwd(const LepeBwdParams p) {
    extern __shared__ __align__(16) float shared[];  // (26, channels)
    const int channels = 2 * blockDim.x, channel = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
    const int strips = (p.height + ROWS - 1) / ROWS;
    const int count = channel < p.dim ? p.batch * strips : 0;
    float dw[25][2] = {}, db[2] = {};
    for (int i = blockIdx.x * blockDim.y + threadIdx.y; i < count; i += gridDim.x * blockDim.y) {
        const int image = i / strips, first = i % strips * ROWS;
        const long long pixels = (long long)image * p.height * p.width;
        float dy[5][ROWS][2] = {};  // of the columns from column - 2 to column + 2
        Couple<T> next[ROWS + 4], given[ROWS];
        auto take = [&](int column) {
            load_lepe_column<T, ROWS>(given, p.dy, pixels, p.height, p.width, first, column,
                                      channel);
        };
        auto move = [&]() {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) dy[j][r][e] = dy[j + 1][r][e];
                const float2 v = given[r].unpack();
                dy[4][r][0] = v.x, dy[4][r][1] = v.y;
                db[0] += v.x, db[1] += v.y;
            }
        };
        take(0);
        move();
        take(1);
        move();
        take(2);
        load_lepe_column<T, ROWS + 4>(next, p.x, pixels, p.height, p.width, first - 2, 0, channel);
        for (int column = 0; column < p.width; ++column) {
            move();
            float x[ROWS + 4][2];
#pragma unroll
            for (int r = 0; r < ROWS + 4; ++r) {
                const float2 v = next[r].unpack();
                x[r][0] = v.x, x[r][1] = v.y;
            }
            take(column + 3);
            load_lepe_column<T, ROWS + 4>(next, p.x, pixels, p.height, p.width, first - 2,
                                          column + 1, channel);
            // Tap k % 5 of the output j columns further on is this column.
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int k = 0; k < 25; ++k)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        dw[k][e] += dy[4 - k % 5][r][e] * x[r + k / 5][e];
        }
    }
    for (int turn = 0; turn < blockDim.y; ++turn) {
        __syncthreads();
        if (threadIdx.y != turn) continue;
#pragma unroll
        for (int k = 0; k < 26; ++k)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float *const to = shared + k * channels + 2 * threadIdx.x + e;
                const float own = k < 25 ? dw[k < 25 ? k : 0][e] : db[e];
                *to = turn ? *to + own : own;
            }
    }
    __syncthreads();
    const int first = blockIdx.y * channels;
    for (int j = threadIdx.y * blockDim.x + threadIdx.x; j < 26 * channels;
         j += blockDim.x * blockDim.y) {
        const int k = j / channels, c = first + j - k * channels;
        if (c < p.dim) p.partials[((long long)blockIdx.x * 26 + k) * p.dim + c] = shared[j];
    }
}
