"""S6, the selective scan, as the paper writes it: the specification of the op.

B batch, K directions (groups), D channels of a group, L length, N state. For every channel

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = <C_t, h_t> + D u_t

(equations 4 and 5 of arXiv 2401.10166), times silu(z_t) with a gate. Reversed time runs from the
last position to the first. Loops over L: for tests, not for speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype


def _prepare(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """Inputs in the compute dtype; delta finished; B and C expanded to (B, K*D, N, L)."""
    dtype = compute_dtype(u.dtype)
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    repeats = u.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(repeats, dim=1) for t in (B, C))
    return u, delta, A, B, C, None if D is None else D.to(dtype)


def forward(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus,
            return_final_state, reverse, out_dtype) -> tuple[Tensor, Tensor | None]:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.selective_scan`."""
    u, delta, A, B, C, D = _prepare(u, delta, A, B, C, D, delta_bias, delta_softplus)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    if initial_state is not None:
        h = h + initial_state
    time, ys = range(u.shape[2]), []
    for t in reversed(time) if reverse else time:
        decay = torch.exp(delta[:, :, t, None] * A)
        h = decay * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys[::-1] if reverse else ys, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(out_dtype), h if return_final_state else None
