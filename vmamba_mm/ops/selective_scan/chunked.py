"""``selective_scan`` in plain PyTorch, forward and backward, for any device.

Gate, skip, softplus and bias around the scan of one group, which runs in one of two ways: chunk by
chunk, all chunks at a time, or step by step, all states of a step at a time.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.selective_scan import chunks, stepwise
from vmamba_mm.ops.selective_scan.activations import silu_backward, softplus

#: States of a step from which on steps are the quicker way, whatever the length: what a call costs
#: is then less than what the further passes over memory of the other way do.
_MANY_STATES = 4096


def choose_way(batch: int, dim: int, state: int) -> ModuleType:
    """:mod:`.stepwise` or :mod:`.chunks`, which have the same functions."""
    return stepwise if batch * dim * state >= _MANY_STATES else chunks


def _groups(way, u, delta, A, B, C, delta_bias):
    """Each group's channels and inputs, as ``way`` wants them; delta with its bias."""
    dtype = compute_dtype(u.dtype)
    dim = u.shape[1] // B.shape[1]
    for k in range(B.shape[1]):
        channels = slice(k * dim, (k + 1) * dim)
        u_k, delta_k, B_k, C_k = (way.arrange(t, dtype) for t in (
            u[:, channels], delta[:, channels], B[:, k], C[:, k]))
        if delta_bias is not None:
            delta_k = delta_k + delta_bias[channels].to(dtype)
        yield k, channels, A[channels].to(dtype), u_k, delta_k, B_k, C_k


def _skip(u_k: Tensor, D: Tensor | None, channels: slice) -> Tensor:
    return torch.zeros_like(u_k) if D is None else u_k * D[channels].to(u_k.dtype)


def _over_channels(x: Tensor) -> Tensor:
    """The sum over all but the channels, which are last."""
    return x.flatten(0, -2).sum(0)


def forward(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus,
            return_final_state, reverse, out_dtype) -> tuple[Tensor, Tensor | None]:
    """Shapes as in :func:`vmamba_mm.ops.selective_scan`."""
    (batch, all_channels, length), state = u.shape, A.shape[1]
    dtype = compute_dtype(u.dtype)
    way = choose_way(batch, all_channels // B.shape[1], state)
    out = torch.empty(u.shape, dtype=out_dtype, device=u.device)
    final_state = None
    if return_final_state:
        final_state = torch.empty((batch, all_channels, state), dtype=dtype, device=u.device)
    groups = _groups(way, u, delta, A, B, C, delta_bias)
    for _, channels, A_k, u_k, delta_k, B_k, C_k in groups:
        if delta_softplus:
            delta_k = softplus(delta_k)
        y = _skip(u_k, D, channels)
        way.scan(u_k, way.still(delta_k, length), A_k, B_k, C_k, reverse, y,
                 None if initial_state is None else initial_state[:, channels].to(dtype),
                 None if final_state is None else final_state[:, channels])
        if z is not None:
            y *= F.silu(way.arrange(z[:, channels], dtype))
        out[:, channels] = way.sequence(y, length)
    return out, final_state


def backward(grad_y, grad_state, u, delta, A, B, C, D, delta_bias, z, initial_state,
             delta_softplus, return_final_state, reverse):
    """Gradients by u, delta, A, B, C, D, delta_bias, z, initial_state (None where those are)."""
    inputs = (u, delta, A, B, C, D, delta_bias, z, initial_state)
    grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
             for t in inputs]
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_z, grad_initial = grads
    (batch, all_channels, length), dtype = u.shape, compute_dtype(u.dtype)
    way = choose_way(batch, all_channels // B.shape[1], A.shape[1])
    if grad_y is None:
        grad_y = torch.zeros_like(u)
    if not return_final_state:
        grad_state = None
    groups = _groups(way, u, delta, A, B, C, delta_bias)
    for k, channels, A_k, u_k, raw_delta, B_k, C_k in groups:
        delta_k = softplus(raw_delta) if delta_softplus else raw_delta
        gy, y, state, gstate = way.arrange(grad_y[:, channels], dtype), None, None, None
        if z is not None:
            z_k, gated = way.arrange(z[:, channels], dtype), gy
            gy, y = gated * F.silu(z_k), _skip(u_k, D, channels)
        if initial_state is not None:
            state = initial_state[:, channels].to(dtype)
            gstate = torch.empty_like(state)
        gu, gdelta, gA, gB, gC = way.scan_backward(
            gy, u_k, way.still(delta_k, length), A_k, B_k, C_k, reverse, state,
            None if grad_state is None else grad_state[:, channels].to(dtype), y, gstate)
        if z is not None:
            grad_z[:, channels] = way.sequence(silu_backward(gated * y, z_k), length)
        if initial_state is not None:
            grad_initial[:, channels] = gstate
        if D is not None:
            gu.addcmul_(gy, D[channels].to(dtype))
            grad_D[channels] = _over_channels(gy * u_k)
        if delta_softplus:
            gdelta.mul_(raw_delta.sigmoid())
        if delta_bias is not None:
            grad_bias[channels] = _over_channels(way.still(gdelta, length))
        grad_u[:, channels], grad_delta[:, channels] = (
            way.sequence(t, length) for t in (gu, gdelta))
        grad_A[channels] = gA
        grad_B[:, k], grad_C[:, k] = way.sequence(gB, length), way.sequence(gC, length)
    return tuple(grads)
