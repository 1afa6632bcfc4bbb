"""The ops ``expand_norm`` and ``merge_norm``: definitions, checks, public functions."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.patch_norm import cuda, reference


def _fake(x, shape, out_dtype, save):
    rows = shape[0] * shape[1] * shape[2] if save else 0
    return x.new_empty(shape, dtype=out_dtype), x.new_empty((rows, 2), dtype=torch.float32)


def _bwd_fake(grad, x, weight, bias, *_):
    return x.new_empty(x.shape), *(t.new_empty(t.shape) for t in (weight, bias))


_expand_norm = define_op(
    'expand_norm',
    '(Tensor x, Tensor weight, Tensor bias, SymInt factor, float eps, ScalarType out_dtype, '
    'bool save) -> (Tensor normed, Tensor moments)',
    reference=reference.expand_norm,
    fake=lambda x, weight, bias, factor, eps, out_dtype, save: _fake(
        x, (x.shape[0], factor * x.shape[1], factor * x.shape[2], weight.shape[0]), out_dtype,
        save),
    implementations={'cuda': Implementation(
        cuda.expand, cuda.expand_backward, lambda *args: cuda.why_not_expand(*args[:4]),
        saves=True)},
    saves='x weight bias moments factor',
    backward_fake=_bwd_fake)

_merge_norm = define_op(
    'merge_norm',
    '(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype, bool save) -> '
    '(Tensor normed, Tensor moments)',
    reference=reference.merge_norm,
    fake=lambda x, weight, bias, eps, out_dtype, save: _fake(
        x, (x.shape[0], x.shape[1] // 2, x.shape[2] // 2, weight.shape[0]), out_dtype, save),
    implementations={'cuda': Implementation(
        cuda.merge, cuda.merge_backward, lambda *args: cuda.why_not_merge(*args[:3]),
        saves=True)},
    saves='x weight bias moments',
    backward_fake=_bwd_fake)


def expand_norm(x: Tensor, weight: Tensor, bias: Tensor, factor: int, eps: float = 1e-5, *,
                out_dtype: torch.dtype | None = None) -> Tensor:
    """The pixels of patches at their places, and LayerNorm of each: what follows the product of
    patch expanding (arXiv 2105.05537, section 3.5).

    Args:
        x: (B, H, W, f * f * C): the pixels of an f x f patch row by row, of C channels each.
        weight, bias: (C).
        factor: f.
        eps: added to the variance.
        out_dtype: of the result; None for ``x``'s, or fp32 under autocast.

    Returns:
        (B, f * H, f * W, C).

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> expand_norm(torch.randn(2, 3, 5, 16), torch.ones(4), torch.zeros(4), 2).shape
        torch.Size([2, 6, 10, 4])
    """
    if x.dim() != 4 or weight.shape != bias.shape or x.shape[3] != factor**2 * weight.numel():
        raise ValueError(f'expand_norm expects x (B, H, W, {factor**2} C), weight and bias (C), '
                         f'got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}')
    return _expand_norm(x, weight, bias, factor, eps, out_dtype or _default_dtype(x))


def merge_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *,
               out_dtype: torch.dtype | None = None) -> Tensor:
    """The four pixels of each 2 x 2 patch side by side, and their LayerNorm: what comes before the
    product of patch merging (arXiv 2103.14030, section 3.1).

    Args:
        x: (B, H, W, C). A last row or column without a partner is left out.
        weight, bias: (4 * C), of the pixels x00, x10, x01 and x11.
        eps: added to the variance.
        out_dtype: as in :func:`expand_norm`.

    Returns:
        (B, H // 2, W // 2, 4 * C).

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> merge_norm(torch.randn(2, 4, 7, 3), torch.ones(12), torch.zeros(12)).shape
        torch.Size([2, 2, 3, 12])
    """
    if x.dim() != 4 or weight.shape != bias.shape or weight.numel() != 4 * x.shape[3]:
        raise ValueError(f'merge_norm expects x (B, H, W, C), weight and bias (4 C), got '
                         f'{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}')
    return _merge_norm(x, weight, bias, eps, out_dtype or _default_dtype(x))


def _default_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if autocast_dtype(x) is None else torch.float32
