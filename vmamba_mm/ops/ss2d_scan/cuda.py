"""ss2d_scan and its norm by the CUDA kernels in ``kernels/``.

Here are the launches for N = 1 on half-precision maps; any other N and fp32 maps go to
:mod:`vmamba_mm.ops.ss2d_scan.walk`. Nothing is built beforehand: :mod:`vmamba_mm.ops.nvrtc`
compiles at first use. The kernels' own comments and ``kernels/README.md`` say how they work.
"""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.nvrtc import Instance, load
from vmamba_mm.ops.ss2d_scan import layout, walk
from vmamba_mm.ops.walk import combine_instance

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

@cache
def prepare_instance(type_: str) -> Instance:
    return Instance('ss2d_prepare.cu', f'ss2d_prepare<{type_}>', 'P' * 10 + 'i' * 10)


@cache
def forward_instance(type_: str, tiles: int, summary: bool) -> Instance:
    return Instance('ss2d_scan_fwd.cu', f'ss2d_scan_fwd<{type_}, {tiles}, {str(summary).lower()}>',
                    _SCAN + _MAP + 'P' * 5,
                    (('WARPS', _FORWARD_WARPS), ('BLOCKS', _FORWARD_BLOCKS)))


@cache
def backward_instance(type_: str, tiles: int, summary: bool) -> Instance:
    return Instance('ss2d_scan_bwd.cu', f'ss2d_scan_bwd<{type_}, {tiles}, {str(summary).lower()}>',
                    _SCAN + _MAP + _MAP + 'P' * 7,
                    (('WARPS', _BACKWARD_WARPS), ('BLOCKS', _BACKWARD_BLOCKS)))


@cache
def finish_instance(type_: str) -> Instance:
    return Instance('ss2d_finish.cu', f'ss2d_finish<{type_}>', 'P' * 7 + 'i' * 10)


@cache
def merge_instance(type_: str, maps: int, extra: bool, parts: int, to_float: bool) -> Instance:
    return Instance('ss2d_merge.cu', f'ss2d_merge<{type_}, {maps}, {str(extra).lower()}, {parts}, '
                    f'{str(to_float).lower()}>', 'P' * 7 + 'fiii')


@cache
def norm_backward_instance(type_: str, parts: int, warps: int) -> Instance:
    return Instance('ss2d_norm_bwd.cu', f'ss2d_norm_bwd<{type_}, {parts}, {warps}>',
                    'P' * 6 + 'iii')


# --- how the work is cut ----------------------------------------------------------------------

class _Cut(NamedTuple):
    """A launch: maps that it writes, warps of a block, blocks for the channels, spans of so many
    chunks, shared bytes; whether the spans begin at an image, so that nothing enters them; what it
    costs."""
    maps: int
    warps: int
    columns: int
    span: int
    spans: int
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

    def cuts(most, blocks, of_block, per_warp, saved, slots):
        limit = properties.shared_memory_per_block_optin - 1024
        most = min(most, (limit - of_block) // per_warp)
        if most < 2:
            raise ValueError(f'dt_rank={rank} needs more shared memory than the {limit} bytes of '
                             f'this GPU')
        chunks = -(-batch * slots // 8)
        alone = slots // math.gcd(slots, 8)  # chunks until an image begins with a chunk
        for columns in {-(-groups // warps) for warps in range(2, most + 1)}:
            warps = max(2, -(-groups // columns))
            shared = of_block + warps * per_warp
            at_once = min(blocks * most // warps,
                          properties.shared_memory_per_multiprocessor // (shared + 1024))
            at_once *= multiprocessors
            # Two routes one after the other, into one map, need whole images, and an addition to
            # half-precision memory.
            fewest = 2 if saved and routes == 4 and properties.major >= 9 else routes
            for maps, independent in {(fewest, True), (routes, True), (routes, False)}:
                unit, walks = alone if independent else 1, columns * maps
                for spans in {max(1, n * at_once // walks) for n in (1, 2, 3, 4)}:
                    span = -(-chunks // (unit * spans)) * unit
                    spans = -(-chunks // span)
                    if spans > 65535:
                        continue
                    # In chunks of a warp on a multiprocessor, which 8 warps fill; a block's start
                    # is worth half a chunk. What enters a span costs two more launches.
                    waves = -(-walks * spans // at_once)
                    resident = min(at_once, walks * spans) * warps / multiprocessors
                    # 16 warps take as long for a chunk of each as 12 do, less 5 %.
                    resident = max(8, resident * (0.95 if resident > 12 else 1))
                    cost = waves * (span * routes // maps + 0.5) * resident
                    cost *= (1 + 0.004 * columns) * (1 if maps == routes else 1 - saved)
                    if not independent and spans > 1:
                        cost = 1.6 * cost + 16
                    yield _Cut(maps, warps, columns, span, spans, shared,
                               independent or spans == 1, cost)

    # What a map less to write and to add up saves. A forward waits for additions to a map that is
    # not in L2; a backward has other things to do.
    in_cache = 2 * batch * length * dim < properties.L2_cache_size
    saved = 0.005 if in_cache else 0, 0.1
    best = None
    exact = -(-length // _SLOT)
    for slots in {exact, -(-exact // 8) * 8}:
        forward, backward = (min(cuts(*sizes, slots), key=lambda cut: cut.cost) for sizes in (
            (_FORWARD_WARPS, _FORWARD_BLOCKS, 64 + 3 * staged, 256 * tiles + 192, saved[0]),
            (_BACKWARD_WARPS, _BACKWARD_BLOCKS, 2 * staged,
             4 * _CHUNK_MAP + 768 * tiles + 320 + 2048, saved[1])))
        if best is None or forward.cost + 2 * backward.cost < best[1].cost + 2 * best[2].cost:
            best = slots, forward, backward
    slots, forward, backward = best
    return _Plan(routes, tiles, row, groups, slots, -(-batch * slots // 8),
                 int(height % _SLOT == width % _SLOT == 0),
                 (_magic(height), _magic(width), _magic(slots)), forward, backward)


def _row(rank: int) -> int:
    """P, the elements of a row of the projected input: dt, an even number, B and C, in units."""
    return 8 * max(-(-(rank + rank % 2 + 2) // 8), -(-rank // 8))


def _magic(divisor: int) -> int:
    """2^32 / divisor, rounded up, as the int32 of the same bits; 0 for 1."""
    magic = 0 if divisor == 1 else -(-2**32 // divisor)
    return magic - 2**32 if magic >= 2**31 else magic


# --- forward ----------------------------------------------------------------------------------

def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype, save):
    """(y, projected, states), shapes as in :func:`vmamba_mm.ops.ss2d_scan` and ``saved``.

    For inputs for which ``why_not`` is None; ``states`` is empty unless ``save``.
    """
    maps, projected, states = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save)
    y = torch.empty(maps.shape[1:], dtype=out_dtype, device=x.device)
    if norm_fits(x):
        _merge(maps, merged=y)
    else:
        torch.sum(maps, 0, dtype=out_dtype, out=y)
    return layout.like(y, x), projected, states


def saved(x, rank, num_routes, state):
    """Shapes of what the forward keeps for the backward: (projected, states)."""
    batch, dim, height, width = x.shape
    if not _is_fast(x, state):
        return ((batch * height * width, num_routes * (rank + 2 * state)),
                walk.states_shape(batch, num_routes, height * width, state, dim))
    chunks = batch * -(-height * width // (8 * _SLOT))  # or more than there are
    return (batch * height * width, num_routes * _row(rank)), (num_routes, chunks, dim)


def norm_fits(x: Tensor) -> bool:
    """Whether the kernels that add the maps and normalise take maps like ``x``."""
    return x.dtype in _TYPES and x.shape[1] % 4 == 0 and x.shape[1] <= 4096


def forward_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                 eps, save):
    """(out, merged, moments, projected, states) for inputs for which ``norm_fits``.

    ``merged`` (B, H, W, D), in ``x``'s dtype, and ``moments`` (B*H*W, 2) are what the norm's
    backward needs; they and ``states`` are empty unless ``save``.
    """
    maps, projected, states = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save)
    out, merged, moments = torch.empty_like(maps[0]), x.new_empty(0), x.new_empty(0)
    if save:
        merged = torch.empty_like(out)
        moments = torch.empty(out[..., 0].numel(), 2, dtype=torch.float32, device=x.device)
    _merge(maps, merged=merged if save else None, normed=out, weight=norm_weight.contiguous(),
           bias=norm_bias.contiguous().to(norm_weight.dtype), moments=moments if save else None,
           eps=eps)
    return layout.like(out, x), merged, moments, projected, states


class _Prepared(NamedTuple):
    """The parameters as the kernels take them; the last four are pointers into ``memory``."""
    weight: Tensor  # (K * P, D)
    memory: Tensor
    fragments: int
    bias: int
    rates: int
    skip: int


def _prepare(plan, dtype, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D) -> _Prepared:
    routes, dim, rank = dt_projs_weight.shape
    padded = 16 * plan.groups
    weight = torch.empty(routes * plan.row, dim, dtype=dtype, device=A.device)
    of_fragments = routes * plan.groups * plan.tiles * 64
    memory = torch.empty(of_fragments + (2 * routes + 1) * padded, dtype=torch.float32,
                         device=A.device)
    fragments = memory.data_ptr()
    bias = fragments + 4 * of_fragments
    rates = bias + 4 * routes * padded
    skip = rates + 4 * routes * padded
    parameters = [t.contiguous() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)]
    count = weight.numel() + memory.numel()
    load(prepare_instance(_TYPES[dtype]), A.device).launch(
        (min(1024, -(-count // 256)), 1, 1), (256, 1, 1),
        (*(t.data_ptr() for t in parameters), weight.data_ptr(), fragments, bias, rates, skip,
         dim, rank, routes, plan.row, plan.tiles, *(_CODES[t.dtype] for t in parameters)))
    return _Prepared(weight, memory, fragments, bias, rates, skip)


def _map(x_BLD: Tensor) -> tuple[int, ...]:
    """The fields of the kernels' Map."""
    dim, pointer = x_BLD.shape[2], x_BLD.data_ptr()
    stride_b, stride_pixel, stride_d = x_BLD.stride()
    vector = (stride_d == 1 or dim == 1) and dim % 4 == stride_b % 4 == stride_pixel % 4 == 0
    return pointer, stride_b, stride_pixel, stride_d, int(vector and pointer % 8 == 0), 0


def _scan_fields(plan, cut, prepared, projected, batch, dim, height, width, rank):
    """The fields of the kernels' Scan."""
    return (projected.data_ptr(), *prepared[2:], batch, dim, height, width, rank, plan.routes,
            plan.row, plan.slots, plan.chunks, cut.span, cut.spans, plan.aligned, *plan.magic)


def _walk(cut, kernel, summary_kernel, fields, dim, back, device):
    """Launch a scan, in spans where the plan says so; ``fields`` are all but the last three."""
    grid, block = (cut.maps, cut.columns, cut.spans), (32 * cut.warps, 1, 1)
    if cut.independent:
        load(kernel, device).launch(grid, block, (*fields, 0, 0, 0), cut.shared)
        return
    memory = torch.empty(3, cut.maps, cut.spans, dim, dtype=torch.float32, device=device)
    decays = memory.data_ptr()
    ends = decays + 4 * cut.maps * cut.spans * dim
    entries = ends + 4 * cut.maps * cut.spans * dim
    load(summary_kernel, device).launch(grid, block, (*fields, 0, decays, ends), cut.shared)
    load(combine_instance(), device).launch(
        (-(-cut.maps * dim // 128), 1, 1), (128, 1, 1),
        (decays, ends, entries, cut.maps, cut.spans, dim, int(back)))
    load(kernel, device).launch(grid, block, (*fields, entries, 0, 0), cut.shared)


def _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save):
    """Maps (a number, B, H, W, D) to be added up, ``projected`` and ``states``."""
    if not _is_fast(x, A.shape[1]):
        return walk.forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save)
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    plan = _plan(batch, dim, height, width, rank, routes, x.device.index)
    x_BLD = layout.pixels(x)
    prepared = _prepare(plan, x.dtype, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    projected = layout.project(x_BLD, prepared.weight)
    maps = torch.empty(plan.forward.maps, batch, height, width, dim, dtype=x.dtype,
                       device=x.device)
    states = torch.empty(saved(x, rank, routes, 1)[1] if save else 0, dtype=torch.float32,
                         device=x.device)
    type_ = _TYPES[x.dtype]
    fields = (*_scan_fields(plan, plan.forward, prepared, projected, batch, dim, height, width,
                            rank),
              *_map(x_BLD), maps.data_ptr(), states.data_ptr() if save else 0)
    _walk(plan.forward, forward_instance(type_, plan.tiles, False),
          forward_instance(type_, plan.tiles, True), fields, dim, False, x.device)
    return maps, projected, states


def _merge(maps, extra=None, merged=None, normed=None, weight=None, bias=None, moments=None,
           eps=0.0):
    """The sum of the maps (and ``extra``), its LayerNorm: each where a tensor for it is given."""
    dim = maps.shape[-1]
    positions = maps[0].numel() // dim
    to_float = merged is not None and merged.dtype == torch.float32

    def pointer(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    instance = merge_instance(_TYPES[maps.dtype], len(maps), extra is not None, -(-dim // 128),
                              to_float)
    load(instance, maps.device).launch(
        (min(-(-positions // 8), 8 * _multiprocessors(maps.device.index)), 1, 1), (256, 1, 1),
        (maps.data_ptr(), pointer(extra), pointer(merged), pointer(normed), pointer(weight),
         pointer(bias), pointer(moments), eps, positions, dim,
         0 if weight is None else _CODES[weight.dtype]), 0 if normed is None else 8 * dim)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


# --- backward ---------------------------------------------------------------------------------

def backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected, states):
    """Gradients by x and the five parameters, in their dtypes.

    ``grad_y`` is (B, D, H, W) of any strides and dtype; it is rounded to ``x``'s.
    """
    if not _is_fast(x, A.shape[1]):
        return walk.backward(grad_y.to(x.dtype), x, x_proj_weight, dt_projs_weight, dt_projs_bias,
                             A, D, projected, states)
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    device, type_ = x.device, _TYPES[x.dtype]
    plan = _plan(batch, dim, height, width, rank, routes, device.index)
    cut = plan.backward
    x_BLD, dy_BLD = layout.pixels(x), layout.pixels(grad_y.to(x.dtype))
    prepared = _prepare(plan, x.dtype, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)

    maps = torch.empty(cut.maps, batch, height, width, dim, dtype=x.dtype, device=device)
    dprojected = torch.empty(cut.columns, *projected.shape, dtype=x.dtype, device=device)
    columns = routes * dim * (rank + 2) + dim
    partials = torch.empty(cut.spans, columns, dtype=torch.float32, device=device)
    fields = (*_scan_fields(plan, cut, prepared, projected, batch, dim, height, width, rank),
              *_map(x_BLD), *_map(dy_BLD), states.data_ptr(), maps.data_ptr(),
              dprojected.data_ptr(), partials.data_ptr())
    _walk(cut, backward_instance(type_, plan.tiles, False),
          backward_instance(type_, plan.tiles, True), fields, dim, True, device)

    dprojected = dprojected[0] if cut.columns == 1 else dprojected.sum(0)
    grad_x = torch.mm(dprojected, prepared.weight).view(batch, height, width, dim)
    if norm_fits(x):
        _merge(maps, extra=grad_x, merged=grad_x)
    else:
        grad_x = torch.sum(maps, 0, dtype=torch.float32).add_(grad_x).to(x.dtype)
    product = layout.project_weight_grad(dprojected, x_BLD)

    grads = [torch.empty(t.shape, dtype=t.dtype, device=device)
             for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)]
    blocks = -(-columns // 32) + -(-grads[0].numel() // 256)
    load(finish_instance(type_), device).launch(
        (blocks, 1, 1), (32, 8, 1),
        (partials.data_ptr(), product.data_ptr(), *(t.data_ptr() for t in grads), len(partials),
         dim, rank, routes, plan.row, *(_CODES[t.dtype] for t in grads)))
    return layout.like(grad_x, x), *grads


def norm_backward(grad, merged, moments, weight):
    """Gradients of the LayerNorm by its input (B, D, H, W), weight and bias (fp32)."""
    batch, height, width, dim = merged.shape
    positions = merged.numel() // dim
    grad = grad.permute(0, 2, 3, 1).contiguous()
    warps = next(n for n in (1, 2, 4, 8) if dim <= 512 * n)
    parts = -(-dim // (128 * warps))
    index = merged.device.index
    blocks = min(-(-positions * warps // 8), 4 * _multiprocessors(index))
    out = torch.empty_like(merged)
    partials = torch.empty(blocks, 2, dim, dtype=torch.float32, device=merged.device)
    weight = weight.contiguous()
    load(norm_backward_instance(_TYPES[merged.dtype], parts, warps), index).launch(
        (blocks, 1, 1), (256, 1, 1),
        (grad.data_ptr(), merged.data_ptr(), moments.data_ptr(), weight.data_ptr(),
         out.data_ptr(), partials.data_ptr(), positions, dim, _CODES[weight.dtype]), 8 * dim)
    grad_weight, grad_bias = partials.sum(0)
    return out.permute(0, 3, 1, 2), grad_weight, grad_bias
