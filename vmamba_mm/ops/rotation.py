"""Rotary positions as RetNet and RMT have them: neighbouring channels turn together."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def rotation_table(positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for :func:`rotate_pairs`.

    Pair j of P / 2 turns by position * 10000^(-j / (P/2 - 1)), end points included, where the usual
    RoPE (arXiv 2104.09864) has 10000^(-2j / P). A single pair turns by the position.

    Args:
        positions: (...), of tokens.
        dim: P, channels of a head, an even number.
        dtype: of the channels that will be turned; the table of halves is in fp32.

    Returns:
        Twice (..., P), each number twice in a row.
    """
    dtype = compute_dtype(dtype)
    rates = 1 / 10000 ** torch.linspace(0, 1, dim // 2, dtype=dtype, device=positions.device)
    angles = positions[..., None].to(dtype) * rates.repeat_interleave(2)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        x: (..., P).
        cos, sin: of :func:`rotation_table`, to be broadcast to the shape of ``x``.

    Returns:
        (..., P) in the dtype of ``x``, computed in fp32 at least.
    """
    wide = x.to(cos.dtype)
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return torch.addcmul(wide * cos, turned, sin).to(x.dtype)
