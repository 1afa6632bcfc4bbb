"""Launches of the CUDA kernels in ``kernels/``: the forward on half-precision maps.

Nothing is built beforehand: :mod:`vmamba_mm.ops.nvrtc` compiles at first use. The kernels' own
comments and ``kernels/README.md`` say how they work.
"""

from functools import cache

import torch
from torch import Tensor

from vmamba_mm.ops.nvrtc import Instance, load

_TYPES = {torch.float16: 'Half', torch.bfloat16: 'BFloat'}
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CHUNK = 64  # positions that a warp takes at a time
_WARPS = 6  # of a block, 16 channels each
_BLOCKS = 2  # of a multiprocessor; the kernel's launch bounds say so too


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not(x: Tensor, out_dtype: torch.dtype, parameters: tuple[Tensor, ...]) -> str | None:
    """What keeps the kernels from taking these inputs, or None."""
    if not x.is_cuda or torch.version.hip is not None:
        return f'x is on {x.device}, not on an NVIDIA GPU'
    if x.dtype not in _TYPES:
        return f'x is {x.dtype}; the kernels take float16 and bfloat16'
    capability = _capability(x.device.index)
    if capability < ((8, 0) if x.dtype == torch.bfloat16 else (7, 5)):
        return f'a GPU of compute capability {capability} has no tensor cores for {x.dtype}'
    if out_dtype not in (x.dtype, torch.float32):
        return f'out_dtype is {out_dtype}; the kernels give {x.dtype} and float32'
    if any(p.dtype not in _CODES for p in parameters):
        return 'a parameter is neither float32 nor float16 nor bfloat16'
    if x[0].numel() >= 2**31 or x.shape[0] == 0:
        return 'an image has 2^31 elements or more, or the batch is empty'
    return None


@cache
def prepare_instance(type_: str) -> Instance:
    return Instance('ss2d_prepare.cu', f'ss2d_prepare<{type_}>', 'P' * 10 + 'i' * 11)


@cache
def scan_instance(type_: str, tiles: int, one_state: bool, summary: bool) -> Instance:
    return Instance('ss2d_scan_fwd.cu', f'ss2d_scan_fwd<{type_}, {tiles}, {int(one_state)}, '
                    f'{str(summary).lower()}>', 'P' * 12 + 'qqq' + 'i' * 16)


@cache
def combine_instance() -> Instance:
    return Instance('ss2d_combine.cu', 'ss2d_combine<8>', 'PPPiiii')


@cache
def merge_instance(type_: str, parts: int, to_float: bool) -> Instance:
    return Instance('ss2d_merge.cu', f'ss2d_merge<{type_}, {parts}, {str(to_float).lower()}>',
                    'P' * 8 + 'fiii')


@cache
def _device(index: int) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that a block may have)."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _magic(divisor: int) -> int:
    """2^32 / divisor, rounded up, as the int32 of the same bits; 0 for 1."""
    magic = 0 if divisor == 1 else -(-2**32 // divisor)
    return magic - 2**32 if magic >= 2**31 else magic


class _Plan:
    """Sizes of a launch: how the work is cut for this GPU."""

    def __init__(self, x: Tensor, rank: int, state: int, routes: int):
        self.batch, self.dim, self.height, self.width = x.shape
        self.rank, self.state, self.routes = rank, state, routes
        self.tiles = -(-rank // 8)
        pairs = rank + rank % 2
        self.row = 8 * max(-(-(pairs + 2 * state) // 8), self.tiles)
        self.groups = -(-self.dim // 16)
        self.chunks = -(-self.height * self.width // _CHUNK)
        self.axes = min(routes, 2)
        multiprocessors, shared = _device(x.device.index or 0)
        directions = 2 if routes == 4 else 1
        staged = 2 * directions * self.row // 8 * 1024
        per_warp = 4 * (2 * (16 + 16 * state + 64 * self.tiles) + 32 * state)
        fitting = (shared - 1024 - staged) // per_warp // 2 * 2
        if fitting < 2:
            raise ValueError(f'd_state={state} and dt_rank={rank} need more shared memory than '
                             f'the {shared} bytes of this GPU')
        self.warps = max(2, min(_WARPS, fitting, self.groups + self.groups % 2))
        self.shared = staged + self.warps * per_warp
        self.columns = -(-self.groups // self.warps)
        slots = _BLOCKS * multiprocessors
        blocks = self.batch * self.columns * self.axes
        # Few blocks: each walk in spans. Many short ones: several images to a block.
        spans = 1 if 2 * blocks > slots else min(slots // blocks, -(-self.chunks // 4))
        self.span = -(-self.chunks // spans)
        self.spans = -(-self.chunks // self.span)
        self.images = max(1, blocks // (2 * slots)) if self.chunks <= 4 else 1
        self.grid = (-(-self.batch // self.images), self.columns, self.axes * self.spans)


def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.ss2d_scan`; inputs for which ``why_not`` is None."""
    rows, columns = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    batch, dim, height, width = x.shape
    if norm_fits(x):
        y = torch.empty(batch, height, width, dim, dtype=out_dtype, device=x.device)
        _merge(rows, columns, merged=y)
    elif columns is None:
        y = rows.to(out_dtype)
    else:
        y = torch.add(rows.float(), columns).to(out_dtype)
    y = y.permute(0, 3, 1, 2)
    out = torch.empty_like(x, dtype=out_dtype)
    return y if y.stride() == out.stride() else out.copy_(y)


def norm_fits(x: Tensor) -> bool:
    """Whether the kernel that adds and normalises the two maps takes maps like ``x``."""
    return x.shape[1] % 4 == 0 and x.shape[1] <= 4096


def forward_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                 eps) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.ss2d_scan_norm`; inputs for which ``norm_fits``."""
    rows, columns = _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    normed = rows if columns is None else columns  # an element is read before it is written
    weight, bias = norm_weight.contiguous(), norm_bias.contiguous().to(norm_weight.dtype)
    _merge(rows, columns, normed=normed, weight=weight, bias=bias, eps=eps)
    y = normed.permute(0, 3, 1, 2)
    out = torch.empty_like(x)
    return y if y.stride() == out.stride() else out.copy_(y)


def _scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D):
    """The row map and the column map, (B, H, W, D) each; the second is None for one route."""
    num_routes, dim, rank = dt_projs_weight.shape
    plan = _Plan(x, rank, A.shape[1], num_routes)
    if x.stride(1) != 1 and dim > 1:
        x = x.contiguous(memory_format=torch.channels_last)
    x_BHWD = x.permute(0, 2, 3, 1)
    batch, height, width = plan.batch, plan.height, plan.width
    type_, device = _TYPES[x.dtype], x.device

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    padded = 16 * plan.groups
    weight = empty(num_routes * plan.row, dim, dtype=x.dtype)
    fragments = empty(num_routes * plan.groups * plan.tiles * 64, dtype=torch.int32)
    scalars = empty((num_routes * (1 + plan.state) + 1) * padded)
    bias = scalars.data_ptr()
    rates = bias + 4 * num_routes * padded
    skip = rates + 4 * num_routes * plan.state * padded
    parameters = [t.contiguous() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)]
    count = weight.numel() + fragments.numel() + scalars.numel()
    load(prepare_instance(type_), device).launch(
        (min(1024, -(-count // 256)), 1, 1), (256, 1, 1),
        (*(t.data_ptr() for t in parameters), weight.data_ptr(), fragments.data_ptr(), bias, rates,
         skip, dim, rank, plan.state, num_routes, plan.row, plan.tiles,
         *(_CODES[t.dtype] for t in parameters)))
    projected = torch.mm(x_BHWD.reshape(-1, dim), weight.T)

    rows = empty(batch, height, width, dim, dtype=x.dtype)
    columns = empty(batch, height, width, dim, dtype=x.dtype) if plan.axes == 2 else None
    states = empty(batch, num_routes, plan.chunks, plan.state, dim)
    spans = (batch, num_routes, plan.spans, plan.state, dim)
    stride_b, _, stride_h, stride_w = x.stride()
    vector = dim % 4 == stride_b % 4 == stride_h % 4 == stride_w % 4 == x.data_ptr() % 8 == 0

    def scan(summary, entries, decays, ends):
        load(scan_instance(type_, plan.tiles, plan.state == 1, summary), device).launch(
            plan.grid, (32 * plan.warps, 1, 1),
            (x.data_ptr(), projected.data_ptr(), rows.data_ptr(),
             0 if columns is None else columns.data_ptr(), fragments.data_ptr(), bias, rates, skip,
             states.data_ptr(), entries, decays, ends, stride_b, stride_h, stride_w, batch, dim,
             height, width, rank, plan.state, num_routes, plan.row, plan.span, plan.spans,
             plan.chunks, int(vector), 0, plan.images, _magic(height), _magic(width)), plan.shared)

    if plan.spans > 1:
        decays, ends, entries = empty(*spans), empty(*spans), empty(*spans)
        scan(True, 0, decays.data_ptr(), ends.data_ptr())
        inner = plan.state * dim
        load(combine_instance(), device).launch(
            (-(-batch * num_routes * inner // 128), 1, 1), (128, 1, 1),
            (decays.data_ptr(), ends.data_ptr(), entries.data_ptr(), batch * num_routes,
             plan.spans, inner, num_routes))
        scan(False, entries.data_ptr(), 0, 0)
    else:
        scan(False, 0, 0, 0)
    return rows, columns


def _merge(rows, columns, merged=None, normed=None, weight=None, bias=None, eps=0.0):
    """The sum of the two maps and its LayerNorm, each where a tensor for it is given."""
    dim = rows.shape[-1]
    positions = rows.numel() // dim
    to_float = merged is not None and merged.dtype == torch.float32

    def pointer(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    multiprocessors, _ = _device(rows.device.index or 0)
    load(merge_instance(_TYPES[rows.dtype], -(-dim // 128), to_float), rows.device).launch(
        (min(-(-positions // 8), 16 * multiprocessors), 1, 1), (256, 1, 1),
        (rows.data_ptr(), pointer(columns), pointer(merged), pointer(normed), pointer(weight),
         pointer(bias), 0, 0, eps, positions, dim, 0 if weight is None else _CODES[weight.dtype]))
