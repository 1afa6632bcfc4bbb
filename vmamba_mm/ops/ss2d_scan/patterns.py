"""Scan patterns: the orders in which the routes of SS2D run over a map. Those of four routes
(table 10, arXiv 2401.10166) are on the op ``ss2d_scan``, those of eight on ``ordered_scan``.

A sequence is a map of one row, (M, D, 1, T), on which row-major and column-major are the same
order: K = 2 routes of the op run forward there, and K = 4 are two forward and two backward.
M sequences of T positions, B batch, D channels, H/W, L = H*W, R dt rank, N state.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.add_norm import layer_norm
from vmamba_mm.ops.orders.reference import ROUTES
from vmamba_mm.ops.ss2d_scan import ordered, ss2d_scan, ss2d_scan_norm
from vmamba_mm.ops.ss2d_scan.op import check
from vmamba_mm.ops.ss2d_scan.ordered import Order, Route, by_column, ordered_scan

NUM_ROUTES = len(ROUTES)  # of a pattern on ss2d_scan
ORDERED_ROUTES = 2 * NUM_ROUTES  # of one on ordered_scan
_ROW, _COLUMN, _ROW_BACK, _COLUMN_BACK = ROUTES


class _OrderedScan(NamedTuple):
    """A map in an order, and calls of the op on it, whose results are added up; a call is the
    routes whose parameters it takes."""
    order: str
    calls: tuple[tuple[int, ...], ...]


# By name; row-major, the order in memory, needs none.
_ORDERS: dict[str, Order] = {
    _COLUMN: by_column,
    _ROW_BACK: lambda height, width: torch.arange(height * width).flip(0),
    _COLUMN_BACK: lambda height, width: by_column(height, width).flip(0)}
# What adds up to the result; None for what scan_norm does otherwise.
_PATTERNS: dict[str, tuple[_OrderedScan, ...] | None] = {
    'cross': None,
    'unidirectional': (_OrderedScan(_ROW, ((0, 1), (2, 3))),),
    'bidirectional': (_OrderedScan(_ROW, ((0, 1, 2, 3),)),),
    'cascade': None}


def scan_patterns() -> tuple[str, ...]:
    """The names that :func:`scan_norm` takes, of four routes and then of eight: those of the
    package first."""
    return *_PATTERNS, *ordered.PATTERNS


def num_routes(scan: str) -> int:
    """K of a pattern: 4 or 8.

    Raises:
        ValueError: unless ``scan`` is one of :func:`scan_patterns`.
    """
    if scan in ordered.PATTERNS:
        return ORDERED_ROUTES
    if scan not in _PATTERNS:
        raise ValueError(f'scan={scan!r} does not exist; choose one of {list(scan_patterns())}, or '
                         'register it first (vmamba_mm.ops.register_scan)')
    return NUM_ROUTES


def register_scan(name: str, routes: Sequence[str | Order]) -> None:
    """Add a scan pattern, for ``scan_norm(..., scan=name)`` and ``arch={..., 'scan': name}``.

    Args:
        name: new; it must be registered before a model with it is built.
        routes: four or eight, in the order in which parameters are stacked: 'row-major',
            'column-major', 'reversed row-major' or 'reversed column-major', or a function
            ``(H, W) -> order``, an int tensor (L) or sequence of the positions h * W + w in the
            order of the visit. It is called once for each size and device, and the latest 1024
            orders are kept.

    The pattern is trained like the others: gradients are the op's. Of four routes, each distinct
    order but row-major makes one copy of the map, kept for the backward, and one of its result;
    routes of the same order (the same function) share them. Eight run as :func:`ordered_scan` says.

    Raises:
        ValueError: on a name that exists, other than four or eight routes, or an order that is no
            permutation (found out on a map of 3x5, and again on each new size).
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f'the name of a scan must be a str that is not empty, got {name!r}')
    if name in scan_patterns():
        raise ValueError(f'scan {name!r} exists already; choose a name other than '
                         f'{list(scan_patterns())}')
    if isinstance(routes, str) or not isinstance(routes, Sequence) \
            or len(routes) not in (NUM_ROUTES, ORDERED_ROUTES):
        raise ValueError(f'scan {name!r} needs a sequence of {NUM_ROUTES} or {ORDERED_ROUTES} '
                         f'routes, got {routes!r}')
    for k, route in enumerate(routes):
        if callable(route):
            Route(route).positions(3, 5)
        elif route not in ROUTES:
            raise ValueError(f'route {k} of scan {name!r} is {route!r}; it must be one of '
                             f'{list(ROUTES)} or a function (H, W) -> order')
    if len(routes) == ORDERED_ROUTES:
        ordered.PATTERNS[name] = tuple(
            Route(route) if callable(route) else ordered.NAMED[route] for route in routes)
        return
    routes_by_order: dict[str, list[int]] = {}
    functions: dict[Order, str] = {}
    for k, route in enumerate(routes):
        if callable(route):
            route = functions.setdefault(route, f'{name}, route {k}')
        routes_by_order.setdefault(route, []).append(k)
    _ORDERS.update({order: function for function, order in functions.items()})
    forward, backward = (routes_by_order.get(order, ()) for order in (_ROW, _ROW_BACK))
    if len(forward) == len(backward) == 2:  # one call does both: its K = 4 on a map of one row
        _PATTERNS[name] = (_OrderedScan(_ROW, ((*forward, *backward),)),)
    else:  # a call takes two routes
        _PATTERNS[name] = tuple(
            _OrderedScan(order, tuple(tuple(ks[i:i + 2]) for i in range(0, len(ks), 2)))
            for order, ks in routes_by_order.items())


def scan_norm(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor,
              A: Tensor, D: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
              eps: float = 1e-5, *, scan: str = 'cross', backend: Backend | None = None) -> Tensor:
    """The middle of SS2D by a scan pattern, and the LayerNorm over D that follows.

    By the direction k = 0 to 3 in which parameters are stacked, the routes are

    - 'cross': row-major, column-major, reversed row-major, reversed column-major. It is
      :func:`ss2d_scan_norm`.
    - 'unidirectional': row-major, four times.
    - 'bidirectional': row-major for 0 and 1, reversed row-major for 2 and 3.
    - 'cascade': LayerNorm without affine (eps 1e-5); every row a sequence of its own, from its
      beginning (0) and from its end (1), summed; that norm again; every column likewise (2, 3).
      The public code adds the results from the end without turning them back into place; here
      they are turned back.
    - 'omnidirectional', 'omnidirectional-unwrapped': eight, as :func:`ordered_scan` says.
    - a name of :func:`register_scan`.

    Copies of a map that is channels last, beside what the op itself makes: none by 'cross' and
    'bidirectional' (one call of the op, norm included); the two results that are summed by
    'unidirectional'; for rows as for columns by 'cascade' the norm's, one turned around and its
    result turned back; by a registered pattern as said there.

    Args:
        norm_weight, norm_bias: (D); None for no norm at the end.
        eps: of the last norm.
        scan: a name of :func:`scan_patterns`.

    The other arguments are those of :func:`ss2d_scan`, for K = 4, or 8 of a pattern of eight routes
    (by 'cross' for any of its K).

    Returns:
        (B, D, H, W), channels last if ``x`` is; by 'cross' with its strides. In the dtype of
        ``x``; without a norm in that to which ``x`` and ``D`` promote, which under autocast is
        fp32 up to the norm, as published.

    Raises:
        ValueError: on a ``scan`` that does not exist, one of both parameters of the norm alone,
            else as :func:`ss2d_scan`.
    """
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError('scan_norm expects norm_weight and norm_bias, or None for both')
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    out_dtype = torch.promote_types(x.dtype, (D if norm_weight is None else norm_weight).dtype)

    def scan_map(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        if norm_weight is None:
            return ss2d_scan(x, *parameters, out_dtype=out_dtype, backend=backend)
        return ss2d_scan_norm(x, *parameters, norm_weight, norm_bias, eps, backend=backend)

    if scan == 'cross':
        return scan_map(x, parameters)
    count = num_routes(scan)
    if x_proj_weight.dim() and len(x_proj_weight) != count:
        raise ValueError(f'scan={scan!r} expects the parameters of K = {count} routes, got '
                         f'x_proj_weight {tuple(x_proj_weight.shape)}')
    if scan in ordered.PATTERNS:
        y_BHWD = ordered_scan(x, *parameters, scan=scan, out_dtype=out_dtype, backend=backend
                              ).permute(0, 2, 3, 1)
        return _norm_last(y_BHWD, norm_weight, norm_bias, eps, x.dtype)
    check(x, *parameters)
    height, width = x.shape[2:]
    x_BHWD, scans = x.permute(0, 2, 3, 1), _PATTERNS[scan]
    if scans is not None and len(scans) == len(scans[0].calls) == 1:  # on the map as it is
        y_BD1L = scan_map(_as_one_row(x_BHWD.flatten(1, 2)),
                          _select_routes(parameters, scans[0].calls[0]))
        return _as_sequences(y_BD1L).unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def scan_sequences(x_MTD: Tensor, routes: tuple[int, ...]) -> Tensor:
        return _as_sequences(ss2d_scan(_as_one_row(x_MTD), *_select_routes(parameters, routes),
                                       out_dtype=out_dtype, backend=backend))

    if scans is None:  # 'cascade'
        y_BHWD = _scan_both_ways(_norm(x_BHWD, x.dtype), scan_sequences, 0)
        y_BWHD = _scan_both_ways(_norm(y_BHWD.transpose(1, 2), x.dtype), scan_sequences, 2)
        y_BHWD = y_BWHD.transpose(1, 2)
    else:
        x_BLD = x_BHWD.flatten(1, 2)
        y_BLD = _sum([_scan_in_order(ordered, x_BLD, scan_sequences, height, width)
                      for ordered in scans])
        y_BHWD = y_BLD.unflatten(1, (height, width))
    return _norm_last(y_BHWD, norm_weight, norm_bias, eps, x.dtype)


def _norm_last(y_BHWD: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
               dtype: torch.dtype) -> Tensor:
    """(B, D, H, W), after the norm where there is one."""
    if weight is not None:
        y_BHWD = layer_norm(y_BHWD.contiguous(), weight, bias, eps, out_dtype=dtype)
    return y_BHWD.permute(0, 3, 1, 2)


def _as_one_row(x_MTD: Tensor) -> Tensor:
    """Sequences as maps (M, D, 1, T), channels last."""
    return x_MTD.transpose(1, 2).unsqueeze(2)


def _as_sequences(y_MD1T: Tensor) -> Tensor:
    return y_MD1T.squeeze(2).transpose(1, 2)


def _select_routes(parameters: tuple[Tensor, ...], routes: tuple[int, ...]) -> list[Tensor]:
    """The parameters of these routes, of those of all stacked; views where they can be."""
    count = len(parameters[0])  # x_proj_weight: (K, ...); A and D are (K * D, ...)
    first, last = routes[0], routes[-1] + 1
    if routes == tuple(range(first, last)):
        return [t[first * (len(t) // count):last * (len(t) // count)] for t in parameters]
    return [torch.cat([t.chunk(count)[k] for k in routes]) for t in parameters]


def _norm(x_BHWD: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm without affine; it makes ``x_BHWD`` contiguous."""
    return F.layer_norm(x_BHWD, x_BHWD.shape[-1:]).to(dtype)


def _scan_both_ways(x_BHWD: Tensor, scan_sequences: Callable, k: int) -> Tensor:
    """Every row a sequence of its own, from its beginning by route k, from its end by k + 1."""
    rows = x_BHWD.flatten(0, 1)
    y = scan_sequences(rows, (k,)) + scan_sequences(rows.flip(1), (k + 1,)).flip(1)
    return y.reshape(x_BHWD.shape)


def _scan_in_order(ordered: _OrderedScan, x_BLD: Tensor, scan_sequences: Callable, height: int,
                   width: int) -> Tensor:
    """The sum of the calls' results, back in row-major order."""
    if ordered.order == _ROW:
        return _sum([scan_sequences(x_BLD, routes) for routes in ordered.calls])
    x_BLD = reorder(x_BLD, height, width, ordered.order, False)
    y_BLD = _sum([scan_sequences(x_BLD, routes) for routes in ordered.calls])
    return reorder(y_BLD, height, width, ordered.order, True)


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


# --- the map in another order -----------------------------------------------------------------
# An op: a compiler need not trace what others wrote, and the gradient of a permutation is its
# inverse, where index_select's would be a sum in whatever order.

def _order(x: Tensor, height: int, width: int, order: str, back: bool) -> Tensor:
    """x (B, L, D) with its positions in an order, or from it ``back`` to row-major."""
    indices = _find_indices(_ORDERS[order], height, width, x.device)
    return x.index_select(1, indices[back])


def _save_settings(ctx, inputs, output):
    ctx.settings = inputs[1:]


def _order_back(ctx, grad):
    height, width, order, back = ctx.settings
    return reorder(grad, height, width, order, not back), None, None, None, None


reorder = define_op(
    'reorder', '(Tensor x, SymInt height, SymInt width, str order, bool back) -> Tensor',
    reference=_order, fake=lambda x, *settings: x.new_empty(x.shape),
    implementations={'torch': Implementation(_order)}, setup_context=_save_settings,
    backward=_order_back)


@functools.lru_cache(1024)
def _find_indices(order: Order, height: int, width: int, device: torch.device
                  ) -> tuple[Tensor, Tensor]:
    """The positions in the order of the visit, and when each is visited; int32."""
    with torch.device('cpu'):
        visited = Route(order).positions(height, width)
    return visited.int().to(device), visited.argsort().int().to(device)
