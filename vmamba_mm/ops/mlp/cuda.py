"""``mlp`` by torch's matrix products and the CUDA kernels ``cast.cu`` and ``column_sums.cu``."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vmamba_mm.ops.backends import autocast_dtype
from vmamba_mm.ops.channels import parameter_grads, why_not_channels
from vmamba_mm.ops.nvrtc import Instance, kernel
from vmamba_mm.ops.walk import CODES, TYPES, device_limits, pointer

_MOST = 6  # parameters of a launch of the cast kernel


def why_not(x: Tensor, *parameters: Tensor) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    if x.dtype == torch.float32 and autocast_dtype(x):
        return 'autocast rounds its input first'
    return (why_not_channels(x, parameters[0].shape[0], parameters)
            or why_not_channels(x, parameters[2].shape[0], ()))


def cast_instance(type_: str) -> Instance:
    return Instance('cast.cu', f'cast<{type_}>', 'P' * (_MOST + 1) + 'i' * (3 * _MOST + 1))


def column_instance(type_: str, gelu: bool) -> Instance:
    return Instance('column_sums.cu', f'column_sums<{type_}, {str(gelu).lower()}>', 'P' * 5 + 'ii')


def cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each parameter in ``dtype``, without gaps; at most six, rounded by one launch."""
    parameters = [p.contiguous() for p in parameters]
    if all(p.dtype == dtype for p in parameters):
        return parameters
    sizes = [p.numel() for p in parameters]
    starts = [0, *accumulate(-(-size // 8) * 8 for size in sizes)]
    buffer = parameters[0].new_empty(starts[-1], dtype=dtype)
    absent = _MOST - len(sizes)
    kernel(buffer.get_device(), cast_instance, TYPES[dtype]).launch(
        (min(1024, -(-starts[-1] // 2048)), 1, 1), (256, 1, 1),
        (*[p.data_ptr() for p in parameters], *[0] * absent, buffer.data_ptr(),
         *starts, *[starts[-1]] * absent, *sizes, *[0] * absent,
         *[CODES[p.dtype] for p in parameters], *[0] * absent))
    return [buffer.as_strided(p.shape, p.stride(), start)
            for p, start in zip(parameters, starts, strict=False)]


def _column_sums(grad: Tensor, bias: Tensor, inner: Tensor | None = None,
                 result: Tensor | None = None) -> Tensor:
    """The sums over the rows of ``grad``, as the gradient of ``bias``; with ``inner``, GELU's
    input, ``grad`` is first turned into the gradient by it, in place, and ``result`` is written."""
    rows, dim = grad.shape
    index, wide = grad.get_device(), -(-dim // 128)
    blocks = min(-(-rows // 8), max(1, -(-8 * device_limits(index)[0] // wide)))
    partials = grad.new_empty((blocks, 1, dim), dtype=torch.float32)
    kernel(index, column_instance, TYPES[grad.dtype], inner is not None).launch(
        (blocks, wide, 1), (32, 8, 1),
        (grad.data_ptr(), pointer(inner), pointer(result), grad.data_ptr(), partials.data_ptr(),
         rows, dim))
    dbias = torch.empty_like(bias)
    parameter_grads(partials, None, dbias, 0)
    return dbias


def forward(x, w1, b1, w2, b2, save):
    """(y, inner): as the op ``mlp``."""
    w1, b1, w2, b2 = cast([w1, b1, w2, b2], x.dtype)
    inner = torch.addmm(b1, x.reshape(-1, x.shape[-1]), w1.T)
    hidden = torch.nn.functional.gelu(inner) if save else torch.ops.aten.gelu_(inner)
    y = torch.addmm(b2, hidden, w2.T).view(*x.shape[:-1], -1)
    return y, inner if save else x.new_empty(0)


def backward(grad, x, inner, w1, b1, w2, b2):
    """Gradients by x and the four parameters, in their dtypes."""
    half_w1, half_w2 = cast([w1, w2], x.dtype)
    grad, flat = grad.reshape(-1, grad.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1])
    dinner, hidden = torch.mm(grad, half_w2), torch.empty_like(inner)
    db1 = _column_sums(dinner, b1, inner, hidden)
    dw2 = torch.mm(grad.T, hidden).to(w2.dtype)
    del hidden
    return (torch.mm(dinner, half_w1).view(x.shape), torch.mm(dinner.T, flat).to(w1.dtype), db1,
            dw2, _column_sums(grad, b2))
