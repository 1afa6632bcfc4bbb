"""``causal_conv`` as its equation says: the specification of the op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def forward(x, weight, bias, initial_state, silu, reverse, return_final_state
            ) -> tuple[Tensor, Tensor | None]:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.causal_conv`."""
    dtype = compute_dtype(x.dtype)
    batch, _, dim = x.shape
    before = weight.shape[1] - 1
    past = (x.new_zeros(batch, before, dim) if initial_state is None
            else initial_state.to(x.dtype))
    inputs = torch.cat((past, x.flip(1) if reverse else x), dim=1)  # (B, W - 1 + L, D) in time
    windows = inputs.to(dtype).unfold(1, before + 1, 1)             # (B, L, D, W)
    y = (windows * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    if silu:
        y = F.silu(y)
    y = torch.empty_like(x).copy_(y.flip(1) if reverse else y)
    return y, inputs[:, inputs.shape[1] - before:].clone() if return_final_state else None
