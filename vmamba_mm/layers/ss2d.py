"""SS2D: the 2-D selective scan module (section 4.3, arXiv 2401.10166)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.norm import LayerNorm
from vmamba_mm.layers.plain import is_depthwise_3x3
from vmamba_mm.layers.ssm_init import init_A_logs, init_dt_bias, init_dt_proj, init_x_proj
from vmamba_mm.ops import dwconv_silu, ss2d_scan_norm

NUM_ROUTES = 4


class SS2D(nn.Module):
    """in_proj -> depthwise 3x3 -> SiLU -> ``ss2d_scan_norm`` [-> * SiLU(z)] -> out_proj.

    Args:
        dim: C, channels of the block.
        d_state: N, size of the state of one channel.
        ssm_ratio: D / C.
        dt_rank: R; 'auto' for ceil(C / 16).
        conv_bias: whether the depthwise convolution has a bias.
        gate: the multiplicative branch z of vanilla VMamba.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.
    """

    def __init__(self, dim: int, *, d_state: int = 1, ssm_ratio: float = 1.0,
                 dt_rank: int | str = 'auto', conv_bias: bool = False, gate: bool = False):
        super().__init__()
        inner = int(ssm_ratio * dim)
        rank = -(-dim // 16) if dt_rank == 'auto' else int(dt_rank)
        self.gate = gate
        self.in_proj = nn.Linear(dim, inner * (2 if gate else 1), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner,
                                bias=conv_bias)
        self.x_proj_weight = nn.Parameter(init_x_proj(NUM_ROUTES, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(init_dt_proj(NUM_ROUTES, inner, rank))
        self.dt_projs_bias = nn.Parameter(init_dt_bias(NUM_ROUTES, inner))
        self.A_logs = nn.Parameter(init_A_logs(NUM_ROUTES, inner, d_state))
        self.Ds = nn.Parameter(torch.ones(NUM_ROUTES * inner))
        self.out_norm = LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        if is_depthwise_3x3(self.conv2d):
            x = dwconv_silu(x, self.conv2d.weight, self.conv2d.bias)
        else:
            x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y_BDHW = ss2d_scan_norm(
            x.permute(0, 3, 1, 2), self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias,
            -torch.exp(self.A_logs.float()), self.Ds, self.out_norm.weight, self.out_norm.bias,
            self.out_norm.eps)
        y = y_BDHW.permute(0, 2, 3, 1)
        if self.gate:
            y = y * F.silu(z)
        return self.out_proj(y)
