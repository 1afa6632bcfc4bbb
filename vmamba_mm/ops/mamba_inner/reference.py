"""The S6 mixer between its two outer projections, op by op: the specification of ``mamba_inner``.

The convolution, the two projections, the scan and the gate of figure 3 of arXiv 2312.00752, for one
direction or, summed, for both (algorithm 1 of arXiv 2401.09417).
"""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.causal_conv import reference as conv
from vmamba_mm.ops.core.backends import compute_dtype, without_autocast
from vmamba_mm.ops.selective_scan import reference as scan


def forward(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse, scale) -> Tensor:
    """Differentiable by autograd. Shapes as in :func:`vmamba_mm.ops.mamba_inner`."""
    dtype = compute_dtype(xz.dtype)
    x, z = xz.to(dtype).chunk(2, dim=-1)
    rank, state = dt_proj.shape[2], A.shape[2]
    total = 0
    for k in range(len(A)):
        backwards = reverse or k == 1
        u, _ = conv.forward(x, conv_weight[k], None if conv_bias is None else conv_bias[k], None,
                            True, backwards, False)
        with without_autocast(u):
            projected = F.linear(u, x_proj[k].to(dtype))
            dt, B, C = projected.split((rank, state, state), dim=-1)
            delta = F.linear(dt, dt_proj[k].to(dtype))
        # Copies, for of the gradient of softplus a compiler of torch 2.14 expects other strides.
        u_BDL, delta_BDL, B_BNL, C_BNL, z_BDL = (
            t.transpose(1, 2).contiguous() for t in (u, delta, B, C, z))
        y, _ = scan.forward(u_BDL, delta_BDL, A[k], B_BNL[:, None], C_BNL[:, None], D[k],
                            dt_bias[k], z_BDL, None, True, False, backwards, dtype)
        total = total + y.transpose(1, 2)
    return (scale * total).to(xz.dtype).contiguous()
