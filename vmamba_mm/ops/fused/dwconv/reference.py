"""``dwconv_silu`` in plain PyTorch: its specification, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor


def dwconv_silu(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D), as :func:`vmamba_mm.ops.dwconv_silu`."""
    y_BDHW = F.conv2d(x_BHWD.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return F.silu(y_BDHW).to(x_BHWD.dtype).permute(0, 2, 3, 1)
