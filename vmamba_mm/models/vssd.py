"""The VSSD backbone (arXiv 2407.18559): non-causal state space duality, attention at the end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.families.vssd import DEFAULTS, FAMILY
from vmamba_mm.layers import LayerNorm, LayerNorm2d, SelfAttention, Stage
from vmamba_mm.layers.map_blocks import CPEBlock, InvertedDownsample, ResidualStem
from vmamba_mm.layers.maps import ConvUnit, convolve_map
from vmamba_mm.layers.plain import is_depthwise_3x3, is_plain
from vmamba_mm.layers.positions import pad_to_patches
from vmamba_mm.layers.ssm_init import init_dt_bias, state_matrix
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.ops import channels_last, dwconv_silu, nc_ssd, nc_ssd_mixer
from vmamba_mm.ops.core.backends import runs_kernels
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('channels_last')
torch.fx.wrap('dwconv_silu')
torch.fx.wrap('nc_ssd')
torch.fx.wrap('nc_ssd_mixer')
torch.fx.wrap('pad_to_patches')
torch.fx.wrap('state_matrix')


# --- stems and downsamplings ----------------------------------------------------------------------

class PatchStem(nn.Module):
    """Patches of 4x4 pixels with a batch norm, a ReLU and a LayerNorm: (B, in_channels, H, W) ->
    (B, ceil(H/4), ceil(W/4), C). Images are padded with zeros to whole patches."""

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        self.conv1 = ConvUnit(in_channels, embed_dims, 4, 4, bias=False)
        self.norm = LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv1(channels_last(pad_to_patches(x, 4))))


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2, a ReLU and a LayerNorm:
    (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(ConvUnit(dim, 2 * dim, 3, 2, 1, norm=False))
        self.norm = LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


_STEMS = {'residual': ResidualStem, 'patch': PatchStem}
_DOWNSAMPLES = {'inverted': InvertedDownsample, 'conv': ConvDownsample}


# --- mixers ---------------------------------------------------------------------------------------

class NonCausalSSD(nn.Module):
    """The mixer of VSSD (figure 3, arXiv 2407.18559): Mamba-2's with a state that all tokens share.

    in_proj -> depthwise 3x3 convolution and SiLU of x, B and C -> ``nc_ssd`` -> LayerNorm -> * z ->
    out_proj. Unlike in Mamba-2, z has no activation, and the norm comes before it.

    Args:
        dim: C, channels of the block.
        num_heads: H, of expand * C / H channels each.
        d_state: N, size of the state of one channel.
        expand: channels inside by C.
        n_groups: G, of heads that share B and C: head h is of group h mod G.
        positive: as of :func:`vmamba_mm.ops.nc_ssd`.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.
    """

    def __init__(self, dim: int, num_heads: int, d_state: int, *, expand: float = 2.0,
                 n_groups: int = 1, positive: bool = True):
        super().__init__()
        inner = int(expand * dim)
        if inner % num_heads or num_heads % n_groups:
            raise ValueError(f'num_heads={num_heads} must divide the {inner} channels, and '
                             f'n_groups={n_groups} the heads')
        self.num_heads, self.n_groups, self.positive = num_heads, n_groups, positive
        self.sizes = [inner, n_groups * d_state, n_groups * d_state]  # of x, B and C
        self.in_proj = nn.Linear(dim, inner + sum(self.sizes) + num_heads, bias=False)
        self.conv2d = nn.Conv2d(sum(self.sizes), sum(self.sizes), 3, padding=1,
                                groups=sum(self.sizes))
        self.dt_bias = nn.Parameter(init_dt_bias(1, num_heads).flatten())
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log_())
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = LayerNorm(inner, feeds_matmul=True)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected, conv, norm = self._project(x), self.conv2d, self.norm
        A = state_matrix(self.A_log)
        if is_depthwise_3x3(conv) and is_plain(norm, LayerNorm):
            y = nc_ssd_mixer(projected, conv.weight, conv.bias, A, self.D, self.dt_bias,
                             norm.weight, norm.bias, groups=self.n_groups, positive=self.positive,
                             eps=norm.eps)
            return self.out_proj(y)
        inner, channels = self.sizes[0], sum(self.sizes)
        z, xBC, dt = projected[..., :inner + channels + self.num_heads].split(
            (inner, channels, self.num_heads), dim=-1)
        if is_depthwise_3x3(conv):
            xBC = dwconv_silu(xBC, conv.weight, conv.bias)
        else:
            xBC = F.silu(convolve_map(conv, xBC))
        x, B, C = xBC.flatten(1, 2).split(self.sizes, dim=-1)
        B, C = (t.unflatten(-1, (self.n_groups, -1)) for t in (B, C))
        y = nc_ssd(x.unflatten(-1, (self.num_heads, -1)), dt.flatten(1, 2), A, B, C, self.D,
                   dt_bias=self.dt_bias, dt_softplus=True, positive=self.positive)
        return self.out_proj(norm(y.view(z.shape)) * z)

    def _project(self, x: Tensor) -> Tensor:
        """z, what the convolution takes, dt, and on a GPU zeros that nobody reads.

        The rows of a published stage have 386 numbers, or 515. Tensor cores, and the kernels that
        follow, want rows that begin at multiples of 16 bytes.
        """
        linear = self.in_proj
        gap = -(self.sizes[0] + sum(self.sizes) + self.num_heads) % 8
        if gap and runs_kernels(x) and is_plain(linear, nn.Linear) and linear.bias is None:
            return F.linear(x, F.pad(linear.weight, (0, 0, 0, gap)))
        return linear(x)


class _MapAttention(SelfAttention):
    """Softmax attention of all positions of a map: (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).view(x.shape)


# --- the backbone ---------------------------------------------------------------------------------

@MODELS.register_module()
class VSSD(Backbone):
    """VSSD as a backbone for mmpretrain, mmdet and mmseg.

    Args:
        arch: a key of ``VSSD.arch_settings``, or a dict with the keys ``embed_dims`` (channels C of
            the first stage, doubled at each further one), ``depths`` (blocks of the 4 stages),
            ``num_heads`` (of the mixers of each stage) and ``d_state`` (N), and as it likes
            ``mixers`` (of each stage, 'ssd' or 'attention'; attention in the last one), ``expand``
            (2), ``mlp_ratio`` (4), ``n_groups`` (1) and ``positive`` (True), as of
            :class:`NonCausalSSD`, ``stem`` ('residual', or 'patch' for patches of 4x4 pixels) and
            ``downsample`` ('inverted', or 'conv' for a single convolution). With ``base``, the name
            of a published one, only the keys that differ from it, as ``dict(base='tiny',
            d_state=32)``. The default is 'tiny'.
        out_indices: stages to return, each through a norm of its own, ``norm{i}``; all by default.
        norm_eval: keep the batch norms of the stem and of the downsamplings in eval mode while
            training. The published detectors and segmentors train them, with two images a GPU.
        drop_path_rate, frozen_stages, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple of (B, C_i, H_i, W_i) with
        C_i = embed_dims * 2^i, H_0 = ceil(H / 4) and H_i = ceil(H_(i-1) / 2). The maps are
        contiguous.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'tiny'

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], [arch['embed_dims'] * 2 ** i for i in range(len(arch['depths']))]

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return math.ceil(size / cls.stage_strides(arch)[-1])

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates = {**DEFAULTS, **self.arch}, iter(drop_path_rates)
        self.patch_embed = _STEMS[arch['stem']](in_channels, self.num_features[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(self.num_features, self.depths, strict=True)):
            blocks = [CPEBlock(_make_mixer(arch, i, dim), dim, mlp_ratio=arch['mlp_ratio'],
                               drop_path=next(rates), with_cp=with_cp) for _ in range(depth)]
            is_last = i == len(self.depths) - 1
            self.stages.append(Stage(
                blocks, None if is_last else _DOWNSAMPLES[arch['downsample']](dim)))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(self.num_features[i]))
        self.apply(init_linear)  # the rest starts as torch or the mixer sets it


def _make_mixer(arch: Mapping[str, Any], stage: int, dim: int) -> nn.Module:
    heads = arch['num_heads'][stage]
    if arch['mixers'][stage] == 'attention':
        return _MapAttention(dim, heads, qkv_bias=False)
    return NonCausalSSD(dim, heads, arch['d_state'], expand=arch['expand'],
                        n_groups=arch['n_groups'], positive=arch['positive'])
