"""Triton kernels of both scans, for any GPU that Triton knows.

A walk over L positions is cut into tiles of T. A program takes a tile of positions and a block of
channels; a thread has one channel and all T positions in registers, so that the recurrence stays
inside a thread. Nothing is permuted: a place of the walk is a line (a row or a column of the
image) and a step along it, each with its stride in every tensor, and the walk and its reverse
share a program. What enters a tile from the one before comes from

1. :func:`summarise_tiles`: each tile from a zero state (and the gradient that leaves it);
2. :func:`chain_tiles`: along the tiles, what enters each of them, in place;
3. :func:`scan_tiles` or :func:`scan_tiles_backward`: each tile again, from what enters it.

With one tile the first two are left out. Sums over channels and positions go through buffers of
partial sums, so the result is the same bits in every run.

B batch, K routes, D channels of a route, L positions, N state, R rank of dt. ``A`` comes as
(K, N, D), times log2(e).
"""

import triton
import triton.language as tl
from triton.language.standard import _sum_combine  # tl.sum itself is slow in the interpreter

LN2 = tl.constexpr(0.6931471805599453)


# --- parts of the kernels -------------------------------------------------------------------
# Tiles are (T, BD). The loops over T below are unrolled, and as a thread holds a whole column,
# taking or putting a row costs nothing once compiled (a sum that begins at -0 folds, too).
# Maps are loaded and stored flat, channel by channel: of two dimensions, some versions of Triton
# would give the lanes of a warp the positions, and a thread several channels. A mask of channels
# and a condition of the program meet in a bound (d < dim or 0): some versions' interpreter makes no
# mask of block & scalar.

@triton.jit
def _states(a, v, h, t, T: tl.constexpr, BACKWARDS: tl.constexpr):
    """h_t = a_t h_{t-1} + v_t from h: (all h_t, all a_t h_{t-1}, the last h_t)."""
    all_h = v
    decayed = v
    for j in tl.static_range(T):
        here = (t == (T - 1 - j if BACKWARDS else j))[:, None]
        w = tl.reduce(tl.where(here, a, -0.0), 0, _sum_combine) * h
        h = w + tl.reduce(tl.where(here, v, -0.0), 0, _sum_combine)
        decayed = tl.where(here, w[None, :], decayed)
        all_h = tl.where(here, h[None, :], all_h)
    return all_h, decayed, h


@triton.jit
def _gradients(a, c, passed, t, T: tl.constexpr, BACKWARDS: tl.constexpr):
    """g_t = c_t + passed_{t-1}, passed_t = a_t g_t: (all g_t, the last passed_t)."""
    all_g = c
    for j in tl.static_range(T):
        here = (t == (T - 1 - j if BACKWARDS else j))[:, None]
        g = tl.reduce(tl.where(here, c, -0.0), 0, _sum_combine) + passed
        passed = tl.reduce(tl.where(here, a, -0.0), 0, _sum_combine) * g
        all_g = tl.where(here, g[None, :], all_g)
    return all_g, passed


@triton.jit
def _softplus(z):
    """log(1 + exp(z)) and its derivative; log(1 + e) / e is a polynomial, error below 4e-8."""
    e = tl.exp(-tl.abs(z))
    series = 0.07822549343109131 + e * (-0.029504956677556038 + e * 0.005232623778283596)
    series = 0.1910598874092102 + e * (-0.1366320699453354 + e * series)
    series = 0.3331909477710724 + e * (-0.2484297752380371 + e * series)
    series = 0.9999999403953552 + e * (-0.4999949336051941 + e * series)
    return tl.maximum(z, 0.0) + e * series, tl.where(z >= 0, 1.0, e) / (1 + e)


@triton.jit
def _places(start, t, length, line_length, WRAPS: tl.constexpr):
    """(line, step along it, inside the map) of positions start + t; outside, of the last one.

    WRAPS: 0 if there is one line, 1 if a tile meets at most one end of a line, else 2.
    """
    position = start + t
    inside = position < length
    position = tl.minimum(position, length - 1)
    if WRAPS == 0:
        line = tl.zeros_like(position)
        step = position
    elif WRAPS == 1:
        first = start // line_length
        step = position - first * line_length
        over = (step >= line_length).to(tl.int32)
        line = first + over
        step -= over * line_length
    else:
        line = position // line_length
        step = position - line * line_length
    return line, step, inside


@triton.jit
def _raw_delta(delta, place, flat, flat_inside, weight, bias, k, dim, d, d_inside,
               R: tl.constexpr, PROJECT: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
    """z, of which delta is the softplus."""
    z = tl.zeros((T, BD), tl.float32)
    z += tl.load(bias + k * dim + d, mask=d_inside, other=0.)[None, :]
    if PROJECT:
        # A few at a time: enough loads in flight, and little code.
        RU: tl.constexpr = R if R <= 8 else 4 if R % 4 == 0 else 3 if R % 3 == 0 else 1
        for r in range(0, R, RU):
            for j in tl.static_range(RU):
                dt = tl.load(delta + place + r + j)
                column = tl.load(weight + (k * R + r + j) * dim + d, mask=d_inside, other=0.)
                z += dt[:, None] * column[None, :]
    else:
        z += _load_tile(delta + flat, flat_inside, T, BD)
    return z


@triton.jit
def _load_tile(at, mask, T: tl.constexpr, BD: tl.constexpr):
    return tl.reshape(tl.load(at, mask=mask, other=0.).to(tl.float32), (T, BD))


@triton.jit
def _finish_delta(z, inside, SOFTPLUS: tl.constexpr):
    """delta and d delta / dz, both 0 outside the map: there the state passes unchanged."""
    if SOFTPLUS:
        delta, slope = _softplus(z)
    else:
        delta, slope = z, tl.full(z.shape, 1.0, tl.float32)
    return tl.where(inside[:, None], delta, 0.), tl.where(inside[:, None], slope, 0.)


# --- kernels --------------------------------------------------------------------------------
# Each tensor's strides are named by batch, group (k), line, step and channel or state. With
# PROJECT, delta, B and C are neighbours in one tensor: dt at its place, then B, then C. What
# strides must not be known to be 1: Triton would give a thread several channels, or lanes steps.

@triton.jit(do_not_specialize=['u_step', 'u_d', 'v_step', 'v_d', 'g_step', 'g_d'])
def summarise_tiles(u, u_b, u_k, u_line, u_step, u_d, delta, v_b, v_k, v_line, v_step, v_d,
                    B, C, c_b, c_k, c_line, c_step, c_n,
                    grad, g_b, g_k, g_line, g_step, g_d, A, weight, bias, totals, states, grads,
                    groups, dim, length, line_length, tiles, blocks, k_first, routes,
                    N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
                    WAYS: tl.constexpr, WRAPS: tl.constexpr, PROJECT: tl.constexpr,
                    SOFTPLUS: tl.constexpr, GRAD: tl.constexpr):
    """totals (B, K, tiles, D): delta summed over a tile. states (B, K, N, tiles, D): what a tile
    alone hands to the next, stored at the next. grads: the gradient that it hands to the one
    before, stored there."""
    pid = tl.program_id(0)
    first_d = pid % blocks * BD
    pid //= blocks
    tile = pid % tiles
    pid //= tiles
    group = pid % groups
    b = (pid // groups).to(tl.int64)
    d = first_d + tl.arange(0, BD)
    d_inside = d < dim
    t = tl.arange(0, T)
    line, step, inside = _places(tile * T, t, length, line_length, WRAPS)
    flat = tl.arange(0, T * BD)
    flat_d = first_d + flat % BD
    flat_inside = flat_d < dim
    flat_line, flat_step, on_map = _places(tile * T, flat // BD, length, line_length, WRAPS)
    x = _load_tile(u + b * u_b + group * u_k + flat_line * u_line + flat_step * u_step
                   + flat_d * u_d, flat_inside, T, BD)
    dy = x
    if GRAD:
        dy = _load_tile(grad + b * g_b + group * g_k + flat_line * g_line + flat_step * g_step
                        + flat_d * g_d, flat_inside & on_map, T, BD)
    v_place = line * v_line + step * v_step
    v_flat = flat_line * v_line + flat_step * v_step + flat_d * v_d
    c_place = v_place if PROJECT else line * c_line + step * c_step
    for way in tl.static_range(WAYS):
        k = k_first + group + 2 * way
        of_k = delta + b * v_b + k * v_k
        z = _raw_delta(of_k, v_place, v_flat, flat_inside, weight, bias, k, dim, d, d_inside, R,
                       PROJECT, T, BD)
        dt, slope = _finish_delta(z, inside, SOFTPLUS)
        tl.store(totals + ((b * routes + k) * tiles + tile) * dim + d, tl.sum(dt, axis=0),
                 mask=d_inside)
        drive = dt * x
        after = tile + 1 - 2 * way
        before = tile - 1 + 2 * way
        for n in range(N):
            a = tl.exp2(dt * tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)[None, :])
            B_at = of_k + R + n if PROJECT else B + b * c_b + k * c_k + n * c_n
            v = drive * tl.load(B_at + c_place).to(tl.float32)[:, None]
            nothing = tl.zeros((BD,), tl.float32)
            all_h, decayed, end = _states(a, v, nothing, t, T, way == 1)
            at = ((b * routes + k) * N + n) * tiles * dim + d
            tl.store(states + at + after * dim, end,
                     mask=d < tl.where((after >= 0) & (after < tiles), dim, 0))
            if GRAD:
                C_at = of_k + R + N + n if PROJECT else C + b * c_b + k * c_k + n * c_n
                c = dy * tl.load(C_at + c_place).to(tl.float32)[:, None]
                all_g, end = _gradients(a, c, nothing, t, T, way == 0)
                tl.store(grads + at + before * dim, end,
                         mask=d < tl.where((before >= 0) & (before < tiles), dim, 0))


@triton.jit(do_not_specialize=['stride_d'])
def chain_tiles(totals, states, grads, A, dim, stride_d, tiles, blocks, routes, reversed_from,
                N: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):
    """states and grads (B, K, N, tiles, D), in place: what each tile hands on alone becomes all
    that it hands on. The second half of the grid does the gradients. U tiles are read at a time."""
    pid = tl.program_id(0)
    first_d = pid % blocks * BD
    d = first_d + tl.arange(0, BD)
    pid //= blocks
    n = pid % N
    pid //= N
    k = pid % routes
    row = pid.to(tl.int64)
    d_inside = d < dim
    # In the order of the walk; gradients go against it.
    backwards = (k >= reversed_from) != (tl.program_id(1) == 1)
    if tl.program_id(1) == 1:
        states = grads
    states += (row * N + n) * tiles * dim
    totals += row * tiles * dim
    A_n = tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)
    state = tl.zeros((BD,), tl.float32)
    u = tl.arange(0, U)
    flat = tl.arange(0, U * BD)
    flat_d = first_d + flat % BD
    # Nothing enters the first tile, so the chain begins at the second.
    for start in range(1, tiles, U):
        j = start + flat // BD
        both = (j < tiles) & (flat_d < dim)
        at = tl.where(backwards, tiles - 1 - j, j)
        behind = tl.where(backwards, at + 1, at - 1)
        total = _load_tile(totals + behind * dim + flat_d * stride_d, both, U, BD)
        v = _load_tile(states + at * dim + flat_d * stride_d, both, U, BD)
        all_states, decayed, state = _states(tl.exp2(total * A_n[None, :]), v, state, u, U, False)
        tl.store(states + at * dim + flat_d * stride_d, tl.reshape(all_states, (U * BD,)),
                 mask=both)


@triton.jit(do_not_specialize=['u_step', 'u_d', 'v_step', 'v_d', 'y_step', 'y_d'])
def scan_tiles(u, u_b, u_k, u_line, u_step, u_d, delta, v_b, v_k, v_line, v_step, v_d,
               B, C, c_b, c_k, c_line, c_step, c_n, y, partial, y_b, y_k, y_line, y_step, y_d,
               A, weight, bias, skip, states,
               groups, dim, length, line_length, tiles, blocks, k_first, routes,
               N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
               WAYS: tl.constexpr, WRAPS: tl.constexpr, PROJECT: tl.constexpr,
               SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr):
    """y = sum of the walk and (WAYS 2) its reverse, plus skip x (SKIP), plus partial (ADD)."""
    pid = tl.program_id(0)
    first_d = pid % blocks * BD
    pid //= blocks
    tile = pid % tiles
    pid //= tiles
    group = pid % groups
    b = (pid // groups).to(tl.int64)
    d = first_d + tl.arange(0, BD)
    d_inside = d < dim
    t = tl.arange(0, T)
    line, step, inside = _places(tile * T, t, length, line_length, WRAPS)
    flat = tl.arange(0, T * BD)
    flat_d = first_d + flat % BD
    flat_inside = flat_d < dim
    flat_line, flat_step, on_map = _places(tile * T, flat // BD, length, line_length, WRAPS)
    x = _load_tile(u + b * u_b + group * u_k + flat_line * u_line + flat_step * u_step
                   + flat_d * u_d, flat_inside, T, BD)
    y_at = b * y_b + group * y_k + flat_line * y_line + flat_step * y_step + flat_d * y_d
    result = tl.zeros((T, BD), tl.float32)
    if ADD:
        result += _load_tile(partial + y_at, flat_inside, T, BD)
    if SKIP:
        result += x * tl.load(skip + group * dim + d, mask=d_inside, other=0.)[None, :]
    v_place = line * v_line + step * v_step
    v_flat = flat_line * v_line + flat_step * v_step + flat_d * v_d
    c_place = v_place if PROJECT else line * c_line + step * c_step
    for way in tl.static_range(WAYS):
        k = k_first + group + 2 * way
        of_k = delta + b * v_b + k * v_k
        z = _raw_delta(of_k, v_place, v_flat, flat_inside, weight, bias, k, dim, d, d_inside, R,
                       PROJECT, T, BD)
        dt, slope = _finish_delta(z, inside, SOFTPLUS)
        drive = dt * x
        entered = d < tl.where(tile != (tiles - 1) * way, dim, 0)
        for n in range(N):
            a = tl.exp2(dt * tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)[None, :])
            B_at = of_k + R + n if PROJECT else B + b * c_b + k * c_k + n * c_n
            C_at = of_k + R + N + n if PROJECT else C + b * c_b + k * c_k + n * c_n
            state = tl.load(states + (((b * routes + k) * N + n) * tiles + tile) * dim + d,
                            mask=entered, other=0.)
            v = drive * tl.load(B_at + c_place).to(tl.float32)[:, None]
            h, decayed, end = _states(a, v, state, t, T, way == 1)
            result += h * tl.load(C_at + c_place).to(tl.float32)[:, None]
    tl.store(y + y_at, tl.reshape(result, (T * BD,)).to(y.dtype.element_ty),
             mask=flat_inside & on_map)


@triton.jit(do_not_specialize=['u_step', 'u_d', 'v_step', 'v_d', 'g_step', 'g_d', 'x_step', 'x_d',
                               'stride_d'])
def scan_tiles_backward(u, u_b, u_k, u_line, u_step, u_d, delta, v_b, v_k, v_line, v_step, v_d,
                        B, C, c_b, c_k, c_line, c_step, c_n,
                        grad, g_b, g_k, g_line, g_step, g_d,
                        grad_u, grad_delta, x_b, x_k, x_line, x_step, x_d,
                        grad_B, grad_C, p_block, A, weight, bias, skip, states, grads, sums,
                        groups, dim, length, line_length, tiles, blocks, k_first, routes,
                        spans, span, stride_d,
                        N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
                        WAYS: tl.constexpr, WRAPS: tl.constexpr, PROJECT: tl.constexpr,
                        SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr,
                        RP: tl.constexpr, RS: tl.constexpr, PRECISION: tl.constexpr):
    """A program does ``span`` tiles, one after the other.

    grad_u: added to what is there (ADD). grad_delta: by z. grad_B, grad_C (PROJECT: all three in
    grad_delta, by the projected dt): a partial sum for each block of channels, p_block apart.
    sums (B, spans, K, R + N + 2, D): by the weight, A, the bias and (SKIP) the skip.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    pid //= blocks
    turn = pid % spans
    pid //= spans
    group = pid % groups
    b = (pid // groups).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    d_inside = d < dim
    t = tl.arange(0, T)
    flat = tl.arange(0, T * BD)
    flat_d = block * BD + flat % BD
    first_tile = turn * span
    for tile in range(first_tile, tl.minimum(first_tile + span, tiles)):
        # Sums over positions are kept in memory, and read well before they are added to.
        summed_dim = tl.where(tile > first_tile, dim, 0)
        summed = d < summed_dim
        line, step, inside = _places(tile * T, t, length, line_length, WRAPS)
        flat_line, flat_step, on_map = _places(tile * T, flat // BD, length, line_length, WRAPS)
        flat_inside = flat_d < dim
        x = _load_tile(u + b * u_b + group * u_k + flat_line * u_line + flat_step * u_step
                       + flat_d * u_d, flat_inside, T, BD)
        dy = _load_tile(grad + b * g_b + group * g_k + flat_line * g_line + flat_step * g_step
                        + flat_d * g_d, flat_inside & on_map, T, BD)
        x_at = b * x_b + group * x_k + flat_line * x_line + flat_step * x_step + flat_d * x_d
        dx = tl.zeros((T, BD), tl.float32)
        if ADD:
            dx += _load_tile(grad_u + x_at, flat_inside, T, BD)
        if SKIP:
            dx += dy * tl.load(skip + group * dim + d, mask=d_inside, other=0.)[None, :]
            row = ((b * spans + turn) * routes + group) * (R + N + 2) + R + N + 1
            so_far = tl.load(sums + row * dim + d, mask=summed, other=0.)
            tl.store(sums + row * dim + d, so_far + tl.sum(dy * x, axis=0), mask=d_inside)
        v_place = line * v_line + step * v_step
        v_flat = flat_line * v_line + flat_step * v_step + flat_d * v_d
        c_place = v_place if PROJECT else line * c_line + step * c_step
        for way in tl.static_range(WAYS):
            k = k_first + group + 2 * way
            of_k = delta + b * v_b + k * v_k
            to_k = grad_delta + block * p_block + b * v_b + k * v_k
            z = _raw_delta(of_k, v_place, v_flat, flat_inside, weight, bias, k, dim, d, d_inside,
                           R, PROJECT, T, BD)
            dt, slope = _finish_delta(z, inside, SOFTPLUS)
            drive = dt * x
            d_drive = tl.zeros((T, BD), tl.float32)
            d_dt = tl.zeros((T, BD), tl.float32)
            first_sum = sums + ((b * spans + turn) * routes + k) * (R + N + 2) * dim + block * BD
            sums_k = first_sum + tl.arange(0, BD)
            entered = d < tl.where(tile != (tiles - 1) * way, dim, 0)
            left = d < tl.where(tile != (tiles - 1) * (1 - way), dim, 0)
            bias_so_far = tl.load(sums_k + (R + N) * dim, mask=summed, other=0.)
            for n in range(N):
                so_far = tl.load(sums_k + (R + n) * dim, mask=summed, other=0.)
                A_n = tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)[None, :]
                a = tl.exp2(dt * A_n)
                from_n = b * c_b + k * c_k + n * c_n
                B_at = of_k + R + n if PROJECT else B + from_n
                C_at = of_k + R + N + n if PROJECT else C + from_n
                to_B = to_k + R + n if PROJECT else grad_B + block * p_block + from_n
                to_C = to_k + R + N + n if PROJECT else grad_C + block * p_block + from_n
                carry_at = (((b * routes + k) * N + n) * tiles + tile) * dim + d
                B_n = tl.load(B_at + c_place).to(tl.float32)[:, None]
                state = tl.load(states + carry_at, mask=entered, other=0.)
                h, decayed, end = _states(a, drive * B_n, state, t, T, way == 1)
                c = dy * tl.load(C_at + c_place).to(tl.float32)[:, None]
                passed = tl.load(grads + carry_at, mask=left, other=0.)
                g, end = _gradients(a, c, passed, t, T, way == 0)
                tl.store(to_C + c_place, tl.sum(dy * h, axis=1), mask=inside)
                tl.store(to_B + c_place, tl.sum(g * drive, axis=1), mask=inside)
                d_drive += g * B_n
                e = g * decayed
                d_dt += e * (A_n * LN2)
                tl.store(sums_k + (R + n) * dim, so_far + tl.sum(e * dt, axis=0), mask=d_inside)
            dx += d_drive * dt
            dz = (d_dt + d_drive * x) * slope
            tl.store(sums_k + (R + N) * dim, bias_so_far + tl.sum(dz, axis=0), mask=d_inside)
            if PROJECT:
                ranks = tl.arange(0, RP)
                columns = tl.load(weight + (k * R + ranks)[None, :] * dim + d[:, None],
                                  mask=(ranks < R)[None, :] & d_inside[:, None], other=0.)
                tl.store(to_k + v_place[:, None] + ranks[None, :],
                         tl.dot(dz, columns, input_precision=PRECISION),
                         mask=inside[:, None] & (ranks < R)[None, :])
                # RS ranks at a time, as a flat tile, so that one wait does for all of them.
                rank_flat = tl.arange(0, RS * BD)
                rank_of = rank_flat // BD
                rank_d = block * BD + rank_flat % BD
                some = tl.arange(0, RS)
                for r in range(0, R, RS):
                    wanted = (r + rank_of < R) & (rank_d < dim)
                    at = first_sum + (r + rank_of) * dim + rank_flat % BD * stride_d
                    total = _load_tile(at, wanted & (rank_d < summed_dim), RS, BD)
                    for j in tl.static_range(RS):
                        rank = tl.load(of_k + v_place + tl.minimum(r + j, R - 1))[:, None]
                        total = tl.where((some == j)[:, None],
                                         total + tl.sum(dz * rank, axis=0)[None, :], total)
                    tl.store(at, tl.reshape(total, (RS * BD,)), mask=wanted)
            else:
                tl.store(grad_delta + x_at, tl.reshape(dz, (T * BD,)).to(
                    grad_delta.dtype.element_ty), mask=flat_inside & on_map)
        tl.store(grad_u + x_at, tl.reshape(dx, (T * BD,)).to(grad_u.dtype.element_ty),
                 mask=flat_inside & on_map)
        # The next tile adds to sums that other threads of the program may have written.
        tl.debug_barrier()
