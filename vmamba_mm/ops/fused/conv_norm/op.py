"""The op ``conv_norm``: a convolution and the LayerNorm over the channels of its result."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.conv_norm import cuda, reference


def _find_shape(x_shape, weight_shape, stride, padding) -> tuple[int, ...]:
    """(B, H', W', C')."""
    height, width = ((size + 2 * padding - kernel) // stride + 1
                     for size, kernel in zip(x_shape[1:3], weight_shape[2:], strict=True))
    return x_shape[0], height, width, weight_shape[0]


def _count_flops(x, weight, stride, padding, **_) -> int:
    batch, height, width, out = _find_shape(x, weight, stride, padding)
    _, channels, rows, columns = weight
    return 2 * batch * height * width * out * channels * rows * columns


def _fake(x, weight, bias, norm_weight, norm_bias, stride, padding, eps, out_dtype, save):
    shape = _find_shape(x.shape, weight.shape, stride, padding)
    return (x.new_empty(shape, dtype=out_dtype), x.new_empty(shape if save else (0,)),
            x.new_empty((shape[0] * shape[1] * shape[2] if save else 0, 2), dtype=torch.float32))


def _bwd_fake(grad, x, weight, bias, norm_weight, norm_bias, y, moments, stride, padding, wants_x):
    return (x.new_empty(x.shape if wants_x else (0,)),
            *(torch.empty_like(t) for t in (weight, bias, norm_weight, norm_bias)))


def _forward(x, *args):
    """The norm; for the backward what it takes, and its moments; empty unless ``save``."""
    normed, y, moments = cuda.forward(x, *args)
    return (normed, x.new_empty(0) if y is None else y,
            x.new_empty((0, 2), dtype=torch.float32) if moments is None else moments)


_conv_norm = define_op(
    'conv_norm',
    '(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, SymInt stride, '
    'SymInt padding, float eps, ScalarType out_dtype, bool save) -> '
    '(Tensor normed, Tensor y, Tensor moments)',
    reference=reference.conv_norm,
    fake=_fake,
    implementations={'cuda': Implementation(
        _forward, cuda.backward, lambda *args: cuda.why_not(*args[:5]), saves=True)},
    saves='x weight bias norm_weight norm_bias y moments stride padding wants_x',
    backward_fake=_bwd_fake,
    flops=_count_flops)


def channels_last(x_BCHW: Tensor) -> Tensor:
    """Images as :func:`conv_norm` takes them, (B, H, W, C), by one copy at most."""
    if x_BCHW.dim() != 4:
        raise ValueError(f'images must be (B, C, H, W), got {tuple(x_BCHW.shape)}')
    dtype = autocast_dtype(x_BCHW) if x_BCHW.dtype == torch.float32 else None
    # On the permuted map, since vmap does not know memory_format=torch.channels_last.
    return x_BCHW.permute(0, 2, 3, 1).to(dtype or x_BCHW.dtype,
                                         memory_format=torch.contiguous_format)


def conv_norm(x_BHWC: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
              norm_bias: Tensor, eps: float = 1e-5, *, stride: int, padding: int = 0,
              out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the channels of a convolution's result.

    On an NVIDIA GPU the bias is added where the norm reads the map.

    Args:
        x_BHWC: (B, H, W, C), under autocast rounded to its dtype.
        weight: (C', C, kernel height, kernel width).
        bias, norm_weight, norm_bias: (C').
        eps: of the norm.
        stride, padding: of the convolution, both ways.
        out_dtype: as in :func:`vmamba_mm.ops.layer_norm`.

    Returns:
        (B, H', W', C').

    Raises:
        ValueError: if the map has another number of channels than the weight takes or is smaller
            than its kernel, or on a ``stride`` or ``padding`` that cannot be.

    Example, for maps of 3 channels:
        >>> x, weight, ones = torch.randn(2, 8, 8, 3), torch.randn(6, 3, 3, 3), torch.ones(6)
        >>> conv_norm(x, weight, ones, ones, ones, stride=2, padding=1).shape
        torch.Size([2, 4, 4, 6])
    """
    check_input(x_BHWC.shape, weight, bias, norm_weight, norm_bias)
    if stride < 1 or padding < 0:
        raise ValueError('conv_norm expects a stride of at least 1 and a padding of at least 0, '
                         f'got {stride} and {padding}')
    (_, height, width, _), (rows, columns) = x_BHWC.shape, weight.shape[2:]
    if height + 2 * padding < rows or width + 2 * padding < columns:
        raise ValueError(f'a convolution of {rows}x{columns} expects maps of that size at least, '
                         f'got {height}x{width} and a padding of {padding}')
    autocast = autocast_dtype(x_BHWC)
    if autocast is not None and x_BHWC.dtype != torch.float64:
        x_BHWC = x_BHWC.to(autocast)
    out_dtype = out_dtype or (torch.float32 if autocast else x_BHWC.dtype)
    return _conv_norm(x_BHWC, weight, bias, norm_weight, norm_bias, stride, padding, eps, out_dtype)


def check_input(shape, weight: Tensor, *vectors: Tensor) -> None:
    """Raise ValueError unless a convolution takes maps of this shape (B, H, W, C), and ``vectors``
    have an element for each channel of its result."""
    if len(shape) != 4 or weight.dim() != 4:
        raise ValueError(f'a convolution expects a batch of images, of four dimensions, and such a '
                         f'weight; got an input {tuple(shape)} and a weight {tuple(weight.shape)}')
    if shape[3] != weight.shape[1]:
        raise ValueError(f'a convolution of weight {tuple(weight.shape)} expects its input to have '
                         f'{weight.shape[1]} channels, but got {shape[3]} channels instead: '
                         'in_channels of a model must be the number of channels of its images')
    for tensor in vectors:
        if tensor.shape != weight.shape[:1]:
            raise ValueError(f'a convolution of {weight.shape[0]} channels and its norm expect '
                             f'biases and weights of shape {tuple(weight.shape[:1])}, got '
                             f'{tuple(tensor.shape)}')
