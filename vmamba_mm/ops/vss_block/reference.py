"""``vss_block`` in plain PyTorch: its specification, by those of the ops within it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.fused.add_norm.reference import layer_norm
from vmamba_mm.ops.fused.dwconv.reference import dwconv_silu
from vmamba_mm.ops.fused.mlp.reference import mlp
from vmamba_mm.ops.ss2d_scan import reference as ss2d_scan
from vmamba_mm.ops.vss_block.weights import Weights


def vss_block(x: Tensor, weights: Weights, scale1: Tensor | None, scale2: Tensor | None, eps: float,
              dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C), as :func:`vmamba_mm.ops.vss_block.vss_block`."""
    A_logs = weights.A_logs.to(compute_dtype(weights.A_logs.dtype))
    w = Weights._make(t if t is None else t.to(dtype) for t in weights)

    def scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
        return branch if scale is None else branch * scale.to(dtype).view(-1, 1, 1, 1)

    y = F.linear(layer_norm(x, weights.norm1, weights.norm1_bias, eps).to(dtype), w.in_proj)
    y = dwconv_silu(y, w.conv, w.conv_bias)
    y = ss2d_scan.forward_norm(
        y.permute(0, 3, 1, 2), w.x_proj, weights.dt_projs, weights.dt_bias,
        -A_logs.exp(), weights.D, weights.out_norm, weights.out_norm_bias, eps)
    x = x + scaled(F.linear(y.permute(0, 2, 3, 1), w.out_proj), scale1)
    y = layer_norm(x, weights.norm2, weights.norm2_bias, eps).to(dtype)
    return (x + scaled(mlp(y, w.fc1, w.fc1_bias, w.fc2, w.fc2_bias), scale2)).to(out_dtype)
