"""``add_norm`` in plain PyTorch: its specification, and what runs where no kernel does."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(x, branch, scale, weight, bias, eps, out_dtype) -> tuple[Tensor | None, Tensor | None]:
    """(x + scale * branch, its norm), None for what is not asked for.

    Args:
        x, branch: (B, ..., D); without a branch the norm is of ``x``.
        scale: (B), or None for 1.
        weight, bias: (D), of a LayerNorm; weight alone, of an RMSNorm; None for no norm.
        out_dtype: of the norm, and of the sum where there is no norm.
    """
    if branch is None:
        return None, _norm(x, weight, bias, eps).to(out_dtype)
    if scale is not None:
        branch = branch * scale.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
    total = x + branch
    if weight is None:
        return total.to(out_dtype), None
    return total.to(x.dtype), _norm(total, weight, bias, eps).to(out_dtype)


def _norm(x, weight, bias, eps):
    return rms_norm(x, weight, eps) if bias is None else layer_norm(x, weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in the dtype to which ``x`` and ``weight`` promote."""
    if torch.promote_types(x.dtype, weight.dtype) == x.dtype:  # F.layer_norm takes no smaller one
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in fp32 at least."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
