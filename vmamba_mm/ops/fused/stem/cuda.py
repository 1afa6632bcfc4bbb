"""``conv_norm_gelu`` by the CUDA kernel ``stem.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.scan_kernels import cuda as walk
from vmamba_mm.ops.scan_kernels.cuda import CODES, TYPES

_HALVES = torch.float16, torch.bfloat16
_CHANNELS = 16, 32, 48, 64
_MOST_BLOCKS = 65535  # of a grid, along two of its sides


def why_not(x_BCHW: Tensor, out_dtype: torch.dtype, weight: Tensor, *others: Tensor) -> str | None:
    """What keeps the kernel from taking these inputs, or None."""
    if (reason := walk.why_not(x_BCHW, 1, 1)) is not None:
        return reason
    if out_dtype not in _HALVES:
        return f'the result is {out_dtype}; the kernel gives float16 and bfloat16'
    if weight.shape[0] not in _CHANNELS or weight.shape[1:] != (3, 3, 3):
        return f'a weight of {tuple(weight.shape)}; the kernel takes (C, 3, 3, 3), C 16, 32, 48, 64'
    if any(t.dtype not in CODES for t in (weight, *others)):
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    if others[1].dtype != others[2].dtype:
        return 'weight and bias of the norm differ in dtype'
    sizes, strides = x_BCHW.shape[1:], x_BCHW.stride()[1:]
    if sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) >= 2**31:
        return 'an image spans 2^31 elements or more'
    if max(x_BCHW.shape[0], x_BCHW.shape[2] // 16) >= _MOST_BLOCKS:
        return 'the batch, or an image, is too large'
    return walk._why_not_here(x_BCHW.get_device(), out_dtype, 1, 1)


def stem_instance(image_type: str, type_: str, channels: int) -> Instance:
    """``channels`` of a thread."""
    return Instance('fused/stem.cu', f'stem<{image_type}, {type_}, {channels}>',
                    'PqiiiPPPPPfiiiiiii')


@cached
def _launch(index, image_dtype, dtype, shape, strides, channels, dtypes):
    batch, _, height, width = shape
    out = [-(-side // 2) for side in (height, width)]
    launch = kernel(index, stem_instance, TYPES[image_dtype], TYPES[dtype], channels // 4).bind(
        (-(-out[1] // 16), -(-out[0] // 8), batch), (128, 1, 1))
    rest = height, width, *out, *(CODES[d] for d in dtypes)
    return lambda x, *others: launch(x, *strides, *others, *rest)


def forward(x_BCHW, weight, bias, norm_weight, norm_bias, eps, out_dtype):
    batch, _, height, width = x_BCHW.shape
    y = x_BCHW.new_empty((batch, -(-height // 2), -(-width // 2), len(weight)), dtype=out_dtype)
    parameters = [t.contiguous() for t in (weight, bias, norm_weight, norm_bias)]
    _launch(x_BCHW.get_device(), x_BCHW.dtype, out_dtype, x_BCHW.shape, x_BCHW.stride(),
            len(weight), (weight.dtype, bias.dtype, norm_weight.dtype))(
        x_BCHW.data_ptr(), *[t.data_ptr() for t in parameters], y.data_ptr(), eps)
    return y
