"""The op ``ssd``: its definition, checks, and the public function."""

from math import inf

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import Backend, compute_dtype
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.ssd import chunked, cuda, reference


def ssd_flops(batch: int, length: int, heads: int, dim: int, state: int) -> int:
    """FLOPs of the recurrence: 3 multiply-adds for each number of the state (decay, drive, read).

    What an implementation calculates depends on its chunks; this does not. torch counts a
    multiply-add as 2.
    """
    return 6 * batch * length * heads * dim * state


def _fake(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus, dt_min, dt_max,
          return_final_state, reverse, backend):
    batch, _, heads, dim = x.shape
    state = (batch, heads, dim, B.shape[3]) if return_final_state else 0
    return x.new_empty(x.shape), x.new_empty(state, dtype=compute_dtype(x.dtype))


_ssd = define_op(
    'ssd_fwd',
    '(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? z, '
    'Tensor? initial_state, Tensor? seq_idx, bool dt_softplus, float dt_min, float dt_max, '
    'bool return_final_state, bool reverse, str backend) -> (Tensor y, Tensor final_state)',
    reference=reference.forward,
    fake=_fake,
    results=2,
    implementations={
        'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='x dt A B C D dt_bias z initial_state seq_idx dt_softplus dt_min dt_max '
          'return_final_state reverse',
    no_grad='seq_idx',
    flops=lambda x, B, **_: ssd_flops(*x, B[3]))


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, inf), initial_state: Tensor | None = None,
        seq_idx: Tensor | None = None, return_final_state: bool = False, reverse: bool = False,
        backend: Backend | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """State space duality, the scan of Mamba-2 (arXiv 2405.21060, sections 3, 5 and 6).

    Head h, with group g = h // (H / G), runs ``S_t = exp(dt_t A_h) S_(t-1) + dt_t x_t B_gt^T`` and
    returns ``y_t = S_t C_gt + D_h x_t``, times ``silu(z_t)`` with a gate. Every tensor has a
    gradient, which also flows through the states, but ``seq_idx``.

    Args:
        x: (B, L, H, P), fp16, bf16, fp32 or fp64.
        dt: (B, L, H).
        A: (H), the rate of each head, below zero for a state that decays (``-exp(A_log)``).
        B, C: (B, L, G, N).
        D: (H) or (H, P), the skip, or None.
        z: (B, L, H, P), the gate, or None.
        dt_bias: (H), added to ``dt``, or None.
        dt_softplus: apply softplus to ``dt`` (after the bias); above 20 it is the identity.
        dt_limit: the least and the largest ``dt`` (after softplus). A ``dt`` outside has no
            gradient. With the default a negative one counts as 0.
        initial_state: (B, H, P, N), the state before the first token, or None for zeros.
        seq_idx: (B, L), integers that tell packed sequences apart, or None for one: the state
            starts from zero where they change in the order of time. The initial state has index 0,
            so a first token with another index drops it.
        return_final_state: return the state after the last token too.
        reverse: time runs from L-1 to 0: the scan of the flipped sequence, flipped back, without a
            copy. The last token is then that at 0.
        backend: 'reference', 'chunked' or 'cuda'; None for 'cuda' where an NVIDIA GPU takes the
            inputs (sm_80 or newer, P and N multiples of 8), else 'chunked'.

    Returns:
        (B, L, H, P) in the dtype of ``x``, whatever autocast says; with ``return_final_state`` a
        tuple of it and the final state (B, H, P, N), fp32 (fp64 for fp64 input). Decays and states
        are fp32 (fp64) whatever the dtypes.

    Raises:
        ValueError: on shapes that do not fit one another, a ``dt_limit`` without numbers between,
            or an unknown backend.

    Example:
        >>> x, A, B = torch.randn(2, 50, 8, 4), -torch.rand(8), torch.randn(2, 50, 1, 16)
        >>> ssd(x, torch.rand(2, 50, 8), A, B, B).shape
        torch.Size([2, 50, 8, 4])
    """
    _check(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_limit)
    y, state = _ssd(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_softplus,
                    float(dt_limit[0]), float(dt_limit[1]), return_final_state, reverse,
                    backend=backend)
    return (y, state) if return_final_state else y


def _check(x, dt, A, B, C, D, dt_bias, z, initial_state, seq_idx, dt_limit) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError('ssd expects x (B, L, H, P) and B (B, L, G, N); '
                         f'got x {tuple(x.shape)}, B {tuple(B.shape)}')
    (batch, length, heads, dim), (groups, state) = x.shape, B.shape[2:]
    # Not min(length, ...), which would bind torch.export to this length.
    if length < 1 or min(dim, groups, state) < 1 or heads % groups:
        raise ValueError(f'ssd expects L, P and N of at least 1 and H={heads} divisible by '
                         f'G={groups}; got L={length}, P={dim}, N={state}')
    if any(t.is_complex() for t in (x, dt, A, B, C)):
        raise ValueError('ssd expects real tensors, complex ones are not supported; got '
                         f'x {x.dtype}, dt {dt.dtype}, A {A.dtype}, B {B.dtype}, C {C.dtype}')
    shared = (batch, length, groups, state)
    of_D = (heads, dim) if D is not None and D.dim() == 2 else (heads,)
    check_shapes('ssd', {'x': x, 'B': B}, dt=(dt, (batch, length, heads)), A=(A, (heads,)),
                 B=(B, shared), C=(C, shared), D=(D, of_D), dt_bias=(dt_bias, (heads,)),
                 z=(z, (batch, length, heads, dim)),
                 initial_state=(initial_state, (batch, heads, dim, state)),
                 seq_idx=(seq_idx, (batch, length)))
    if seq_idx is not None and (seq_idx.is_floating_point() or seq_idx.dtype == torch.bool):
        raise ValueError(f'ssd expects seq_idx of integers, got {seq_idx.dtype}')
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f'ssd expects dt_limit (least, largest), got {dt_limit}')
