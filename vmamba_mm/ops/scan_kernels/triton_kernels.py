"""Triton kernels of both scans, for any GPU that Triton knows.

A route over L positions is divided into tiles of T. A program takes a tile of positions and a block
of channels; a thread has one channel and all T positions in registers, so that the recurrence stays
inside a thread. Nothing is permuted: a position of the route is a line (a row or a column of the
image) and a step along it, each with its stride in every tensor, and the route and its reverse
share a program. What enters a tile from the one before comes from

1. :func:`summarise_tiles`: each tile from a zero state (and the gradient that leaves it);
2. :func:`chain_tiles`: along the tiles, what enters each of them, in place;
3. :func:`scan_tiles` or :func:`scan_tiles_backward`: each tile again, from what enters it.

With one tile the first two are left out. Sums over channels and positions go through buffers of
partial sums, so the result is the same bits in every run.

B batch, K routes, D channels of a route, L positions, N state, R rank of dt. ``A`` comes as
(K, N, D), times log2(e).

Names that end in ``_at`` are pointers. A stride begins with its tensor's letter: ``u_``, ``v_`` for
delta, ``y_``, ``g_`` for grad, ``x_`` for the gradients that are written; groups need none, for
the channels of one follow those of the one before. ``flat`` values are of a tile as one dimension,
its T positions times BD channels.
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
# mask of block & scalar. Pointers add what is the same for a program first, and
# then a tile of 32-bit offsets, which is half the registers and no spills on NVIDIA GPUs.

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
def _program(pid, blocks, tiles, groups):
    """(first block of channels, tile or turn, group, sample) of a program."""
    block = pid % blocks
    pid //= blocks
    tile = pid % tiles
    pid //= tiles
    return block, tile, pid % groups, (pid // groups).to(tl.int64)


@triton.jit
def _coordinates(start, t, length, line_length, WRAPS: tl.constexpr):
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
def _map_at(tensor, b, group, dim, line, step, d, s_b, s_line, s_step, s_d):
    """Pointers to channels ``d`` of a group at positions of a map (B, groups * D, ...)."""
    return tensor + (b * s_b + group * dim * s_d) + (line * s_line + step * s_step + d * s_d)


@triton.jit
def _route_at(delta, b, k, dim, v_b, v_d, R: tl.constexpr, N: tl.constexpr, PROJECT: tl.constexpr):
    """Pointer to a route in delta, or in its gradient. With PROJECT the R numbers of dt, N of B and
    N of C of a route are neighbours."""
    if PROJECT:
        stride = R + 2 * N
    else:
        stride = dim * v_d
    return delta + b * v_b + k * stride


@triton.jit
def _state_at(projection, route_at, b, k, n, groups, length, first, N: tl.constexpr,
              PROJECT: tl.constexpr):
    """Pointer to B or C, or a gradient by it, for state n of a route: in a tensor (B, K, N, L), or
    with PROJECT ``first`` numbers after the route's dt."""
    if PROJECT:
        at = route_at + first + n
    else:
        at = projection + ((b * groups + k) * N + n) * length
    return at


@triton.jit
def _carry_row(b, k, n, routes, tiles, N: tl.constexpr):
    """The row of D channels in states or grads (B, K, N, tiles, D) of the first tile."""
    return ((b * routes + k) * N + n) * tiles


@triton.jit
def _raw_delta(route_at, place, flat_place, flat_inside, weight, bias, k, dim, d, d_inside,
               R: tl.constexpr, PROJECT: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
    """z, of which delta is the softplus; ``place`` of the positions in delta."""
    z = tl.zeros((T, BD), tl.float32)
    z += tl.load(bias + k * dim + d, mask=d_inside, other=0.)[None, :]
    if PROJECT:
        # A few at a time: enough loads in flight, and little code.
        RU: tl.constexpr = R if R <= 8 else 4 if R % 4 == 0 else 3 if R % 3 == 0 else 1
        for r in range(0, R, RU):
            for j in tl.static_range(RU):
                dt = tl.load(route_at + place + r + j)
                column = tl.load(weight + (k * R + r + j) * dim + d, mask=d_inside, other=0.)
                z += dt[:, None] * column[None, :]
    else:
        z += _load_tile(route_at + flat_place, flat_inside, T, BD)
    return z


@triton.jit
def _load_tile(at, mask, T: tl.constexpr, BD: tl.constexpr):
    return tl.reshape(tl.load(at, mask=mask, other=0.).to(tl.float32), (T, BD))


@triton.jit
def _store_tile(at, tile, mask, T: tl.constexpr, BD: tl.constexpr):
    tl.store(at, tl.reshape(tile, (T * BD,)).to(at.dtype.element_ty), mask=mask)


@triton.jit
def _finish_delta(z, inside, SOFTPLUS: tl.constexpr):
    """delta and d delta / dz, both 0 outside the map: there the state passes unchanged."""
    if SOFTPLUS:
        delta, slope = _softplus(z)
    else:
        delta, slope = z, tl.full(z.shape, 1.0, tl.float32)
    return tl.where(inside[:, None], delta, 0.), tl.where(inside[:, None], slope, 0.)


# --- kernels --------------------------------------------------------------------------------
# What strides must not be known to be 1: Triton would give a thread several channels, or lanes
# steps. ``skip`` and ``partial`` may be None.

@triton.jit(do_not_specialize=['u_step', 'u_d', 'v_step', 'v_d', 'g_step', 'g_d'])
def summarise_tiles(u, u_b, u_line, u_step, u_d, delta, v_b, v_line, v_step, v_d, B, C,
                    grad, g_b, g_line, g_step, g_d, A, weight, bias, totals, states, grads,
                    groups, dim, length, line_length, tiles, blocks, first_route, routes,
                    N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
                    DIRECTIONS: tl.constexpr, WRAPS: tl.constexpr, PROJECT: tl.constexpr,
                    SOFTPLUS: tl.constexpr, GRAD: tl.constexpr):
    """totals (B, K, tiles, D): delta summed over a tile. states (B, K, N, tiles, D): what a tile
    alone hands to the next, stored at the next. grads: the gradient that it hands to the one
    before, stored there."""
    block, tile, group, b = _program(tl.program_id(0), blocks, tiles, groups)
    d = block * BD + tl.arange(0, BD)
    d_inside = d < dim
    t = tl.arange(0, T)
    line, step, inside = _coordinates(tile * T, t, length, line_length, WRAPS)
    flat = tl.arange(0, T * BD)
    flat_d = block * BD + flat % BD
    flat_inside = flat_d < dim
    flat_line, flat_step, on_map = _coordinates(tile * T, flat // BD, length, line_length, WRAPS)
    x = _load_tile(_map_at(u, b, group, dim, flat_line, flat_step, flat_d, u_b, u_line, u_step,
                           u_d), flat_inside, T, BD)
    dy = x
    if GRAD:
        dy = _load_tile(_map_at(grad, b, group, dim, flat_line, flat_step, flat_d, g_b, g_line,
                                g_step, g_d), flat_inside & on_map, T, BD)
    place = line * v_line + step * v_step
    flat_place = flat_line * v_line + flat_step * v_step + flat_d * v_d
    state_place = place if PROJECT else line * line_length + step
    for direction in tl.static_range(DIRECTIONS):
        k = first_route + group + 2 * direction
        route_at = _route_at(delta, b, k, dim, v_b, v_d, R, N, PROJECT)
        z = _raw_delta(route_at, place, flat_place, flat_inside, weight, bias, k, dim, d, d_inside,
                       R, PROJECT, T, BD)
        dt, slope = _finish_delta(z, inside, SOFTPLUS)
        tl.store(totals + ((b * routes + k) * tiles + tile) * dim + d, tl.sum(dt, axis=0),
                 mask=d_inside)
        drive = dt * x
        after = tile + 1 - 2 * direction
        before = tile - 1 + 2 * direction
        for n in range(N):
            a = tl.exp2(dt * tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)[None, :])
            B_at = _state_at(B, route_at, b, k, n, groups, length, R, N, PROJECT)
            v = drive * tl.load(B_at + state_place).to(tl.float32)[:, None]
            nothing = tl.zeros((BD,), tl.float32)
            all_h, decayed, end = _states(a, v, nothing, t, T, direction == 1)
            carry = _carry_row(b, k, n, routes, tiles, N) * dim + d
            tl.store(states + carry + after * dim, end,
                     mask=d < tl.where((after >= 0) & (after < tiles), dim, 0))
            if GRAD:
                C_at = _state_at(C, route_at, b, k, n, groups, length, R + N, N, PROJECT)
                c = dy * tl.load(C_at + state_place).to(tl.float32)[:, None]
                all_g, end = _gradients(a, c, nothing, t, T, direction == 0)
                tl.store(grads + carry + before * dim, end,
                         mask=d < tl.where((before >= 0) & (before < tiles), dim, 0))


@triton.jit(do_not_specialize=['stride_d'])
def chain_tiles(totals, states, grads, A, dim, stride_d, tiles, blocks, routes, reversed_from,
                N: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):
    """states and grads (B, K, N, tiles, D), in place: what each tile hands on alone becomes all
    that it hands on. The second half of the grid does the gradients. U tiles are read at a time."""
    block, n, k, b = _program(tl.program_id(0), blocks, N, routes)
    d = block * BD + tl.arange(0, BD)
    d_inside = d < dim
    # In the order of the route; gradients go against it.
    backwards = (k >= reversed_from) != (tl.program_id(1) == 1)
    if tl.program_id(1) == 1:
        states = grads
    states += _carry_row(b, k, n, routes, tiles, N) * dim
    totals += (b * routes + k) * tiles * dim
    A_n = tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)
    state = tl.zeros((BD,), tl.float32)
    u = tl.arange(0, U)
    flat = tl.arange(0, U * BD)
    flat_d = block * BD + flat % BD
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
def scan_tiles(u, u_b, u_line, u_step, u_d, delta, v_b, v_line, v_step, v_d, B, C,
               y, partial, y_b, y_line, y_step, y_d, A, weight, bias, skip, states,
               groups, dim, length, line_length, tiles, blocks, first_route, routes,
               N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
               DIRECTIONS: tl.constexpr, WRAPS: tl.constexpr, PROJECT: tl.constexpr,
               SOFTPLUS: tl.constexpr):
    """y = sum of the route and (DIRECTIONS 2) its reverse, plus skip x, plus ``partial``."""
    block, tile, group, b = _program(tl.program_id(0), blocks, tiles, groups)
    d = block * BD + tl.arange(0, BD)
    d_inside = d < dim
    t = tl.arange(0, T)
    line, step, inside = _coordinates(tile * T, t, length, line_length, WRAPS)
    flat = tl.arange(0, T * BD)
    flat_d = block * BD + flat % BD
    flat_inside = flat_d < dim
    flat_line, flat_step, on_map = _coordinates(tile * T, flat // BD, length, line_length, WRAPS)
    x = _load_tile(_map_at(u, b, group, dim, flat_line, flat_step, flat_d, u_b, u_line, u_step,
                           u_d), flat_inside, T, BD)
    result = tl.zeros((T, BD), tl.float32)
    if partial is not None:
        result += _load_tile(_map_at(partial, b, group, dim, flat_line, flat_step, flat_d, y_b,
                                     y_line, y_step, y_d), flat_inside, T, BD)
    if skip is not None:
        result += x * tl.load(skip + group * dim + d, mask=d_inside, other=0.)[None, :]
    place = line * v_line + step * v_step
    flat_place = flat_line * v_line + flat_step * v_step + flat_d * v_d
    state_place = place if PROJECT else line * line_length + step
    for direction in tl.static_range(DIRECTIONS):
        k = first_route + group + 2 * direction
        route_at = _route_at(delta, b, k, dim, v_b, v_d, R, N, PROJECT)
        z = _raw_delta(route_at, place, flat_place, flat_inside, weight, bias, k, dim, d, d_inside,
                       R, PROJECT, T, BD)
        dt, slope = _finish_delta(z, inside, SOFTPLUS)
        drive = dt * x
        entered = d < tl.where(tile != (tiles - 1) * direction, dim, 0)
        for n in range(N):
            a = tl.exp2(dt * tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)[None, :])
            B_at = _state_at(B, route_at, b, k, n, groups, length, R, N, PROJECT)
            C_at = _state_at(C, route_at, b, k, n, groups, length, R + N, N, PROJECT)
            carry = (_carry_row(b, k, n, routes, tiles, N) + tile) * dim + d
            state = tl.load(states + carry, mask=entered, other=0.)
            v = drive * tl.load(B_at + state_place).to(tl.float32)[:, None]
            h, decayed, end = _states(a, v, state, t, T, direction == 1)
            result += h * tl.load(C_at + state_place).to(tl.float32)[:, None]
    _store_tile(_map_at(y, b, group, dim, flat_line, flat_step, flat_d, y_b, y_line, y_step, y_d),
                result, flat_inside & on_map, T, BD)


@triton.jit(do_not_specialize=['u_step', 'u_d', 'v_step', 'v_d', 'g_step', 'g_d', 'x_step', 'x_d',
                               'stride_d'])
def scan_tiles_backward(u, u_b, u_line, u_step, u_d, delta, v_b, v_line, v_step, v_d, B, C,
                        grad, g_b, g_line, g_step, g_d,
                        grad_u, grad_delta, x_b, x_line, x_step, x_d, grad_B, grad_C, part_stride,
                        A, weight, bias, skip, states, grads, sums,
                        groups, dim, length, line_length, tiles, blocks, first_route, routes,
                        spans, span, stride_d,
                        N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
                        DIRECTIONS: tl.constexpr, WRAPS: tl.constexpr, PROJECT: tl.constexpr,
                        SOFTPLUS: tl.constexpr, ADD: tl.constexpr,
                        RP: tl.constexpr, RS: tl.constexpr, PRECISION: tl.constexpr):
    """A program does ``span`` tiles, one after the other.

    grad_u: added to what is there (ADD). grad_delta: by z. grad_B, grad_C (PROJECT: all three in
    grad_delta, by the projected dt): a partial sum for each block of channels, part_stride apart.
    sums (B, spans, K, R + N + 2, D): by the weight, A, the bias and, where there is one, the skip.
    """
    block, turn, group, b = _program(tl.program_id(0), blocks, spans, groups)
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
        line, step, inside = _coordinates(tile * T, t, length, line_length, WRAPS)
        flat_line, flat_step, on_map = _coordinates(tile * T, flat // BD, length, line_length,
                                                    WRAPS)
        flat_inside = flat_d < dim
        x = _load_tile(_map_at(u, b, group, dim, flat_line, flat_step, flat_d, u_b, u_line, u_step,
                               u_d), flat_inside, T, BD)
        dy = _load_tile(_map_at(grad, b, group, dim, flat_line, flat_step, flat_d, g_b, g_line,
                                g_step, g_d), flat_inside & on_map, T, BD)
        dx_at = _map_at(grad_u, b, group, dim, flat_line, flat_step, flat_d, x_b, x_line, x_step,
                        x_d)
        dx = tl.zeros((T, BD), tl.float32)
        if ADD:
            dx += _load_tile(dx_at, flat_inside, T, BD)
        if skip is not None:
            dx += dy * tl.load(skip + group * dim + d, mask=d_inside, other=0.)[None, :]
            row = ((b * spans + turn) * routes + group) * (R + N + 2) + R + N + 1
            so_far = tl.load(sums + row * dim + d, mask=summed, other=0.)
            tl.store(sums + row * dim + d, so_far + tl.sum(dy * x, axis=0), mask=d_inside)
        place = line * v_line + step * v_step
        flat_place = flat_line * v_line + flat_step * v_step + flat_d * v_d
        state_place = place if PROJECT else line * line_length + step
        for direction in tl.static_range(DIRECTIONS):
            k = first_route + group + 2 * direction
            route_at = _route_at(delta, b, k, dim, v_b, v_d, R, N, PROJECT)
            grad_route_at = _route_at(grad_delta + block * part_stride, b, k, dim, v_b, v_d, R, N,
                                      PROJECT)
            z = _raw_delta(route_at, place, flat_place, flat_inside, weight, bias, k, dim, d,
                           d_inside, R, PROJECT, T, BD)
            dt, slope = _finish_delta(z, inside, SOFTPLUS)
            drive = dt * x
            d_drive = tl.zeros((T, BD), tl.float32)
            d_dt = tl.zeros((T, BD), tl.float32)
            first_sum = sums + ((b * spans + turn) * routes + k) * (R + N + 2) * dim + block * BD
            sums_k = first_sum + tl.arange(0, BD)
            entered = d < tl.where(tile != (tiles - 1) * direction, dim, 0)
            left = d < tl.where(tile != (tiles - 1) * (1 - direction), dim, 0)
            bias_so_far = tl.load(sums_k + (R + N) * dim, mask=summed, other=0.)
            for n in range(N):
                so_far = tl.load(sums_k + (R + n) * dim, mask=summed, other=0.)
                A_n = tl.load(A + (k * N + n) * dim + d, mask=d_inside, other=0.)[None, :]
                a = tl.exp2(dt * A_n)
                B_at = _state_at(B, route_at, b, k, n, groups, length, R, N, PROJECT)
                C_at = _state_at(C, route_at, b, k, n, groups, length, R + N, N, PROJECT)
                dB_at = _state_at(grad_B + block * part_stride, grad_route_at, b, k, n, groups,
                                  length, R, N, PROJECT)
                dC_at = _state_at(grad_C + block * part_stride, grad_route_at, b, k, n, groups,
                                  length, R + N, N, PROJECT)
                carry = (_carry_row(b, k, n, routes, tiles, N) + tile) * dim + d
                B_n = tl.load(B_at + state_place).to(tl.float32)[:, None]
                state = tl.load(states + carry, mask=entered, other=0.)
                h, decayed, end = _states(a, drive * B_n, state, t, T, direction == 1)
                c = dy * tl.load(C_at + state_place).to(tl.float32)[:, None]
                passed = tl.load(grads + carry, mask=left, other=0.)
                g, end = _gradients(a, c, passed, t, T, direction == 0)
                tl.store(dC_at + state_place, tl.sum(dy * h, axis=1), mask=inside)
                tl.store(dB_at + state_place, tl.sum(g * drive, axis=1), mask=inside)
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
                tl.store(grad_route_at + place[:, None] + ranks[None, :],
                         tl.dot(dz, columns, input_precision=PRECISION),
                         mask=inside[:, None] & (ranks < R)[None, :])
                # RS ranks at a time, as a flat tile, so that one wait does for all of them.
                rank_flat = tl.arange(0, RS * BD)
                rank_of = rank_flat // BD
                rank_d = block * BD + rank_flat % BD
                some = tl.arange(0, RS)
                for r in range(0, R, RS):
                    wanted = (r + rank_of < R) & (rank_d < dim)
                    sum_at = first_sum + (r + rank_of) * dim + rank_flat % BD * stride_d
                    total = _load_tile(sum_at, wanted & (rank_d < summed_dim), RS, BD)
                    for j in tl.static_range(RS):
                        rank = tl.load(route_at + place + tl.minimum(r + j, R - 1))[:, None]
                        total = tl.where((some == j)[:, None],
                                         total + tl.sum(dz * rank, axis=0)[None, :], total)
                    _store_tile(sum_at, total, wanted, RS, BD)
            else:
                dz_at = _map_at(grad_delta, b, group, dim, flat_line, flat_step, flat_d, x_b,
                                x_line, x_step, x_d)
                _store_tile(dz_at, dz, flat_inside & on_map, T, BD)
        _store_tile(dx_at, dx, flat_inside & on_map, T, BD)
        # The next tile adds to sums that other threads of the program may have written.
        tl.debug_barrier()
