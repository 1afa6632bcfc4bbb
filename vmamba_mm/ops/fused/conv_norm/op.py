"""A convolution and the LayerNorm over the channels of its result."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype, wants_grad
from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.fused.add_norm.op import layer_norm
from vmamba_mm.ops.fused.conv_norm import cuda


def _shape(x_shape, weight_shape, stride, padding) -> tuple[int, ...]:
    """Of the result."""
    height, width = ((size + 2 * padding - kernel) // stride + 1
                     for size, kernel in zip(x_shape[1:3], weight_shape[2:], strict=True))
    return x_shape[0], height, width, weight_shape[0]


def _bwd_fake(grad, x, weight, bias, norm_weight, norm_bias, y, moments, stride, padding,
              wants_dx):
    return (x.new_empty(x.shape if wants_dx else (0,)),
            *(torch.empty_like(t) for t in (weight, bias, norm_weight, norm_bias)))


@register('conv_norm_bwd', fake=_bwd_fake)
def _bwd(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
         norm_bias: Tensor, y: Tensor, moments: Tensor, stride: int, padding: int, wants_dx: bool
         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cuda.backward(grad, x, weight, bias, norm_weight, norm_bias, y, moments, stride,
                         padding, wants_dx)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.stride, ctx.padding = inputs[5:7]


def _backward(ctx, grad):
    wants_dx = ctx.needs_input_grad[0]
    dx, *grads = _bwd(grad, *ctx.saved_tensors, ctx.stride, ctx.padding, wants_dx)
    return dx if wants_dx else None, *grads, *[None] * 5


def _fwd_fake(x, weight, bias, norm_weight, norm_bias, stride, padding, eps, out_dtype, save):
    shape = _shape(x.shape, weight.shape, stride, padding)
    return (x.new_empty(shape, dtype=out_dtype), x.new_empty(shape if save else (0,)),
            x.new_empty((shape[0] * shape[1] * shape[2] if save else 0, 2), dtype=torch.float32))


@register('conv_norm', fake=_fwd_fake, backward=_backward, setup_context=_setup_context)
def _fwd(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
         stride: int, padding: int, eps: float, out_dtype: torch.dtype, save: bool
         ) -> tuple[Tensor, Tensor, Tensor]:
    """The norm; for the backward what it takes, and its moments; empty unless ``save``."""
    normed, y, moments = cuda.forward(x, weight, bias, norm_weight, norm_bias, stride, padding, eps,
                                      out_dtype, save)
    return (normed, x.new_empty(0) if y is None else y,
            x.new_empty((0, 2), dtype=torch.float32) if moments is None else moments)


@flop_formula('conv_norm')
def _flops(x_shape, weight_shape, bias_shape, norm_shape, other_shape, stride, padding, *args,
           out_shape=None, **kwargs) -> int:
    batch, height, width, out = _shape(x_shape, weight_shape, stride, padding)
    _, channels, rows, columns = weight_shape
    return 2 * batch * height * width * out * channels * rows * columns


@flop_formula('conv_norm_bwd')
def _bwd_flops(grad_shape, x_shape, weight_shape, bias_shape, norm_shape, other_shape, y_shape,
               moments_shape, stride, padding, wants_dx, *args, out_shape=None, **kwargs) -> int:
    return (1 + wants_dx) * _flops(x_shape, weight_shape, bias_shape, norm_shape, other_shape,
                                   stride, padding)


def channels_last(x_BCHW: Tensor) -> Tensor:
    """Images as :func:`conv_norm` takes them, (B, H, W, C), by one copy at most."""
    dtype = autocast_dtype(x_BCHW) if x_BCHW.dtype == torch.float32 else None
    # On the permuted map, since vmap does not know memory_format=torch.channels_last.
    return x_BCHW.permute(0, 2, 3, 1).to(dtype or x_BCHW.dtype,
                                         memory_format=torch.contiguous_format)


def conv_norm(x_BHWC: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
              norm_bias: Tensor, eps: float = 1e-5, *, stride: int, padding: int = 0,
              out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the channels of a convolution's result.

    On an NVIDIA GPU the bias is added where the norm reads the map.

    Args:
        x_BHWC: (B, H, W, C), under autocast rounded to its dtype.
        weight: (C', C, kernel height, kernel width).
        bias, norm_weight, norm_bias: (C').
        eps: of the norm.
        stride, padding: of the convolution, both ways.
        out_dtype: as in :func:`vmamba_mm.ops.layer_norm`.

    Returns:
        (B, H', W', C').
    """
    autocast = autocast_dtype(x_BHWC)
    if cuda.why_not(x_BHWC, weight, bias, norm_weight, norm_bias) is not None:
        y = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, bias, stride, padding)
        return layer_norm(y.permute(0, 2, 3, 1), norm_weight, norm_bias, eps, out_dtype=out_dtype)
    x = x_BHWC.to(autocast or x_BHWC.dtype)
    leaves = (x, weight, bias, norm_weight, norm_bias)
    out_dtype = out_dtype or (torch.float32 if autocast else x.dtype)
    return _fwd(*leaves, stride, padding, eps, out_dtype, wants_grad(*leaves))[0]
