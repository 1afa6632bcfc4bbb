"""The ops ``spatial_mixer`` and ``channel_mixer``: the halves of a block of Vision-RWKV."""

from math import prod

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.shift_mix.op import check_shift
from vmamba_mm.ops.vision_rwkv import cuda, reference
from vmamba_mm.ops.wkv.op import check_mode, wkv_flops


def _spatial_fake(x, for_k, for_v, for_r, key, value, receptance, output, w, u, official, pixels,
                  share, dtype, save):
    return _fake(x, key, output, cuda.SPATIAL, dtype, save)


def _channel_fake(x, for_k, for_r, key, value, receptance, pixels, share, head_dim, dtype, save):
    return _fake(x, key, value, cuda.CHANNEL, dtype, save)


def _fake(x, key, last, layout, dtype, save):
    size = cuda.saved_size(layout, x, key.shape[0], last.shape[0], dtype) if save else 0
    return (x.new_empty((*x.shape[:-1], last.shape[0]), dtype=dtype),
            x.new_empty(size, dtype=torch.uint8))


_spatial_mixer = define_op(
    'spatial_mixer',
    '(Tensor x, Tensor for_k, Tensor for_v, Tensor for_r, Tensor key, Tensor value, '
    'Tensor receptance, Tensor output, Tensor w, Tensor u, bool official, int pixels, float share, '
    'ScalarType dtype, bool save) -> (Tensor result, Tensor saved)',
    reference=reference.spatial_mixer,
    fake=_spatial_fake,
    implementations={'cuda': Implementation(cuda.spatial_forward, cuda.spatial_backward,
                                            cuda.spatial_why_not, saves=True)},
    saves='x for_k for_v for_r key value receptance output w u saved official pixels share dtype',
    flops=lambda x, key, value, receptance, output, **_: 2 * prod(x[:3]) * sum(
        map(prod, (key, value, receptance, output)))
    + wkv_flops(x[0], x[1] * x[2], key[0], directions=2))

_channel_mixer = define_op(
    'channel_mixer',
    '(Tensor x, Tensor for_k, Tensor for_r, Tensor key, Tensor value, Tensor receptance, '
    'int pixels, float share, int head_dim, ScalarType dtype, bool save) -> '
    '(Tensor result, Tensor saved)',
    reference=reference.channel_mixer,
    fake=_channel_fake,
    implementations={'cuda': Implementation(cuda.channel_forward, cuda.channel_backward,
                                            cuda.channel_why_not, saves=True)},
    saves='x for_k for_r key value receptance saved pixels share head_dim dtype',
    flops=lambda x, key, value, receptance, **_: 2 * prod(x[:3]) * sum(
        map(prod, (key, value, receptance))))


def spatial_mixer(x: Tensor, shares: tuple[Tensor, Tensor, Tensor],
                  weights: tuple[Tensor, Tensor, Tensor, Tensor], w: Tensor, u: Tensor, *,
                  mode: str = 'paper', pixels: int = 1, share: float = 0.25) -> Tensor:
    """The half of a block of Vision-RWKV that mixes positions (arXiv 2403.02308, section 3.2).

    Args:
        x: (B, H, W, C).
        shares: three (C), of ``x`` in the mixtures for k, v and r; as of ``shift_mix``.
        weights: four (C, C), of the products to k, v and r, and of the last one.
        w, u: (C), decay and bonus, of a whole map.
        mode: as of ``bi_wkv``.
        pixels, share: as of ``shift_mix``.

    Returns:
        (B, H, W, C) in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: if the shapes do not fit one another, or on another ``mode``.

    Example:
        >>> x, half, square = torch.randn(1, 3, 5, 8), torch.ones(8) / 2, torch.eye(8)
        >>> spatial_mixer(x, (half,) * 3, (square,) * 4, half, half).shape
        torch.Size([1, 3, 5, 8])
    """
    check_mode(mode)
    check_shift('spatial_mixer', x, shares, (3,), pixels, share)
    dim = x.shape[3]
    key, value, receptance, output = weights
    vector, square = (dim,), (dim, dim)
    if not (key.shape == value.shape == receptance.shape == output.shape == square
            and w.shape == u.shape == vector):
        check_shapes('spatial_mixer', {'x': x}, key=(key, square), value=(value, square),
                     receptance=(receptance, square), output=(output, square), w=(w, vector),
                     u=(u, vector))
    return _spatial_mixer(x, *shares, *weights, w, u, mode == 'official', pixels, share,
                          _dtype_of_products(x))


def channel_mixer(x: Tensor, shares: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor, Tensor],
                  *, pixels: int = 1, share: float = 0.25, head_dim: int | None = None) -> Tensor:
    """The half of a block of Vision-RWKV that mixes channels (arXiv 2403.02308, section 3.2).

    Args:
        x: (B, H, W, C).
        shares: two (C), of ``x`` in the mixtures for k and r; as of ``shift_mix``.
        weights: (D, C), (C, D) and (C, C), of the products to k, from its square, and to r.
        pixels, share, head_dim: as of ``shift_mix``.

    Returns:
        (B, H, W, C) in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> x, half, square = torch.randn(1, 3, 5, 8), torch.ones(8) / 2, torch.eye(8)
        >>> channel_mixer(x, (half, half), (square,) * 3).shape
        torch.Size([1, 3, 5, 8])
    """
    head_dim = check_shift('channel_mixer', x, shares, (2,), pixels, share, head_dim)
    dim = x.shape[3]
    key, value, receptance = weights
    hidden = key.shape[:1]
    if not (key.shape == (*hidden, dim) and value.shape == (dim, *hidden)
            and receptance.shape == (dim, dim)):
        check_shapes('channel_mixer', {'x': x, 'key': key}, key=(key, (*hidden, dim)),
                     value=(value, (dim, *hidden)), receptance=(receptance, (dim, dim)))
    return _channel_mixer(x, *shares, *weights, pixels, share, head_dim, _dtype_of_products(x))


def _dtype_of_products(x: Tensor) -> torch.dtype:
    autocast = None if x.dtype == torch.float64 else autocast_dtype(x)
    return autocast or x.dtype
