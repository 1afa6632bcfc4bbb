"""``dwconv_silu`` and ``dwconv_add`` by the CUDA kernels ``dwconv.cu`` and ``dwconv_bwd.cu``."""

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

_ROWS, _ROWS_BACK = 2, 2  # rows of a thread


def why_not(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    return why_not_channels(x_BHWD, x_BHWD.shape[3], (weight, bias))


# --- what is compiled -------------------------------------------------------------------------

#: What comes after the convolution: SiLU, or the sum with its input, which may be a sum itself.
SILU, ADD, ADD_BRANCH = '', ', true, false', ', true, true'  # the last arguments of the templates


def forward_instance(type_: str, forward: bool, kind: str = SILU) -> Instance:
    """``forward``, or the gradient by the input."""
    return Instance('fused/dwconv.cu', f'dwconv<{type_}, {as_template(forward)}, {_ROWS}{kind}>')


def backward_instance(type_: str, kind: str = SILU) -> Instance:
    return Instance('fused/dwconv_bwd.cu', f'dwconv_bwd<{type_}, {_ROWS_BACK}{kind}>')


#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = {
    instance: low for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75))
    for kind in (SILU, ADD, ADD_BRANCH)
    for instance in (forward_instance(type_, True, kind), forward_instance(type_, False, kind),
                     backward_instance(type_, kind))}


# --- launches ---------------------------------------------------------------------------------

class _Schedule(NamedTuple):
    """How a map is divided. A thread has 4 channels and moves along a segment of a strip of rows.
    """
    side: int           # threads side by side in channels, and ...
    above: int          # ... one above the other
    channel_blocks: int
    segments: int       # of a strip
    columns: int        # of a segment
    strip_blocks: int


@cached
def _schedule(batch: int, height: int, width: int, dim: int, rows: int, threads: int, index: int
              ) -> _Schedule:
    groups = dim // 4
    side = next((n for n in range(min(64, threads), 15, -1) if groups % n == 0), min(groups, 32))
    above = threads // side
    strips = batch * -(-height // rows)
    # As many threads as four blocks of 256 for each multiprocessor have, but not much less than
    # four columns to a thread.
    wanted = -(-1024 * device_limits(index)[0] // (groups * strips))
    columns = -(-width // max(1, min(wanted, width // 4)))
    segments = -(-width // columns)
    return _Schedule(side, above, -(-groups // side), segments, columns,
                     -(-strips * segments // above))


def _constants(strides, shape, weight, bias, work: _Schedule) -> dict[str, int]:
    """The numbers that both kernels take."""
    stride_b, stride_pixel = strides
    batch, height, width, dim = shape
    return dict(x_stride_b=stride_b, x_stride_pixel=stride_pixel, x_batch=batch, x_height=height,
                x_width=width, x_dim=dim, segments=work.segments, columns=work.columns,
                weight_type=CODES[weight], bias_type=CODES[bias or weight])


@cached
def forward_launch(index, dtype, weight, bias, forward, strides, shape, kind=SILU, y_pixel=None):
    """The forward for these dtypes (None of ``bias`` without one), or the gradient by the input.

    ``strides`` of x from an image and a pixel to the next, ``shape`` (B, H, W, D); pixels of the
    result are ``y_pixel`` elements apart, None for D. It takes the addresses ``x_data``,
    ``weight``, ``bias``, ``y``; with a branch ``branch_data`` and
    ``branch_scale``, backwards ``dbranch`` and ``branch_scale``.
    """
    work = _schedule(*shape, _ROWS, 256, index)
    return kernel(index, forward_instance, TYPES[dtype], forward, kind).bind(
        (work.strip_blocks, work.channel_blocks, 1), (work.side, work.above, 1), 144 * work.side,
        y_pixel=y_pixel or shape[3], **_constants(strides, shape, weight, bias, work))


@cached
def backward_launch(index, dtype, weight, bias, strides, shape, kind=SILU):
    """Blocks, each of which leaves a part (10, D) of the gradients by weight and bias, and the
    backward up to the gradient dz by the convolution's result.

    It takes the addresses ``x_data``, ``weight``, ``bias``, ``dy``, ``dz``, ``partials``. If the
    input is added there is no ``dz``, which would be ``dy``.
    """
    work = _schedule(*shape, _ROWS_BACK, 128, index)
    blocks = min(work.strip_blocks, -(-8 * device_limits(index)[0] // work.channel_blocks))
    launch = kernel(index, backward_instance, TYPES[dtype], kind).bind(
        (blocks, work.channel_blocks, 1), (work.side, work.above, 1), 160 * work.side,
        **_constants(strides, shape, weight, bias, work))
    return blocks, launch


# --- on tensors -------------------------------------------------------------------------------

def _as_pixels(x_BHWD: Tensor) -> Tensor:
    """``x_BHWD``, or a copy if its pixels are not evenly spaced vectors of channels."""
    _, _, width, dim = x_BHWD.shape
    stride_b, stride_h, stride_w, stride_d = x_BHWD.stride()
    even = stride_h == width * stride_w or x_BHWD.shape[1] == 1
    aligned = stride_b % 4 == stride_w % 4 == 0 and x_BHWD.data_ptr() % 16 == 0
    return x_BHWD if stride_d == 1 and even and aligned else x_BHWD.clone(
        memory_format=torch.contiguous_format)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, forward: bool, kind: str = SILU,
              branch: Tensor | None = None, scale: Tensor | None = None, y: Tensor | None = None
              ) -> Tensor:
    """The forward, or the gradient by the input, which with a ``branch`` is written there, times
    ``scale``; to ``y``, whose pixels are evenly spaced, or a new map."""
    y = x.new_empty(x.shape) if y is None else y
    of_branch = {} if branch is None else {
        'branch_scale': pointer(scale), 'branch_data' if forward else 'dbranch': branch.data_ptr()}
    forward_launch(x.get_device(), x.dtype, weight.dtype, bias.dtype if bias is not None else None,
                   forward, (x.stride(0), x.stride(2)), x.shape, kind, y.stride(2))(
        x_data=x.data_ptr(), weight=weight.data_ptr(), bias=pointer(bias), y=y.data_ptr(),
        **of_branch)
    return y


def _parameter_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
                        dz: Tensor | None, kind: str = SILU, branch: Tensor | None = None,
                        scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias (empty without one); writes ``dz`` if it is there."""
    flat = weight.contiguous()
    flat_bias = None if bias is None else bias.contiguous()
    blocks, launch = backward_launch(
        x.get_device(), x.dtype, weight.dtype, bias.dtype if bias is not None else None,
        (x.stride(0), x.stride(2)), x.shape, kind)
    partials = x.new_empty((blocks, 10, x.shape[3]), dtype=torch.float32)
    launch(x_data=x.data_ptr(), weight=flat.data_ptr(), bias=pointer(flat_bias), dy=grad.data_ptr(),
           dz=pointer(dz), partials=partials.data_ptr(), branch_data=pointer(branch),
           branch_scale=pointer(scale))
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    parameter_grads(partials, dweight, None if bias is None else dbias, 9)
    return dweight, dbias


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the convolution, as the op ``dwconv_silu``."""
    bias = None if bias is None else bias.contiguous()
    return _convolve(_as_pixels(x), weight.contiguous(), bias, True)


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dx: Tensor | None = None
             ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias (empty without one); the first is written to ``dx``, whose
    pixels are evenly spaced and begin at multiples of four elements, or to a new map."""
    x, dz = _as_pixels(x), x.new_empty(x.shape)
    grads = _parameter_backward(dense(grad), x, weight, bias, dz)
    return _convolve(dz, weight.contiguous(), None, False, y=dx), *grads


def why_not_add(x, weight, bias, branch, scale) -> str | None:
    """The reason why the kernels cannot take these inputs of ``dwconv_add``, or None."""
    if branch is not None and branch.dtype != x.dtype:
        return f'the branch is {branch.dtype}, and x {x.dtype}'
    return why_not(x, weight, bias)


def _as_scale(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.to(torch.float32).contiguous()


def forward_add(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Tensor | None,
                scale: Tensor | None) -> Tensor:
    """The op ``dwconv_add``."""
    bias = None if bias is None else bias.contiguous()
    return _convolve(_as_pixels(x), weight.contiguous(), bias, True,
                     ADD if branch is None else ADD_BRANCH, dense(branch), _as_scale(scale))


def backward_add(grad, x, weight, bias, branch, scale):
    """Gradients by x, weight, bias and branch (None without one)."""
    grad, scale, kind = dense(grad), _as_scale(scale), ADD if branch is None else ADD_BRANCH
    dweight, dbias = _parameter_backward(grad, _as_pixels(x), weight, bias, None, kind,
                                         dense(branch), scale)
    dbranch = None if branch is None else branch.new_empty(branch.shape)
    dx = _convolve(grad, weight.contiguous(), None, False, kind, dbranch, scale)
    return dx, dweight, None if bias is None else dbias, dbranch
