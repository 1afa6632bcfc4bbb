"""SS2D's scan patterns and the norm after them, position by position: what test_patterns.py and
test_official_patterns.py hold the package to. It shares no code with it and is slow.

Direction k from 0 has the parameters x_proj_weight[k] (R + 2N, D), dt_projs_weight[k] (D, R),
dt_projs_bias[k] (D), and rows k*D to (k+1)*D of A (K*D, N) and D (K*D).
"""

import torch


def by_rows(height, width):
    return [(h, w) for h in range(height) for w in range(width)]


def by_columns(height, width):
    return [(h, w) for w in range(width) for h in range(height)]


def by_diagonals(height, width):
    """From the lower left to the upper right corner, each diagonal downwards."""
    found = []
    for offset in range(-(height - 1), width):
        for h in range(height):
            if 0 <= h + offset < width:
                found.append((h, h + offset))
    return found


def by_antidiagonals(height, width):
    """From the upper left to the lower right corner, each downwards."""
    found = []
    for total in range(height + width - 1):
        for h in range(height):
            if 0 <= total - h < width:
                found.append((h, total - h))
    return found


def by_wrapped_diagonals(height, width):
    return [(i, (i + j) % width) for j in range(width) for i in range(height)]


def by_wrapped_antidiagonals(height, width):
    return [(i, (j - i) % width) for j in range(width) for i in range(height)]


def paths(scan, height, width):
    """For each k, the positions in the order of the visit."""
    rows, columns = by_rows(height, width), by_columns(height, width)
    falling, rising = by_diagonals(height, width), by_antidiagonals(height, width)
    cross = [rows, columns, rows[::-1], columns[::-1]]
    wrapped = by_wrapped_diagonals(height, width), by_wrapped_antidiagonals(height, width)
    return {'cross': cross,
            'omnidirectional': [*cross, *wrapped, *(path[::-1] for path in wrapped)],
            'omnidirectional-unwrapped': [*cross, falling, rising, falling[::-1], rising[::-1]],
            'unidirectional': [rows, rows, rows, rows],
            'bidirectional': [rows, rows, rows[::-1], rows[::-1]],
            'diagonal': [falling, rising, falling[::-1], rising[::-1]]}[scan]


def run(image, path, weights, k):
    """{position: y (D)} of one sequence of an image {position: x (D)}."""
    x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = weights
    dim, rank = dt_projs_weight[k].shape
    state = A.shape[1]
    decay, skip = A[k * dim:(k + 1) * dim], D[k * dim:(k + 1) * dim]
    h = torch.zeros(dim, state, dtype=A.dtype, device=A.device)
    found = {}
    for position in path:
        u = image[position]
        row = x_proj_weight[k] @ u
        dt, b, c = row[:rank], row[rank:rank + state], row[rank + state:]
        delta = torch.log1p(torch.exp(dt_projs_weight[k] @ dt + dt_projs_bias[k]))
        h = torch.exp(delta[:, None] * decay) * h + (delta * u)[:, None] * b[None, :]
        found[position] = h @ c + skip * u
    return found


def normed(image, eps):
    return {position: (u - u.mean()) / torch.sqrt(((u - u.mean()) ** 2).mean() + eps)
            for position, u in image.items()}


def added(images):
    return {position: sum(image[position] for image in images) for position in images[0]}


def cascade(image, height, width, weights):
    image = normed(image, 1e-5)
    rows = {}
    for h in range(height):
        path = [(h, w) for w in range(width)]
        rows.update(added([run(image, path, weights, 0), run(image, path[::-1], weights, 1)]))
    image, columns = normed(rows, 1e-5), {}
    for w in range(width):
        path = [(h, w) for h in range(height)]
        columns.update(added([run(image, path, weights, 2), run(image, path[::-1], weights, 3)]))
    return columns


def scan_by_hand(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                 eps, scan):
    """(B, D, H, W) from x (B, D, H, W); autograd gives the gradients."""
    weights = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    batch, _, height, width = x.shape
    results = []
    for b in range(batch):
        image = {(h, w): x[b, :, h, w] for h in range(height) for w in range(width)}
        if scan == 'cascade':
            image = cascade(image, height, width, weights)
        else:
            image = added([run(image, path, weights, k)
                           for k, path in enumerate(paths(scan, height, width))])
        image = normed(image, eps)
        results.append(torch.stack([
            torch.stack([image[h, w] * norm_weight + norm_bias for w in range(width)], dim=-1)
            for h in range(height)], dim=-2))
    return torch.stack(results)
