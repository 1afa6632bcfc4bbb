"""``shift_mix`` in plain PyTorch: its specification, and what runs where no kernel does."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cuts_of(dim: int, share: float) -> list[int]:
    """Where the four groups of so many channels begin, and where the last one ends."""
    return [int(dim * share * i) for i in range(5)]


def quad_shift(x: Tensor, pixels: int = 1, share: float = 0.25) -> Tensor:
    """Q-shift (arXiv 2403.02308, section 3.2): four groups of channels come from the four
    neighbours.

    Group i has the channels from ``int(C * share * i)`` to ``int(C * share * (i + 1))``, and the
    groups come from the left, the right, above and below; zeros come from outside of the map, and
    channels of no group stay.

    Args:
        x: (B, H, W, ..., C).
        pixels: how far the neighbours are.
        share: of the channels in a group, up to 1/4.

    Returns:
        (B, H, W, ..., C).
    """
    height, width = x.shape[1:3]
    cuts = cuts_of(x.shape[-1], share)
    left, right, above, below = (x[..., a:b] for a, b in zip(cuts, cuts[1:], strict=False))
    across, down, rest = min(pixels, width), min(pixels, height), (0, 0) * (x.dim() - 3)
    return torch.cat((
        F.pad(left[:, :, :width - across], (*rest, across, 0)),
        F.pad(right[:, :, across:], (*rest, 0, across)),
        F.pad(above[:, :height - down], (*rest, 0, 0, down, 0)),
        F.pad(below[:, down:], (*rest, 0, 0, 0, down)), x[..., cuts[-1]:]), dim=-1)


def shift_heads(x: Tensor, pixels: int, share: float, head_dim: int) -> Tensor:
    """:func:`quad_shift` of the channels of each head."""
    if head_dim == x.shape[-1]:
        return quad_shift(x, pixels, share)
    return quad_shift(x.unflatten(-1, (-1, head_dim)), pixels, share).flatten(-2)


def shift_mix(x: Tensor, first: Tensor, second: Tensor, third: Tensor | None, pixels: int,
              share: float, head_dim: int, out_dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """The mixtures by each of the parameters (C), None by none."""
    shifted = shift_heads(x, pixels, share, head_dim)
    difference = x - shifted
    return tuple(None if t is None else
                 torch.addcmul(shifted, difference, t.to(x.dtype)).to(out_dtype)
                 for t in (first, second, third))
