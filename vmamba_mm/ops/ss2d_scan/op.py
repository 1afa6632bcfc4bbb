"""torch.library registration of ``ss2d_scan``: schema, fake, autograd, FLOPs, checks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, resolve_backend, wants_grad
from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.orders.reference import ROUTES
from vmamba_mm.ops.selective_scan.op import scan_flops
from vmamba_mm.ops.ss2d_scan import chunked, cuda, reference, triton_scan

_FORWARD = {'reference': reference.forward, 'chunked': chunked.forward,
            'triton': triton_scan.forward}
_BACKWARD = {'reference': reference.backward, 'chunked': chunked.backward,
             'triton': triton_scan.backward}


def _bwd_fake(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, projected, kept,
              backend):
    weights = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    return torch.empty_like(x), *(t.new_empty(t.shape) for t in weights)


@register('ss2d_scan_bwd', fake=_bwd_fake)
def _bwd(grad_y: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
         dt_projs_bias: Tensor, A: Tensor, D: Tensor, projected: Tensor, kept: Tensor,
         backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    if backend == 'cuda':
        return cuda.backward(*inputs, projected, kept)
    grad_x, *grads = _BACKWARD[backend](*inputs)
    if backend == 'reference':
        grad_x = torch.empty_like(x).copy_(grad_x)
    return grad_x, *(g.contiguous() for g in grads)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad_y):
    return *_bwd(grad_y, *ctx.saved_tensors, ctx.backend), None, None, None


def _saved_fake(x, dt_projs_weight, A, save):
    routes, _, rank = dt_projs_weight.shape
    projected, kept, dtype = cuda.saved(x, rank, routes, A.shape[1], save)
    return x.new_empty(projected), x.new_empty(kept, dtype=dtype)


def _fwd_fake(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype, backend, save):
    y = torch.empty_like(x, dtype=out_dtype)
    if backend == 'cuda':
        return y, *_saved_fake(x, dt_projs_weight, A, save)
    return y, x.new_empty(0), x.new_empty(0)


@register('ss2d_scan_fwd', fake=_fwd_fake, backward=_backward, setup_context=_setup_context)
def _fwd(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor,
         A: Tensor, D: Tensor, out_dtype: torch.dtype, backend: str, save: bool
         ) -> tuple[Tensor, Tensor, Tensor]:
    """y, and what the kernels keep for their backward (empty for others): complete if ``save``."""
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype)
    if backend == 'cuda':
        return cuda.forward(*inputs, save)
    y = _FORWARD[backend](*inputs)
    if backend == 'reference':
        y = torch.empty_like(x, dtype=out_dtype).copy_(y)
    return y, x.new_empty(0), x.new_empty(0)


@flop_formula('ss2d_scan_fwd')
def _fwd_flops(x_shape, x_proj_shape, dt_projs_shape, bias_shape, A_shape, *args,
               out_shape=None, **kwargs) -> int:
    batch, dim, height, width = x_shape
    num_routes, projected, _ = x_proj_shape
    length, rank = height * width, dt_projs_shape[2]
    projections = 2 * batch * num_routes * length * dim * (projected + rank)
    return projections + scan_flops(batch, num_routes * dim, length, A_shape[1])


@flop_formula('ss2d_scan_bwd')
def _bwd_flops(grad_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * _fwd_flops(*shapes)


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
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    check(x, *parameters)
    out_dtype = out_dtype or x.dtype
    by_default = backend is None
    backend = resolve_backend(
        backend, cuda=lambda: cuda.why_not(x, out_dtype, parameters),
        triton=lambda: triton_scan.why_not(x, out_dtype, parameters, by_default))
    save = backend == 'cuda' and wants_grad(x, *parameters)
    return _fwd(x, *parameters, out_dtype, backend, save)[0]


def _bwd_norm_fake(grad, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight,
                   norm_bias, projected, kept, merged):
    weights = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias)
    return torch.empty_like(x), *(t.new_empty(t.shape) for t in weights)


@register('ss2d_scan_norm_bwd', fake=_bwd_norm_fake)
def _bwd_norm(grad: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
              dt_projs_bias: Tensor, A: Tensor, D: Tensor, norm_weight: Tensor, norm_bias: Tensor,
              projected: Tensor, kept: Tensor, merged: Tensor
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cuda.backward_norm(grad, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D,
                              norm_weight, norm_bias, projected, kept, merged)


def _setup_norm(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *output[1:])


def _backward_norm(ctx, grad):
    return *_bwd_norm(grad, *ctx.saved_tensors), None, None


def _fwd_norm_fake(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias,
                   eps, save):
    return (torch.empty_like(x), *_saved_fake(x, dt_projs_weight, A, save),
            x.new_empty(cuda.merged_size(x) if save else 0))


@register('ss2d_scan_norm', fake=_fwd_norm_fake, backward=_backward_norm,
          setup_context=_setup_norm)
def _fwd_norm(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor,
              A: Tensor, D: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, save: bool
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normed map; what ``_fwd`` keeps; and the merged map, empty unless ``save``."""
    return cuda.forward_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight,
                             norm_bias, eps, save)


@flop_formula('ss2d_scan_norm')
def _fwd_norm_flops(*shapes, out_shape=None, **kwargs) -> int:
    return _fwd_flops(*shapes)


@flop_formula('ss2d_scan_norm_bwd')
def _bwd_norm_flops(*shapes, out_shape=None, **kwargs) -> int:
    return _bwd_flops(*shapes)


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
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    everything = (x, *parameters, norm_weight, norm_bias)
    check(x, *parameters)
    resolved = resolve_backend(backend, cuda=lambda: cuda.why_not(x, x.dtype, everything[1:]))
    if resolved == 'cuda' and cuda.norm_fits(x):
        return _fwd_norm(*everything, eps, wants_grad(*everything))[0]
    # Under autocast the merged map stays fp32 up to the norm, as published.
    y_BDHW = ss2d_scan(x, *parameters, backend=backend,
                       out_dtype=torch.promote_types(x.dtype, norm_weight.dtype))
    y_BHWD = F.layer_norm(y_BDHW.permute(0, 2, 3, 1).contiguous(), norm_weight.shape, norm_weight,
                          norm_bias, eps)
    y = y_BHWD.permute(0, 3, 1, 2)
    return y.to(x.dtype) if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def check(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D) -> None:
    """Raise ValueError unless the shapes fit one another."""
    if x.dim() != 4 or dt_projs_weight.dim() != 3 or A.dim() != 2:
        raise ValueError('ss2d_scan expects x (B, D, H, W), dt_projs_weight (K, D, R) and '
                         f'A (K*D, N); got x {tuple(x.shape)}, dt_projs_weight '
                         f'{tuple(dt_projs_weight.shape)}, A {tuple(A.shape)}')
    dim, (num_routes, _, rank), state = x.shape[1], dt_projs_weight.shape, A.shape[1]
    if num_routes not in (1, 2, 4):
        raise ValueError(f'ss2d_scan expects K of 1, 2 or 4 routes (the first K of {ROUTES}), '
                         f'got {num_routes}')
    if x.numel() == 0 and x.shape[0] != 0:
        raise ValueError(f'ss2d_scan expects D, H and W of at least 1, got x {tuple(x.shape)}')
    channels, row = num_routes * dim, rank + 2 * state
    if (x_proj_weight.shape == (num_routes, row, dim) and dt_projs_weight.shape[1] == dim
            and dt_projs_bias.shape == (num_routes, dim) and A.shape[0] == channels
            and D.shape == (channels,)):
        return
    expected = {'x_proj_weight': (x_proj_weight, (num_routes, row, dim)),
                'dt_projs_weight': (dt_projs_weight, (num_routes, dim, rank)),
                'dt_projs_bias': (dt_projs_bias, (num_routes, dim)),
                'A': (A, (channels, state)), 'D': (D, (channels,))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f'ss2d_scan expects {name} of shape {shape} beside x '
                             f'{tuple(x.shape)}, got {tuple(tensor.shape)}')
