"""``conv_norm_gelu`` by the CUDA kernel ``stem.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import CODES, TYPES, Instance, cached, kernel
from vmamba_mm.ops.scan_kernels import cuda as scans

_HALVES = torch.float16, torch.bfloat16
_CHANNELS = 16, 32, 48, 64
_MOST_BLOCKS = 65535  # of a grid, along two of its sides


def why_not(x_BCHW: Tensor, out_dtype: torch.dtype, weight: Tensor, bias: Tensor,
            norm_weight: Tensor, norm_bias: Tensor) -> str | None:
    """The reason why the kernel cannot take these inputs, or None."""
    if (reason := scans.why_not(x_BCHW, 1, 1)) is not None:
        return reason
    if out_dtype not in _HALVES:
        return f'the result is {out_dtype}; the kernel gives float16 and bfloat16'
    if weight.shape[0] not in _CHANNELS or weight.shape[1:] != (3, 3, 3):
        return f'a weight of {tuple(weight.shape)}; the kernel takes (C, 3, 3, 3), C 16, 32, 48, 64'
    if any(t.dtype not in CODES for t in (weight, bias, norm_weight, norm_bias)):
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    if norm_weight.dtype != norm_bias.dtype:
        return 'weight and bias of the norm differ in dtype'
    sizes, strides = x_BCHW.shape[1:], x_BCHW.stride()[1:]
    if sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) >= 2**31:
        return 'an image spans 2^31 elements or more'
    if max(x_BCHW.shape[0], x_BCHW.shape[2] // 16) >= _MOST_BLOCKS:
        return 'the batch, or an image, is too large'
    return scans.why_not_here(x_BCHW.get_device(), out_dtype, 1, 1)


def stem_instance(image_type: str, type_: str, channels: int) -> Instance:
    """``channels``: a thread's, a quarter of those of the map."""
    return Instance('fused/stem.cu', f'stem<{image_type}, {type_}, {channels}>')


#: What is compiled to check it (all that there is but for images in another half), and the
#: lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = {
    stem_instance(image, type_, dim // 4): low
    for type_, low in (('Half', 75), ('BFloat', 80)) for image in ('Float', type_)
    for dim in _CHANNELS}


@cached
def _stem_launch(index, image_dtype, dtype, shape, strides, channels, weight, bias, norm_weight):
    """The launch for these dtypes; it takes the addresses ``x``, ``weight``, ``bias``,
    ``norm_weight``, ``norm_bias``, ``y``, and ``eps``."""
    batch, _, height, width = shape
    stride_b, stride_c, stride_h, stride_w = strides
    out_height, out_width = -(-height // 2), -(-width // 2)
    return kernel(index, stem_instance, TYPES[image_dtype], TYPES[dtype], channels // 4).bind(
        (-(-out_width // 16), -(-out_height // 8), batch), (128, 1, 1), per_call=('eps',),
        stride_b=stride_b, stride_c=stride_c, stride_h=stride_h, stride_w=stride_w, height=height,
        width=width, out_height=out_height, out_width=out_width, weight_type=CODES[weight],
        bias_type=CODES[bias], norm_type=CODES[norm_weight])


def forward(x_BCHW, weight, bias, norm_weight, norm_bias, eps, out_dtype):
    batch, _, height, width = x_BCHW.shape
    y = x_BCHW.new_empty((batch, -(-height // 2), -(-width // 2), len(weight)), dtype=out_dtype)
    weight, bias, norm_weight, norm_bias = (
        t.contiguous() for t in (weight, bias, norm_weight, norm_bias))
    _stem_launch(x_BCHW.get_device(), x_BCHW.dtype, out_dtype, x_BCHW.shape, x_BCHW.stride(),
                 len(weight), weight.dtype, bias.dtype, norm_weight.dtype)(
        x=x_BCHW.data_ptr(), weight=weight.data_ptr(), bias=bias.data_ptr(),
        norm_weight=norm_weight.data_ptr(), norm_bias=norm_bias.data_ptr(), y=y.data_ptr(), eps=eps)
    return y
