"""``linear_relu`` in plain PyTorch: its specification, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., C'), as :func:`vmamba_mm.ops.linear_relu`."""
    return F.relu(F.linear(x, weight, bias))
