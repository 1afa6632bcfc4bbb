"""The ops ``ss2d_scan`` and ``ss2d_scan_norm``: definitions, checks, public functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.orders.reference import ROUTES
from vmamba_mm.ops.selective_scan.op import scan_flops
from vmamba_mm.ops.ss2d_scan import chunked, cuda, reference, triton_scan

_ARGUMENTS = ('Tensor x, Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, '
              'Tensor A, Tensor D')


def count_flops(x, x_proj_weight, dt_projs_weight, A, **_) -> int:
    """FLOPs of the projections and the scans, from shapes."""
    batch, dim, height, width = x
    num_routes, projected, _ = x_proj_weight
    length, rank = height * width, dt_projs_weight[2]
    projections = 2 * batch * num_routes * length * dim * (projected + rank)
    return projections + scan_flops(batch, num_routes * dim, length, A[1])


def _like_x_and_weights(x, *weights):
    """Empty gradients: that by the map has its strides, those by the weights have no gaps."""
    return torch.empty_like(x), *(t.new_empty(t.shape) for t in weights)


def _saved_fake(x, dt_projs_weight, A, save):
    routes, _, rank = dt_projs_weight.shape
    projected, saved, dtype = cuda.saved_shapes(x, rank, routes, A.shape[1], save)
    return x.new_empty(projected), x.new_empty(saved, dtype=dtype)


def _fake(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype, backend, save):
    y = torch.empty_like(x, dtype=out_dtype)
    if backend == 'cuda':
        return y, *_saved_fake(x, dt_projs_weight, A, save)
    return y, x.new_empty(0), x.new_empty(0)


_ss2d_scan = define_op(
    'ss2d_scan_fwd',
    f'({_ARGUMENTS}, ScalarType out_dtype, str backend, bool save) -> '
    '(Tensor y, Tensor projected, Tensor saved)',
    reference=reference.forward,
    fake=_fake,
    implementations={
        'cuda': Implementation(
            cuda.forward, cuda.backward, lambda *args: cuda.why_not(args[0], args[6], args[1:6]),
            saves=True),
        'triton': Implementation(
            triton_scan.forward, triton_scan.backward,
            lambda *args: triton_scan.why_not(args[0], args[6], args[1:6])),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='x x_proj_weight dt_projs_weight dt_projs_bias A D projected saved',
    backward_fake=lambda grad, *args: _like_x_and_weights(*args[:6]),
    flops=count_flops)


def ss2d_scan(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor,
              A: Tensor, D: Tensor, *, out_dtype: torch.dtype | None = None,
              backend: Backend | None = None) -> Tensor:
    """The whole middle of SS2D as one op (section 4.3 and figure 3, arXiv 2401.10166).

    Cross scan along K routes, per-route projection of x to (dt, B, C), softplus(dt W + bias),
    selective scan, cross merge. Every input has a gradient. Kept for the backward are the inputs;
    by the CUDA kernels also the projected input, a state for each 24 or 56 positions and, for
    N = 1, the parameters as the kernels take them.

    Args:
        x: (B, D, H, W), after depthwise convolution and SiLU; any strides (channels last is the
            natural one); fp16, bf16, fp32 or fp64.
        x_proj_weight: (K, R + 2N, D), K of 1, 2 or 4: the first K of row-major, column-major,
            and the reverses of both.
        dt_projs_weight: (K, D, R).
        dt_projs_bias: (K, D).
        A: (K*D, N), below zero for a state that decays (the model's ``-exp(A_logs)``).
        D: (K*D), the skip.
        out_dtype: dtype of the result; None for the dtype of ``x``. Computation and state are
            fp32 (fp64 for fp64 input) whatever the dtypes, and under autocast.
        backend: 'reference', 'chunked', 'cuda' or 'triton'; None for 'cuda' where it takes the
            inputs (on an NVIDIA GPU; projections in the dtype of ``x``, as under autocast), else
            'triton' where it does (on any GPU), else 'chunked'.

    Returns:
        (B, D, H, W), the K routes summed, in ``out_dtype`` and with the strides of ``x``.

    Raises:
        ValueError: on shapes that do not fit one another, or an unknown backend.

    Example, for D = 8 channels, K = 4 routes, R = 2 and N = 1:
        >>> x, weight, dt = torch.randn(2, 8, 5, 7), torch.randn(4, 4, 8), torch.randn(4, 8, 2)
        >>> ss2d_scan(x, weight, dt, torch.zeros(4, 8), -torch.ones(32, 1), torch.ones(32)).shape
        torch.Size([2, 8, 5, 7])
    """
    check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    return _ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype or x.dtype,
                      backend=backend)


def _norm_fake(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
               eps, save):
    return (torch.empty_like(x), *_saved_fake(x, dt_projs_weight, A, save),
            x.new_empty(cuda.merged_size(x) if save else 0))


def _why_no_norm(*args) -> str | None:
    x, *parameters, _ = args
    if (reason := cuda.why_not(x, x.dtype, tuple(parameters))) is None and not cuda.norm_fits(x):
        reason = f'a norm over {x.shape[1]} channels'
    return reason


_ss2d_scan_norm = define_op(
    'ss2d_scan_norm',
    f'({_ARGUMENTS}, Tensor norm_weight, Tensor norm_bias, float eps, bool save) -> '
    '(Tensor y, Tensor projected, Tensor saved, Tensor merged)',
    reference=reference.forward_norm,
    fake=_norm_fake,
    implementations={'cuda': Implementation(cuda.forward_norm, cuda.backward_norm, _why_no_norm,
                                            saves=True)},
    saves='x x_proj_weight dt_projs_weight dt_projs_bias A D norm_weight norm_bias projected saved '
          'merged',
    backward_fake=lambda grad, *args: _like_x_and_weights(*args[:8]),
    flops=count_flops)


def ss2d_scan_norm(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
                   dt_projs_bias: Tensor, A: Tensor, D: Tensor, norm_weight: Tensor,
                   norm_bias: Tensor, eps: float = 1e-5, *,
                   backend: Backend | None = None) -> Tensor:
    """:func:`ss2d_scan` and the LayerNorm over D that follows it, in ``x``'s dtype.

    Where the kernels take the inputs the norm reads the routes' maps, and the merged map is stored
    only for a backward, in ``x``'s dtype. Else the two run one after the other.

    Args:
        norm_weight, norm_bias: (D).
        eps: of the norm.

    The other arguments are those of :func:`ss2d_scan`.

    Returns:
        (B, D, H, W) in the dtype and with the strides of ``x``.

    Raises:
        ValueError: as :func:`ss2d_scan`.

    Example, for D = 8 channels, K = 4 routes, R = 2 and N = 1:
        >>> x, weight, dt = torch.randn(2, 8, 5, 7), torch.randn(4, 4, 8), torch.randn(4, 8, 2)
        >>> ss2d_scan_norm(x, weight, dt, torch.zeros(4, 8), -torch.ones(32, 1), torch.ones(32),
        ...                torch.ones(8), torch.zeros(8)).shape
        torch.Size([2, 8, 5, 7])
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    check(x, *parameters)
    dim = x.shape[1:2]
    check_shapes('ss2d_scan_norm', {'x': x}, norm_weight=(norm_weight, dim),
                 norm_bias=(norm_bias, dim))

    def one_by_one(*args):
        # Under autocast the merged map stays fp32 up to the norm, as published.
        y_BDHW = _ss2d_scan(x, *parameters, torch.promote_types(x.dtype, norm_weight.dtype),
                            backend=backend)
        y_BHWD = F.layer_norm(y_BDHW.permute(0, 2, 3, 1).contiguous(), norm_weight.shape,
                              norm_weight, norm_bias, eps)
        y = y_BHWD.permute(0, 3, 1, 2)
        return y.to(x.dtype) if y.stride() == x.stride() else torch.empty_like(x).copy_(y)

    if backend not in (None, 'cuda'):
        return one_by_one()
    return _ss2d_scan_norm(x, *parameters, norm_weight, norm_bias, eps, otherwise=one_by_one)


def check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, routes: int = 0) -> None:
    """Raise ValueError unless the shapes fit one another, and so many ``routes``; 0 for those of
    ss2d_scan."""
    if x.dim() != 4 or dt_projs_weight.dim() != 3 or A.dim() != 2:
        raise ValueError('ss2d_scan expects x (B, D, H, W), dt_projs_weight (K, D, R) and '
                         f'A (K*D, N); got x {tuple(x.shape)}, dt_projs_weight '
                         f'{tuple(dt_projs_weight.shape)}, A {tuple(A.shape)}')
    dim, (num_routes, _, rank), state = x.shape[1], dt_projs_weight.shape, A.shape[1]
    if routes and not num_routes == len(x_proj_weight) == routes:
        raise ValueError(f'the scan expects the parameters of K = {routes} routes, got '
                         f'x_proj_weight {tuple(x_proj_weight.shape)} and dt_projs_weight '
                         f'{tuple(dt_projs_weight.shape)}')
    if not routes and num_routes not in (1, 2, 4):
        raise ValueError(f'ss2d_scan expects K of 1, 2 or 4 routes (the first K of {ROUTES}), '
                         f'got {num_routes}')
    if x.numel() == 0 and x.shape[0] != 0:
        raise ValueError(f'ss2d_scan expects D, H and W of at least 1, got x {tuple(x.shape)}')
    channels, row = num_routes * dim, rank + 2 * state
    if (x_proj_weight.shape == (num_routes, row, dim) and dt_projs_weight.shape[1] == dim
            and dt_projs_bias.shape == (num_routes, dim) and A.shape[0] == channels
            and D.shape == (channels,)):
        return
    check_shapes('ss2d_scan', {'x': x}, x_proj_weight=(x_proj_weight, (num_routes, row, dim)),
                 dt_projs_weight=(dt_projs_weight, (num_routes, dim, rank)),
                 dt_projs_bias=(dt_projs_bias, (num_routes, dim)), A=(A, (channels, state)),
                 D=(D, (channels,)))
