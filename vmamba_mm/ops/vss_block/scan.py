"""The scan of a block: by the kernels for half-precision maps, or by the walk kernels in fp32.

``sizes`` are (batch, D, height, width, rank, routes); ``product`` makes a matrix product, as
:func:`vmamba_mm.ops.core.gemm.product` does; ``dtypes`` are those of x_proj_weight,
dt_projs_weight, dt_projs_bias, A_logs, D, and of weight and bias of the norm. All else are
addresses.
"""

import math

import torch

from vmamba_mm.ops.scan_kernels import cuda as walk
from vmamba_mm.ops.ss2d_scan import cuda, schedule


def kept_sizes(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """Elements that are kept for the backward: columns of the projected input for a route, the
    parameters as the kernels take them, the states, which follow those."""
    batch, dim, height, width, rank, routes = sizes
    length = height * width
    if dtype == torch.float32:
        return rank + 2, walk.prepared_size(sizes, 1), math.prod(
            walk.states_shape(batch, routes, length, 1, dim))
    *parameters, states = schedule.kept_sizes(batch, dim, length, rank, routes)
    return schedule.row_of(rank), sum(parameters), states


class _Sizes:
    def __init__(self, dtype, sizes):
        batch, self.dim, height, width, _, self.routes = sizes
        self.length = height * width
        self.pixels = batch * self.length
        row, parameters, _ = kept_sizes(dtype, sizes)
        self.columns, self.states = self.routes * row, parameters * dtype.itemsize


class HalfForward(_Sizes):
    """``maps`` that it writes, to be merged; elements of ``memory`` that it needs. ``prepare``
    takes the parameters, ``kept``, ``memory``, and what is rounded too, as prepare_launch."""

    def __init__(self, index, dtype, sizes, dtypes, product, casts):
        super().__init__(dtype, sizes)
        self.prepare = cuda.prepare_launch(index, dtype, sizes, dtypes[:5], True, casts)
        self.project = product(self.pixels, self.columns, self.dim, right_t=True)
        self.scan = cuda.scan_launch(index, dtype, sizes, _fields(self, 1), False)
        self.merge = cuda.merge_launch(index, dtype, sizes, False, False, dtypes[5])
        self.maps, self.memory = schedule.plan_of(*sizes, index).forward.maps, self.scan.memory // 2

    def run(self, parameters, given, projected, kept, maps, save, memory, workspace):
        self.project(given, kept, projected, workspace)
        self.scan.run(projected, kept, (given,), maps, kept + self.states if save else 0, (),
                      memory)


class HalfBackward(_Sizes):
    """``maps`` that it writes; ``parts`` of the gradient by the projected input; elements of that
    by x_proj_weight, of ``partials`` in fp32 and of ``memory``; ``jobs`` for sum_launch: what it
    leaves of the gradients by the norm."""

    def __init__(self, index, dtype, sizes, dtypes, norm_parts, product):
        super().__init__(dtype, sizes)
        plan = schedule.plan_of(*sizes, index)
        self.scan = cuda.scan_launch(index, dtype, sizes, _fields(self, 2), True)
        self.project = product(self.pixels, self.dim, self.columns)
        self.merge = cuda.merge_launch(index, dtype, sizes, True, True, None)
        self.dproject = product(self.columns, self.dim, self.pixels, left_t=True)
        self.finish = cuda.finish_launch(index, dtype, sizes, dtypes, norm_parts)
        self.maps, self.parts = plan.backward.maps, plan.backward.columns
        self.product, self.memory = self.columns * self.dim, self.scan.memory // 2
        self.partials, self.jobs = plan.backward.spans * cuda.columns_of(sizes), ()

    def run(self, given, grad, projected, kept, maps, dprojected, partials, memory):
        self.scan.run(projected, kept, (given, grad), maps, kept + self.states,
                      (dprojected, partials), memory)

    def end(self, parameters, given, kept, maps, dprojected, partials, product, norm_sums, dgiven,
            grads, workspace):
        self.project(dprojected, kept, dgiven, workspace)
        self.merge(maps, dgiven, dgiven, 0, 0, 0, 0, 0.0)
        self.dproject(dprojected, given, product, workspace)
        self.finish(partials, product, norm_sums, *grads, parameters[3])


class FloatForward(_Sizes):
    """As :class:`HalfForward`; nothing is rounded."""

    def __init__(self, index, dtype, sizes, dtypes, product, casts):
        super().__init__(dtype, sizes)
        _, prepare = walk.prepare_launch(index, sizes, 1, dtypes[1:5], True)
        self.prepare = lambda x_proj, *others: prepare(*others[:-1])
        self.project = product(self.pixels, self.columns, self.dim, right_t=True)
        self.scan = walk.forward_launch(index, dtype, sizes, 1)
        self.merge = cuda.merge_launch(index, dtype, sizes, False, False, dtypes[5])
        self.maps, self.memory = self.routes, self.scan.memory // 4

    def run(self, parameters, given, projected, kept, maps, save, memory, workspace):
        self.project(given, parameters[0], projected, workspace)
        self.scan.run(given, projected, kept, maps, kept + self.states if save else 0, memory)


class FloatBackward(_Sizes):
    """As :class:`HalfBackward`."""

    def __init__(self, index, dtype, sizes, dtypes, norm_parts, product):
        super().__init__(dtype, sizes)
        self.scan = walk.backward_launch(index, dtype, sizes, 1)
        self.project = product(self.pixels, self.dim, self.columns)
        self.merge = cuda.merge_launch(index, dtype, sizes, True, True, None)
        self.dproject = product(self.columns, self.dim, self.pixels, left_t=True)
        self.finish = walk.finish_launch(index, sizes, 1, dtypes[1:5], self.scan.parts)
        self.jobs = (norm_parts, 1, self.dim, *dtypes[5:]),
        self.maps, self.parts, self.product = self.routes, self.scan.columns, 0
        self.memory = self.scan.memory // 4
        self.partials = self.scan.parts * self.routes * (sizes[4] + 3) * self.dim

    def run(self, given, grad, projected, kept, maps, dprojected, partials, memory):
        self.scan.run(given, projected, kept, kept + self.states, grad, maps, dprojected, partials,
                      memory)

    def end(self, parameters, given, kept, maps, dprojected, partials, product, norm_sums, dgiven,
            grads, workspace):
        self.project(dprojected, parameters[0], dgiven, workspace)
        self.merge(maps, dgiven, dgiven, 0, 0, 0, 0, 0.0)
        self.dproject(dprojected, given, grads[0], workspace)
        self.finish(partials, *grads[1:5], parameters[3])


def forward_of(dtype: torch.dtype) -> type[HalfForward] | type[FloatForward]:
    return FloatForward if dtype == torch.float32 else HalfForward


def backward_of(dtype: torch.dtype) -> type[HalfBackward] | type[FloatBackward]:
    return FloatBackward if dtype == torch.float32 else HalfBackward


def _fields(sizes, maps):
    """Of so many maps, after the address."""
    return ((sizes.length * sizes.dim, sizes.dim, 1, 1),) * maps
