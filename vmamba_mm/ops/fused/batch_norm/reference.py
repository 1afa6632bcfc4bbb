"""``evaluate_batch_norm`` in plain PyTorch: its specification, and what runs where no kernel does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def evaluate_batch_norm(x, mean, variance, weight, bias, residual, relu, eps) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D), as :func:`vmamba_mm.ops.evaluate_batch_norm`."""
    if x.is_cpu and x.dtype == weight.dtype == compute_dtype(x.dtype):
        # torch's own backward adds up all positions in fp32 one after the other where the channels
        # are last in memory; autograd's sums of these steps do it in a tree.
        y = torch.addcmul(bias, x - mean, weight * torch.rsqrt(variance + eps))
    else:
        y = F.batch_norm(x.contiguous().permute(0, 3, 1, 2), mean, variance, weight, bias, eps=eps)
        y = y.permute(0, 2, 3, 1)
    if residual is not None:
        y = residual.to(y.dtype) + y
    return F.relu(y) if relu else y
