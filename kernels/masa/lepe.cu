// The depthwise 5 x 5 convolution beside attention, padded with zeros, and what it is added to;
// backwards the gradient by its input, added to that by attention.
#include "masa/lepe.cuh"

struct LepeParams {
    LepeMap x, more;            // the latter is added; its data may be that of y
    const void *weight, *bias;  // (D, 25); (D), or null
    void *y;
    int y_pixel;
    int batch, height, width, dim, weight_type, bias_type;
};

// A thread has 2 adjacent channels of ROWS rows, and moves along them. Each column that it loads
// adds to five columns of sums.
template <class T, bool FORWARD, int ROWS>
__global__ void __launch_bounds__(128) lepe(const LepeParams p) {
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
    const int strips = (p.height + ROWS - 1) / ROWS, i = blockIdx.x * blockDim.y + threadIdx.y;
    if (channel >= p.dim || i >= p.batch * strips) return;
    const int image = i / strips, first = i % strips * ROWS;
    float w[25][2], bias[2] = {};
#pragma unroll
    for (int k = 0; k < 25; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            w[k][e] = load_parameter(p.weight, (long long)(channel + e) * 25
                                     + (FORWARD ? k : 24 - k), p.weight_type);
    if (FORWARD && p.bias)
#pragma unroll
        for (int e = 0; e < 2; ++e) bias[e] = load_parameter(p.bias, channel + e, p.bias_type);
    float sums[ROWS][5][2];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int j = 0; j < 5; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[r][j][e] = bias[e];
    const long long pixels = (long long)image * p.height * p.width;
    Couple<T> ahead[ROWS + 4];
    load_lepe_column<T, ROWS + 4>(ahead, p.x, pixels, p.height, p.width, first - 2, 0, channel);
    for (int column = 0; column < p.width + 2; ++column) {
        float x[ROWS + 4][2];
#pragma unroll
        for (int r = 0; r < ROWS + 4; ++r) {
            const float2 v = ahead[r].unpack();
            x[r][0] = v.x, x[r][1] = v.y;
        }
        load_lepe_column<T, ROWS + 4>(ahead, p.x, pixels, p.height, p.width, first - 2, column + 1,
                                      channel);
        // The sums are of the columns from column - 2 to column + 2.
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int k = 0; k < 25; ++k)
#pragma unroll
                for (int e = 0; e < 2; ++e) sums[r][4 - k % 5][e] += w[k][e] * x[r + k / 5][e];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = first + r;
            if (column >= 2 && row < p.height) {
                const long long pixel = pixels + (long long)row * p.width + column - 2;
                const float2 more = Couple<T>(p.more.data, pixel * p.more.pixel + channel).unpack();
                Couple<T>::store(p.y, pixel * p.y_pixel + channel, sums[r][0][0] + more.x,
                              sums[r][0][1] + more.y);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[r][j][e] = sums[r][j + 1][e];
                sums[r][4][e] = bias[e];
            }
        }
    }
}
