"""ss2d_scan and its norm by the CUDA kernels in ``kernels/``.

Here are the launches for N = 1 on half-precision maps; any other N and fp32 maps go to
:mod:`vmamba_mm.ops.ss2d_scan.large_state`. Nothing is built beforehand:
:mod:`vmamba_mm.ops.core.nvrtc` compiles at first use. The kernels' own comments and
``kernels/README.md`` say how they work.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.nvrtc import Instance, cached, kernel
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.cast import FIELDS, plan_cast
from vmamba_mm.ops.scan_kernels.cuda import CODES, TYPES, combine_instance, pointer
from vmamba_mm.ops.ss2d_scan import large_state, layout, merge, schedule

_SCAN = 'P' * 5 + 'i' * 14
_MAP = 'Piiii'
_FORWARD = (('WARPS', schedule.FORWARD.warps),
            ('BLOCKS', schedule.FORWARD.blocks_per_multiprocessor))
_AROUND = (('WARPS', schedule.CLUSTER_WARPS), ('BLOCKS', 1))
_HALVES = torch.float16, torch.bfloat16


def why_not(x: Tensor, out_dtype: torch.dtype, parameters: tuple[Tensor, ...]) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    reason = large_state.why_not(x, parameters[1].shape[2], parameters[3].shape[1])
    if reason is None and out_dtype not in (x.dtype, torch.float32):
        reason = f'out_dtype is {out_dtype}; the kernels give {x.dtype} and float32'
    if reason is None and any(p.dtype not in CODES for p in parameters):
        reason = 'a parameter is neither float32 nor float16 nor bfloat16'
    return reason


def _is_fast(x: Tensor, state: int) -> bool:
    """Whether the kernels of this module are for it."""
    return state == 1 and x.dtype in _HALVES


# --- what is compiled -------------------------------------------------------------------------

def prepare_instance(type_: str) -> Instance:
    return Instance('ss2d_prepare.cu', f'ss2d_prepare<{type_}>', 'P' * 11 + 'i' * 13 + FIELDS)


def forward_instance(type_: str, tiles: int, cluster: int = 0) -> Instance:
    return Instance('ss2d_scan_fwd.cu', f'ss2d_scan_fwd<{type_}, {tiles}>', _SCAN + _MAP + 'PPii',
                    (*_AROUND, ('CLUSTER', cluster)) if cluster else _FORWARD)


def runs_instance(type_: str, tiles: int) -> Instance:
    return Instance('ss2d_scan_runs.cu', f'ss2d_scan_runs<{type_}, {tiles}>',
                    _SCAN + _MAP + 'P' * 6, _FORWARD)


def backward_instance(type_: str, tiles: int, summary: bool) -> Instance:
    return Instance('ss2d_scan_bwd.cu', f'ss2d_scan_bwd<{type_}, {tiles}, {str(summary).lower()}>',
                    _SCAN + _MAP + _MAP + 'P' * 7,
                    (('WARPS', schedule.BACKWARD.warps),
                     ('BLOCKS', schedule.BACKWARD.blocks_per_multiprocessor)))


def finish_instance(type_: str) -> Instance:
    return Instance('ss2d_finish.cu', f'ss2d_finish<{type_}>', 'P' * 10 + 'i' * 13 + 'P')


# --- launches, for sizes (batch, dim, height, width, rank, routes), of addresses -----------------

@cached
def prepare_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                   dtypes: tuple[torch.dtype, ...], logs: bool,
                   casts: tuple[tuple[int, ...], tuple[torch.dtype, ...]] = ((), ())
                   ) -> Callable[..., None]:
    """Of addresses: x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, of these dtypes, ``kept``,
    ``memory`` of the scan, and the parameters that are rounded too, ``casts`` their elements and
    dtypes, and where to, as of :func:`vmamba_mm.ops.fused.cast.plan_cast`."""
    plan = schedule.plan_of(*sizes, index)
    zeros = _flags(sizes, plan)
    _, cast_blocks, fields = plan_cast(*casts)
    launch = kernel(index, prepare_instance, TYPES[dtype]).bind(
        (min(1024, -(-(plan.offsets[-2] + 2 * zeros) // 512)) + cast_blocks, 1, 1), (256, 1, 1))
    parts = plan.offsets[:5]
    rest = (zeros, sizes[1], *sizes[4:], plan.row, plan.tiles, *[CODES[d] for d in dtypes],
            int(logs), cast_blocks)

    def run(*addresses):
        kept, memory, *products = addresses[5:]
        launch(*addresses[:5], *[kept + n for n in parts], memory, *rest,
               *fields(*products or (0,)))

    return run


def _flags(sizes: tuple[int, ...], plan: schedule.Plan) -> int:
    """Of the warps' spans and the blocks that have begun, int32 at the beginning of the memory of
    the scan in runs; whole units of 16 bytes."""
    flags = sizes[-1] * plan.forward.spans * plan.groups + 1
    return 0 if plan.forward.independent else -(-flags // 4) * 4


class ScanLaunch(NamedTuple):
    """``run`` takes the addresses of projected, kept, the maps read (a tuple), the maps written,
    the states, others (a tuple), and ``memory`` bytes, where that is not 0."""
    run: Callable[..., None]
    memory: int


@cached
def scan_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                read: tuple[tuple[int, ...], ...], back: bool) -> ScanLaunch:
    """The scan, or its backward; ``read`` has of each map read the fields after its address."""
    batch, dim, height, width, rank, routes = sizes
    plan = schedule.plan_of(*sizes, index)
    work = plan.backward if back else plan.forward
    parts = plan.offsets[1:5]
    shape = (batch, dim, height, width, rank, routes, plan.row, plan.slots, plan.chunks, work.span,
             work.spans, *plan.magic)
    walks = work.maps
    grid = walks, work.columns, work.spans * max(1, work.cluster)
    block = 32 * work.warps, 1, 1

    def bound(instance, *which):
        return kernel(index, instance, TYPES[dtype], plan.tiles, *which).bind(grid, block,
                                                                             work.shared)

    def fields(projected, kept, maps, *others):
        found = (projected, *[kept + n for n in parts], *shape)
        for address, rest in zip(maps, read, strict=True):
            found += address, *rest
        return *found, *others

    bytes_ = 4 * walks * work.spans * dim
    if not back and work.independent:
        scan, size = bound(forward_instance, work.cluster), 0

        def run(projected, kept, maps, written, states, others, memory):
            scan(*fields(projected, kept, maps, written, states), work.image_chunks, work.sets)
    elif not back:
        scan, flags = bound(runs_instance), 4 * _flags(sizes, plan)
        size = flags + 2 * bytes_

        def run(projected, kept, maps, written, states, others, memory):
            scan(*fields(projected, kept, maps, written, states), memory + flags,
                 memory + flags + bytes_, memory, memory + flags - 4)
    elif work.independent:
        scan, size = bound(backward_instance, False), 0

        def run(projected, kept, maps, written, states, others, memory):
            scan(*fields(projected, kept, maps, states, written, *others), 0, 0, 0)
    else:
        scan, summarise = bound(backward_instance, False), bound(backward_instance, True)
        combine = kernel(index, combine_instance).bind((-(-walks * dim // 128), 1, 1),
                                                       (128, 1, 1))
        size = 3 * bytes_

        def run(projected, kept, maps, written, states, others, memory):
            found = fields(projected, kept, maps, states, written, *others)
            decays, ends, entries = memory, memory + bytes_, memory + 2 * bytes_
            summarise(*found, 0, decays, ends)
            combine(decays, ends, entries, walks, work.spans, dim, 1)
            scan(*found, entries, 0, 0)

    return ScanLaunch(run, size)


@cached
def merge_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...], back: bool, extra: bool,
                 weight: torch.dtype | None, to_float: bool = False) -> Callable[..., None]:
    """:func:`merge.launch` for the maps that a scan, or its backward, wrote; for fp32 that of the
    walk kernels."""
    batch, dim, height, width = sizes[:4]
    if dtype in _HALVES:
        plan = schedule.plan_of(*sizes, index)
        work = plan.backward if back else plan.forward
        count, images = work.maps, _images(sizes, plan, work)
    else:
        count, images = sizes[5], batch
    return merge.launch(index, dtype, count, images, (batch, dim, height * width), extra, weight,
                        to_float)


def _images(sizes: tuple[int, ...], plan: schedule.Plan, work: schedule.Schedule) -> int:
    """Of a span; all, where spans are not of whole images."""
    return work.span * 8 // plan.slots if work.independent and work.spans > 1 else sizes[0]


@cached
def finish_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                  dtypes: tuple[torch.dtype, ...], parts: int) -> Callable[..., None]:
    """The gradients by the parameters, of these dtypes, from what the backward left.

    Of addresses: partials, the product by x_proj_weight, ``parts`` of the gradients by the norm's
    parameters (0 without a norm), the gradients (7, or 5 and two 0), and A_logs, or 0.
    """
    dim, rank, routes = sizes[1], *sizes[4:]
    plan = schedule.plan_of(*sizes, index)
    columns, product = columns_of(sizes), routes * (rank + 2) * dim
    blocks = -(-columns // 32) + -(-product // 256) + (-(-dim // 16) if parts else 0)
    launch = kernel(index, finish_instance, TYPES[dtype]).bind((blocks, 1, 1), (32, 8, 1))
    rest = (plan.backward.spans, parts, dim, rank, routes, plan.row, *[CODES[d] for d in dtypes],
            *[0] * (7 - len(dtypes)))
    return lambda *addresses: launch(*addresses[:-1], *rest, addresses[-1])


def columns_of(sizes: tuple[int, ...]) -> int:
    """Of a part of the gradients by dt_projs_weight, dt_projs_bias, A and D."""
    dim, rank, routes = sizes[1], *sizes[4:]
    return routes * dim * (rank + 2) + dim


# --- forward ----------------------------------------------------------------------------------

def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype, save):
    """(y, projected, kept), shapes as in :func:`vmamba_mm.ops.ss2d_scan` and ``saved``.

    For inputs for which ``why_not`` is None.
    """
    maps, sizes, projected, kept = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                                         save)
    if norm_fits(x):
        y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.channels_last)
        _merging(x, maps, sizes, None, out_dtype == torch.float32)(
            maps.data_ptr(), 0, y.data_ptr(), 0, 0, 0, 0, 0.0)
    else:
        y = torch.sum(maps, 0, dtype=out_dtype).permute(0, 3, 1, 2)
    return layout.like(y, x), projected, kept


def saved(x, rank, routes, state, save):
    """Of what the forward keeps for the backward: the shape of ``projected``, and the shape and
    dtype of ``kept``, in which the states are there only if ``save``."""
    batch, dim, height, width = x.shape
    length = height * width
    if _is_fast(x, state):
        sizes = schedule.kept_sizes(batch, dim, length, rank, routes)
        return ((batch * length, routes * schedule.row_of(rank)),
                (sum(sizes if save else sizes[:-1]),), x.dtype)
    shape = large_state.states_shape(batch, routes, length, state, dim) if save else (0,)
    return (batch * length, routes * (rank + 2 * state)), shape, torch.float32


def norm_fits(x: Tensor) -> bool:
    """Whether the kernels that add the maps and normalise take maps like ``x``."""
    return merge.fits(x.shape[1])


def forward_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                 eps, save, logs=False):
    """(out, projected, kept, merged) for inputs for which ``norm_fits``.

    ``merged``, which the norm's backward needs, is the map (B, H, W, D) in ``x``'s dtype and then
    for each position mean and 1 / deviation in fp32; empty unless ``save``. With ``logs`` A is
    -exp of what is given as such.
    """
    maps, sizes, projected, kept = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                                         save, logs)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    merged = x.new_empty(merged_size(x) if save else 0)
    norm_weight = norm_weight.contiguous()
    norm_bias = norm_bias.to(norm_weight.dtype).contiguous()
    start = merged.data_ptr()
    _merging(x, maps, sizes, norm_weight.dtype)(
        maps.data_ptr(), 0, start, out.data_ptr(), norm_weight.data_ptr(), norm_bias.data_ptr(),
        start + x.itemsize * x.numel() if save else 0, eps)
    return layout.like(out, x), projected, kept, merged


def _merging(x, maps, sizes, weight, to_float=False):
    """The launch that merges the maps of ``_scan``."""
    if sizes is not None:
        return merge_launch(x.get_device(), x.dtype, sizes, False, False, weight, to_float)
    batch, dim, height, width = x.shape
    return merge.launch(x.get_device(), x.dtype, len(maps), batch, (batch, dim, height * width),
                        False, weight, to_float)


def merged_size(x):
    """Elements of ``merged``."""
    batch, dim, height, width = x.shape
    return batch * height * width * (dim + 8 // x.itemsize)


def _fields(x_BDHW: Tensor) -> tuple[int, ...]:
    """Those of the kernels' Map after the address."""
    dim = x_BDHW.shape[1]
    stride_b, stride_pixel, stride_d = layout.strides(x_BDHW)
    vector = (stride_d == 1 or dim == 1) and dim % 4 == stride_b % 4 == stride_pixel % 4 == 0
    return stride_b, stride_pixel, stride_d, int(vector and x_BDHW.data_ptr() % 8 == 0)


def _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save, logs=False):
    """Maps (a number, B, H, W, D) to be added up, sizes of the kernels here or None, ``projected``,
    ``kept``."""
    if not _is_fast(x, A.shape[1]):
        maps, *others = large_state.forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                                            save, logs)
        return maps, None, *others
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    index, sizes = x.get_device(), (batch, dim, height, width, rank, routes)
    plan = schedule.plan_of(*sizes, index)
    x = layout.pixels(x)
    kept = x.new_empty(plan.offsets[-1 if save else -2] // 2)
    parameters = [t.contiguous() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)]
    scan = scan_launch(index, x.dtype, sizes, (_fields(x),), False)
    memory = x.new_empty(scan.memory, dtype=torch.uint8)
    prepare_launch(index, x.dtype, sizes, tuple(t.dtype for t in parameters), logs)(
        *[t.data_ptr() for t in parameters], kept.data_ptr(), memory.data_ptr())
    projected = layout.project(x, kept.as_strided((routes * plan.row, dim), (dim, 1)))
    maps = x.new_empty((plan.forward.maps, batch, height, width, dim))
    scan.run(projected.data_ptr(), kept.data_ptr(), (x.data_ptr(),), maps.data_ptr(),
             kept.data_ptr() + plan.offsets[-2] if save else 0, (), memory.data_ptr())
    return maps, sizes, projected, kept


# --- backward ---------------------------------------------------------------------------------

def backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected, kept,
             norm_parameters=(), norm_sums=None, logs=False):
    """Gradients by x, the five parameters and ``norm_parameters``, in their dtypes.

    ``grad_y`` is (B, D, H, W) of any strides and dtype; it is rounded to ``x``'s. ``norm_sums``
    (n, 2, D) are fp32 parts of the gradients by the two of the norm. ``logs``: as in
    :func:`forward_norm`; then the gradient is by them.
    """
    if grad_y.dtype != x.dtype:
        grad_y = grad_y.to(x.dtype)
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, *norm_parameters)
    if not _is_fast(x, A.shape[1]):
        grads = large_state.backward(grad_y, x, *parameters[:5], projected, kept, logs)
        return *grads, *(s.to(t.dtype, copy=True) for s, t in zip(
            norm_sums.sum(0) if norm_parameters else (), norm_parameters, strict=True))
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    index, sizes = x.get_device(), (batch, dim, height, width, rank, routes)
    plan = schedule.plan_of(*sizes, index)
    given, x, grad_y = x, layout.pixels(x), layout.pixels(grad_y)

    maps = x.new_empty((plan.backward.maps, batch, height, width, dim))
    dprojected = x.new_empty((plan.backward.columns, *projected.shape))
    partials = x.new_empty(plan.backward.spans * columns_of(sizes), dtype=torch.float32)
    scan = scan_launch(index, x.dtype, sizes, (_fields(x), _fields(grad_y)), True)
    memory = x.new_empty(scan.memory, dtype=torch.uint8)
    scan.run(projected.data_ptr(), kept.data_ptr(), (x.data_ptr(), grad_y.data_ptr()),
             maps.data_ptr(), kept.data_ptr() + plan.offsets[-2],
             (dprojected.data_ptr(), partials.data_ptr()), memory.data_ptr())

    dprojected = dprojected[0] if len(dprojected) == 1 else dprojected.sum(0)
    grad_x = torch.mm(dprojected, kept.as_strided((routes * plan.row, dim), (dim, 1)))
    grad_x = merge.add(maps, grad_x, _images(sizes, plan, plan.backward))
    grad_x = grad_x.view(batch, height, width, dim).permute(0, 3, 1, 2)
    product = layout.project_weight_grad(dprojected, x)

    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in parameters]
    finish_launch(index, x.dtype, sizes, tuple(t.dtype for t in grads),
                  len(norm_sums) if norm_parameters else 0)(
        partials.data_ptr(), product.data_ptr(), pointer(norm_sums), *[t.data_ptr() for t in grads],
        *[0] * (7 - len(grads)), A.contiguous().data_ptr() if logs else 0)
    return layout.like(grad_x, given), *grads


def backward_norm(grad, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight,
                  norm_bias, projected, kept, merged, logs=False):
    """Gradients by x, the five parameters, and the norm's weight and bias, in their dtypes."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    batch, dim, height, width = grad.shape
    blocks, launch = norm.backward_launch(grad.get_device(), grad.dtype, merged.dtype, None,
                                          norm_weight.dtype, batch, height * width, dim)
    grad_y, sums = torch.empty_like(grad), grad.new_empty((blocks, 2, dim), dtype=torch.float32)
    launch(grad.data_ptr(), merged.data_ptr(), merged.data_ptr() + merged.itemsize * grad.numel(),
           norm_weight.data_ptr(), 0, 0, grad_y.data_ptr(), 0, sums.data_ptr())
    return backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected,
                    kept, (norm_weight, norm_bias), sums, logs)
