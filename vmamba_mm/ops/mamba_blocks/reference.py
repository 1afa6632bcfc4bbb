"""Mamba blocks in plain PyTorch, from the references of the ops that they are made of: the
specification (section 3.4, arXiv 2312.00752; algorithm 1, arXiv 2401.09417)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.fused.add_norm.reference import add_norm
from vmamba_mm.ops.mamba_blocks.weights import split
from vmamba_mm.ops.mamba_inner import reference as inner


def mamba_blocks(hidden: Tensor, residual: Tensor | None, weights: list[Tensor], count: int,
                 eps: float, scale: float, dtype: torch.dtype, mix=inner.forward
                 ) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.mamba_blocks.mamba_blocks`, ``weights`` all tensors of its
    ``count`` blocks in a list; ``mix`` is what happens between the outer projections."""
    for norm, norm_bias, in_proj, out_proj, directions in split(weights, count):
        if residual is None:
            residual = hidden.to(compute_dtype(hidden.dtype), copy=True)
            _, normed = add_norm(residual, None, None, norm, norm_bias, eps, dtype)
        else:
            residual, normed = add_norm(residual, hidden, None, norm, norm_bias, eps, dtype)
        conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = map(torch.stack,
                                                                  zip(*directions, strict=True))
        xz = F.linear(normed, in_proj.to(dtype))
        A = -A_log.to(compute_dtype(A_log.dtype)).exp()
        y = mix(xz, conv.squeeze(2), conv_bias, x_proj, dt_proj, dt_bias, A, D, False, scale)
        hidden = F.linear(y, out_proj.to(dtype))
    return residual, hidden
