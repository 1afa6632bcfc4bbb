"""torch.library registration of ``selective_scan``: schema, fake, autograd, FLOPs, checks."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, resolve_backend
from vmamba_mm.ops.core.registration import flop_formula, register
from vmamba_mm.ops.selective_scan import chunked, cuda, reference, triton_scan

_IMPLEMENTATIONS = {'reference': reference, 'chunked': chunked, 'cuda': cuda,
                    'triton': triton_scan}


def _bwd_fake(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus, backend):
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape)
                 for t in (u, delta, A, B, C, D, delta_bias))


@register('selective_scan_bwd', fake=_bwd_fake)
def _bwd(grad_y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
         D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, backend: str
         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _IMPLEMENTATIONS[backend].backward(
        grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus)
    # The schema has no optional results: an absent gradient is an empty tensor.
    return tuple(u.new_empty(0) if g is None else g.contiguous() for g in grads)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    tensors = ctx.saved_tensors
    grads = _bwd(grad_y, *tensors, ctx.delta_softplus, ctx.backend)
    grads = [None if t is None else g for t, g in zip(tensors, grads, strict=True)]
    return *grads, None, None, None


def _fwd_fake(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend):
    return u.new_empty(u.shape, dtype=out_dtype)


@register('selective_scan_fwd', fake=_fwd_fake, backward=_backward, setup_context=_setup_context)
def _fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
         delta_bias: Tensor | None, delta_softplus: bool, out_dtype: torch.dtype,
         backend: str) -> Tensor:
    return _IMPLEMENTATIONS[backend].forward(
        u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype)


def scan_flops(batch: int, channels: int, length: int, state: int) -> int:
    """FLOPs of S6 as the paper counts them: 9 B L D N, plus B L D for the skip, multiply-adds.

    torch counts a multiply-add as 2, hence the factor.
    """
    return 2 * batch * length * channels * (9 * state + 1)


@flop_formula('selective_scan_fwd')
def _fwd_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    batch, channels, length = u_shape
    return scan_flops(batch, channels, length, A_shape[1])


@flop_formula('selective_scan_bwd')
def _bwd_flops(grad_shape, u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _fwd_flops(u_shape, delta_shape, A_shape)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                   D: Tensor | None = None, *, delta_bias: Tensor | None = None,
                   delta_softplus: bool = False, out_dtype: torch.dtype | None = None,
                   backend: Backend | None = None) -> Tensor:
    """S6 (arXiv 2312.00752, section 3; arXiv 2401.10166, section 3) over K groups of D channels.

    Channel c of group k runs ``h_t = exp(delta_t A_c) h_{t-1} + delta_t B_kt u_t`` and returns
    ``y_t = <C_kt, h_t> + D_c u_t``. Every input has a gradient.

    Args:
        u, delta: (B, K*D, L), fp16, bf16, fp32 or fp64.
        A: (K*D, N), below zero for a state that decays.
        B, C: (B, K, N, L).
        D: (K*D), the skip, or None.
        delta_bias: (K*D), added to ``delta``, or None.
        delta_softplus: apply softplus to ``delta`` (after the bias).
        out_dtype: dtype of the result; None for the dtype of ``u``. Computation and state are
            fp32 (fp64 for fp64 input) whatever the dtypes.
        backend: 'reference', 'chunked', 'cuda' or 'triton'; None for the first of 'cuda' (an NVIDIA
            GPU) and 'triton' (a GPU) that takes the inputs, else 'chunked'.

    Returns:
        (B, K*D, L) in ``out_dtype``.

    Raises:
        ValueError: on shapes that do not fit one another, or an unknown backend.
    """
    _check(u, delta, A, B, C, D, delta_bias)
    out_dtype = out_dtype or u.dtype
    parameters = (delta, A, B, C, D, delta_bias)
    by_default = backend is None
    backend = resolve_backend(
        backend, cuda=lambda: cuda.why_not(u, *parameters, out_dtype),
        triton=lambda: triton_scan.why_not(u, out_dtype, parameters, by_default))
    return _fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend)


def _check(u, delta, A, B, C, D, delta_bias) -> None:
    if u.dim() != 3 or B.dim() != 4 or A.dim() != 2:
        raise ValueError('selective_scan expects u (B, K*D, L), A (K*D, N) and B (B, K, N, L); '
                         f'got u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}')
    batch, channels, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    if length < 1 or state < 1 or channels % groups:
        raise ValueError(f'selective_scan expects L >= 1, N >= 1 and K*D={channels} divisible by '
                         f'K={groups}; got L={length}, N={state}')
    routed = (batch, groups, state, length)
    if (delta.shape == u.shape and A.shape[0] == channels and B.shape == routed
            and C.shape == routed and (D is None or D.shape == (channels,))
            and (delta_bias is None or delta_bias.shape == (channels,))):
        return
    expected = {'delta': (delta, u.shape), 'A': (A, (channels, state)), 'B': (B, routed),
                'C': (C, routed), 'D': (D, (channels,)), 'delta_bias': (delta_bias, (channels,))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f'selective_scan expects {name} of shape {tuple(shape)} beside '
                             f'u {tuple(u.shape)}, got {tuple(tensor.shape)}')
