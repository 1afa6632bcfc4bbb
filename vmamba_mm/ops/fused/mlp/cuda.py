"""``mlp`` by torch's matrix products and the CUDA kernels ``cast.cu``, ``gelu.cu`` and
``column_sums.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.fused.cast import cast
from vmamba_mm.ops.fused.channels import parameter_grads, why_not_channels
from vmamba_mm.ops.scan_kernels.cuda import TYPES, dense, device_limits, pointer


def why_not(x: Tensor, *parameters: Tensor) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    if x.dtype == torch.float32 and autocast_dtype(x):
        return 'autocast rounds its input first'
    return (why_not_channels(x, parameters[0].shape[0], parameters)
            or why_not_channels(x, parameters[2].shape[0], ()))


def gelu_instance(type_: str) -> Instance:
    return Instance('fused/gelu.cu', f'gelu_map<{type_}>', 'PPq')


@cached
def gelu_launch(index, dtype, size):
    """GELU of so many elements, a multiple of 4. Of addresses: input and result, which may be
    one."""
    launch = kernel(index, gelu_instance, TYPES[dtype]).bind((-(-size // 4096), 1, 1), (256, 1, 1))
    return lambda x, y: launch(x, y, size)


def column_instance(type_: str, gelu: bool) -> Instance:
    return Instance('fused/column_sums.cu', f'column_sums<{type_}, {str(gelu).lower()}>',
                    'P' * 5 + 'ii')


@cached
def column_launch(index, dtype, gelu, rows, dim):
    """Blocks, each of which leaves a part (1, D) of the sums over the rows, and what sums.

    Of addresses: grad (rows, D), inner, result, partials. With ``gelu``, of which ``inner`` is the
    input, ``grad`` is first turned into the gradient by it, in place, and ``result`` is written.
    """
    wide = -(-dim // 128)
    blocks = min(-(-rows // 8), max(1, -(-8 * device_limits(index)[0] // wide)))
    launch = kernel(index, column_instance, TYPES[dtype], gelu).bind((blocks, wide, 1), (32, 8, 1))
    return blocks, lambda grad, inner, result, partials: launch(grad, inner, result, grad, partials,
                                                                rows, dim)


def column_sums(grad: Tensor, bias: Tensor, inner: Tensor | None = None,
                 result: Tensor | None = None) -> Tensor:
    """The sums over the rows of ``grad``, as the gradient of ``bias``."""
    blocks, launch = column_launch(grad.get_device(), grad.dtype, inner is not None, *grad.shape)
    partials = grad.new_empty((blocks, 1, grad.shape[1]), dtype=torch.float32)
    launch(grad.data_ptr(), pointer(inner), pointer(result), partials.data_ptr())
    dbias = torch.empty_like(bias)
    parameter_grads(partials, None, dbias, 0)
    return dbias


def forward(x, w1, b1, w2, b2, save):
    """(y, inner): as the op ``mlp``."""
    w1, b1, w2, b2 = cast([w1, b1, w2, b2], x.dtype)
    inner = torch.addmm(b1, x.reshape(-1, x.shape[-1]), w1.T)
    hidden = torch.empty_like(inner) if save else inner
    if inner.numel():
        gelu_launch(x.get_device(), x.dtype, inner.numel())(inner.data_ptr(), hidden.data_ptr())
    y = torch.addmm(b2, hidden, w2.T).view(*x.shape[:-1], -1)
    return y, inner if save else x.new_empty(0)


def backward(grad, x, inner, w1, b1, w2, b2):
    """Gradients by x and the four parameters, in their dtypes."""
    half_w1, half_w2 = cast([w1, w2], x.dtype)
    grad, flat = dense(grad.reshape(-1, grad.shape[-1])), x.reshape(-1, x.shape[-1])
    dinner, hidden = torch.mm(grad, half_w2), torch.empty_like(inner)
    db1 = column_sums(dinner, b1, inner, hidden)
    dw2 = torch.mm(grad.T, hidden).to(w2.dtype)
    del hidden
    return (torch.mm(dinner, half_w1).view(x.shape), torch.mm(dinner.T, flat).to(w1.dtype), db1,
            dw2, column_sums(grad, b2))
