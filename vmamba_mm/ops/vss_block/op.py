"""A whole VSS block as one op, and in inference several: a small batch waits for Python."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.define_op import Implementation, define_op, register
from vmamba_mm.ops.ss2d_scan.op import count_flops
from vmamba_mm.ops.vss_block import cuda, reference
from vmamba_mm.ops.vss_block.weights import NUM_WEIGHTS, Weights

# Autograd does not look for tensors in a list, so a block that is trained has an argument for each.
_ARGUMENTS = ', '.join(f'Tensor{"?" if name == "conv_bias" else ""} {name}'
                       for name in Weights._fields)
_CONV_BIAS = 1 + Weights._fields.index('conv_bias')  # of the inputs, the first of which is x


def _each_block(weights: list) -> list[Weights]:
    """The weights, or their shapes, of blocks whose fields come one after the other."""
    return [Weights._make(weights[first:first + NUM_WEIGHTS])
            for first in range(0, len(weights), NUM_WEIGHTS)]


def _count_block_flops(x, weights: Weights) -> int:
    """FLOPs of a forward, from shapes."""
    batch, height, width, dim = x
    pixels, inner, hidden = batch * height * width, weights.in_proj[0], weights.fc1[0]
    return (2 * pixels * (2 * inner * dim + 9 * inner + 2 * hidden * dim)
            + count_flops((batch, inner, height, width), weights.x_proj, weights.dt_projs,
                          weights.A_logs))


# --- several blocks, without gradients ------------------------------------------------------------

def _refer_to_blocks(x, weights, eps, dtype, out_dtype):
    blocks = _each_block(weights)
    for block in blocks[:-1]:
        x = reference.vss_block(x, block, None, None, eps, dtype, x.dtype)
    return reference.vss_block(x, blocks[-1], None, None, eps, dtype, out_dtype)


_inference = define_op(
    'vss_block',
    '(Tensor x, Tensor?[] weights, float eps, ScalarType dtype, ScalarType out_dtype) -> Tensor',
    reference=_refer_to_blocks,
    fake=lambda x, weights, eps, dtype, out_dtype: x.new_empty(x.shape, dtype=out_dtype),
    implementations={'cuda': Implementation(
        lambda x, weights, eps, dtype, out_dtype: cuda.forward(
            x, weights, (None, None), eps, dtype, out_dtype, save=False)[0])},
    flops=lambda x, weights, **_: sum(_count_block_flops(x, block)
                                      for block in _each_block(weights)))


# --- a block, and its backward --------------------------------------------------------------------

def _refer_to_block(x, *args):
    return reference.vss_block(x, Weights._make(args[:NUM_WEIGHTS]), *args[NUM_WEIGHTS:])


def _forward(x, *args):
    """The result, and the slab that the backward needs beside the inputs."""
    scale1, scale2, *settings = args[NUM_WEIGHTS:]
    return cuda.forward(x, Weights._make(args[:NUM_WEIGHTS]), (scale1, scale2), *settings, True)


def _forward_fake(x, *args):
    dtype, out_dtype = args[-2:]
    size = cuda.saved_size(x, Weights._make(args[:NUM_WEIGHTS]), dtype)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(size, dtype=dtype)


def _run_backward(grad, x, *args):
    scale1, scale2, saved, eps = args[NUM_WEIGHTS:]
    return cuda.backward(grad, x, Weights._make(args[:NUM_WEIGHTS]), (scale1, scale2), saved, eps)


def _backward_fake(grad, x, *args):
    return (x.new_empty(x.shape),
            *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:NUM_WEIGHTS]))


# Gradients by x and the weights; an empty one by a bias that is None.
_call_backward = register(
    'vss_block_bwd',
    f'(Tensor grad, Tensor x, {_ARGUMENTS}, Tensor? scale1, Tensor? scale2, Tensor saved, '
    f'float eps) -> ({", ".join(["Tensor"] * (1 + NUM_WEIGHTS))})',
    _run_backward, fake=_backward_fake,
    flops=lambda grad, x, *shapes: 2 * _count_block_flops(x, Weights._make(shapes[:NUM_WEIGHTS])))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad):
    tensors = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
    *grads, dconv_bias = _call_backward(grad, *tensors, ctx.eps)
    if tensors[_CONV_BIAS] is None:
        dconv_bias = None
    return *grads, dconv_bias, None, None, None, None, None


_training = define_op(
    'vss_block_fwd',
    f'(Tensor x, {_ARGUMENTS}, Tensor? scale1, Tensor? scale2, float eps, ScalarType dtype, '
    'ScalarType out_dtype) -> (Tensor y, Tensor saved)',
    reference=_refer_to_block,
    fake=_forward_fake,
    implementations={'cuda': Implementation(_forward, saves=True)},
    no_grad='scale1 scale2',
    setup_context=_setup_context,
    backward=_backward,
    flops=lambda x, **shapes: _count_block_flops(
        x, Weights._make(shapes[name] for name in Weights._fields)))


# --- the public functions -------------------------------------------------------------------------

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
        return _training(x, *weights, *scales, eps, dtype, out_dtype)
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
