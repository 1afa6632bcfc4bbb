"""The VideoMamba backbone of images and clips (arXiv 2403.06977)."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.families.videomamba import FAMILY
from vmamba_mm.layers import BiMambaMixer, LayerNorm, MambaBlock, RMSNorm, run_blocks
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.layers.positions import (
    pad_to_a_patch,
    resize_grid,
    resize_patches,
    resize_time,
)
from vmamba_mm.models.base import init_linear
from vmamba_mm.models.flat import FlatBackbone
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('_check_input')
torch.fx.wrap('_embed')
torch.fx.wrap('_to_maps')
torch.fx.wrap('_transpose')
torch.fx.wrap('pad_to_a_patch')
torch.fx.wrap('_with_frames')

_NORMS = {'rms': RMSNorm, 'ln': LayerNorm}
_INFLATIONS = ('center', 'mean')


@MODELS.register_module()
class VideoMamba(FlatBackbone):
    """VideoMamba as a backbone of images or clips.

    A class token and the patches of all frames, with position embeddings of space and time, go
    through bidirectional S6 blocks (section 3.2).

    Args:
        arch: a key of ``VideoMamba.arch_settings``, or a dict with the keys ``embed_dims`` (C),
            ``depth``, ``d_state`` (N), ``patch_size``, ``image_size`` (pixels, an int or height
            and width), ``num_frames`` (of a clip; 0 for a model of images) and ``tubelet_size``
            (frames of a patch), and as it likes ``d_conv`` (4), ``expand`` (2), ``dt_rank``
            ('auto' for ceil(C / 16)), ``norm`` ('rms' or 'ln') and ``order``, below. With
            ``base``, the name of a published one, only the keys that differ from it:
            ``dict(base='tiny_f8', num_frames=32)``. The default is 'tiny'.
        out_indices: blocks to return; the last by default, which goes through the norm.
        out_type: 'featmap' for the patches as maps, 'cls_token' for the class token, or 'raw' for
            all tokens, the class token first and then frame by frame, row by row.
        drop_path_rate, frozen_stages, norm_eval, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`, a stage being a block.

    The order of a clip's tokens in a block is 'spatial-first', as in all published files: frame by
    frame; or 'temporal-first': all frames of one place, then the next place. The paper tries mixes
    of the two (figure 7a), 'half-spatial-half-temporal', 'half-temporal-half-spatial' and
    'alternate' (there: Alternative SF&TF): here the first half of the blocks has the one order and
    the second half the other, or even blocks are spatial-first and odd ones temporal-first. Its
    'ST-Bidirectional' v1 and v2, which mix orders inside a block, are described too briefly to be
    built, and no code or file of them was published.

    Shape:
        (B, in_channels, H, W) for a model of images, (B, in_channels, T, H, W) for one of clips.
        With T' = T // tubelet_size, H' = H // patch_size and W' likewise (at least 1: what is
        smaller than a patch is padded with zeros, and what is left over is ignored), a tuple of
        maps (B, C, H', W') or (B, C, T', H', W'), of (B, C), or of (B, 1 + T'H'W', C). Position
        embeddings are interpolated where a clip has another size than the arch. A model of clips
        takes an image too, (B, in_channels, H, W), as one frame without a place in time, if its
        ``tubelet_size`` is 1; its maps are (B, C, H', W').

    Raises:
        ValueError: on a value that is not allowed, with the choices; on an input of another number
            of dimensions, or a clip shorter than ``tubelet_size``.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'tiny'
    stem = ('patch_embed', 'cls_token', 'spatial_pos_embed', 'temporal_pos_embed')
    out_types = ('featmap', 'cls_token', 'raw')

    @staticmethod
    def has_cls_token(arch: Mapping[str, Any]) -> bool:
        return True

    @staticmethod
    def clip_length(arch: Mapping[str, Any]) -> int:
        return arch['num_frames']

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch = self.arch
        dims, depth, patch, tubelet = (arch[k] for k in (
            'embed_dims', 'depth', 'patch_size', 'tubelet_size'))
        size = arch['image_size']
        height, width = (size, size) if isinstance(size, int) else size
        #: patches of an image: rows and columns
        self.grid = height // patch, width // patch
        frames = arch['num_frames'] // tubelet
        self.patch_embed = PatchEmbed(in_channels, dims, patch, tubelet if frames else None)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims))
        self.spatial_pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid), dims))
        self.register_parameter('temporal_pos_embed', nn.Parameter(torch.zeros(1, frames, dims))
                                if frames else None)
        norm = _NORMS[arch.get('norm', 'rms')]
        mixer_cfg = {key: arch[key] for key in ('d_state', 'd_conv', 'expand', 'dt_rank')
                     if key in arch}
        self.blocks = nn.ModuleList(
            MambaBlock(BiMambaMixer(dims, **mixer_cfg), norm(dims), rate, with_cp)
            for rate in drop_path_rates)
        self.norm = norm(dims)
        #: whether a block reads all frames of one place before the next place
        self.is_temporal_first = _is_temporal_first(arch.get('order', 'spatial-first'), depth)
        self._init_parameters()

    def _init_parameters(self):
        """As published: dt starts as any other Linear does, with a bias of 0."""
        self.apply(init_linear)
        nn.init.trunc_normal_(self.spatial_pos_embed, std=0.02)
        for block in self.blocks:
            weight = block.mixer.out_proj.weight
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            weight.data /= math.sqrt(len(self.blocks))

    # --- forward ------------------------------------------------------------------------------

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens, patches = self.embed(x)
        outs = []
        for i, hidden, residual in self.run_blocks(tokens, patches, self.out_indices):
            if self.out_type == 'cls_token':
                hidden, residual = hidden[:, 0], residual[:, 0]
            else:
                hidden, residual = (self._to_spatial_first(i, y, patches)
                                    for y in (hidden, residual))
            outs.append(self.add_and_norm(i, hidden, residual))
        return tuple(outs)

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some blocks before the norm, (B, H', W', C) or (B, T', H', W', C)."""
        return [maps for _, maps in self.forward_with_cls(x, indices)]

    def forward_with_cls(self, x: Tensor, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        tokens, patches = self.embed(x)
        outs = []
        for i, hidden, residual in self.run_blocks(tokens, patches, indices):
            tokens = self._to_spatial_first(i, residual + hidden, patches)
            outs.append((tokens[:, :1], _to_maps(tokens, patches, x)))
        return outs

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, 1 + T'H'W', C) of images or clips, and the patches (B, T', H', W', C)
        before their position embeddings."""
        arch = self.arch
        patches = self.patch_embed(_check_input(x, arch['num_frames'], arch['tubelet_size']))
        return _embed(x, patches, self.cls_token, self.spatial_pos_embed,
                      self.temporal_pos_embed, self.grid), patches

    def run_blocks(self, tokens: Tensor, patches: Tensor | None, indices: Sequence[int]
                   ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run the blocks up to the last of ``indices``, and give number, hidden and residual after
        each of these.

        Args:
            tokens: (B, L, C), spatial-first.
            patches: as :meth:`embed` gives them; None for a part of the tokens, which only the
                order 'spatial-first' can take.
            indices: increasing numbers of blocks.

        Yields:
            i, hidden and residual of :class:`vmamba_mm.layers.MambaBlock`, in the order of block i.
        """
        blocks, orders = list(self.blocks[:indices[-1] + 1]), self.is_temporal_first
        streams, is_temporal, begin = (tokens,), False, 0
        for i in range(len(blocks)):
            if orders[i] != is_temporal:
                is_temporal = not is_temporal
                streams = tuple(_transpose(y, patches, is_temporal) for y in streams)
            if i in indices or orders[i + 1] != is_temporal:
                streams = run_blocks(blocks[begin:i + 1], *streams)
                begin = i + 1
            if i in indices:
                yield i, *streams

    def add_and_norm(self, i: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """The output of block ``i``: the sum of both, through the norm if the block is the last."""
        norm = self.output_norm(i)
        y = residual + hidden if norm is None else sum_and_norm(norm, residual, hidden)[1]
        return y.to(self.spatial_pos_embed.dtype)

    def norm_output(self, i: int, x: Tensor) -> Tensor:
        # Of a sum that is fp32 in a half too.
        return super().norm_output(i, x).to(self.spatial_pos_embed.dtype)

    def _to_spatial_first(self, i, tokens, patches):
        return _transpose(tokens, patches, False) if self.is_temporal_first[i] else tokens

    # --- loading ------------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, weights: str = 'auto',
                        map_location: Any = 'cpu', adapt_in_channels: bool = False,
                        strict: bool | None = None, allow: str | Sequence[str] = (),
                        inflate: str | None = None) -> None:
        """Load the backbone of a checkpoint, as every :class:`Backbone` does.

        Position embeddings of another image size or number of frames are interpolated to those of
        this model: bicubic in space, linear in time, from the size that they have in the file.

        Args:
            checkpoint, prefix, weights, map_location, adapt_in_channels, strict, allow: as of
                :meth:`vmamba_mm.models.pretrained.StrictLoading.load_pretrained`.
            inflate: start a model of clips from one of images: 'center' puts the patch embedding
                into the middle frame of a tubelet, and zeros into the others, as published; 'mean'
                spreads it over all of them. The temporal embedding stays as it is in this model.

        Raises:
            ValueError: on another ``inflate``.
            UserError: as there, and if the file holds a model of images and ``inflate`` is None.
        """
        if inflate not in (None, *_INFLATIONS):
            raise ValueError(f'inflate={inflate!r} does not exist; choose one of {_INFLATIONS}')
        self._load(functools.partial(self.adapt_weights, inflate=inflate), checkpoint, prefix,
                   weights, map_location, adapt_in_channels, strict, allow)

    def adapt_weights(self, weights: dict[str, Tensor], inflate: str | None = None
                      ) -> dict[str, Tensor]:
        adapted = dict(weights)
        patches, ours = weights.get('patch_embed.proj.weight'), self.patch_embed.proj.weight
        if patches is not None and patches.dim() == 4 and ours.dim() == 5:
            if inflate is None:
                raise UserError("the file holds a VideoMamba of images, and the model is one of "
                                "clips: load_pretrained and init_cfg=dict(type='Pretrained', ...) "
                                "take inflate='center' (as published) or 'mean' to start from it")
            adapted['patch_embed.proj.weight'] = _inflate(patches, ours.shape[2], inflate)
            adapted.setdefault('temporal_pos_embed', self.temporal_pos_embed.detach())
        if 'spatial_pos_embed' in adapted:
            ours, held = self.temporal_pos_embed, adapted.get('temporal_pos_embed')
            frames = 0 if ours is None else ours.shape[1]  # a file of clips is none for images
            adapted['spatial_pos_embed'], resized = resize_pos_embeds(
                adapted['spatial_pos_embed'], held if frames else None, (frames, *self.grid))
            if resized is not None:
                adapted['temporal_pos_embed'] = resized
        return adapted


class PatchEmbed(nn.Module):
    """Non-overlapping patches of images or clips: (B, T', H', W', C), T' being 1 of an image.

    Args:
        in_channels: channels of the input.
        embed_dims: C.
        patch_size: pixels of a side.
        tubelet_size: frames of a patch; None for a 2-D kernel, of images.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int,
                 tubelet_size: int | None = None):
        super().__init__()
        if tubelet_size is None:
            self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)
        else:
            size = tubelet_size, patch_size, patch_size
            self.proj = nn.Conv3d(in_channels, embed_dims, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(pad_to_a_patch(x, self.proj.kernel_size[-1]))
        return _with_frames(x).permute(0, 2, 3, 4, 1)


# --- tokens -------------------------------------------------------------------------------------

def _with_frames(x: Tensor) -> Tensor:
    return x if x.dim() == 5 else x.unsqueeze(2)


def _check_input(x: Tensor, num_frames: int, tubelet_size: int) -> Tensor:
    """The input of the patch embedding: an image as a clip of one frame for a model of clips."""
    if num_frames and x.dim() == 4 and tubelet_size == 1:
        return x.unsqueeze(2)
    expected = '(B, C, T, H, W)' if num_frames else '(B, C, H, W)'
    if x.dim() != (5 if num_frames else 4):
        raise ValueError(f'this VideoMamba takes {"clips" if num_frames else "images"}, '
                         f'{expected}, got a tensor of shape {tuple(x.shape)}')
    if num_frames and x.shape[2] < tubelet_size:
        raise ValueError(f'a clip must have at least {tubelet_size} frames, the tubelet_size, got '
                         f'{x.shape[2]}')
    return x


def _embed(x: Tensor, patches: Tensor, cls_token: Tensor, spatial: Tensor,
           temporal: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """The patches (B, T, H, W, C) of x to (B, 1 + THW, C): the class token, then frame by frame.

    The class token has a place in space alone, and so has an image.
    """
    batch, frames, height, width, dims = patches.shape
    places = resize_grid(spatial[:, 1:], grid, (height, width))
    tokens = patches + places.reshape(1, 1, height, width, dims)
    if temporal is not None and x.dim() == 5:
        tokens = tokens + _resize_frames(temporal, frames).reshape(1, frames, 1, 1, dims)
    first = (cls_token + spatial[:, :1]).expand(batch, 1, dims).to(tokens.dtype)
    return torch.cat([first, tokens.reshape(batch, -1, dims)], dim=1)


def _to_maps(tokens: Tensor, patches: Tensor, x: Tensor) -> Tensor:
    """Tokens, spatial-first, without the class token: (B, T, H, W, C), or (B, H, W, C) of an
    image x."""
    maps = tokens[:, 1:].reshape(patches.shape)
    return maps.squeeze(1) if x.dim() == 4 else maps


def _transpose(tokens: Tensor, patches: Tensor, to_temporal_first: bool) -> Tensor:
    """Tokens (B, 1 + THW, C) from the one order to the other; the class token stays first."""
    batch, frames, height, width, dims = patches.shape
    size = (frames, height * width) if to_temporal_first else (height * width, frames)
    rest = tokens[:, 1:].reshape(batch, *size, dims).transpose(1, 2).flatten(1, 2)
    return torch.cat([tokens[:, :1], rest], dim=1)


def _is_temporal_first(order: str, depth: int) -> list[bool]:
    """Whether each block reads all frames of one place before the next place."""
    half = depth // 2
    return {'spatial-first': [False] * depth,
            'temporal-first': [True] * depth,
            'half-spatial-half-temporal': [i >= half for i in range(depth)],
            'half-temporal-half-spatial': [i < half for i in range(depth)],
            'alternate': [i % 2 == 1 for i in range(depth)]}[order]


# --- position embeddings and first convolutions of other sizes ----------------------------------

def resize_pos_embeds(spatial: Tensor, temporal: Tensor | None, size: tuple[int, int, int]
                      ) -> tuple[Tensor, Tensor | None]:
    """Position embeddings of a file for another size: bicubic in space, linear in time.

    Args:
        spatial: (1, 1 + n, C), that of the class token first, of H*W places or of a square.
        temporal: (1, T, C), or None.
        size: T, H and W that are wanted.

    Raises:
        UserError: if n is neither the number of places that are wanted, nor that of a square.
    """
    frames, height, width = size
    spatial = torch.cat([spatial[:, :1], resize_patches(spatial[:, 1:], (height, width))], dim=1)
    return spatial, None if temporal is None else _resize_frames(temporal, frames)


def _resize_frames(temporal: Tensor, frames: int) -> Tensor:
    return resize_time(temporal.transpose(0, 1), frames).transpose(0, 1)


def _inflate(weight: Tensor, tubelet_size: int, how: str) -> Tensor:
    """The kernel (C, I, k, k) of images for clips: (C, I, tubelet_size, k, k)."""
    frames = weight.unsqueeze(2).repeat(1, 1, tubelet_size, 1, 1)
    if how == 'mean':
        return frames / tubelet_size
    frames[:, :, :tubelet_size // 2] = 0
    frames[:, :, tubelet_size // 2 + 1:] = 0
    return frames
