"""S6, the selective scan, as the paper writes it: the specification of the op.

B batch, K directions (groups), D channels of a group, L length, N state. For every channel

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = <C_t, h_t> + D u_t

(equations 4 and 5 of arXiv 2401.10166). Loops over L: for tests, not for speed.
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


def forward(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype) -> Tensor:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.selective_scan`."""
    u, delta, A, B, C, D = _prepare(u, delta, A, B, C, D, delta_bias, delta_softplus)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for t in range(u.shape[2]):
        decay = torch.exp(delta[:, :, t, None] * A)
        h = decay * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D[:, None] * u
    return y.to(out_dtype)


def backward(grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus):
    """Gradients by u, delta, A, B, C, D, delta_bias (None where the input is None).

    With g_t the gradient by h_t, running backwards: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}.
    """
    inputs = (u, delta, A, B, C, D, delta_bias)
    batch, groups = B.shape[:2]
    u, delta, A, B, C, D = _prepare(u, delta, A, B, C, D, delta_bias, delta_softplus)
    grad_y = grad_y.to(u.dtype)
    length = u.shape[2]

    states = [u.new_zeros(*u.shape[:2], A.shape[1])]
    for t in range(length):
        drive = (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        states.append(torch.exp(delta[:, :, t, None] * A) * states[-1] + drive)

    g = torch.zeros_like(states[0])
    grad_u, grad_delta = torch.zeros_like(u), torch.zeros_like(delta)
    grad_A = torch.zeros_like(A)
    grad_B, grad_C = torch.zeros_like(B), torch.zeros_like(C)
    for t in reversed(range(length)):
        delta_t, u_t = delta[:, :, t], u[:, :, t]
        decay = torch.exp(delta_t[..., None] * A)
        g = g + C[..., t] * grad_y[:, :, t, None]
        grad_C[..., t] = grad_y[:, :, t, None] * states[t + 1]
        grad_B[..., t] = g * (delta_t * u_t)[..., None]
        grad_drive = (g * B[..., t]).sum(-1)
        grad_exponent = g * decay * states[t]
        grad_u[:, :, t] = grad_drive * delta_t
        grad_delta[:, :, t] = grad_drive * u_t + (grad_exponent * A).sum(-1)
        grad_A += (grad_exponent * delta_t[..., None]).sum(0)
        g = decay * g

    grad_D = grad_bias = None
    if D is not None:
        grad_u = grad_u + D[:, None] * grad_y
        grad_D = (grad_y * u).sum((0, 2))
    if delta_softplus:
        grad_delta = grad_delta * -torch.expm1(-delta)  # softplus' = 1 - exp(-softplus)
    if delta_bias is not None:
        grad_bias = grad_delta.sum((0, 2))
    grad_B, grad_C = (t.unflatten(1, (groups, -1)).sum(2) for t in (grad_B, grad_C))
    grads = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
    return tuple(None if g is None else g.to(t.dtype)
                 for g, t in zip(grads, inputs, strict=True))
