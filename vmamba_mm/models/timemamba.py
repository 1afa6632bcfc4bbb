"""TimeMamba, a temporal adapter of CLIP's image encoder (arXiv 2403.09626, section 4.4)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.checkpoints.files import fetch
from vmamba_mm.checkpoints.formats import read_content
from vmamba_mm.checkpoints.prefixes import inside
from vmamba_mm.errors import UserError
from vmamba_mm.families.names import has_row, rename
from vmamba_mm.families.timemamba import CLIP_KEYS, FAMILY
from vmamba_mm.families.vivim import grid_of
from vmamba_mm.layers import BiMambaMixer, DropPath, LayerNorm, Mlp, PatchEmbed, SelfAttention
from vmamba_mm.layers.positions import resize_grid, resize_patches
from vmamba_mm.models.flat import FlatBackbone
from vmamba_mm.models.pretrained import check_fits
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('resize_grid')

#: Names of what a CLIP has not.
_OF_TIME = re.compile(r'\.(?:time_mamba|norm3|alpha_timeattn)(?:\.|$)')


class TimeMambaBlock(nn.Module):
    """A block of a ViT with a mixer over time before its attention, which is within frames.

    The mixer's result is scaled by tanh of ``alpha_timeattn``, which starts as 0: then the block
    is that of the ViT, on each frame. The class token takes part in the attention of every frame,
    and gets the mean of what they answer.

    Args:
        dim: C.
        num_heads: of the attention.
        mlp_ratio: hidden width of the MLP by C.
        style: what the attention's result is added to: 'frozen-in-time', to the block's input
            (arXiv 2104.00650), and 'timesformer-div', to the sum with the mixer's result (arXiv
            2102.05095), have a sequence over time for each patch; 'frozen-joint' is the first with
            one sequence of the whole clip, in which the frames of a patch follow one another.
        d_state, expand: of :class:`BiMambaMixer`.
        drop_path: probability to drop the MLP's branch, the only one that is dropped.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, 1 + T * n, C), the class token first and then the patches frame by frame, and the
    number T of frames -> (B, 1 + T * n, C).
    """

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: float, style: str, d_state: int,
                 expand: float, drop_path: float, with_cp: bool):
        super().__init__()
        self.style = style
        self.with_cp = with_cp
        self.alpha_timeattn = nn.Parameter(torch.zeros(1))
        self.norm1 = _norm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = _norm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.norm3 = _norm(dim)
        self.time_mamba = BiMambaMixer(dim, d_state=d_state, expand=expand)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, frames,
                                                     use_reentrant=False)
        return self._forward(x, frames)

    def _forward(self, x, frames):
        cls, patches = x[:, :1], x[:, 1:].unflatten(1, (frames, -1))
        mixed = patches + torch.tanh(self.alpha_timeattn) * self._mix_over_time(
            self.norm3(patches))
        each_frame = torch.cat((cls.unsqueeze(1).expand(-1, frames, -1, -1), mixed), dim=2)
        y = self.attn(self.norm1(each_frame).flatten(0, 1)).unflatten(0, (-1, frames))
        patches = (mixed if self.style == 'timesformer-div' else patches) + y[:, :, 1:]
        x = torch.cat((cls + y[:, :, 0].mean(1, keepdim=True), patches.flatten(1, 2)), dim=1)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _mix_over_time(self, x: Tensor) -> Tensor:
        """(B, T, n, C) by sequences over time, patch after patch."""
        batch, frames, patches, _ = x.shape
        x = x.transpose(1, 2)
        if self.style == 'frozen-joint':
            y = self.time_mamba(x.flatten(1, 2)).unflatten(1, (patches, frames))
        else:
            y = self.time_mamba(x.flatten(0, 1)).unflatten(0, (batch, patches))
        return y.transpose(1, 2)


@MODELS.register_module()
class TimeMamba(FlatBackbone):
    """CLIP's ViT with a bidirectional mixer over time in every block.

    There is no embedding of time; the mixers are all that knows the order of frames.

    Args:
        arch: a key of ``TimeMamba.arch_settings``, or a dict with the keys ``embed_dims`` (C),
            ``depth`` (blocks), ``num_heads``, ``mlp_ratio``, ``d_state`` (N) and ``expand`` of the
            mixers, ``patch_size``, ``image_size`` (one int, or height and width, of the position
            embedding) and ``style`` ('frozen-in-time', 'timesformer-div' or 'frozen-joint', as of
            :class:`TimeMambaBlock`). With ``base``, the name of a published one, only the keys
            that differ from it. The default is 'base_vanilla'.
        out_type: 'featmap' for maps of the blocks in ``out_indices``; 'cls_token' for the class
            token, the clip's feature, after the last block alone.
        out_indices: blocks to return; the last by default, which goes through the norm.
        drop_path_rate: of the MLPs.
        frozen_stages, norm_eval, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`, a stage being a block.

    Shape:
        (B, in_channels, T, H, W), any T, to a tuple: of (B, C, T, h, w) with h = H // patch_size,
        or of one (B, C). Sides smaller than a patch are padded with zeros, and what is left over
        is ignored. The position embedding is resized, bicubic, where the input is not of
        ``image_size``.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'base_vanilla'
    stem = ('patch_embed', 'cls_token', 'pos_embed', 'ln_pre')

    @staticmethod
    def clip_length(arch: Mapping[str, Any]) -> int:
        return 4  # of the published pre-training; any number goes

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch = self.arch
        dims = arch['embed_dims']
        self.grid = grid_of(arch)
        # No bias: the norm after it has one, as in CLIP.
        self.patch_embed = PatchEmbed(in_channels, dims, arch['patch_size'], bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, dims))
        self.ln_pre = LayerNorm(dims)
        kwargs = {key: arch[key] for key in ('num_heads', 'mlp_ratio', 'style', 'd_state',
                                             'expand')}
        self.blocks = nn.ModuleList(TimeMambaBlock(dims, drop_path=rate, with_cp=with_cp, **kwargs)
                                    for rate in drop_path_rates)
        self.norm = _norm(dims)
        for embed in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(embed, std=0.02)

    # --- loading ----------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, weights: str = 'auto',
                        map_location: Any = 'cpu', adapt_in_channels: bool = False,
                        strict: bool | None = None, allow: str | Sequence[str] = (),
                        from_clip: bool = False) -> None:
        """Load the backbone of a checkpoint, as every :class:`Backbone` does.

        A position embedding of another image size is resized to this model's, bicubic.

        Args:
            checkpoint, prefix, weights, map_location, adapt_in_channels, strict, allow: as of
                :meth:`vmamba_mm.models.pretrained.StrictLoading.load_pretrained`.
            from_clip: start from the image encoder of a CLIP, as published: a state dict with the
                names of OpenAI's code and of open_clip, such as ``visual.conv1.weight``. All but
                the mixers over time, their norms and gates is in it; these stay as they are. On
                each frame the model is then CLIP's, but for GELU in place of its approximation
                ('QuickGELU') in OpenAI's weights, and the eps of norms.

        Raises:
            UserError: as there, and if there is no such encoder in the file.
        """
        if not from_clip:
            super().load_pretrained(checkpoint, prefix, weights, map_location, adapt_in_channels,
                                    strict, allow)
            return
        found = _from_clip(read_content(fetch(checkpoint), map_location), checkpoint)
        if adapt_in_channels:
            self._adapt_stem(found, self.state_dict(), checkpoint)
        found = {k: v for k, v in self.state_dict().items() if _OF_TIME.search(k)} \
            | self.adapt_weights(found)
        left = check_fits(self, found, checkpoint, strict, allow)
        self.load_state_dict({k: v for k, v in found.items() if k not in left}, strict=False)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The position embedding, resized where it is of another image size."""
        pos = weights.get('pos_embed')
        if pos is None or pos.dim() != 3:
            return weights
        pos = torch.cat((pos[:, :1], resize_patches(pos[:, 1:], self.grid)), dim=1)
        return weights | {'pos_embed': pos}

    # --- forward ----------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """A clip's tokens, (B, 1 + T * n, C), and the size of their map, (T, h, w)."""
        batch, _, frames = x.shape[:3]
        x = self.patch_embed(x.transpose(1, 2).flatten(0, 1))
        height, width = x.shape[1:3]
        pos = resize_grid(self.pos_embed[:, 1:], self.grid, (height, width))
        x = x.flatten(1, 2) + pos
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        x = torch.cat((cls, x.unflatten(0, (batch, frames)).flatten(1, 2)), dim=1)
        return self.ln_pre(x), (frames, height, width)

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps after some blocks, before the norm, each (B, T, h, w, C).

        Args:
            x: (B, in_channels, T, H, W).
            indices: increasing numbers of blocks; none after the last one runs.
        """
        x, size = self._embed(x)
        maps = []
        for i, block in enumerate(self.blocks[:indices[-1] + 1]):
            x = block(x, size[0])
            if i in indices:
                maps.append(x[:, 1:].unflatten(1, size))
        return maps

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.forward_cls_token(x),)

    def forward_cls_token(self, x: Tensor) -> Tensor:
        """(B, in_channels, T, H, W) to the clip's feature, (B, C)."""
        x, size = self._embed(x)
        for block in self.blocks:
            x = block(x, size[0])
        return self.norm(x[:, 0])


def _from_clip(content: Any, name: str) -> dict[str, Tensor]:
    """The image encoder of a CLIP by our names.

    Raises:
        UserError: if there is none, or a name that it has not.
    """
    state = content.get('state_dict', content) if isinstance(content, Mapping) else {}
    prefix = next((k.removesuffix('class_embedding') for k in state
                   if str(k).endswith('class_embedding')), None)
    if prefix is None:
        raise UserError(f'{name} holds no image encoder of a CLIP: nothing is called '
                        'class_embedding, as in the weights of OpenAI and open_clip')
    found = {}
    for key, value in inside(state, prefix).items():
        if not prefix and not has_row(key, CLIP_KEYS):
            continue  # of the text encoder beside it
        if not has_row(key, CLIP_KEYS):
            raise UserError(f'{name} holds a CLIP, but {prefix}{key} is of no ViT')
        if ours := rename(key, CLIP_KEYS):
            found[ours] = value.float()
    found['cls_token'] = found['cls_token'].view(1, 1, -1)
    found['pos_embed'] = found['pos_embed'].unsqueeze(0)
    return found


def _norm(dim: int) -> LayerNorm:
    """CLIP's own has an eps of 1e-5; these are as published."""
    return LayerNorm(dim, feeds_matmul=True, eps=1e-6)
