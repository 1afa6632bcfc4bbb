"""``expand_norm`` and ``merge_norm`` by the CUDA kernels ``add_norm.cu`` and ``norm_bwd.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.add_norm.cuda import EXPAND, MERGE, Patches
from vmamba_mm.ops.fused.channels import parameter_grads, why_not_channels
from vmamba_mm.ops.scan_kernels.cuda import dense


def why_not_expand(x: Tensor, weight: Tensor, bias: Tensor, factor: int) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    return _why_not(x, x.shape[1] * x.shape[2] * factor**2, weight, bias)


def why_not_merge(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if x.shape[3] % 4:
        return f'{x.shape[3]} channels; the kernels take multiples of 4'
    return _why_not(x, x.shape[1] * x.shape[2], weight, bias)


def _why_not(x: Tensor, pixels: int, weight: Tensor, bias: Tensor) -> str | None:
    """The same; ``pixels`` of the larger map."""
    if x.shape[0] * pixels >= 2**31:
        return 'the map has 2^31 pixels or more'
    return why_not_channels(x, weight.shape[0], (weight, bias))


def _patches_of_expand(x: Tensor, factor: int) -> Patches:
    return Patches(EXPAND, x.shape[1], x.shape[2], factor)


def _patches_of_merge(x: Tensor) -> Patches:
    return Patches(MERGE, x.shape[1], x.shape[2], 0)


def _forward(x, weight, bias, eps, out_dtype, save, patches, shape):
    """The norm of ``shape`` and, if ``save``, mean and 1 / deviation of its rows, else nothing."""
    x, weight = dense(x), weight.contiguous()
    bias = bias.to(weight.dtype).contiguous()
    normed, dim = x.new_empty(shape, dtype=out_dtype), len(weight)
    rows = normed.numel() // dim
    moments = x.new_empty((rows if save else 0, 2), dtype=torch.float32)
    if rows:
        norm.forward_launch(x.get_device(), x.dtype, None, out_dtype, weight.dtype, len(x),
                            rows // len(x), dim, patches=patches)(
            x=x.data_ptr(), weight=weight.data_ptr(), bias=bias.data_ptr(),
            normed=normed.data_ptr(), moments=moments.data_ptr() if save else 0, eps=eps)
    return normed, moments


def _backward(grad, x, weight, bias, moments, patches):
    """Gradients by x, weight and bias."""
    grad, x, dim = dense(grad), dense(x), len(weight)
    flat_weight = weight.contiguous()
    left_out = patches.order == MERGE and (patches.height % 2 or patches.width % 2)
    dx = x.new_zeros(x.shape) if left_out else x.new_empty(x.shape)
    dweight, dbias = (torch.empty_like(t, memory_format=torch.contiguous_format)
                      for t in (weight, bias))
    if grad.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    blocks, launch = norm.backward_launch(
        x.get_device(), grad.dtype, x.dtype, None, weight.dtype, len(x),
        grad.numel() // dim // len(x), dim, patches=patches)
    partials = x.new_empty((blocks, 2, dim), dtype=torch.float32)
    launch(grad=grad.data_ptr(), input=x.data_ptr(), moments=moments.data_ptr(),
           weight=flat_weight.data_ptr(), dinput=dx.data_ptr(), partials=partials.data_ptr())
    parameter_grads(partials, dweight, dbias, 1)
    return dx, dweight, dbias


def expand(x, weight, bias, factor, eps, out_dtype, save):
    shape = len(x), factor * x.shape[1], factor * x.shape[2], len(weight)
    return _forward(x, weight, bias, eps, out_dtype, save, _patches_of_expand(x, factor), shape)


def expand_backward(grad, x, weight, bias, moments, factor):
    return _backward(grad, x, weight, bias, moments, _patches_of_expand(x, factor))


def merge(x, weight, bias, eps, out_dtype, save):
    shape = len(x), x.shape[1] // 2, x.shape[2] // 2, len(weight)
    return _forward(x, weight, bias, eps, out_dtype, save, _patches_of_merge(x), shape)


def merge_backward(grad, x, weight, bias, moments):
    return _backward(grad, x, weight, bias, moments, _patches_of_merge(x))
