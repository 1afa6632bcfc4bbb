"""``conv_mlp`` by torch's matrix products and the CUDA kernels of ``mlp`` and ``dwconv_add``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.fused.cast import cast
from vmamba_mm.ops.fused.channels import why_not_channels
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.mlp.cuda import column_sums
from vmamba_mm.ops.fused.mlp.hidden import gelu_launch, hidden_layer
from vmamba_mm.ops.scan_kernels.cuda import dense


def why_not(x: Tensor, *parameters: Tensor) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if torch.compiler.is_compiling():
        return 'torch.compile has better kernels of its own'
    if x.dtype == torch.float32 and autocast_dtype(x):
        return 'autocast rounds its input first'
    return (why_not_channels(x, parameters[0].shape[0], parameters)
            or why_not_channels(x, parameters[4].shape[0], ()))


def forward(x, w1, b1, conv_weight, conv_bias, w2, b2, save) -> tuple[Tensor, Tensor, Tensor]:
    """The result; for the backward what GELU and what the last product takes; empty unless
    ``save``."""
    w1, b1, w2, b2 = cast([w1, b1, w2, b2], x.dtype)
    inner, hidden = hidden_layer(x, w1, b1, save)
    mixed = dwconv.forward_add(hidden.view(*x.shape[:-1], -1), conv_weight, conv_bias, None, None)
    y = torch.addmm(b2, mixed.view(inner.shape), w2.T).view(*x.shape[:-1], -1)
    if save:
        return y, inner, mixed
    return y, x.new_empty(0), x.new_empty(0)


def backward(grad, x, w1, b1, conv_weight, conv_bias, w2, b2, inner, mixed):
    """Gradients by x and the parameters, in their dtypes."""
    half_w1, half_w2 = cast([w1, w2], x.dtype)
    grad, flat = dense(grad.reshape(-1, grad.shape[-1])), x.reshape(-1, x.shape[-1])
    dw2 = torch.mm(grad.T, mixed.view(inner.shape)).to(w2.dtype)
    dmixed, hidden = torch.mm(grad, half_w2), torch.empty_like(inner)
    gelu_launch(x.get_device(), x.dtype, inner.numel())(x=inner.data_ptr(), y=hidden.data_ptr())
    dhidden, dconv, dconv_bias, _ = dwconv.backward_add(
        dmixed.view(mixed.shape), hidden.view(mixed.shape), conv_weight, conv_bias, None, None)
    dinner = dhidden.view(inner.shape)
    db1 = column_sums(dinner, b1, inner, hidden)
    return (torch.mm(dinner, half_w1).view(x.shape), torch.mm(dinner.T, flat).to(w1.dtype), db1,
            dconv, dconv_bias, dw2, column_sums(grad, b2))
