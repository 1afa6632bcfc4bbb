"""Mamba blocks in inference as one op: a small batch waits for Python.

Which way blocks go is decided by the layer, once for all of them; so the op asks nothing.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.mamba_blocks import cuda, reference
from vmamba_mm.ops.mamba_blocks.weights import Weights, split
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
    return _mamba_blocks(hidden, residual, [t for block in blocks for t in block.flat],
                         len(blocks[0].directions), eps, float(scale), dtype)
