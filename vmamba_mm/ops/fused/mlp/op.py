"""Linear, GELU, Linear on the last dimension, planned for training memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.fused.mlp import cuda


def _bwd_fake(grad, x, inner, w1, b1, w2, b2):
    return x.new_empty(x.shape), *(t.new_empty(t.shape) for t in (w1, b1, w2, b2))


@register('mlp_bwd', fake=_bwd_fake)
def _bwd(grad: Tensor, x: Tensor, inner: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cuda.backward(grad, x, inner, w1, b1, w2, b2)


def _setup_context(ctx, inputs, output):
    x, *parameters, _ = inputs
    ctx.save_for_backward(x, output[1], *parameters)


def _backward(ctx, grad):
    return *_bwd(grad, *ctx.saved_tensors), None


def _fwd_fake(x, w1, b1, w2, b2, save):
    rows = x.numel() // x.shape[-1]
    return (x.new_empty((*x.shape[:-1], w2.shape[0])),
            x.new_empty((rows, w1.shape[0]) if save else (0,)))


@register('mlp', fake=_fwd_fake, backward=_backward, setup_context=_setup_context)
def _fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: bool
         ) -> tuple[Tensor, Tensor]:
    """The result, and GELU's input if ``save``."""
    return cuda.forward(x, w1, b1, w2, b2, save)


@flop_formula('mlp')
def _flops(x_shape, w1_shape, b1_shape, w2_shape, *args, out_shape=None, **kwargs) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * (w1_shape[0] * w1_shape[1] + w2_shape[0] * w2_shape[1])


@flop_formula('mlp_bwd')
def _bwd_flops(grad_shape, x_shape, inner_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * _flops(x_shape, *shapes)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``linear(gelu(linear(x, w1, b1)), w2, b2)``.

    On an NVIDIA GPU its backward keeps the input and what GELU takes, and calculates GELU again;
    torch.compile and other devices have PyTorch's own ops.

    Args:
        x: (..., C).
        w1, b1: (H, C), (H).
        w2, b2: (C', H), (C').

    Returns:
        (..., C') in the dtype of ``x``, or autocast's.
    """
    if torch.compiler.is_compiling() or cuda.why_not(x, w1, b1, w2, b2) is not None:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    return _fwd(x, w1, b1, w2, b2, wants_grad(x, w1, b1, w2, b2))[0]
