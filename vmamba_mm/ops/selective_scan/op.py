"""The op ``selective_scan``: its definition, checks, and the public function."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.selective_scan import chunked, cuda, reference, triton_scan


def scan_flops(batch: int, channels: int, length: int, state: int) -> int:
    """FLOPs of S6 as the paper counts them: 9 B L D N, plus B L D for the skip, multiply-adds.

    torch counts a multiply-add as 2, hence the factor.
    """
    return 2 * batch * length * channels * (9 * state + 1)


_selective_scan = define_op(
    'selective_scan_fwd',
    '(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, '
    'bool delta_softplus, ScalarType out_dtype, str backend) -> Tensor',
    reference=reference.forward,
    fake=lambda u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, backend:
        u.new_empty(u.shape, dtype=out_dtype),
    implementations={
        'cuda': Implementation(
            cuda.forward, cuda.backward,
            lambda *args: cuda.why_not(*args[:7], args[8])),
        'triton': Implementation(
            triton_scan.forward, triton_scan.backward,
            lambda *args: triton_scan.why_not(args[0], args[8], args[1:7])),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='u delta A B C D delta_bias delta_softplus',
    flops=lambda u, A, **_: scan_flops(*u, A[1]))


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

    Example:
        >>> u, A, B = torch.randn(2, 8, 50), -torch.rand(8, 4), torch.randn(2, 1, 4, 50)
        >>> selective_scan(u, torch.rand(2, 8, 50), A, B, B).shape
        torch.Size([2, 8, 50])
    """
    _check(u, delta, A, B, C, D, delta_bias)
    return _selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype or u.dtype,
                           backend=backend)


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
