"""Rotary positions of which neighbouring channels turn together, of sequences and of maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def rotation_table(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines for :func:`rotate_pairs`.

    Pair j of P / 2 turns by position * 10000^(-j / (P/2 - 1)), end points included, where the usual
    RoPE (arXiv 2104.09864) has 10000^(-2j / P). A single pair turns by the position.

    Args:
        positions: (...), of tokens.
        dim: P, channels of a head, an even number.
        dtype: of the channels that will be turned; the table of halves is in fp32.

    Returns:
        (..., P / 2, 2): of each pair the cosine and the sine.
    """
    dtype = compute_dtype(dtype)
    rates = 1 / 10000 ** torch.linspace(0, 1, dim // 2, dtype=dtype, device=positions.device)
    angles = positions[..., None].to(dtype) * rates
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def map_rotation_table(height: int, width: int, dim: int, *, endpoint: bool, dtype: torch.dtype,
                       device: torch.device | str | None = None) -> Tensor:
    """Cosines and sines for ``rotate_pairs`` of the pixels of a map: the first half of the channels
    turns by the row, the second by the column.

    Args:
        height, width: H and W.
        dim: P, channels, a multiple of 4.
        endpoint: whether pair j of the P / 4 of a half turns by 10000^(-j / (P/4 - 1)), as in
            ``rotation_table``, or by 10000^(-4j / P), as in the usual RoPE of P / 2 channels.
        dtype: of the channels that will be turned; the table of halves is in fp32.
        device: of the table.

    Returns:
        (H, W, P / 2, 2): of each pair the cosine and the sine.
    """
    dtype, pairs = compute_dtype(dtype), dim // 4
    steps = torch.arange(pairs, dtype=dtype, device=device)
    rates = 10000 ** (-steps / (max(pairs - 1, 1) if endpoint else pairs))
    rows, columns = (torch.arange(size, dtype=dtype, device=device)[:, None] * rates
                     for size in (height, width))
    shape = height, width, pairs
    angles = torch.cat((rows[:, None].expand(shape), columns.expand(shape)), dim=-1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        x: (..., P).
        table: (..., P / 2, 2), of :func:`rotation_table`, to be broadcast to the pairs of ``x``.

    Returns:
        (..., P) in the dtype of ``x``, computed in fp32 at least.
    """
    first, second = x.to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    turned = torch.stack((torch.addcmul(first * cos, second, sin, value=-1),
                          torch.addcmul(second * cos, first, sin)), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotate_heads(x: Tensor, turns: Tensor | None) -> Tensor:
    """Turn all channels of each token, whatever head they are of; a pair may lie in two heads.

    Args:
        x: (B, L, n, P).
        turns: (L, n P / 2, 2), cosines and sines; None for no rotation.
    """
    return x if turns is None else rotate_pairs(x.flatten(2), turns).view(x.shape)


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    """Softmax attention of all tokens to all (arXiv 1706.03762, section 3.2.1), whose queries and
    keys are turned.

    Args:
        q, k, v: (B, L, n, P).
        turns: as of :func:`rotate_heads`.

    Returns:
        (B, L, n, P), in the dtype of ``v``, or autocast's.
    """
    q, k = rotate_heads(q, turns), rotate_heads(k, turns)
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    return y.transpose(1, 2)
