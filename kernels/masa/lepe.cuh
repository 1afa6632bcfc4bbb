// What the depthwise 5 x 5 convolution beside attention and its gradient by the weight share.
#pragma once
#include "common/common.cuh"

// A map (B, H, W, D): `pixel` elements from a pixel to the next.
struct LepeMap {
    const void *data;
    int pixel;
};

// Couple adjacent elements, as they are in memory.
template <class T>
struct Couple {
    u32 raw = 0;
    Couple() = default;
    __device__ __forceinline__ Couple(const void *p, long long i)
        : raw(*(const u32 *)((const unsigned short *)p + i)) {}
    __device__ __forceinline__ float2 unpack() const { return T::unpack(raw); }
    static __device__ __forceinline__ void store(void *p, long long i, float a, float b) {
        *(u32 *)((unsigned short *)p + i) = T::pack(a, b);
    }
};

template <>
struct Couple<Float> {
    float2 raw = {0.f, 0.f};
    Couple() = default;
    __device__ __forceinline__ Couple(const void *p, long long i)
        : raw(*(const float2 *)((const float *)p + i)) {}
    __device__ __forceinline__ float2 unpack() const { return raw; }
    static __device__ __forceinline__ void store(void *p, long long i, float a, float b) {
        *(float2 *)((float *)p + i) = make_float2(a, b);
    }
};

// COUNT rows of one column of the image whose first pixel is `pixels`; zeros outside of it.
template <class T, int COUNT>
__device__ __forceinline__ void load_lepe_column(Couple<T> (&to)[COUNT], const LepeMap &x,
                                                 long long pixels, int height, int width, int row,
                                                 int column, int channel) {
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
        const bool inside = column >= 0 && column < width && row + r >= 0 && row + r < height;
        to[r] = inside ? Couple<T>(x.data, (pixels + (long long)(row + r) * width + column) * x.pixel
                                + channel)
                       : Couple<T>();
    }
}
