// Where the rows of a norm lie that follows the expanding of patches or the merging of them.
#pragma once
#include "common/common.cuh"

// Of EXPAND the pixels of a patch, a row each of the norm, come to their places in its result: from
// (B, H, W, factor, factor, D) to (B, factor H, factor W, D). Of MERGE a row of the norm is four
// pixels of its input (B, H, W, D / 4), those of a 2 x 2 patch column by column; a last row or column
// without a partner is left out.
constexpr int PLAIN = 0, EXPAND = 1, MERGE = 2;

struct Patches {
    int height, width, factor;  // H and W
};

// The row of the result of EXPAND that row m of the input becomes.
__device__ __forceinline__ int expanded_row(const Patches &p, int m) {
    const int of_patch = p.factor * p.factor, patch = m / of_patch, place = m - patch * of_patch;
    const int row = patch / p.width, column = patch - row * p.width;
    const int down = place / p.factor, right = place - down * p.factor;
    return ((row * p.factor + down) * p.width + column) * p.factor + right;
}

// The first pixel of what is merged to row m.
__device__ __forceinline__ int merged_pixel(const Patches &p, int m) {
    const int columns = p.width / 2, rows = p.height / 2;
    const int line = m / columns, image = line / rows;
    return (image * p.height + 2 * (line - image * rows)) * p.width + 2 * (m - line * columns);
}

// The offset of channel c of `dim` merged ones from that pixel's first channel.
__device__ __forceinline__ int merged_channel(const Patches &p, int c, int dim) {
    const int of_pixel = dim / 4, corner = c / of_pixel;
    return ((corner & 1) * p.width + (corner >> 1) - corner) * of_pixel + c;
}
