// selective_scan along sequences, forward. Other modes calculate the states that enter tiles and
// what a span does to a state (STATES) or, from the far end, to the gradient by a state
// (GRADIENTS).
#include "scan1d/scan1d.cuh"

template <class T, int NS, int MODE>
constexpr int BLOCKS = NS < 4 ? 8 : same<T, Float> ? 4 : 5;

template <class T, int NS, int LANES, bool LAST, bool VECTOR, int MODE>
__global__ void __launch_bounds__(THREADS, BLOCKS<T, NS, MODE>) scan1d_fwd(const Scan1dParams p) {
    typedef Shape<NS, LANES> S;
    typedef Elements<T, S, LAST, VECTOR> E;
    typedef Columns<T, S, MODE != GRADIENTS, MODE != STATES> Staging;
    // Steps whose sums over a pair's lanes are found together, and steps between two tests of
    // whether there are more.
    constexpr int GROUP = LANES < 4 ? 1 : LANES / 2, BODY = GROUP < 4 ? 4 : GROUP;

    extern __shared__ __align__(16) float shared[];
    float *const tile = shared, *const staged = tile + S::TILE;
    float *const bias = staged + S::BC_TILE, *const skip = bias + S::CHANNELS;

    const BlockIndex index(p);
    const int first_channel = index.column * S::CHANNELS, channels = p.dim - first_channel;
    const int lane = threadIdx.x % 32, j = threadIdx.x % LANES, pair = threadIdx.x / LANES;
    const int place_of_pair = S::place(pair), own = first_channel + 2 * pair;
    const bool back = (p.reverse >> index.k & 1) != (MODE == GRADIENTS);

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
        return Place{back ? p.length - start - S::STEPS : start, min(S::STEPS, end - start), back};
    };
    const Map &source = MODE == GRADIENTS ? p.grad : p.u;
    const char *const x_base = index.of(source, first_channel, LAST, E::SIZE);
    const char *const l_base = index.of(p.delta, first_channel, LAST, E::SIZE);
    const char *const z_base = index.of(p.z, first_channel, LAST, E::SIZE);
    const bool gated = MODE != STATES && p.z.data;
    const Staging staging(p, index);

    u32 x_raw[E::WORDS], l_raw[E::WORDS], z_raw[E::WORDS], columns[Staging::AHEAD];
    auto load = [&](int start) {
        const Place place = place_of(start);
        E::load(x_raw, x_base, source.s, channels, place);
        E::load(l_raw, l_base, p.delta.s, channels, place);
        staging.load_ahead(columns, place);
    };
    load(begin);
    __syncthreads();

#pragma unroll 1
    for (int start = begin; start < end; start += S::STEPS) {
        const Place place = place_of(start);
        if (gated) E::load(z_raw, z_base, p.z.s, channels, place);
#pragma unroll
        for (int e = 0; e < E::TURNS; ++e) {
            if (E::VECTORS % THREADS && E::index(e) >= E::VECTORS) break;
            const bool valid = E::valid(e, channels, place);
            const int channel = E::channel(e);
            float l[E::V], x[E::V];
#pragma unroll
            for (int i = 0; i < E::V; ++i) {
                const float own_bias = bias[channel + (LAST ? i : 0)];
                l[i] = valid ? find_l<T>(E::get(l_raw, e, i), own_bias, p.softplus) : 0.f;
                x[i] = E::get(x_raw, e, i);
                if (MODE != GRADIENTS) {
                    x[i] *= LN2 * l[i];
                } else if (gated) {
                    const float z = E::get(z_raw, e, i);
                    x[i] *= z * sigmoid(z);
                }
            }
            if constexpr (LAST && E::V > 1) {
                const int row = E::step(e, 0, back) * S::ROW;
#pragma unroll
                for (int i = 0; i < E::V; i += 2)
                    *(float4 *)(tile + row + S::place((channel + i) / 2))
                        = make_float4(l[i], x[i], l[i + 1], x[i + 1]);
            } else {
#pragma unroll
                for (int i = 0; i < E::V; ++i)
                    *(float2 *)(tile + S::at(E::step(e, i, back), channel))
                        = make_float2(l[i], x[i]);
            }
        }
        staging.stage(staged, columns, place);
        __syncthreads();

        u32 u_raw[E::WORDS];
        if (MODE == RUN)
#pragma unroll
            for (int i = 0; i < E::WORDS; ++i) u_raw[i] = x_raw[i];
        if (start + S::STEPS < end) load(start + S::STEPS);
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
        for (int first = 0; first < place.count; first += BODY) {
#pragma unroll
            for (int group = 0; group < BODY; group += GROUP) {
                float y[2 * GROUP];
                float *const row = tile + (first + group) * S::ROW + place_of_pair;
#pragma unroll
                for (int g = 0; g < GROUP; ++g) {
                    const float4 lx = *(const float4 *)(row + g * S::ROW);
                    const float *const BC = staged + (first + group + g) * S::BC_ROW + j * 2 * NS;
                    float B[NS], C[NS];
                    if constexpr (MODE != GRADIENTS) read(B, BC);
                    if constexpr (MODE != STATES) read(C, BC + NS);
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
                    if constexpr (LANES == 1) row[0] = y[0], row[2] = y[1];
                    else row[(j >> 1) * S::ROW + 2 * (j & 1)] = y[0];
                }
            }
        }
        __syncthreads();

        if (MODE == RUN && p.y.data) {
            char *const y_base = (char *)index.of(p.y, first_channel, LAST, p.y_type ? 2 : 4);
#pragma unroll
            for (int e = 0; e < E::TURNS; ++e) {
                if (!E::valid(e, channels, place)) continue;
                const int channel = E::channel(e);
                float y[E::V];
#pragma unroll
                for (int i = 0; i < E::V; ++i) {
                    const int c = channel + (LAST ? i : 0);
                    y[i] = fmaf(skip[c], E::get(u_raw, e, i), tile[S::at(E::step(e, i, back), c)]);
                    if (gated) {
                        const float z = E::get(z_raw, e, i);
                        y[i] *= z * sigmoid(z);
                    }
                }
                E::store(y_base, p.y.s, p.y_type, e, y, place);
            }
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
