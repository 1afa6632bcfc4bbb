"""``causal_conv`` by the CUDA kernels in ``kernels/causal_conv``, for 2 to 4 taps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.causal_conv.chunked import laid_out_like
from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    cached,
    device_limits,
    kernel,
    pointer,
    why_not_beside,
)
from vmamba_mm.ops.fused.channels import SumJob, sum_launch
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels

FORWARD, BACKWARD, BOTH = 1, 2, 3  # DIRECTIONS in causal_conv.cuh
TAPS = 2, 3, 4
_THREADS = 128


# --- what is compiled -------------------------------------------------------------------------

def _instance(name: str, type_: str, taps: int, directions: int, last: bool, vector: bool
              ) -> Instance:
    last_ = str(last).lower()
    return Instance(f'causal_conv/{name}.cu',
                    f'{name}<{type_}, {taps}, {directions}, {last_}, {1 + vector}>')


def forward_instance(*args) -> Instance:
    return _instance('causal_conv_fwd', *args)


def backward_instance(*args) -> Instance:
    return _instance('causal_conv_bwd', *args)


# Type, taps, directions, whether channels are adjacent in memory, whether they come in pairs.
_COMPILED = [('Half', 4, BOTH, True, True), ('BFloat', 4, BOTH, True, True),
             ('Half', 4, FORWARD, False, False), ('Float', 2, BACKWARD, True, False)]

#: What is compiled to check it, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    instance: 80 if args[0] == 'BFloat' else 75 for args in _COMPILED
    for instance in (forward_instance(*args), backward_instance(*args))}


# --- launches, of addresses -------------------------------------------------------------------

class Strides(NamedTuple):
    """Of a map (K, B, L, D), in elements; K for results alone."""
    k: int
    b: int
    l: int  # noqa: E741
    d: int

    def fields(self, name: str) -> dict[str, int]:
        return {f'{name}_{side}': value for side, value in self._asdict().items()}


class Sizes(NamedTuple):
    batch: int
    length: int
    dim: int
    taps: int


def _constants(sizes: Sizes, weight: torch.dtype, bias: torch.dtype | None, silu: bool, last: bool,
               vector: bool) -> tuple[int, int, dict[str, int]]:
    """Blocks side by side in channels, blocks that all rows need, and fields of both kernels."""
    columns = -(-sizes.dim // (32 * (1 + vector))) if last else sizes.dim
    rows = sizes.batch * -(-sizes.length // (8 if last else 4))
    return columns, -(-rows // (_THREADS // 32 if last else _THREADS)), dict(
        batch=sizes.batch, length=sizes.length, dim=sizes.dim, silu=int(silu), columns=columns,
        weight_type=CODES[weight], bias_type=CODES[bias or weight])


@cached
def forward_launch(index: int, dtype: torch.dtype, sizes: Sizes, directions: int, x: Strides,
                   y: Strides, weight: torch.dtype, bias: torch.dtype | None, silu: bool,
                   vector: bool) -> Callable[..., None]:
    """The convolution in one or both directions, of weights (K, D, W) and biases (K, D).

    It takes the addresses ``x_data``, ``y_data``, ``weight`` and, in one direction, ``before`` and
    ``last`` (B, W - 1, D); and ``bias``. ``vector``: D is even and so is every stride but that of
    D, which is 1; addresses are multiples of 8.
    """
    last = x.d == 1
    columns, chunks, constants = _constants(sizes, weight, bias, silu, last, vector)
    return kernel(index, forward_instance, TYPES[dtype], sizes.taps, directions, last, vector).bind(
        (columns * chunks, 1, 1), (_THREADS, 1, 1), **constants, **x.fields('x'), **y.fields('y'))


@cached
def backward_launch(index: int, dtype: torch.dtype, sizes: Sizes, directions: int, x: Strides,
                    dy: Strides, more: Strides | None, dx: Strides, weight: torch.dtype,
                    bias: torch.dtype | None, silu: bool, vector: bool
                    ) -> tuple[int, Callable[..., None]]:
    """Elements, fp32, of ``partials``, and the backward, for gradients of the dtypes of what they
    are by.

    It takes the addresses x, dy, dx, weight, dweight, partials and, 0 for none, of bias, dbias,
    more (added to dy), before, dlast and dbefore.
    """
    last = x.d == 1
    routes = 2 if directions == BOTH else 1
    columns, chunks, constants = _constants(sizes, weight, bias, silu, last, vector)
    chunks = min(chunks, max(1, 3 * device_limits(index)[0] // columns))
    rows = routes * (sizes.taps + 1)
    launch = kernel(index, backward_instance, TYPES[dtype], sizes.taps, directions, last,
                    vector).bind(
        (columns * chunks, 1, 1), (_THREADS, 1, 1), 4 * rows * (1 + vector) * _THREADS,
        chunks=chunks, **constants, **x.fields('x'), **dy.fields('dy'), **dx.fields('dx'),
        **(more or dy).fields('more'))
    sums = sum_launch(index, SumJob(chunks, sizes.taps, routes * sizes.dim, weight, bias))

    def launch_backward(x, dy, dx, weight, dweight, partials, bias=0, dbias=0, more=0, before=0,
                        dlast=0, dbefore=0):
        launch(x_data=x, dy_data=dy, dx_data=dx, more_data=more, weight=weight, bias=bias,
               before=before, dlast=dlast, dbefore=dbefore, partials=partials)
        sums((partials, dweight, dbias))

    return chunks * rows * sizes.dim, launch_backward


# --- on tensors -------------------------------------------------------------------------------

def why_not(x, weight, bias, initial_state, silu, reverse, return_final_state) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    if weight.shape[1] not in TAPS:
        return f'{weight.shape[1]} taps; the kernels take {TAPS[0]} to {TAPS[-1]}'
    return why_not_beside(x, weight, bias, initial_state) or scan_kernels.why_not(x, 0, 1)


def _aligned(x: Tensor) -> tuple[Tensor, Strides]:
    """``x``, or a copy if neither its channels nor its positions are adjacent."""
    strides = x.stride()
    if strides[2] != 1 and strides[1] != 1:
        x = x.contiguous()
        strides = x.stride()
    if strides[2] != 1 and x.shape[2] == 1:  # a single channel has no stride
        return x, Strides(0, *strides)
    return x, Strides(0, *strides)


def _is_vector(dim: int, *maps: tuple[int, Strides]) -> bool:
    return dim % 2 == 0 and all(address % 8 == 0 and s.d == 1 and (s.k | s.b | s.l) % 2 == 0
                                for address, s in maps)


def forward(x, weight, bias, initial_state, silu, reverse, return_final_state
            ) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`vmamba_mm.ops.causal_conv`; the second result is empty without
    ``return_final_state``."""
    out = torch.empty_like(x)
    x, x_strides = _aligned(x)
    y, y_strides = out, Strides(0, *out.stride())
    if (y_strides.d == 1) != (x_strides.d == 1):
        y = torch.empty_like(x)
        y_strides = Strides(0, *y.stride())
    batch, length, dim = x.shape
    sizes = Sizes(batch, length, dim, weight.shape[1])
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    before = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    state = x.new_empty((batch, sizes.taps - 1, dim) if return_final_state else 0)
    vector = _is_vector(dim, (x.data_ptr(), x_strides), (y.data_ptr(), y_strides),
                        (pointer(before), x_strides))
    forward_launch(x.get_device(), x.dtype, sizes, BACKWARD if reverse else FORWARD, x_strides,
                   y_strides, weight.dtype, None if bias is None else bias.dtype, silu, vector)(
        x_data=x.data_ptr(), y_data=y.data_ptr(), weight=weight.data_ptr(), bias=pointer(bias),
        before=pointer(before), last=state.data_ptr() if return_final_state else 0)
    return y if y is out else out.copy_(y), state


def backward(grad_y, grad_state, x, weight, bias, initial_state, silu, reverse,
             return_final_state):
    """Gradients by x, weight, bias and initial_state (None where the input is None)."""
    shape, dtype = x.shape, x.dtype
    x, x_strides = _aligned(x)
    last = x_strides.d == 1
    batch, length, dim = shape
    sizes = Sizes(batch, length, dim, weight.shape[1])
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    before = None if initial_state is None else initial_state.to(dtype).contiguous()
    if grad_y is None:
        grad_y = torch.zeros(shape, dtype=dtype, device=x.device)
    dy = laid_out_like(x, grad_y.to(dtype))
    dlast = grad_state.to(dtype).contiguous() if return_final_state and grad_state is not None \
        else None
    dx = torch.empty_like(dy)
    dbefore = None if before is None else torch.empty_like(before)
    dweight = torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    strides = Strides(0, *dy.stride())
    vector = last and _is_vector(dim, (x.data_ptr(), x_strides), (dy.data_ptr(), strides),
                                 (pointer(before) | pointer(dlast), strides))
    size, launch = backward_launch(
        x.get_device(), dtype, sizes, BACKWARD if reverse else FORWARD, x_strides, strides, None,
        Strides(0, *dx.stride()), weight.dtype, None if bias is None else bias.dtype, silu, vector)
    partials = x.new_empty(size, dtype=torch.float32)
    launch(x=x.data_ptr(), dy=dy.data_ptr(), dx=dx.data_ptr(), weight=weight.data_ptr(),
           dweight=dweight.data_ptr(), partials=partials.data_ptr(), bias=pointer(bias),
           dbias=pointer(dbias), before=pointer(before), dlast=pointer(dlast),
           dbefore=pointer(dbefore))
    if dbefore is not None:
        dbefore = dbefore.to(initial_state.dtype)
    return dx, dweight, dbias, dbefore
