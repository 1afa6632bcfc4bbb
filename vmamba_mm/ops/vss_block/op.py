"""A whole VSS block as one op, and in inference several: a small batch waits for Python.

Which way a block goes is decided by the layer, once for the block or the stage; so the ops ask
nothing.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.ss2d_scan.op import count_flops
from vmamba_mm.ops.vss_block import cuda, reference
from vmamba_mm.ops.vss_block.weights import OF_MLP, Weights, gather_weights

_NAMES = ' '.join(Weights._fields)
# autograd does not look for tensors in a list: each is an argument of its own.
_OPTIONAL = *OF_MLP, 'conv_bias'
_ARGUMENTS = ', '.join(f'{"Tensor?" if name in _OPTIONAL else "Tensor"} {name}'
                       for name in Weights._fields)


def _count_flops(x, in_proj, x_proj, dt_projs, A_logs, fc1, **_) -> int:
    batch, height, width, dim = x
    pixels, inner, hidden = batch * height * width, dt_projs[1], 0 if fc1 is None else fc1[0]
    return (2 * pixels * ((in_proj[0] + inner) * dim + 9 * inner + 2 * hidden * dim)
            + count_flops((batch, inner, height, width), x_proj, dt_projs, A_logs))


def _join(blocks: list[Weights]) -> tuple[list[Tensor], bool, bool]:
    """The weights of one block after the other, and whether they have those of an MLP and biases of
    the convolution: torch.jit.trace takes no None in a list."""
    first = blocks[0]
    has = first.fc1 is not None, first.conv_bias is not None
    if all(has):
        return [t for weights in blocks for t in weights], *has
    return [t for weights in blocks for t in weights if t is not None], *has


def _split(weights: list[Tensor], has_mlp: bool, has_conv_bias: bool) -> list[Weights]:
    """The reverse of :func:`_join`."""
    absent = dict.fromkeys((() if has_mlp else OF_MLP) + (() if has_conv_bias else ('conv_bias',)))
    names = [name for name in Weights._fields if name not in absent]
    return [Weights(**dict(zip(names, weights[first:first + len(names)], strict=True)), **absent)
            for first in range(0, len(weights), len(names))]


def _forward_of_blocks(x, weights, has_mlp, has_conv_bias, *rest):
    if not (has_mlp and has_conv_bias):
        weights = [t for block in _split(weights, has_mlp, has_conv_bias) for t in block]
    return cuda.forward(x, weights, (None, None), *rest, save=False)[0]


def _reference_of_blocks(x, weights, has_mlp, has_conv_bias, eps, dtype, out_dtype):
    blocks = _split(weights, has_mlp, has_conv_bias)
    for block in blocks:
        x = reference.vss_block(x, block, None, None, eps, dtype,
                                out_dtype if block is blocks[-1] else x.dtype)
    return x


_vss_blocks = define_op(
    'vss_block',
    '(Tensor x, Tensor[] weights, bool has_mlp, bool has_conv_bias, float eps, ScalarType dtype, '
    'ScalarType out_dtype) -> Tensor',
    reference=_reference_of_blocks,
    fake=lambda x, weights, has_mlp, has_conv_bias, eps, dtype, out_dtype: x.new_empty(
        x.shape, dtype=out_dtype),
    implementations={'cuda': Implementation(_forward_of_blocks)},
    flops=lambda x, weights, has_mlp, has_conv_bias, **_: sum(
        _count_flops(x, **block._asdict()) for block in _split(weights, has_mlp, has_conv_bias)))


@gather_weights
def _fake(x, weights, scale1, scale2, eps, dtype, out_dtype):
    return (x.new_empty(x.shape, dtype=out_dtype),
            x.new_empty(cuda.saved_size(x, weights, dtype), dtype=dtype))


@gather_weights
def _forward(x, weights, scale1, scale2, eps, dtype, out_dtype):
    """The result, and the slab that the backward needs beside the inputs."""
    return cuda.forward(x, weights, (scale1, scale2), eps, dtype, out_dtype, save=True)


def _backward(grad, *args):
    return _gathered_backward(*args, grad)


@gather_weights
def _gathered_backward(x, weights, scale1, scale2, saved, eps, grad):
    """Gradients by x and the weights; an empty one by a bias that is None."""
    return cuda.backward(grad, x, weights, (scale1, scale2), saved, eps)


_vss_block_fwd = define_op(
    'vss_block_fwd',
    f'(Tensor x, {_ARGUMENTS}, Tensor? scale1, Tensor? scale2, float eps, ScalarType dtype, '
    'ScalarType out_dtype) -> (Tensor y, Tensor saved)',
    reference=gather_weights(reference.vss_block),
    fake=_fake,
    implementations={'cuda': Implementation(_forward, _backward, saves=True)},
    saves=f'x {_NAMES} scale1 scale2 saved eps',
    no_grad='scale1 scale2',
    flops=_count_flops)


def vss_block(x: Tensor, weights: Weights, scales: tuple[Tensor | None, Tensor | None],
              eps: float, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """``x + ss2d(norm(x))``, then ``x + mlp(norm(x))`` if there is an MLP, for inputs for which
    ``why_not`` is None.

    For its backward it keeps the input, both norms' results, the sum between, three maps within
    SS2D, the gate and the projected input, for N > 1 a state for each 24 positions, and what GELU
    takes; it calculates GELU, SiLU and its inputs, the scan and the map that out_proj takes again.

    Args:
        x: (B, H, W, C), the residual sum.
        weights: the block's parameters; in_proj of twice as many columns as there are inner
            channels has those of a gate after them, and what out_proj takes is multiplied by SiLU
            of it. N is 16 at most.
        scales: (B), fp32, factors of the two branches, or None for 1.
        eps: of all norms.
        dtype: of the matrix products, fp16 or bf16, or fp32, which ``x`` has then too.
        out_dtype: of the result.

    Returns:
        (B, H, W, C).

    :class:`vmamba_mm.layers.VSSBlock` calls it where its ``why_not_one_op`` gives None.
    """
    if wants_grad(x, *weights) or any(scale is not None for scale in scales):
        return _vss_block_fwd(x, *weights, *scales, eps, dtype, out_dtype)
    return vss_blocks(x, [weights], eps, dtype, out_dtype)


def vss_blocks(x: Tensor, blocks: list[Weights], eps: float, dtype: torch.dtype,
               out_dtype: torch.dtype) -> Tensor:
    """Blocks one after the other, without gradients: :func:`vss_block` of each, but that the sum at
    the end of one and the norm at the beginning of the next read a map once.

    Args:
        x, eps, dtype, out_dtype: as there; ``out_dtype`` of the last block.
        blocks: the parameters of each block, which all have the dtypes of the first.
    """
    return _vss_blocks(x, *_join(blocks), eps, dtype, out_dtype)
