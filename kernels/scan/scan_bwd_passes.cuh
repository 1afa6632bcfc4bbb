// The passes of scan_bwd.cu over a chunk of positions.
#pragma once
#include "scan/scan_bwd_state.cuh"

// Calculates l, x l, dy and the slope of the softplus for the warp's channels.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::project(
    const ScanParams &p, const Chunk &c) {
    float z[4 * ITEMS];
    if constexpr (SEQ) {
        const char *const from = (const char *)p.raw + x_offset(p);
        const SequencePath path(p, 0, false);
        const Steps x_steps(path, 0, 1);
#pragma unroll
        for (int m = 0; m < ITEMS; ++m) {
            const int i = own_first + m * APART;
            float delta[4];
            load_steps<T, SEQ>(delta, from, path, x_steps, c.start + i, c.count - i, valid,
                               p.vector);
#pragma unroll
            for (int t = 0; t < 4; ++t) z[4 * m + t] = fmaf(delta[t], LOG2E, bias[0]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4 * ITEMS; ++i) z[i] = bias[0];
        add_product<ITEMS>(z, p.rank, weights + warp * WIDTH + own, width,
                           c.staged + own_first, ROW, APART);
    }
#pragma unroll
    for (int m = 0; m < ITEMS; ++m) {
        const int i = own_first + m * APART, at = own * ROW + i;
        float x[4], dy[4], l[4], slope[4];
        to_floats<T>(x, x_bits[m]);
        to_floats<T>(dy, dy_bits[m]);
        if constexpr (SIZE == 4 && SEQ) {
            write4((float *)(bits + 64 * m), x);
            write4((float *)(bits + 64 * m + 32), dy);
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const bool inside = valid && i + t < c.count, soft = !SEQ || p.softplus;
            l[t] = z[4 * m + t];
            if (soft) l[t] = precise_softplus2<T>(l[t]);
            slope[t] = !inside ? 0.f : soft ? ex2(z[4 * m + t] - l[t]) : 1.f;
            if (!inside) l[t] = 0.f;
            x[t] *= l[t];
        }
        if constexpr (SIZE == 2)
            bits[32 * m] = make_uint4(
                x_bits[m][0] | dy_bits[m][0] << 16, x_bits[m][1] | dy_bits[m][1] << 16,
                x_bits[m][2] | dy_bits[m][2] << 16, x_bits[m][3] | dy_bits[m][3] << 16);
        write4(decays + at, l);
        write4(inputs + at, x);
        write4(grads + at, dy);
        write4(slopes + at, slope);
    }
}

// Where a lane finds its channels, its states' B and C, and its slots.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::locate(const ScanParams &p, Chunk &c) {
    c.to_slot = offset_of(slots + lane * STATES);
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
        c.to_channel[j] = offset_of(decays + columns[j] * ROW);
        opaque(c.to_channel[j]);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        c.to_B[i] = offset_of(c.staged + (p.rank + states[i]) * ROW);
        opaque(c.to_B[i]);
    }
    opaque(c.to_slot);
}

// Stores the states before 4 positions; step_forward then calculates those behind these positions.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::store_states(const Chunk &c) {
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
        if constexpr (STATES == 4) write4(at(c.to_slot) + 128 * j, h[j]);
        else at(c.to_slot)[0] = h[j][0];
    }
}

template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::step_forward(Chunk &c) {
    float l[CHANNELS][4], x[CHANNELS][4];
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
        read4(l[j], at(c.to_channel[j]));
        read4(x[j], at(c.to_channel[j]) + TO_INPUTS);
        c.to_channel[j] += 16;
    }
    c.to_slot += 4 * SLOT;
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
        float B[4];
        read4(B, at(c.to_B[i % ROWS]) + i / ROWS * ROW);
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j)
                h[j][i] = fmaf(ex2(rate[j][i] * l[j][t]), h[j][i], x[j][t] * B[t]);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) c.to_B[i] += 16;
}

// In the reverse order: the gradient by the state behind each position, and what follows from it.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::run_back(Chunk &c) {
    // The state whose sums this lane has in the end, and whether they are those by B or by C.
    const int summed = quarter * STATES + (in_shared & (STATES - 1));
    const bool of_C = lane & STATES;
    int to_sums = offset_of(slots + (c.quads - 1) * SLOT + summed * 4 + (of_C ? STATE * 4 : 0));
    opaque(to_sums);
#pragma unroll 1
    for (int s = c.quads - 1; s >= 0; --s) {
        float l[CHANNELS][4], x[CHANNELS][4], dy[CHANNELS][4];
        float q[CHANNELS][4], e[CHANNELS][4];
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) {
            read4(l[j], at(c.to_channel[j]));
            read4(x[j], at(c.to_channel[j]) + TO_INPUTS);
            read4(dy[j], at(c.to_channel[j]) + TO_GRADS);
            if constexpr (STATES == 4) read4(h[j], at(c.to_slot) + 128 * j);
            else h[j][0] = at(c.to_slot)[0];
#pragma unroll
            for (int t = 0; t < 4; ++t) q[j][t] = e[j][t] = 0.f;
        }
        float sums[2][4] = {}, odd[2][4];  // by B and by C of the state `summed`
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
            float B[4], C[4], by[2][4];
            read4(B, at(c.to_B[i % ROWS]) + i / ROWS * ROW);
            read4(C, at(c.to_B[i % ROWS]) + i / ROWS * ROW + TO_C);
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) {
                float a[4], ah[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    a[t] = ex2(rate[j][i] * l[j][t]);
                    ah[t] = a[t] * h[j][i];
                    h[j][i] = fmaf(x[j][t], B[t], ah[t]);
                    by[1][t] = j ? fmaf(dy[j][t], h[j][i], by[1][t]) : dy[j][t] * h[j][i];
                }
#pragma unroll
                for (int t = 3; t >= 0; --t) {
                    const float grad = fmaf(C[t], dy[j][t], g[j][i]), f = grad * ah[t];
                    by[0][t] = j ? fmaf(grad, x[j][t], by[0][t]) : grad * x[j][t];
                    q[j][t] = fmaf(grad, B[t], q[j][t]);
                    e[j][t] = fmaf(rate[j][i], f, e[j][t]);
                    grad_rate[j][i] = fmaf(l[j][t], f, grad_rate[j][i]);
                    g[j][i] = grad * a[t];
                }
            }
#pragma unroll
            for (int of = 0; of < 2; ++of)
                if constexpr (SUM_BY_CORES)
                    multiply(sums[of], by[of][0], by[of][2], by[of][1], by[of][3],
                             select[2 * i], select[2 * i + 1]);
#pragma unroll
            for (int of = 0; of < 2 && !SUM_BY_CORES; ++of)
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    if (i % 2 == 0) odd[of][t] = by[of][t];
                    else odd[of][t] = add_exchanged(odd[of][t], by[of][t], 1);
                    if (i == STATES - 1 && STATES < 4 || i == 1) sums[of][t] = odd[of][t];
                    if (i == 3) sums[of][t] = add_exchanged(sums[of][t], odd[of][t], 2);
                }
        }

        // Sum over the lanes that have the same states, then over those that have the same
        // channels.
        float half[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) half[t] = halve(sums[0][t], sums[1][t], of_C, STATES);
        float *const to = at(to_sums), *const by_channel = at(c.to_channel[0]);
        if constexpr (STATE == 16) {
            const bool of_e = lane & 16;
            float mine[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                q[0][t] = add_exchanged(q[0][t], q[1][t], 8);
                e[0][t] = add_exchanged(e[0][t], e[1][t], 8);
                mine[t] = halve(q[0][t], e[0][t], of_e, 16);
            }
            __syncwarp();
            write4(to, half);
            write4(by_channel + (of_e ? TO_GRADS : TO_INPUTS), mine);
        } else {
            const bool later = lane & 2 * STATES, second = lane & 4 * STATES;
            const float low = halve(half[0], half[2], later, 2 * STATES);
            const float high = halve(half[1], half[3], later, 2 * STATES);
            float sum = halve(low, high, second, 4 * STATES);
#pragma unroll
            for (int mask = 8 * STATES; mask < 32; mask *= 2) sum = add_exchanged(sum, sum, mask);
            __syncwarp();
            if (lane < 8 * STATES) to[(later ? 2 : 0) + (second ? 1 : 0)] = sum;
            write4(by_channel + TO_INPUTS, q[0]);
            write4(by_channel + TO_GRADS, e[0]);
        }
        c.to_slot -= 4 * SLOT, to_sums -= 4 * SLOT;
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) c.to_channel[j] -= 16;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) c.to_B[i] -= 16;
    }
}

// The gradients by x and by what is below the softplus.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::store_maps(
    const ScanParams &p, const Chunk &c, const SequencePath &path, float (&grad_z)[4 * ITEMS]) {
    const Steps y_steps(path, SEQ ? 0 : p.width * p.dim, SEQ ? 1 : p.dim);
    float by_bias = 0.f, by_skip = 0.f;
    const float own_skip = skip[0];
    const long long y_at = y_offset(p);
#pragma unroll
    for (int m = 0; m < ITEMS; ++m) {
        const int i = own_first + m * APART, here = own * ROW + i;
        float x[4], dy[4], l[4], q[4], e[4], slope[4], grad_x[4];
        if constexpr (SIZE == 2) {
            const uint4 both = bits[32 * m];
            const u32 words[4] = {both.x, both.y, both.z, both.w};
#pragma unroll
            for (int t = 0; t < 4; ++t)
                x[t] = T::unpack(words[t]).x, dy[t] = T::unpack(words[t]).y;
        } else if constexpr (SEQ) {
            read4(x, (const float *)(bits + 64 * m));
            read4(dy, (const float *)(bits + 64 * m + 32));
        } else {
            to_floats<T>(x, x_bits[m]);
            to_floats<T>(dy, dy_bits[m]);
        }
        read4(l, decays + here);
        read4(q, inputs + here);
        read4(e, grads + here);
        read4(slope, slopes + here);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            grad_x[t] = fmaf(q[t], l[t], own_skip * dy[t]);
            slope[t] *= fmaf(q[t] * LOG2E, x[t], e[t]);
            grad_z[4 * m + t] = slope[t];
            by_bias += slope[t];
            by_skip = fmaf(dy[t], x[t], by_skip);
        }
        write4(slopes + here, slope);
        store_steps<T, SEQ>(grad_x, (char *)p.grad_x + y_at, path, y_steps, c.start + i,
                            c.count - i,
                            valid, p.vector, p.y_type);
        if constexpr (SEQ)
            store_steps<T, SEQ>(slope, (char *)p.grad_raw + y_at, path, y_steps, c.start + i,
                                c.count - i, valid, p.vector, p.y_type);
    }
    grad_bias[0] += by_bias;
    grad_skip[0] += by_skip;
}

// The gradients by dt_projs_weight and by dt.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::multiply_dt(
    const ScanParams &p, const Chunk &c, const float (&grad_z)[4 * ITEMS]) {
    if constexpr (!SEQ && CORES<T>) {
        __syncwarp();
        const int g = lane >> 2, t = lane & 3;
        for (int r = 0; r < p.rank; r += 8) {  // rows and columns beyond R are not used
#pragma unroll
            for (int d = 0; d < WIDTH; d += 16) {
                const float *const a = slopes + (d + g) * ROW + t;
                const float *const b = c.staged + (r + g) * ROW + t;
                float *const to = grad_weights + r * WIDTH + 8 * d;
                float sum[4] = {to[0], to[32], to[64], to[96]};
#pragma unroll
                for (int i = 0; i < SAVED; i += 8)
                    multiply(sum, a[i], a[8 * ROW + i], a[i + 4], a[8 * ROW + i + 4], b[i],
                             b[i + 4]);
#pragma unroll
                for (int i = 0; i < 4; ++i) to[32 * i] = sum[i];
            }
            const float *const a = weights + min(r + g, p.rank - 1) * width + warp * WIDTH + t;
            float by[SAVED / 8][4] = {};
#pragma unroll
            for (int d = 0; d < WIDTH; d += 8) {
                const float *const b = slopes + (d + t) * ROW + g;
#pragma unroll
                for (int i = 0; i < SAVED; i += 8)
                    multiply(by[i / 8], a[d], 0.f, a[d + 4], 0.f, b[i], b[4 * ROW + i]);
            }
            if (r + g < p.rank)
#pragma unroll
                for (int i = 0; i < SAVED; i += 8)
                    *(float2 *)(by_dt + (r + g) * SAVED + i + 2 * t)
                        = make_float2(by[i / 8][0], by[i / 8][1]);
        }
    } else if constexpr (!SEQ) {
#pragma unroll 1
        for (int r = 0; r < p.rank; ++r) {
            float sum = 0.f;
#pragma unroll
            for (int m = 0; m < ITEMS; ++m) {
                float dt[4];
                read4(dt, c.staged + r * ROW + own_first + m * APART);
#pragma unroll
                for (int t = 0; t < 4; ++t) sum = fmaf(grad_z[4 * m + t], dt[t], sum);
            }
            grad_weights[r * 32] += sum;
        }
        __syncwarp();
        // For the gradient by dt a lane sums over a part of the channels, at 4 positions.
#pragma unroll 1
        for (int item = lane; item < p.rank * SPLIT * QUADS; item += 32) {
            const int s = item % QUADS, part = item / QUADS % SPLIT;
            const int first = part * (WIDTH / SPLIT);
            const float *const w = weights + item / (QUADS * SPLIT) * width + warp * WIDTH;
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int d = first; d < first + WIDTH / SPLIT; d += 4) {
                float by[4];
                read4(by, w + d);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float z[4];
                    read4(z, slopes + (d + j) * ROW + 4 * s);
#pragma unroll
                    for (int t = 0; t < 4; ++t) sum[t] = fmaf(by[j], z[t], sum[t]);
                }
            }
            write4(by_dt + item * 4, sum);
        }
    }
}

// Adds up the sums of the warps, in the order of the warps. A thread has a column and 4 positions.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::sum_warps(
    const ScanParams &p, const Chunk &c, const SequencePath &path) {
    const int rank = SEQ ? 0 : p.rank;
    const Steps rows(path, p.width, 1);
    const long long sample
        = (long long)((SEQ ? 0 : group * p.columns) + index.column) * p.batch + b;
    for (int task = threadIdx.x - 32 * TEAM * team; task < all * c.quads; task += team_threads) {
        const int s = task / all, column = task - s * all, n = (column - rank) % STATE;
        const bool of_dt = column < rank, of_C = column >= rank + STATE;
        const float *from = regions + TEAM * team * region
            + (of_dt ? (column * SPLIT * QUADS + s) * 4
                     : (slots - by_dt) + s * SLOT + (column - rank) * 4);
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        if (team > 0) read4(sum, handed + ((team - 1) * QUADS * all + task) * 4);
#pragma unroll
        for (int w = 0; w < TEAM; ++w, from += region) {
            if (32 * w >= team_threads) break;
#pragma unroll
            for (int part = 0; part < SPLIT; ++part) {
                if (part && !of_dt) break;
                float v[4];
                read4(v, from + part * QUADS * 4);
#pragma unroll
                for (int t = 0; t < 4; ++t) sum[t] += v[t];
            }
        }
        if (!is_last()) write4(handed + (team * QUADS * all + task) * 4, sum);
        if (!is_last() || !of_dt && n >= known) continue;
        const float scale = (of_dt || of_C ? LN2 : 1.f)
            * (of_dt ? GAIN<T> * GAIN<T> : SUM_BY_CORES ? GAIN<T> : 1.f);
        const int at = column + (of_dt ? 0 : (of_C ? p.state - STATE : 0) + group * STATE);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int i = c.start + 4 * s + t;
            if (i >= c.start + c.count) break;
            if constexpr (SEQ)
                store_result(of_C ? p.grad_C : p.grad_B,
                      ((sample * p.routes + k) * p.state + group * STATE + n) * length + i,
                      p.part_type, sum[t] * scale);
            else
                store_result(p.grad_raw, ((sample * length + rows.at(path, i)) * p.routes + k)
                                         * (p.rank + 2 * p.state) + at,
                             p.part_type, sum[t] * scale);
        }
    }
}

// Stores the sums over all positions of the span.
template <class T, int STATE, bool SEQ>
__device__ __forceinline__ void Backward<T, STATE, SEQ>::store_sums(const ScanParams &p) {
    float *to = p.sums + ((((long long)b * p.spans + index.span) * p.routes + k) * p.groups + group)
                * (STATE + p.rank + 2) * p.dim + warp_channel;
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j)
#pragma unroll
        for (int i = 0; i < STATES; ++i)
            if (warp_channel + columns[j] < p.dim)
                to[states[i] * p.dim + columns[j]] = grad_rate[j][i] * LN2;
    to += STATE * p.dim + own;
    auto over_lanes = [&](float v) {
#pragma unroll
        for (int mask = WIDTH; mask < 32; mask *= 2) v = add_exchanged(v, v, mask);
        return v;
    };
    const bool writes = valid && lane < WIDTH;
    if constexpr (CORES<T>) {
        for (int r = 2 * (lane & 3); r < p.rank; r += 8)
#pragma unroll
            for (int j = 0; j < WIDTH / 4; ++j) {
                const int d = j / 4 * 16 + (j & 2) * 4 + (lane >> 2), row = r + (j & 1);
                if (warp_channel + d < p.dim && row < p.rank)
                    to[(long long)row * p.dim + d - own]
                        = grad_weights[r / 8 * 8 * WIDTH + 32 * j] * GAIN<T>;
            }
        to += p.rank * p.dim;
    } else {
        for (int r = 0; r < p.rank; ++r, to += p.dim) {
            const float sum = over_lanes(grad_weights[r * 32]);
            if (writes) to[0] = sum;
        }
    }
    const float by_bias = over_lanes(grad_bias[0]), by_skip = over_lanes(grad_skip[0]);
    if (writes) to[0] = by_bias, to[p.dim] = by_skip;
}
