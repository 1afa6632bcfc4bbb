"""``mlp`` by matrix products and the CUDA kernels of :mod:`vmamba_mm.ops.fused.mlp.hidden`,
``cast.cu`` and ``column_sums.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import autocast_dtype
from vmamba_mm.ops.core.launch import TYPES, Instance, cached, device_limits, kernel, pointer
from vmamba_mm.ops.fused.cast import cast
from vmamba_mm.ops.fused.channels import as_template, parameter_grads, why_not_channels
from vmamba_mm.ops.fused.mlp import hidden
from vmamba_mm.ops.scan_kernels.cuda import dense


def why_not(x: Tensor, *parameters: Tensor) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if x.dtype == torch.float32 and autocast_dtype(x):
        return 'autocast rounds its input first'
    return (why_not_channels(x, parameters[0].shape[0], parameters)
            or why_not_channels(x, parameters[2].shape[0], ()))


def column_instance(type_: str, gelu: bool) -> Instance:
    return Instance('fused/column_sums.cu', f'column_sums<{type_}, {as_template(gelu)}>')


#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = hidden.INSTANCES | {
    instance: low for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75))
    for instance in (column_instance(type_, False), column_instance(type_, True))}


@cached
def column_launch(index, dtype, gelu, rows, dim):
    """Blocks, each of which leaves a part (1, D) of the sums over the rows, and what sums.

    It takes the addresses ``grad`` (rows, D) and ``partials``; with ``gelu`` also GELU's ``input``,
    ``result``, where GELU of it is written again, and ``dinput``, where the gradient by the input
    is written, which is summed then; it may be ``grad``.
    """
    wide = -(-dim // 128)
    blocks = min(-(-rows // 8), max(1, -(-8 * device_limits(index)[0] // wide)))
    return blocks, kernel(index, column_instance, TYPES[dtype], gelu).bind(
        (blocks, wide, 1), (32, 8, 1), rows=rows, dim=dim)


def column_sums(grad: Tensor, bias: Tensor, inner: Tensor | None = None,
                 result: Tensor | None = None) -> Tensor:
    """The sums over the rows of ``grad``, as the gradient of ``bias``. With GELU's input ``inner``,
    ``grad`` first becomes the gradient by that, in place, and ``result`` GELU of it."""
    blocks, launch = column_launch(grad.get_device(), grad.dtype, inner is not None, *grad.shape)
    partials = grad.new_empty((blocks, 1, grad.shape[1]), dtype=torch.float32)
    launch(grad=grad.data_ptr(), input=pointer(inner), result=pointer(result),
           dinput=grad.data_ptr(), partials=partials.data_ptr())
    dbias = torch.empty_like(bias)
    parameter_grads(partials, None, dbias, 0)
    return dbias


def forward(x, w1, b1, w2, b2, save):
    """(y, inner): as the op ``mlp``."""
    w1, b1, w2, b2 = cast([w1, b1, w2, b2], x.dtype)
    inner, y = hidden.hidden_layer(x, w1, b1, save)
    y = torch.addmm(b2, y, w2.T).view(*x.shape[:-1], -1)
    return y, inner if save else x.new_empty(0)


def backward(grad, x, inner, w1, b1, w2, b2):
    """Gradients by x and the four parameters, in their dtypes."""
    half_w1, half_w2 = cast([w1, w2], x.dtype)
    grad, flat = dense(grad.reshape(-1, grad.shape[-1])), x.reshape(-1, x.shape[-1])
    dinner, gelu = torch.mm(grad, half_w2), torch.empty_like(inner)
    db1 = column_sums(dinner, b1, inner, gelu)
    dw2 = torch.mm(grad.T, gelu).to(w2.dtype)
    del gelu
    return (torch.mm(dinner, half_w1).view(x.shape), torch.mm(dinner.T, flat).to(w1.dtype), db1,
            dw2, column_sums(grad, b2))
