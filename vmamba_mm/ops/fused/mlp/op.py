"""The op ``mlp``: Linear, GELU, Linear on the last dimension, planned for training memory."""

from math import prod

import torch
from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.mlp import cuda, reference


def _fake(x, w1, b1, w2, b2, save):
    rows = x.numel() // x.shape[-1]
    return (x.new_empty((*x.shape[:-1], w2.shape[0])),
            x.new_empty((rows, w1.shape[0]) if save else (0,)))


def _why_not(*args) -> str | None:
    if torch.compiler.is_compiling():
        return 'torch.compile has better kernels of its own'
    return cuda.why_not(*args)


_mlp = define_op(
    'mlp',
    '(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, bool save) -> (Tensor y, Tensor inner)',
    reference=reference.mlp,
    fake=_fake,
    implementations={'cuda': Implementation(cuda.forward, cuda.backward, _why_not, saves=True)},
    saves='x inner w1 b1 w2 b2',
    flops=lambda x, w1, w2, **_: 2 * prod(x[:-1]) * (prod(w1) + prod(w2)))


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

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> x, w1, w2 = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> mlp(x, w1, torch.zeros(32), w2, torch.zeros(8)).shape
        torch.Size([2, 5, 8])
    """
    if w1.dim() != 2 or w2.dim() != 2 or x.shape[-1:] != w1.shape[1:] or b1.shape != w1.shape[:1] \
            or w1.shape[:1] != w2.shape[1:] or b2.shape != w2.shape[:1]:
        raise ValueError("mlp expects x (..., C), w1 (H, C), b1 (H), w2 (C', H) and b2 (C'); got x "
                         f'{tuple(x.shape)}, w1 {tuple(w1.shape)}, b1 {tuple(b1.shape)}, '
                         f'w2 {tuple(w2.shape)}, b2 {tuple(b2.shape)}')
    return _mlp(x, w1, b1, w2, b2)
