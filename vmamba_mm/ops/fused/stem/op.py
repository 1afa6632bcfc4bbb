"""The first convolution of a stem, its LayerNorm and GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype, wants_grad
from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.fused.conv_norm.op import channels_last, conv_norm
from vmamba_mm.ops.fused.stem import cuda


def _fake(x, weight, bias, norm_weight, norm_bias, eps, out_dtype):
    batch, _, height, width = x.shape
    return x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, weight.shape[0]),
                       dtype=out_dtype)


@register('conv_norm_gelu', fake=_fake)
def _inference(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
               eps: float, out_dtype: torch.dtype) -> Tensor:
    return cuda.forward(x, weight, bias, norm_weight, norm_bias, eps, out_dtype)


@flop_formula('conv_norm_gelu')
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    batch, channels, height, width = x_shape
    return 2 * 9 * batch * ((height + 1) // 2) * ((width + 1) // 2) * channels * weight_shape[0]


def conv_norm_gelu(x_BCHW: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
                   norm_bias: Tensor, eps: float = 1e-5) -> Tensor:
    """GELU of the LayerNorm over the channels of a 3x3 convolution of stride 2, padded by 1.

    On an NVIDIA GPU, where no gradient is wanted, images of 3 channels in half precision or under
    autocast take one kernel, which calculates in fp32 and rounds once.

    Args:
        x_BCHW: (B, C, H, W), of any strides.
        weight: (C', C, 3, 3).
        bias, norm_weight, norm_bias: (C').
        eps: of the norm.

    Returns:
        (B, ceil(H/2), ceil(W/2), C'), in autocast's dtype or that of ``x_BCHW``.
    """
    leaves = x_BCHW, weight, bias, norm_weight, norm_bias
    out_dtype = autocast_dtype(x_BCHW) or x_BCHW.dtype
    if wants_grad(*leaves) or cuda.why_not(x_BCHW, out_dtype, *leaves[1:]) is not None:
        return F.gelu(conv_norm(channels_last(x_BCHW), *leaves[1:], eps, stride=2, padding=1,
                                out_dtype=autocast_dtype(x_BCHW)))
    return _inference(*leaves, eps, out_dtype)
