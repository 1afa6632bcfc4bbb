"""A VSS block in plain PyTorch, from the references of the ops that it is made of: the
specification (section 4.2 and figure 3, arXiv 2401.10166)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.fused.add_norm.reference import add_norm
from vmamba_mm.ops.fused.dwconv.reference import dwconv_silu
from vmamba_mm.ops.fused.mlp.reference import mlp
from vmamba_mm.ops.ss2d_scan.reference import forward_norm
from vmamba_mm.ops.vss_block.weights import Weights


def vss_block(x: Tensor, w: Weights, scale1: Tensor | None, scale2: Tensor | None, eps: float,
              dtype: torch.dtype, out_dtype: torch.dtype, scan_norm: Callable = forward_norm
              ) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C), as :func:`vmamba_mm.ops.vss_block.vss_block`; ``dtype`` is that
    of matrix products and what they take, ``scan_norm`` the scan and the norm after it."""
    def cast(*tensors):
        return [None if t is None else t.to(dtype) for t in tensors]

    _, normed = add_norm(x, None, None, w.norm1, w.norm1_bias, eps, dtype)
    y_BHWD = F.linear(normed, *cast(w.in_proj))
    inner, z_BHWD = w.dt_projs.shape[1], None
    if len(w.in_proj) > inner:
        y_BHWD, z_BHWD = y_BHWD.split(inner, dim=3)
    y_BHWD = dwconv_silu(y_BHWD, *cast(w.conv, w.conv_bias))
    y_BDHW = scan_norm(y_BHWD.permute(0, 3, 1, 2), w.x_proj, w.dt_projs, w.dt_bias,
                       -w.A_logs.exp(), w.D, w.out_norm, w.out_norm_bias, eps)
    y_BHWD = y_BDHW.permute(0, 2, 3, 1)
    if z_BHWD is not None:
        y_BHWD = y_BHWD * F.silu(z_BHWD)
    branch = F.linear(y_BHWD, *cast(w.out_proj))
    if w.fc1 is None:
        return add_norm(x, branch, scale1, None, None, eps, out_dtype)[0]
    x, normed = add_norm(x, branch, scale1, w.norm2, w.norm2_bias, eps, dtype)
    branch = mlp(normed, *cast(w.fc1, w.fc1_bias, w.fc2, w.fc2_bias))
    return add_norm(x, branch, scale2, None, None, eps, out_dtype)[0]
