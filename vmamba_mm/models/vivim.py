"""ViViM, the spatio-temporal backbone of Video Mamba Suite (arXiv 2403.09626, section 4.5)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.families.vivim import FAMILY, grid_of
from vmamba_mm.layers import (
    BiMambaMixer,
    DecomposedBiMambaMixer,
    MambaBlock,
    PatchEmbed,
    RMSNorm,
    run_blocks,
    run_blocks_to,
)
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.layers.positions import resize_grid, resize_patches, resize_time
from vmamba_mm.models.flat import FlatBackbone
from vmamba_mm.models.vim import init_vim
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('resize_grid')
torch.fx.wrap('resize_time')
torch.fx.wrap('sum_and_norm')


@MODELS.register_module()
class ViViM(FlatBackbone):
    """A Vim for clips: the patches of all frames, and class tokens, in one long sequence.

    Tokens run frame by frame and row by row. A class token stands in the middle of every frame;
    the results of these are averaged after the last norm.

    Args:
        arch: a key of ``ViViM.arch_settings``, or a dict with the keys ``embed_dims`` (C),
            ``depth`` (blocks), ``d_state`` (N), ``expand`` (inner channels by C), ``mixer``
            ('bidirectional' for :class:`BiMambaMixer`, 'scan_norm' for the same with a norm before
            ``out_proj``, 'decomposed' for :class:`DecomposedBiMambaMixer`), ``cls_token``
            ('frame' for one in the middle of every frame, 'clip' for a single one in the middle
            of the clip), ``patch_size``, ``image_size`` (one int, or height and width) and
            ``num_frames`` of the position embeddings, and as it likes ``d_conv`` (4), ``dt_rank``
            ('auto' for ceil(C / 16)) and, of 'bidirectional', ``reduce`` ('mean', or 'sum' of the
            directions). With ``base``, the name of a published one, only the keys that differ from
            it. The default is 'tiny'.
        out_type: 'featmap' for maps of the blocks in ``out_indices``; 'cls_token' for the class
            token, the clip's feature, after the last block alone.
        out_indices: blocks to return; the last by default, which goes through the norm.
        drop_path_rate, frozen_stages, norm_eval, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`, a stage being a block.

    Shape:
        (B, in_channels, T, H, W) to a tuple: of (B, C, T, h, w) with h = H // patch_size, or of one
        (B, C). Sides smaller than a patch are padded with zeros, and what is left over is ignored.
        Position embeddings are resized where the input is not of ``image_size`` and
        ``num_frames``: bicubic in space, linear in time.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'tiny'
    stem = ('patch_embed', 'cls_token', 'pos_embed', 'temporal_embedding')

    @staticmethod
    def clip_length(arch: Mapping[str, Any]) -> int:
        return arch['num_frames']

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch = self.arch
        dims = arch['embed_dims']
        self.grid = grid_of(arch)
        num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(in_channels, dims, arch['patch_size'])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, dims))
        self.temporal_embedding = nn.Parameter(torch.zeros(arch['num_frames'], 1, dims))
        self.blocks = nn.ModuleList(MambaBlock(_mixer(arch), RMSNorm(dims), rate, with_cp)
                                    for rate in drop_path_rates)
        self.norm = RMSNorm(dims)
        init_vim(self.patch_embed, (self.cls_token, self.pos_embed), self.blocks)

    # --- loading ----------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, weights: str = 'auto',
                        map_location: Any = 'cpu', adapt_in_channels: bool = False,
                        strict: bool | None = None, allow: str | Sequence[str] = (),
                        from_vim: bool = False) -> None:
        """Load the backbone of a checkpoint, as every :class:`Backbone` does.

        Position embeddings of another image size or number of frames are resized to those of this
        model: bicubic in space, linear in time.

        Args:
            checkpoint, prefix, weights, map_location, adapt_in_channels, strict, allow: as of
                :meth:`vmamba_mm.models.pretrained.StrictLoading.load_pretrained`.
            from_vim: start from a Vim, with its class token in the middle, as published. All but
                the temporal embedding is in its files; that stays as it is in this model.

        Raises:
            UserError: as there, and if the file holds a Vim and ``from_vim`` is not said.
        """
        adapt = functools.partial(self._adapt, from_vim=from_vim, is_whole=not allow)
        self._load(adapt, checkpoint, prefix, weights, map_location, adapt_in_channels, strict,
                   allow)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._adapt(weights)

    def _find_backbone(self, *args):
        # Our Vim has its last norm as that of an output.
        name = f'norm{len(self.blocks) - 1}.weight'
        return {'norm.weight' if k == name else k: v
                for k, v in super()._find_backbone(*args).items()}

    def _adapt(self, weights, from_vim=False, is_whole=False):
        adapted, time = dict(weights), weights.get('temporal_embedding')
        if time is not None and time.dim() == 3:
            adapted['temporal_embedding'] = resize_time(time, self.arch['num_frames'])
        elif from_vim:
            adapted['temporal_embedding'] = self.temporal_embedding.detach()
        elif is_whole and set(weights) == set(self.state_dict()) - {'temporal_embedding'}:
            raise UserError('the file holds a Vim of images, and the model is a ViViM of clips: '
                            "load_pretrained and init_cfg=dict(type='Pretrained', ...) take "
                            'from_vim=True to start from it')
        if (pos := weights.get('pos_embed')) is not None and pos.dim() == 3:
            before, cls, after = _around_middle(pos)
            pos = resize_patches(torch.cat((before, after), dim=1), self.grid)
            adapted['pos_embed'] = _insert(pos, cls)
        return adapted

    # --- tokens -----------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """A clip's tokens, (B, L, C), and the size of their map, (T, h, w)."""
        batch, _, frames = x.shape[:3]
        x = self.patch_embed(x.transpose(1, 2).flatten(0, 1))
        height, width = x.shape[1:3]
        x = x.flatten(1, 2).unflatten(0, (batch, frames))  # (B, T, n, C)
        # The middle row of the embedding is the class token's.
        before, cls, after = _around_middle(self.pos_embed)
        pos = resize_grid(torch.cat((before, after), dim=1), self.grid, (height, width))
        time = resize_time(self.temporal_embedding, frames)
        x, cls = x + pos + time, self.cls_token + cls
        if self.arch['cls_token'] == 'frame':
            x = _insert(x, (cls + time).expand(batch, -1, -1, -1)).flatten(1, 2)
        else:
            x = _insert(x.flatten(1, 2), cls.expand(batch, -1, -1))
        return x, (frames, height, width)

    def _cls_tokens(self, tokens: Tensor, frames: int) -> Tensor:
        """(B, L, C) to the class tokens, (B, T, C), or (B, 1, C) of one for the clip."""
        if self.arch['cls_token'] == 'frame':
            return _around_middle(tokens.unflatten(1, (frames, -1)))[1].squeeze(2)
        return _around_middle(tokens)[1]

    def _map(self, tokens: Tensor, size: tuple[int, int, int]) -> Tensor:
        """(B, L, C) to the map of the patches, (B, T, h, w, C)."""
        if self.arch['cls_token'] == 'frame':
            tokens = tokens.unflatten(1, (size[0], -1))
        before, _, after = _around_middle(tokens)
        return torch.cat((before, after), dim=-2).reshape(tokens.shape[0], *size, -1)

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps after some blocks, before the norm, each (B, T, h, w, C).

        Args:
            x: (B, in_channels, T, H, W).
            indices: increasing numbers of blocks; none after the last one runs.
        """
        tokens, size = self._embed(x)
        return [self._map((residual + hidden).to(tokens.dtype), size)
                for _, (hidden, residual) in run_blocks_to(indices, self.blocks, tokens)]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.forward_cls_token(x),)

    def forward_cls_token(self, x: Tensor) -> Tensor:
        """(B, in_channels, T, H, W) to the clip's feature, (B, C)."""
        tokens, size = self._embed(x)
        hidden, residual = (self._cls_tokens(y, size[0])
                            for y in run_blocks(self.blocks, tokens))
        return sum_and_norm(self.norm, residual, hidden)[1].mean(1).to(tokens.dtype)


def _mixer(arch: Mapping[str, Any]) -> nn.Module:
    kwargs = {key: arch[key] for key in ('d_state', 'd_conv', 'expand', 'dt_rank') if key in arch}
    if arch['mixer'] == 'decomposed':
        return DecomposedBiMambaMixer(arch['embed_dims'], **kwargs)
    if arch['mixer'] == 'scan_norm':
        return BiMambaMixer(arch['embed_dims'], out_norm=True, **kwargs)
    return BiMambaMixer(arch['embed_dims'], reduce=arch.get('reduce', 'mean'), **kwargs)


def _around_middle(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., L, C), what stands before, in and after the middle: the class token, in odd lengths."""
    middle = (tokens.shape[-2] - 1) // 2
    return tokens.tensor_split((middle, middle + 1), dim=-2)


def _insert(tokens: Tensor, cls: Tensor) -> Tensor:
    """(..., L, C) with (..., 1, C) in the middle."""
    middle = tokens.shape[-2] // 2
    return torch.cat((tokens[..., :middle, :], cls, tokens[..., middle:, :]), dim=-2)
