"""A whole VSS block as one op, and in inference several: a small batch waits for Python."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.ss2d_scan.op import count_flops
from vmamba_mm.ops.vss_block import cuda
from vmamba_mm.ops.vss_block.weights import NUM_WEIGHTS, Weights, spread_weights

_CONV_BIAS = 1 + Weights._fields.index('conv_bias')  # of the inputs, the first of which is x


@register('vss_block', fake=lambda x, *args: x.new_empty(x.shape, dtype=args[-1]))
def _inference(x: Tensor, weights: list[Tensor | None], eps: float, dtype: torch.dtype,
               out_dtype: torch.dtype) -> Tensor:
    """``weights``: the fields of :class:`Weights` of one block after the other."""
    return cuda.forward(x, weights, (None, None), eps, dtype, out_dtype, save=False)[0]


@spread_weights
def _backward_fake(grad, x, weights, scale1, scale2, saved, eps):
    return (x.new_empty(x.shape),
            *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in weights))


@register('vss_block_bwd', fake=_backward_fake)
@spread_weights
def _run_backward(grad: Tensor, x: Tensor, weights: Weights, scale1: Tensor | None,
                  scale2: Tensor | None, saved: Tensor, eps: float
                  ) -> tuple[(Tensor,) * (1 + NUM_WEIGHTS)]:
    """Gradients by x and the weights; an empty one by a bias that is None."""
    return cuda.backward(grad, x, weights, (scale1, scale2), saved, eps)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad):
    tensors = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
    *grads, dconv_bias = _run_backward(grad, *tensors, ctx.eps)
    if tensors[_CONV_BIAS] is None:
        dconv_bias = None
    return *grads, dconv_bias, None, None, None, None, None


@spread_weights
def _forward_fake(x, weights, scale1, scale2, eps, dtype, out_dtype):
    return (x.new_empty(x.shape, dtype=out_dtype),
            x.new_empty(cuda.saved_size(x, weights, dtype), dtype=dtype))


@register('vss_block_fwd', fake=_forward_fake, backward=_backward, setup_context=_setup_context)
@spread_weights
def _training(x: Tensor, weights: Weights, scale1: Tensor | None, scale2: Tensor | None,
              eps: float, dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result, and the slab that the backward needs beside the inputs."""
    return cuda.forward(x, weights, (scale1, scale2), eps, dtype, out_dtype, save=True)


def vss_block(x: Tensor, weights: Weights, scales: tuple[Tensor | None, Tensor | None],
              eps: float, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """``x + ss2d(norm(x))``, then ``x + mlp(norm(x))``, for inputs for which ``why_not`` is None.

    For its backward it keeps the input, both norms' results, the sum between, three maps within
    SS2D with the projected input, and what GELU takes; it calculates GELU, SiLU's input, the scan
    and the map that out_proj takes again.

    Args:
        x: (B, H, W, C), the residual sum.
        weights: the block's parameters.
        scales: (B), fp32, factors of the two branches, or None for 1.
        eps: of the three norms.
        dtype: of the matrix products, fp16 or bf16, or fp32, which ``x`` has then too.
        out_dtype: of the result.

    Returns:
        (B, H, W, C).
    """
    if wants_grad(x, *weights) or any(scale is not None for scale in scales):
        return _training(x, *weights, *scales, eps, dtype, out_dtype)[0]
    return vss_blocks(x, [weights], eps, dtype, out_dtype)


def vss_blocks(x: Tensor, blocks: list[Weights], eps: float, dtype: torch.dtype,
               out_dtype: torch.dtype) -> Tensor:
    """Blocks one after the other, without gradients: :func:`vss_block` of each, but that the sum at
    the end of one and the norm at the beginning of the next read a map once.

    Args:
        x, eps, dtype, out_dtype: as there; ``out_dtype`` of the last block.
        blocks: the parameters of each block, which all have the dtypes of the first.
    """
    return _inference(x, [t for weights in blocks for t in weights], eps, dtype, out_dtype)


def _block_flops(x_shape, weights: Weights) -> int:
    """``weights``: the shapes."""
    batch, height, width, dim = x_shape
    pixels, inner, hidden = batch * height * width, weights.in_proj[0], weights.fc1[0]
    return (2 * pixels * (2 * inner * dim + 9 * inner + 2 * hidden * dim)
            + count_flops((batch, inner, height, width), weights.x_proj, weights.dt_projs,
                          weights.A_logs))


@flop_formula('vss_block')
def _inference_flops(x_shape, shapes, *args, out_shape=None, **kwargs) -> int:
    return sum(_block_flops(x_shape, Weights._make(shapes[first:first + NUM_WEIGHTS]))
               for first in range(0, len(shapes), NUM_WEIGHTS))


@flop_formula('vss_block_fwd')
def _forward_flops(x_shape, *shapes, out_shape=None, **kwargs) -> int:
    return _block_flops(x_shape, Weights._make(shapes[:NUM_WEIGHTS]))


@flop_formula('vss_block_bwd')
def _backward_flops(grad_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * _forward_flops(*shapes)
