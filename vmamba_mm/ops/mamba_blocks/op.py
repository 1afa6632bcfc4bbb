"""A Mamba block as one op, and in inference several: a small batch waits for Python.

Which way blocks go is decided by the layer, once for all of them; so the ops ask nothing.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.mamba_blocks import cuda, reference, training
from vmamba_mm.ops.mamba_blocks.weights import Direction, Weights, flatten, split
from vmamba_mm.ops.selective_scan.op import scan_flops


def _fake(hidden, residual, weights, routes, eps, scale, dtype):
    return (hidden.new_empty(hidden.shape, dtype=torch.float32),
            hidden.new_empty(hidden.shape, dtype=dtype))


def _count_flops(hidden, weights, routes, **_) -> int:
    batch, length, dim = hidden
    total = 0
    for block in split(weights, routes):
        total += 2 * batch * length * 3 * block.out_proj[1] * dim
        for conv, _, x_proj, dt_proj, _, A_log, _ in block.directions:
            inner, rank = dt_proj
            total += 2 * batch * length * inner * (conv[2] + x_proj[0] + rank)
            total += scan_flops(batch, inner, length, A_log[1])
    return total


_mamba_blocks = define_op(
    'mamba_blocks',
    '(Tensor hidden, Tensor? residual, Tensor[] weights, int routes, float eps, float scale, '
    'ScalarType dtype) -> (Tensor residual, Tensor hidden)',
    reference=reference.mamba_blocks,
    fake=_fake,
    implementations={'cuda': Implementation(cuda.forward)},
    results=2,
    flops=_count_flops)


# autograd does not look for tensors in a list: each is an argument of its own. Those of a second
# direction are None where there is one.
_SHARED = Weights._fields[:3]
_OF_DIRECTION = Direction._fields
_NAMES = (*_SHARED, *_OF_DIRECTION, *(f'{name}_b' for name in _OF_DIRECTION))
_FLAT = len(_SHARED) + len(_OF_DIRECTION)  # of one direction
_ARGUMENTS = ', '.join(f'Tensor{"?" if i >= _FLAT else ""} {name}' for i, name in enumerate(_NAMES))


def _gather(weights) -> Weights:
    """Of the arguments, or their shapes."""
    routes = 1 if weights[_FLAT] is None else 2
    return next(split(weights[:len(_SHARED) + routes * len(_OF_DIRECTION)], routes))


def _reference_of_block(hidden, residual, *args):
    weights, (eps, scale, dtype) = _gather(args[:-3]), args[-3:]
    return reference.mamba_blocks(hidden, residual, flatten(weights), len(weights.directions), eps,
                                  scale, dtype)


def _fake_of_block(hidden, residual, *args):
    return (torch.empty_like(residual, memory_format=torch.contiguous_format),
            torch.empty_like(hidden, memory_format=torch.contiguous_format),
            hidden.new_empty(training.saved_size(hidden, _gather(args[:-3]), args[-1]),
                             dtype=torch.uint8))


def _forward(hidden, residual, *args):
    return training.forward(hidden, residual, _gather(args[:-3]), *args[-3:])


def _backward(dresidual, dhidden, _, *args):
    *weights, residual, saved, eps, scale, dtype = args
    weights = _gather(weights)
    grads = training.backward(dresidual, dhidden, residual, weights, saved, eps, scale, dtype)
    absent = len(_NAMES) - len(flatten(weights))
    return *grads, *(residual.new_empty(0) for _ in range(absent))


def _fake_backward(dresidual, dhidden, residual, *args):
    *weights, _, _, _, _, dtype = args
    grads = (residual.new_empty(0) if t is None else
             torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights)
    return (residual.new_empty(residual.shape, dtype=dtype), residual.new_empty(residual.shape),
            *grads)


def _flops_of_block(residual, **shapes) -> int:
    weights = _gather([shapes.get(name) for name in _NAMES])
    return _count_flops(residual, flatten(weights), len(weights.directions))


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
    flat = flatten(weights)
    return _mamba_block_fwd(hidden, residual, *flat, *[None] * (len(_NAMES) - len(flat)), eps,
                            float(scale), dtype)


def mamba_blocks(hidden: Tensor, residual: Tensor | None, blocks: list[Weights], eps: float,
                 scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Blocks of add, RMSNorm and S6 mixer one after the other, without gradients, for inputs for
    which ``why_not`` is None.

    Args:
        hidden: (B, L, C), what the block before gave.
        residual: (B, L, C), fp32, the sum of all before; None if the first block is the model's.
        blocks: the parameters of each block, which all have the shapes and dtypes of the first.
            With one direction a mixer is causal, with two it runs forward and backward.
        eps: of the norms.
        scale: factor of the sum of the directions: 0.5 for their mean.
        dtype: of the matrix products and the new ``hidden``: fp16 or bf16, or fp32 if all is.

    Returns:
        (residual, hidden) after the last block.

    :func:`vmamba_mm.layers.run_blocks` calls it.
    """
    return _mamba_blocks(hidden, residual, [t for block in blocks for t in flatten(block)],
                         len(blocks[0].directions), eps, float(scale), dtype)
