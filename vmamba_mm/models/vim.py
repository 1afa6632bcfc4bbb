"""The Vim backbone (arXiv 2401.09417)."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.families.vim import FAMILY, grid_of
from vmamba_mm.layers import (
    BiMambaMixer,
    LayerNorm,
    MambaBlock,
    MambaMixer,
    PatchEmbed,
    RMSNorm,
    SharedBiMambaMixer,
    run_blocks_to,
)
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.layers.positions import resize_grid
from vmamba_mm.models.flat import FlatBackbone
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('_cls_tokens_of')
torch.fx.wrap('_embed')
torch.fx.wrap('_to_map')
torch.fx.wrap('_rotate')

_NORMS = {'rms': RMSNorm, 'ln': LayerNorm}
_MIXERS = {'bidirectional': BiMambaMixer, 'shared': SharedBiMambaMixer, 'causal': MambaMixer}
_MIXER_KEYS = ('d_state', 'd_conv', 'expand', 'dt_rank', 'layer_scale')
_CLS_TOKENS = {'middle': ('cls_token',), 'head': ('cls_token',),
               'double': ('cls_token_head', 'cls_token_tail'), 'none': ()}
_FEATURES = ('normed', 'stream', 'mixer')
_RESIZES = ('by token', 'published')


@MODELS.register_module()
class Vim(FlatBackbone):
    """Vim as a backbone for mmpretrain, mmdet and mmseg.

    The patches of an image, row by row, and a class token in their middle go through bidirectional
    S6 blocks (section 3.3). Its maps all have one size: a pyramid for detection is made by
    :class:`vmamba_mm.heads.SimpleFeaturePyramid`, one for segmentation by mmseg's
    ``Feature2Pyramid``.

    Args:
        arch: a key of ``Vim.arch_settings``, or a dict with the keys ``embed_dims`` (C), ``depth``
            (blocks), ``d_state`` (N), ``patch_size``, ``image_size`` (pixels of the position
            embedding, an int or height and width) and ``cls_token`` ('middle'; 'head' for the
            first token, 'double' for the first and the last, 'none'), and as it likes those below.
            With ``base``, the name of a published one, only the keys that differ from it:
            ``dict(base='tiny', image_size=512)``. The default is 'tiny'.
        out_indices: blocks to return; the last by default.
        out_type: 'featmap' for the patches as maps; 'cls_token' for the class token (the mean of
            both, if it is double), which is the feature of the published classifiers; 'raw' for
            all tokens in the order in which the blocks read them.
        features: what of the blocks in ``out_indices`` is returned: 'normed', the sum of all
            blocks up to there, which for the last block goes through the norm; 'stream', the
            sums alone; or 'mixer', what the mixer of each block has added (as the published
            segmentor of 'tiny' does).
        drop_path_rate, frozen_stages, norm_eval, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`, a stage being a block.

    Optional keys of ``arch``, for what the official code can do beside the published models:

    - ``stride``: pixels from patch to patch; ``patch_size`` if absent.
    - ``mixer``: 'bidirectional' (version 2 of the code), 'shared' (version 1,
      :class:`SharedBiMambaMixer`) or 'causal'; ``reduce``: 'mean' of the directions, or 'sum'.
    - ``paired``: of each two blocks the second reads the sequence backwards, both read what the
      last pair gave, and results and residual streams are added.
    - ``reverse``: the sequence goes from the last patch to the first; the class token is then
      looked for where it would stand in the other order, as the official code does.
    - ``rope``: a rotary embedding of each patch's row and column before every block: 'hidden' of
      the last block's result, 'both' of the residual stream too, 'none'; ``rope_size``: the number
      of rows and columns that an image counts, 14. With a class token it leaves out the first
      token, wherever the class token is, as the official code does.
    - ``norm``: 'rms' or 'ln'; ``layer_scale``, ``d_conv``, ``expand``, ``dt_rank``: as of
      :class:`MambaMixer`.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple: of maps (B, C, h, w) with h =
        (H - patch_size) // stride + 1 (a side smaller than a patch is padded with zeros to one); of
        (B, C); or of (B, L, C). Where h and w are not those of ``image_size``, the position
        embedding of the patches is resized (bicubic).

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'tiny'
    stem = ('patch_embed', 'cls_token', 'cls_token_head', 'cls_token_tail', 'pos_embed')
    out_types = ('featmap', 'cls_token', 'raw')

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, out_type: str = 'featmap',
                 features: str = 'normed', **kwargs):
        if features not in _FEATURES:
            raise ValueError(f'features={features!r} does not exist; choose one of {_FEATURES}')
        self.features = features  # which build() asks for
        super().__init__(arch, out_indices, out_type, **kwargs)
        if out_type == 'cls_token' and self.arch['cls_token'] == 'none':
            raise ValueError("out_type='cls_token' needs an arch with a class token, and "
                             "arch['cls_token'] is 'none'")

    @classmethod
    def stage_strides(cls, arch: Mapping[str, Any]) -> list[int]:
        return [arch.get('stride', arch['patch_size'])] * arch['depth']

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return grid_of(dict(arch, image_size=size))[0]

    @staticmethod
    def has_cls_token(arch: Mapping[str, Any]) -> bool:
        return arch['cls_token'] != 'none'

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch = self.arch
        dims, norm = arch['embed_dims'], _NORMS[arch.get('norm', 'rms')]
        #: patches of an image of ``image_size``: rows and columns
        self.grid = grid_of(arch)
        self.patch_embed = PatchEmbed(in_channels, dims, arch['patch_size'],
                                      arch.get('stride', arch['patch_size']))
        names = _CLS_TOKENS[arch['cls_token']]
        for name in self.stem[1:-1]:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, dims))
                                    if name in names else None)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid) + len(names), dims))
        mixer = functools.partial(_MIXERS[arch.get('mixer', 'bidirectional')], dims, **{
            key: arch[key] for key in _MIXER_KEYS if key in arch})
        if arch.get('mixer', 'bidirectional') == 'bidirectional':
            mixer = functools.partial(mixer, reduce=arch.get('reduce', 'mean'))
        self.blocks = nn.ModuleList(MambaBlock(mixer(), norm(dims), rate, with_cp)
                                    for rate in drop_path_rates)
        last = arch['depth'] - 1
        if self.features == 'normed' and last in self.out_indices:
            self.add_module(f'norm{last}', norm(dims))
        self._init_parameters()

    def _init_parameters(self):
        names = _CLS_TOKENS[self.arch['cls_token']]
        init_vim(self.patch_embed, (self.pos_embed, *(getattr(self, name) for name in names)),
                 self.blocks)

    # --- forward ------------------------------------------------------------------------------

    def output_norm(self, i: int) -> nn.Module | None:
        return getattr(self, f'norm{i}', None)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens, patches = self.embed(x)
        outs = []
        for i, streams in self._run(tokens, patches, self.out_indices):
            if self.out_type == 'raw':
                outs.append(self._output(i, streams))
            else:
                cls = [torch.cat(_cls_tokens_of(y, patches, self.arch['cls_token']), dim=1)
                       for y in streams]
                outs.append(self._output(i, cls).mean(1))
        return tuple(outs)

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some blocks before the norm, each (B, h, w, C).

        Args:
            x: (B, in_channels, H, W).
            indices: increasing numbers of blocks; none after the last one runs.
        """
        return [patches for _, patches in self._forward_parts(x, indices)]

    def forward_with_cls(self, x: Tensor, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return [(torch.cat(cls, dim=1), patches) for cls, patches in self._forward_parts(
            x, indices)]

    def _forward_parts(self, x: Tensor, indices: Sequence[int]
                       ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The class tokens, each (B, 1, C), and the maps of some blocks before the norm."""
        tokens, patches = self.embed(x)
        kind, reverse = self.arch['cls_token'], self.arch.get('reverse', False)
        for _, streams in self._run(tokens, patches, indices):
            total = functools.reduce(torch.add, streams)
            yield _cls_tokens_of(total, patches, kind), _to_map(total, patches, kind, reverse)

    def norm_output(self, i: int, x: Tensor) -> Tensor:
        # Of a sum that is fp32 in a half too.
        return super().norm_output(i, x).to(self.pos_embed.dtype)

    def _output(self, i: int, streams: Sequence[Tensor]) -> Tensor:
        """The output of block ``i``, of tokens: (B, ..., C)."""
        norm = self.output_norm(i)
        if norm is None:
            y = functools.reduce(torch.add, streams)
        else:
            hidden, residual = streams
            y = sum_and_norm(norm, residual, hidden)[1]
        return y.to(self.pos_embed.dtype)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, L, C), and the patches (B, h, w, C) before their position embedding."""
        patches = self.patch_embed(x)
        names = _CLS_TOKENS[self.arch['cls_token']]
        tokens = _embed(patches, [getattr(self, name) for name in names], self.pos_embed,
                        self.grid, self.arch['cls_token'])
        return tokens.flip(1) if self.arch.get('reverse') else tokens, patches

    def _run(self, tokens: Tensor, patches: Tensor, indices: Sequence[int]
             ) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Run the blocks up to the last of ``indices``.

        Yields:
            The number of each block in ``indices``, and what its output is the sum of, tokens
            (B, L, C): the streams hidden and residual, or what its mixer has added.
        """
        is_paired, wants_outputs = self.arch.get('paired', False), self.features == 'mixer'
        if not (is_paired or wants_outputs) and self.arch.get('rope', 'none') == 'none':
            yield from run_blocks_to(indices, self.blocks, tokens)
            return
        keywords = dict(with_output=True) if wants_outputs else {}
        streams, forward = self._rotate(patches, tokens), None
        for i, block in enumerate(self.blocks[:indices[-1] + 1]):
            if forward is None:
                results = block(*streams, **keywords)
                forward = results if is_paired else None
            else:  # the second of a pair, on what the first one read
                backward = block(*(t.flip(1) for t in streams), **keywords)
                results = [a + b.flip(1) for a, b in zip(forward, backward, strict=True)]
                forward = None
            sums = results[:2]
            if forward is None:
                # Of the last block nothing reads the rotation, whatever blocks were taken away.
                is_last = i + 1 == self.arch['depth']
                sums = streams = sums if is_last else self._rotate(patches, *sums)
            if i in indices:
                yield i, results[2:] if wants_outputs else sums

    def _rotate(self, patches: Tensor, hidden: Tensor, residual: Tensor | None = None
                ) -> tuple[Tensor, ...]:
        """The streams with the rotary embedding, where there is one."""
        kind = self.arch.get('rope', 'none')
        arguments = patches, self.arch.get('rope_size', 14), self.arch.get('reverse', False)
        if kind != 'none':
            hidden = _rotate(hidden, *arguments)
        if residual is None:
            return (hidden,)
        return hidden, _rotate(residual, *arguments) if kind == 'both' else residual

    # --- loading ------------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, weights: str = 'auto',
                        map_location: Any = 'cpu', adapt_in_channels: bool = False,
                        strict: bool | None = None, allow: str | Sequence[str] = (),
                        resize: str = 'by token') -> None:
        """Load the backbone of a checkpoint, as every :class:`Backbone` does.

        A position embedding of another image size is resized to this model's (bicubic, from a
        square), and class tokens that this model has not are left out.

        Args:
            checkpoint, prefix, weights, map_location, adapt_in_channels, strict, allow: as of
                :meth:`vmamba_mm.models.pretrained.StrictLoading.load_pretrained`.
            resize: 'by token': the rows of the embedding that belong to class tokens, in the middle
                where this model has none of its own, stay, and those of the patches are
                resized. 'published': the first row is taken for the class token's and the others
                for the patches', wherever the class token is, as the official scripts do: the
                published models of stride 8 were started so.

        Raises:
            ValueError: on another ``resize``.
            UserError: as there, and if the embedding in the file is not that of a square.
        """
        if resize not in _RESIZES:
            raise ValueError(f'resize={resize!r} does not exist; choose one of {_RESIZES}')
        self._load(functools.partial(self.adapt_weights, resize=resize), checkpoint, prefix,
                   weights, map_location, adapt_in_channels, strict, allow)

    def adapt_weights(self, weights: dict[str, Tensor], resize: str = 'by token'
                      ) -> dict[str, Tensor]:
        kind, embed = self.arch['cls_token'], weights.get('pos_embed')
        held = next((k for k in (kind, 'middle', 'double') if _CLS_TOKENS[k]
                     and all(name in weights for name in _CLS_TOKENS[k])), 'none')
        if embed is None or kind not in ('none', held):
            return weights  # the comparison says what is missing
        adapted = {k: v for k, v in weights.items()
                   if k not in _CLS_TOKENS[held] or kind != 'none'}
        count, num_cls = embed.shape[1], len(_CLS_TOKENS[held])
        is_resized = count - num_cls != math.prod(self.grid)
        if is_resized or kind != held:
            places = (range(num_cls) if resize == 'published'
                      else _cls_places(count - num_cls, held))
            try:
                adapted['pos_embed'] = resize_pos_embed(
                    embed, self.grid, places, kept=kind != 'none',
                    new_places=None if resize == 'published' or not is_resized
                    else _cls_places(math.prod(self.grid), held))
            except ValueError as err:
                raise UserError(str(err)) from err
        return adapted


def init_vim(patch_embed: PatchEmbed, embeds: Iterable[Tensor], blocks: Sequence[MambaBlock]
             ) -> None:
    """Set initial values as published: mixers as Mamba's, but dt of the backward direction 0.

    Args:
        patch_embed: the projection of patches.
        embeds: class tokens and embeddings of position.
        blocks: of the model.
    """
    # LeCun's, divided as timm does for a normal that is cut off, which this one hardly is.
    fan_in = patch_embed.proj.weight[0].numel()
    nn.init.trunc_normal_(patch_embed.proj.weight, std=fan_in ** -0.5 / 0.87962566)
    nn.init.zeros_(patch_embed.proj.bias)
    for embed in embeds:
        nn.init.trunc_normal_(embed, std=0.02)
    for block in blocks:
        mixer = block.mixer
        nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
        mixer.out_proj.weight.data /= math.sqrt(len(blocks))
        if hasattr(mixer, 'dt_proj_b'):
            nn.init.zeros_(mixer.dt_proj_b.bias)


# --- tokens -------------------------------------------------------------------------------------

def _cls_places(num_patches: int, kind: str) -> tuple[int, ...]:
    """Where the class tokens stand among the tokens, in increasing order."""
    return {'middle': (num_patches // 2,), 'head': (0,), 'double': (0, num_patches + 1),
            'none': ()}[kind]


def _split(tokens: Tensor, places: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """(B, L, C) into the patches (B, M, C) and the tokens at ``places``, each (B, 1, C)."""
    cuts = [cut for place in places for cut in (place, place + 1)]
    parts = tokens.tensor_split(cuts, dim=1)
    patches = parts[0] if len(parts) == 1 else torch.cat(parts[::2], dim=1)
    return patches, list(parts[1::2])


def _join(patches: Tensor, others: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """The inverse of :func:`_split`."""
    parts = patches.tensor_split([place - i for i, place in enumerate(places)], dim=1)
    joined = [parts[0]]
    for other, part in zip(others, parts[1:], strict=True):
        joined += [other, part]
    return torch.cat(joined, dim=1)


def _embed(patches: Tensor, cls_tokens: Sequence[Tensor], pos_embed: Tensor,
           grid: tuple[int, int], kind: str) -> Tensor:
    """Patches (B, h, w, C) to tokens (B, L, C), with their position embeddings."""
    batch, height, width, _ = patches.shape
    places = _cls_places(height * width, kind)
    if (height, width) != grid:
        pos_embed, others = _split(pos_embed, _cls_places(math.prod(grid), kind))
        pos_embed = _join(resize_grid(pos_embed, grid, (height, width)), others, places)
    patches = patches.flatten(1, 2)
    others = [token.expand(batch, -1, -1).to(patches.dtype) for token in cls_tokens]
    return _join(patches, others, places) + pos_embed


def _cls_tokens_of(tokens: Tensor, patches: Tensor, kind: str) -> list[Tensor]:
    """The class tokens, each (B, 1, C), of tokens (B, L, C)."""
    height, width = patches.shape[1:3]
    return _split(tokens, _cls_places(height * width, kind))[1]


def _to_map(tokens: Tensor, patches: Tensor, kind: str, reverse: bool) -> Tensor:
    """Tokens (B, L, C) without class tokens, (B, h, w, C)."""
    tokens = tokens.flip(1) if reverse else tokens
    tokens, _ = _split(tokens, _cls_places(patches.shape[1] * patches.shape[2], kind))
    return tokens.reshape(patches.shape)


def _rotate(tokens: Tensor, patches: Tensor, size: float, reverse: bool) -> Tensor:
    return rope(tokens, tuple(patches.shape[1:3]), size, reverse)


def rope(tokens: Tensor, grid: tuple[int, int], size: float, reverse: bool = False) -> Tensor:
    """The 2-D rotary embedding of EVA-02 (arXiv 2303.11331), of the row and column of a patch.

    Neighbouring channels are a pair, which is turned by an angle; one half of the channels knows
    the row, the other one the column.

    Args:
        tokens: (B, h * w, C), C a multiple of 4, row by row; or one more, whose first stays as it
            is.
        grid: h and w.
        size: the rows and columns that the angles count, whatever h and w are.
        reverse: the tokens are in the order from the last to the first.
    """
    height, width = grid
    length, dims = tokens.shape[1:]
    rates = 10000 ** (-torch.arange(0, dims // 2, 2, device=tokens.device) / (dims // 2))
    rows, columns = (torch.arange(n, device=tokens.device)[:, None] / n * size * rates
                     for n in (height, width))
    angles = torch.cat((rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)), 2)
    angles = torch.cat((angles.new_zeros(length - height * width, dims // 2),
                        angles.flatten(0, 1)))
    angles = angles.flip(0) if reverse else angles
    first, second = tokens.to(torch.promote_types(tokens.dtype, angles.dtype)).unflatten(
        2, (-1, 2)).unbind(3)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), 3)
    return turned.flatten(2).to(tokens.dtype)


def resize_pos_embed(pos_embed: Tensor, size: tuple[int, int], places: Sequence[int],
                     kept: bool = True, new_places: Sequence[int] | None = None) -> Tensor:
    """A position embedding of a square for another number of patches: bicubic.

    Args:
        pos_embed: (1, L, C).
        size: rows and columns that are wanted.
        places: of the rows that are of class tokens, in increasing order.
        kept: whether those come into the result.
        new_places: where they are put; None for ``places``.

    Returns:
        (1, L', C).

    Raises:
        ValueError: if the other rows are not those of a square.
    """
    patches, others = _split(pos_embed, places)
    side = math.isqrt(patches.shape[1])
    if patches.shape[1] != math.prod(size):
        if side ** 2 != patches.shape[1]:
            raise ValueError(f'a position embedding of {patches.shape[1]} patches, which are no '
                             f'square, cannot be resized to {size[0]}x{size[1]}')
        patches = resize_grid(patches, (side, side), size)
    if not kept:
        return patches
    return _join(patches, others, places if new_places is None else new_places)
