"""The adapter of Vision-RWKV for dense tasks: that of ViT-Adapter (arXiv 2205.08534, section 3)."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.families.vision_rwkv import ADAPTERS
from vmamba_mm.layers import DropPath, LayerNorm
from vmamba_mm.models.base import init_linear
from vmamba_mm.models.vision_rwkv import VisionRWKV
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.registry import MODELS

Sizes = Sequence[tuple[int, int]]
_FEATURES = ('last', 'each')
#: Strides of the maps by that of the backbone's, 16.
_SCALES = (4, 2, 1, 0.5)


# --- deformable attention -------------------------------------------------------------------------

def deformable_attention(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values at points of several maps (arXiv 2010.04159, equation 3).

    Args:
        value: (B, N, H', D), the maps of all levels, one after the other, by heads.
        sizes: height and width of each level.
        locations: (B, Q, H', levels, points, 2), x and y, from 0 to 1; outside values are 0. The
            sums are calculated in their dtype.
        weights: (B, Q, H', levels, points).

    Returns:
        (B, Q, H' * D), in the dtype of ``value``.
    """
    batch, queries, heads = locations.shape[:3]
    # (B H', levels, Q, points, ...)
    grids, weights = (t.to(locations.dtype).movedim(1, 3).flatten(0, 1)
                      for t in (2 * locations - 1, weights))
    y = 0
    for i, (size, level) in enumerate(zip(sizes, _split_levels(value, sizes), strict=True)):
        maps = level.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size)
        points = F.grid_sample(maps, grids[:, i], align_corners=False)  # (B H', D, Q, points)
        y = y + (points * weights[:, None, i]).sum(-1)
    return y.view(batch, -1, queries).mT.to(value.dtype)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (arXiv 2010.04159, section 4.1).

    Args:
        dim: C.
        num_heads: heads.
        num_levels: maps that are read.
        num_points: that a query reads in each of them.
        value_ratio: channels of the values by C.

    Shape:
        queries (B, Q, C), their places (Q, 2) from 0 to 1 and the tokens of all levels (B, N, C) to
        (B, Q, C).

    Raises:
        ValueError: if the heads do not divide the channels of the values.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int,
                 value_ratio: float):
        super().__init__()
        inner = int(dim * value_ratio)
        if inner < 1 or inner % num_heads:
            raise ValueError(f'deform_num_heads={num_heads} must divide the {inner} channels of '
                             f'values, deform_ratio={value_ratio} of {dim}')
        self.shape = num_heads, num_levels, num_points
        count = math.prod(self.shape)
        self.sampling_offsets = nn.Linear(dim, 2 * count)
        self.attention_weights = nn.Linear(dim, count)
        self.value_proj = nn.Linear(dim, inner)
        self.output_proj = nn.Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first points lie around a query, one direction a head, point i i steps away."""
        heads, levels, points = self.shape
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None]
        offsets = (directions[:, None, None] * steps).expand(heads, levels, points, 2)
        with torch.no_grad():
            for linear in (self.sampling_offsets, self.attention_weights):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
            self.sampling_offsets.bias.copy_(offsets.flatten())
            for linear in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, places: Tensor, tokens: Tensor, sizes: Sizes) -> Tensor:
        heads, levels, points = self.shape
        value = self.value_proj(tokens).unflatten(-1, (heads, -1))
        # In fp32 at least: in bf16 places on a map of 167 columns would be off by a third of one.
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        by_size = offsets.new_tensor([(width, height) for height, width in sizes],
                                     dtype=compute_dtype(offsets.dtype))
        locations = places[:, None, None, None] + offsets / by_size[:, None]
        weights = self.attention_weights(query).unflatten(-1, (heads, -1)).softmax(-1)
        return self.output_proj(deformable_attention(
            value, sizes, locations, weights.unflatten(-1, (levels, points))))


def _split_levels(tokens: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """(B, N, ...) of all levels to the (B, H * W, ...) of each."""
    return tokens.split([height * width for height, width in sizes], dim=1)


def _places(sizes: Sizes, like: Tensor) -> Tensor:
    """x and y of the middle of each position of maps, from 0 to 1: (N, 2)."""
    dtype, places = compute_dtype(like.dtype), []
    for height, width in sizes:
        y, x = ((torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n
                for n in (height, width))
        places.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1))
    return torch.cat([part.flatten(0, 1) for part in places])


# --- the two streams ------------------------------------------------------------------------------

def _as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H * W, C) to (B, C, H, W)."""
    return tokens.mT.unflatten(2, size)


class Injector(nn.Module):
    """What the pyramid tells the backbone: ``x + gamma * attention(x, pyramid)``.

    Args:
        dim, num_heads, num_points, value_ratio: as of :class:`DeformableAttention`.
        init_values: of gamma.

    Shape:
        tokens of the backbone (B, H * W, C), of the pyramid (B, N, C), ``(H, W)`` and the sizes of
        the pyramid's levels to (B, H * W, C).
    """

    def __init__(self, dim: int, num_heads: int, num_points: int, value_ratio: float,
                 init_values: float = 0.0):
        super().__init__()
        self.query_norm, self.feat_norm = (LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = DeformableAttention(dim, num_heads, 3, num_points, value_ratio)
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor, pyramid: Tensor, size: tuple[int, int], sizes: Sizes) -> Tensor:
        attended = self.attn(self.query_norm(x), _places([size], x), self.feat_norm(pyramid), sizes)
        return x + self.gamma * attended


class DepthwiseConv(nn.Module):
    """A 3x3 depthwise convolution, one for the maps of all levels: (B, N, C) and their sizes to
    (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, sizes: Sizes) -> Tensor:
        return torch.cat([self.dwconv(_as_map(part, size)).flatten(2).mT for part, size in zip(
            _split_levels(tokens, sizes), sizes, strict=True)], dim=1)


class ConvFFN(nn.Module):
    """An MLP of the tokens of all levels, with a depthwise convolution before its GELU: (B, N, C)
    and the sizes of the levels to (B, N, C)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, sizes: Sizes) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(tokens), sizes)))


class Extractor(nn.Module):
    """What the backbone tells the pyramid: attention to its map, and a :class:`ConvFFN`.

    Args:
        dim, num_heads, num_points, value_ratio: as of :class:`DeformableAttention`.
        cffn_ratio: hidden channels of the ConvFFN by C.
        drop_path: probability to drop the ConvFFN.

    Shape:
        tokens of the pyramid (B, N, C), of the backbone (B, H * W, C), ``(H, W)`` and the sizes of
        the pyramid's levels to (B, N, C).
    """

    def __init__(self, dim: int, num_heads: int, num_points: int, value_ratio: float,
                 cffn_ratio: float, drop_path: float):
        super().__init__()
        self.query_norm, self.feat_norm, self.ffn_norm = (
            LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn = DeformableAttention(dim, num_heads, 1, num_points, value_ratio)
        self.ffn = ConvFFN(dim, int(dim * cffn_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, pyramid: Tensor, x: Tensor, size: tuple[int, int], sizes: Sizes) -> Tensor:
        pyramid = pyramid + self.attn(self.query_norm(pyramid), _places(sizes, pyramid),
                                      self.feat_norm(x), [size])
        return pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), sizes))


class Interaction(nn.Module):
    """An injector before some blocks of the backbone, and extractors after them."""

    def __init__(self, injector: Injector, extractors: Sequence[Extractor]):
        super().__init__()
        self.injector, self.extractor = injector, extractors[0]
        self.extra_extractors = nn.ModuleList(extractors[1:])

    def forward(self, x: Tensor, pyramid: Tensor, blocks: Sequence[nn.Module], sizes: Sizes
                ) -> tuple[Tensor, Tensor]:
        """The map of the backbone (B, H, W, C) and the tokens of the pyramid (B, N, C), anew."""
        size = tuple(x.shape[1:3])
        x = self.injector(x.flatten(1, 2), pyramid, size, sizes).unflatten(1, size)
        for block in blocks:
            x = block(x)
        tokens = x.flatten(1, 2)
        for extractor in (self.extractor, *self.extra_extractors):
            pyramid = extractor(pyramid, tokens, size, sizes)
        return x, pyramid


def _conv_norm(dim: int, out_dim: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, out_dim, 3, stride, 1, bias=False), nn.BatchNorm2d(out_dim),
            nn.ReLU(inplace=True)]


class SpatialPrior(nn.Module):
    """Convolutions of the image: (B, in_channels, H, W) to maps of strides 4, 8, 16 and 32 with
    ``dim`` channels."""

    def __init__(self, in_channels: int, planes: int, dim: int):
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm(in_channels, planes, 2), *_conv_norm(planes, planes, 1),
            *_conv_norm(planes, planes, 1), nn.MaxPool2d(3, 2, 1))
        widths = [planes, 2 * planes, 4 * planes, 4 * planes]
        for i, (width, out_width) in enumerate(pairwise(widths), 2):
            self.add_module(f'conv{i}', nn.Sequential(*_conv_norm(width, out_width, 2)))
        for i, width in enumerate(widths, 1):
            self.add_module(f'fc{i}', nn.Conv2d(width, dim, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for conv in (self.conv2, self.conv3, self.conv4):
            maps.append(conv(maps[-1]))
        return [fc(one) for fc, one in zip((self.fc1, self.fc2, self.fc3, self.fc4), maps,
                                           strict=True)]


# --- the adapter ----------------------------------------------------------------------------------

@MODELS.register_module()
class VisionRWKVAdapter(VisionRWKV):
    """Vision-RWKV with the adapter of its published detectors and segmentors (arXiv 2403.02308,
    section 4.2): a pyramid of convolutions, which exchanges what it knows with the backbone.

    Args:
        arch: as of :class:`vmamba_mm.models.VisionRWKV`; patches of 16 pixels, at least 4 blocks.
        features: 'last' adds the last block's map to all outputs, as the published detectors do;
            'each' adds the map after interaction i to output i, as the published segmentors do.
        interactions: the first and the last block of each of the four interactions; None for four
            equal parts of all blocks.
        conv_inplane: channels of the first convolution.
        n_points: of deformable attention, a query in each map.
        deform_num_heads: its heads; None for those of the published adapter of the arch, or of the
            one that it has for a ``base``, else 6.
        deform_ratio: channels of its values by those of the backbone; None likewise, else 1.
        cffn_ratio: hidden channels of the extractors' MLPs by those of the backbone.
        drop_path_rate: of the last block, as of :class:`Backbone`, and of all extractors.
        in_channels, frozen_stages, norm_eval, with_cp, compile, init_cfg: as of :class:`Backbone`.
            Weights of ``init_cfg`` may be those of a classifier, without the adapter, which then
            starts anew.

    Shape:
        (B, in_channels, H, W), H and W multiples of 32, to a tuple of four maps (B, C, h, w) of
        strides 4, 8, 16 and 32.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        UserError: on an image of another size.
    """

    out_types = ('featmap',)

    def __init__(self, arch: str | Mapping[str, Any] | None = None, features: str = 'last',
                 interactions: Sequence[Sequence[int]] | None = None, conv_inplane: int = 64,
                 n_points: int = 4, deform_num_heads: int | None = None,
                 deform_ratio: float | None = None, cffn_ratio: float = 0.25,
                 drop_path_rate: float = 0.0, in_channels: int = 3, **backbone):
        if features not in _FEATURES:
            raise ValueError(f'features={features!r} does not exist; choose one of {_FEATURES}')
        # Outputs come through the pyramid, without the norm that the last block's map has.
        super().__init__(arch, (0,), drop_path_rate=drop_path_rate, in_channels=in_channels,
                         **backbone)
        dim, depth, patch_size = (self.arch[k] for k in ('embed_dims', 'depth', 'patch_size'))
        if patch_size != 16 or depth < 4:
            raise ValueError('the adapter needs an arch with patches of 16 pixels and at least 4 '
                             f"blocks, got arch['patch_size']={patch_size} and "
                             f"arch['depth']={depth}")
        self.features, self.out_indices = features, (0, 1, 2, 3)
        self.interaction_blocks = _check_interactions(interactions, depth)
        usual = _published_adapter(arch or self.default_arch)
        attention = (
            dim, usual['deform_num_heads'] if deform_num_heads is None else deform_num_heads,
            n_points, usual['deform_ratio'] if deform_ratio is None else deform_ratio)
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.spm = SpatialPrior(in_channels, conv_inplane, dim)
        self.interactions = nn.ModuleList(
            Interaction(Injector(*attention), [
                Extractor(*attention, cffn_ratio, drop_path_rate) for _ in range(count)])
            for count in (1, 1, 1, 3))
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        for i in range(1, 5):
            self.add_module(f'norm{i}', nn.BatchNorm2d(dim))
        for part in (self.spm, self.interactions, self.up):
            part.apply(_init_adapter)
        for module in self.interactions.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    @classmethod
    def arguments_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments beside ``arch`` that weights tell. Of the heads and points of deformable
        attention that is their product alone."""
        (dim,), part = weights['norm1.weight'].shape, 'interactions.0.extractor'
        return dict(
            in_channels=weights['spm.stem.0.weight'].shape[1],
            conv_inplane=len(weights['spm.stem.0.weight']), deform_num_heads=1,
            n_points=len(weights[f'{part}.attn.attention_weights.weight']),
            deform_ratio=len(weights[f'{part}.attn.value_proj.weight']) / dim,
            cffn_ratio=len(weights[f'{part}.ffn.fc1.weight']) / dim)

    def output_norm(self, i: int) -> None:
        """None: the adapter's norms are no part of the backbone, which stages freeze."""

    def forward_channels_last(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[-2:]
        if height % 32 or width % 32:
            raise UserError(f'the adapter takes images whose sides are multiples of 32 pixels, got '
                            f'{height}x{width}; pad them, as by pad_size_divisor=32 of the data '
                            'preprocessor, or size=(..., ...) of a segmentor\'s')
        first, *rest = self.spm(x)
        sizes = [tuple(one.shape[2:]) for one in rest]
        pyramid = torch.cat([one.flatten(2).mT + embed for one, embed in zip(
            rest, self.level_embed, strict=True)], dim=1)
        x, maps = self.embed(x), []
        for interaction, (begin, end) in zip(self.interactions, self.interaction_blocks,
                                             strict=True):
            x, pyramid = interaction(x, pyramid, self.blocks[begin:end + 1], sizes)
            maps.append(x.movedim(-1, 1))
        if self.features == 'last':
            maps = maps[-1:] * 4
        outs = [_as_map(part, size) for part, size in zip(
            _split_levels(pyramid, sizes), sizes, strict=True)]
        outs.insert(0, self.up(outs[0]) + first)
        norms = self.norm1, self.norm2, self.norm3, self.norm4
        return tuple(norm(out + _resize(one, scale)) for norm, out, one, scale in zip(
            norms, outs, maps, _SCALES, strict=True))


def _resize(x: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return x
    return F.interpolate(x, scale_factor=scale, mode='bilinear', align_corners=False)


def _published_adapter(arch: str | Mapping[str, Any]) -> Mapping[str, Any]:
    name = arch if isinstance(arch, str) else arch.get('base')
    return ADAPTERS.get(name, dict(deform_num_heads=6, deform_ratio=1.0))


def _check_interactions(given: Sequence[Sequence[int]] | None, depth: int) -> list[tuple[int, int]]:
    if given is None:
        cuts = [depth * i // 4 for i in range(5)]
        return [(begin, end - 1) for begin, end in pairwise(cuts)]
    pairs = [tuple(pair) for pair in given]
    expected = 0
    for pair in pairs:
        if len(pair) != 2 or pair[0] != expected or pair[1] < pair[0]:
            break
        expected = pair[1] + 1
    if len(pairs) != 4 or expected != depth:
        raise ValueError(f'interactions must be the first and the last block of four parts of the '
                         f'{depth} blocks, in order, such as '
                         f'{_check_interactions(None, depth)}, got {given!r}')
    return pairs


def _init_adapter(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
