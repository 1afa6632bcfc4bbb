"""``nc_ssd`` as its equations say, token by token: the specification of the op."""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.fused.add_norm.reference import layer_norm


def forward(x, dt, A, B, C, D, dt_bias, dt_softplus, positive) -> Tensor:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.nc_ssd`."""
    dtype, (_, length, heads, _) = compute_dtype(x.dtype), x.shape
    u, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    weights = (-dt if positive else dt) * A             # (B, L, H)
    groups = [h % B.shape[2] for h in range(heads)]
    B, C = B[:, :, groups], C[:, :, groups]             # (B, L, H, N)
    state = 0                                           # (B, H, P, N), of all tokens
    for t in range(length):
        value = weights[:, t, :, None] * u[:, t]        # (B, H, P)
        state = state + value[..., None] * B[:, t, :, None]
    y = (state[:, None] * C[..., None, :]).sum(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    return y.to(x.dtype).contiguous()


def forward_norm(x, dt, A, B, C, D, dt_bias, z, norm_weight, norm_bias, dt_softplus, positive, eps
                 ) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.nc_ssd_norm`."""
    y = forward(x, dt, A, B, C, D, dt_bias, dt_softplus, positive).flatten(2)
    return (layer_norm(y, norm_weight, norm_bias, eps) * z).to(x.dtype)
