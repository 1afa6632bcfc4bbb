// selective_scan along sequences, backward. From the far end, tile by tile: the states of a tile are
// calculated again from the one that enters it; those that enter every PART steps stay in shared
// memory. Then each PART steps run forwards, with states and decays in registers, and backwards.
#include "scan1d/scan1d.cuh"

constexpr int PART = 4;
template <int NS, int LANES>
constexpr int BLOCKS = NS < 4 ? 4 : LANES > 8 || LANES == 1 || __CUDA_ARCH__ < 860 ? 2 : 3;

template <class T, int NS, int LANES, bool LAST, bool VECTOR>
__global__ void __launch_bounds__(THREADS, BLOCKS<NS, LANES>) scan1d_bwd(const Scan1dParams p) {
    typedef Shape<NS, LANES> S;
    typedef Elements<T, S, LAST, VECTOR> E;
    typedef Column<T, S> BC;
    constexpr int GRAD_ROW = S::CHANNELS + 2, PARTS = S::STEPS / PART, WARPS = THREADS / 32;
    constexpr int ACROSS = 32 / LANES;  // pairs of a warp
    // Of 2 NS sums over the pairs of a warp a lane gets so many, the same as SAME adjacent ones.
    constexpr int SUMS = 2 * NS / ACROSS < 1 ? 1 : 2 * NS / ACROSS;
    constexpr int SAME = ACROSS / (2 * NS) < 1 ? 1 : ACROSS / (2 * NS);
    constexpr int WIDTH = 2 * S::N;
    constexpr int UNROLL = VECTOR ? 4 : 2;  // with others the compiler spills

    extern __shared__ __align__(16) float shared[];
    float *const tile = shared, *const staged = tile + S::TILE;
    float *const grads = staged + S::BC_TILE;              // by y
    float *const bias = grads + S::STEPS * GRAD_ROW, *const skip = bias + S::CHANNELS;
    float *const own_states = skip + S::CHANNELS + threadIdx.x * NS;  // (PARTS, 2, threads, NS)
    float *const BC_sums = skip + S::CHANNELS + PARTS * 2 * THREADS * NS;  // (warps, steps, WIDTH)

    const BlockIndex index(p);
    const int first_channel = index.column * S::CHANNELS, channels = p.dim - first_channel;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int j = threadIdx.x % LANES, pair = threadIdx.x / LANES;
    const int own = first_channel + 2 * pair;
    const bool back = p.reverse >> index.k & 1;
    const E elements(back);

    load_channels<S>(bias, skip, p, index.k, first_channel);
    // g: the gradient by the state after a step, of what comes after it.
    float rates[2][NS], g[2][NS], dA[2][NS] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const bool valid = own + c < p.dim;
#pragma unroll
        for (int n = 0; n < NS; ++n)
            rates[c][n] = valid && j * NS + n < p.state
                ? load_parameter(p.A, ((long long)index.k * p.dim + own + c) * p.state
                                         + j * NS + n, p.A_type) : 0.f;
        load_states(g[c], p.grad_entries + (index.of_span(p) + own + c) * p.state, j * NS, p.state,
                    p.grad_entries && valid);
    }
    // By D and bias, of a thread's elements: (2, OWN, threads).
    float *const partial = BC_sums + WARPS * S::STEPS * WIDTH + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2 * E::OWN; ++i) partial[i * THREADS] = 0.f;

    const int first_step = index.span * p.span, last_step = min(p.length, first_step + p.span);
    const bool gated = p.z.data, all_channels = channels >= S::CHANNELS && p.state == S::N;
    const BC B_column(p.B, index, p.state, back), C_column(p.C, index, p.state, back);
    __syncthreads();

#pragma unroll 1
    for (int start = first_step + (last_step - first_step - 1) / S::STEPS * S::STEPS;
         start >= first_step; start -= S::STEPS) {
        const Place place{back ? p.length - start - S::STEPS : start,
                          min(S::STEPS, last_step - start)};
        const bool full = all_channels && place.count == S::STEPS;
        // What the tile needs, to shared memory. It is loaded again at the end: states and decays
        // leave no registers for it.
        u32 B_raw[BC::AHEAD], C_raw[BC::AHEAD];
        auto load = [&](u32 (&u_raw)[E::WORDS], u32 (&l_raw)[E::WORDS], u32 (&grad_raw)[E::WORDS],
                        bool full) {
            elements.load(u_raw, index.of(p.u, first_channel, LAST, elements), p.u.s, channels,
                          place, full);
            elements.load(l_raw, index.of(p.delta, first_channel, LAST, elements), p.delta.s, channels,
                          place, full);
            elements.load(grad_raw, index.of(p.grad, first_channel, LAST, elements), p.grad.s, channels,
                          place, full);
        };
        float h[2][NS];
        {
            const long long at = index.of_tile(p, start / S::STEPS) + own;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const bool valid = own + c < p.dim;
                load_states(h[c], p.states + (at + c) * p.state, j * NS, p.state, valid);
                if (p.cums && valid) {
                    const float total = p.cums[at + c];
                    float entry[NS];
                    load_states(entry, p.entries + (index.of_span(p) + own + c) * p.state, j * NS,
                                p.state, true);
#pragma unroll
                    for (int n = 0; n < NS; ++n)
                        h[c][n] = fmaf(ex2(rates[c][n] * total), entry[n], h[c][n]);
                }
            }
        }
        auto stage = [&](bool full, bool gated) {
            u32 u_raw[E::WORDS], l_raw[E::WORDS], grad_raw[E::WORDS], z_raw[E::WORDS];
            load(u_raw, l_raw, grad_raw, full);
            B_column.load_ahead(B_raw, place, full);
            C_column.load_ahead(C_raw, place, full);
            if (gated)
                elements.load(z_raw, index.of(p.z, first_channel, LAST, elements), p.z.s, channels,
                              place, false);
            if (elements.none) return;
#pragma unroll
            for (int e = 0; e < E::TURNS; ++e) {
                const bool valid = full || elements.valid(e, channels, place);
                const int channel = elements.channel + E::channels_to(e);
                float l[E::V], x[E::V], dy[E::V];
#pragma unroll
                for (int i = 0; i < E::V; ++i) {
                    l[i] = find_l<T>(E::get(l_raw, e, i), bias[channel + (LAST ? i : 0)],
                                     p.softplus);
                    if (!valid) l[i] = 0.f;
                    x[i] = LN2 * l[i] * E::get(u_raw, e, i);
                    dy[i] = E::get(grad_raw, e, i);
                    if (gated) {
                        const float z = E::get(z_raw, e, i);
                        dy[i] *= z * sigmoid(z);
                    }
                }
                elements.stage(tile, e, l, x);
                if constexpr (LAST && E::V > 1) {
#pragma unroll
                    for (int i = 0; i < E::V; i += 2)
                        *(float2 *)(grads + elements.step(e, 0) * GRAD_ROW + channel + i)
                            = make_float2(dy[i], dy[i + 1]);
                } else {
#pragma unroll
                    for (int i = 0; i < E::V; ++i)
                        grads[elements.step(e, i) * GRAD_ROW + channel] = dy[i];
                }
            }
        };
        if (full && !gated) stage(true, false);
        else if (gated) stage(false, true);
        else stage(false, false);
        B_column.stage(staged, B_raw, place);
        C_column.stage(staged + NS, C_raw, place);
        __syncthreads();

        float *const rows = tile + E::place(pair);
        const int parts = (place.count + PART - 1) / PART;
        const float *const BC = staged + j * 2 * NS;
#pragma unroll 1
        for (int part = 0; part < parts - 1; ++part) {
            float4 lx[PART];
            float B[PART][NS];
#pragma unroll
            for (int i = 0; i < PART; ++i) {
                lx[i] = *(const float4 *)(rows + (part * PART + i) * S::ROW);
                read(B[i], BC + (part * PART + i) * S::BC_ROW);
            }
#pragma unroll
            for (int c = 0; c < 2; ++c)
                write_states(own_states + (2 * part + c) * THREADS * NS, h[c]);
#pragma unroll
            for (int i = 0; i < PART; ++i)
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int n = 0; n < NS; ++n)
                        h[c][n] = fmaf(ex2(rates[c][n] * (c ? lx[i].z : lx[i].x)), h[c][n],
                                       (c ? lx[i].w : lx[i].y) * B[i][n]);
        }
#pragma unroll 1
        for (int part = parts - 1; part >= 0; --part) {
            if (part < parts - 1)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    read(h[c], own_states + (2 * part + c) * THREADS * NS);
            // State before each step, and decay.
            float before[PART][2][NS], a[PART][2][NS];
            float4 lx;
            float2 dy;
            float B[NS], C[NS];
#pragma unroll
            for (int i = 0; i < PART; ++i) {
                const int step = part * PART + i;
                lx = *(const float4 *)(rows + step * S::ROW);
                read(B, BC + step * S::BC_ROW);
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int n = 0; n < NS; ++n) {
                        before[i][c][n] = h[c][n];
                        a[i][c][n] = ex2(rates[c][n] * (c ? lx.z : lx.x));
                        h[c][n] = fmaf(a[i][c][n], h[c][n], (c ? lx.w : lx.y) * B[n]);
                    }
            }
            dy = *(const float2 *)(grads + (part * PART + PART - 1) * GRAD_ROW + 2 * pair);
            read(C, BC + (part * PART + PART - 1) * S::BC_ROW + NS);
#pragma unroll
            for (int i = PART - 1; i >= 0; --i) {
                const int step = part * PART + i;
                float sums[2 * NS], by_channel[4];  // by B, C; by x, l, of two channels
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float l = c ? lx.z : lx.x, x = c ? lx.w : lx.y, d = c ? dy.y : dy.x;
                    float dx = 0.f, dl = 0.f;
#pragma unroll
                    for (int n = 0; n < NS; ++n) {
                        const float after = i + 1 < PART ? before[(i + 1) % PART][c][n] : h[c][n];
                        const float by_h = fmaf(C[n], d, g[c][n]);
                        sums[n] = c ? fmaf(by_h, x, sums[n]) : by_h * x;
                        sums[NS + n] = c ? fmaf(d, after, sums[NS + n]) : d * after;
                        dx = n ? fmaf(by_h, B[n], dx) : by_h * B[n];
                        g[c][n] = a[i][c][n] * by_h;
                        const float by_exponent = g[c][n] * before[i][c][n];
                        dl = n ? fmaf(by_exponent, rates[c][n], dl) : by_exponent * rates[c][n];
                        dA[c][n] = fmaf(by_exponent, l, dA[c][n]);
                    }
                    by_channel[2 * c] = dx, by_channel[2 * c + 1] = dl;
                }
                if (i) {  // of the next step, before what is written below
                    lx = *(const float4 *)(rows + (step - 1) * S::ROW);
                    dy = *(const float2 *)(grads + (step - 1) * GRAD_ROW + 2 * pair);
                    read(B, BC + (step - 1) * S::BC_ROW);
                    read(C, BC + (step - 1) * S::BC_ROW + NS);
                }
                sum_over_lanes<ACROSS, LANES, 2 * NS>(sums, lane);
                sum_over_lanes<LANES, 1, 4>(by_channel, lane);
                const int across = lane / LANES;
                if (SAME == 1 || across % SAME == 0)
#pragma unroll
                    for (int s = 0; s < SUMS; ++s)
                        BC_sums[(warp * S::STEPS + step) * WIDTH + j * 2 * NS
                                + across / SAME * SUMS + s] = sums[s];
                // These take the place of l and x, which all lanes of the pair have read; shuffles
                // order no memory.
                if (LANES > 1) __syncwarp();
                float *const row = rows + step * S::ROW;
                if constexpr (LANES == 1) {
                    *(float4 *)row = make_float4(by_channel[0], by_channel[1], by_channel[2],
                                                 by_channel[3]);
                } else if constexpr (LANES == 2) {
                    *(float2 *)(row + 2 * j) = make_float2(by_channel[0], by_channel[1]);
                } else if (LANES == 4 || j % (LANES / 4) == 0) {
                    row[j / (LANES / 4)] = by_channel[0];
                }
            }
        }
        __syncthreads();

        auto write = [&](bool full, bool gated) {
            char *const du_base = (char *)index.of(p.du, first_channel, LAST, elements)
                                  + E::of_place(place, p.du.s) * E::SIZE;
            char *const dl_base = (char *)index.of(p.ddelta, first_channel, LAST, elements)
                                  + E::of_place(place, p.ddelta.s) * E::SIZE;
            char *const dz_base = (char *)index.of(p.dz, first_channel, LAST, elements)
                                  + E::of_place(place, p.dz.s) * E::SIZE;
            u32 u_raw[E::WORDS], l_raw[E::WORDS], grad_raw[E::WORDS];
            u32 z_raw[E::WORDS], y_raw[E::WORDS];
            load(u_raw, l_raw, grad_raw, full);
            if (gated) {
                elements.load(z_raw, index.of(p.z, first_channel, LAST, elements), p.z.s, channels,
                              place, false);
                elements.load(y_raw, index.of(p.y, first_channel, LAST, elements), p.y.s, channels,
                              place, false);
            }
            if (elements.none) return;
#pragma unroll
            for (int e = 0; e < E::TURNS; ++e) {
                if (!full && !elements.valid(e, channels, place)) continue;
                const int channel = elements.channel + E::channels_to(e);
                float du[E::V], dl[E::V], dz[E::V], dD[E::V];
#pragma unroll
                for (int i = 0; i < E::V; ++i) {
                    const int c = channel + (LAST ? i : 0);
                    const float z2 = fmaf(E::get(l_raw, e, i), LOG2E, bias[c]);
                    const float l = p.softplus ? precise_softplus2<T>(z2) : z2;
                    const float u = E::get(u_raw, e, i);
                    float dy = E::get(grad_raw, e, i);
                    if (gated) {
                        const float z = E::get(z_raw, e, i), s = sigmoid(z);
                        dz[i] = dy * E::get(y_raw, e, i) * s * fmaf(z, 1.f - s, 1.f);
                        dy *= z * s;
                    }
                    const float2 by = *(const float2 *)(tile + elements.at(e, i));
                    du[i] = fmaf(by.x, LN2 * l, skip[c] * dy);
                    dl[i] = fmaf(by.x, u, by.y);
                    // The derivative of softplus: 2^z / (1 + 2^z).
                    if (p.softplus) dl[i] *= ex2(z2 - l);
                    dD[i] = dy * u;
                }
                // Positions of a channel are added first.
#pragma unroll
                for (int i = 0; i < (LAST ? E::V : 1); ++i) {
                    float by_D = dD[i], by_bias = dl[i];
#pragma unroll
                    for (int next = 1; next < (LAST ? 1 : E::V); ++next)
                        by_D += dD[next], by_bias += dl[next];
                    partial[E::of(e, i) * THREADS] += by_D;
                    partial[(E::OWN + E::of(e, i)) * THREADS] += by_bias;
                }
                E::store(du_base, p.du.s, T::CODE, e, du, true);
                E::store(dl_base, p.ddelta.s, T::CODE, e, dl, true);
                if (gated) E::store(dz_base, p.dz.s, T::CODE, e, dz, true);
            }
        };
        if (full && !gated) write(true, false);
        else if (gated) write(false, true);
        else write(false, false);
        // The sums of all warps, from the part that is written to the next kernel.
        const int rows_of_sequence = gridDim.x / (p.columns * p.spans);  // B K
        float *const to = p.BC_parts
            + ((long long)(index.column * rows_of_sequence + index.b * p.routes + index.k)
               * p.length + place.first) * WIDTH;
#pragma unroll UNROLL
        for (int i = threadIdx.x; i < S::STEPS * WIDTH; i += THREADS) {
            const int m = i / WIDTH, t = back ? S::STEPS - 1 - m : m;
            if (t >= place.count) continue;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += BC_sums[(w * S::STEPS + t) * WIDTH + i % WIDTH];
            to[i] = sum;
        }
    }

    const long long of_span = index.of_span(p);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const bool valid = own + c < p.dim;
#pragma unroll
        for (int n = 0; n < NS; ++n) dA[c][n] *= LN2;
        store_states(p.A_parts + (of_span + own + c) * p.state, dA[c], j * NS, p.state, valid);
        if (p.first_grad && index.span == 0)
            store_states(p.first_grad + ((long long)(index.b * p.routes + index.k) * p.dim + own
                                         + c) * p.state, g[c], j * NS, p.state, valid);
    }
    // By D and bias: sums over the threads that have a channel.
    __syncthreads();
    const float *const all = partial - threadIdx.x;
    for (int i = threadIdx.x; i < 2 * S::CHANNELS; i += THREADS) {
        const int c = i % S::CHANNELS, which = i / S::CHANNELS;
        float sum = 0.f;
        if constexpr (!LAST) {  // adjacent threads have a channel
            constexpr int SHARING = E::ROW < THREADS ? E::ROW : THREADS;
            const int turn = c * E::ROW / THREADS, thread = c * E::ROW % THREADS;
            for (int s = 0; s < SHARING; ++s)
                sum += all[(which * E::OWN + turn) * THREADS + thread + s];
        } else if constexpr (E::V > 1) {  // every ROW-th thread has the same vector of channels
            for (int thread = c / E::V; thread < THREADS; thread += E::ROW)
                sum += all[(which * E::OWN + c % E::V) * THREADS + thread];
        } else {
            for (int thread = c % THREADS; thread < THREADS; thread += E::ROW)
                sum += all[(which * E::OWN + c / THREADS) * THREADS + thread];
        }
        if (first_channel + c < p.dim)
            p.D_parts[(of_span - index.k * p.dim) * 2 + (long long)which * p.routes * p.dim
                      + index.k * p.dim + first_channel + c] = sum;
    }
}
