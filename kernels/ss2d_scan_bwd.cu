// Backward of ss2d_scan for N = 1 on half-precision maps. Walks a route's chunks from the last to
// the first; within a chunk the states run forward again from the one that the forward saved.
//
// With dh the gradient by a state, running backwards: dh_t = C_t dy_t + a_(t+1) dh_(t+1). `carry`
// is a_(t+1) dh_(t+1) of the chunk after this one.
#include "ss2d_scan.cuh"

struct Params {
    Scan scan;
    Map x, dy;
    const float *states;   // (B, K, chunks, D): the state that enters each chunk
    void *dx;              // (K, B, H, W, D): without the part that goes through the projection
    void *dprojected;      // (columns, B, H * W, K, P): sums over the channels of a block
    float *partials;       // (parts, K D R + 2 K D + D): of dt_projs_weight, A, bias, skip
    const float *entries;  // (B, K, spans, D): the carry that enters each span's end, or null
    float *decays, *ends;  // (B, K, spans, D): of a span from no carry, if SUMMARY
};

__device__ __forceinline__ float element(const float4 &v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Pack channel 0 by pairs of positions (half the registers until channel 1 is there), then both by
// position.
template <class T>
__device__ __forceinline__ void collect(u32 (&packed)[OWN], const float (&v)[OWN], int c) {
#pragma unroll
    for (int i = 0; i < OWN; i += 2) {
        const u32 two = T::pack(v[i], i + 1 < OWN ? v[i + 1] : 0.f);
        const u32 first = packed[i / 2 * 2];
        packed[i] = c ? __byte_perm(first, two, 0x5410) : two;
        if (c && i + 1 < OWN) packed[i + 1] = __byte_perm(first, two, 0x7632);
    }
}

template <class T, int TILES, bool SUMMARY>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) ss2d_scan_bwd(const Params params) {
    const Scan &p = params.scan;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int g = lane >> 2, t = lane & 3;
    const int route = blockIdx.x, span = blockIdx.y % p.spans, column = blockIdx.y / p.spans;
    const int groups = (p.dim + 15) >> 4, group = column * warps + warp;
    const int working = min(warps, groups - column * warps);  // warps that have channels
    const int channel = group * 16 + 4 * t;
    const bool active = group < groups;
    const int first = span * p.span, last = min(first + p.span, p.chunks);
    const int length = p.height * p.width;
    const Path path = make_path(p, route);
    const int pairs_at = (p.rank + 1) & ~1;  // column of (B, C)

    extern __shared__ __align__(16) char shared[];
    const int staged_bytes = (p.row >> 3) * UNIT_BYTES;
    const int warp_bytes = 4 * MAP_BYTES + TILES * 768 + 320 + 2048;
    char *const warp_memory = shared + 2 * staged_bytes;
    char *const own = warp_memory + warp * warp_bytes;  // x and dy, twice each
    float4 *const dweight = (float4 *)(own + 4 * MAP_BYTES) + lane;  // of each tile
    u32 *const fragments = (u32 *)(own + 4 * MAP_BYTES + TILES * 512);
    float *const bias = (float *)(fragments + TILES * 64);
    float *const rates = bias + 16, *const skip = rates + 16;
    float *const states = skip + 16;             // twice
    // Of the lane's 4 channels each: the carry; then the sums of A, bias and skip, or the decay.
    float *const carry = states + 32 + lane, *const sums = carry + 128;
    if (active) {
        for (int j = lane; j < TILES * 64; j += 32)
            fragments[j] = p.fragments[((long long)route * groups + group) * TILES * 64 + j];
        if (lane < 16) {
            bias[lane] = p.bias[(route * groups + group) * 16 + lane];
            rates[lane] = p.rates[(route * groups + group) * 16 + lane];
            skip[lane] = route == 0 ? p.skip[group * 16 + lane] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < TILES; ++j) dweight[j * 32] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int j = 0; j < 12; ++j) sums[j * 32] = 0.f;
        if (lane < 16) states[lane] = states[16 + lane] = 0.f;  // channels beyond the last stay so
    }

    for (int b = blockIdx.z * p.images; b < min(p.batch, (int)(blockIdx.z + 1) * p.images); ++b) {
        const char *image = (const char *)p.projected + (long long)b * length * p.routes * p.row * 2;
        const long long walk = (long long)b * p.routes + route;
        if (active)
            for (int c = 0; c < 4; ++c) {
                carry[c * 32] = params.entries && channel + c < p.dim
                    ? params.entries[(walk * p.spans + span) * p.dim + channel + c] : 0.f;
                if (SUMMARY) sums[c * 32] = 1.f;
            }

        auto stage = [&](int chunk, int turn) {
            stage_projected(p, path, shared + turn * staged_bytes, image, route, chunk);
            if (active) {
                char *to = own + turn * 2 * MAP_BYTES + lane * 8;
                const int start = chunk * CHUNK + OWN * g;
                if (!SUMMARY) {
                    stage_map(p, path, params.x, to, b, channel, start);
                    const int c = group * 16 + lane;
                    if (lane < 16 && c < p.dim)
                        copy4(states + turn * 16 + lane,
                              params.states + (walk * p.chunks + chunk) * p.dim + c);
                }
                stage_map(p, path, params.dy, to + MAP_BYTES, b, channel, start);
            }
            commit_copies();
        };
        stage(last - 1, 0);
        for (int chunk = last - 1; chunk >= first; --chunk) {
            const int turn = (last - 1 - chunk) & 1;
            const int start = chunk * CHUNK + OWN * g;
            const char *staged = shared + turn * staged_bytes;
            char *const x_slot = own + turn * 2 * MAP_BYTES, *const dy_slot = x_slot + MAP_BYTES;
            wait_copies<0>();
            __syncthreads();
            if (chunk > first) stage(chunk - 1, turn ^ 1);

            float dpairs[4][4] = {};  // of B and C: tiles of 16 positions x 8 columns
            if (active) {
                u32 pairs[OWN];
                load_pairs(pairs, staged, pairs_at, g);
                // An operand of the tensor cores that sums over channels into one column.
                const u32 one = T::pack(1.f, 1.f);
                const u32 sum_B = g == (pairs_at & 7) ? one : 0, sum_C = g == (pairs_at & 7) + 1 ? one : 0;
#pragma unroll 1
                for (int pair = 0; pair < 2; ++pair) {
                    float z[OWN][2];
                    project_dt<T, TILES>(z, staged, fragments, bias, pair, lane);
                    u32 *const x_at = (u32 *)(x_slot + lane * 8 + 4 * pair);
                    u32 *const dy_at = (u32 *)(dy_slot + lane * 8 + 4 * pair);
                    u32 dx2[OWN], dz2[OWN], dB2[OWN], dC2[OWN];  // of both channels, packed
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float dx[OWN], dz[OWN], dB[OWN], dC[OWN];
                        const int n = 2 * pair + c;
                        const float rate = rates[4 * t + n], D = skip[4 * t + n];
                        float l[OWN], slope[OWN], a[OWN], q[OWN], x[OWN], Cdy[OWN];
                        float P = 1.f, h = 0.f;
#pragma unroll
                        for (int i = 0; i < OWN; ++i) {
                            const float e = ex2(-fabsf(z[i][c])), u = 1.f + e;
                            l[i] = fmaxf(z[i][c], 0.f) + lg2(u);
                            slope[i] = (z[i][c] > 0.f ? 1.f : e) * rcp(u);
                            if (start + i >= length) l[i] = slope[i] = 0.f;
                            a[i] = ex2(rate * l[i]);
                            P = i ? P * a[i] : a[i];
                            const float2 dy2 = T::unpack(dy_at[i * 64]), BC = T::unpack(pairs[i]);
                            const float dy = c ? dy2.y : dy2.x;
                            Cdy[i] = BC.y * dy;
                            if (!SUMMARY) {
                                const float2 x2 = T::unpack(x_at[i * 64]);
                                x[i] = c ? x2.y : x2.x;
                                q[i] = l[i] * x[i] * (LN2 * BC.x);
                                h = i ? a[i] * h + q[i] : q[i];
                            }
                        }
                        float w = 0.f, P_back = P;
#pragma unroll
                        for (int i = OWN - 1; i >= 0; --i) w = a[i] * (Cdy[i] + w);
                        combine_lanes<true>(P_back, w, g);
                        const float arrive = carry[n * 32], leave = P_back * arrive + w;
                        const float after = __shfl_down_sync(ALL, leave, 4);
                        w = g == 7 ? arrive : after;
                        carry[n * 32] = __shfl_sync(ALL, leave, t);
                        if (SUMMARY) {
                            sums[n * 32] *= __shfl_sync(ALL, P_back, t);
                            continue;
                        }
                        combine_lanes<false>(P, h, g);
                        const float enter = states[turn * 16 + 4 * t + n], out = P * enter + h;
                        const float before = __shfl_up_sync(ALL, out, 4);
                        h = g ? before : enter;
                        float dD = 0.f, dA = 0.f, dbias = 0.f;
#pragma unroll
                        for (int i = 0; i < OWN; ++i) {
                            h = a[i] * h + q[i];
                            q[i] = h - q[i];  // a_t h_(t-1)
                            const float2 dy2 = T::unpack(dy_at[i * 64]);
                            const float dy = c ? dy2.y : dy2.x;
                            dD += dy * x[i];
                            dC[i] = dy * h;
                            dx[i] = D * dy;
                        }
#pragma unroll
                        for (int i = OWN - 1; i >= 0; --i) {
                            const float dh = Cdy[i] + w;
                            w = a[i] * dh;
                            const float drive = dh * (LN2 * T::unpack(pairs[i]).x);
                            const float decayed = dh * q[i];
                            dx[i] += drive * l[i];
                            dB[i] = dh * (l[i] * x[i]);
                            dA += l[i] * decayed;
                            // By z: of the projection, times log2(e) to be true.
                            dz[i] = (drive * x[i] + decayed * (LN2 * rate)) * slope[i];
                            dbias += dz[i];
                        }
                        collect<T>(dx2, dx, c);
                        collect<T>(dz2, dz, c);
                        collect<T>(dB2, dB, c);
                        collect<T>(dC2, dC, c);
                        sums[n * 32] += dA;
                        sums[(4 + n) * 32] += dbias;
                        if (route == 0) sums[(8 + n) * 32] += dD;
                    }
                    if (!SUMMARY) {
#pragma unroll
                    for (int i = 0; i < OWN; ++i) {
                        x_at[i * 64] = dx2[i];
                        dy_at[i * 64] = dz2[i];
                    }
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        T::mma(dpairs[s], dB2[s], s < 3 ? dB2[s + 4] : 0u, sum_B);
                        T::mma(dpairs[s], dC2[s], s < 3 ? dC2[s + 4] : 0u, sum_C);
                    }
                    }
                }
            }
            if (SUMMARY) continue;

            uint2 dz[OWN];
            if (active) {
                uint2 dx[OWN];
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    dx[i] = *(uint2 *)(x_slot + lane * 8 + i * 256);
                    dz[i] = *(uint2 *)(dy_slot + lane * 8 + i * 256);
                }
                write_map(p, path, (unsigned short *)params.dx
                          + ((long long)route * p.batch + b) * length * p.dim, dx, channel, start);
                __syncwarp();
                // dt_projs_weight: 16 channels x 8 columns, summed over the positions.
                u32 turned[OWN][2];
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    turned[i][0] = transpose_tile(dz[i].x);
                    turned[i][1] = transpose_tile(dz[i].y);
                }
                const char *row = staged + lane % 16 * 16;
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const float4 sum = dweight[j * 32];
                    float c[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                    for (int i = 0; i < OWN; i += 2) {
                        u32 b0, b1;
                        // The tiles of positions i and i + 1 are neighbours; there is no 7.
                        load_tiles_transposed(b0, b1, row + j * UNIT_BYTES
                                              + (i + 1 < OWN ? i : i - 1) * 128);
                        if (i + 1 < OWN) {
                            T::mma(c, turned[i][0], turned[i][1], b0);
                            T::mma(c, turned[i + 1][0], turned[i + 1][1], b1);
                        } else {
                            T::mma(c, turned[i][0], turned[i][1], b1);
                        }
                    }
                    dweight[j * 32] = make_float4(c[0], c[1], c[2], c[3]);
                }
            }
            // dprojected: a tile of 8 columns at a time, summed over the warps in shared memory,
            // in turns where x and where dy was.
            for (int tile = 0; tile < p.row >> 3; ++tile) {
                const int at = tile & 1 ? MAP_BYTES : 0;
                if (active) {
                    const bool with_pairs = tile == pairs_at >> 3;
                    float *const to = (float *)(x_slot + at) + OWN * g * 8 + 2 * t;
                    const u32 w0 = tile < TILES ? transpose_tile(fragments[2 * tile * 32 + lane]) : 0;
                    const u32 w1 = tile < TILES ? transpose_tile(fragments[(2 * tile + 1) * 32 + lane])
                                                : 0;
#pragma unroll
                    for (int s = 0; s < 4; ++s) {
                        float c[4];
#pragma unroll
                        for (int e = 0; e < 4; ++e) c[e] = with_pairs ? dpairs[s][e] : 0.f;
                        T::mma(c, dz[s].x, s < 3 ? dz[s + 4].x : 0u, w0);
                        T::mma(c, dz[s].y, s < 3 ? dz[s + 4].y : 0u, w1);
                        *(float2 *)(to + s * 8) = make_float2(c[0], c[1]);
                        if (s < 3) *(float2 *)(to + (s + 4) * 8) = make_float2(c[2], c[3]);
                    }
                }
                __syncthreads();
                for (int j = threadIdx.x; j < 2 * CHUNK; j += blockDim.x) {
                    const int position = chunk * CHUNK + (j >> 1);
                    if (position >= length) continue;
                    const char *from = warp_memory + turn * 2 * MAP_BYTES + at + j * 16;
                    float4 sum = *(const float4 *)from;
                    for (int w = 1; w < working; ++w) {
                        const float4 v = *(const float4 *)(from + w * warp_bytes);
                        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                    }
                    const int columns = tile * 8 + (j & 1) * 4;
                    if (columns == pairs_at) sum.x *= LN2;  // of B: delta is l ln 2
                    if (columns + 2 == pairs_at) sum.z *= LN2;
                    int rest;
                    const int pixel = path.find(position, rest);
                    *(uint2 *)((char *)params.dprojected
                        + ((((long long)column * p.batch + b) * length + pixel) * p.routes + route)
                          * p.row * 2 + columns * 2)
                        = make_uint2(T::pack(sum.x, sum.y), T::pack(sum.z, sum.w));
                }
            }
        }
        if (SUMMARY && active && g == 0)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (channel + c < p.dim) {
                    const long long at = (walk * p.spans + span) * p.dim + channel + c;
                    params.ends[at] = carry[c * 32];
                    params.decays[at] = sums[c * 32];
                }
        __syncthreads();
    }
    if (SUMMARY || !active) return;

    const long long KD = (long long)p.routes * p.dim, at = (long long)route * p.dim;
    float *const part = params.partials
        + ((long long)blockIdx.z * p.spans + span) * (KD * (p.rank + 2) + p.dim);
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        const float4 sum = dweight[j * 32];
        const int r = 8 * j + 2 * t;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            // Row g of the first half is channel 4 (g / 2) + g % 2, of the second 2 more.
            const int d = group * 16 + 4 * (g >> 1) + (g & 1) + (e & 2);
            if (d < p.dim && r + (e & 1) < p.rank)
                part[(at + d) * p.rank + r + (e & 1)] = LOG2E * element(sum, e);
        }
    }
#pragma unroll
    for (int j = 0; j < 12; ++j) {
        float sum = sums[j * 32];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(ALL, sum, d);
        const int c = channel + (j & 3);
        if (g || c >= p.dim) continue;
        if (j < 4) part[KD * p.rank + at + c] = LN2 * sum;
        else if (j < 8) part[KD * (p.rank + 1) + at + c] = LOG2E * sum;
        else if (route == 0) part[KD * (p.rank + 2) + c] = sum;
    }
}
