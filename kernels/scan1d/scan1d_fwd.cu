// selective_scan along sequences, forward. Other modes calculate the states that enter tiles and
// what a span does to a state (STATES) or, from the far end, to the gradient by a state
// (GRADIENTS).
#include "scan1d/scan1d.cuh"

// Blocks of a multiprocessor: as many as the compiler finds registers for.
template <class T, bool LAST, bool VECTOR>
constexpr int BLOCKS = (VECTOR && !LAST && !same<T, Float> ? 5 : 4)
                       - (__CUDA_ARCH__ < (same<T, Float> ? 860 : 800));

template <class T, int NS, int LANES, bool LAST, bool VECTOR, int MODE>
__global__ void __launch_bounds__(THREADS, BLOCKS<T, LAST, VECTOR>) scan1d_fwd(
    const Scan1dParams p) {
    typedef Shape<NS, LANES> S;
    typedef Elements<T, S, LAST, VECTOR> E;
    typedef Column<T, S> BC;
    // Steps whose sums over a pair's lanes are found together.
    constexpr int GROUP = LANES < 8 ? 4 : LANES / 2;

    extern __shared__ __align__(16) float shared[];
    float *const tile = shared, *const staged = tile + S::TILE;
    float *const bias = staged + S::BC_TILE, *const skip = bias + S::CHANNELS;

    const BlockIndex index(p);
    const int first_channel = index.column * S::CHANNELS, channels = p.dim - first_channel;
    const int lane = threadIdx.x % 32, j = threadIdx.x % LANES, pair = threadIdx.x / LANES;
    const int place_of_pair = E::place(pair), own = first_channel + 2 * pair;
    const bool back = (p.reverse >> index.k & 1) != (MODE == GRADIENTS);
    const E elements(back);

    load_channels<S>(bias, skip, p, index.k, first_channel);
    float rates[2][NS], h[2][NS], total[2] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const bool valid = own + c < p.dim;
#pragma unroll
        for (int n = 0; n < NS; ++n)
            rates[c][n] = valid && j * NS + n < p.state
                ? load_parameter(p.A, ((long long)index.k * p.dim + own + c) * p.state
                                         + j * NS + n, p.A_type) : 0.f;
        load_states(h[c], p.entries + (index.of_span(p) + own + c) * p.state, j * NS, p.state,
                    MODE != GRADIENTS && p.entries && valid);
    }

    // In the order in which this goes through the sequence.
    const int first_step = index.span * p.span, last_step = min(p.length, first_step + p.span);
    const int begin = MODE == GRADIENTS ? p.length - last_step : first_step;
    const int end = begin + last_step - first_step;
    auto place_of = [&](int start) {
        return Place{back ? p.length - start - S::STEPS : start, min(S::STEPS, end - start)};
    };
    const bool all_channels = channels >= S::CHANNELS && p.state == S::N;
    const Map &source = MODE == GRADIENTS ? p.grad : p.u;
    const char *const x_base = index.of(source, first_channel, LAST, elements);
    const char *const l_base = index.of(p.delta, first_channel, LAST, elements);
    const bool gated = MODE != STATES && p.z.data;
    const BC B_column(p.B, index, p.state, back), C_column(p.C, index, p.state, back);

    u32 x_raw[E::WORDS], l_raw[E::WORDS], B_raw[BC::AHEAD], C_raw[BC::AHEAD];
    auto load_tile = [&](bool full, const Place &place) {
        elements.load(x_raw, x_base, source.s, channels, place, full);
        elements.load(l_raw, l_base, p.delta.s, channels, place, full);
        if (MODE != GRADIENTS) B_column.load_ahead(B_raw, place, full);
        if (MODE != STATES) C_column.load_ahead(C_raw, place, full);
    };
    auto load = [&](const Place &place) {
        if (all_channels && place.count == S::STEPS) load_tile(true, place);
        else load_tile(false, place);
    };
    auto load_gate = [&](u32 (&z_raw)[E::WORDS], const Place &place) {
        elements.load(z_raw, index.of(p.z, first_channel, LAST, elements), p.z.s, channels, place,
                      false);
    };
    // l and x of the tile, to shared memory.
    auto stage_tile = [&](bool full, const Place &place) {
        u32 z_raw[E::WORDS];
        if (MODE == GRADIENTS && gated) load_gate(z_raw, place);
        if (elements.none) return;
#pragma unroll
        for (int e = 0; e < E::TURNS; ++e) {
            const bool valid = full || elements.valid(e, channels, place);
            const float *const own_bias = bias + elements.channel + E::channels_to(e);
            float l[E::V], x[E::V];
#pragma unroll
            for (int i = 0; i < E::V; ++i) {
                l[i] = find_l<T>(E::get(l_raw, e, i), own_bias[LAST ? i : 0], p.softplus);
                if (!valid) l[i] = 0.f;
                x[i] = E::get(x_raw, e, i);
                if (MODE != GRADIENTS) {
                    x[i] *= LN2 * l[i];
                } else if (gated) {
                    const float z = E::get(z_raw, e, i);
                    x[i] *= z * sigmoid(z);
                }
            }
            elements.stage(tile, e, l, x);
        }
    };
    load(place_of(begin));
    __syncthreads();

#pragma unroll 1
    for (int start = begin; start < end; start += S::STEPS) {
        const Place place = place_of(start);
        const bool full = all_channels && place.count == S::STEPS;
        if (full) stage_tile(true, place);
        else stage_tile(false, place);
        if (MODE != GRADIENTS) B_column.stage(staged, B_raw, place);
        if (MODE != STATES) C_column.stage(staged + NS, C_raw, place);
        __syncthreads();

        u32 u_raw[E::WORDS];
        if (MODE == RUN)
#pragma unroll
            for (int i = 0; i < E::WORDS; ++i) u_raw[i] = x_raw[i];
        if (start + S::STEPS < end) load(place_of(start + S::STEPS));
        if (MODE != GRADIENTS && p.states) {
            const long long at = index.of_tile(p, start / S::STEPS) + own;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                store_states(p.states + (at + c) * p.state, h[c], j * NS, p.state,
                             own + c < p.dim);
                if (MODE == STATES && p.cums && j == 0 && own + c < p.dim)
                    p.cums[at + c] = total[c];
            }
        }

#pragma unroll 1
        for (int first = 0; first < place.count; first += GROUP) {
            float y[2 * GROUP];
            float *const row = tile + first * S::ROW + place_of_pair;
            const float *const BC_row = staged + first * S::BC_ROW + j * 2 * NS;
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                const float4 lx = *(const float4 *)(row + g * S::ROW);
                float B[NS], C[NS];
                if constexpr (MODE != GRADIENTS) read(B, BC_row + g * S::BC_ROW);
                if constexpr (MODE != STATES) read(C, BC_row + g * S::BC_ROW + NS);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float l = c ? lx.z : lx.x, x = c ? lx.w : lx.y;
                    float sum = 0.f;
#pragma unroll
                    for (int n = 0; n < NS; ++n) {
                        const float a = ex2(rates[c][n] * l);
                        if (MODE == GRADIENTS) {
                            h[c][n] = a * fmaf(C[n], x, h[c][n]);
                        } else {
                            h[c][n] = fmaf(a, h[c][n], x * B[n]);
                            if (MODE == RUN) sum = n ? fmaf(C[n], h[c][n], sum) : C[n] * h[c][n];
                        }
                    }
                    y[2 * g + c] = sum;
                    if (MODE != RUN) total[c] += l;
                }
            }
            if (MODE == RUN) {
                // The sums take the place of l, which all lanes of the pair have read.
                sum_over_lanes<LANES, 1, 2 * GROUP>(y, lane);
                if (LANES > 1) __syncwarp();  // shuffles order no memory
                constexpr int OWN = 2 * GROUP / LANES;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const int v = j * OWN + i;
                    row[(v >> 1) * S::ROW + 2 * (v & 1)] = y[i];
                }
            }
        }
        __syncthreads();

        if (MODE == RUN && p.y.data) {
            char *const y_base
                = (char *)index.of(p.y, first_channel, LAST, elements, p.y_type ? 2 : 4)
                  + E::of_place(place, p.y.s) * (p.y_type ? 2 : 4);
            auto write = [&](bool fast, bool with_gate) {
                u32 z_raw[E::WORDS];
                if (with_gate) load_gate(z_raw, place);
                if (elements.none) return;
#pragma unroll
                for (int e = 0; e < E::TURNS; ++e) {
                    if (!fast && !elements.valid(e, channels, place)) continue;
                    const float *const own_skip = skip + elements.channel + E::channels_to(e);
                    float y[E::V];
#pragma unroll
                    for (int i = 0; i < E::V; ++i) {
                        y[i] = fmaf(own_skip[LAST ? i : 0], E::get(u_raw, e, i),
                                    tile[elements.at(e, i)]);
                        if (with_gate) {
                            const float z = E::get(z_raw, e, i);
                            y[i] *= z * sigmoid(z);
                        }
                    }
                    E::store(y_base, p.y.s, p.y_type, e, y, fast);
                }
            };
            if (gated) write(false, true);
            else if (full && p.y_type == T::CODE) write(true, false);
            else write(false, false);
        }
    }

#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const bool valid = own + c < p.dim;
        const long long at = index.of_span(p) + own + c;
        if (MODE != RUN && p.ends) {
            store_states(p.ends + at * p.state, h[c], j * NS, p.state, valid);
            if (j == 0 && valid) p.sums[at] = total[c];
        }
        if (MODE == RUN && p.last && index.span == p.spans - 1)
            store_states(p.last + ((long long)(index.b * p.routes + index.k) * p.dim + own + c)
                         * p.state, h[c], j * NS, p.state, valid);
    }
}
