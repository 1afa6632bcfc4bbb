// CUDA on a CPU, for emulated_cuda.py: the built-ins and PTX instructions that kernels/ uses, and
// launches. A thread of a cluster is a fiber that runs until it has to wait for others; the clusters
// (of one block, but for kernels that say so) run one after the other. Portable C++ for Linux, 64 bits, little-endian.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static
#define rsqrtf(x) (1.f / sqrtf(x))

using u32 = unsigned int;
using u16 = unsigned short;
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { u32 x, y, z; };

static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T v) { *p = v; }
static inline u32 __umulhi(u32 a, u32 b) { return (uint64_t)a * b >> 32; }

static inline u32 __float_as_uint(float f) {
    u32 v;
    memcpy(&v, &f, 4);
    return v;
}

static inline float __uint_as_float(u32 v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}

// --- threads ----------------------------------------------------------------------------------

static dim3 gridDim, blockDim;

namespace emulated {

constexpr int MOST_THREADS = 1024, MOST_BLOCKS = 8, STACK = 1 << 17, GUARD = 1024;
constexpr int POISON = 0xff;  // of every byte: NaN in all floating-point types
static const char *error;

union Word {
    u32 u;
    float f;
    const void *p;
    Word() {}
    Word(u32 u) : u(u) {}
    Word(float f) : f(f) {}
    Word(const void *p) : p(p) {}
};
struct Given {  // by a lane to an instruction of the whole warp
    Word words[6];
};

// Copies from global to shared memory take place as late as they may: where they are waited for.
struct Copy {
    char *to;
    const void *from;
    int bytes, valid, group;
};
struct Copies {
    static constexpr int MOST = 1024;
    Copy pending[MOST];
    int count, groups;
};

// Products of groups of warps read their factors in shared memory as late as they may, too; of rows
// g and g + 8 of a factor in registers, each lane has a copy.
struct Product {
    float *results[96];
    float before[96], rows[2][16];
    unsigned long long a, b;
    float (*from)(u16);
    bool add, follows, in_registers, a_transposed, b_transposed;
    int group, count;
};
struct Products {
    static constexpr int MOST = 32;
    Product pending[MOST];
    int count, groups;
};

struct Barrier {
    u32 arrived, phase;
};

struct Warp {
    Barrier barrier;
    u32 alive;
    Given given[2][32];
};

struct Block {
    dim3 index;
    char *shared;
    Barrier barriers[16];  // 0 is that of __syncthreads
    u32 alive;
};

struct Fiber {
    dim3 thread;
    Block *block;
    int lane, turn;
    Warp *warp;
    bool started, done;
    u32 cluster_phase;
    const u32 *awaited;  // null, or it goes on when this is `seen` no longer
    u32 seen;
    jmp_buf place;
    ucontext_t start;
    Copies copies;
    Products products;
};

static Fiber *fibers, *current;
static char *stacks;
static Warp warps[MOST_BLOCKS * MOST_THREADS / 32];
static Block blocks[MOST_BLOCKS];  // of the cluster
static Barrier cluster_barrier;
static u32 alive;
static int threads, step;  // of the cluster; step: 1, or -1 to run lanes in the opposite order
static u32 random_state, patience;
static jmp_buf launcher;
static void (*kernel)();

static void enter();

// Only the start of a fiber is a context of the system's: those make a system call a switch.
[[noreturn]] static void resume(Fiber *fiber) {
    current = fiber;
    if (fiber->started) _longjmp(fiber->place, 1);
    fiber->started = true;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = stacks + (fiber - fibers) * STACK;
    fiber->start.uc_stack.ss_size = STACK;
    makecontext(&fiber->start, enter, 0);
    setcontext(&fiber->start);
    abort();
}

[[noreturn]] static void stop(const char *why) {
    error = why;
    _longjmp(launcher, 1);
}

// Goes on with the next of `count` fibers, in a circle, if one of them can.
static void run_one_of(Fiber *first, int count) {
    int i = current - first;
    for (int tried = 0; tried < count; ++tried) {
        i = (i + step + count) % count;
        Fiber *const fiber = first + i;
        if (!fiber->done && (!fiber->awaited || *fiber->awaited != fiber->seen)) resume(fiber);
    }
}

static u32 random_number() {
    random_state = random_state * 1664525 + 1013904223;
    return random_state >> 8;
}

// Of the same warp, but for once in `patience` times: without a barrier between them, warps then
// overtake one another.
[[noreturn]] static void run_another() {
    if (random_number() % patience) {
        const int first = (current - fibers) / 32 * 32;
        run_one_of(fibers + first, min(32, threads - first));
    }
    current = fibers + random_number() % threads;
    run_one_of(fibers, threads);
    stop(alive ? "threads wait for one another for ever" : nullptr);
}

static __attribute__((noinline)) void wait_for_change(const u32 *of) {
    current->awaited = of;
    current->seen = *of;
    if (!_setjmp(current->place)) run_another();
    current->awaited = nullptr;
}

static void release_if_all(Barrier &barrier, u32 members) {
    if (barrier.arrived < members) return;
    barrier.arrived = 0;
    ++barrier.phase;
}

static void wait_for_all(Barrier &barrier, u32 members) {
    const u32 phase = barrier.phase;
    ++barrier.arrived;
    release_if_all(barrier, members);
    if (barrier.phase == phase) wait_for_change(&barrier.phase);
}

static void enter() {
    kernel();
    Warp &warp = *current->warp;
    current->done = true;
    --alive;
    if (--warp.alive) release_if_all(warp.barrier, warp.alive);
    if (--current->block->alive) release_if_all(current->block->barriers[0], current->block->alive);
    run_another();
}

// What the lanes of the warp give; it stays until the last but one call after this one.
template <class... T>
static const Given *exchange(T... words) {
    Warp &warp = *current->warp;
    Given *const given = warp.given[current->turn ^= 1];
    given[current->lane] = {{Word(words)...}};
    wait_for_all(warp.barrier, warp.alive);
    return given;
}

static void run_cluster(int count, int shared) {
    const int own = threads / count;  // threads of a block
    for (int n = 0; n < count; ++n) {
        memset(blocks[n].shared, POISON, shared + GUARD);
        memset(blocks[n].barriers, 0, sizeof(blocks[n].barriers));
        blocks[n].alive = own;
    }
    cluster_barrier = {};
    alive = threads;
    for (int i = 0; i < threads; ++i) {
        Fiber &fiber = fibers[i];
        const u32 j = i % own;
        fiber.block = blocks + i / own;
        fiber.thread = {j % blockDim.x, j / blockDim.x % blockDim.y, j / blockDim.x / blockDim.y};
        fiber.lane = j % 32;
        fiber.turn = 0;
        fiber.warp = warps + i / own * (MOST_THREADS / 32) + j / 32;
        if (fiber.lane == 0) *fiber.warp = {{}, (u32)min(32, own - (int)j)};
        fiber.started = fiber.done = false;
        fiber.awaited = nullptr;
        fiber.copies.count = fiber.copies.groups = 0;
        fiber.products.count = fiber.products.groups = 0;
    }
    patience = 1 << random_number() % 13;
    current = fibers;
    if (!_setjmp(launcher)) run_another();
    for (int n = 0; n < count; ++n)
        for (int i = 0; i < GUARD && !error; ++i)
            if (blocks[n].shared[shared + i] != (char)POISON)
                error = "writes beyond its shared memory";
}

// Clusters are of blocks that follow one another in z.
static const char *launch(void (*call)(), dim3 grid, dim3 block, int shared, u32 seed, int count) {
    gridDim = grid, blockDim = block, kernel = call;
    const int own = block.x * block.y * block.z;
    if (own < 1 || own > MOST_THREADS) return "too many threads";
    if (count > MOST_BLOCKS || grid.z % count) return "no such clusters";
    threads = count * own;
    step = seed & 1 ? -1 : 1;
    random_state = seed;
    error = nullptr;
    const size_t size = (shared + GUARD + 127) / 128 * 128;
    char *const memory = (char *)aligned_alloc(128, count * size);
    fibers = (Fiber *)malloc(threads * sizeof(Fiber));
    stacks = (char *)malloc((size_t)threads * STACK);
    const u32 clusters = grid.x * grid.y * (grid.z / count);
    for (u32 n = 0; n < clusters && !error; ++n) {
        const u32 i = seed & 1 ? clusters - 1 - n : n;
        for (u32 k = 0; k < (u32)count; ++k) {
            blocks[k].index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y * count + k};
            blocks[k].shared = memory + k * size;
        }
        run_cluster(count, shared);
    }
    free(stacks);
    free(fibers);
    free(memory);
    return error;
}

// Of a kernel that takes one struct: its size, and the call.
template <class Params>
constexpr int size_of_params(void (*)(Params)) { return sizeof(Params); }

template <class Params>
static void call_kernel(void (*kernel)(Params), const void *params) {
    kernel(*(const Params *)params);
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block->index)
#define dynamic_shared (emulated::current->block->shared)

static inline void __syncthreads() {
    emulated::wait_for_all(emulated::current->block->barriers[0], emulated::current->block->alive);
}

static inline void __syncwarp() { emulated::exchange(); }
static inline void __threadfence() {}
static inline int atomicAdd(int *to, int v) { return (*to += v) - v; }

namespace emulated {

template <class T>
static T shuffle(T v, int from) {
    static_assert(sizeof(T) == 4, "a shuffle is of 32 bits");
    u32 bits;
    memcpy(&bits, &v, 4);
    memcpy(&v, &exchange(bits)[from < 0 || from > 31 ? current->lane : from].words[0], 4);
    return v;
}

}  // namespace emulated

template <class T> static inline T __shfl_sync(u32, T v, int lane) {
    return emulated::shuffle(v, lane & 31);
}
template <class T> static inline T __shfl_xor_sync(u32, T v, int mask) {
    return emulated::shuffle(v, emulated::current->lane ^ mask);
}
template <class T> static inline T __shfl_up_sync(u32, T v, int by) {
    return emulated::shuffle(v, emulated::current->lane - by);
}
template <class T> static inline T __shfl_down_sync(u32, T v, int by) {
    return emulated::shuffle(v, emulated::current->lane + by);
}

static inline bool __all_sync(u32, bool v) {
    const auto *const given = emulated::exchange((u32)v);
    for (int lane = 0; lane < 32; ++lane) {
        u32 other;
        memcpy(&other, &given[lane].words[0], 4);
        v = v && other;
    }
    return v;
}

static inline size_t __cvta_generic_to_shared(const void *p) {
    return (const char *)p - dynamic_shared;
}

// --- PTX: a function for each instruction, or several together, with the operands in their order

namespace ptx {

using emulated::current;
using emulated::exchange;
using emulated::Given;

static inline float flush(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0.f, f) : f; }

static void ex2_approx_ftz_f32(float &y, float x) { y = flush(exp2f(flush(x))); }
static void lg2_approx_ftz_f32(float &y, float x) { y = flush(log2f(flush(x))); }
static void ld_global_nc_u16(u32 &v, const void *p) { v = *(const u16 *)p; }
static void rcp_approx_ftz_f32(float &y, float x) { y = flush(1.f / flush(x)); }

// Half precision by hand: _Float16 is for GCC 12 and newer.
static inline float from_half(u16 h) {
    const u32 bits = (h & 0x7fffu) << 13;
    const float f = (h & 0x7c00) == 0x7c00 ? __uint_as_float(bits | 0x7f800000u)
                                           : __uint_as_float(bits) * 0x1p112f;
    return h & 0x8000 ? -f : f;
}

static inline u16 to_half(float f) {
    const u32 bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (f != f) return 0x7fff;
    if (size >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
    if (size < 0x38800000u) return sign | (u32)rintf(fabsf(f) * 0x1p24f);  // below 2^-14
    return sign | ((size + 0xfffu + (size >> 13 & 1u)) >> 13) - (112u << 10);
}

static inline float from_bfloat(u16 b) { return __uint_as_float((u32)b << 16); }

static inline u16 to_bfloat(float f) {
    const u32 bits = __float_as_uint(f);
    return f != f ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

static void mov_b32__cvt_f32_f16__cvt_f32_f16(u32 v, float &lo, float &hi) {
    lo = from_half(v);
    hi = from_half(v >> 16);
}

static void cvt_rn_f16_f32__cvt_rn_f16_f32__mov_b32(float lo, float hi, u32 &v) {
    v = to_half(lo) | (u32)to_half(hi) << 16;
}

static void cvt_rn_bf16x2_f32(u32 &v, float hi, float lo) {
    v = to_bfloat(lo) | (u32)to_bfloat(hi) << 16;
}

static void fma_rn_bf16x2(u32 &d, u32 a, u32 b, u32 c) {
    // No product of two such numbers is inexact in fp32.
    const float lo = from_bfloat(a) * from_bfloat(b) + from_bfloat(c);
    const float hi = from_bfloat(a >> 16) * from_bfloat(b >> 16) + from_bfloat(c >> 16);
    d = to_bfloat(lo) | (u32)to_bfloat(hi) << 16;
}

static void st_global_f32(void *to, float v) { *(float *)to = v; }
static void st_global_u16(void *to, u16 v) { *(u16 *)to = v; }
static void st_release_gpu_global_s32(int *to, int v) { *to = v; }
static void ld_acquire_gpu_global_s32(int &v, const int *from) { v = *from; }

static inline void add_half(void *to, u16 v) {
    *(u16 *)to = to_half(from_half(*(u16 *)to) + from_half(v));
}

static inline void add_bfloat(void *to, u16 v) {
    *(u16 *)to = to_bfloat(from_bfloat(*(u16 *)to) + from_bfloat(v));
}

static void red_global_add_noftz_f16(void *to, u16 v) { add_half(to, v); }
static void red_global_add_noftz_bf16(void *to, u16 v) { add_bfloat(to, v); }

static void red_global_add_noftz_v2_f16x2(void *to, u32 v0, u32 v1) {
    for (int i = 0; i < 4; ++i) add_half((u16 *)to + i, (i < 2 ? v0 : v1) >> 16 * (i & 1));
}

static void red_global_add_noftz_v2_bf16x2(void *to, u32 v0, u32 v1) {
    for (int i = 0; i < 4; ++i) add_bfloat((u16 *)to + i, (i < 2 ? v0 : v1) >> 16 * (i & 1));
}

// d = a b + c, 16 x 8, of which lane 4 g + t has elements (g, 2 t), (g, 2 t + 1), (g + 8, 2 t) and
// (g + 8, 2 t + 1); a(row, k) and b(k, column) are elements of the factors.
template <int DEPTH = 8, class A, class B>
static inline void multiply(A a, B b, float &d0, float &d1, float &d2, float &d3, float c0,
                            float c1, float c2, float c3) {
    const int g = current->lane >> 2, column = 2 * (current->lane & 3);
    for (int k = 0; k < DEPTH; ++k) {
        const float upper = a(g, k), lower = a(g + 8, k), left = b(k, column);
        const float right = b(k, column + 1);
        c0 += upper * left, c1 += upper * right, c2 += lower * left, c3 += lower * right;
    }
    d0 = c0, d1 = c1, d2 = c2, d3 = c3;
}

// Factors of 16 bits: two elements along k in a register.
template <float from(u16), class... D>
static inline void multiply_pairs(u32 a0, u32 a1, u32 b, D &&...d_and_c) {
    const Given *const given = exchange(from(a0), from(a0 >> 16), from(a1), from(a1 >> 16),
                                        from(b), from(b >> 16));
    multiply([&](int row, int k) {
        return given[row % 8 * 4 + k / 2].words[row / 8 * 2 + k % 2].f;
    }, [&](int k, int column) { return given[column * 4 + k / 2].words[4 + k % 2].f; }, d_and_c...);
}

static void mma_sync_aligned_m16n8k8_row_col_f32_f16_f16_f32(
    float &d0, float &d1, float &d2, float &d3, u32 a0, u32 a1, u32 b, float c0, float c1, float c2,
    float c3) {
    multiply_pairs<from_half>(a0, a1, b, d0, d1, d2, d3, c0, c1, c2, c3);
}

static void mma_sync_aligned_m16n8k8_row_col_f32_bf16_bf16_f32(
    float &d0, float &d1, float &d2, float &d3, u32 a0, u32 a1, u32 b, float c0, float c1, float c2,
    float c3) {
    multiply_pairs<from_bfloat>(a0, a1, b, d0, d1, d2, d3, c0, c1, c2, c3);
}

// The same 16 elements deep.
template <float from(u16), class... D>
static inline void multiply_deep(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, D &&...d_and_c) {
    const Given *const given = exchange(a0, a1, a2, a3, b0, b1);
    multiply<16>([&](int row, int k) {
        return from(given[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2].u >> 16 * (k & 1));
    }, [&](int k, int column) {
        return from(given[column * 4 + k % 8 / 2].words[4 + k / 8].u >> 16 * (k & 1));
    }, d_and_c...);
}

static void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float &d0, float &d1, float &d2, float &d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
    float c0, float c1, float c2, float c3) {
    multiply_deep<from_half>(a0, a1, a2, a3, b0, b1, d0, d1, d2, d3, c0, c1, c2, c3);
}

static void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float &d0, float &d1, float &d2, float &d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
    float c0, float c1, float c2, float c3) {
    multiply_deep<from_bfloat>(a0, a1, a2, a3, b0, b1, d0, d1, d2, d3, c0, c1, c2, c3);
}

// c + sum of a(k) b(k) as the tensor cores of a Hopper GPU have it: terms lose what is below two bits
// under the last one of the largest, and the sum is cut off, not rounded.
template <class A, class B>
static inline float sum_cut_off(A a, B b, float c) {
    double terms[9] = {c}, largest = fabs(c), sum = 0;
    for (int k = 0; k < 8; ++k) {
        terms[k + 1] = (double)a(k) * b(k);
        if (fabs(terms[k + 1]) > largest) largest = fabs(terms[k + 1]);
    }
    if (!(largest > 0) || largest > 1e38) {
        for (double term : terms) sum += term;
        return sum;
    }
    int exponent;
    frexp(largest, &exponent);
    for (double term : terms) sum += ldexp(trunc(ldexp(term, 26 - exponent)), exponent - 26);
    const float nearest = sum;
    return fabs(nearest) > fabs(sum) ? nextafterf(nearest, 0.f) : nearest;
}

// Factors of which the tensor cores see 10 bits after the point.
static void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(
    float &d0, float &d1, float &d2, float &d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
    float c0, float c1, float c2, float c3) {
    const u32 seen = 0xffffe000u;
    const Given *const given = exchange(a0 & seen, a1 & seen, a2 & seen, a3 & seen, b0 & seen,
                                        b1 & seen);
    const int g = current->lane >> 2, column = 2 * (current->lane & 3);
    auto element = [&](int row, int right, float c) {
        return sum_cut_off(
            [&](int k) { return given[g * 4 + k % 4].words[row + k / 4 * 2].f; },
            [&](int k) { return given[(column + right) * 4 + k % 4].words[4 + k / 4].f; }, c);
    };
    const float upper = element(0, 0, c0), right = element(0, 1, c1);
    const float lower = element(1, 0, c2), last = element(1, 1, c3);
    d0 = upper, d1 = right, d2 = lower, d3 = last;
}

// Elements (g, 2 t) and (g, 2 t + 1) of an 8 x 8 tile, for lane 4 g + t; or of its transpose.
template <class Element>
static inline u32 take_pair(Element element, bool transposed) {
    const int g = current->lane >> 2, column = 2 * (current->lane & 3);
    const u16 lo = transposed ? element(column, g) : element(g, column);
    const u16 hi = transposed ? element(column + 1, g) : element(g, column + 1);
    return lo | (u32)hi << 16;
}

static void load_two_tiles(u32 &a, u32 &b, u32 row, bool transposed) {
    const Given *const given = exchange((const void *)(dynamic_shared + row));
    auto element = [&](int i, int column) { return ((const u16 *)given[i].words[0].p)[column]; };
    a = take_pair(element, transposed);
    b = take_pair([&](int row, int column) { return element(row + 8, column); }, transposed);
}

static void ldmatrix_sync_aligned_m8n8_x2_shared_b16(u32 &a, u32 &b, u32 row) {
    load_two_tiles(a, b, row, false);
}

static void ldmatrix_sync_aligned_m8n8_x2_trans_shared_b16(u32 &a, u32 &b, u32 row) {
    load_two_tiles(a, b, row, true);
}

static void load_four_tiles(u32 *v, u32 row, bool transposed) {
    const Given *const given = exchange((const void *)(dynamic_shared + row));
    for (int i = 0; i < 4; ++i)
        v[i] = take_pair([&](int row, int column) {
            return ((const u16 *)given[8 * i + row].words[0].p)[column];
        }, transposed);
}

static void ldmatrix_sync_aligned_m8n8_x4_shared_b16(u32 &a, u32 &b, u32 &c, u32 &d, u32 row) {
    u32 v[4];
    load_four_tiles(v, row, false);
    a = v[0], b = v[1], c = v[2], d = v[3];
}

static void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(u32 &a, u32 &b, u32 &c, u32 &d,
                                                           u32 row) {
    u32 v[4];
    load_four_tiles(v, row, true);
    a = v[0], b = v[1], c = v[2], d = v[3];
}

static void movmatrix_sync_aligned_m8n8_trans_b16(u32 &w, u32 v) {
    const Given *const given = exchange(v);
    w = take_pair([&](int row, int column) -> u16 {
        return given[row * 4 + column / 2].words[0].u >> 16 * (column & 1);
    }, true);
}

// Until it is waited for, the memory is poisoned.
static void cp_async_ca_shared_global(u32 to, const void *from, int bytes, int valid) {
    emulated::Copies &copies = current->copies;
    if (copies.count == copies.MOST) emulated::stop("too many copies under way for the emulation");
    copies.pending[copies.count++] = {dynamic_shared + to, from, bytes, valid, copies.groups};
    memset(dynamic_shared + to, emulated::POISON, bytes);
}

static void cp_async_ca_shared_global(u32 to, const void *from, int bytes) {
    cp_async_ca_shared_global(to, from, bytes, bytes);
}

static void bar_sync(int barrier, u32 threads) {
    emulated::wait_for_all(current->block->barriers[barrier], threads);
}

static void bar_arrive(int barrier, u32 threads) {
    ++current->block->barriers[barrier].arrived;
    emulated::release_if_all(current->block->barriers[barrier], threads);
}

static void cp_async_commit_group() { ++current->copies.groups; }

static void finish_copies(int before_group) {
    emulated::Copies &copies = current->copies;
    int left = 0;
    for (int i = 0; i < copies.count; ++i) {
        const emulated::Copy copy = copies.pending[i];
        if (copy.group >= before_group) {
            copies.pending[left++] = copy;
            continue;
        }
        memcpy(copy.to, copy.from, copy.valid);
        memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    }
    copies.count = left;
}

static void cp_async_wait_group(int pending) { finish_copies(current->copies.groups - pending); }

static void fence_proxy_async_shared() {}
static void wgmma_fence_sync_aligned() {}
static void wgmma_commit_group_sync_aligned() { ++current->products.groups; }

// Element (row, k) of a factor in shared memory, 16 deep, in rows of 128 bytes whose parts of 16 bytes
// are in an order that differs from row to row; `transposed`: rows are what is summed over.
static inline u16 factor(unsigned long long of, bool transposed, int row, int k) {
    if (of >> 62 != 1 || (of >> 32 & 0x3fff) != 64 || transposed && row >= 64) abort();
    u32 at = (of & 0x3fff) << 4;
    at += transposed ? k * 128 + row * 2 : row * 128 + k * 2;
    return *(const u16 *)(dynamic_shared + (at ^ (at >> 7 & 7) << 4));
}

static void finish_products(int before_group) {
    emulated::Products &products = current->products;
    const int lane = current->lane, g = lane >> 2, t = lane & 3;
    const int first = current->thread.x / 32 % 4 * 16 + g;
    int left = 0;
    for (int i = 0; i < products.count; ++i) {
        if (products.pending[i].group >= before_group) {
            products.pending[left++] = products.pending[i];
            continue;
        }
        const emulated::Product &p = products.pending[i];
        for (int j = 0; j < p.count; ++j) {
            const int down = j >> 1 & 1, column = j / 4 * 8 + 2 * t + (j & 1);
            float sum = !p.add ? 0.f : p.follows ? *p.results[j] : p.before[j];
            for (int k = 0; k < 16; ++k)
                sum += p.from(factor(p.b, p.b_transposed, column, k))
                    * (p.in_registers
                           ? p.rows[down][k]
                           : p.from(factor(p.a, p.a_transposed, first + 8 * down, k)));
            *p.results[j] = sum;
        }
    }
    products.count = left;
}

static void wgmma_wait_group_sync_aligned(int pending) {
    finish_products(current->products.groups - pending);
}

// An operand: a register of the result, or a number.
struct Operand {
    float *result;
    unsigned long long number;
    Operand(float &f) : result(&f) {}
    Operand(int n) : number(n) {}
    Operand(u32 n) : number(n) {}
    Operand(unsigned long long n) : number(n) {}
};

// Until they are waited for, results are NaN. What follows `count` results is the factors and, after
// two signs, whether they are transposed.
template <int count, float from(u16), class... Rest>
static void start_product(int add, Rest &...rest) {
    const Operand operands[] = {rest...};
    const bool in_registers = sizeof...(Rest) == count + 8;
    emulated::Products &products = current->products;
    if (products.count == products.MOST) emulated::stop("too many products under way");
    emulated::Product &p = products.pending[products.count];
    const Operand *const given = operands + count;
    p.count = count, p.from = from, p.add = add, p.in_registers = in_registers;
    if (in_registers) {
        const Given *const words = exchange((u32)given[0].number, (u32)given[1].number,
                                            (u32)given[2].number, (u32)given[3].number);
        for (int down = 0; down < 2; ++down)
            for (int k = 0; k < 16; ++k)
                p.rows[down][k] = from(words[(current->lane & ~3) + k % 8 / 2]
                                           .words[k / 8 * 2 + down].u >> 16 * (k & 1));
        p.b = given[4].number, p.b_transposed = given[7].number;
    } else {
        p.a = given[0].number, p.b = given[1].number;
        p.a_transposed = given[4].number, p.b_transposed = given[5].number;
    }
    p.follows = false;
    for (int i = 0; i < products.count; ++i)
        p.follows |= products.pending[i].results[0] == operands[0].result;
    for (int j = 0; j < count; ++j) {
        p.results[j] = operands[j].result;
        p.before[j] = *p.results[j];
        *p.results[j] = NAN;
    }
    p.group = products.groups;
    ++products.count;
}

#define PRODUCTS(N, TYPE, FROM)                                                                    \
    template <class... Rest>                                                                       \
    static void setp_ne_b32__wgmma_mma_async_sync_aligned_m64n##N##k16_f32_##TYPE##_##TYPE(        \
        int add, int, Rest &&...rest) {                                                            \
        start_product<N / 2, FROM>(add, rest...);                                                  \
    }
PRODUCTS(64, f16, from_half)
PRODUCTS(128, f16, from_half)
PRODUCTS(192, f16, from_half)
PRODUCTS(64, bf16, from_bfloat)
PRODUCTS(128, bf16, from_bfloat)
PRODUCTS(192, bf16, from_bfloat)

// In the 8 bytes of the barrier; `due`: bytes that are announced and have not come, or fewer than 0.
struct MBarrier {
    u32 phase;
    u32 expected : 11, arrived : 11;
    int due : 10;

    void complete() {
        if (arrived < expected || due) return;
        arrived = 0;
        ++phase;
    }
};

static inline MBarrier *barrier_at(u32 at) { return (MBarrier *)(dynamic_shared + at); }

static void mbarrier_init_shared_b64(u32 at, u32 expected) { *barrier_at(at) = {0, expected}; }

static void cp_async_mbarrier_arrive_noinc_shared_b64(u32 at) {
    finish_copies(current->copies.groups + 1);
    MBarrier *const barrier = barrier_at(at);
    ++barrier->arrived;
    barrier->complete();
}

static void mbarrier_arrive_shared_b64(u32 at) {
    MBarrier *const barrier = barrier_at(at);
    ++barrier->arrived;
    barrier->complete();
}

static void mbarrier_arrive_expect_tx_shared_b64(u32 at, int bytes) {
    MBarrier *const barrier = barrier_at(at);
    ++barrier->arrived;
    barrier->due += bytes;
    barrier->complete();
}

// Shared memory of the blocks of a cluster: the block above 24 bits.
static void mapa_shared__cluster_u32(u32 &there, u32 address, u32 block) {
    there = block << 24 | address;
}

static inline char *in_cluster(u32 address) {
    return emulated::blocks[address >> 24].shared + (address & 0xffffffu);
}

static void createpolicy_fractional_L2__evict_last_b64(unsigned long long &policy) { policy = 1; }

static void st_global_L2__cache_hint_v2_u32(void *to, u32 x, u32 y, unsigned long long policy) {
    *(uint2 *)to = {x, y};
}

// What is there is lost: NaN in any type.
static void discard_global_L2(const void *line, u32 bytes) {
    if ((size_t)line % bytes) abort();
    memset((void *)line, 0xff, bytes);
}

static void st_shared_v4_b32(u32 to, u32 a, u32 b, u32 c, u32 d) {
    *(uint4 *)(dynamic_shared + to) = {a, b, c, d};
}

static void st_async_weak_shared__cluster_mbarrier__bytes_v4_b32(u32 to, u32 a, u32 b, u32 c, u32 d,
                                                                 u32 at) {
    *(uint4 *)in_cluster(to) = {a, b, c, d};
    MBarrier *const barrier = (MBarrier *)in_cluster(at);
    barrier->due -= 16;
    barrier->complete();
}

static void barrier_cluster_arrive_release_aligned() {
    current->cluster_phase = emulated::cluster_barrier.phase;
    ++emulated::cluster_barrier.arrived;
    emulated::release_if_all(emulated::cluster_barrier, emulated::alive);
}

static void barrier_cluster_wait_acquire_aligned() {
    if (emulated::cluster_barrier.phase == current->cluster_phase)
        emulated::wait_for_change(&emulated::cluster_barrier.phase);
}

// In a loop until it succeeds.
static void mbarrier_try_wait_parity_shared_b64(u32 at, u32 parity) {
    const u32 *const phase = &barrier_at(at)->phase;
    if ((*phase & 1) == parity) emulated::wait_for_change(phase);
}

static void mbarrier_test_wait_parity_shared_b64(u32 at, u32 parity) {
    mbarrier_try_wait_parity_shared_b64(at, parity);
}

// Once, and then in a loop.
static void mbarrier_test_wait_parity_shared_b64__mbarrier_try_wait_parity_shared_b64(
    u32 at, u32 parity, u32, u32) {
    mbarrier_try_wait_parity_shared_b64(at, parity);
}

}  // namespace ptx
