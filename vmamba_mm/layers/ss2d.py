"""SS2D: the 2-D selective scan module (section 4.3, arXiv 2401.10166)."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.norm import LayerNorm
from vmamba_mm.layers.plain import is_depthwise_3x3, is_plain
from vmamba_mm.layers.ssm_init import init_ssm, init_x_proj, state_matrix
from vmamba_mm.ops import dwconv_silu, scan_norm
from vmamba_mm.ops.ss2d_scan.patterns import num_routes

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('dwconv_silu')
torch.fx.wrap('scan_norm')
torch.fx.wrap('state_matrix')

ACTS = {'silu': F.silu, 'gelu': F.gelu, 'relu': F.relu}


class SS2D(nn.Module):
    """in_proj -> depthwise conv -> act -> ``scan_norm`` [-> * act(z)] -> out_proj.

    Args:
        dim: C, channels of the block.
        d_state: N, size of the state of one channel.
        ssm_ratio: D / C.
        dt_rank: R; 'auto' for ceil(C / 16).
        conv_bias: whether the depthwise convolution has a bias.
        gate: the multiplicative branch z of vanilla VMamba.
        act: 'silu', 'gelu' or 'relu' (table 15), after the convolution and on z; there without a
            convolution too. The MLP beside SS2D keeps its GELU.
        conv_kernel: odd size of the depthwise convolution; 0 for none (table 10).
        ssm_init: 'mamba', 'random' or 'zero' (table 11), see :func:`init_ssm`.
        scan: order of the routes over the map (table 10): 'cross', 'unidirectional',
            'bidirectional', 'cascade', of eight routes 'omnidirectional' or
            'omnidirectional-unwrapped', or a registered one, see :func:`vmamba_mm.ops.scan_norm`.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.

    Raises:
        ValueError: on an ``act``, ``conv_kernel``, ``ssm_init`` or ``scan`` that does not exist, or
            an ``ssm_ratio`` that leaves no channel.
    """

    def __init__(self, dim: int, *, d_state: int = 1, ssm_ratio: float = 1.0,
                 dt_rank: int | str = 'auto', conv_bias: bool = False, gate: bool = False,
                 act: str = 'silu', conv_kernel: int = 3, ssm_init: str = 'mamba',
                 scan: str = 'cross'):
        super().__init__()
        if act not in ACTS:
            raise ValueError(f'act={act!r} does not exist; choose one of {list(ACTS)}')
        if conv_kernel != 0 and (conv_kernel < 3 or conv_kernel % 2 == 0):
            raise ValueError(f'conv_kernel must be 0 (no convolution) or an odd int of at least 3, '
                             f'got {conv_kernel}')
        routes = num_routes(scan)
        inner = int(ssm_ratio * dim)
        if inner < 1:
            raise ValueError(f'ssm_ratio must be at least 1/{dim} for {dim} channels: {ssm_ratio}')
        rank = -(-dim // 16) if dt_rank == 'auto' else int(dt_rank)
        self.gate = gate
        self.act = act
        self.scan = scan
        self.in_proj = nn.Linear(dim, inner * (2 if gate else 1), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size=conv_kernel, padding=conv_kernel // 2,
                                groups=inner, bias=conv_bias) if conv_kernel else None
        self.x_proj_weight = nn.Parameter(init_x_proj(routes, rank + 2 * d_state, inner))
        dt_weight, dt_bias, A_logs = init_ssm(ssm_init, routes, inner, d_state, rank)
        self.dt_projs_weight = nn.Parameter(dt_weight)
        self.dt_projs_bias = nn.Parameter(dt_bias)
        self.A_logs = nn.Parameter(A_logs)
        self.Ds = nn.Parameter(torch.ones(routes * inner))
        self.out_norm = LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        act = ACTS[self.act]
        if self.act == 'silu' and is_depthwise_3x3(self.conv2d):
            x = dwconv_silu(x, self.conv2d.weight, self.conv2d.bias)
        elif self.conv2d is not None:
            x = act(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        else:
            x = act(x)
        y = self._scan_and_norm(x)
        if self.gate:
            y = y * act(z)
        return self.out_proj(y)

    def _scan_and_norm(self, x: Tensor) -> Tensor:
        norm, is_fused = self.out_norm, is_plain(self.out_norm, LayerNorm)
        y_BDHW = scan_norm(
            x.permute(0, 3, 1, 2), self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias,
            state_matrix(self.A_logs), self.Ds, *(
                (norm.weight, norm.bias, norm.eps) if is_fused else (None, None)), scan=self.scan)
        y = y_BDHW.permute(0, 2, 3, 1)
        return y if is_fused else norm(y).to(x.dtype)
