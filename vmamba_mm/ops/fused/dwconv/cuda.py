"""``dwconv_silu`` by the CUDA kernels ``dwconv.cu`` and ``dwconv_bwd.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.fused.channels import parameter_grads, why_not_channels
from vmamba_mm.ops.scan_kernels.cuda import CODES, TYPES, dense, device_limits, pointer

_ROWS, _ROWS_BACK = 2, 2  # rows of a thread
_PIXELS = 'Pqiiiii'


def why_not(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    return why_not_channels(x_BHWD, x_BHWD.shape[3], (weight, bias))


def forward_instance(type_: str, forward: bool) -> Instance:
    """``forward``, or the gradient by the input."""
    return Instance('fused/dwconv.cu', f'dwconv<{type_}, {str(forward).lower()}, {_ROWS}>',
                    _PIXELS + 'PPPiiii')


def backward_instance(type_: str) -> Instance:
    return Instance('fused/dwconv_bwd.cu', f'dwconv_bwd<{type_}, {_ROWS_BACK}>',
                    _PIXELS + 'PPPPPiiii')


@cached
def _cut(batch: int, height: int, width: int, dim: int, rows: int, threads: int, index: int):
    """Threads side by side in channels and one above the other, blocks of channels, segments of a
    row and their columns, blocks for the strips."""
    groups = dim // 4
    side = next((n for n in range(min(64, threads), 15, -1) if groups % n == 0), min(groups, 32))
    above = threads // side
    strips = batch * -(-height // rows)
    # As many threads as four blocks of 256 for each multiprocessor have, but not much less than
    # four columns to a thread.
    wanted = -(-1024 * device_limits(index)[0] // (groups * strips))
    columns = -(-width // max(1, min(wanted, width // 4)))
    segments = -(-width // columns)
    return side, above, -(-groups // side), segments, columns, -(-strips * segments // above)


@cached
def forward_launch(index, dtype, weight, bias, forward, strides, shape):
    """The forward for these dtypes (None of ``bias`` without one), or the gradient by the input.

    ``strides`` of x from an image and a pixel to the next, ``shape`` (B, H, W, D). Of addresses:
    x, weight, bias, y.
    """
    side, above, columns_of_blocks, segments, columns, blocks = _cut(*shape, _ROWS, 256, index)
    launch = kernel(index, forward_instance, TYPES[dtype], forward).bind(
        (blocks, columns_of_blocks, 1), (side, above, 1), 144 * side)
    pixels, sizes = (*strides, *shape), (segments, columns, CODES[weight], CODES[bias or weight])
    return lambda x, *others: launch(x, *pixels, *others, *sizes)


@cached
def backward_launch(index, dtype, weight, bias, strides, shape):
    """Blocks, each of which leaves a part (10, D) of the gradients by weight and bias, and the
    backward up to the gradient dz by the convolution's result.

    Of addresses: x, weight, bias, grad, dz, partials.
    """
    side, above, columns_of_blocks, segments, columns, blocks = _cut(*shape, _ROWS_BACK, 128, index)
    blocks = min(blocks, -(-8 * device_limits(index)[0] // columns_of_blocks))
    launch = kernel(index, backward_instance, TYPES[dtype]).bind(
        (blocks, columns_of_blocks, 1), (side, above, 1), 160 * side)
    pixels, sizes = (*strides, *shape), (segments, columns, CODES[weight], CODES[bias or weight])
    return blocks, lambda x, *others: launch(x, *pixels, *others, *sizes)


def _pixels(x_BHWD: Tensor) -> Tensor:
    """``x_BHWD``, or a copy if its pixels are not evenly spaced vectors of channels."""
    _, _, width, dim = x_BHWD.shape
    stride_b, stride_h, stride_w, stride_d = x_BHWD.stride()
    even = stride_h == width * stride_w or x_BHWD.shape[1] == 1
    aligned = stride_b % 4 == stride_w % 4 == 0 and x_BHWD.data_ptr() % 16 == 0
    return x_BHWD if stride_d == 1 and even and aligned else x_BHWD.clone(
        memory_format=torch.contiguous_format)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, forward: bool) -> Tensor:
    y = x.new_empty(x.shape)
    forward_launch(x.get_device(), x.dtype, weight.dtype, bias.dtype if bias is not None else None,
                   forward, (x.stride(0), x.stride(2)), x.shape)(
        x.data_ptr(), weight.data_ptr(), pointer(bias), y.data_ptr())
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the op ``dwconv_silu``."""
    return _convolve(_pixels(x), weight.contiguous(), bias, True)


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias (empty without one)."""
    x, grad, flat = _pixels(x), dense(grad), weight.contiguous()
    blocks, launch = backward_launch(
        x.get_device(), x.dtype, weight.dtype, bias.dtype if bias is not None else None,
        (x.stride(0), x.stride(2)), x.shape)
    partials = x.new_empty((blocks, 10, x.shape[3]), dtype=torch.float32)
    dz = x.new_empty(x.shape)
    launch(x.data_ptr(), flat.data_ptr(), pointer(bias), grad.data_ptr(), dz.data_ptr(),
           partials.data_ptr())
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    parameter_grads(partials, dweight, None if bias is None else dbias, 9)
    return _convolve(dz, flat, None, False), dweight, dbias
