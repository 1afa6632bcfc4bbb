"""One token of ``selective_scan``, for decoding."""

from math import e, log2

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype, wants_grad
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.selective_scan.activations import softplus


def selective_scan_step(state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                        D: Tensor | None = None, *, z: Tensor | None = None,
                        delta_bias: Tensor | None = None, delta_softplus: bool = False
                        ) -> tuple[Tensor, Tensor]:
    """One more step of :func:`vmamba_mm.ops.selective_scan`, in plain PyTorch on any device.

    Args:
        state: (B, K*D, N), fp32 (fp64 for fp64 ``u``), the state before this step.
        u, delta, z: (B, K*D); ``z`` is the gate, or None.
        A: (K*D, N), real.
        B, C: (B, K, N).
        D, delta_bias: (K*D), or None.
        delta_softplus: apply softplus to ``delta`` (after the bias).

    Returns:
        y (B, K*D) in the dtype of ``u``, and the new state; ``state`` is not changed.

    Raises:
        ValueError: on shapes that do not fit one another.

    Example:
        >>> state, u, B = torch.zeros(2, 8, 4), torch.randn(2, 8), torch.randn(2, 1, 4)
        >>> y, state = selective_scan_step(state, u, torch.rand(2, 8), -torch.rand(8, 4), B, B)
        >>> y.shape, state.shape
        (torch.Size([2, 8]), torch.Size([2, 8, 4]))
    """
    check(state, u, delta, A, B, C, D, z, delta_bias)
    dtype = compute_dtype(u.dtype)
    x, step, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step) if wants_grad(step) else softplus(step)
    batch, channels, size = state.shape
    grouped = (batch, B.shape[1], channels // B.shape[1])
    # Products and sums alone, which autocast leaves as they are; and powers of 2, which a CPU
    # calculates four times as fast as those of e.
    decay = (step[..., None] * (A * log2(e))).exp2_()
    state = (decay * state.to(dtype)).view(*grouped, size)
    state.addcmul_((step * x).view(*grouped, 1), B[:, :, None])
    y = (state * C[:, :, None]).sum(-1).flatten(1)
    state = state.flatten(1, 2)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def check(state, u, delta, A, B, C, D, z, delta_bias) -> None:
    """Raise ValueError unless the shapes fit one another."""
    if u.dim() != 2 or B.dim() != 3 or A.dim() != 2 or B.shape[1] < 1 \
            or u.shape[1] % B.shape[1]:
        raise ValueError('selective_scan_step expects u (B, K*D), A (K*D, N) and B (B, K, N); '
                         f'got u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}')
    (batch, channels), size, groups = u.shape, A.shape[1], B.shape[1]
    check_shapes('selective_scan_step', {'u': u}, state=(state, (batch, channels, size)),
                 delta=(delta, (batch, channels)), A=(A, (channels, size)),
                 B=(B, (batch, groups, size)), C=(C, (batch, groups, size)), D=(D, (channels,)),
                 z=(z, (batch, channels)), delta_bias=(delta_bias, (channels,)))
