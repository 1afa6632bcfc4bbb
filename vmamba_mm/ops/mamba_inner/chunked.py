"""``mamba_inner`` for any device, direction by direction."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.causal_conv import chunked as conv
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.selective_scan import chunked as scan


def _direction(k, x, conv_weight, conv_bias, x_proj, dt_proj, backwards):
    """The convolved x (B, D, L), dt (B, L, R), raw delta (B, D, L), B and C (B, 1, N, L)."""
    rank, state = dt_proj.shape[2], (x_proj.shape[1] - dt_proj.shape[2]) // 2
    u, _ = conv.forward(x, conv_weight[k], None if conv_bias is None else conv_bias[k], None, True,
                        backwards, False)
    dt, B, C = F.linear(u, x_proj[k]).split((rank, state, state), dim=-1)
    delta = F.linear(dt, dt_proj[k])
    return (u.transpose(1, 2), dt, delta.transpose(1, 2), B.transpose(1, 2)[:, None],
            C.transpose(1, 2)[:, None])


def forward(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.mamba_inner`."""
    dtype = compute_dtype(xz.dtype)
    x, z = xz.to(dtype).chunk(2, dim=-1)
    x_proj, dt_proj = x_proj.to(dtype), dt_proj.to(dtype)
    total = 0
    for k in range(len(A)):
        backwards = reverse or k == 1
        u, _, delta, B, C = _direction(k, x, conv_weight, conv_bias, x_proj, dt_proj, backwards)
        y, _ = scan.forward(u, delta, A[k], B, C, D[k], dt_bias[k], None, None, True, False,
                            backwards, dtype)
        total = total + y.transpose(1, 2)
    return (scale * total * F.silu(z)).to(xz.dtype).contiguous()


def backward(grad_y, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale):
    """Gradients by xz and the parameters (None where there is none)."""
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    dtype = compute_dtype(xz.dtype)
    x, z = xz.to(dtype).chunk(2, dim=-1)
    x_proj, dt_proj = x_proj.to(dtype), dt_proj.to(dtype)
    grads = [None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device)
             for t in inputs]
    grad_x, grad_z = grads[0].chunk(2, dim=-1)
    grad = scale * grad_y.to(dtype)
    gate = (grad * F.silu(z)).transpose(1, 2)
    total = 0
    for k in range(len(A)):
        backwards = reverse or k == 1
        u, dt, delta, B, C = _direction(k, x, conv_weight, conv_bias, x_proj, dt_proj, backwards)
        y, _ = scan.forward(u, delta, A[k], B, C, D[k], dt_bias[k], None, None, True, False,
                            backwards, dtype)
        total = total + y.transpose(1, 2)
        gu, gdelta, gA, gB, gC, gD, gbias, _, _ = scan.backward(
            gate, None, u, delta, A[k], B, C, D[k], dt_bias[k], None, None, True, False, backwards)
        gdelta = gdelta.transpose(1, 2)
        gprojected = torch.cat((gdelta @ dt_proj[k], gB[:, 0].transpose(1, 2),
                                gC[:, 0].transpose(1, 2)), dim=-1)
        gu = gu.transpose(1, 2) + gprojected @ x_proj[k]
        gx, gweight, gconv_bias, _ = conv.backward(
            gu, None, x, conv_weight[k], None if conv_bias is None else conv_bias[k], None, True,
            backwards, False)
        grad_x += gx
        for grad_k, value in zip(grads[1:], (
                gweight, gconv_bias, gprojected.flatten(0, 1).T @ u.transpose(1, 2).flatten(0, 1),
                gdelta.flatten(0, 1).T @ dt.flatten(0, 1), gbias, gA, gD), strict=True):
            if grad_k is not None:
                grad_k[k] = value
    grad_z += scan.silu_backward(grad * total, z)
    return tuple(None if t is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))
