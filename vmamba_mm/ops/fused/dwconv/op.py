"""Depthwise 3x3 convolution with bias and SiLU on a channels-last map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.fused.dwconv import cuda


def _bwd_fake(grad, x, weight, bias):
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            weight.new_empty(0) if bias is None else torch.empty_like(bias))


@register('dwconv_silu_bwd', fake=_bwd_fake)
def _bwd(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
         ) -> tuple[Tensor, Tensor, Tensor]:
    return cuda.backward(grad, x, weight, bias)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
    dx, dweight, dbias = _bwd(grad, *saved)
    return dx, dweight, None if saved[2] is None else dbias


@register('dwconv_silu', fake=lambda x, weight, bias: x.new_empty(x.shape), backward=_backward,
          setup_context=_setup_context)
def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cuda.forward(x, weight, bias)


@flop_formula('dwconv_silu')
def _flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, dim = x_shape
    return 2 * 9 * batch * height * width * dim


@flop_formula('dwconv_silu_bwd')
def _bwd_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(grad_shape)


def dwconv_silu(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """SiLU of a depthwise 3x3 convolution, padded with zeros (SS2D in figure 3 of the paper).

    On an NVIDIA GPU one kernel, in fp32 from the weights as they are to the result; for its
    backward it keeps the inputs only. Elsewhere PyTorch's own convolution, with autocast.

    Args:
        x_BHWD: (B, H, W, D), any H and W; of any strides, best with the channels next to one
            another.
        weight: (D, 1, 3, 3).
        bias: (D), or None.

    Returns:
        (B, H, W, D) without gaps, in the dtype of ``x_BHWD``.

    Raises:
        ValueError: if the shapes do not fit one another.
    """
    dim = x_BHWD.shape[3] if x_BHWD.dim() == 4 else -1
    if weight.shape != (dim, 1, 3, 3) or bias is not None and bias.shape != (dim,):
        raise ValueError('dwconv_silu expects x (B, H, W, D), weight (D, 1, 3, 3) and bias (D) or '
                         f'None; got x {tuple(x_BHWD.shape)}, weight {tuple(weight.shape)}'
                         + ('' if bias is None else f', bias {tuple(bias.shape)}'))
    if cuda.why_not(x_BHWD, weight, bias) is None:
        return _fwd(x_BHWD, weight, bias)
    y = F.conv2d(x_BHWD.permute(0, 3, 1, 2), weight, bias, padding=1, groups=dim)
    return F.silu(y).to(x_BHWD.dtype).permute(0, 2, 3, 1)
