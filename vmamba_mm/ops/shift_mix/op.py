"""The op ``shift_mix``: mixtures of a map with its shifted copy, of Vision-RWKV."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.shift_mix import cuda, reference


def _fake(x, first, second, third, pixels, share, head_dim, out_dtype):
    return tuple(x.new_empty(0 if t is None else x.shape, dtype=out_dtype)
                 for t in (first, second, third))


_shift_mix = define_op(
    'shift_mix',
    '(Tensor x, Tensor first, Tensor second, Tensor? third, int pixels, float share, int head_dim, '
    'ScalarType out_dtype) -> (Tensor, Tensor, Tensor)',
    reference=reference.shift_mix,
    fake=_fake,
    implementations={'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not)},
    results=3,
    saves='x first second third pixels share head_dim out_dtype')


def shift_mix(x: Tensor, shares: Sequence[Tensor], pixels: int = 1, share: float = 0.25, *,
              head_dim: int | None = None, out_dtype: torch.dtype | None = None
              ) -> tuple[Tensor, ...]:
    """Mixtures of a map with a copy of it, of which groups of channels come from the neighbours
    (Q-shift, arXiv 2403.02308, section 3.2).

    Each is ``a * x + (1 - a) * shifted`` for one of ``shares`` a. On an NVIDIA GPU one kernel, in
    fp32 and rounded once, which reads the map once and keeps nothing but it.

    Args:
        x: (B, H, W, C), any H and W.
        shares: two or three (C), the shares of ``x`` in the mixtures.
        pixels: how far the neighbours are.
        share: of the channels in each of the four groups, which come from the left, the right,
            above and below; the rest stays.
        head_dim: channels that are divided into groups together; None for all.
        out_dtype: of the mixtures; None for that of ``x``.

    Returns:
        As many (B, H, W, C) as there are shares.

    Raises:
        ValueError: if the shapes do not fit one another, or on a ``pixels`` or ``share`` that
            cannot be.

    Example, with all channels from the left and half of each mixture from there:
        >>> x, half = torch.tensor([1., 2.]).view(1, 1, 2, 1).repeat(1, 1, 1, 4), torch.ones(4) / 2
        >>> shift_mix(x, (half, 0 * half))[1][0, 0, :, 0]
        tensor([0., 1.])
    """
    head_dim = check_shift('shift_mix', x, shares, (2, 3), pixels, share, head_dim)
    third = shares[2] if len(shares) == 3 else None
    mixtures = _shift_mix(x, *shares[:2], third, pixels, share, head_dim, out_dtype or x.dtype)
    return tuple(mixtures[:len(shares)])


def check_shift(op: str, x: Tensor, shares: Sequence[Tensor], counts: tuple[int, ...],
                pixels: int, share: float, head_dim: int | None = None) -> int:
    """The ``head_dim`` of so many shares of ``op``; ValueError unless all fits together."""
    dim = x.shape[-1]
    head_dim = dim if head_dim is None else head_dim
    if x.dim() != 4 or len(shares) not in counts or any(t.shape != (dim,) for t in shares) \
            or head_dim < 1 or dim % head_dim:
        raise ValueError(
            f'{op} expects x (B, H, W, C), {" or ".join(map(str, counts))} shares (C), and a '
            f'head_dim that divides C; got x {tuple(x.shape)}, shares '
            f'{[tuple(t.shape) for t in shares]}, head_dim {head_dim}')
    if pixels < 0 or not 0 <= share <= 0.25:
        raise ValueError(f'{op} expects pixels of at least 0 and a share of 0 to 0.25, for there '
                         f'are four groups of channels; got {pixels} and {share}')
    return head_dim
