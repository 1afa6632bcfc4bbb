// GELU of x W^T + b in half precision, by the matrix instructions of sm_90a. A block keeps its rows of
// W in shared memory. Of its four groups of warps WIDE lie side by side, each with 64 TILES columns of
// the result; together they go through tiles of 64 rows of x, of which parts 64 deep come ahead. The
// 4 / WIDE teams do not wait for one another, so that one multiplies while another has GELU.
#include "fused/linear.cuh"

struct LinearGelu {
    const void *x, *weight, *bias;  // (rows, inner), (columns, inner), (columns)
    void *y, *product;              // (rows, columns): GELU, and what it is of, or null
    int rows, columns, inner;       // multiples of 8 but for rows
    int parts;                      // of the columns, each of a block's
};

// Eight adjacent elements of GELU cost as much as a product of depth 50, so this is a short one:
// x Phi(x) = (x + |x|) / 2 - |x| Phi(-|x|), where Phi(-a) = exp(-a a / 2) t P(t) with
// t = 1 / (1 + 0.38 a), to a relative error of 4e-5.
__device__ __forceinline__ float short_gelu(float x) {
    const float a = fabsf(x), t = rcp(fmaf(0.38f, a, 1.f));
    float p = fmaf(-0.08992552757f, t, 0.1888704300f);
    p = fmaf(p, t, 0.09198426455f);
    p = fmaf(p, t, 0.1578280628f);
    p = fmaf(p, t, 0.1512252986f);
    const float tail = ex2(-0.5f * LOG2E * (a * a)) * (t * p);
    return fmaf(-fminf(a, 1e4f), tail, 0.5f * (x + a));
}

template <class T, int WIDE, int TILES, int STAGES>
__global__ void __launch_bounds__(THREADS, 1) linear_gelu(const LinearGelu p) {
    typedef Element<T> E;
    constexpr int TEAMS = 4 / WIDE, MEMBERS = 128 * WIDE, COLUMNS = 64 * TILES * WIDE;
    extern __shared__ __align__(1024) char memory[];
    const int deep = (p.inner + 63) / 64;  // parts of the depth
    Tile(*const weight)[WIDE * TILES] = (Tile(*)[WIDE * TILES])(memory + TEAMS * STAGES * sizeof(Tile));
    float *const bias = (float *)(weight + deep);

    const int thread = threadIdx.x, group = warp_index() >> 2;
    const int team = group / WIDE, beside = group % WIDE;
    Tile *const x = (Tile *)memory + team * STAGES;
    const int part = blockIdx.x % p.parts, first_column = part * COLUMNS;
    const int first = blockIdx.x / p.parts * TEAMS + team, step = gridDim.x / p.parts * TEAMS;
    const int tiles = (p.rows + 63) / 64;

    int next_tile = first, next_part = 0;  // of x, to be copied
    auto copy_next = [&](int stage) {
        if (next_tile < tiles) {
            copy_part<T>(x[stage], p.x, next_tile * 64, p.rows, p.inner, next_part,
                         thread % MEMBERS, MEMBERS);
            if (++next_part == deep) next_part = 0, next_tile += step;
        }
        commit_copies();
    };
    for (int k = 0; k < deep; ++k)
        for (int i = 0; i < WIDE * TILES; ++i)
            copy_part<T>(weight[k][i], p.weight, first_column + 64 * i, p.columns, p.inner, k,
                         thread, THREADS);
    for (int c = thread; c < COLUMNS; c += THREADS)
        bias[c] = first_column + c < p.columns
            ? load_parameter(p.bias, first_column + c, T::CODE) : 0.f;
    commit_copies();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copy_next(i);
    wait_copies<STAGES - 1>();
    show_to_products();
    __syncthreads();  // W is there

    int stage = 0;
    for (int tile = first; tile < tiles; tile += step) {
        float sums[8 * TILES][4];
        for (int k = 0; k < deep; ++k) {
            wait_products<0>();  // which read what is copied next
            wait_copies<STAGES - 2>();
            show_to_products();
            asm volatile("bar.sync %0, %1;" :: "r"(1 + team), "n"(MEMBERS) : "memory");
            copy_next(stage == 0 ? STAGES - 1 : stage - 1);
            multiply_part<T>(sums, x[stage], weight[k][beside * TILES], k, p.inner);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        wait_products<0>();
        results(sums);

        int own = thread;
        opaque(own);  // else what follows from it stays in registers during the products
        const int g = own >> 2 & 7, t = own & 3;
        const int own_row = tile * 64 + 16 * (own >> 5 & 3) + g;
        const int own_column = 64 * TILES * beside;
#pragma unroll
        for (int n = 0; n < 8 * TILES; n += 4) {
            const int c = own_column + 8 * n;  // of 32 columns
            if (first_column + c >= p.columns) break;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 b = *(const float2 *)(bias + c + 8 * i + 2 * t);
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[n + i][e] += e & 1 ? b.y : b.x;
            }
            auto store = [&](void *map) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int r = own_row + 8 * k;
                    store_columns<T>((E *)map + (long long)r * p.columns + first_column + c, sums, n,
                                     k, r < p.rows, p.columns - first_column - c);
                }
            };
            if (p.product) store(p.product);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[n + i][e] = short_gelu(sums[n + i][e]);
            store(p.y);
        }
    }
}
