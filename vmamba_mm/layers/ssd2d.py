"""SSD2D: SS2D with state space duality in place of S6 (arXiv 2401.10166 and 2405.21060)."""


import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.norm import LayerNorm
from vmamba_mm.layers.plain import are_plain, is_depthwise_3x3, is_plain
from vmamba_mm.layers.ss2d import ACTS
from vmamba_mm.layers.ssm_init import init_dt_bias, init_x_proj, state_matrix
from vmamba_mm.ops import cross_merge, cross_scan, dwconv_silu, ssd
from vmamba_mm.ops.core.backends import runs_kernels
from vmamba_mm.ops.ss2d_scan.patterns import NUM_ROUTES

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('cross_merge')
torch.fx.wrap('cross_scan')
torch.fx.wrap('dwconv_silu')
torch.fx.wrap('ssd')
torch.fx.wrap('state_matrix')

OUT_NORMS = ('ln', 'none', 'dwconv', 'ln_dwconv', 'softmax', 'sigmoid')
_INITS = ('mamba', 'random', 'zero')


class SSD2D(nn.Module):
    """in_proj -> depthwise conv -> act -> SSD along four routes -> out_norm [-> GELU] [-> * act(z)]
    -> out_proj.

    It is the operator 'm0' of VMamba's public code (class SS2Dm0), with its names and shapes of
    parameters. The routes are those of :class:`SS2D`: rows, columns, and both backwards. Each has
    R heads of P = D / R channels with a step dt and a decay A of their own, and one B and one C of
    N numbers, which its heads share; the skip is one number for each channel. x_proj gives dt, B
    and C at once. The result is the sum of the four routes.

    Args:
        dim: C, channels of the block.
        d_state: N, size of the state of one channel.
        ssm_ratio: D / C.
        dt_rank: R, heads of a route, which divides D; 'auto' for ceil(C / 16).
        conv_bias: whether the depthwise convolution has a bias.
        gate: multiply by a second branch z of in_proj.
        gate_act: whether z goes through ``act``.
        act: 'gelu', 'silu' or 'relu', after the convolution (there without one too) and on z.
        conv_kernel: odd size of the depthwise convolution; 0 for none.
        ssm_init: 'zero' (A = -1, dt's bias uniform in [0, 0.1)) or 'random' (A log-normal, dt's
            bias normal of std 0.1), the two of the public code; or 'mamba', as Mamba-2 starts (A
            uniform in [-16, -1], dt log-uniform in [0.001, 0.1]).
        out_norm: 'ln', LayerNorm over D; 'none'; 'dwconv', a depthwise 3x3 convolution without
            bias; 'ln_dwconv', the one and then the other; 'softmax' over the map; or 'sigmoid'.
        out_act: GELU after the norm.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.

    Raises:
        ValueError: on an ``act``, ``conv_kernel``, ``ssm_init`` or ``out_norm`` that does not
            exist, an ``ssm_ratio`` that leaves no channel, or a ``dt_rank`` that does not divide D.
    """

    #: The batched product in its forward is x_proj: for who counts FLOPs by kind.
    projects_in_batches = True

    def __init__(self, dim: int, *, d_state: int = 64, ssm_ratio: float = 1.0,
                 dt_rank: int | str = 'auto', conv_bias: bool = False, gate: bool = False,
                 gate_act: bool = True, act: str = 'gelu', conv_kernel: int = 3,
                 ssm_init: str = 'zero', out_norm: str = 'ln', out_act: bool = False):
        super().__init__()
        for name, value, choices in (('act', act, tuple(ACTS)), ('ssm_init', ssm_init, _INITS),
                                     ('out_norm', out_norm, OUT_NORMS)):
            if value not in choices:
                raise ValueError(f'{name}={value!r} does not exist; choose one of {list(choices)}')
        if conv_kernel != 0 and (conv_kernel < 3 or conv_kernel % 2 == 0):
            raise ValueError(f'conv_kernel must be 0 (no convolution) or an odd int of at least 3, '
                             f'got {conv_kernel}')
        inner = int(ssm_ratio * dim)
        if inner < 1:
            raise ValueError(f'ssm_ratio must be at least 1/{dim} for {dim} channels: {ssm_ratio}')
        heads = -(-dim // 16) if dt_rank == 'auto' else int(dt_rank)
        if heads < 1 or inner % heads:
            raise ValueError(f'dt_rank={dt_rank!r} is {heads} heads for each route, which must '
                             f'divide the {inner} channels of SSD2D (ssm_ratio * {dim})')
        self.d_state = d_state
        self.num_heads = heads
        self.gate = gate
        self.gate_act = gate_act
        self.act = act
        self.out_act = out_act
        self.in_proj = nn.Linear(dim, inner * (2 if gate else 1), bias=False)
        self.conv2d = _channels_last(nn.Conv2d(
            inner, inner, conv_kernel, padding=conv_kernel // 2, groups=inner,
            bias=conv_bias)) if conv_kernel else None
        self.x_proj_weight = nn.Parameter(init_x_proj(NUM_ROUTES, heads + 2 * d_state, inner))
        A_logs, dt_bias = _init_decay(ssm_init, heads)
        self.A_logs = nn.Parameter(A_logs)
        self.dt_projs_bias = nn.Parameter(dt_bias)
        self.Ds = nn.Parameter(torch.ones(NUM_ROUTES, heads, inner // heads))
        self.out_norm = _build_out_norm(out_norm, inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        act, conv = ACTS[self.act], self.conv2d
        if self.act == 'silu' and _is_plain_depthwise_3x3(conv):
            x = dwconv_silu(x, conv[1].weight, conv[1].bias)
        else:
            x = act(x if conv is None else conv(x))
        y = self.out_norm(self._scan(x)).to(x.dtype)
        if self.out_act:
            y = F.gelu(y)
        if self.gate:
            y = y * (act(z) if self.gate_act else z)
        return self.out_proj(y)

    def _scan(self, x_BHWD: Tensor) -> Tensor:
        """The sum of the four routes, (B, H, W, D).

        The map lies in memory twice, by rows and by columns (S = 2), as heads of one sequence. Each
        of two scans takes both, one forward and one in reverse, so that nothing is turned around.
        """
        height, width = x_BHWD.shape[1:3]
        x_BLSD = cross_scan(x_BHWD, 2, channels_last=True)
        B, C, B_back, C_back, dt, dt_back, _ = self._project(x_BLSD)
        x_BLHP = x_BLSD.flatten(2).unflatten(2, (2 * self.num_heads, -1))
        # Parameters are stacked by (forward, backward) and, in each, by (rows, columns).
        (A, A_back), (D, D_back), (bias, bias_back) = (t.flatten(0, 1).chunk(2) for t in (
            state_matrix(self.A_logs), self.Ds, self.dt_projs_bias))
        y = ssd(x_BLHP, dt.flatten(2), A, B, C, D, dt_bias=bias, dt_softplus=True)
        y = y + ssd(x_BLHP, dt_back.flatten(2), A_back, B_back, C_back, D_back, dt_bias=bias_back,
                    dt_softplus=True, reverse=True)
        return cross_merge(y.view(x_BLSD.shape), height, width, channels_last=True)

    def _project(self, x_BLSD: Tensor) -> tuple[Tensor, ...]:
        """B and C forward and backward, (B, L, S, N), dt forward and backward, (B, L, S, R), and
        what fills up.

        They lie side by side, B and C first. On an NVIDIA GPU they are filled up to a multiple of 8
        columns, which aligns them to 16 bytes: so kernels read them where they are.
        """
        heads, state = self.num_heads, self.d_state
        weights = self.x_proj_weight.unflatten(0, (2, 2)).transpose(0, 1)  # (S, direction, ...)
        of_dt, of_BC = weights.split((heads, 2 * state), dim=2)
        fill = -(4 * state + 2 * heads) % 8 if runs_kernels(x_BLSD) else 0
        weights = torch.cat((of_BC.flatten(1, 2), of_dt.flatten(1, 2)), dim=1)
        if fill:
            weights = F.pad(weights, (0, 0, 0, fill))
        projected = torch.einsum('blsd, scd -> blsc', x_BLSD, weights)
        return projected.split((*[state] * 4, heads, heads, fill), dim=-1)


def _init_decay(kind: str, heads: int) -> tuple[Tensor, Tensor]:
    """A_logs and dt_projs_bias, (K, R)."""
    shape = NUM_ROUTES, heads
    if kind == 'mamba':
        return torch.empty(shape).uniform_(1, 16).log(), init_dt_bias(*shape)
    if kind == 'random':
        return torch.randn(shape), 0.1 * torch.randn(shape)
    return torch.zeros(shape), 0.1 * torch.rand(shape)


# --- parts of another memory format -------------------------------------------------------------

class _Permute(nn.Module):
    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def _channels_last(conv: nn.Conv2d, *before: nn.Module) -> nn.Sequential:
    """A convolution, after modules that take channels-last maps, of a channels-last map."""
    return nn.Sequential(*before, _Permute(0, 3, 1, 2), conv, _Permute(0, 2, 3, 1))


def _is_plain_depthwise_3x3(conv: nn.Module | None) -> bool:
    """Whether it is what :func:`_channels_last` makes of a 3x3 convolution, and nobody watches."""
    if not is_plain(conv, nn.Sequential) or len(conv) != 3:
        return False
    before, inner, after = conv
    return are_plain((before, after), (_Permute, _Permute)) and is_depthwise_3x3(inner)


class _MapSoftmax(nn.Module):
    """Softmax of each channel over all positions of a map (B, H, W, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(dim=1).view(x.shape)


def _build_out_norm(kind: str, dim: int) -> nn.Module:
    if kind == 'none':
        return nn.Identity()
    if kind == 'softmax':
        return _MapSoftmax()
    if kind == 'sigmoid':
        return nn.Sigmoid()
    if kind == 'ln':
        return LayerNorm(dim)
    conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
    return _channels_last(conv, *((LayerNorm(dim),) if kind == 'ln_dwconv' else ()))
