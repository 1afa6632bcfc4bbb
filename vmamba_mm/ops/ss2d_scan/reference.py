"""The middle of SS2D, composed from the other two ops' references: the specification.

Cross scan -> per-direction projections to (dt, B, C) -> S6 -> cross merge (section 4.3, figure 3,
arXiv 2401.10166). B batch, K directions, D channels, H/W, L = H*W, R dt rank, N state.
"""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.orders import reference as cross
from vmamba_mm.ops.selective_scan import reference as s6


def _project(x, x_proj_weight, dt_projs_weight, A, num_routes):
    """The K sequences and what the scan needs of them, in the layouts of selective_scan."""
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    x_BKDL = cross.scan_forward(x, num_routes)
    projected = torch.einsum('bkdl,kcd->bkcl', x_BKDL, x_proj_weight)
    dt_BKRL, B_BKNL, C_BKNL = projected.split((rank, state, state), dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt_BKRL, dt_projs_weight)
    return x_BKDL, dt_BKRL, delta, B_BKNL, C_BKNL


def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype) -> Tensor:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.ss2d_scan`."""
    height, width = x.shape[2:]
    dtype = compute_dtype(x.dtype)
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = (
        t.to(dtype) for t in (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D))
    num_routes = x_proj_weight.shape[0]
    x_BKDL, _, delta, B, C = _project(x, x_proj_weight, dt_projs_weight, A, num_routes)
    y = s6.forward(x_BKDL.flatten(1, 2), delta.flatten(1, 2), A, B, C, D,
                   dt_projs_bias.flatten(), True, dtype)
    return cross.merge_forward(y.view_as(x_BKDL), height, width).to(out_dtype)


def backward(grad_y, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D):
    """Gradients by x, the two projections, the dt bias, A and D."""
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D)
    height, width = x.shape[2:]
    dtype = compute_dtype(x.dtype)
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = (t.to(dtype) for t in inputs)
    num_routes = x_proj_weight.shape[0]
    x_BKDL, dt_BKRL, delta, B, C = _project(x, x_proj_weight, dt_projs_weight, A, num_routes)
    grad_BKDL = cross.scan_forward(grad_y.to(dtype), num_routes)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias = s6.backward(
        grad_BKDL.flatten(1, 2), x_BKDL.flatten(1, 2), delta.flatten(1, 2), A, B, C, D,
        dt_projs_bias.flatten(), True)
    grad_delta = grad_delta.view_as(x_BKDL)
    grad_dt_weight = torch.einsum('bkdl,bkrl->kdr', grad_delta, dt_BKRL)
    grad_dt = torch.einsum('bkdl,kdr->bkrl', grad_delta, dt_projs_weight)
    grad_projected = torch.cat((grad_dt, grad_B, grad_C), dim=2)
    grad_x_weight = torch.einsum('bkcl,bkdl->kcd', grad_projected, x_BKDL)
    grad_x = grad_u.view_as(x_BKDL) + torch.einsum('bkcl,kcd->bkdl', grad_projected, x_proj_weight)
    grads = (cross.merge_forward(grad_x, height, width), grad_x_weight, grad_dt_weight,
             grad_bias.view_as(dt_projs_bias), grad_A, grad_D)
    return tuple(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))
