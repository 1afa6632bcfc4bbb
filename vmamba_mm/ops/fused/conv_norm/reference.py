"""``conv_norm`` in plain PyTorch: its specification, and what runs where no kernel does."""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.add_norm.reference import layer_norm


def conv_norm(x_BHWC, weight, bias, norm_weight, norm_bias, stride, padding, eps, out_dtype
              ) -> Tensor:
    """(B, H, W, C) -> (B, H', W', C'), as :func:`vmamba_mm.ops.conv_norm`."""
    y_BCHW = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, bias, stride, padding)
    return layer_norm(y_BCHW.permute(0, 2, 3, 1), norm_weight, norm_bias, eps).to(out_dtype)
