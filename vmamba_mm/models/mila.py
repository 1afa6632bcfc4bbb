"""The MILA backbone (arXiv 2405.16605): linear attention in the block of Mamba."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.families.mila import DEFAULTS, FAMILY, grid_of, heads_of
from vmamba_mm.layers import LayerNorm2d
from vmamba_mm.layers.map_blocks import CPEBlock, InvertedDownsample, ResidualStem, RotaryStage
from vmamba_mm.layers.maps import convolve_map
from vmamba_mm.layers.plain import is_depthwise_3x3
from vmamba_mm.layers.positions import pad_to_patches, resize_grid, resize_patches
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.ops import dwconv_silu, linear_attention
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('_pad_to_even')
torch.fx.wrap('_resized')
torch.fx.wrap('dwconv_silu')
torch.fx.wrap('linear_attention')
torch.fx.wrap('pad_to_patches')


class MILAMixer(nn.Module):
    """Linear attention between the projections of Mamba (figure 3, MLLA block).

    in_proj -> depthwise 3x3 convolution and SiLU -> linear attention of queries and keys of that,
    whose values it is itself -> + a depthwise convolution of the values -> * SiLU(act_proj) ->
    out_proj.

    Args:
        dim: C, channels.
        num_heads: n, which divides them.
        qkv_bias: whether the projection to queries and keys has a bias.

    Shape: (B, H, W, C), and the rotation of all channels, (H W, C / 2, 2) -> (B, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj, self.act_proj = (nn.Linear(dim, dim) for _ in range(2))
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        conv, gate = self.conv2d, F.silu(self.act_proj(x))
        x = self.in_proj(x)
        if is_depthwise_3x3(conv):
            v = dwconv_silu(x, conv.weight, conv.bias)
        else:
            v = F.silu(convolve_map(conv, x))
        q, k = self.qk(v).chunk(2, dim=-1)
        heads = (t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        y = linear_attention(*heads, turns=turns).view(v.shape)
        return self.out_proj((y + convolve_map(self.lepe, v)) * gate)


class MILAStem(ResidualStem):
    """The same, of images that are padded with zeros to multiples of 4 pixels, as published."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_to_patches(x, 4))


class MILADownsample(InvertedDownsample):
    """The same, of maps that are padded with zeros to even sides, as published: the convolution
    pads too, but behind the first layer, which makes of zeros what is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_pad_to_even(x))


def _pad_to_even(x: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, width % 2, 0, height % 2))


@MODELS.register_module()
class MILA(Backbone):
    """MILA, or MLLA, as a backbone for mmpretrain, mmdet and mmseg.

    Args:
        arch: a key of ``MILA.arch_settings``, or a dict with the keys ``embed_dims`` (channels C of
            the first stage, doubled at each further one) and ``depths`` (blocks of each stage, of
            which there may be any number), and as it likes ``num_heads`` (of each stage; of 32
            channels), ``mlp_ratio`` (4), ``qkv_bias`` (True) and ``image_size`` (pixels of a side,
            or (height, width), of the images that a position embedding is for, which others resize;
            0 for none). With ``base``, the name of a published one, only the keys that differ from
            it, as ``dict(base='tiny', depths=(2, 2, 4, 2))``. The default is 'tiny'.
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
    stem = ('patch_embed', 'pos_embed')

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return arch['depths'], [arch['embed_dims'] * 2 ** i for i in range(len(arch['depths']))]

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return math.ceil(size / cls.stage_strides(arch)[-1])

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch, rates, dims = {**DEFAULTS, **self.arch}, iter(drop_path_rates), self.num_features
        self.patch_embed = MILAStem(in_channels, dims[0])
        self.grid, self.pos_embed = None, None
        if arch['image_size']:
            self.grid = grid_of(arch)
            self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), dims[0]))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.stages = nn.ModuleList()
        for dim, depth, heads in zip(dims, self.depths, heads_of(arch), strict=True):
            blocks = [CPEBlock(MILAMixer(dim, heads, arch['qkv_bias']), dim,
                               mlp_ratio=arch['mlp_ratio'], drop_path=next(rates),
                               with_cp=with_cp) for _ in range(depth)]
            downsample = None if dim == dims[-1] else MILADownsample(dim)
            # All channels of a token turn together: some heads by rows, others by columns.
            self.stages.append(RotaryStage(blocks, downsample, dim, repeats=1, endpoint=False))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(dims[i]))
        self.apply(init_linear)  # the rest starts as torch sets it

    def embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return x if self.pos_embed is None else x + _resized(self.pos_embed, self.grid, x)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The position embedding is resized."""
        embed = weights.get('pos_embed')
        if embed is None or self.grid is None:
            return weights
        return weights | dict(pos_embed=resize_patches(embed, self.grid))


def _resized(embed: Tensor, grid: tuple[int, int], x: Tensor) -> Tensor:
    """(1, h w, C) for a map (B, H, W, C): (1, H, W, C)."""
    size = x.shape[1], x.shape[2]
    return resize_grid(embed, grid, size).unflatten(1, size)
