"""``add_norm`` by the CUDA kernels ``add_norm.cu`` and ``norm_bwd.cu``."""

from typing import NamedTuple

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
from vmamba_mm.ops.fused.channels import as_template, parameter_grads, why_not_channels
from vmamba_mm.ops.scan_kernels.cuda import dense


def why_not(x: Tensor, *tensors: Tensor | None) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    return why_not_channels(x, x.shape[-1], tensors)


# --- what is compiled -------------------------------------------------------------------------

class Patches(NamedTuple):
    """Which rows of its input a norm takes, or where those of its result lie: as in patches.cuh,
    whose ``order`` is one of PLAIN, EXPAND and MERGE; sides of the input map, ``factor``."""
    order: int
    height: int = 0
    width: int = 0
    factor: int = 0


PLAIN = 0
EXPAND = 1
MERGE = 2
_PLAIN = Patches(PLAIN)


def forward_instance(x_type: str, branch_type: str, out_type: str, adds: bool, parts: int,
                     lanes: int = 32, rms: bool = False, order: int = PLAIN) -> Instance:
    last = f', false, {order}' if order else _RMS[rms]
    return Instance('fused/add_norm.cu', f'add_norm<{x_type}, {branch_type}, {out_type}, '
                    f'{as_template(adds)}, {parts}, {lanes}{last}>')


def backward_instance(grad_type: str, x_type: str, branch_type: str, parts: int, team: int,
                      lanes: int = 32, rms: bool = False, gate: bool = False, silu: bool = False,
                      order: int = PLAIN) -> Instance:
    last = f', false, false, false, {order}' if order else _GATE[silu] if gate else _RMS[rms]
    return Instance('fused/norm_bwd.cu', f'norm_bwd<{grad_type}, {x_type}, {branch_type}, {parts}, '
                    f'{team}, {lanes}{last}>')


# The last arguments of the templates.
_RMS = {False: '', True: ', true'}
_GATE = {False: ', false, true', True: ', false, true, true'}


# Types of x, branch and result: everything in a half, autocast, everything in fp32.
_TYPES = [('Half', 'Half', 'Half'), ('BFloat', 'BFloat', 'BFloat'), ('Float', 'Half', 'Half'),
          ('Float', 'BFloat', 'BFloat'), ('Float', 'Float', 'Float')]
# Parts of 128 channels, and the lanes of a position where they are not 32: the fewest, of a quarter
# of a warp, half of one and one, some, and the most that a VMamba has (1,536 channels). In the
# backward between them the warps of a position, each of which has so many parts.
_FORWARD_PARTS = (1, 8), (1, 16), (1,), (6,), (12,)
_BACKWARD_PARTS = (1, 1, 8), (1, 1, 16), (1, 1), (3, 2), (4, 4)
#: What is compiled to check it, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    **{instance: 80 if 'BFloat' in types else 75 for types in _TYPES for instance in (
        *(forward_instance(*types, adds, *parts) for adds in (False, True)
          for parts in _FORWARD_PARTS),
        *(backward_instance(types[2], types[0], types[1], *parts) for parts in _BACKWARD_PARTS))},
    # The norm at the end of a network under autocast: fp32, of a half.
    forward_instance('Half', 'Half', 'Float', False, 1): 75,
    backward_instance('Float', 'Half', 'Half', 1, 1): 75,
    # A branch that layer scale gives in fp32, of the channels that RMT-B has where it has that.
    forward_instance('Half', 'Float', 'Half', True, 3): 75,
    # RMSNorm, of the channels that Vim has: 192, 384 and 768.
    **{instance: 75 for parts in (2, 3, 6) for instance in (
        forward_instance('Float', 'Half', 'Half', True, parts, rms=True),
        backward_instance('Half', 'Float', 'Half', 3 if parts == 6 else parts, 1 + (parts == 6),
                          rms=True))},
    # LayerNorm, of those that PointMamba has: 384.
    forward_instance('Float', 'Half', 'Half', True, 3): 75,
    backward_instance('Half', 'Float', 'Half', 3, 1): 75,
    # A LayerNorm and a gate, of the channels that VSSD has: 96 to 768.
    **{backward_instance(type_, type_, type_, parts, team, gate=True): low
       for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75))
       for parts, team in ((1, 1), (2, 1), (3, 1), (4, 1), (3, 2))},
    # And SiLU of the gate, of those that a vanilla VMamba has: 192 to 2,048.
    **{backward_instance(type_, type_, type_, parts, team, gate=True, silu=True): low
       for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75))
       for parts, team in ((2, 1), (4, 1), (3, 4), (4, 4))},
    # Of patches, of the channels that a VM-UNet has: 24 to 384 expanded ones, of a half, and 384 to
    # 1,536 merged ones, of the residual sum; under autocast, and everything in fp32.
    **{instance: 80 if 'BFloat' in (x, out) else 75
       for x, out, order, sizes in (
           *((x, 'Float', EXPAND, ((1, 1, 1, 8), (1, 1, 1, 32), (3, 3, 1, 32)))
             for x in ('Half', 'BFloat', 'Float')),
           *(('Float', out, MERGE, ((3, 3, 1, 32), (12, 3, 4, 32)))
             for out in ('Half', 'BFloat', 'Float')))
       for parts, parts_back, team, lanes in sizes
       for instance in (forward_instance(x, x, out, False, parts, lanes, order=order),
                        backward_instance(out, x, x, parts_back, team, lanes, order=order))},
}


# --- launches ---------------------------------------------------------------------------------

def _lanes_of_position(dim: int) -> int:
    return 8 if dim <= 32 else 16 if dim <= 64 else 32


@cached
def forward_launch(index, x, branch, out, weight, batch, length, dim, rms=False, patches=_PLAIN):
    """The forward for these dtypes, None of ``branch`` without a sum, of ``weight`` without a norm;
    ``rms`` for an RMSNorm. Of ``patches`` the rows of the norm are ``batch`` times ``length``.

    It takes the addresses ``x``, ``branch`` (without a sum, (D) in fp32 to be added before the
    norm, or null), ``scale``, ``weight``, ``bias``, ``sum``, ``normed``, ``moments``; and ``eps``.
    """
    positions, lanes = batch * length, _lanes_of_position(dim)
    blocks = min(-(-positions * lanes // 256), 8 * device_limits(index)[0])
    return kernel(index, forward_instance, TYPES[x], TYPES[branch or x], TYPES[out],
                  branch is not None, -(-dim // 128), lanes, rms, patches.order).bind(
        (blocks, 1, 1), (256, 1, 1), 8 * dim if weight else 0, ('eps',), positions=positions,
        length=length, dim=dim, parameter_type=CODES.get(weight, 0), **_fields(patches))


def _fields(patches: Patches) -> dict[str, int]:
    return {f'patches_{name}': value for name, value in patches._asdict().items()
            if name != 'order'}


@cached
def backward_launch(index, grad, x, branch, weight, batch, length, dim, rms=False,
                    gate_strides=(0, 0), silu=False, patches=_PLAIN):
    """Blocks, each of which leaves a part (2, D) of the gradients by weight and bias, and the
    backward for these dtypes, None of ``branch`` without a sum.

    It takes the addresses ``grad``, ``input`` (of the norm), ``moments``, ``weight``,
    ``extra_grad`` (a gradient by that input to be added, or null), ``scale``, ``dinput``,
    ``dbranch``, ``partials``. With a gate after the norm also ``bias``, ``gate`` and ``dgate``, of
    which the latter have rows that are ``gate_strides`` elements apart; if it is ``silu`` of the
    gate, also ``result``, to which the product is written.
    """
    positions, lanes = batch * length, _lanes_of_position(dim)
    team = 1 << ((dim - 1) // 512).bit_length()  # 1, 2, 4 or 8 warps: 512 channels each
    blocks = min(-(-positions * team * lanes // 256), 4 * device_limits(index)[0])
    launch = kernel(index, backward_instance, TYPES[grad], TYPES[x], TYPES[branch or x],
                    -(-dim // (128 * team)), team, lanes, rms, gate_strides[0] > 0, silu,
                    patches.order).bind(
        (blocks, 1, 1), (256, 1, 1), 8 * dim, positions=positions, length=length, dim=dim,
        parameter_type=CODES[weight], gate_stride=gate_strides[0], dgate_stride=gate_strides[1],
        **_fields(patches))
    return blocks, launch


# --- on tensors -------------------------------------------------------------------------------

def forward(x, branch, scale, weight, bias, eps, out_dtype, save, shift=None):
    """(sum, normed, moments): shapes and dtypes as in the op, None for what was not asked for.

    Without a bias it is an RMSNorm.

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
        weight = weight.contiguous()
        bias = None if bias is None else bias.to(weight.dtype).contiguous()
    forward_launch(x.get_device(), x.dtype, branch.dtype if adds else None, out_dtype,
                   weight.dtype if norms else None, len(x), positions // len(x), dim,
                   norms and bias is None)(
        x=x.data_ptr(), branch=pointer(branch if adds else shift), scale=pointer(scale),
        weight=pointer(weight), bias=pointer(bias),
        sum=x.data_ptr() if save and shift is not None else pointer(total),
        normed=pointer(normed), moments=pointer(moments), eps=eps)
    return total, normed, moments


def backward(grad, x, moments, weight, bias, extra_grad, scale, branch_dtype):
    """(dx, dbranch, dweight, dbias): as in the op ``add_norm_bwd``."""
    x, grad, extra_grad, dim = dense(x), dense(grad), dense(extra_grad), x.shape[-1]
    flat_weight = weight.contiguous()
    dx = torch.empty_like(x)
    dbranch = x.new_empty(x.shape if branch_dtype else (0,), dtype=branch_dtype or x.dtype)
    dweight = torch.empty_like(weight)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    if x.numel() == 0:
        return dx, dbranch, dweight.zero_(), dbias.zero_()
    blocks, launch = backward_launch(x.get_device(), grad.dtype, x.dtype, branch_dtype,
                                     weight.dtype, len(x), x.numel() // dim // len(x), dim,
                                     bias is None)
    partials = x.new_empty((blocks, 2, dim), dtype=torch.float32)
    launch(grad=grad.data_ptr(), input=x.data_ptr(), moments=moments.data_ptr(),
           weight=flat_weight.data_ptr(), extra_grad=pointer(extra_grad), scale=pointer(scale),
           dinput=dx.data_ptr(), dbranch=dbranch.data_ptr() if branch_dtype else 0,
           partials=partials.data_ptr())
    parameter_grads(partials, dweight, None if bias is None else dbias, 1)
    return dx, dbranch, dweight, dbias


def gated_backward(grad, x, moments, weight, bias, gate, dgate=None):
    """Gradients by x, weight, bias and the gate of ``norm(x) * gate``, for maps (B, L, D) of one
    dtype; the last is written to ``dgate``, or to a new map. The rows of both are evenly spaced and
    begin at multiples of four elements."""
    x, grad, dim = dense(x), dense(grad), x.shape[-1]
    weight, bias = weight.contiguous(), bias.to(weight.dtype).contiguous()
    dx, dweight, dbias = (t.new_empty(t.shape) for t in (x, weight, bias))
    dgate = x.new_empty(x.shape) if dgate is None else dgate
    blocks, launch = backward_launch(x.get_device(), grad.dtype, x.dtype, None, weight.dtype,
                                     len(x), x.shape[1], dim,
                                     gate_strides=(gate.stride(1), dgate.stride(1)))
    partials = x.new_empty((blocks, 2, dim), dtype=torch.float32)
    launch(grad=grad.data_ptr(), input=x.data_ptr(), moments=moments.data_ptr(),
           weight=weight.data_ptr(), dinput=dx.data_ptr(), partials=partials.data_ptr(),
           bias=bias.data_ptr(), gate=gate.data_ptr(),
           dgate=dgate.data_ptr())
    parameter_grads(partials, dweight, dbias, 1)
    return dx, dweight, dbias, dgate


def scaled(grad, scale, dtype):
    """``grad`` of a sum, times ``scale`` for each sample, as the gradient by its branch."""
    if scale is None:
        return grad.to(dtype)
    return torch.mul(grad, scale.view(-1, *[1] * (grad.dim() - 1)),
                     out=torch.empty_like(grad, dtype=dtype))

