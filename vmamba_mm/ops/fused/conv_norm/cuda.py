"""``conv_norm`` by cuDNN's convolution and the CUDA kernels ``add_norm.cu``, ``norm_bwd.cu`` and
``column_sums.cu``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.channels import why_not_channels
from vmamba_mm.ops.fused.mlp.cuda import column_sums


def why_not(x_BHWC: Tensor, weight: Tensor, *vectors: Tensor) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    return why_not_channels(x_BHWC, weight.shape[0], (weight, *vectors))


def _as_shift(bias: Tensor) -> Tensor:
    """``bias`` in fp32 and at a multiple of 16 bytes, as the kernels add it before a norm."""
    bias = bias.to(torch.float32).contiguous()
    return bias if bias.data_ptr() % 16 == 0 else bias.clone()


def forward(x, weight, bias, norm_weight, norm_bias, stride, padding, eps, out_dtype, save):
    """(normed, the convolution's result, moments), None for the last two unless ``save``."""
    weight = weight.to(x.dtype, memory_format=torch.channels_last)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding)
    y = y.permute(0, 2, 3, 1).contiguous()
    _, normed, moments = norm.forward(y, None, None, norm_weight, norm_bias, eps, out_dtype, save,
                                      _as_shift(bias))
    return normed, y if save else None, moments


def backward(grad, x, weight, bias, norm_weight, norm_bias, y, moments, stride, padding, wants_dx):
    """Gradients by x (empty unless ``wants_dx``) and the four parameters, in their dtypes."""
    dy, _, dnorm_weight, dnorm_bias = norm.backward(grad, y, moments, norm_weight, norm_bias, None,
                                                    None, None)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2),
        weight.to(x.dtype, memory_format=torch.channels_last), None, [stride] * 2, [padding] * 2,
        [1, 1], False, [0, 0], 1, [wants_dx, True, False])
    dx = dx.permute(0, 2, 3, 1).contiguous() if wants_dx else x.new_empty(0)
    dweight = torch.empty_like(weight).copy_(dweight)
    return dx, dweight, column_sums(dy.view(-1, dy.shape[3]), bias), dnorm_weight, dnorm_bias
