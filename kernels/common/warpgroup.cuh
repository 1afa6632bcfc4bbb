// Matrix instructions that four warps, a group, carry out together on tiles in shared memory. They
// exist for sm_90a alone. They run in the background: results are there after wait_products.
#pragma once
#include "common/common.cuh"

typedef unsigned long long u64;

// 64 rows of 64 elements of 16 bits, at a multiple of 1,024 bytes. The eight elements from column
// 8 c on of row r are at 8 (c ^ r % 8), so that a column's elements lie in different banks.
struct Tile {
    unsigned short data[64 * 64];

    __device__ __forceinline__ char *place(int row, int column) {
        return (char *)data + row * 128 + ((column >> 3 ^ (row & 7)) << 4) + (column & 7) * 2;
    }
};

// How an instruction finds a tile of 128 bytes a row: what is 8 rows further is 1,024 bytes further.
__device__ __forceinline__ u64 describe(const Tile &tile) {
    return (u64)(shared_address(&tile) >> 4 & 0x3fffu) | (u64)64 << 16 | (u64)64 << 32
        | (u64)1 << 62;
}

// The part 16 deep with number k, of a tile with a row for each row or column of the product, or of
// a TRANSPOSED one, whose rows are what is summed over.
template <bool TRANSPOSED>
__device__ __forceinline__ u64 part_of(u64 tile, int k) { return tile + (TRANSPOSED ? 128 : 2) * k; }

// Comes before the first product, and where registers that a product takes were written.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all groups of products but the last PENDING ones are done.
template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

// What was written to shared memory by other instructions, copies too, is then seen by products.
__device__ __forceinline__ void show_to_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Keeps the compiler from moving what reads results ahead of the wait for them.
template <int TILES>
__device__ __forceinline__ void results(float (&d)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) opaque(d[i >> 2][i & 3]);
}

#define RESULTS_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define RESULTS_32(i)                                                                              \
    RESULTS_4(i), RESULTS_4(i + 1), RESULTS_4(i + 2), RESULTS_4(i + 3), RESULTS_4(i + 4),          \
        RESULTS_4(i + 5), RESULTS_4(i + 6), RESULTS_4(i + 7)
#define NAMES_0                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "                  \
    "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32                                                                                   \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "                  \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "                  \
    "%62, %63"
#define NAMES_64                                                                                   \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "                  \
    "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "                  \
    "%94, %95"

// d (64 x N) = a b, plus d if `add`; a is 64 x 16 and b is 16 x N, in half precision. Warp w of the
// group has rows 16 w to 16 w + 15: its lane 4 g + t has the elements (g + 8 k, 8 n + 2 t + e) as
// d[n][2 k + e]. For N above 64 the tiles of b, each with rows for 64 columns, follow one another.
#define MULTIPLY_TILES(TYPE, NAME, TILES, RESULTS, NAMES, A, B, ADD, A_WAY, B_WAY)                 \
    template <bool A_TRANSPOSED, bool B_TRANSPOSED>                                                \
    __device__ __forceinline__ void multiply_tiles(float (&d)[TILES][4], u64 a, u64 b, bool add,   \
                                                   TYPE) {                                         \
        asm volatile("{.reg .pred add; setp.ne.b32 add, " ADD ", 0; wgmma.mma_async.sync.aligned." \
                     NAME " {" NAMES "}, " A ", " B ", add, 1, 1, " A_WAY ", " B_WAY ";}"          \
                     : RESULTS                                                                     \
                     : "l"(a), "l"(b), "r"((int)add), "n"((int)A_TRANSPOSED),                      \
                       "n"((int)B_TRANSPOSED));                                                    \
    }
#define MULTIPLY_TILES_OF(TYPE, NAME)                                                              \
    MULTIPLY_TILES(TYPE, "m64n64k16.f32." NAME "." NAME, 8, RESULTS_32(0), NAMES_0, "%32", "%33",  \
                   "%34", "%35", "%36")                                                            \
    MULTIPLY_TILES(TYPE, "m64n128k16.f32." NAME "." NAME, 16, RESULTS_64, NAMES_0 ", " NAMES_32,   \
                   "%64", "%65", "%66", "%67", "%68")                                              \
    MULTIPLY_TILES(TYPE, "m64n192k16.f32." NAME "." NAME, 24, RESULTS_96,                          \
                   NAMES_0 ", " NAMES_32 ", " NAMES_64, "%96", "%97", "%98", "%99", "%100")
#define RESULTS_64 RESULTS_32(0), RESULTS_32(8)
#define RESULTS_96 RESULTS_64, RESULTS_32(16)
MULTIPLY_TILES_OF(Half, "f16")
MULTIPLY_TILES_OF(BFloat, "bf16")

// The same for N = 64 with the warp's rows of a in registers, as those of a Block16 (ssd/ssd.cuh).
template <bool B_TRANSPOSED>
__device__ __forceinline__ void multiply_tiles(float (&d)[8][4], const u32 (&a)[4], u64 b, bool add,
                                               BFloat) {
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %37, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;}"
        : RESULTS_32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),
          "n"((int)B_TRANSPOSED));
}
