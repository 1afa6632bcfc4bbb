"""A Mamba block as one op, and in inference several: a small batch waits for Python.

Which way blocks go is decided by the layer, once for all of them; so the ops ask nothing.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.mamba_blocks import cuda, reference, training
from vmamba_mm.ops.mamba_blocks.weights import Direction, Weights, after_norm, flatten, split
from vmamba_mm.ops.selective_scan.op import scan_flops


def _fake(hidden, residual, weights, count, eps, scale, dtype):
    return (hidden.new_empty(hidden.shape, dtype=torch.float32),
            hidden.new_empty(hidden.shape, dtype=dtype))


def _count_flops(hidden, weights, count, **_) -> int:
    batch, length, dim = hidden
    total = 0
    for block in split(weights, count):
        total += 2 * batch * length * 3 * block.out_proj[1] * dim
        for conv, _, x_proj, dt_proj, _, A_log, _ in block.directions:
            inner, rank = dt_proj
            total += 2 * batch * length * inner * (conv[2] + x_proj[0] + rank)
            total += scan_flops(batch, inner, length, A_log[1])
    return total


_mamba_blocks = define_op(
    'mamba_blocks',
    '(Tensor hidden, Tensor? residual, Tensor[] weights, int count, float eps, float scale, '
    'ScalarType dtype) -> (Tensor residual, Tensor hidden)',
    reference=reference.mamba_blocks,
    fake=_fake,
    implementations={'cuda': Implementation(cuda.forward)},
    results=2,
    flops=_count_flops)


# autograd does not look for tensors in a list: each is an argument of its own. Those of a second
# direction are None where there is one, and so is the bias of an RMSNorm.
_SECOND = tuple(f'{name}_b' for name in Direction._fields)
_NAMES = (*Weights._fields[:-1], *Direction._fields, *_SECOND)
_ARGUMENTS = ', '.join(f'Tensor{"?" if name in ("norm_bias", *_SECOND) else ""} {name}'
                       for name in _NAMES)


def spread(weights: Weights) -> list:
    """The arguments of the op."""
    arguments = [*weights[:2], *after_norm(weights)]
    return [*arguments, *[None] * (len(_NAMES) - len(arguments))]


def _gather(arguments) -> Weights:
    """Of the arguments, or their shapes."""
    return next(split([t for t in arguments if t is not None], 1))


def _reference_of_block(hidden, residual, *args):
    weights, (eps, scale, dtype) = _gather(args[:-3]), args[-3:]
    return reference.mamba_blocks(hidden, residual, flatten(weights), 1, eps, scale, dtype)


def _fake_of_block(hidden, residual, *args):
    return (torch.empty_like(residual, memory_format=torch.contiguous_format),
            torch.empty_like(hidden, memory_format=torch.contiguous_format),
            hidden.new_empty(training.saved_size(hidden, _gather(args[:-3]), args[-1]),
                             dtype=torch.uint8))


def _forward(hidden, residual, *args):
    return training.forward(hidden, residual, _gather(args[:-3]), *args[-3:])


def _backward(dresidual, dhidden, _, *args):
    *weights, residual, saved, eps, scale, dtype = args
    by_hidden, by_residual, *grads = training.backward(
        dresidual, dhidden, residual, _gather(weights), saved, eps, scale, dtype)
    grads = iter(grads)
    return by_hidden, by_residual, *[None if t is None else next(grads) for t in weights]


def _fake_backward(dresidual, dhidden, residual, *args):
    *weights, _, _, _, _, dtype = args
    grads = (residual.new_empty(0) if t is None else
             torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights)
    return (residual.new_empty(residual.shape, dtype=dtype), residual.new_empty(residual.shape),
            *grads)


def _flops_of_block(residual, **shapes) -> int:
    return _count_flops(residual, flatten(_gather([shapes.get(name) for name in _NAMES])), 1)


_mamba_block_fwd = define_op(
    'mamba_block_fwd',
    f'(Tensor hidden, Tensor residual, {_ARGUMENTS}, float eps, float scale, ScalarType dtype) -> '
    '(Tensor new_residual, Tensor new_hidden, Tensor saved)',
    reference=_reference_of_block,
    fake=_fake_of_block,
    implementations={'cuda': Implementation(_forward, _backward, saves=True)},
    results=2,
    # The residual that comes in is what the block before keeps: it costs no memory.
    saves=f'residual {" ".join(_NAMES)} new_residual saved eps scale dtype',
    backward_fake=_fake_backward,
    flops=_flops_of_block)


def mamba_block(hidden: Tensor, residual: Tensor, weights: Weights, eps: float, scale: float,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`mamba_blocks` of one block that is not the first, with gradients by everything.

    Args:
        hidden: (B, L, C), in the dtype of the products.
        residual, eps, scale, dtype: as there.
        weights: the block's parameters.
    """
    return _mamba_block_fwd(hidden, residual, *spread(weights), eps, float(scale), dtype)


def mamba_blocks(hidden: Tensor, residual: Tensor | None, blocks: list[Weights], eps: float,
                 scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Blocks of add, norm and S6 mixer one after the other, without gradients, for inputs for
    which ``why_not`` is None.

    Args:
        hidden: (B, L, C), what the block before gave.
        residual: (B, L, C), fp32, the sum of all before; None if the first block is the model's.
        blocks: the parameters of each block, which all have the shapes and dtypes of the first.
            With a bias a norm is a LayerNorm, without one an RMSNorm; with one direction a mixer is
            causal, with two it runs forward and backward.
        eps: of the norms.
        scale: factor of the sum of the directions: 0.5 for their mean.
        dtype: of the matrix products and the new ``hidden``: fp16 or bf16, or fp32 if all is.

    Returns:
        (residual, hidden) after the last block.

    :func:`vmamba_mm.layers.run_blocks` calls it.
    """
    return _mamba_blocks(hidden, residual, [t for block in blocks for t in flatten(block)],
                         len(blocks), eps, float(scale), dtype)
