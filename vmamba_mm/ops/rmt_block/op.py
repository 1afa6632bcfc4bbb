"""A whole RMT block as one op: training waits for Python otherwise.

Which way a block goes is decided by the layer, once for the block; so the op asks nothing.
"""

from math import prod

import torch
from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.masa.op import FORMS
from vmamba_mm.ops.rmt_block import backward, cuda, reference
from vmamba_mm.ops.rmt_block.weights import NUM_WEIGHTS, Weights, gather_weights

_NAMES = ' '.join(Weights._fields)
# autograd does not look for tensors in a list: each is an argument of its own.
_ARGUMENTS = ', '.join(f'{"Tensor?" if name.startswith("gamma") else "Tensor"} {name}'
                       for name in Weights._fields)


def _count_flops(x, fc1, whole, **_) -> int:
    _, height, width, dim = x
    hidden, seen = fc1[0], height * width if whole else height + width
    of_pixel = dim * (9 + 4 * dim + 25 + 2 * seen) + hidden * (2 * dim + 9)
    return 2 * prod(x[:3]) * of_pixel


@gather_weights
def _fake(x, weights, decay, turns, scale1, scale2, whole, eps, dtype, save):
    size = cuda.saved_size(x, weights, decay, whole, dtype) if save else 0
    return x.new_empty(x.shape), x.new_empty(size, dtype=torch.uint8)


@gather_weights
def _forward(x, weights, decay, turns, scale1, scale2, whole, eps, dtype, save):
    """The result, and the slab that the backward needs beside the inputs."""
    return cuda.forward(x, weights, decay, turns, (scale1, scale2), whole, eps, dtype, save)


def _backward(grad, x, *args):
    weights, (decay, turns, scale1, scale2, saved, whole, eps, dtype) = (
        args[:NUM_WEIGHTS], args[NUM_WEIGHTS:])
    return backward.backward(grad, x, Weights._make(weights), decay, turns, (scale1, scale2),
                             saved, whole, eps, dtype)


_rmt_block = define_op(
    'rmt_block',
    f'(Tensor x, {_ARGUMENTS}, Tensor decay, Tensor turns, Tensor? scale1, Tensor? scale2, '
    'bool whole, float eps, ScalarType dtype, bool save) -> (Tensor y, Tensor saved)',
    reference=gather_weights(reference.rmt_block),
    fake=_fake,
    implementations={'cuda': Implementation(_forward, _backward, saves=True)},
    saves=f'x {_NAMES} decay turns scale1 scale2 saved whole eps dtype',
    no_grad='decay turns scale1 scale2',
    flops=_count_flops)


def rmt_block(x: Tensor, weights: Weights, decay: Tensor, turns: Tensor,
              scales: tuple[Tensor | None, Tensor | None], form: str, eps: float,
              dtype: torch.dtype) -> Tensor:
    """A block of RMT (arXiv 2309.11523, figure 3), for inputs for which ``why_not`` is None::

        x = x + conv(x)
        x = x + scale1 * gamma1 * attention(norm(x))
        x = x + scale2 * gamma2 * mlp(norm(x))

    For its backward it keeps the input, the sums that the norms take, the norms' results, queries,
    keys and values, what comes of the rows, what out takes, what GELU takes and what fc2 takes;
    with layer scale also the branches. It calculates GELU again.

    Args:
        x: (B, H, W, C), the residual sum.
        weights: the block's parameters.
        decay, turns, form: as of :func:`vmamba_mm.ops.masa`; the first two in fp32.
        scales: (B), fp32, factors of the last two branches, or None for 1.
        eps: of both norms.
        dtype: of the matrix products, fp16 or bf16, or fp32, which ``x`` has then too.

    Returns:
        (B, H, W, C), in the dtype of ``x``.

    :class:`vmamba_mm.models.rmt.RMTBlock` calls it where its ``why_not_one_op`` gives None.
    """
    return _rmt_block(x, *weights, decay, turns, *scales, form == FORMS[1], eps, dtype)
