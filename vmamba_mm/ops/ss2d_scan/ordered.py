"""``ordered_scan``: ``ss2d_scan`` along any number of routes, each over all positions of the map in
an order of its own.

The CUDA kernels for any N look up in a table which pixel a step visits, so that nothing is
gathered. Elsewhere a route is a map of one row, gathered in its order, for the implementations of
``ss2d_scan``. M samples, B batch, K routes, D channels, H/W, L = H*W, R dt rank, N state.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, compute_dtype, without_autocast
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.orders.reference import ROUTES
from vmamba_mm.ops.selective_scan import reference as s6
from vmamba_mm.ops.ss2d_scan import chunked, cuda, large_state, layout, merge, triton_scan
from vmamba_mm.ops.ss2d_scan.op import check, count_flops

#: (H, W) -> the L positions h * W + w in the order of the visit.
Order = Callable[[int, int], Tensor | Sequence[int]]


# --- orders -------------------------------------------------------------------------------------

def by_row(height: int, width: int) -> Tensor:
    return torch.arange(height * width)


def by_column(height: int, width: int) -> Tensor:
    return by_row(height, width).view(height, width).T.flatten()


def by_diagonal(height: int, width: int) -> Tensor:
    """From the lower left corner to the upper right one, each diagonal downwards."""
    h, w = _coordinates(height, width)
    return ((w - h) * height + h).flatten().argsort()


def by_antidiagonal(height: int, width: int) -> Tensor:
    """From the upper left corner to the lower right one, each antidiagonal downwards."""
    h, w = _coordinates(height, width)
    return ((w + h) * height + h).flatten().argsort()


def by_wrapped_diagonal(height: int, width: int) -> Tensor:
    """From each position of the first row downwards and to the right, H steps, from the last
    column on to the first: step j * H + i is at (i, (i + j) mod W)."""
    i, j = _coordinates(height, width)
    return (i * width + (i + j) % width).T.flatten()


def by_wrapped_antidiagonal(height: int, width: int) -> Tensor:
    """The same to the left: step j * H + i is at (i, (j - i) mod W)."""
    i, j = _coordinates(height, width)
    return (i * width + (j - i) % width).T.flatten()


def _coordinates(height: int, width: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')


class Route(NamedTuple):
    """An order, from its end if ``back``."""
    order: Order
    back: bool = False

    def positions(self, height: int, width: int) -> Tensor:
        """(L) int64 on the CPU.

        Raises:
            ValueError: if the order is no permutation.
        """
        visited = torch.as_tensor(self.order(height, width)).cpu()
        positions = torch.arange(height * width)
        if visited.shape != positions.shape or visited.dtype.is_floating_point \
                or not torch.equal(visited.sort()[0], positions):
            name = getattr(self.order, '__name__', self.order)
            raise ValueError(f'{name}({height}, {width}) must give each of the positions 0 to '
                             f'{height * width - 1} once, got {visited}')
        return (visited.flip(0) if self.back else visited).long()


#: The routes of ``ss2d_scan`` by name.
NAMED = {name: Route(order, back) for name, (order, back) in zip(ROUTES, (
    (by_row, False), (by_column, False), (by_row, True), (by_column, True)), strict=True)}


def both_ways(*orders: Order) -> tuple[Route, ...]:
    return tuple(Route(order, back) for back in (False, True) for order in orders)


_CROSS = tuple(NAMED.values())
#: The patterns that run on this op: name -> routes, in the order in which parameters are stacked.
PATTERNS: dict[str, tuple[Route, ...]] = {
    'omnidirectional': _CROSS + both_ways(by_wrapped_diagonal, by_wrapped_antidiagonal),
    'omnidirectional-unwrapped': _CROSS + both_ways(by_diagonal, by_antidiagonal)}


@torch.compiler.assume_constant_result
def _constant_table(scan: str, height: int, width: int, device: str) -> Tensor:
    return _table(PATTERNS[scan], height, width, torch.device(device), torch.int64)


@functools.lru_cache(1024)
def _table(routes: tuple[Route, ...], height: int, width: int, device: torch.device,
           dtype: torch.dtype) -> Tensor:
    """(K, L): the position that each step of a route visits."""
    with torch.device('cpu'), torch.inference_mode(False):
        table = torch.stack([route.positions(height, width) for route in routes])
    return table.to(device, dtype)


def scan_positions(scan: str, height: int, width: int) -> Tensor:
    """What the routes of a pattern of :func:`ordered_scan` visit.

    Returns:
        (K, H * W) int64: h * W + w of each step of each route.

    Raises:
        ValueError: on a pattern that does not exist.
    """
    return _table(_routes(scan), height, width, torch.device('cpu'), torch.int64).clone()


def _routes(scan: str) -> tuple[Route, ...]:
    if scan not in PATTERNS:
        raise ValueError(f'scan={scan!r} does not exist; choose one of {list(PATTERNS)}, or '
                         'register it first (vmamba_mm.ops.register_scan)')
    return PATTERNS[scan]


def gather_routes(x_BDHW: Tensor, table_KL: Tensor) -> Tensor:
    """(B, K, D, L): the map along every route."""
    return x_BDHW.flatten(2)[:, :, table_KL].transpose(1, 2)


def merge_routes(y_BKDL: Tensor, table_KL: Tensor) -> Tensor:
    """(B, D, L): every route put back into place, and summed."""
    return y_BKDL.gather(3, table_KL.argsort(1)[:, None].expand_as(y_BKDL)).sum(1)


# --- the op's implementations -------------------------------------------------------------------

def reference(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, scan, out_dtype) -> Tensor:
    """Differentiable by autograd: every route gathered, S6 along it, and put back into place."""
    result = torch.empty_like(x, dtype=out_dtype)
    dtype = compute_dtype(x.dtype)
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = (
        t.to(dtype) for t in (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D))
    height, width = x.shape[2:]
    table_KL = _constant_table(scan, height, width, str(x.device))
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    with without_autocast(x):
        x_BKDL = gather_routes(x, table_KL)
        projected = torch.einsum('bkdl,kcd->bkcl', x_BKDL, x_proj_weight)
        dt, B, C = projected.split((rank, state, state), dim=2)
        delta = torch.einsum('bkrl,kdr->bkdl', dt, dt_projs_weight)
    y, _ = s6.forward(x_BKDL.flatten(1, 2), delta.flatten(1, 2), A, B, C, D,
                      dt_projs_bias.flatten(), None, None, True, False, False, dtype)
    y_BDL = merge_routes(y.view(x_BKDL.shape), table_KL)
    return result.copy_(y_BDL.unflatten(2, (height, width)))


class _Part(NamedTuple):
    """Routes that one call of ``ss2d_scan`` does: its own four on the map, or one on the map
    gathered in an order (L)."""
    routes: slice
    order: Tensor | None


def _parts(x: Tensor, scan: str) -> Iterator[_Part]:
    routes, first = PATTERNS[scan], 0
    if routes[:len(_CROSS)] == _CROSS:
        first = len(_CROSS)
        yield _Part(slice(first), None)
    table_KL = _table(routes, *x.shape[2:], x.device, torch.int64)
    for k in range(first, len(routes)):
        yield _Part(slice(k, k + 1), table_KL[k])


def _select(parameters: Sequence[Tensor], routes: slice) -> list[Tensor]:
    """The parameters of these routes, of those of all stacked: views."""
    count = len(parameters[0])
    return [t.unflatten(0, (count, -1))[routes].flatten(0, 1) for t in parameters]


def _gather(x: Tensor, order: Tensor | None) -> Tensor:
    """The map as it is, or in an order as one of one row, (B, D, 1, L), channels last."""
    if order is None:
        return x
    x_BLD = x.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, order)
    return x_BLD.transpose(1, 2).unsqueeze(2)


def _put_back(y: Tensor, order: Tensor | None, out_BDHW: Tensor) -> None:
    """Add what :func:`_gather` gave, or was scanned to, in its place to a channels-last map."""
    if order is None:
        out_BDHW += y
    else:  # no position comes twice, so the sum has one order
        out_BLD = out_BDHW.permute(0, 2, 3, 1).flatten(1, 2)
        out_BLD.index_add_(1, order, y.squeeze(2).transpose(1, 2))


def _empty_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device).contiguous(
        memory_format=torch.channels_last)


def _gathered(implementation: ModuleType) -> dict[str, Callable]:
    """Forward and backward by an implementation of ``ss2d_scan``, in fp32 (fp64 for fp64)."""

    def forward(x, *args):
        *parameters, scan, out_dtype = args
        dtype = compute_dtype(x.dtype)
        merged = _empty_sum(x, dtype)
        for routes, order in _parts(x, scan):
            y = implementation.forward(_gather(x, order), *_select(parameters, routes), dtype)
            _put_back(y, order, merged)
        return layout.like(merged.to(out_dtype), x)

    def backward(grad_y, x, *args):
        *parameters, scan = args
        dtype = compute_dtype(x.dtype)
        wide, grad_y = x.to(dtype), grad_y.to(dtype)
        grad_x, grads = _empty_sum(x, dtype), []
        for routes, order in _parts(x, scan):
            by_x, *by_parameters = implementation.backward(
                _gather(grad_y, order), _gather(wide, order), *_select(parameters, routes))
            _put_back(by_x, order, grad_x)
            grads.append(by_parameters)
        return layout.like(grad_x.to(x.dtype), x), *map(torch.cat, zip(*grads, strict=True))

    return dict(forward=forward, backward=backward)


def _orders(x: Tensor, scan: str) -> Tensor:
    return _table(PATTERNS[scan], *x.shape[2:], x.device, torch.int32)


def _cuda_forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, scan, out_dtype, save):
    maps, projected, states = large_state.forward(
        x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, save, orders=_orders(x, scan))
    if merge.fits(x.shape[1]):
        batch, dim, height, width = x.shape
        y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.channels_last)
        merge.launch(x.get_device(), x.dtype, len(maps), batch, (batch, dim, height * width),
                     False, None, out_dtype == torch.float32)(
            maps=maps.data_ptr(), merged=y.data_ptr(), eps=0.0)
    else:
        y = torch.sum(maps, 0, dtype=out_dtype).permute(0, 3, 1, 2)
    return layout.like(y, x), projected, states


def _cuda_backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected,
                   states, scan):
    return large_state.backward(grad_y.to(x.dtype), x, x_proj_weight, dt_projs_weight,
                                dt_projs_bias, A, D, projected, states, orders=_orders(x, scan))


def _why_not_cuda(*args) -> str | None:
    x, *parameters, _, out_dtype = args
    return cuda.why_not(x, out_dtype, tuple(parameters))


def _why_not_triton(*args) -> str | None:
    x, *parameters, _, out_dtype = args
    return triton_scan.why_not(x, out_dtype, tuple(parameters))


def _fake(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, scan, out_dtype, backend, save):
    y = torch.empty_like(x, dtype=out_dtype)
    if backend != 'cuda':
        return y, x.new_empty(0), x.new_empty(0)
    batch, dim, height, width = x.shape
    routes, _, rank = dt_projs_weight.shape
    length, state = height * width, A.shape[1]
    shape = large_state.states_shape(batch, routes, length, state, dim) if save else (0,)
    return (y, x.new_empty(batch * length, routes * (rank + 2 * state)),
            x.new_empty(shape, dtype=torch.float32))


_ordered_scan = define_op(
    'ordered_scan_fwd',
    '(Tensor x, Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, Tensor A, '
    'Tensor D, str scan, ScalarType out_dtype, str backend, bool save) -> '
    '(Tensor y, Tensor projected, Tensor states)',
    reference=reference, fake=_fake,
    implementations={
        'cuda': Implementation(_cuda_forward, _cuda_backward, _why_not_cuda, saves=True),
        'triton': Implementation(**_gathered(triton_scan), why_not=_why_not_triton),
        'chunked': Implementation(**_gathered(chunked))},
    saves='x x_proj_weight dt_projs_weight dt_projs_bias A D projected states scan',
    backward_fake=lambda grad, x, *args: (
        torch.empty_like(x), *(t.new_empty(t.shape) for t in args[:5])),
    flops=lambda scan, **shapes: count_flops(**shapes))


def ordered_scan(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor,
                 A: Tensor, D: Tensor, *, scan: str, out_dtype: torch.dtype | None = None,
                 backend: Backend | None = None) -> Tensor:
    """:func:`ss2d_scan` along the K routes of a pattern, each in an order of its own.

    The CUDA kernels look the positions up, and store no map in another order; half-precision maps
    with N = 1 take those for any N. By Triton and in plain PyTorch the four routes of the cross
    scan, where a pattern begins with them, run on the map itself; each other route makes a copy of
    the map in its order and one of its result.

    Args:
        scan: 'omnidirectional', the eight routes of RS-Mamba (arXiv 2404.02668): row-major,
            column-major and the reverses of both, then diagonals, antidiagonals and the reverses of
            both. As in the public code each diagonal has a position in every row, and goes on in
            the first column after the last one: step j * H + i is at (i, (i + j) mod W), of
            antidiagonals at (i, (j - i) mod W). 'omnidirectional-unwrapped': with the diagonals of
            the matrix, from corner to corner. Or a name of :func:`register_scan` with eight routes.
        backend: as of :func:`ss2d_scan`.

    The other arguments are those of :func:`ss2d_scan`, for K = 8.

    Returns:
        (B, D, H, W), the K routes summed, in ``out_dtype`` and with the strides of ``x``.

    Raises:
        ValueError: on a ``scan`` that does not exist, else as :func:`ss2d_scan`.

    Example, for D = 8 channels, R = 2 and N = 1:
        >>> x, weight, dt = torch.randn(2, 8, 5, 7), torch.randn(8, 4, 8), torch.randn(8, 8, 2)
        >>> ordered_scan(x, weight, dt, torch.zeros(8, 8), -torch.ones(64, 1), torch.ones(64),
        ...              scan='omnidirectional').shape
        torch.Size([2, 8, 5, 7])
    """
    check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, len(_routes(scan)))
    return _ordered_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, scan,
                         out_dtype or x.dtype, backend=backend)
