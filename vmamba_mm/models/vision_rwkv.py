"""The Vision-RWKV backbone (arXiv 2403.02308): WKV of both directions, and shifts of channels."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.families.vision_rwkv import DEFAULTS, FAMILY, grid_of
from vmamba_mm.layers import DropPath, LayerNorm, PatchEmbed
from vmamba_mm.layers.plain import is_plain
from vmamba_mm.layers.positions import pad_to_patches, resize_grid, resize_patches
from vmamba_mm.models.base import init_linear
from vmamba_mm.models.flat import FlatBackbone
from vmamba_mm.ops import (
    add_norm,
    bi_wkv,
    bi_wkv6,
    layer_norm,
    shift_mix,
    sigmoid_gate,
    squared_relu,
)
from vmamba_mm.ops.core.backends import autocast_dtype, runs_kernels
from vmamba_mm.ops.shift_mix.reference import shift_heads
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('_add_positions')
torch.fx.wrap('_bi_wkv_of_map')
torch.fx.wrap('_bi_wkv6_of_map')
torch.fx.wrap('add_norm')
torch.fx.wrap('autocast_dtype')
torch.fx.wrap('layer_norm')
torch.fx.wrap('pad_to_patches')
torch.fx.wrap('shift_heads')
torch.fx.wrap('shift_mix')
torch.fx.wrap('sigmoid_gate')
torch.fx.wrap('squared_relu')


def _bi_wkv_of_map(w: Tensor, u: Tensor, k: Tensor, v: Tensor, mode: str) -> Tensor:
    """``bi_wkv`` of the positions of a map (B, H, W, C), row by row, with w and u for all of it."""
    tokens = v.shape[1] * v.shape[2]
    y = bi_wkv(w / tokens, u / tokens, k.flatten(1, 2), v.flatten(1, 2), mode=mode)
    return y.view(v.shape)


def _bi_wkv6_of_map(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """``bi_wkv6`` of the positions of a map (B, H, W, C), row by row, in the heads of u (H', N)."""
    maps = (t.flatten(1, 2).unflatten(-1, tuple(u.shape)) for t in (r, k, v, w))
    return bi_wkv6(*maps, u).view(v.shape)


class _Mix(nn.Module):
    """What both halves of a block have: mixtures of a map with its shifted copy."""

    #: The names of the mixtures, each a parameter ``spatial_mix_{name}``.
    mixtures: tuple[str, ...]

    def __init__(self, dim: int, shift_pixel: int, shift_share: float,
                 head_dim: int | None = None):
        super().__init__()
        self.shift_pixel, self.shift_share, self.head_dim = shift_pixel, shift_share, head_dim
        for name in self.mixtures:
            self.register_parameter(f'spatial_mix_{name}', nn.Parameter(
                torch.full((1, 1, dim), 0.5)) if shift_pixel else None)

    def mix(self, x: Tensor) -> Sequence[Tensor]:
        """The mixtures of (B, H, W, C)."""
        if not self.shift_pixel:
            return [x] * len(self.mixtures)
        shares = [getattr(self, f'spatial_mix_{name}').flatten() for name in self.mixtures]
        # Under autocast the products that take them would round them.
        return shift_mix(x, shares, self.shift_pixel, self.shift_share, head_dim=self.head_dim,
                         out_dtype=autocast_dtype(x))


class SpatialMix(_Mix):
    """The mixer of Vision-RWKV (section 3.2, figure 2): WKV of both directions, times a gate.

    Args:
        dim: C.
        key_norm: whether the result of the WKV has a LayerNorm, ``key_norm``, in spite of its name.
        formula: 'paper' or 'official', the mode of :func:`vmamba_mm.ops.bi_wkv`.
        shift_pixel: how far the shifted copy is; 0 for no such copy.
        shift_share: of the channels in each of the four groups that are shifted.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.
    """

    mixtures = ('k', 'v', 'r')

    def __init__(self, dim: int, *, key_norm: bool = False, formula: str = 'paper',
                 shift_pixel: int = 1, shift_share: float = 0.25):
        super().__init__(dim, shift_pixel, shift_share)
        self.formula = formula
        self.spatial_decay = nn.Parameter(torch.zeros(dim))
        self.spatial_first = nn.Parameter(torch.zeros(dim))
        self.key, self.value, self.receptance, self.output = (
            nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.key_norm = LayerNorm(dim, feeds_matmul=True) if key_norm else None

    def forward(self, x: Tensor) -> Tensor:
        for_k, for_v, for_r = self.mix(x)
        gate = self.receptance(for_r)
        y = _bi_wkv_of_map(self.spatial_decay, self.spatial_first, self.key(for_k),
                           self.value(for_v), self.formula)
        if self.key_norm is not None:
            y = self.key_norm(y)
        return self.output(sigmoid_gate(gate, y))


class SpatialMix6(nn.Module):
    """The mixer of the models with RWKV-6 (arXiv 2404.05892, section 4), in both directions.

    The mixtures of the map with its shifted copy, and the decays, depend on the input: each is what
    is learned for all inputs and a small MLP of the position.

    Args:
        dim: C.
        head_dim: N, channels of a head, which are also shifted together.
        key_norm: as of :class:`SpatialMix`.
        shift_pixel, shift_share: how far the shifted copy is, and the share of its groups.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.
    """

    #: In the order of the rows of ``time_maa_w2``.
    mixtures = ('w', 'k', 'v', 'r', 'g')
    mix_rank, decay_rank = 32, 64

    def __init__(self, dim: int, head_dim: int = 64, *, key_norm: bool = False,
                 shift_pixel: int = 1, shift_share: float = 0.25):
        super().__init__()
        self.head_dim, self.shift_pixel, self.shift_share = head_dim, shift_pixel, shift_share
        for name in ('x', *self.mixtures):
            self.register_parameter(f'time_maa_{name}', nn.Parameter(torch.full((1, 1, dim), 0.5)))
        count = len(self.mixtures)
        self.time_maa_w1 = nn.Parameter(torch.empty(dim, count * self.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(count, self.mix_rank, dim))
        self.time_decay = nn.Parameter(torch.zeros(1, 1, dim))
        self.time_decay_w1 = nn.Parameter(torch.empty(dim, self.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(self.decay_rank, dim))
        self.time_faaaa = nn.Parameter(torch.zeros(dim // head_dim, head_dim))
        for weight in (self.time_maa_w1, self.time_maa_w2, self.time_decay_w1, self.time_decay_w2):
            nn.init.uniform_(weight, -1e-4, 1e-4)
        self.receptance, self.key, self.value, self.gate, self.output = (
            nn.Linear(dim, dim, bias=False) for _ in range(5))
        self.key_norm = LayerNorm(dim) if key_norm else None
        self.ln_x = nn.GroupNorm(dim // head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        for_w, for_k, for_v, for_r, for_g = self.mix(x)
        decay = self.time_decay[:, None] + torch.tanh(
            for_w @ self.time_decay_w1) @ self.time_decay_w2
        y = _bi_wkv6_of_map(self.receptance(for_r), self.key(for_k), self.value(for_v), decay,
                            self.time_faaaa)
        if self.key_norm is not None:
            y = self.key_norm(y)
        y = self.ln_x(y.flatten(0, 2)).view(y.shape)
        return self.output(y * F.silu(self.gate(for_g)))

    def mix(self, x: Tensor) -> list[Tensor]:
        """The mixtures of (B, H, W, C)."""
        difference = shift_heads(x, self.shift_pixel, self.shift_share, self.head_dim) - x
        hidden = torch.tanh(self._mixed(x, difference, 'x') @ self.time_maa_w1)
        parts = hidden.unflatten(-1, (len(self.mixtures), -1)).unbind(-2)
        return [self._mixed(x, difference, name, part @ weight) for name, part, weight in zip(
            self.mixtures, parts, self.time_maa_w2, strict=True)]

    def _mixed(self, x, difference, name, more=None):
        share = getattr(self, f'time_maa_{name}')[:, None]
        return x + difference * (share if more is None else share + more).to(x.dtype)


class ChannelMix(_Mix):
    """The MLP of RWKV (section 3.2): squares of ReLUs, times a gate.

    Args:
        dim: C.
        hidden_dim: width of the hidden layer.
        key_norm: whether the hidden layer has a LayerNorm after the square.
        shift_pixel, shift_share: as of :class:`SpatialMix`.
        head_dim: channels that are shifted together; None for all.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    mixtures = ('k', 'r')

    def __init__(self, dim: int, hidden_dim: int, *, key_norm: bool = False, shift_pixel: int = 1,
                 shift_share: float = 0.25, head_dim: int | None = None):
        super().__init__(dim, shift_pixel, shift_share, head_dim)
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.key_norm = LayerNorm(hidden_dim, feeds_matmul=True) if key_norm else None
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for_k, for_r = self.mix(x)
        hidden = squared_relu(self.key(for_k))
        if self.key_norm is not None:
            hidden = self.key_norm(hidden)
        return sigmoid_gate(self.receptance(for_r), self.value(hidden))


class VisionRWKVBlock(nn.Module):
    """A mixer of positions and one of channels; both are residual branches with a norm.

    Args:
        att, ffn: of maps, (B, H, W, C) -> (B, H, W, C).
        dim: C, channels.
        is_first: whether the input has a norm, ``ln0``, as in the first block.
        post_norm: whether the norms are behind the branches, and not before them.
        layer_scale: initial value of the factors of branches, ``gamma1`` and ``gamma2``; None for
            none.
        drop_path: probability to drop each branch.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, att: nn.Module, ffn: nn.Module, dim: int, *, is_first: bool,
                 post_norm: bool, layer_scale: float | None, drop_path: float, with_cp: bool):
        super().__init__()
        self.post_norm, self.with_cp = post_norm, with_cp
        self.ln0 = LayerNorm(dim) if is_first else None
        self.ln1, self.ln2 = (LayerNorm(dim, feeds_matmul=not post_norm) for _ in range(2))
        self.att, self.ffn = att, ffn
        self.gamma1, self.gamma2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.ln0 is not None:
            x = self.ln0(x)
        drop: Callable[[Tensor], Tensor] = self.drop_path
        scales: tuple[Tensor | None, ...] = (None, None)
        if is_plain(drop, DropPath):  # then the factors go into the sums
            scales, drop = drop.factors(x, 2), _identity
        for mixer, norm, gamma, scale in ((self.att, self.ln1, self.gamma1, scales[0]),
                                          (self.ffn, self.ln2, self.gamma2, scales[1])):
            if self.post_norm:
                branch = _scaled_norm(norm, mixer(x), gamma)
            else:
                branch = mixer(norm(x))
                branch = branch if gamma is None else gamma * branch
            x = add_norm(x, drop(branch), None, None, scale=scale)[0]
        return x


def _identity(branch: Tensor) -> Tensor:
    return branch


def _scaled_norm(norm: nn.Module, x: Tensor, gamma: Tensor | None) -> Tensor:
    """``gamma * norm(x)``; on a GPU the factors (C) are part of the norm's parameters."""
    if gamma is None:
        return norm(x)
    if runs_kernels(x) and is_plain(norm, LayerNorm):
        return layer_norm(x, norm.weight * gamma, norm.bias * gamma, norm.eps,
                          out_dtype=norm.out_dtype(x))
    return gamma * norm(x)


@MODELS.register_module()
class VisionRWKV(FlatBackbone):
    """Vision-RWKV as a backbone for mmpretrain, mmdet and mmseg.

    The patches of an image, row by row, go through blocks whose mixer is a WKV of both directions.
    There is no class token: classifiers read the mean of the last map.

    Args:
        arch: a key of ``VisionRWKV.arch_settings``, or a dict with the keys ``embed_dims`` (C),
            ``depth`` (blocks), ``patch_size`` and ``image_size`` (pixels of the position embedding,
            an int or height and width), and as it likes those below. With ``base``, the name of a
            published one, only the keys that differ from it. The default is 'tiny'.
        out_indices: blocks to return; the last by default. Only the last one has a norm.
        out_type: 'featmap' for maps; 'raw' for all tokens in their order.
        drop_path_rate, frozen_stages, norm_eval, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`, a stage being a block.

    Optional keys of ``arch``:

    - ``mixer``: 'wkv', or 'wkv6' for RWKV-6 with ``head_dim`` channels of a head, 64.
    - ``formula``, with 'wkv': 'paper', the default, or 'official', as all published models were
      trained; the mode of :func:`vmamba_mm.ops.bi_wkv`.
    - ``post_norm``: whether norms are behind the branches; ``layer_scale``: the initial value of
      factors of the branches, None for no such factors; ``key_norm``: whether WKVs and hidden
      layers have norms.
    - ``mlp_ratio``: hidden channels by C, 4; ``shift_pixel``: how far the neighbours of the shifts
      are, 1; 0 for no shift and no mixtures; ``shift_share``: of the channels that come from each
      of them, 1/4.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple: of maps (B, C, h, w) with h =
        ceil(H / patch_size), of an image padded with zeros below and on the right; or of
        (B, h * w, C). Where h and w are not those of ``image_size``, the position embedding is
        resized (bicubic).

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'tiny'
    stem = ('patch_embed', 'pos_embed')
    out_types = ('featmap', 'raw')

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return grid_of(dict(arch, image_size=size))[0]

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch = {**DEFAULTS, **self.arch}
        dims, last = arch['embed_dims'], arch['depth'] - 1
        #: patches of an image of ``image_size``: rows and columns
        self.grid = grid_of(arch)
        self.patch_embed = PatchEmbed(in_channels, dims, arch['patch_size'])
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), dims))
        common = {key: arch[key] for key in ('key_norm', 'shift_pixel', 'shift_share')}
        head_dim = None
        mixer = functools.partial(SpatialMix, dims, formula=arch['formula'], **common)
        if arch['mixer'] == 'wkv6':
            head_dim = arch['head_dim']
            mixer = functools.partial(SpatialMix6, dims, head_dim, **common)
        hidden = int(arch['mlp_ratio'] * dims)
        self.blocks = nn.ModuleList(
            VisionRWKVBlock(
                mixer(), ChannelMix(dims, hidden, head_dim=head_dim, **common), dims,
                is_first=i == 0,
                post_norm=arch['post_norm'], layer_scale=arch['layer_scale'], drop_path=rate,
                with_cp=with_cp)
            for i, rate in enumerate(drop_path_rates))
        if last in self.out_indices:
            self.add_module(f'norm{last}', LayerNorm(dims))
        self.apply(init_linear)
        for i, block in enumerate(self.blocks):
            init_mixes(block, i, arch['depth'])

    def output_norm(self, i: int) -> nn.Module | None:
        return getattr(self, f'norm{i}', None)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.forward_stages(x, self.out_indices)
        return tuple(self.norm_output(i, y).movedim(1, -1).flatten(1, 2)
                     for i, y in zip(self.out_indices, maps, strict=True))

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some blocks before the norm, each (B, h, w, C).

        Args:
            x: (B, in_channels, H, W).
            indices: increasing numbers of blocks; none after the last one runs.
        """
        x, maps = self.embed(x), []
        for i, block in enumerate(self.blocks[:indices[-1] + 1]):
            x = block(x)
            if i in indices:
                maps.append(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """The patches (B, h, w, C) of (B, in_channels, H, W), with the position embedding."""
        patches = self.patch_embed(pad_to_patches(x, self.arch['patch_size']))
        return _add_positions(patches, self.pos_embed, self.grid)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The position embedding is resized. Factors of the branches that start as 1 are 1 where
        the file has none, which is the same model: the published adapter of 'tiny' has them, and
        its classifier has not."""
        embed = weights.get('pos_embed')
        if embed is None:
            return weights  # the comparison says what is missing
        weights = weights | dict(pos_embed=resize_patches(embed, self.grid))
        if self.arch.get('layer_scale') == 1 and not any(
                key.endswith(('.gamma1', '.gamma2')) for key in weights):
            weights |= {key: torch.ones_like(value) for key, value in self.state_dict().items()
                        if key.endswith(('.gamma1', '.gamma2'))}
        return weights


def _add_positions(patches: Tensor, pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    size = tuple(patches.shape[1:3])
    return patches + resize_grid(pos_embed, grid, size).unflatten(1, size)


def init_mixes(block: VisionRWKVBlock, index: int, depth: int) -> None:
    """Set the decays, bonuses and mixtures of block ``index`` of ``depth``, as published ('fancy'
    in the official code): slow decays first, and mixtures that rise with the channel."""
    rising, falling = index / max(1, depth - 1), 1 - index / depth
    att, ffn = block.att, block.ffn
    weight = ffn.receptance.weight
    dims = len(weight)
    channel = torch.arange(dims, dtype=torch.float32, device=weight.device)
    relative, zigzag = channel / max(1, dims - 1), (channel + 1) % 3 - 1
    mixture = (channel / dims) ** falling
    mixtures = dict(k=mixture, v=mixture + 0.3 * rising, r=mixture.sqrt())
    if isinstance(att, SpatialMix6):
        values = dict(time_decay=-6 + 5 * relative ** (0.7 + 1.3 * rising),
                      time_faaaa=rising * (1 - relative) + 0.1 * zigzag)
        # There they are shares of the shifted copy.
        for name, share in dict(mixtures, x=mixture, w=mixture, g=mixture.sqrt()).items():
            values[f'time_maa_{name}'] = 1 - share
    else:
        values = dict(spatial_decay=-5 + 8 * relative ** (0.7 + 1.3 * rising),
                      spatial_first=math.log(0.3) + 0.5 * zigzag)
        values |= {f'spatial_mix_{name}': share for name, share in mixtures.items()}
    of_ffn = dict(spatial_mix_k=mixture, spatial_mix_r=mixture)
    with torch.no_grad():
        for module, named in ((att, values), (ffn, of_ffn)):
            for name, value in named.items():
                parameter = getattr(module, name)
                if parameter is not None:
                    parameter.copy_(value.view(parameter.shape))
