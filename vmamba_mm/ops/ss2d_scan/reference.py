"""The middle of SS2D, composed from the other two ops' references: the specification.

Cross scan -> per-direction projections to (dt, B, C) -> S6 -> cross merge (section 4.3, figure 3,
arXiv 2401.10166). B batch, K directions, D channels, H/W, L = H*W, R dt rank, N state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype, without_autocast
from vmamba_mm.ops.orders import reference as cross
from vmamba_mm.ops.selective_scan import reference as s6


def project(x, x_proj_weight, dt_projs_weight, A, num_routes):
    """The K sequences and what the scan needs of them, in the layouts of selective_scan."""
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    x_BKDL = cross.scan_forward(x, num_routes)
    projected = torch.einsum('bkdl,kcd->bkcl', x_BKDL, x_proj_weight)
    dt_BKRL, B_BKNL, C_BKNL = projected.split((rank, state, state), dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt_BKRL, dt_projs_weight)
    return x_BKDL, dt_BKRL, delta, B_BKNL, C_BKNL


def forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype) -> Tensor:
    """Differentiable by autograd. Shapes and strides as in :func:`vmamba_mm.ops.ss2d_scan`."""
    result = torch.empty_like(x, dtype=out_dtype)
    height, width = x.shape[2:]
    dtype = compute_dtype(x.dtype)
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D = (
        t.to(dtype) for t in (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D))
    num_routes = x_proj_weight.shape[0]
    with without_autocast(x):
        x_BKDL, _, delta, B, C = project(x, x_proj_weight, dt_projs_weight, A, num_routes)
    y, _ = s6.forward(x_BKDL.flatten(1, 2), delta.flatten(1, 2), A, B, C, D,
                      dt_projs_bias.flatten(), None, None, True, False, False, dtype)
    return result.copy_(cross.merge_forward(y.view_as(x_BKDL), height, width))


def forward_norm(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, norm_weight, norm_bias, eps
                 ) -> Tensor:
    """:func:`forward` and the LayerNorm over D, as :func:`vmamba_mm.ops.ss2d_scan_norm`."""
    y = forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, compute_dtype(x.dtype))
    weight, bias = norm_weight.to(y.dtype), norm_bias.to(y.dtype)
    y = F.layer_norm(y.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)
    return torch.empty_like(x).copy_(y)
