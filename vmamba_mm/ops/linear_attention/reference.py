"""``linear_attention`` as its equations say, token by token: the specification of the op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.rotation import rotate_heads


def forward(q, k, v, turns, augmented, eps) -> Tensor:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.linear_attention`."""
    dtype, (_, length, _, dim) = compute_dtype(v.dtype), q.shape
    q, k = (F.elu(t.to(dtype)) + 1 for t in (q, k))
    weights = torch.full_like(k[..., 0], 1 / length)         # (B, L, n)
    if augmented:
        mean = q.mean(1, keepdim=True)
        weights = ((mean * k).sum(-1) * dim ** -0.5).softmax(1)
    turned_q, turned_k = (rotate_heads(t, turns) for t in (q, k))
    state, total = 0, 0                                      # (B, n, P, E) and (B, n, P)
    for t in range(length):
        value = weights[:, t, :, None] * v[:, t].to(dtype)   # (B, n, E)
        state = state + turned_k[:, t, ..., None] * value[..., None, :]
        total = total + weights[:, t, :, None] * k[:, t]
    rows = [(turned_q[:, t, ..., None] * state).sum(-2)
            / ((q[:, t] * total).sum(-1, keepdim=True) + eps) for t in range(length)]
    return torch.stack(rows, 1).to(v.dtype)
