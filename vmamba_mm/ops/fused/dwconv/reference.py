"""``dwconv_silu`` and ``dwconv_add`` in plain PyTorch: their specification, and what runs where no
kernel does."""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.add_norm.reference import add_norm


def dwconv_silu(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D), as :func:`vmamba_mm.ops.dwconv_silu`."""
    y_BDHW = F.conv2d(x_BHWD.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return F.silu(y_BDHW).to(x_BHWD.dtype).permute(0, 2, 3, 1)


def dwconv_add(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None, branch: Tensor | None,
               scale: Tensor | None) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D), as :func:`vmamba_mm.ops.dwconv_add`."""
    x = x_BHWD
    if branch is not None:
        x = add_norm(x, branch, scale, None, None, 0.0, x.dtype)[0]
    y_BDHW = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return add_norm(x, y_BDHW.permute(0, 2, 3, 1), None, None, None, 0.0, x.dtype)[0]
