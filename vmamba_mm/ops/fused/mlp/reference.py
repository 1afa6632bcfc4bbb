"""``mlp`` in plain PyTorch: its specification, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """(..., C) -> (..., C'), as :func:`vmamba_mm.ops.mlp`."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
