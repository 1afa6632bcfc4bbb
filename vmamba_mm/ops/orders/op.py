"""torch.library registration of ``cross_scan`` and ``cross_merge``."""

from torch import Tensor

from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.orders import reference
from vmamba_mm.ops.orders.reference import ROUTES


def _scan_fake(x, num_routes):
    batch, dim, height, width = x.shape
    return x.new_empty(batch, num_routes, dim, height * width)


def _scan_setup(ctx, inputs, output):
    ctx.height, ctx.width = inputs[0].shape[2:]


def _scan_backward(ctx, grad):
    return _cross_merge(grad.contiguous(), ctx.height, ctx.width), None


@register('cross_scan', fake=_scan_fake, backward=_scan_backward, setup_context=_scan_setup)
def _cross_scan(x: Tensor, num_routes: int) -> Tensor:
    return reference.scan_forward(x, num_routes).contiguous()


def _merge_fake(y, height, width):
    return y.new_empty(y.shape[0], y.shape[2], height, width)


def _merge_setup(ctx, inputs, output):
    ctx.num_routes = inputs[0].shape[1]


def _merge_backward(ctx, grad):
    return _cross_scan(grad, ctx.num_routes), None, None


@register('cross_merge', fake=_merge_fake, backward=_merge_backward, setup_context=_merge_setup)
def _cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    return reference.merge_forward(y, height, width).contiguous()


@flop_formula('cross_scan', 'cross_merge')
def _moves_only(*args, **kwargs) -> int:
    return 0


def cross_scan(x: Tensor, num_routes: int = 4) -> Tensor:
    """Unfold a map along K routes (section 4.3, figure 3 of the paper).

    Args:
        x: (B, D, H, W), any dtype.
        num_routes: K, the first K of row-major, column-major, and the reverses of both.

    Returns:
        (B, K, D, L) with L = H*W, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: on a wrong rank or number of routes.
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
    """
    if y.dim() != 4 or not 1 <= y.shape[1] <= len(ROUTES):
        raise ValueError(f'cross_merge expects y of shape (B, K, D, L) with K of 1 to '
                         f'{len(ROUTES)}, got {tuple(y.shape)}')
    if y.shape[3] != height * width:
        raise ValueError(f'cross_merge: L={y.shape[3]} is not height*width={height}*{width}')
    return _cross_merge(y, height, width)
