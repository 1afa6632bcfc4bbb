"""A whole VSS block as one op, and in inference several: a small batch waits for Python."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.ss2d_scan.op import _fwd_flops
from vmamba_mm.ops.vss_block import cuda

_OWN = 18  # parameters of a block without the bias of its convolution


@register('vss_block', fake=lambda x, *args: x.new_empty(x.shape, dtype=args[-1]))
def _inference(x: Tensor, parameters: list[Tensor], conv_biases: list[Tensor], eps: float,
               dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """``parameters`` of one block after the other; no ``conv_biases``, or one for each block."""
    found = []
    for i in range(len(parameters) // _OWN):
        found += *parameters[i * _OWN:(i + 1) * _OWN], conv_biases[i] if conv_biases else None
    return cuda.forward(x, found, (None, None), eps, dtype, out_dtype, False)[0]


def _bwd_fake(grad, x, *args):
    parameters, conv_bias = args[:_OWN], args[_OWN]
    return (x.new_empty(x.shape), *(t.new_empty(t.shape) for t in parameters),
            parameters[0].new_empty(0 if conv_bias is None else conv_bias.shape))


@register('vss_block_bwd', fake=_bwd_fake)
def _bwd(grad: Tensor, x: Tensor, norm1: Tensor, norm1_bias: Tensor, in_proj: Tensor, conv: Tensor,
         x_proj: Tensor, dt_projs: Tensor, dt_bias: Tensor, A_logs: Tensor, D: Tensor,
         out_norm: Tensor, out_norm_bias: Tensor, out_proj: Tensor, norm2: Tensor,
         norm2_bias: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor,
         conv_bias: Tensor | None, scale1: Tensor | None, scale2: Tensor | None, saved: Tensor,
         eps: float
         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                    Tensor]:
    """Gradients by x and the parameters; an empty one by a bias that is None."""
    parameters = (norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_logs, D, out_norm,
                  out_norm_bias, out_proj, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias,
                  conv_bias)
    return cuda.backward(grad, x, parameters, (scale1, scale2), saved, eps)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:22], output[1])
    ctx.eps = inputs[22]


def _backward(ctx, grad):
    saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
    *grads, dconv_bias = _bwd(grad, *saved, ctx.eps)
    return *grads, None if saved[_OWN + 1] is None else dconv_bias, *[None] * 5


def _fwd_fake(x, *args):
    dtype, out_dtype = args[22:]
    return (x.new_empty(x.shape, dtype=out_dtype),
            x.new_empty(cuda.saved_size(x, args[:18], dtype), dtype=dtype))


@register('vss_block_fwd', fake=_fwd_fake, backward=_backward, setup_context=_setup_context)
def _training(x: Tensor, norm1: Tensor, norm1_bias: Tensor, in_proj: Tensor, conv: Tensor,
              x_proj: Tensor, dt_projs: Tensor, dt_bias: Tensor, A_logs: Tensor, D: Tensor,
              out_norm: Tensor, out_norm_bias: Tensor, out_proj: Tensor, norm2: Tensor,
              norm2_bias: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor,
              conv_bias: Tensor | None, scale1: Tensor | None, scale2: Tensor | None, eps: float,
              dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result, and the slab that the backward needs beside the inputs."""
    parameters = (norm1, norm1_bias, in_proj, conv, x_proj, dt_projs, dt_bias, A_logs, D, out_norm,
                  out_norm_bias, out_proj, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias,
                  conv_bias)
    return cuda.forward(x, parameters, (scale1, scale2), eps, dtype, out_dtype, True)


def vss_block(x: Tensor, parameters: tuple[Tensor, ...], conv_bias: Tensor | None,
              scales: tuple[Tensor | None, Tensor | None], eps: float, dtype: torch.dtype,
              out_dtype: torch.dtype) -> Tensor:
    """``x + ss2d(norm(x))``, then ``x + mlp(norm(x))``, for inputs for which ``why_not`` is None.

    For its backward it keeps the input, both norms' results, the sum between, three maps within
    SS2D with the projected input, and what GELU takes; it calculates GELU, SiLU's input, the scan
    and the map that out_proj takes again.

    Args:
        x: (B, H, W, C), the residual sum.
        parameters: weight and bias of the first norm, in_proj (D, C), weight of the convolution,
            x_proj, dt_projs and its bias, A_logs (K*D, 1), D, weight and bias of out_norm,
            out_proj (C, D), those of the second norm, of fc1 and of fc2.
        conv_bias: (D), or None.
        scales: (B), fp32, factors of the two branches, or None for 1.
        eps: of the three norms.
        dtype: of the matrix products, fp16 or bf16, or fp32, which ``x`` has then too.
        out_dtype: of the result.

    Returns:
        (B, H, W, C).
    """
    if wants_grad(x, *parameters) or any(scale is not None for scale in scales):
        return _training(x, *parameters, conv_bias, *scales, eps, dtype, out_dtype)[0]
    return vss_blocks(x, [parameters], [] if conv_bias is None else [conv_bias], eps, dtype,
                      out_dtype)


def vss_blocks(x: Tensor, parameters: list[tuple[Tensor, ...]], conv_biases: list[Tensor],
               eps: float, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """Blocks one after the other, without gradients: :func:`vss_block` of each, but that the sum at
    the end of one and the norm at the beginning of the next read a map once.

    Args:
        x, eps, dtype, out_dtype: as there; ``out_dtype`` of the last block.
        parameters: of each block, in the same dtypes, each of which takes ``x``.
        conv_biases: of each block, or none.
    """
    return _inference(x, [t for own in parameters for t in own], conv_biases, eps, dtype, out_dtype)


def _block_flops(x_shape, in_proj, x_proj, dt_projs, A_logs, fc1) -> int:
    batch, height, width, dim = x_shape
    pixels, inner = batch * height * width, in_proj[0]
    return (2 * pixels * (2 * inner * dim + 9 * inner + 2 * fc1[0] * dim)
            + _fwd_flops((batch, inner, height, width), x_proj, dt_projs, None, A_logs))


@flop_formula('vss_block')
def _flops(x_shape, shapes, *args, out_shape=None, **kwargs) -> int:
    return sum(_block_flops(x_shape, *(shapes[first + i] for i in (2, 4, 5, 7, 14)))
               for first in range(0, len(shapes) - _OWN + 1, _OWN))


@flop_formula('vss_block_fwd')
def _training_flops(x_shape, *shapes, out_shape=None, **kwargs) -> int:
    return _flops(x_shape, shapes)


@flop_formula('vss_block_bwd')
def _bwd_flops(grad_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * _training_flops(*shapes)
