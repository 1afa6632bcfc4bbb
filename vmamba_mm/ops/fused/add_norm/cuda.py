"""``add_norm`` by the CUDA kernels ``add_norm.cu`` and ``norm_bwd.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.fused.channels import parameter_grads, why_not_channels
from vmamba_mm.ops.scan_kernels.cuda import CODES, TYPES, dense, device_limits, pointer


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    return why_not_channels(x, x.shape[-1], others)


def forward_instance(x_type: str, branch_type: str, out_type: str, adds: bool, parts: int,
                     lanes: int = 32) -> Instance:
    return Instance('fused/add_norm.cu', f'add_norm<{x_type}, {branch_type}, {out_type}, '
                    f'{str(adds).lower()}, {parts}, {lanes}>', 'P' * 8 + 'fiiii')


def backward_instance(grad_type: str, x_type: str, branch_type: str, parts: int, team: int,
                      lanes: int = 32) -> Instance:
    return Instance('fused/norm_bwd.cu', f'norm_bwd<{grad_type}, {x_type}, {branch_type}, {parts}, '
                    f'{team}, {lanes}>', 'P' * 9 + 'iiii')


def _lanes(dim: int) -> int:
    """That have a position."""
    return 16 if dim <= 64 else 32


@cached
def forward_launch(index, x, branch, out, weight, batch, length, dim):
    """The forward for these dtypes, None of ``branch`` without a sum, of ``weight`` without a norm.

    Of addresses: x, branch (without a sum, (D) in fp32 to be added before the norm, or 0), scale,
    weight, bias, sum, normed, moments; and eps.
    """
    positions, lanes = batch * length, _lanes(dim)
    launch = kernel(index, forward_instance, TYPES[x], TYPES[branch or x], TYPES[out],
                    branch is not None, -(-dim // 128), lanes).bind(
        (min(-(-positions * lanes // 256), 8 * device_limits(index)[0]), 1, 1), (256, 1, 1),
        8 * dim if weight else 0)
    sizes = positions, length, dim, CODES.get(weight, 0)
    return lambda *addresses: launch(*addresses, *sizes)


@cached
def backward_launch(index, grad, x, branch, weight, batch, length, dim):
    """Blocks, each of which leaves a part (2, D) of the gradients by weight and bias, and the
    backward for these dtypes, None of ``branch`` without a sum.

    Of addresses: grad, x, moments, weight, others, scale, dx, dbranch, partials.
    """
    positions, lanes = batch * length, _lanes(dim)
    team = 1 << ((dim - 1) // 512).bit_length()  # 1, 2, 4 or 8 warps: 512 channels each
    blocks = min(-(-positions * team * lanes // 256), 4 * device_limits(index)[0])
    launch = kernel(index, backward_instance, TYPES[grad], TYPES[x], TYPES[branch or x],
                    -(-dim // (128 * team)), team, lanes).bind((blocks, 1, 1), (256, 1, 1), 8 * dim)
    sizes = positions, length, dim, CODES[weight]
    return blocks, lambda *addresses: launch(*addresses, *sizes)


def forward(x, branch, scale, weight, bias, eps, out_dtype, save, shift=None):
    """(sum, normed, moments): shapes and dtypes as in the op, None for what was not asked for.

    ``shift`` (D), fp32, is for calls without a branch: added before the norm, and if ``save`` to
    ``x`` itself, which has no gaps.
    """
    x, dim, adds, norms = dense(x), x.shape[-1], branch is not None, weight is not None
    positions = x.numel() // dim
    total = torch.empty_like(x, dtype=x.dtype if norms else out_dtype) if adds else None
    normed = torch.empty_like(x, dtype=out_dtype) if norms else None
    moments = x.new_empty((positions, 2), dtype=torch.float32) if save and norms else None
    if positions == 0:
        return total, normed, moments
    branch = dense(branch)
    if norms:
        bias = bias.to(weight.dtype)
    forward_launch(x.get_device(), x.dtype, branch.dtype if adds else None, out_dtype,
                   weight.dtype if norms else None, len(x), positions // len(x), dim)(
        x.data_ptr(), pointer(branch if adds else shift), pointer(scale), pointer(weight),
        pointer(bias), x.data_ptr() if save and shift is not None else pointer(total),
        pointer(normed), pointer(moments), eps)
    return total, normed, moments


def backward(grad, x, moments, weight, bias, others, scale, branch_dtype):
    """(dx, dbranch, dweight, dbias): as in the op ``add_norm_bwd``."""
    x, grad, others, dim = dense(x), dense(grad), dense(others), x.shape[-1]
    dx = torch.empty_like(x)
    dbranch = x.new_empty(x.shape if branch_dtype else (0,), dtype=branch_dtype or x.dtype)
    if x.numel() == 0:
        return dx, dbranch, torch.zeros_like(weight), torch.zeros_like(bias)
    blocks, launch = backward_launch(x.get_device(), grad.dtype, x.dtype, branch_dtype,
                                     weight.dtype, len(x), x.numel() // dim // len(x), dim)
    partials = x.new_empty((blocks, 2, dim), dtype=torch.float32)
    launch(grad.data_ptr(), x.data_ptr(), moments.data_ptr(), weight.data_ptr(), pointer(others),
           pointer(scale), dx.data_ptr(), dbranch.data_ptr() if branch_dtype else 0,
           partials.data_ptr())
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    parameter_grads(partials, dweight, dbias, 1)
    return dx, dbranch, dweight, dbias


def scaled(grad, scale, dtype):
    """``grad`` of a sum, times ``scale`` for each sample, as the gradient by its branch."""
    if scale is None:
        return grad.to(dtype)
    return torch.mul(grad, scale.view(-1, *[1] * (grad.dim() - 1)),
                     out=torch.empty_like(grad, dtype=dtype))

