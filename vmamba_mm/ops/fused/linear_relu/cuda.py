"""``linear_relu`` by a product of cuBLAS, which adds the bias and applies ReLU itself, and the CUDA
kernels ``cast.cu`` and ``column_sums.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.torch_private import addmm_activation
from vmamba_mm.ops.fused.cast import cast
from vmamba_mm.ops.fused.channels import why_not_channels
from vmamba_mm.ops.fused.mlp.cuda import column_sums
from vmamba_mm.ops.scan_kernels.cuda import dense


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if torch.compiler.is_compiling():
        return 'torch.compile has better kernels of its own'
    if addmm_activation is None:
        return 'this torch has no product with an activation'
    if x.dtype == torch.float32 and autocast_dtype(x):
        return 'autocast rounds its input first'
    return why_not_channels(x, weight.shape[0], (weight, bias))


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight, bias = cast([weight, bias], x.dtype)
    y = addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.T)
    return y.view(*x.shape[:-1], -1)


def backward(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor
             ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias, in their dtypes."""
    factor, = cast([weight], x.dtype)
    inner = dense(torch.ops.aten.threshold_backward(grad, y, 0).view(-1, y.shape[-1]))
    dweight = torch.mm(inner.T, x.reshape(-1, x.shape[-1])).to(weight.dtype)
    return torch.mm(inner, factor).view(x.shape), dweight, column_sums(inner, bias)
