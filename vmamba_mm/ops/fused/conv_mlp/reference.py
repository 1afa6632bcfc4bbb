"""``conv_mlp`` in plain PyTorch: its specification, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.dwconv import dwconv_add


def conv_mlp(x: Tensor, w1: Tensor, b1: Tensor, conv_weight: Tensor, conv_bias: Tensor, w2: Tensor,
             b2: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C'), as :func:`vmamba_mm.ops.conv_mlp`."""
    hidden = F.gelu(F.linear(x, w1, b1))
    return F.linear(dwconv_add(hidden, conv_weight, conv_bias), w2, b2)
