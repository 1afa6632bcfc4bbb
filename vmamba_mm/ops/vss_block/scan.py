"""The scan of a block: by the kernels for half-precision maps with N = 1, or by those for any N.

Four classes with the same methods, a forward and a backward for each. Their constructors take
``sizes`` (batch, D, height, width, rank, routes), N, the dtypes of the block's weights, and
``product``, which makes a matrix product as :func:`vmamba_mm.ops.core.gemm.product` does; a forward
also what is rounded and the distance of a gate's rows, 0 without one. Their methods take addresses.
"""

import math

import torch

from vmamba_mm.ops.fused.cast import cast_launch
from vmamba_mm.ops.fused.channels import SumJob
from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.ss2d_scan import cuda, schedule
from vmamba_mm.ops.vss_block.buffers import BackwardSlab, ForwardSlab, Saved
from vmamba_mm.ops.vss_block.weights import Weights


def is_half(dtype: torch.dtype, state: int) -> bool:
    """Whether the scan is by the kernels for half-precision maps, which round x_proj_weight too."""
    return dtype != torch.float32 and state == 1


def saved_sizes(dtype: torch.dtype, sizes: tuple[int, ...], state: int) -> tuple[int, int, int]:
    """Elements that are saved for the backward: columns of the projected input for a route, the
    parameters as the kernels take them, the states, which follow those."""
    batch, dim, height, width, rank, routes = sizes
    length = height * width
    if not is_half(dtype, state):
        words = 4 // dtype.itemsize
        return rank + 2 * state, words * scans.prepared_size(sizes, state), words * math.prod(
            scans.states_shape(batch, routes, length, state, dim))
    *parameters, states = schedule.saved_sizes(batch, dim, length, rank, routes)
    return schedule.row_of(rank), sum(parameters), states


def _scan_dtypes(dtypes: Weights) -> tuple[torch.dtype, ...]:
    return dtypes.x_proj, dtypes.dt_projs, dtypes.dt_bias, dtypes.A_logs, dtypes.D


class _Sizes:
    """``columns`` of the projected input, and the bytes after which the states begin in
    ``scan_state``."""

    def __init__(self, dtype, sizes, state):
        batch, self.dim, height, width, self.rank, self.routes = sizes
        self.length = height * width
        self.pixels = batch * self.length
        row, parameters, _ = saved_sizes(dtype, sizes, state)
        self.columns, self.states = self.routes * row, parameters * dtype.itemsize

    def map_fields(self, maps):
        """Strides and vectors of so many maps, as the kernels take them after an address."""
        return ((self.length * self.dim, self.dim, 1, 1),) * maps


class HalfForward(_Sizes):
    """``maps`` that it writes, to be merged; elements of ``memory`` that it needs.

    ``prepare`` takes the parameters of the scan, ``scan_state``, the memory, and what is rounded
    too and where to, as :func:`vmamba_mm.ops.ss2d_scan.cuda.prepare_launch`; ``merge`` is that of
    :func:`vmamba_mm.ops.ss2d_scan.cuda.merge_launch`. ``project_and_scan`` takes the address of
    x_proj_weight in ``dtype``, which only the kernels for any N need.
    """

    def __init__(self, index, dtype, sizes, state, dtypes, product, casts, gate_stride):
        super().__init__(dtype, sizes, state)
        self.prepare = cuda.prepare_launch(index, dtype, sizes, _scan_dtypes(dtypes), True, casts)
        self.project = product(self.pixels, self.columns, self.dim, right_t=True)
        self.scan = cuda.scan_launch(index, dtype, sizes, self.map_fields(1), False)
        self.merge = cuda.merge_launch(index, dtype, sizes, False, False, dtypes.out_norm,
                                       gate_stride=gate_stride)
        self.maps, self.memory = schedule.plan_of(*sizes, index).forward.maps, self.scan.memory // 2

    def project_and_scan(self, x_proj: int, saved: Saved, slab: ForwardSlab, save_states: bool):
        # The rounded x_proj_weight is first in scan_state.
        self.project(saved.scan_input, saved.scan_state, saved.projected, slab.workspace)
        self.scan.run(saved.projected, saved.scan_state, (saved.scan_input,), slab.scan_maps,
                      saved.scan_state + self.states if save_states else 0, (), slab.scan_memory)


class HalfBackward(_Sizes):
    """``maps`` that it writes; ``parts`` of the gradient by the projected input, of
    ``parts_dtype``; elements of ``dx_proj``, of ``partials`` in fp32 and of ``memory``; ``jobs``
    for sum_launch: what it leaves of the gradients by the norm."""

    def __init__(self, index, dtype, sizes, state, dtypes, norm_parts, product):
        super().__init__(dtype, sizes, state)
        plan = schedule.plan_of(*sizes, index)
        self.scan_launch = cuda.scan_launch(index, dtype, sizes, self.map_fields(2), True)
        self.project = product(self.pixels, self.dim, self.columns)
        self.merge = cuda.merge_launch(index, dtype, sizes, True, True, None)
        self.dproject = product(self.columns, self.dim, self.pixels, left_t=True)
        self.finish = cuda.finish_launch(
            index, dtype, sizes,
            (*_scan_dtypes(dtypes), dtypes.out_norm, dtypes.out_norm_bias), norm_parts)
        self.maps, self.parts = plan.backward.maps, plan.backward.columns
        self.parts_dtype = dtype
        self.dx_proj, self.memory = self.columns * self.dim, self.scan_launch.memory // 2
        self.partials, self.jobs = plan.backward.spans * cuda.columns_of(sizes), ()

    def scan(self, saved: Saved, b: BackwardSlab):
        self.scan_launch.run(
            saved.projected, saved.scan_state, (saved.scan_input, b.dmerged), b.scan_maps,
            saved.scan_state + self.states, (b.dprojected, b.scan_parts), b.scan_memory)

    def project_and_finish(self, w: Weights, x_proj: int, grads: Weights, saved: Saved,
                           b: BackwardSlab, dprojected: int):
        """``dprojected``: the one gradient by the projected input; ``x_proj`` as in the forward."""
        self.project(dprojected, saved.scan_state, b.dscan_input, b.workspace)
        self.merge(maps=b.scan_maps, extra=b.dscan_input, merged=b.dscan_input, eps=0.0)
        self.dproject(dprojected, saved.scan_input, b.dx_proj, b.workspace)
        self.finish(partials=b.scan_parts, product=b.dx_proj, norm=b.out_norm_parts,
                    x_weight=grads.x_proj, dt_weight=grads.dt_projs, bias=grads.dt_bias,
                    A=grads.A_logs, D=grads.D, norm_weight=grads.out_norm,
                    norm_bias=grads.out_norm_bias, A_logs=w.A_logs)


class AnyForward(_Sizes):
    """The same as :class:`HalfForward` for any N and dtype."""

    def __init__(self, index, dtype, sizes, state, dtypes, product, casts, gate_stride):
        super().__init__(dtype, sizes, state)
        _, self.prepare_scan = scans.prepare_launch(index, sizes, state, _scan_dtypes(dtypes)[1:],
                                                    True)
        self.round = cast_launch(index, dtype, *casts)[1] if casts[0] else None
        self.project = product(self.pixels, self.columns, self.dim, right_t=True)
        self.scan = scans.forward_launch(index, dtype, sizes, state)
        self.merge = cuda.merge_launch(index, dtype, sizes, False, False, dtypes.out_norm,
                                       gate_stride=gate_stride, state=state)
        self.maps, self.memory = self.routes, self.scan.memory // dtype.itemsize

    def prepare(self, x_proj, dt_projs, dt_bias, A_logs, D, scan_state, memory, to_round,
                rounded_to):
        self.prepare_scan(dt_projs, dt_bias, A_logs, D, scan_state)
        if to_round:
            self.round(to_round, rounded_to)

    def project_and_scan(self, x_proj: int, saved: Saved, slab: ForwardSlab, save_states: bool):
        self.project(saved.scan_input, x_proj, saved.projected, slab.workspace)
        self.scan.run(saved.scan_input, saved.projected, saved.scan_state, slab.scan_maps,
                      saved.scan_state + self.states if save_states else 0, slab.scan_memory)


class AnyBackward(_Sizes):
    """The same as :class:`HalfBackward` for any N and dtype."""

    def __init__(self, index, dtype, sizes, state, dtypes, norm_parts, product):
        super().__init__(dtype, sizes, state)
        self.scan_launch = scans.backward_launch(index, dtype, sizes, state)
        self.project = product(self.pixels, self.dim, self.columns)
        self.merge = cuda.merge_launch(index, dtype, sizes, True, True, None, state=state)
        self.dproject = product(self.columns, self.dim, self.pixels, left_t=True,
                                out_dtype=dtypes.x_proj)
        self.finish = scans.finish_launch(index, sizes, state, _scan_dtypes(dtypes)[1:],
                                         self.scan_launch.parts)
        self.jobs = SumJob(norm_parts, 1, self.dim, dtypes.out_norm, dtypes.out_norm_bias),
        self.maps, self.parts, self.dx_proj = self.routes, self.scan_launch.columns, 0
        self.parts_dtype = dtype if self.parts == 1 else torch.float32
        self.memory = self.scan_launch.memory // dtype.itemsize
        states, _ = scans.groups_of(state)
        self.partials = (self.scan_launch.parts * self.routes * (states + self.rank + 2)
                         * self.dim)

    def scan(self, saved: Saved, b: BackwardSlab):
        self.scan_launch.run(
            saved.scan_input, saved.projected, saved.scan_state, saved.scan_state + self.states,
            b.dmerged, b.scan_maps, b.dprojected, b.scan_parts, b.scan_memory)

    def project_and_finish(self, w: Weights, x_proj: int, grads: Weights, saved: Saved,
                           b: BackwardSlab, dprojected: int):
        self.project(dprojected, x_proj, b.dscan_input, b.workspace)
        self.merge(maps=b.scan_maps, extra=b.dscan_input, merged=b.dscan_input, eps=0.0)
        self.dproject(dprojected, saved.scan_input, grads.x_proj, b.workspace)
        self.finish(sums=b.scan_parts, dt_weight=grads.dt_projs, dt_bias=grads.dt_bias,
                    A=grads.A_logs, D=grads.D, A_logs=w.A_logs)


def forward_of(dtype: torch.dtype, state: int) -> type[HalfForward] | type[AnyForward]:
    return HalfForward if is_half(dtype, state) else AnyForward


def backward_of(dtype: torch.dtype, state: int) -> type[HalfBackward] | type[AnyBackward]:
    return HalfBackward if is_half(dtype, state) else AnyBackward
