"""ss2d_scan and its norm by the CUDA kernels in ``kernels/``.

Here are the launches for N = 1 on half-precision maps; any other N and fp32 maps go to
:mod:`vmamba_mm.ops.ss2d_scan.large_state`. Nothing is built beforehand:
:mod:`vmamba_mm.ops.core.launch` compiles at first use. The kernels' own comments and
``kernels/README.md`` say how they work.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import CODES, TYPES, Instance, cached, kernel, pointer
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.cast import plan_cast
from vmamba_mm.ops.scan_kernels.cuda import combine_instance
from vmamba_mm.ops.ss2d_scan import large_state, layout, merge, schedule

_FORWARD = (('WARPS', schedule.FORWARD.warps),
            ('BLOCKS', schedule.FORWARD.blocks_per_multiprocessor))
_CLUSTER = (('WARPS', schedule.CLUSTER_WARPS), ('BLOCKS', 1))
_BACKWARD = (('WARPS', schedule.BACKWARD.warps),
             ('BLOCKS', schedule.BACKWARD.blocks_per_multiprocessor))
_MAP_FIELDS = 'stride_b', 'stride_pixel', 'stride_d', 'vector'  # of the kernels' Map, after data
_HALVES = torch.float16, torch.bfloat16


def why_not(x: Tensor, out_dtype: torch.dtype, parameters: tuple[Tensor, ...]) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
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
    return Instance('ss2d_scan/ss2d_prepare.cu', f'ss2d_prepare<{type_}>')


def forward_instance(type_: str, tiles: int, cluster: int = 0) -> Instance:
    return Instance('ss2d_scan/ss2d_scan_fwd.cu', f'ss2d_scan_fwd<{type_}, {tiles}>',
                    defines=(*_CLUSTER, ('CLUSTER', cluster)) if cluster else _FORWARD)


def chained_instance(type_: str, tiles: int) -> Instance:
    return Instance('ss2d_scan/ss2d_scan_chained.cu', f'ss2d_scan_chained<{type_}, {tiles}>',
                    defines=_FORWARD)


def backward_instance(type_: str, tiles: int, summary: bool) -> Instance:
    return Instance('ss2d_scan/ss2d_scan_bwd.cu',
                    f'ss2d_scan_bwd<{type_}, {tiles}, {str(summary).lower()}>', defines=_BACKWARD)


def finish_instance(type_: str) -> Instance:
    return Instance('ss2d_scan/ss2d_finish.cu', f'ss2d_finish<{type_}>')


_TYPES = {'Half': 75, 'BFloat': 80}  # and the lowest compute capability that multiplies them
_TILES = (1, 2, 3, 4, 6, 8)  # of 8 in dt_rank: those of the nine published architectures
#: What is compiled to check it, and the lowest compute capability that it is for. Of the clusters
#: all sizes for one rank, and for all ranks the largest.
INSTANCES: dict[Instance, int] = {
    **{instance: low for type_, low in _TYPES.items() for tiles in _TILES for instance in (
        forward_instance(type_, tiles), backward_instance(type_, tiles, False),
        chained_instance(type_, tiles))},
    **{forward_instance(type_, tiles, 8): 90 for type_ in _TYPES for tiles in _TILES},
    **{forward_instance('Half', 1, cluster): 90 for cluster in schedule.CLUSTER_SIZES},
    **{backward_instance(type_, 1, True): low for type_, low in _TYPES.items()},
    **{instance(type_): low for type_, low in _TYPES.items()
       for instance in (prepare_instance, finish_instance)},
}


# --- launches, for sizes (batch, dim, height, width, rank, routes), of addresses -----------------

@cached
def prepare_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                   dtypes: tuple[torch.dtype, ...], logs: bool,
                   casts: tuple[tuple[int, ...], tuple[torch.dtype, ...]] = ((), ())
                   ) -> Callable[..., None]:
    """What writes the parameters as the scan takes them.

    It takes the addresses of x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, of these dtypes,
    ``saved``, ``memory`` of the scan, ``to_round``, which are rounded too and of which ``casts``
    has the elements and dtypes, and ``rounded_to``: see :func:`vmamba_mm.ops.fused.cast.plan_cast`.
    """
    plan = schedule.plan_of(*sizes, index)
    zeros = _flags(sizes, plan)
    cast = plan_cast(*casts)
    x_type, dt_type, bias_type, A_type, D_type = (CODES[d] for d in dtypes)
    launch = kernel(index, prepare_instance, TYPES[dtype]).bind(
        (min(1024, -(-(plan.offsets[-2] + 2 * zeros) // 512)) + cast.blocks, 1, 1), (256, 1, 1),
        count=zeros, dim=sizes[1], rank=sizes[4], routes=sizes[5], row=plan.row, tiles=plan.tiles,
        x_type=x_type, dt_type=dt_type, bias_type=bias_type, A_type=A_type, D_type=D_type,
        logs=int(logs), cast_blocks=cast.blocks,
        **{f'cast_{name}': values for name, values in cast.fields.items()})
    _, fragments, bias, rates, skip = plan.offsets[:5]

    def launch_prepare(x_weight, dt_weight, dt_bias, A, D, saved, memory, to_round=(),
                       rounded_to=0):
        launch(x_weight=x_weight, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D, weight=saved,
               fragments=saved + fragments, bias=saved + bias, rates=saved + rates,
               skip=saved + skip, zeros=memory, cast_sources=(*to_round, *cast.absent),
               cast_to=rounded_to)

    return launch_prepare


def _flags(sizes: tuple[int, ...], plan: schedule.Plan) -> int:
    """The number of int32 that the memory of a chained scan begins with, in whole units of 16
    bytes: a flag for the span of each warp, and the number of blocks that have begun."""
    flags = sizes[-1] * plan.forward.spans * plan.groups + 1
    return 0 if plan.forward.independent else -(-flags // 4) * 4


class ScanLaunch(NamedTuple):
    """``run`` takes the addresses of ``projected``, ``saved``, ``maps`` (a tuple: x, and in a
    backward grad), the map ``written``, ``states``, ``sums`` (in a backward dprojected and
    partials, else empty), and ``memory`` of so many bytes, where that is not 0."""
    run: Callable[..., None]
    memory: int


@cached
def scan_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                read: tuple[tuple[int, ...], ...], back: bool) -> ScanLaunch:
    """The scan, or its backward; ``read`` has the fields after the address of each map read."""
    return _Scan(index, dtype, sizes, read, back).launch()


class _Scan:
    """The launches of one scan, or of its backward, as its schedule wants them."""

    def __init__(self, index, dtype, sizes, read, back):
        self.index, self.type, self.sizes, self.read, self.back = (
            index, TYPES[dtype], sizes, read, back)
        self.plan = schedule.plan_of(*sizes, index)
        self.work = self.plan.backward if back else self.plan.forward
        # Of memory: one fp32 number for each channel of each span.
        self.spans_size = 4 * self.work.maps * self.work.spans * sizes[1]

    def launch(self) -> ScanLaunch:
        independent = self.work.independent
        if self.back:
            return self._independent_backward() if independent else self._chained_backward()
        return self._independent_forward() if independent else self._chained_forward()

    def _bind(self, instance, *args, **constants) -> Callable[..., None]:
        plan, work = self.plan, self.work
        batch, dim, height, width, rank, routes = self.sizes
        magic_height, magic_width, magic_slots = plan.magic
        scan = dict(batch=batch, dim=dim, height=height, width=width, rank=rank, routes=routes,
                    row=plan.row, slots=plan.slots, chunks=plan.chunks, span=work.span,
                    spans=work.spans, magic_height=magic_height, magic_width=magic_width,
                    magic_slots=magic_slots)
        maps = {f'{name}_{field}': value
                for name, values in zip(('x', 'dy'), self.read, strict=False)
                for field, value in zip(_MAP_FIELDS, values, strict=True)}
        grid = work.maps, work.columns, work.spans * max(1, work.cluster)
        return kernel(self.index, instance, self.type, plan.tiles, *args).bind(
            grid, (32 * work.warps, 1, 1), work.shared, **constants, **maps,
            **{f'scan_{name}': value for name, value in scan.items()})

    def _independent_forward(self) -> ScanLaunch:
        work = self.work
        scan = self._bind(forward_instance, work.cluster, unit=work.image_chunks, sets=work.sets)
        fragments, bias, rates, skip = self.plan.offsets[1:5]

        def launch_independent_forward(projected, saved, maps, written, states, sums, memory):
            x, = maps
            scan(scan_projected=projected, scan_fragments=saved + fragments, scan_bias=saved + bias,
                 scan_rates=saved + rates, scan_skip=saved + skip, x_data=x, y=written,
                 states=states)

        return ScanLaunch(launch_independent_forward, 0)

    def _chained_forward(self) -> ScanLaunch:
        scan = self._bind(chained_instance)
        flags, size = 4 * _flags(self.sizes, self.plan), self.spans_size
        fragments, bias, rates, skip = self.plan.offsets[1:5]

        def launch_chained_forward(projected, saved, maps, written, states, sums, memory):
            x, = maps
            decays = memory + flags
            scan(scan_projected=projected, scan_fragments=saved + fragments, scan_bias=saved + bias,
                 scan_rates=saved + rates, scan_skip=saved + skip, x_data=x, y=written,
                 states=states, decays=decays, ends=decays + size, ready=memory,
                 tickets=decays - 4)

        return ScanLaunch(launch_chained_forward, flags + 2 * size)

    def _independent_backward(self) -> ScanLaunch:
        scan = self._bind(backward_instance, False)
        fragments, bias, rates, skip = self.plan.offsets[1:5]

        def launch_independent_backward(projected, saved, maps, written, states, sums, memory):
            x, grad = maps
            dprojected, partials = sums
            scan(scan_projected=projected, scan_fragments=saved + fragments, scan_bias=saved + bias,
                 scan_rates=saved + rates, scan_skip=saved + skip, x_data=x, dy_data=grad,
                 states=states, dx=written, dprojected=dprojected, partials=partials)

        return ScanLaunch(launch_independent_backward, 0)

    def _chained_backward(self) -> ScanLaunch:
        work, dim, size = self.work, self.sizes[1], self.spans_size
        scan, summarise = self._bind(backward_instance, False), self._bind(backward_instance, True)
        combine = kernel(self.index, combine_instance).bind(
            (-(-work.maps * dim // 128), 1, 1), (128, 1, 1), scans=work.maps, spans=work.spans,
            dim=dim, back=1, sources=work.spans)
        fragments, bias, rates, skip = self.plan.offsets[1:5]

        def launch_chained_backward(projected, saved, maps, written, states, sums, memory):
            x, grad = maps
            dprojected, partials = sums
            ends, entries = memory + size, memory + 2 * size
            summarise(scan_projected=projected, scan_fragments=saved + fragments,
                      scan_bias=saved + bias, scan_rates=saved + rates, scan_skip=saved + skip,
                      dy_data=grad, decays=memory, ends=ends)
            combine(decays=memory, ends=ends, entries=entries)
            scan(scan_projected=projected, scan_fragments=saved + fragments, scan_bias=saved + bias,
                 scan_rates=saved + rates, scan_skip=saved + skip, x_data=x, dy_data=grad,
                 states=states, dx=written, dprojected=dprojected, partials=partials,
                 entries=entries)

        return ScanLaunch(launch_chained_backward, 3 * size)


@cached
def merge_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...], back: bool, extra: bool,
                 weight: torch.dtype | None, to_float: bool = False, gate_stride: int = 0,
                 state: int = 1) -> Callable[..., None]:
    """:func:`merge.launch` for the maps that a scan, or its backward, wrote: with a ``state``
    of 1 in half precision those here, else those for any N."""
    batch, dim, height, width = sizes[:4]
    if dtype in _HALVES and state == 1:
        plan = schedule.plan_of(*sizes, index)
        work = plan.backward if back else plan.forward
        count, images = work.maps, _images(sizes, plan, work)
    else:
        count, images = sizes[5], batch
    return merge.launch(index, dtype, count, images, (batch, dim, height * width), extra, weight,
                        to_float, gate_stride)


def _images(sizes: tuple[int, ...], plan: schedule.Plan, work: schedule.Schedule) -> int:
    """The number of images of a span; all of the batch, where spans are not of whole images."""
    return work.span * 8 // plan.slots if work.independent and work.spans > 1 else sizes[0]


@cached
def finish_launch(index: int, dtype: torch.dtype, sizes: tuple[int, ...],
                  dtypes: tuple[torch.dtype, ...], parts: int) -> Callable[..., None]:
    """The gradients by the parameters, of these dtypes, from what the backward left.

    It takes the addresses ``partials``, ``product`` by x_proj_weight, ``norm``: ``parts`` of the
    gradients by the norm's parameters (0 without a norm), the gradients ``x_weight``,
    ``dt_weight``, ``bias``, ``A``, ``D`` and, if there is a norm, ``norm_weight``, ``norm_bias``;
    and ``A_logs``, or 0.
    """
    dim, rank, routes = sizes[1], *sizes[4:]
    plan = schedule.plan_of(*sizes, index)
    columns, product = columns_of(sizes), routes * (rank + 2) * dim
    blocks = -(-columns // 32) + -(-product // 256) + (-(-dim // 16) if parts else 0)
    types = [*(CODES[d] for d in dtypes), 0, 0][:7]
    names = 'x', 'dt', 'bias', 'A', 'D', 'norm_weight', 'norm_bias'
    return kernel(index, finish_instance, TYPES[dtype]).bind(
        (blocks, 1, 1), (32, 8, 1), parts=plan.backward.spans, norm_parts=parts, dim=dim,
        rank=rank, routes=routes, row=plan.row,
        **{f'{name}_type': type_ for name, type_ in zip(names, types, strict=True)})


def columns_of(sizes: tuple[int, ...]) -> int:
    """The number of elements of a partial gradient by dt_projs_weight, dt_projs_bias, A and D."""
    dim, rank, routes = sizes[1], *sizes[4:]
    return routes * dim * (rank + 2) + dim


# --- forward ----------------------------------------------------------------------------------

def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype, save):
    """(y, projected, saved), shapes as in :func:`vmamba_mm.ops.ss2d_scan` and
    :func:`saved_shapes`.

    For inputs for which ``why_not`` is None.
    """
    maps, sizes, projected, saved = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                                         save)
    if norm_fits(x):
        y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.channels_last)
        _merging(x, maps, sizes, None, out_dtype == torch.float32)(
            maps=maps.data_ptr(), merged=y.data_ptr(), eps=0.0)
    else:
        y = torch.sum(maps, 0, dtype=out_dtype).permute(0, 3, 1, 2)
    return layout.like(y, x), projected, saved


def saved_shapes(x, rank, routes, state, save):
    """The shape of ``projected``, and the shape and dtype of ``saved``: what the forward leaves for
    the backward. The states are part of ``saved`` only if ``save``."""
    batch, dim, height, width = x.shape
    length = height * width
    if _is_fast(x, state):
        sizes = schedule.saved_sizes(batch, dim, length, rank, routes)
        return ((batch * length, routes * schedule.row_of(rank)),
                (sum(sizes if save else sizes[:-1]),), x.dtype)
    shape = large_state.states_shape(batch, routes, length, state, dim) if save else (0,)
    return (batch * length, routes * (rank + 2 * state)), shape, torch.float32


def norm_fits(x: Tensor) -> bool:
    """Whether the kernels that add the maps and normalise take maps like ``x``."""
    return merge.fits(x.shape[1])


def forward_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                 eps, save, logs=False):
    """(out, projected, saved, merged) for inputs for which ``norm_fits``.

    ``merged``, which the norm's backward needs, is the map (B, H, W, D) in ``x``'s dtype and then
    for each position mean and 1 / deviation in fp32; empty unless ``save``. With ``logs`` A is
    -exp of what is given as such.
    """
    maps, sizes, projected, saved = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                                         save, logs)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    merged = x.new_empty(merged_size(x) if save else 0)
    norm_weight = norm_weight.contiguous()
    norm_bias = norm_bias.to(norm_weight.dtype).contiguous()
    start = merged.data_ptr()
    _merging(x, maps, sizes, norm_weight.dtype)(
        maps=maps.data_ptr(), merged=start, normed=out.data_ptr(),
        weight=norm_weight.data_ptr(), bias=norm_bias.data_ptr(),
        moments=start + x.itemsize * x.numel() if save else 0, eps=eps)
    return layout.like(out, x), projected, saved, merged


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
    ``saved``."""
    if not _is_fast(x, A.shape[1]):
        maps, projected, saved = large_state.forward(
            x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save, logs)
        return maps, None, projected, saved
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    index, sizes = x.get_device(), (batch, dim, height, width, rank, routes)
    plan = schedule.plan_of(*sizes, index)
    x = layout.pixels(x)
    saved = x.new_empty(plan.offsets[-1 if save else -2] // 2)
    parameters = [t.contiguous() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)]
    scan = scan_launch(index, x.dtype, sizes, (_fields(x),), False)
    memory = x.new_empty(scan.memory, dtype=torch.uint8)
    prepare_launch(index, x.dtype, sizes, tuple(t.dtype for t in parameters), logs)(
        *[t.data_ptr() for t in parameters], saved.data_ptr(), memory.data_ptr())
    projected = layout.project(x, saved.as_strided((routes * plan.row, dim), (dim, 1)))
    maps = x.new_empty((plan.forward.maps, batch, height, width, dim))
    scan.run(projected.data_ptr(), saved.data_ptr(), (x.data_ptr(),), maps.data_ptr(),
             saved.data_ptr() + plan.offsets[-2] if save else 0, (), memory.data_ptr())
    return maps, sizes, projected, saved


# --- backward ---------------------------------------------------------------------------------

def backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected, saved,
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
        grads = large_state.backward(grad_y, x, *parameters[:5], projected, saved, logs)
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
    scan.run(projected.data_ptr(), saved.data_ptr(), (x.data_ptr(), grad_y.data_ptr()),
             maps.data_ptr(), saved.data_ptr() + plan.offsets[-2],
             (dprojected.data_ptr(), partials.data_ptr()), memory.data_ptr())

    dprojected = dprojected[0] if len(dprojected) == 1 else dprojected.sum(0)
    grad_x = torch.mm(dprojected, saved.as_strided((routes * plan.row, dim), (dim, 1)))
    grad_x = merge.add(maps, grad_x, _images(sizes, plan, plan.backward))
    grad_x = grad_x.view(batch, height, width, dim).permute(0, 3, 1, 2)
    product = layout.project_weight_grad(dprojected, x)

    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in parameters]
    names = 'x_weight', 'dt_weight', 'bias', 'A', 'D', 'norm_weight', 'norm_bias'
    finish_launch(index, x.dtype, sizes, tuple(t.dtype for t in grads),
                  len(norm_sums) if norm_parameters else 0)(
        partials=partials.data_ptr(), product=product.data_ptr(), norm=pointer(norm_sums),
        **{name: grad.data_ptr() for name, grad in zip(names, grads, strict=False)},
        A_logs=A.contiguous().data_ptr() if logs else 0)
    return layout.like(grad_x, given), *grads


def backward_norm(grad, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight,
                  norm_bias, projected, saved, merged, logs=False):
    """Gradients by x, the five parameters, and the norm's weight and bias, in their dtypes."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    flat_weight = norm_weight.contiguous()
    batch, dim, height, width = grad.shape
    blocks, launch = norm.backward_launch(grad.get_device(), grad.dtype, merged.dtype, None,
                                          norm_weight.dtype, batch, height * width, dim)
    grad_y, sums = torch.empty_like(grad), grad.new_empty((blocks, 2, dim), dtype=torch.float32)
    launch(grad=grad.data_ptr(), input=merged.data_ptr(),
           moments=merged.data_ptr() + merged.itemsize * grad.numel(),
           weight=flat_weight.data_ptr(), dinput=grad_y.data_ptr(), partials=sums.data_ptr())
    return backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected,
                    saved, (norm_weight, norm_bias), sums, logs)
