"""The op ``conv_norm_gelu``: the first convolution of a stem, its LayerNorm and GELU."""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype, wants_grad
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.conv_norm.op import channels_last, check_input, conv_norm
from vmamba_mm.ops.fused.stem import cuda, reference


def _fake(x, weight, bias, norm_weight, norm_bias, eps, out_dtype):
    batch, _, height, width = x.shape
    return x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, weight.shape[0]),
                       dtype=out_dtype)


def _why_not(x, weight, bias, norm_weight, norm_bias, eps, out_dtype) -> str | None:
    leaves = weight, bias, norm_weight, norm_bias
    if wants_grad(x, *leaves):
        return 'a gradient is wanted, and the kernel has none'
    return cuda.why_not(x, out_dtype, *leaves)


def _count_flops(x, weight, **_) -> int:
    batch, channels, height, width = x
    return 2 * 9 * batch * ((height + 1) // 2) * ((width + 1) // 2) * channels * weight[0]


_conv_norm_gelu = define_op(
    'conv_norm_gelu',
    '(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, '
    'ScalarType out_dtype) -> Tensor',
    reference=reference.conv_norm_gelu,
    fake=_fake,
    implementations={'cuda': Implementation(cuda.forward, why_not=_why_not)},
    flops=_count_flops)


def _step_by_step(x_BCHW, weight, bias, norm_weight, norm_bias, eps, out_dtype) -> Tensor:
    """The stem by :func:`conv_norm`, which has kernels for training, and GELU."""
    return F.gelu(conv_norm(channels_last(x_BCHW), weight, bias, norm_weight, norm_bias, eps,
                            stride=2, padding=1, out_dtype=out_dtype))


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

    Raises:
        ValueError: if the images have another number of channels than the weight takes, or it is
            not of 3x3.

    Example:
        >>> x, weight, ones = torch.randn(2, 3, 9, 9), torch.randn(16, 3, 3, 3), torch.ones(16)
        >>> conv_norm_gelu(x, weight, ones, ones, ones).shape
        torch.Size([2, 5, 5, 16])
    """
    check_input((*x_BCHW.shape[:1], *x_BCHW.shape[2:], *x_BCHW.shape[1:2]), weight, bias,
                norm_weight, norm_bias)
    if weight.shape[2:] != (3, 3):
        raise ValueError("conv_norm_gelu expects a weight (C', C, 3, 3), got "
                         f'{tuple(weight.shape)}')
    return _conv_norm_gelu(x_BCHW, weight, bias, norm_weight, norm_bias, eps,
                           autocast_dtype(x_BCHW) or x_BCHW.dtype, otherwise=_step_by_step)
