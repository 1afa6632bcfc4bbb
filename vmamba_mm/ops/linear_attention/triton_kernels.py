"""The Triton kernels of ``linear_attention``. A program has a head of a sample, and a part of its
tokens. ``README.md`` has the equations and the names; P and E are padded to powers of 2.

Weights of tokens enter sums as exp(score - the largest so far), or 1 without rank augmentation, and
are divided by their sum, or by L, when the parts of a sum come together: so what is multiplied in
half precision is neither too small nor too large for it.
"""

import triton
import triton.language as tl


@triton.jit
def _head(x, stride_b, stride_h, heads):
    """Where the head of this program begins in a map (B, L, n, ...)."""
    program = tl.program_id(0)
    return x + (program // heads).to(tl.int64) * stride_b + (program % heads) * stride_h


@triton.jit
def _load(at, rows, columns, stride, length, width):
    """In fp32, zeros beyond the map; and where there is something."""
    there = (rows[:, None] < length) & (columns[None, :] < width)
    x = tl.load(at + rows[:, None] * stride + columns[None, :], mask=there, other=0.0)
    return x.to(tl.float32), there


@triton.jit
def _elu(x, there):
    """elu(x) + 1, 0 where nothing is, and its derivative."""
    slope = tl.where(x > 0, 1.0, tl.exp(x))  # NaN stays, which a minimum would lose
    return tl.where(there, tl.where(x > 0, x + 1.0, slope), 0.0), slope


@triton.jit
def _turns(turns, rows, columns, length, width, heads):
    """The cosine for each channel, and the sine, negative for the first one of a pair."""
    there = (rows[:, None] < length) & (columns[None, :] < width)
    channel = (tl.program_id(0) % heads) * width + columns[None, :]
    at = turns + rows[:, None] * (heads * width) + channel // 2 * 2
    cos = tl.load(at, mask=there, other=0.0)
    sin = tl.load(at + 1, mask=there, other=0.0)
    return cos, tl.where(columns[None, :] % 2 == 0, -sin, sin)


@triton.jit
def _features(at, rows, columns, stride, length, width, heads, turns, TURNED: tl.constexpr):
    """Features, turned features, the derivative of features."""
    x, there = _load(at, rows, columns, stride, length, width)
    f, slope = _elu(x, there)
    turned = f
    if TURNED:
        other, there = _load(at, rows, columns ^ 1, stride, length, width)
        other, _ = _elu(other, there)
        cos, sin = _turns(turns, rows, columns, length, width, heads)
        turned = f * cos + other * sin
    return f, turned, slope


@triton.jit
def _mean(means, columns, width, length, SPLITS: tl.constexpr):
    """The mean feature of the queries, from the sums of the parts (B n, splits, P)."""
    sums = tl.zeros(columns.shape, tl.float32)
    for i in range(SPLITS):
        sums += tl.load(means + (tl.program_id(0) * SPLITS + i) * width + columns,
                        mask=columns < width, other=0.0)
    return sums / length


@triton.jit
def _largest(scales, SPLITS: tl.constexpr):
    """Of all parts the largest score, and the sum of the weights relative to it."""
    largest = float('-inf')
    for i in range(SPLITS):
        largest = tl.maximum(largest, tl.load(scales + (tl.program_id(0) * SPLITS + i) * 2))
    total = 0.0
    for i in range(SPLITS):
        at = scales + (tl.program_id(0) * SPLITS + i) * 2
        total += tl.load(at + 1) * tl.exp(tl.load(at) - largest)
    return largest, total


@triton.jit
def _state(states, totals, scales, rows, columns, width, depth, length, SPLITS: tl.constexpr,
           AUGMENTED: tl.constexpr):
    """S (P, E) and z (P) from those of the parts; of the rows ``rows``."""
    there = (rows[:, None] < width) & (columns[None, :] < depth)
    state = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    if AUGMENTED:
        largest, count = _largest(scales, SPLITS)
    else:
        count = length * 1.0
    for i in range(SPLITS):
        part = tl.program_id(0) * SPLITS + i
        s = tl.load(states + part.to(tl.int64) * width * depth + rows[:, None] * depth
                    + columns[None, :], mask=there, other=0.0)
        z = tl.load(totals + part * width + rows, mask=rows < width, other=0.0)
        if AUGMENTED:
            scale = tl.exp(tl.load(scales + part * 2) - largest)
            s, z = s * scale, z * scale
        state, total = state + s, total + z
    return state / count, total / count


@triton.jit
def sum_features(q, means, length, width, heads, q_b, q_l, q_h, part_length, P: tl.constexpr,
                 L: tl.constexpr, SPLITS: tl.constexpr):
    """The sums over parts of the tokens of the features of queries: ``means`` (B n, splits, P)."""
    at, columns = _head(q, q_b, q_h, heads), tl.arange(0, P)
    sums = tl.zeros((P,), tl.float32)
    first = tl.program_id(1) * part_length
    for start in range(first, tl.minimum(first + part_length, length), L):
        x, there = _load(at, start + tl.arange(0, L), columns, q_l, length, width)
        f, _ = _elu(x, there)
        sums += tl.sum(f, 0)
    tl.store(means + (tl.program_id(0) * SPLITS + tl.program_id(1)) * width + columns, sums,
             mask=columns < width)


@triton.jit
def find_states(k, v, turns, means, states, totals, scales, length, width, depth, heads, scale,
                k_b, k_l, k_h, v_b, v_l, v_h, part_length, P: tl.constexpr, E: tl.constexpr,
                L: tl.constexpr, SPLITS: tl.constexpr, TURNED: tl.constexpr,
                AUGMENTED: tl.constexpr, KIND: tl.constexpr,
                PRECISION: tl.constexpr):
    """Of each part of the tokens: ``states`` (B n, splits, P, E), ``totals`` (B n, splits, P), and
    of rank augmentation ``scales`` (B n, splits, 2): the largest score, and the sum of weights
    relative to it. ``part_length`` is a multiple of L."""
    k, v = _head(k, k_b, k_h, heads), _head(v, v_b, v_h, heads)
    columns, values = tl.arange(0, P), tl.arange(0, E)
    state, total = tl.zeros((P, E), tl.float32), tl.zeros((P,), tl.float32)
    largest, count = float('-inf'), 0.0
    if AUGMENTED:
        mean = _mean(means, columns, width, length, SPLITS) * scale
    first = tl.program_id(1) * part_length
    for start in range(first, tl.minimum(first + part_length, length), L):
        rows = start + tl.arange(0, L)
        g, turned, _ = _features(k, rows, columns, k_l, length, width, heads, turns, TURNED)
        x, _ = _load(v, rows, values, v_l, length, depth)
        if AUGMENTED:
            scores = tl.where(rows < length, tl.sum(g * mean[None, :], 1), float('-inf'))
            most = tl.maximum(largest, tl.max(scores, 0))
            shrink, weights = tl.exp(largest - most), tl.exp(scores - most)
            state, total, count = state * shrink, total * shrink, count * shrink
            count += tl.sum(weights, 0)
            g, turned = g * weights[:, None], turned * weights[:, None]
            largest = most
        state += tl.dot(tl.trans(turned).to(KIND), x.to(KIND), input_precision=PRECISION)
        total += tl.sum(g, 0)
    part = tl.program_id(0) * SPLITS + tl.program_id(1)
    tl.store(states + part.to(tl.int64) * width * depth + columns[:, None] * depth
             + values[None, :], state, mask=(columns[:, None] < width) & (values[None, :] < depth))
    tl.store(totals + part * width + columns, total, mask=columns < width)
    if AUGMENTED:
        tl.store(scales + part * 2, largest)
        tl.store(scales + part * 2 + 1, count)


@triton.jit
def attend(q, turns, states, totals, scales, y, length, width, depth, heads, eps, q_b, q_l, q_h,
           y_b, y_l, y_h, P: tl.constexpr, E: tl.constexpr, L: tl.constexpr, SPLITS: tl.constexpr,
           TURNED: tl.constexpr, AUGMENTED: tl.constexpr, KIND: tl.constexpr,
           PRECISION: tl.constexpr):
    """The result of L tokens."""
    q, y = _head(q, q_b, q_h, heads), _head(y, y_b, y_h, heads)
    columns, values = tl.arange(0, P), tl.arange(0, E)
    rows = tl.program_id(1) * L + tl.arange(0, L)
    state, total = _state(states, totals, scales, columns, values, width, depth, length, SPLITS,
                          AUGMENTED)
    f, turned, _ = _features(q, rows, columns, q_l, length, width, heads, turns, TURNED)
    result = tl.dot(turned.to(KIND), state.to(KIND), input_precision=PRECISION)
    result /= tl.sum(f * total[None, :], 1)[:, None] + eps
    tl.store(y + rows[:, None] * y_l + values[None, :], result,
             mask=(rows[:, None] < length) & (values[None, :] < depth))


@triton.jit
def _by_result(grad, turned, f, state, total, rows, values, grad_l, length, depth, eps,
               KIND: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient over the denominator (L, E), and that by the denominator (L)."""
    by_y, _ = _load(grad, rows, values, grad_l, length, depth)
    denominator = tl.sum(f * total[None, :], 1) + eps
    by_y /= denominator[:, None]
    y = tl.dot(turned.to(KIND), state.to(KIND), input_precision=PRECISION)
    return by_y, -tl.sum(by_y * y, 1) / denominator


@triton.jit
def find_grad_states(q, grad, turns, states, totals, scales, grad_states, grad_totals, length,
                     width, depth, heads, eps, q_b, q_l, q_h, grad_b, grad_l, grad_h, part_length,
                     P: tl.constexpr, E: tl.constexpr, L: tl.constexpr, SPLITS: tl.constexpr,
                     TURNED: tl.constexpr, AUGMENTED: tl.constexpr, KIND: tl.constexpr,
                     PRECISION: tl.constexpr):
    """The sums over parts of the tokens of the gradients by S and z, over L."""
    q, grad = _head(q, q_b, q_h, heads), _head(grad, grad_b, grad_h, heads)
    columns, values = tl.arange(0, P), tl.arange(0, E)
    state, total = _state(states, totals, scales, columns, values, width, depth, length, SPLITS,
                          AUGMENTED)
    by_state, by_total = tl.zeros((P, E), tl.float32), tl.zeros((P,), tl.float32)
    first = tl.program_id(1) * part_length
    for start in range(first, tl.minimum(first + part_length, length), L):
        rows = start + tl.arange(0, L)
        f, turned, _ = _features(q, rows, columns, q_l, length, width, heads, turns, TURNED)
        by_y, by_denominator = _by_result(grad, turned, f, state, total, rows, values, grad_l,
                                          length, depth, eps, KIND, PRECISION)
        by_state += tl.dot(tl.trans(turned).to(KIND), by_y.to(KIND), input_precision=PRECISION)
        by_total += tl.sum(by_denominator[:, None] * f, 0)
    part = tl.program_id(0) * SPLITS + tl.program_id(1)
    tl.store(grad_states + part.to(tl.int64) * width * depth + columns[:, None] * depth
             + values[None, :], by_state / length,
             mask=(columns[:, None] < width) & (values[None, :] < depth))
    tl.store(grad_totals + part * width + columns, by_total / length, mask=columns < width)


@triton.jit
def _turn_back(x, swapped, turns, rows, columns, length, width, heads, TURNED: tl.constexpr):
    """``x`` turned the other way; ``swapped`` has the channels of each pair in the place of one
    another."""
    if TURNED:
        cos, sin = _turns(turns, rows, columns, length, width, heads)
        x = x * cos - swapped * sin
    return x


@triton.jit
def by_keys(k, v, turns, means, states, totals, scales, grad_states, grad_totals, grad_k, grad_v,
            grad_means, length, width, depth, heads, scale, k_b, k_l, k_h, v_b, v_l, v_h, blocks,
            P: tl.constexpr, E: tl.constexpr, L: tl.constexpr, SPLITS: tl.constexpr,
            TURNED: tl.constexpr, AUGMENTED: tl.constexpr, KIND: tl.constexpr,
            PRECISION: tl.constexpr):
    """The gradients by L keys and values, which have no gaps; of rank augmentation their shares of
    that by the mean query, ``grad_means`` (B n, blocks, P)."""
    program, block = tl.program_id(0), tl.program_id(1)
    k, v = _head(k, k_b, k_h, heads), _head(v, v_b, v_h, heads)
    columns, values = tl.arange(0, P), tl.arange(0, E)
    rows = block * L + tl.arange(0, L)
    by_state, by_total = _state(grad_states, grad_totals, scales, columns, values, width, depth,
                                1, SPLITS, False)
    g, turned, slope = _features(k, rows, columns, k_l, length, width, heads, turns, TURNED)
    x, _ = _load(v, rows, values, v_l, length, depth)
    x = x.to(KIND)
    by_turned = tl.dot(x, tl.trans(by_state).to(KIND), input_precision=PRECISION)
    swapped = by_turned
    if TURNED:
        other, _ = _state(grad_states, grad_totals, scales, columns ^ 1, values, width, depth,
                          1, SPLITS, False)
        swapped = tl.dot(x, tl.trans(other).to(KIND), input_precision=PRECISION)
    by_g = _turn_back(by_turned, swapped, turns, rows, columns, length, width, heads, TURNED)
    by_g += by_total[None, :]
    by_v = tl.dot(turned.to(KIND), by_state.to(KIND), input_precision=PRECISION)
    if AUGMENTED:
        mean = _mean(means, columns, width, length, SPLITS) * scale
        largest, count = _largest(scales, SPLITS)
        scores = tl.sum(g * mean[None, :], 1)
        weights = tl.where(rows < length, tl.exp(scores - largest), 0.0) * (length / count)
        state, total = _state(states, totals, scales, columns, values, width, depth, length,
                              SPLITS, True)
        average = tl.sum(tl.sum(state * by_state, 1), 0) + tl.sum(total * by_total, 0)
        by_weights = tl.sum(by_turned * turned, 1) + tl.sum(by_total[None, :] * g, 1)
        by_scores = weights * (by_weights - average) * scale
        by_g = weights[:, None] * by_g + by_scores[:, None] * (mean / scale)[None, :]
        by_v *= weights[:, None]
        tl.store(grad_means + (program * blocks + block) * width + columns,
                 tl.sum(by_scores[:, None] * g, 0), mask=columns < width)
    grad_k = _head(grad_k, length * heads * width, width, heads)
    grad_v = _head(grad_v, length * heads * depth, depth, heads)
    at = rows[:, None] * heads
    tl.store(grad_k + at * width + columns[None, :], by_g * slope,
             mask=(rows[:, None] < length) & (columns[None, :] < width))
    tl.store(grad_v + at * depth + values[None, :], by_v,
             mask=(rows[:, None] < length) & (values[None, :] < depth))


@triton.jit
def by_queries(q, grad, turns, states, totals, scales, grad_means, grad_q, length, width, depth,
               heads, eps, q_b, q_l, q_h, grad_b, grad_l, grad_h, blocks, P: tl.constexpr,
               E: tl.constexpr, L: tl.constexpr, SPLITS: tl.constexpr, TURNED: tl.constexpr,
               AUGMENTED: tl.constexpr, KIND: tl.constexpr,
               PRECISION: tl.constexpr):
    """The gradient by L queries, which has no gaps."""
    program = tl.program_id(0)
    q, grad = _head(q, q_b, q_h, heads), _head(grad, grad_b, grad_h, heads)
    columns, values = tl.arange(0, P), tl.arange(0, E)
    rows = tl.program_id(1) * L + tl.arange(0, L)
    state, total = _state(states, totals, scales, columns, values, width, depth, length, SPLITS,
                          AUGMENTED)
    f, turned, slope = _features(q, rows, columns, q_l, length, width, heads, turns, TURNED)
    by_y, by_denominator = _by_result(grad, turned, f, state, total, rows, values, grad_l, length,
                                      depth, eps, KIND, PRECISION)
    by_y = by_y.to(KIND)
    by_f = tl.dot(by_y, tl.trans(state).to(KIND), input_precision=PRECISION)
    swapped = by_f
    if TURNED:
        other, _ = _state(states, totals, scales, columns ^ 1, values, width, depth, length,
                          SPLITS, AUGMENTED)
        swapped = tl.dot(by_y, tl.trans(other).to(KIND), input_precision=PRECISION)
    by_f = _turn_back(by_f, swapped, turns, rows, columns, length, width, heads, TURNED)
    by_f += by_denominator[:, None] * total[None, :]
    if AUGMENTED:
        sums = tl.zeros((P,), tl.float32)
        for i in range(blocks):
            sums += tl.load(grad_means + (program * blocks + i) * width + columns,
                            mask=columns < width, other=0.0)
        by_f += sums[None, :] / length
    grad_q = _head(grad_q, length * heads * width, width, heads)
    tl.store(grad_q + rows[:, None] * (heads * width) + columns[None, :], by_f * slope,
             mask=(rows[:, None] < length) & (columns[None, :] < width))
