// What the products with something after them have in common.
#pragma once
#include "common/pairs.cuh"
#include "common/warpgroup.cuh"

constexpr int THREADS = 512;  // four groups of warps

// So many threads, of which this is number `own`, copy a part of up to 64 rows of a matrix
// (rows, inner) to a tile: from `first_row` on, and 64 elements from 64 `k` on; zeros beyond.
template <class T>
__device__ __forceinline__ void copy_part(Tile &to, const void *from, int first_row, int rows,
                                          int inner, int k, int own, int members) {
    opaque(own);  // else addresses stay in registers
    const int column = (own & 7) * 8;
    const bool deep_enough = 64 * k + column < inner;
#pragma unroll
    for (int row = own >> 3; row < 64; row += members >> 3) {
        const bool valid = deep_enough && first_row + row < rows;
        copy16(to.place(row, column), (const Element<T> *)from
               + (valid ? (long long)(first_row + row) * inner + 64 * k + column : 0), valid);
    }
}

// sums (64 x 8 TILES) = x w^T of a part 64 deep of `inner`, plus sums but for the first part.
template <class T, int COLUMNS>
__device__ __forceinline__ void multiply_part(float (&sums)[COLUMNS][4], const Tile &x,
                                              const Tile &w, int k, int inner) {
    const u64 left = describe(x), right = describe(w);
    begin_products();
    auto multiply = [&](int i) {
        multiply_tiles<false, false>(sums, part_of<false>(left, i), part_of<false>(right, i),
                                     k + i > 0, T{});
    };
    multiply(0), multiply(1);
    if (64 * k + 32 < inner) {  // else there are only zeros
        begin_products();
        multiply(2), multiply(3);
    }
    commit_products();
}

// Of the four lanes of a row, lane t receives what lane i had at v[t] as v[i].
__device__ __forceinline__ void transpose_four(u32 (&v)[4]) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int by = 1; by < 4; by <<= 1)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & by) continue;
            const u32 other = __shfl_xor_sync(0xffffffffu, t & by ? v[i] : v[i + by], by);
            if (t & by) v[i] = other;
            else v[i + by] = other;
        }
}

// Stores 32 columns from sums[n] on at `to`, which is where those of this row begin; `count` columns
// are there.
template <class T, int COLUMNS>
__device__ __forceinline__ void store_columns(void *to, const float (&sums)[COLUMNS][4], int n, int k,
                                              bool valid, int count) {
    const int t = threadIdx.x & 3;
    if constexpr (same<T, Float>) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (valid && 8 * i + 2 * t < count)
                *(float2 *)((float *)to + 8 * i + 2 * t) = make_float2(sums[n + i][2 * k],
                                                                      sums[n + i][2 * k + 1]);
    } else {
        u32 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = pack<T>(sums[n + i][2 * k], sums[n + i][2 * k + 1]);
        transpose_four(pairs);
        if (valid && 8 * t < count)
            *(uint4 *)((Element<T> *)to + 8 * t) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}
