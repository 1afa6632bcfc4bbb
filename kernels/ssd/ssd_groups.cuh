// Copies to the tiles of groups of warps.
#pragma once
#include "common/warpgroup.cuh"
#include "ssd/ssd.cuh"

// Copies rows of 64 or 128 elements, of which so many there are, to tiles; called by 128 threads.
template <int COLUMNS>
__device__ __forceinline__ void copy_rows(Tile *tiles, const unsigned short *from, long long step,
                                          int rows, int columns) {
    constexpr int ROW = COLUMNS / 8, STEP = 128 / ROW;
    int thread = threadIdx.x & 127;
    opaque(thread);  // else addresses stay in registers from one head to the next
    const int row = thread / ROW, column = thread % ROW * 8;
    char *const to = tiles[column >> 6].place(row, column & 63);
    const unsigned short *const first = from + row * step + column;
#pragma unroll
    for (int i = 0; i < 64; i += STEP) {
        const bool valid = row + i < rows && column < columns;
        copy16(to + i * 128, valid ? first + i * step : from, valid);
    }
}
