"""The times below which no implementation of the middle of SS2D can go."""

SPECIAL_PER_CLOCK = 16  # special functions of a multiprocessor, sm_75 to sm_120
WARPS_PER_CLOCK = 4  # instructions of a multiprocessor, each for 32 lanes
ROUTES = 4


def operations(state, backward):
    """(special functions, instructions) that a step of a route needs; both passes if backward.

    Forward: softplus is an exp and a log, and there is an exp for each state. The instructions:
    5 for softplus, 1 for delta x, 1 to add the routes; for a state a multiplication and an exp
    for its decay, B's product, and a multiply-add each for h and y. The projections count as
    nothing: tensor cores do them.

    Backward: the same again without y, the sigmoid's reciprocal (so 4 at N = 1); 4 instructions
    for dx and d delta, 3 for the sigmoid and dz, 1 for the bias; for a state 9 for the gradients
    by h, C, B, delta x, the decay's exponent, delta and A, and 2 that sum those by B and C over
    channels.
    """
    special, instructions = 2 + state, 7 + 5 * state
    if backward:
        special += special + 1
        instructions += instructions - 1 - state + 8 + 11 * state
    return special, instructions


def floors(steps, state, backward, gpu):
    """({'bytes', 'special', 'instructions': ms}, the fewest bytes), for half-precision maps.

    ``steps`` are those of all routes, batch * 4 * D * H * W; ``gpu`` has 'multiprocessors', 'MHz'
    and 'copy' (bytes/ms). Read x, write y; then read x and dy, write dx.
    """
    size = (5 if backward else 2) * 2 * steps // ROUTES
    special, instructions = operations(state, backward)
    per_ms = gpu['multiprocessors'] * gpu['MHz'] * 1e3
    return {'bytes': size / gpu['copy'],
            'special': steps * special / SPECIAL_PER_CLOCK / per_ms,
            'instructions': steps * instructions / 32 / WARPS_PER_CLOCK / per_ms}, size
