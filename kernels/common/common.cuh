// Half-precision values, fast functions and tensor-core tiles, by PTX alone: NVRTC then needs no
// header of CUDA's.
#pragma once

typedef unsigned int u32;

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

#if __CUDA_ARCH__ >= 800
#define CP_ASYNC 1
#endif
#if __CUDA_ARCH__ >= 900
#define ADD_TO_MEMORY asm volatile
#else
#define ADD_TO_MEMORY(...)  // older GPUs never call what uses it
#endif

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float sigmoid(float z) { return rcp(1.f + ex2(-LOG2E * z)); }

__device__ __forceinline__ u32 load_u16(const void *p) {
    u32 v;
    asm("ld.global.nc.u16 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// What Half and BFloat have in common, by the name of the type in PTX: `add` adds to memory without
// returning what was there; `mma` multiplies a (16 x 8) by b (8 x 8) and adds c in fp32. This is a
// macro because the text of an asm statement cannot depend on a template's parameter.
#define ADD_AND_MULTIPLY(NAME)                                                                    \
    static __device__ __forceinline__ void add(void *to, uint2 v) {                               \
        ADD_TO_MEMORY("red.global.add.noftz.v2." NAME "x2 [%0], {%1, %2};"                        \
                      :: "l"(to), "r"(v.x), "r"(v.y) : "memory");                                 \
    }                                                                                             \
    static __device__ __forceinline__ void add(void *to, unsigned short v) {                      \
        ADD_TO_MEMORY("red.global.add.noftz." NAME " [%0], %1;" :: "l"(to), "h"(v) : "memory");   \
    }                                                                                             \
    static __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 b) {            \
        mma(c, a0, a1, b, c);                                                                     \
    }                                                                                             \
    static __device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 b,              \
                                               const float (&c)[4]) {                             \
        asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "       \
            "{%4, %5}, {%6}, {%7, %8, %9, %10};"                                                  \
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                      \
            : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));              \
    }

// The types of maps. CODE is what a field such as `y_type` says; `pack` and `unpack` are for two
// values in 32 bits.
struct Half {
    static constexpr int CODE = 1;
    ADD_AND_MULTIPLY("f16")
    static __device__ __forceinline__ float2 unpack(u32 v) {
        float2 f;
        asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
            : "=f"(f.x), "=f"(f.y) : "r"(v));
        return f;
    }
    static __device__ __forceinline__ u32 pack(float lo, float hi) {
        u32 v;
        asm("{.reg .b16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
            : "=r"(v) : "f"(lo), "f"(hi));
        return v;
    }
};

struct BFloat {
    static constexpr int CODE = 2;
    ADD_AND_MULTIPLY("bf16")
    // Rounds to nearest, ties to even; the result is in the upper half.
    static __device__ __forceinline__ u32 round(float f) {
        const u32 v = __float_as_uint(f);
        return f != f ? 0x7fffffffu : v + 0x7fffu + (v >> 16 & 1u);
    }
    static __device__ __forceinline__ float2 unpack(u32 v) {
        return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
    }
    static __device__ __forceinline__ u32 pack(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
        u32 v;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
        return v;
#else
        return round(lo) >> 16 | (round(hi) & 0xffff0000u);
#endif
    }
};

struct Float {  // fp32
    static constexpr int CODE = 0;
};

// Keeps what is in a register from the compiler, which then neither calculates it again elsewhere
// nor sees how it came about.
__device__ __forceinline__ void opaque(int &x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opaque(u32 &x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opaque(float &x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void opaque(char *&x) { asm volatile("" : "+l"(x)); }

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;

// log2(1 + 2^z) by two special functions. Results below 6e-8 are 0.
__device__ __forceinline__ float fast_softplus2(float z) {
    return fmaxf(z, 0.f) + lg2(1.f + ex2(-fabsf(z)));
}

// log2(1 + 2^z), as precise as results of type T need: max(z, 0) + e P(e) with e = 2^-|z| and a
// polynomial P, so that tiny results keep their digits.
template <class T>
__device__ __forceinline__ float precise_softplus2(float z) {
    const float e = ex2(-fabsf(z));
    float p;
    if constexpr (same<T, Float>) {  // relative error 2e-7
        p = fmaf(0.00754890637f, e, -0.0425659567f);
        p = fmaf(p, e, 0.112854391f);
        p = fmaf(p, e, -0.197117448f);
        p = fmaf(p, e, 0.275640696f);
        p = fmaf(p, e, -0.358408302f);
        p = fmaf(p, e, 0.480692923f);
        p = fmaf(p, e, -0.721340179f);
        p = fmaf(p, e, 1.44269502f);
    } else {  // 9e-6
        p = fmaf(-0.034434747f, e, 0.146029979f);
        p = fmaf(p, e, -0.30303365f);
        p = fmaf(p, e, 0.469173133f);
        p = fmaf(p, e, -0.720426023f);
        p = fmaf(p, e, 1.44268286f);
    }
    return fmaf(p, e, fmaxf(z, 0.f));
}

// Returns the state that leaves a part of a scan when `enter` enters it. `decay` is what the part
// multiplies a state by, and `end` is what leaves it when zero enters. A decay of 0 means that
// another image begins within the part; then a NaN of the image before does not reach it.
__device__ __forceinline__ float follow(float decay, float end, float enter) {
    return decay == 0.f ? end : decay * enter + end;
}

// Four adjacent, aligned elements of T: loaded as they are, unpacked to numbers, and stored.
template <class T> struct Raw { typedef uint2 type; typedef unsigned short element; };
template <> struct Raw<Float> { typedef float4 type; typedef float element; };

template <class T>
__device__ __forceinline__ typename Raw<T>::type load4(const void *p, long long i, bool valid) {
    typedef typename Raw<T>::type R;
    if (valid) return *(const R *)((const char *)p + i * (sizeof(R) / 4));
    return R{};
}

// The same for data that is not read again soon, so that it leaves L2 before other data.
template <class T>
__device__ __forceinline__ typename Raw<T>::type load4_last(const void *p, long long i, bool valid) {
    typedef typename Raw<T>::type R;
    if (valid) return __ldcs((const R *)((const char *)p + i * (sizeof(R) / 4)));
    return R{};
}

__device__ __forceinline__ void unpack4(float (&v)[4], const float4 &raw, Float) {
    v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
}

template <class T>
__device__ __forceinline__ void unpack4(float (&v)[4], const uint2 &raw, T) {
    const float2 lo = T::unpack(raw.x), hi = T::unpack(raw.y);
    v[0] = lo.x, v[1] = lo.y, v[2] = hi.x, v[3] = hi.y;
}

template <class T>
__device__ __forceinline__ void store4(void *p, long long i, const float (&v)[4]) {
    if constexpr (same<T, Float>)
        *(float4 *)((float *)p + i) = make_float4(v[0], v[1], v[2], v[3]);
    else
        *(uint2 *)((unsigned short *)p + i) = make_uint2(T::pack(v[0], v[1]), T::pack(v[2], v[3]));
}

// The same for data that is read only much later.
template <class T>
__device__ __forceinline__ void store4_aside(void *p, long long i, const float (&v)[4]) {
    if constexpr (same<T, Float>)
        __stcs((float4 *)((float *)p + i), make_float4(v[0], v[1], v[2], v[3]));
    else
        __stcs((uint2 *)((unsigned short *)p + i),
               make_uint2(T::pack(v[0], v[1]), T::pack(v[2], v[3])));
}

// Stores data that another kernel reads soon, so that it is the last to leave L2.
__device__ __forceinline__ void store_for_reuse(void *to, uint2 v) {
#if __CUDA_ARCH__ >= 800
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
    asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;"
                 :: "l"(to), "r"(v.x), "r"(v.y), "l"(policy) : "memory");
#else
    *(uint2 *)to = v;
#endif
}

// Drops an aligned line from L2 without writing it to memory, so that its content is lost.
constexpr int LINE_BYTES = 128;

__device__ __forceinline__ void discard_line(const void *line) {
#if __CUDA_ARCH__ >= 800
    asm volatile("discard.global.L2 [%0], 128;" :: "l"(line) : "memory");
#endif
}

// The exact GELU, not the approximation by tanh.
__device__ __forceinline__ float gelu(float x) {
    return x * (0.5f + 0.5f * erff(x * 0.7071067811865476f));
}

// Loads an element of a parameter, whose `type` is 0 for fp32, 1 for fp16 and 2 for bf16.
__device__ __forceinline__ float load_parameter(const void *p, long long i, int type) {
    if (type == 0) return ((const float *)p)[i];
    u32 v = ((const unsigned short *)p)[i];
    return type == 1 ? Half::unpack(v).x : BFloat::unpack(v).x;
}

__device__ __forceinline__ void store_parameter(void *p, long long i, int type, float v) {
    if (type == 0) ((float *)p)[i] = v;
    else ((unsigned short *)p)[i] = (unsigned short)(type == 1 ? Half::pack(v, 0.f)
                                                              : BFloat::pack(v, 0.f));
}

// The same for an element of a result, with a branch for each type: the code of the scan kernels
// depends on that. Below sm_80 they take no bf16, and it has no branch.
__device__ __forceinline__ void store_result(void *p, long long i, int type, float v) {
    if (type == 0) ((float *)p)[i] = v;
    else if (type == 1) ((unsigned short *)p)[i] = (unsigned short)Half::pack(v, 0.f);
#if __CUDA_ARCH__ >= 800
    else ((unsigned short *)p)[i] = (unsigned short)BFloat::pack(v, 0.f);
#endif
}

__device__ __forceinline__ u32 shared_address(const void *p) {
    return (u32)__cvta_generic_to_shared(p);
}

// Copies 16 bytes from global to shared memory, or writes zeros if `valid` is false.
__device__ __forceinline__ void copy16(void *to, const void *from, bool valid) {
#ifdef CP_ASYNC
    int size = valid ? 16 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(size));
#else
    *(uint4 *)to = valid ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
#endif
}

// Copy 8 or 4 bytes from global to shared memory.
__device__ __forceinline__ void copy8(void *to, const void *from) {
#ifdef CP_ASYNC
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(shared_address(to)), "l"(from));
#else
    *(uint2 *)to = *(const uint2 *)from;
#endif
}

__device__ __forceinline__ void copy4(void *to, const void *from) {
#ifdef CP_ASYNC
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(shared_address(to)), "l"(from));
#else
    *(u32 *)to = *(const u32 *)from;
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef CP_ASYNC
    asm volatile("cp.async.commit_group;");
#endif
}

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
#ifdef CP_ASYNC
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING));
#endif
}

// A barrier in shared memory that completes a phase when `threads` threads have arrived and all
// that they copied before has come. Who waits on it waits for the data alone, not for the other
// threads. GPUs without asynchronous copies wait for all threads of the block instead.
constexpr int BARRIER_BYTES = 8;

__device__ __forceinline__ void make_barrier(char *barrier, u32 threads) {
#ifdef CP_ASYNC
    asm volatile("mbarrier.init.shared.b64 [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void arrive_with_copies(char *barrier) {
#ifdef CP_ASYNC
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];"
                 :: "r"(shared_address(barrier)) : "memory");
#endif
}

// Waits for a phase to complete. Its `parity` is 0 for the first phase, 1 for the second, 0 for the
// third, and so on.
__device__ __forceinline__ void wait_for_copies(char *barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
#define WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
#ifdef CP_ASYNC
    asm volatile("{.reg .pred done; again: " WAIT " done, [%0], %1; @!done bra again;}"
                 :: "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
    __syncthreads();
#endif
#undef WAIT
}

// A flag that another block waits for. A block that has seen it also sees what was written before
// it.
__device__ __forceinline__ void store_release(int *to, int v) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ int load_acquire(const int *from) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// Loads two 8 x 8 tiles of half-precision values. Lane l gives the address of row l % 8 of tile
// l / 8; lanes from 16 on may give any address.
__device__ __forceinline__ void load_tiles(u32 &a, u32 &b, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(a), "=r"(b) : "r"(row));
}

// The same, with each tile transposed.
__device__ __forceinline__ void load_tiles_transposed(u32 &a, u32 &b, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(a), "=r"(b) : "r"(shared_address(row)));
}

// Transpose an 8 x 8 tile of half-precision values; lane 4 g + t has elements 2 t, 2 t + 1 of row g.
__device__ __forceinline__ u32 transpose_tile(u32 v) {
    u32 w;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(w) : "r"(v));
    return w;
}
