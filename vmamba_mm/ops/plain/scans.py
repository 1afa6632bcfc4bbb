"""The ops of S6 in plain PyTorch, of any size that is not known before: arguments and results as of
the ops' references.

B batch, D channels, H/W, L length, K routes or groups, R rank of dt, N state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.plain.recurrence import (
    scan_carries,
    scan_lines,
    scan_states,
    softplus,
    turns_maps,
)
from vmamba_mm.ops.ss2d_scan import ordered


def ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype) -> Tensor:
    """The routes run on the map as it is: along its lines, all of them at once, and then from line
    to line by what came out at their ends, so that H + W steps take the place of H W."""
    dtype = compute_dtype(x.dtype)
    x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = (
        t.to(dtype) for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A, D))
    u = x.permute(0, 2, 3, 1).to(dtype)
    num_routes, _, dim = x_proj_weight.shape
    y = u * D.view(num_routes, dim).sum(0)
    A_KDN = A.view(num_routes, dim, -1)
    for column in range(min(2, num_routes)):
        places = (1, 0, 2, 3) if column else (2, 0, 1, 3)  # (H, B, W, D) or (W, B, H, D)
        turned = u.permute(places) if turns_maps() else u
        along = 0 if turns_maps() else 2 - column
        routes = slice(column, None, 2)
        y_routes = _scan_both(turned, x_proj_weight[routes], dt_projs_weight[routes],
                              dt_projs_bias[routes], A_KDN[routes], along)
        if turns_maps():
            y_routes = y_routes.permute((1, 0, 2, 3) if column else (1, 2, 0, 3))
        y = y + y_routes
    return y.permute(0, 3, 1, 2).to(out_dtype)


def _scan_both(u, x_proj_weight, dt_projs_weight, dt_projs_bias, A_KDN, dim) -> Tensor:
    """The routes with one order, forward and backward, on a map with channels last; ``dim`` is
    that of the positions of a line."""
    num_routes, rank, state = len(A_KDN), dt_projs_weight.shape[2], A_KDN.shape[2]
    parts = F.linear(u, x_proj_weight.flatten(0, 1)).split(
        (rank, state, state) * num_routes, dim=-1)
    y = None
    for k in range(num_routes):
        dt, B, C = parts[3 * k:3 * k + 3]
        delta = softplus(F.linear(dt, dt_projs_weight[k], dt_projs_bias[k]))
        drive = delta * u
        if state == 1:
            y_k = _scan_map(torch.exp(delta * A_KDN[k, :, 0]), drive * B, dim, k == 1) * C
        else:
            decay = torch.exp(delta.unsqueeze(-2) * A_KDN[k].T)
            h = _scan_map(decay, drive.unsqueeze(-2) * B.unsqueeze(-1), dim, k == 1)
            y_k = (C.unsqueeze(-2) @ h).squeeze(-2)
        y = y_k if y is None else y + y_k
    return y


def _scan_map(a: Tensor, x: Tensor, dim: int, reverse: bool) -> Tensor:
    """The states of a route: along all lines at once, then from line to line."""
    h, p, h_end, p_end = scan_lines(a, x, dim, reverse)
    return h + p * scan_carries(p_end, h_end, 1, reverse).unsqueeze(dim)


def ordered_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, scan, out_dtype) -> Tensor:
    """The four routes of the cross scan on the map, each other one on the map in its order."""
    dtype, merged = compute_dtype(x.dtype), None
    parameters = x_proj_weight, dt_projs_weight, dt_projs_bias, A, D
    for routes, order in ordered._parts(x, scan):
        y = ss2d_scan(ordered._gather(x, order), *ordered._select(parameters, routes), dtype)
        if order is not None:
            y = y.flatten(2)[:, :, order.argsort()].unflatten(2, x.shape[2:])
        merged = y if merged is None else merged + y
    return merged.to(out_dtype)


def selective_scan(u, delta, A, B, C, D, delta_bias, z, initial_state, delta_softplus,
                   return_final_state, reverse, out_dtype) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(u.dtype)
    groups = B.shape[1]

    def in_time(t):  # (B, K D, L) to (L, B, K, D)
        return t.to(dtype).permute(2, 0, 1).unflatten(2, (groups, -1))

    u_LBKD, delta_LBKD = in_time(u), in_time(delta)
    if delta_bias is not None:
        delta_LBKD = delta_LBKD + delta_bias.to(dtype).view(groups, -1)
    if delta_softplus:
        delta_LBKD = softplus(delta_LBKD)
    B_LBKN, C_LBKN = (t.to(dtype).permute(3, 0, 1, 2) for t in (B, C))
    A_KND = A.to(dtype).unflatten(0, (groups, -1)).mT
    if initial_state is not None:
        initial_state = initial_state.to(dtype).unflatten(1, (groups, -1)).mT
    y, state = _scan_tokens(u_LBKD, delta_LBKD, A_KND, B_LBKN, C_LBKN, reverse, initial_state)
    if D is not None:
        y = y + u_LBKD * D.to(dtype).view(groups, -1)
    y = y.flatten(2).permute(1, 2, 0)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype), state.mT.flatten(1, 2) if return_final_state else None


def _scan_tokens(u, delta, A, B, C, reverse, initial=None) -> tuple[Tensor, Tensor]:
    """S6 of tokens in time, (L, B, ..., D) with A (..., N, D) and B, C (L, B, ..., N): <C, h>, and
    the state after the last one."""
    a = torch.exp(delta.unsqueeze(-2) * A)
    drive = (delta * u).unsqueeze(-2) * B.unsqueeze(-1)
    if initial is not None:
        first, rest = (-1, slice(None, -1)) if reverse else (0, slice(1, None))
        parts = [(drive[first] + a[first] * initial).unsqueeze(0), drive[rest]]
        drive = torch.cat(parts[::-1] if reverse else parts)
    h = scan_states(a, drive, 0, reverse)
    return (C.unsqueeze(-2) @ h).squeeze(-2), h[0 if reverse else -1]


def causal_conv(x, weight, bias, initial_state, silu, reverse, return_final_state
                ) -> tuple[Tensor, Tensor | None]:
    dtype, before = compute_dtype(x.dtype), weight.shape[1] - 1
    x_BDL, past = x.transpose(1, 2), None
    if initial_state is not None:
        past = initial_state.to(x.dtype).transpose(1, 2)
        if reverse:
            past = past.flip(2)
        x_BDL = torch.cat((x_BDL, past) if reverse else (past, x_BDL), dim=2)
    else:
        x_BDL = F.pad(x_BDL, (0, before) if reverse else (before, 0))
    weight = (weight.flip(1) if reverse else weight).unsqueeze(1)
    y = F.conv1d(x_BDL.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),
                 groups=len(weight))
    y = (F.silu(y) if silu else y).transpose(1, 2).to(x.dtype)
    if not return_final_state:
        return y, None
    tail = x_BDL[..., :before].flip(2) if reverse else x_BDL[..., x_BDL.shape[2] - before:]
    return y, tail.transpose(1, 2).clone()


def mamba_inner(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale
                ) -> Tensor:
    dtype, total = compute_dtype(xz.dtype), None
    x, z = xz.to(dtype).chunk(2, dim=-1)
    rank, state = dt_proj.shape[2], A.shape[2]
    for k in range(len(A)):
        backwards = reverse or k == 1
        u, _ = causal_conv(x, conv_weight[k], None if conv_bias is None else conv_bias[k], None,
                           True, backwards, False)
        u = u.transpose(0, 1)
        dt, B, C = F.linear(u, x_proj[k].to(dtype)).split((rank, state, state), dim=-1)
        delta = softplus(F.linear(dt, dt_proj[k].to(dtype), dt_bias[k].to(dtype)))
        y, _ = _scan_tokens(u, delta, A[k].to(dtype).T, B, C, backwards)
        y = y + u * D[k].to(dtype)
        total = y if total is None else total + y
    return (scale * total.transpose(0, 1) * F.silu(z)).to(xz.dtype)
