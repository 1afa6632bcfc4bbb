"""Manhattan self-attention pixel by pixel, as the specification that tests compare with."""

import torch
from torch import Tensor


def masa(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, form: str = 'decomposed') -> Tensor:
    """The loops of :func:`vmamba_mm.ops.masa`, with the same arguments."""
    if form == 'whole':
        return _attend(q, k, v, decay, lambda h, w, i, j: abs(h - i) + abs(w - j), whole=True)
    rows = _attend(q, k, v, decay, lambda h, w, i, j: abs(w - j))
    turned = (t.transpose(1, 2) for t in (q, k, rows))  # the columns are rows of these
    return _attend(*turned, decay, lambda h, w, i, j: abs(w - j)).transpose(1, 2)


def _attend(q, k, v, decay, distance, whole=False):
    """Each pixel sees all pixels, or those of its row."""
    height, width, heads, dim = q.shape[1:]
    rows = []
    for h in range(height):
        pixels = []
        for w in range(width):
            seen = [(i, j) for i in (range(height) if whole else [h]) for j in range(width)]
            scores = torch.stack([
                (q[:, h, w] * k[:, i, j]).sum(-1) * dim ** -0.5 + decay * distance(h, w, i, j)
                for i, j in seen])  # (seen, B, heads)
            values = torch.stack([v[:, i, j] for i, j in seen])
            pixels.append((scores.softmax(0)[..., None] * values).sum(0))
        rows.append(torch.stack(pixels, 1))
    return torch.stack(rows, 1)
