"""ss2d_scan and its norm by the CUDA kernels in ``kernels/``.

Here are the launches for N = 1 on half-precision maps; any other N and fp32 maps go to
:mod:`vmamba_mm.ops.ss2d_scan.walk`. Nothing is built beforehand: :mod:`vmamba_mm.ops.nvrtc`
compiles at first use. The kernels' own comments and ``kernels/README.md`` say how they work.
"""

import math
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.add_norm.cuda import launch_backward
from vmamba_mm.ops.nvrtc import Instance, kernel
from vmamba_mm.ops.ss2d_scan import layout, walk
from vmamba_mm.ops.walk import combine_instance, device_limits, pointer

_TYPES = {torch.float16: 'Half', torch.bfloat16: 'BFloat'}
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SLOT = 7  # positions of a slot; a warp takes a chunk of 8 slots at a time
_CHUNK_MAP = 8 * _SLOT * 32  # bytes of a warp's part of a map
_SCAN = 'P' * 5 + 'i' * 15
_MAP = 'Pqiiii'
# Warps that a block may have (16 channels each), and blocks of so many that fit a multiprocessor.
_FORWARD_WARPS, _FORWARD_BLOCKS = 8, 2
_BACKWARD_WARPS, _BACKWARD_BLOCKS = 12, 1


def why_not(x: Tensor, out_dtype: torch.dtype, parameters: tuple[Tensor, ...]) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    reason = walk.why_not(x, parameters[1].shape[2], parameters[3].shape[1])
    if reason is None and out_dtype not in (x.dtype, torch.float32):
        reason = f'out_dtype is {out_dtype}; the kernels give {x.dtype} and float32'
    if reason is None and any(p.dtype not in _CODES for p in parameters):
        reason = 'a parameter is neither float32 nor float16 nor bfloat16'
    return reason


def _is_fast(x: Tensor, state: int) -> bool:
    """Whether the kernels of this module are for it."""
    return state == 1 and x.dtype in _TYPES


# --- what is compiled -------------------------------------------------------------------------

def prepare_instance(type_: str) -> Instance:
    return Instance('ss2d_prepare.cu', f'ss2d_prepare<{type_}>', 'P' * 10 + 'i' * 11)


def forward_instance(type_: str, tiles: int, summary: bool) -> Instance:
    return Instance('ss2d_scan_fwd.cu', f'ss2d_scan_fwd<{type_}, {tiles}, {str(summary).lower()}>',
                    _SCAN + _MAP + 'P' * 5 + 'i',
                    (('WARPS', _FORWARD_WARPS), ('BLOCKS', _FORWARD_BLOCKS)))


def backward_instance(type_: str, tiles: int, summary: bool) -> Instance:
    return Instance('ss2d_scan_bwd.cu', f'ss2d_scan_bwd<{type_}, {tiles}, {str(summary).lower()}>',
                    _SCAN + _MAP + _MAP + 'P' * 7,
                    (('WARPS', _BACKWARD_WARPS), ('BLOCKS', _BACKWARD_BLOCKS)))


def finish_instance(type_: str) -> Instance:
    return Instance('ss2d_finish.cu', f'ss2d_finish<{type_}>', 'P' * 10 + 'i' * 13 + 'P')


def merge_instance(type_: str, maps: int, extra: bool, parts: int, to_float: bool) -> Instance:
    return Instance('ss2d_merge.cu', f'ss2d_merge<{type_}, {maps}, {str(extra).lower()}, {parts}, '
                    f'{str(to_float).lower()}>', 'P' * 7 + 'fiiiii')


# --- how the work is cut ----------------------------------------------------------------------

class _Cut(NamedTuple):
    """A launch: maps that it writes, warps of a block, blocks for the channels, spans of so many
    chunks, chunks of whole images, shared bytes; whether the spans begin at an image, so that
    nothing enters them; what it costs."""
    maps: int
    warps: int
    columns: int
    span: int
    spans: int
    alone: int
    shared: int
    independent: bool
    cost: float


class _Plan(NamedTuple):
    """Sizes that depend on shapes and the GPU alone."""
    routes: int
    tiles: int    # of 8 columns of dt
    row: int      # P: elements of a staged row
    groups: int   # of 16 channels
    slots: int    # of 7 positions, of an image
    chunks: int   # of 8 slots, of the batch
    aligned: int  # whether rows and columns are multiples of 7 long
    magic: tuple[int, int, int]
    offsets: tuple[int, ...]  # bytes, of the parts of `kept` and of its end
    forward: _Cut
    backward: _Cut


@lru_cache(maxsize=4096)
def _plan(batch: int, dim: int, height: int, width: int, rank: int, routes: int,
          index: int) -> _Plan:
    """The cheapest cut of the work for this GPU."""
    length, groups, tiles = height * width, -(-dim // 16), -(-rank // 8)
    row = _row(rank)
    staged = row // 8 * 16 * 8 * _SLOT + 128
    properties = torch.cuda.get_device_properties(index)
    multiprocessors = properties.multi_processor_count

    def cuts(most, blocks, of_block, per_warp, per_route, saved, reach, slots):
        limit = properties.shared_memory_per_block_optin - 1024
        most = min(most, (limit - of_block) // (per_warp + per_route))
        if most < 2:
            raise ValueError(f'dt_rank={rank} needs more shared memory than the {limit} bytes of '
                             f'this GPU')
        chunks = -(-batch * slots // 8)
        alone = slots // math.gcd(slots, 8)  # chunks until an image begins with a chunk
        for columns in {-(-groups // warps) for warps in range(2, most + 1)}:
            warps = max(2, -(-groups // columns))
            # Two routes into one map need whole images, and an addition to half-precision memory.
            fewest = 2 if routes == 4 and properties.major >= 9 else routes
            for maps, independent in {(fewest, True), (routes, True), (routes, False)}:
                unit, walks = alone if independent else 1, columns * maps
                shared = of_block + warps * (per_warp + routes // maps * per_route)
                if shared > limit:
                    continue
                at_once = multiprocessors * min(
                    blocks * most // warps,
                    properties.shared_memory_per_multiprocessor // (shared + 1024))
                for spans in {max(1, n * at_once // walks) for n in (1, 2, 3, 4)}:
                    span = -(-chunks // (unit * spans)) * unit
                    spans = -(-chunks // span)
                    if spans > 65535:
                        continue
                    # In chunks of a warp on a multiprocessor, which 8 warps fill; a block's start
                    # is worth half a chunk. What enters a span costs two more launches.
                    waves = -(-walks * spans // at_once)
                    resident = min(at_once, walks * spans) * warps / multiprocessors
                    if maps < routes and resident * alone * _CHUNK_MAP * multiprocessors > reach:
                        continue
                    # 16 warps take as long for a chunk of each as 12 do, less 5 %.
                    resident = max(8, resident * (0.95 if resident > 12 else 1))
                    cost = waves * (span * routes // maps + 0.5) * resident
                    cost *= (1 + 0.004 * columns) * (1 if maps == routes else 1 - saved)
                    if not independent and spans > 1:
                        cost = 1.6 * cost + 16
                    yield _Cut(maps, warps, columns, span, spans, alone, shared,
                               independent or spans == 1, cost)

    # What a map less to write and to add up saves; a forward waits for additions to what is not in
    # L2 any more (measured: 53 of 50 MB are fast, 159 slow), a backward has other things to do.
    l2 = properties.L2_cache_size
    best = None
    exact = -(-length // _SLOT)
    for slots in {exact, -(-exact // 8) * 8}:
        forward, backward = (min(cuts(*sizes, slots), key=lambda cut: cut.cost) for sizes in (
            (_FORWARD_WARPS, _FORWARD_BLOCKS, 64 + 3 * staged, 64, 256 * tiles + 128, 0.03,
             1.5 * l2),
            (_BACKWARD_WARPS, _BACKWARD_BLOCKS, 2 * staged,
             4 * _CHUNK_MAP + 768 * tiles + 320 + 2048, 0, 0.1, math.inf)))
        if best is None or forward.cost + 2 * backward.cost < best[1].cost + 2 * best[2].cost:
            best = slots, forward, backward
    slots, forward, backward = best
    return _Plan(routes, tiles, row, groups, slots, -(-batch * slots // 8),
                 int(height % _SLOT == width % _SLOT == 0),
                 (_magic(height), _magic(width), _magic(slots)), (0, *accumulate(
                     2 * size for size in _kept_sizes(batch, dim, length, rank, routes))),
                 forward, backward)


def _row(rank: int) -> int:
    """P, the elements of a row of the projected input: dt, an even number, B and C, in units."""
    return 8 * max(-(-(rank + rank % 2 + 2) // 8), -(-rank // 8))


def _magic(divisor: int) -> int:
    """2^32 / divisor, rounded up, as the int32 of the same bits; 0 for 1."""
    magic = 0 if divisor == 1 else -(-2**32 // divisor)
    return magic - 2**32 if magic >= 2**31 else magic


# --- forward ----------------------------------------------------------------------------------

def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype, save):
    """(y, projected, kept), shapes as in :func:`vmamba_mm.ops.ss2d_scan` and ``saved``.

    For inputs for which ``why_not`` is None.
    """
    maps, images, projected, kept = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                                          save)
    if norm_fits(x):
        y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.channels_last)
        _merge(maps, images, y.data_ptr(), to_float=out_dtype == torch.float32)
    else:
        y = torch.sum(maps, 0, dtype=out_dtype).permute(0, 3, 1, 2)
    return layout.like(y, x), projected, kept


def saved(x, rank, routes, state, save):
    """Of what the forward keeps for the backward: the shape of ``projected``, and the shape and
    dtype of ``kept``, in which the states are there only if ``save``."""
    batch, dim, height, width = x.shape
    length = height * width
    if _is_fast(x, state):
        sizes = _kept_sizes(batch, dim, length, rank, routes)
        return ((batch * length, routes * _row(rank)), (sum(sizes) if save else sum(sizes[:-1]),),
                x.dtype)
    shape = walk.states_shape(batch, routes, length, state, dim) if save else (0,)
    return (batch * length, routes * (rank + 2 * state)), shape, torch.float32


def _kept_sizes(batch, dim, length, rank, routes):
    """Half-precision elements of the parts of ``kept``: x_proj_weight (K * P, D); the fragments of
    dt_projs_weight, bias, A and D in fp32 as the kernels take them; the states."""
    padded = -(-dim // 16) * 16
    chunks = batch * -(-length // (8 * _SLOT))  # or more than there are
    return (routes * _row(rank) * dim, 8 * routes * padded * -(-rank // 8), 2 * routes * padded,
            2 * routes * padded, 2 * padded, 2 * routes * chunks * dim)


def norm_fits(x: Tensor) -> bool:
    """Whether the kernels that add the maps and normalise take maps like ``x``."""
    return x.dtype in _TYPES and x.shape[1] % 4 == 0 and x.shape[1] <= 4096


def forward_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                 eps, save, logs=False):
    """(out, projected, kept, merged) for inputs for which ``norm_fits``.

    ``merged``, which the norm's backward needs, is the map (B, H, W, D) in ``x``'s dtype and then
    for each position mean and 1 / deviation in fp32; empty unless ``save``. With ``logs``, where
    N = 1 and ``x`` is in half precision, A is -exp of what is given as such.
    """
    maps, images, projected, kept = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                                          save, logs)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    merged = x.new_empty(merged_size(x) if save else 0)
    if norm_bias.dtype != norm_weight.dtype:
        norm_bias = norm_bias.to(norm_weight.dtype)
    start = merged.data_ptr()
    _merge(maps, images, start, normed=out.data_ptr(), weight=norm_weight.contiguous(),
           bias=norm_bias.contiguous(), moments=start + 2 * x.numel() if save else 0, eps=eps)
    return layout.like(out, x), projected, kept, merged


def merged_size(x):
    """Elements of ``merged``."""
    batch, dim, height, width = x.shape
    return batch * height * width * (dim + 4)


def _map(x_BDHW: Tensor) -> tuple[int, ...]:
    """The fields of the kernels' Map."""
    dim, pointer = x_BDHW.shape[1], x_BDHW.data_ptr()
    stride_b, stride_pixel, stride_d = layout.strides(x_BDHW)
    vector = (stride_d == 1 or dim == 1) and dim % 4 == stride_b % 4 == stride_pixel % 4 == 0
    return pointer, stride_b, stride_pixel, stride_d, int(vector and pointer % 8 == 0), 0


def _scan_fields(plan, cut, kept, projected, x, rank):
    """The fields of the kernels' Scan."""
    start = kept.data_ptr()
    return (projected.data_ptr(), *[start + n for n in plan.offsets[1:5]], *x.shape, rank,
            plan.routes, plan.row, plan.slots, plan.chunks, cut.span, cut.spans, plan.aligned,
            *plan.magic)


def _walk(plan, cut, instance, fields, x, back, *last):
    """Launch a scan of ``x``, in spans where the plan says so; between ``fields`` and ``last`` come
    its three pointers for the spans."""
    type_, index = _TYPES[x.dtype], x.get_device()
    scan = kernel(index, instance, type_, plan.tiles, False)
    grid, block = (cut.maps, cut.columns, cut.spans), (32 * cut.warps, 1, 1)
    if cut.independent:
        scan.launch(grid, block, (*fields, 0, 0, 0, *last), cut.shared)
        return
    walks, dim = cut.maps, x.shape[1]
    size = walks * cut.spans * dim
    memory = x.new_empty(3 * size, dtype=torch.float32)
    decays = memory.data_ptr()
    ends, entries = decays + 4 * size, decays + 8 * size
    kernel(index, instance, type_, plan.tiles, True).launch(
        grid, block, (*fields, 0, decays, ends, *last), cut.shared)
    kernel(index, combine_instance).launch(
        (-(-walks * dim // 128), 1, 1), (128, 1, 1),
        (decays, ends, entries, walks, cut.spans, dim, int(back)))
    scan.launch(grid, block, (*fields, entries, 0, 0, *last), cut.shared)


def _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save, logs=False):
    """Maps (a number, B, H, W, D) to be added up, images of a span, ``projected``, ``kept``."""
    if not _is_fast(x, A.shape[1]):
        maps, *others = walk.forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save)
        return maps, len(x), *others
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    type_, index = _TYPES[x.dtype], x.get_device()
    plan = _plan(batch, dim, height, width, rank, routes, index)
    x = layout.pixels(x)
    kept = x.new_empty(plan.offsets[-1 if save else -2] // 2)
    start = kept.data_ptr()
    parameters = [t.contiguous() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)]
    kernel(index, prepare_instance, type_).launch(
        (min(1024, -(-plan.offsets[-2] // 512)), 1, 1), (256, 1, 1),
        (*[t.data_ptr() for t in parameters], *[start + n for n in plan.offsets[:5]], dim, rank,
         routes, plan.row, plan.tiles, *[_CODES[t.dtype] for t in parameters], logs))

    projected = layout.project(x, kept.as_strided((routes * plan.row, dim), (dim, 1)))
    maps = x.new_empty((plan.forward.maps, batch, height, width, dim))
    fields = (*_scan_fields(plan, plan.forward, kept, projected, x, rank), *_map(x),
              maps.data_ptr(), start + plan.offsets[-2] if save else 0)
    _walk(plan, plan.forward, forward_instance, fields, x, False, plan.forward.alone)
    return maps, _images(plan, plan.forward, batch), projected, kept


def _images(plan, cut, batch):
    """Images of a span; all, where spans are not of whole images."""
    return cut.span * 8 // plan.slots if cut.independent and cut.spans > 1 else batch


def _merge(maps, images, merged, extra=0, normed=0, weight=None, bias=None, moments=0, eps=0.0,
           to_float=False):
    """The sum of the maps (and ``extra``), its LayerNorm: each where an address for it is given.

    ``images`` are those of a span of the scan that wrote the maps.
    """
    count, batch, height, width, dim = maps.shape
    positions, index = batch * height * width, maps.get_device()
    kernel(index, merge_instance, _TYPES[maps.dtype], count, extra != 0, -(-dim // 128),
            to_float).launch(
        (min(-(-positions // 8), 8 * device_limits(index)[0]), 1, 1), (256, 1, 1),
        (maps.data_ptr(), extra, merged, normed, pointer(weight), pointer(bias), moments, eps,
         batch, height * width, images, dim, 0 if weight is None else _CODES[weight.dtype]),
        8 * dim if normed else 0)


# --- backward ---------------------------------------------------------------------------------

def backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected, kept,
             norm=(), norm_sums=None, logs=False):
    """Gradients by x, the five parameters and those of ``norm``, in their dtypes.

    ``grad_y`` is (B, D, H, W) of any strides and dtype; it is rounded to ``x``'s. ``norm_sums``
    (n, 2, D) are fp32 parts of the gradients by the two of ``norm``. ``logs``: as in
    :func:`forward_norm`; then the gradient is by them.
    """
    if grad_y.dtype != x.dtype:
        grad_y = grad_y.to(x.dtype)
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, *norm)
    if not _is_fast(x, A.shape[1]):
        grads = walk.backward(grad_y, x, *parameters[:5], projected, kept)
        return *grads, *(s.to(t.dtype, copy=True)
                         for s, t in zip(norm_sums.sum(0) if norm else (), norm, strict=True))
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    type_, index = _TYPES[x.dtype], x.get_device()
    plan = _plan(batch, dim, height, width, rank, routes, index)
    cut = plan.backward
    given, x, grad_y = x, layout.pixels(x), layout.pixels(grad_y)

    maps = x.new_empty((cut.maps, batch, height, width, dim))
    dprojected = x.new_empty((cut.columns, *projected.shape))
    columns = routes * dim * (rank + 2) + dim
    partials = x.new_empty(cut.spans * columns, dtype=torch.float32)
    fields = (*_scan_fields(plan, cut, kept, projected, x, rank), *_map(x), *_map(grad_y),
              kept.data_ptr() + plan.offsets[-2], maps.data_ptr(), dprojected.data_ptr(),
              partials.data_ptr())
    _walk(plan, cut, backward_instance, fields, x, True)

    dprojected = dprojected[0] if cut.columns == 1 else dprojected.sum(0)
    grad_x = torch.mm(dprojected, kept.as_strided((routes * plan.row, dim), (dim, 1)))
    if norm_fits(x):
        _merge(maps, _images(plan, cut, batch), grad_x.data_ptr(), extra=grad_x.data_ptr())
    else:
        grad_x = torch.sum(maps.flatten(1, 3), 0, dtype=torch.float32).add_(grad_x).to(x.dtype)
    grad_x = grad_x.view(batch, height, width, dim).permute(0, 3, 1, 2)
    product = layout.project_weight_grad(dprojected, x)

    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in parameters]
    blocks = -(-columns // 32) + -(-grads[0].numel() // 256) + (-(-dim // 16) if norm else 0)
    absent = (0,) * (2 - len(norm))
    kernel(index, finish_instance, type_).launch(
        (blocks, 1, 1), (32, 8, 1),
        (partials.data_ptr(), product.data_ptr(), pointer(norm_sums),
         *[t.data_ptr() for t in grads], *absent, cut.spans, len(norm_sums) if norm else 0, dim,
         rank, routes, plan.row, *[_CODES[t.dtype] for t in grads], *absent,
         A.contiguous().data_ptr() if logs else 0))
    return layout.like(grad_x, given), *grads


def backward_norm(grad, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight,
                  norm_bias, projected, kept, merged, logs=False):
    """Gradients by x, the five parameters, and the norm's weight and bias, in their dtypes."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_y = torch.empty_like(grad)
    sums = launch_backward(grad, merged, merged.data_ptr() + 2 * grad.numel(), norm_weight, None,
                           None, grad_y, None, grad.shape[2] * grad.shape[3])
    return backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected,
                    kept, (norm_weight, norm_bias), sums, logs)
