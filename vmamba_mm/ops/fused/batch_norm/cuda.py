"""``evaluate_batch_norm`` by the CUDA kernel ``batch_norm.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    cached,
    device_limits,
    kernel,
    pointer,
)
from vmamba_mm.ops.fused.channels import why_not_channels
from vmamba_mm.ops.scan_kernels.cuda import dense


def why_not(x: Tensor, *tensors: Tensor | None) -> str | None:
    """The reason why the kernel cannot take these inputs, or None."""
    mean, variance, weight, bias, residual = tensors
    if residual is not None and residual.dtype != x.dtype:
        return f'the residual is {residual.dtype}, and x {x.dtype}'
    if mean.dtype != variance.dtype or weight.dtype != bias.dtype:
        return 'mean and variance, or weight and bias, differ in dtype'
    if x.numel() // x.shape[-1] >= 2**31:
        return 'there are 2^31 positions or more'
    return why_not_channels(x, x.shape[-1], (mean, weight))


def instance(type_: str) -> Instance:
    return Instance('fused/batch_norm.cu', f'batch_norm<{type_}>')


#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = {
    instance(type_): low for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75))}


@cached
def _launch(index, dtype, statistics, weight, positions, dim, relu):
    """It takes the addresses ``x``, ``residual``, ``mean``, ``variance``, ``weight``, ``bias``,
    ``y``; and ``eps``."""
    groups = dim // 4
    side = min(groups, 64)
    above = 256 // side
    columns = -(-groups // side)
    blocks = min(-(-positions // above), max(1, 8 * device_limits(index)[0] // columns))
    return kernel(index, instance, TYPES[dtype]).bind(
        (blocks, columns, 1), (side, above, 1), 0, ('eps',), positions=positions, dim=dim,
        relu=int(relu), statistics_type=CODES[statistics], weight_type=CODES[weight])


def forward(x, mean, variance, weight, bias, residual, relu, eps) -> Tensor:
    x, residual = dense(x), dense(residual)
    mean, variance, weight, bias = (t.contiguous() for t in (mean, variance, weight, bias))
    y = torch.empty_like(x)
    _launch(x.get_device(), x.dtype, mean.dtype, weight.dtype, x.numel() // x.shape[-1],
            x.shape[-1], relu)(
        x=x.data_ptr(), residual=pointer(residual), mean=mean.data_ptr(),
        variance=variance.data_ptr(), weight=weight.data_ptr(), bias=bias.data_ptr(),
        y=y.data_ptr(), eps=eps)
    return y
