"""The ops ``cross_scan`` and ``cross_merge``: definitions, checks, public functions."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.orders import reference
from vmamba_mm.ops.orders.reference import ROUTES

# --- in PyTorch, each element moved once --------------------------------------------------------

def _scan(x: Tensor, num_routes: int, channels_last: bool) -> Tensor:
    if not channels_last:
        return reference.scan_forward(x, num_routes).contiguous()
    batch, height, width, dim = x.shape
    y_BLKD = x.new_empty(batch, height * width, num_routes, dim)
    for k in range(num_routes):
        x_in_order = x.transpose(1, 2) if k % 2 else x
        _as_map(y_BLKD[:, :, k], k, height, width).copy_(
            x_in_order.flip(1, 2) if k >= 2 else x_in_order)
    return y_BLKD


def _merge(y: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    if not channels_last:
        return reference.merge_forward(y, height, width).contiguous()
    merged = y.new_empty(len(y), height, width, y.shape[3])
    for k in range(y.shape[2]):
        part = _as_map(y[:, :, k], k, height, width)
        part = part.flip(1, 2) if k >= 2 else part
        part = part.transpose(1, 2) if k % 2 else part
        torch.add(merged, part, out=merged) if k else merged.copy_(part)
    return merged


def _as_map(y_BLD: Tensor, k: int, height: int, width: int) -> Tensor:
    """The positions of route k as a map, transposed if it goes by column."""
    return y_BLD.unflatten(1, (width, height) if k % 2 else (height, width))


# --- the ops --------------------------------------------------------------------------------------

def _save_size(ctx, inputs, output):
    ctx.channels_last = inputs[2]
    ctx.height, ctx.width = inputs[0].shape[1:3] if inputs[2] else inputs[0].shape[2:]


def _save_routes(ctx, inputs, output):
    ctx.channels_last = inputs[3]
    ctx.num_routes = inputs[0].shape[2 if inputs[3] else 1]


def _scan_fake(x, num_routes, channels_last):
    if channels_last:
        return x.new_empty(x.shape[0], x.shape[1] * x.shape[2], num_routes, x.shape[3])
    return x.new_empty(x.shape[0], num_routes, x.shape[1], x.shape[2] * x.shape[3])


def _merge_fake(y, height, width, channels_last):
    if channels_last:
        return y.new_empty(y.shape[0], height, width, y.shape[3])
    return y.new_empty(y.shape[0], y.shape[2], height, width)


# Each is the other's transpose.
_cross_scan = define_op(
    'cross_scan', '(Tensor x, SymInt num_routes, bool channels_last) -> Tensor',
    reference=reference.scan_forward,
    fake=_scan_fake, implementations={'torch': Implementation(_scan)},
    setup_context=_save_size,
    backward=lambda ctx, grad: (_cross_merge(grad.contiguous(), ctx.height, ctx.width,
                                             ctx.channels_last), None, None))

_cross_merge = define_op(
    'cross_merge', '(Tensor y, SymInt height, SymInt width, bool channels_last) -> Tensor',
    reference=reference.merge_forward,
    fake=_merge_fake, implementations={'torch': Implementation(_merge)},
    setup_context=_save_routes,
    backward=lambda ctx, grad: (_cross_scan(grad, ctx.num_routes, ctx.channels_last), None, None,
                                None))


def cross_scan(x: Tensor, num_routes: int = 4, *, channels_last: bool = False) -> Tensor:
    """Unfold a map along K routes (section 4.3, figure 3 of the paper).

    Args:
        x: (B, D, H, W), any dtype; (B, H, W, D) with ``channels_last``.
        num_routes: K, the first K of row-major, column-major, and the reverses of both.
        channels_last: of the map and of the routes.

    Returns:
        (B, K, D, L) with L = H*W, or (B, L, K, D) with ``channels_last``; contiguous, in the dtype
        of ``x``.

    Raises:
        ValueError: on a wrong rank or number of routes.

    Example:
        >>> cross_scan(torch.arange(6).view(1, 1, 2, 3))[0, 1]  # column-major
        tensor([[0, 3, 1, 4, 2, 5]])
    """
    if x.dim() != 4:
        expected = '(B, H, W, D)' if channels_last else '(B, D, H, W)'
        raise ValueError(f'cross_scan expects x of shape {expected}, got {tuple(x.shape)}')
    if not 1 <= num_routes <= len(ROUTES):
        raise ValueError(f'num_routes must be 1 to {len(ROUTES)} ({ROUTES}), got {num_routes}')
    return _cross_scan(x, num_routes, channels_last)


def cross_merge(y: Tensor, height: int, width: int, *, channels_last: bool = False) -> Tensor:
    """Fold K routes back to a map and sum them: the transpose of :func:`cross_scan`.

    Args:
        y: (B, K, D, L), or (B, L, K, D) with ``channels_last``; any dtype, L = height * width, K as
            in :func:`cross_scan`.
        height: H of the map.
        width: W of the map.
        channels_last: of the routes and of the map.

    Returns:
        (B, D, H, W), or (B, H, W, D) with ``channels_last``; contiguous, in the dtype of ``y``.

    Raises:
        ValueError: on a wrong rank, K above 4, or L != height * width.

    Example:
        >>> cross_merge(torch.ones(1, 4, 1, 6), 2, 3)
        tensor([[[[4., 4., 4.],
                  [4., 4., 4.]]]])
    """
    routes, last = (2, 1) if channels_last else (1, 3)
    if y.dim() != 4 or not 1 <= y.shape[routes] <= len(ROUTES):
        raise ValueError(f'cross_merge expects y of shape '
                         f'{"(B, L, K, D)" if channels_last else "(B, K, D, L)"} with K of 1 to '
                         f'{len(ROUTES)}, got {tuple(y.shape)}')
    if y.shape[last] != height * width:
        raise ValueError(f'cross_merge: L={y.shape[last]} is not height*width={height}*{width}')
    return _cross_merge(y, height, width, channels_last)
