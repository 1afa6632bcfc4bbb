// Depthwise 3 x 3 convolution, padded with zeros: forward with bias and SiLU, or, if it ADDS, with bias
// and the input itself, which may be a sum with a BRANCH; or the gradient by the input from the one by
// the convolution's result.
#include "fused/dwconv.cuh"

struct DwconvParams {
    Pixels x;
    const void *weight, *bias;  // (D, 9); (D), or null
    void *y;                    // (B, H, W, D), y_pixel elements from a pixel to the next
    int y_pixel;
    int segments, columns, weight_type, bias_type;
    Branch branch;              // if it ADDS a BRANCH; backwards its scale alone, and ...
    void *dbranch;              // ... the gradient by it
};

template <class T, bool FORWARD, int ROWS, bool ADDS = false, bool BRANCH = false>
__global__ void __launch_bounds__(256) dwconv(const DwconvParams p) {
    extern __shared__ __align__(16) float shared[];  // (9, channels)
    load_weights(shared, p.weight, p.weight_type, p.x.dim);
    const int channels = 4 * blockDim.x, channel = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    // Blocks begin at the end of the map: what was written last is still in L2. The next kernel
    // begins where this one ends, so that it too finds in L2 what it reads first.
    const int i = (gridDim.x - 1 - blockIdx.x) * blockDim.y + threadIdx.y;
    if (channel >= p.x.dim || i >= count_strips(p.x, ROWS, p.segments)) return;
    const Strip<ROWS> strip(p.x, i, p.segments, p.columns);

    float w[9][4], bias[4] = {};
#pragma unroll
    for (int k = 0; k < 9; ++k)
        unpack4(w[k], *(const float4 *)(shared + (FORWARD ? k : 8 - k) * channels
                                        + 4 * threadIdx.x), Float{});
    if (ADDS)  // what is added is another weight in the middle
#pragma unroll
        for (int e = 0; e < 4; ++e) w[4][e] += 1.f;
    const float scale = BRANCH && p.branch.scale ? p.branch.scale[strip.number] : 1.f;
    if (FORWARD && p.bias)
#pragma unroll
        for (int e = 0; e < 4; ++e) bias[e] = load_parameter(p.bias, channel + e, p.bias_type);

    // Sums of three columns of outputs: each column that is loaded adds to the one before it, to
    // its own and to the next.
    float sums[ROWS][3][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int j = 0; j < 3; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[r][j][e] = bias[e];
    typename Raw<T>::type ahead[ROWS + 2], branch[ROWS + 2];
    load_column<T, ROWS>(ahead, p.x, strip.image, strip.row, strip.column - 1, channel);
    if (FORWARD && BRANCH)
        load_branch<T, ROWS>(branch, p.branch, p.x, strip.number, strip.row, strip.column - 1,
                             channel);
    for (int column = strip.column - 1; column <= strip.end; ++column) {
        if (FORWARD && BRANCH) {  // row by row: two maps leave no registers for a whole column
            const int next = column < strip.end ? column + 1 : -1;
#pragma unroll
            for (int h = 0; h < ROWS + 2; ++h) {
                float x[4];
                unpack4(x, ahead[h], T{});
                add_branch<T>(x, branch[h], scale);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
#pragma unroll
                    for (int k = 0; k < 9; ++k)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            if (r + k / 3 == h) sums[r][2 - k % 3][e] += w[k][e] * x[e];
            }
            load_column<T, ROWS>(ahead, p.x, strip.image, strip.row, next, channel);
            load_branch<T, ROWS>(branch, p.branch, p.x, strip.number, strip.row, next, channel);
        } else {
            float x[ROWS + 2][4];
#pragma unroll
            for (int r = 0; r < ROWS + 2; ++r) unpack4(x[r], ahead[r], T{});
            load_column<T, ROWS>(ahead, p.x, strip.image, strip.row,
                                 column < strip.end ? column + 1 : -1, channel);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int k = 0; k < 9; ++k)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sums[r][2 - k % 3][e] += w[k][e] * x[r + k / 3][e];
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (column > strip.column && strip.row + r < p.x.height) {
                float y[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    y[e] = sums[r][0][e];
                    if (FORWARD && !ADDS) y[e] *= sigmoid(y[e]);
                }
                const long long pixel = ((long long)strip.number * p.x.height + strip.row + r)
                                        * p.x.width + column - 1;
                store4<T>(p.y, pixel * p.y_pixel + channel, y);
                if (!FORWARD && BRANCH) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) y[e] *= scale;
                    store4<T>(p.dbranch, pixel * p.x.dim + channel, y);
                }
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums[r][0][e] = sums[r][1][e];
                sums[r][1][e] = sums[r][2][e];
                sums[r][2][e] = bias[e];
            }
        }
    }
}
