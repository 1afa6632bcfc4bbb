"""One token of ``ssd``, for decoding."""

from math import inf

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.ssd.reference import finish_dt


def ssd_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
             D: Tensor | None = None, *, z: Tensor | None = None, dt_bias: Tensor | None = None,
             dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, inf)
             ) -> tuple[Tensor, Tensor]:
    """One more token of :func:`vmamba_mm.ops.ssd`, in plain PyTorch on any device.

    Args:
        state: (B, H, P, N), fp32 (fp64 for fp64 ``x``), the state before this token.
        x, z: (B, H, P); ``z`` is the gate, or None.
        dt: (B, H).
        A: (H), the rate of each head, below zero for a state that decays.
        B, C: (B, G, N); head h uses group h // (H / G).
        D: (H) or (H, P), or None.
        dt_bias: (H), or None.
        dt_softplus: apply softplus to ``dt`` (after the bias).
        dt_limit: the least and the largest ``dt`` (after softplus).

    Returns:
        y (B, H, P) in the dtype of ``x``, and the new state; ``state`` is not changed.

    Raises:
        ValueError: on shapes that do not fit one another.

    Example:
        >>> state, x, B = torch.zeros(2, 8, 4, 16), torch.randn(2, 8, 4), torch.randn(2, 1, 16)
        >>> y, state = ssd_step(state, x, torch.rand(2, 8), -torch.rand(8), B, B)
        >>> y.shape, state.shape
        (torch.Size([2, 8, 4]), torch.Size([2, 8, 4, 16]))
    """
    check(state, x, dt, A, B, C, D, z, dt_bias)
    dtype = compute_dtype(x.dtype)
    u, dt, B, C = (t.to(dtype) for t in (x, dt, B, C))
    dt = finish_dt(dt, dt_bias, dt_softplus, *dt_limit)
    (batch, heads, dim), (_, groups, size) = x.shape, B.shape
    grouped = (batch, groups, heads // groups, dim)
    # Products and sums alone, which autocast leaves as they are.
    decay = (dt * A.to(dtype)).exp()[..., None, None]
    state = (decay * state.to(dtype)).view(*grouped, size)
    state.addcmul_((dt[..., None] * u).view(*grouped, 1), B[:, :, None, None])
    y = (state * C[:, :, None, None]).sum(-1).view(x.shape)
    state = state.view(batch, heads, dim, size)
    if D is not None:
        D = D.to(dtype)
        y = y + (D if D.dim() == 2 else D[:, None]) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


def check(state, x, dt, A, B, C, D, z, dt_bias) -> None:
    """Raise ValueError unless the shapes fit one another."""
    if x.dim() != 3 or B.dim() != 3 or B.shape[1] < 1 or x.shape[1] % B.shape[1]:
        raise ValueError('ssd_step expects x (B, H, P) and B (B, G, N) with H divisible by G; '
                         f'got x {tuple(x.shape)}, B {tuple(B.shape)}')
    (batch, heads, dim), (_, groups, size) = x.shape, B.shape
    of_D = (heads, dim) if D is not None and D.dim() == 2 else (heads,)
    check_shapes('ssd_step', {'x': x, 'B': B}, state=(state, (batch, heads, dim, size)),
                 dt=(dt, (batch, heads)), A=(A, (heads,)), B=(B, (batch, groups, size)),
                 C=(C, (batch, groups, size)), D=(D, of_D), z=(z, (batch, heads, dim)),
                 dt_bias=(dt_bias, (heads,)))
