"""The depthwise 5x5 convolution beside attention (local enhancement, arXiv 2107.00652, section
3.2) by the CUDA kernels ``lepe.cu`` and ``lepe_bwd.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import CODES, TYPES, Instance, cached, device_limits, kernel, pointer
from vmamba_mm.ops.fused.channels import as_template, parameter_grads

_ROWS = 2  # of a thread
_THREADS = 128


def forward_instance(type_: str, forward: bool) -> Instance:
    """``forward``, or the gradient by the input."""
    return Instance('masa/lepe.cu', f'lepe<{type_}, {as_template(forward)}, {_ROWS}>')


def backward_instance(type_: str) -> Instance:
    return Instance('masa/lepe_bwd.cu', f'lepe_bwd<{type_}, {_ROWS}>')


#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = {
    instance: 80 for type_ in ('Half', 'BFloat', 'Float')
    for instance in (forward_instance(type_, True), forward_instance(type_, False),
                     backward_instance(type_))}


def _blocks(batch: int, height: int, dim: int) -> tuple[int, int, int, int]:
    """Blocks for all strips of rows, and side by side in channels; threads of a block side by side,
    and one above the other."""
    pairs = dim // 2
    side = next((n for n in range(64, 15, -1) if pairs % n == 0), min(pairs, 32))
    above = _THREADS // side
    return -(-batch * -(-height // _ROWS) // above), -(-pairs // side), side, above


@cached
def launch(index, dtype, forward, weight, bias, shape, x_pixel, more_pixel, y_pixel):
    """The forward or the gradient by the input, for maps of ``shape`` (B, H, W, D) whose pixels are
    so many elements apart. It takes the addresses ``x_data``, ``more_data``, ``weight``, ``bias``,
    ``y``."""
    batch, height, width, dim = shape
    blocks, columns, side, above = _blocks(batch, height, dim)
    return kernel(index, forward_instance, TYPES[dtype], forward).bind(
        (blocks, columns, 1), (side, above, 1), 25 * 2 * side * 4, x_pixel=x_pixel,
        more_pixel=more_pixel, y_pixel=y_pixel, batch=batch, height=height, width=width, dim=dim,
        weight_type=CODES[weight], bias_type=CODES[bias or weight])


@cached
def backward_launch(index, dtype, shape, x_pixel, dy_pixel):
    """Blocks, each of which leaves a part (26, D), and the kernel; it takes the addresses
    ``x_data``, ``dy_data``, ``partials``."""
    batch, height, width, dim = shape
    blocks, columns, side, above = _blocks(batch, height, dim)
    blocks = min(blocks, max(1, 6 * device_limits(index)[0] // columns))
    return blocks, kernel(index, backward_instance, TYPES[dtype]).bind(
        (blocks, columns, 1), (side, above, 1), 26 * 2 * side * 4, x_pixel=x_pixel,
        dy_pixel=dy_pixel, batch=batch, height=height, width=width, dim=dim)


def add(x: Tensor, weight: Tensor, bias: Tensor | None, to: Tensor, forward: bool = True) -> None:
    """Add the convolution of x (B, H, W, D), or of a gradient by its result that by its input, to
    ``to``, in place; of both the pixels are evenly spaced."""
    flat = weight.contiguous()
    flat_bias = None if bias is None or not forward else bias.contiguous()
    launch(x.get_device(), x.dtype, forward, weight.dtype,
            None if flat_bias is None else flat_bias.dtype, x.shape, x.stride(2), to.stride(2),
            to.stride(2))(
        x_data=x.data_ptr(), more_data=to.data_ptr(), weight=flat.data_ptr(),
        bias=pointer(flat_bias), y=to.data_ptr())


def parameter_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor
                       ) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias."""
    blocks, start = backward_launch(x.get_device(), x.dtype, x.shape, x.stride(2),
                                    grad.stride(2))
    partials = x.new_empty((blocks, 26, x.shape[3]), dtype=torch.float32)
    start(x_data=x.data_ptr(), dy_data=grad.data_ptr(), partials=partials.data_ptr())
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.empty_like(bias)
    parameter_grads(partials, dweight, dbias, 25)
    return dweight, dbias
