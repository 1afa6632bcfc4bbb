"""``conv_norm_gelu`` in plain PyTorch: its specification."""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.conv_norm.reference import conv_norm


def conv_norm_gelu(x_BCHW, weight, bias, norm_weight, norm_bias, eps, out_dtype) -> Tensor:
    """(B, C, H, W) -> (B, ceil(H/2), ceil(W/2), C'), as :func:`vmamba_mm.ops.conv_norm_gelu`."""
    return F.gelu(conv_norm(x_BCHW.permute(0, 2, 3, 1), weight, bias, norm_weight, norm_bias, 2, 1,
                            eps, out_dtype))
