"""ss2d_scan by the CUDA kernels in ``kernels/scan``: any number of states, half and fp32 maps.

What they refuse: :func:`vmamba_mm.ops.scan_kernels.cuda.why_not`. Parameters are fp32, fp16 or
bf16.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.scan_kernels.cuda import states_shape, why_not
from vmamba_mm.ops.ss2d_scan import layout, merge

__all__ = ['backward', 'forward', 'states_shape', 'why_not']


def _empty_maps(x: Tensor, routes: int, state: int) -> Tensor:
    """Memory for the results of each scan."""
    batch, dim, height, width = x.shape
    return x.new_empty((scans.groups_of(state)[1], routes, batch, height, width, dim),
                       dtype=scans.maps_dtype(x.dtype, state))


def _strides_of_pixels(x: Tensor) -> tuple[int, ...]:
    """Those that the kernels take along tables: of samples, channels, 0 and pixels."""
    stride_b, stride_pixel, stride_d = layout.strides(x)
    return stride_b, stride_d, 0, stride_pixel


def _memory(x: Tensor, launch: scans.Launch) -> Tensor:
    return x.new_empty(launch.memory, dtype=torch.uint8)


def forward(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor,
            A: Tensor, D: Tensor, save: bool, logs: bool = False, orders: Tensor | None = None
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of the inputs as in :func:`vmamba_mm.ops.ss2d_scan`; ``x`` with any strides; with
    ``logs`` A is -exp of what is given as such.

    Args:
        orders: (K, L) int32, the pixel h * W + w that each step of a route visits, for any K; None
            for the routes of ``ss2d_scan``.

    Returns:
        maps (K, B, H, W, D) in ``x``'s dtype, which add up to the result; projected
        (B*L, K*(R + 2N)): dt, B and C of each route; states: what enters each chunk, fp32 of
        :func:`states_shape`, empty unless ``save``.
    """
    routes, dim, rank = dt_projs_weight.shape
    batch, _, height, width = x.shape
    sizes, state = (batch, dim, height, width, rank, routes), A.shape[1]
    prepared = scans.prepare(sizes, (dt_projs_weight, dt_projs_bias, A, D), logs)
    pixels = layout.pixels(x)
    x, strides = (x, x.stride()) if orders is None else (pixels, _strides_of_pixels(pixels))
    projected = layout.project(pixels, x_proj_weight.flatten(0, 1).to(x.dtype))
    maps = _empty_maps(x, routes, state)
    states = x.new_empty(states_shape(batch, routes, height * width, state, dim) if save else 0,
                         dtype=torch.float32)
    launch = scans.forward_launch(x.get_device(), x.dtype, sizes, state, strides,
                                  ordered=orders is not None)
    memory = _memory(x, launch)
    launch.run(x=x.data_ptr(), projected=projected.data_ptr(), prepared=prepared.data_ptr(),
               maps=maps.data_ptr(), states=states.data_ptr(), memory=memory.data_ptr(),
               orders=scans.pointer(orders))
    return scans.merge_groups(maps, x.dtype), projected, states


def backward(grad_maps: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
             dt_projs_bias: Tensor, A: Tensor, D: Tensor, projected: Tensor, states: Tensor,
             logs: bool = False, orders: Tensor | None = None):
    """Gradients by the six inputs of :func:`forward`, in their dtypes; by x with its strides.

    Args:
        grad_maps: (B, D, H, W), by the sum of the maps, in ``x``'s dtype; any strides.
        projected, states: what the forward gave with ``save``.
        orders: as there.
    """
    given = x
    routes, dim, rank = dt_projs_weight.shape
    batch, _, height, width = x.shape
    sizes, state = (batch, dim, height, width, rank, routes), A.shape[1]
    parameters = (dt_projs_weight, dt_projs_bias, A, D)
    pixels, strides, grad_strides = layout.pixels(x), x.stride(), grad_maps.stride()
    if orders is not None:
        x, grad_maps = pixels, layout.pixels(grad_maps)
        strides, grad_strides = _strides_of_pixels(x), _strides_of_pixels(grad_maps)
    prepared, maps = scans.prepare(sizes, parameters, logs), _empty_maps(x, routes, state)
    launch = scans.backward_launch(x.get_device(), x.dtype, sizes, state, strides, grad_strides,
                                   ordered=orders is not None)
    dprojected = x.new_empty((launch.columns, *projected.shape),
                             dtype=x.dtype if launch.columns == 1 else torch.float32)
    if len(maps) > 1:
        dprojected.zero_()  # a group has the columns of its own states alone
    sums, memory = scans.empty_sums(x, sizes, state, launch.parts), _memory(x, launch)
    launch.run(x=x.data_ptr(), projected=projected.data_ptr(), prepared=prepared.data_ptr(),
               states=states.data_ptr(), grad=grad_maps.data_ptr(), maps=maps.data_ptr(),
               dprojected=dprojected.data_ptr(), sums=sums.data_ptr(), memory=memory.data_ptr(),
               orders=scans.pointer(orders))
    dprojected = dprojected[0] if launch.columns == 1 else dprojected.sum(0).to(x.dtype)
    grad_x = torch.mm(dprojected, x_proj_weight.flatten(0, 1).to(x.dtype))
    grad_x = merge.add(maps.flatten(0, 1), grad_x, batch)
    grad_x = grad_x.view(batch, height, width, dim).permute(0, 3, 1, 2)
    grad_weight = layout.project_weight_grad(dprojected, pixels)
    return (layout.like(grad_x, given),
            grad_weight.view(x_proj_weight.shape).to(x_proj_weight.dtype),
            *scans.finish(sums, sizes, parameters, logs))
