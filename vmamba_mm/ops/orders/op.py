"""The ops ``cross_scan`` and ``cross_merge``: definitions, checks, public functions."""

from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.orders import reference
from vmamba_mm.ops.orders.reference import ROUTES


def _save_size(ctx, inputs, output):
    ctx.height, ctx.width = inputs[0].shape[2:]


def _save_routes(ctx, inputs, output):
    ctx.num_routes = inputs[0].shape[1]


# Each is the other's transpose.
_cross_scan = define_op(
    'cross_scan', '(Tensor x, SymInt num_routes) -> Tensor',
    reference=reference.scan_forward,
    fake=lambda x, num_routes: x.new_empty(x.shape[0], num_routes, x.shape[1],
                                           x.shape[2] * x.shape[3]),
    implementations={'torch': Implementation(
        lambda x, num_routes: reference.scan_forward(x, num_routes).contiguous())},
    setup_context=_save_size,
    backward=lambda ctx, grad: (_cross_merge(grad.contiguous(), ctx.height, ctx.width), None))

_cross_merge = define_op(
    'cross_merge', '(Tensor y, SymInt height, SymInt width) -> Tensor',
    reference=reference.merge_forward,
    fake=lambda y, height, width: y.new_empty(y.shape[0], y.shape[2], height, width),
    implementations={'torch': Implementation(
        lambda y, height, width: reference.merge_forward(y, height, width).contiguous())},
    setup_context=_save_routes,
    backward=lambda ctx, grad: (_cross_scan(grad, ctx.num_routes), None, None))


def cross_scan(x: Tensor, num_routes: int = 4) -> Tensor:
    """Unfold a map along K routes (section 4.3, figure 3 of the paper).

    Args:
        x: (B, D, H, W), any dtype.
        num_routes: K, the first K of row-major, column-major, and the reverses of both.

    Returns:
        (B, K, D, L) with L = H*W, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: on a wrong rank or number of routes.

    Example:
        >>> cross_scan(torch.arange(6).view(1, 1, 2, 3))[0, 1]  # column-major
        tensor([[0, 3, 1, 4, 2, 5]])
    """
    if x.dim() != 4:
        raise ValueError(f'cross_scan expects x of shape (B, D, H, W), got {tuple(x.shape)}')
    if not 1 <= num_routes <= len(ROUTES):
        raise ValueError(f'num_routes must be 1 to {len(ROUTES)} ({ROUTES}), got {num_routes}')
    return _cross_scan(x, num_routes)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Fold K routes back to a map and sum them: the transpose of :func:`cross_scan`.

    Args:
        y: (B, K, D, L), any dtype, L = height * width, K as in :func:`cross_scan`.
        height: H of the map.
        width: W of the map.

    Returns:
        (B, D, H, W), contiguous, in the dtype of ``y``.

    Raises:
        ValueError: on a wrong rank, K above 4, or L != height * width.

    Example:
        >>> cross_merge(torch.ones(1, 4, 1, 6), 2, 3)
        tensor([[[[4., 4., 4.],
                  [4., 4., 4.]]]])
    """
    if y.dim() != 4 or not 1 <= y.shape[1] <= len(ROUTES):
        raise ValueError(f'cross_merge expects y of shape (B, K, D, L) with K of 1 to '
                         f'{len(ROUTES)}, got {tuple(y.shape)}')
    if y.shape[3] != height * width:
        raise ValueError(f'cross_merge: L={y.shape[3]} is not height*width={height}*{width}')
    return _cross_merge(y, height, width)
