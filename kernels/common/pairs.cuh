// Pairs of adjacent elements, as matrix instructions have them, and how rows of them are stored.
#pragma once
#include "common/common.cuh"

// Two adjacent elements in registers.
template <class T> struct Two { typedef u32 type; };
template <> struct Two<Float> { typedef float2 type; };
template <class T> using Pair = typename Two<T>::type;
template <class T> using Element = typename Raw<T>::element;

template <class T> constexpr int VECTOR = 16 / sizeof(Element<T>);  // elements of 16 bytes

template <class T>
__device__ __forceinline__ Pair<T> pack(float lo, float hi) {
    if constexpr (same<T, Float>) return make_float2(lo, hi);
    else return T::pack(lo, hi);
}

template <class T>
__device__ __forceinline__ float2 unpack(Pair<T> v) {
    if constexpr (same<T, Float>) return v;
    else return T::unpack(v);
}

template <class T>
__device__ __forceinline__ float2 load_pair(const Element<T> *p) {
    return unpack<T>(*(const Pair<T> *)p);
}

// Four adjacent columns of 16 from the two that a lane has of each half: of a row of a product,
// lane t has columns 2 t, 2 t + 1 in `left`, and those 8 further in `right`. It receives the
// columns from first_column(t) on.
template <class T>
struct Four {
    Pair<T> lo, hi;

    Four() = default;
    __device__ __forceinline__ Four(Pair<T> left, Pair<T> right) {
        const bool odd = threadIdx.x & 1;
        const Pair<T> given = odd ? left : right;
        Pair<T> other;
        if constexpr (same<T, Float>) {
            other.x = __shfl_xor_sync(0xffffffffu, given.x, 1);
            other.y = __shfl_xor_sync(0xffffffffu, given.y, 1);
        } else {
            other = __shfl_xor_sync(0xffffffffu, given, 1);
        }
        lo = odd ? other : left, hi = odd ? right : other;
    }

    __device__ __forceinline__ void store(Element<T> *to) const {
        if constexpr (same<T, Float>) *(float4 *)to = make_float4(lo.x, lo.y, hi.x, hi.y);
        else *(uint2 *)to = make_uint2(lo, hi);
    }
};

__device__ __forceinline__ int first_column(int t) { return (t & 1) * 8 + (t >> 1) * 4; }

// Stores eight adjacent columns, in half precision, from the fours of a row of two adjacent blocks,
// of which the first one begins at `to`: 16 bytes at a time, as memory has them fastest.
template <class T>
__device__ __forceinline__ void store_eight(Element<T> *to, const Four<T> &left,
                                            const Four<T> &right, bool valid) {
    const int t = threadIdx.x & 3;
    const bool upper = t & 2;  // these lanes have columns of the second block
    const u32 lo = __shfl_xor_sync(0xffffffffu, upper ? left.lo : right.lo, 2);
    const u32 hi = __shfl_xor_sync(0xffffffffu, upper ? left.hi : right.hi, 2);
    const uint4 v = upper ? make_uint4(lo, hi, right.lo, right.hi)
                          : make_uint4(left.lo, left.hi, lo, hi);
    if (valid) *(uint4 *)(to + (t & 2) * 8 + (t & 1) * 8) = v;
}

// The number of this warp, known to the compiler to be that of all lanes.
__device__ __forceinline__ int warp_index() {
    return __shfl_sync(0xffffffffu, (int)threadIdx.x >> 5, 0);
}

__device__ __forceinline__ float sum_over_columns(float v) {  // of a row, which 4 lanes have
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
