"""The op ``selective_scan``: its definition, checks, and the public function."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, compute_dtype
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.selective_scan import chunked, composed, cuda, reference, triton_scan


def scan_flops(batch: int, channels: int, length: int, state: int) -> int:
    """FLOPs of S6 as the paper counts them: 9 B L D N, plus B L D for the skip, multiply-adds.

    torch counts a multiply-add as 2, hence the factor.
    """
    return 2 * batch * length * channels * (9 * state + 1)


def _plain(module, why_not) -> Implementation:
    """An implementation of the plain scan, with what can be composed around it."""
    whole = composed.Composed(module)
    return Implementation(whole.forward, whole.backward, lambda *args: (
        why_not(*args[:7], args[12]) or composed.why_not(args[8], args[10])))


def _fake(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus, return_final_state,
          reverse, out_dtype, backend, save):
    state = u.new_empty(0)
    if return_final_state:
        state = u.new_empty(*u.shape[:2], A.shape[1], dtype=compute_dtype(u.dtype))
    return u.new_empty(u.shape, dtype=out_dtype), state, u.new_empty(0)


_selective_scan = define_op(
    'selective_scan_fwd',
    '(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, '
    'Tensor? z, Tensor? initial_state, bool delta_softplus, bool return_final_state, bool reverse, '
    'ScalarType out_dtype, str backend, bool save) -> '
    '(Tensor y, Tensor final_state, Tensor saved)',
    reference=reference.forward,
    fake=_fake,
    results=2,
    implementations={
        'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not),
        'triton': _plain(triton_scan, lambda *args: triton_scan.why_not(
            args[0], args[7], args[1:7])),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='u delta A B C D delta_bias z initial_state saved delta_softplus return_final_state '
          'reverse',
    flops=lambda u, A, **_: scan_flops(*u, A[1]))


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                   D: Tensor | None = None, *, z: Tensor | None = None,
                   delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   initial_state: Tensor | None = None, return_final_state: bool = False,
                   reverse: bool = False, out_dtype: torch.dtype | None = None,
                   backend: Backend | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """S6 (arXiv 2312.00752, section 3; arXiv 2401.10166, section 3) over K groups of D channels.

    Channel c of group k runs ``h_t = exp(delta_t A_c) h_{t-1} + delta_t B_kt u_t`` and returns
    ``y_t = <C_kt, h_t> + D_c u_t``, times ``silu(z_t)`` with a gate. Every tensor has a gradient,
    which also flows through the states.

    Args:
        u, delta: (B, K*D, L), fp16, bf16, fp32 or fp64.
        A: (K*D, N), real, below zero for a state that decays.
        B, C: (B, K, N, L).
        D: (K*D), the skip, or None.
        z: (B, K*D, L), the gate, or None.
        delta_bias: (K*D), added to ``delta``, or None.
        delta_softplus: apply softplus to ``delta`` (after the bias).
        initial_state: (B, K*D, N), the state before the first step, or None for zeros.
        return_final_state: return the state after the last step too.
        reverse: time runs from L-1 to 0: the scan of the flipped sequence, flipped back, without a
            copy. The last step is then that at 0.
        out_dtype: dtype of the result; None for the dtype of ``u``. Computation and state are
            fp32 (fp64 for fp64 input) whatever the dtypes.
        backend: 'reference', 'chunked', 'cuda' or 'triton'; None for the first of 'cuda' (an NVIDIA
            GPU) and 'triton' (a GPU) that takes the inputs, else 'chunked'.

    Returns:
        (B, K*D, L) in ``out_dtype``; with ``return_final_state`` a tuple of it and the final state
        (B, K*D, N), fp32 (fp64 for fp64 input).

    Raises:
        ValueError: on shapes that do not fit one another, a complex tensor, or an unknown backend.

    Example:
        >>> u, A, B = torch.randn(2, 8, 50), -torch.rand(8, 4), torch.randn(2, 1, 4, 50)
        >>> selective_scan(u, torch.rand(2, 8, 50), A, B, B).shape
        torch.Size([2, 8, 50])
    """
    _check(u, delta, A, B, C, D, delta_bias, z, initial_state)
    y, state = _selective_scan(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus,
                               return_final_state, reverse, out_dtype or u.dtype, backend=backend)
    return (y, state) if return_final_state else y


def _check(u, delta, A, B, C, D, delta_bias, z, initial_state) -> None:
    if u.dim() != 3 or B.dim() != 4 or A.dim() != 2:
        raise ValueError('selective_scan expects u (B, K*D, L), A (K*D, N) and B (B, K, N, L); '
                         f'got u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}')
    batch, channels, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    if length < 1 or state < 1 or groups < 1 or channels % groups:
        raise ValueError(f'selective_scan expects L >= 1, N >= 1 and K*D={channels} divisible by '
                         f'K={groups}; got L={length}, N={state}')
    if (u.is_complex() or delta.is_complex() or A.is_complex() or B.is_complex()
            or C.is_complex()):
        raise ValueError('selective_scan expects real tensors, complex ones are not supported; got '
                         f'u {u.dtype}, delta {delta.dtype}, A {A.dtype}, B {B.dtype}, C {C.dtype}')
    routed, states = (batch, groups, state, length), (batch, channels, state)
    if (delta.shape == u.shape and A.shape[0] == channels and B.shape == routed
            and C.shape == routed and (D is None or D.shape == (channels,))
            and (delta_bias is None or delta_bias.shape == (channels,))
            and (z is None or z.shape == u.shape)
            and (initial_state is None or initial_state.shape == states)):
        return
    check_shapes('selective_scan', {'u': u}, delta=(delta, u.shape), A=(A, (channels, state)),
                 B=(B, routed), C=(C, routed), D=(D, (channels,)),
                 delta_bias=(delta_bias, (channels,)), z=(z, u.shape),
                 initial_state=(initial_state, states))
