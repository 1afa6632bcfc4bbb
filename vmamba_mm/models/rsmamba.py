"""The RSMamba backbone (arXiv 2403.19654)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.utils.checkpoint
from torch import Tensor, nn

from vmamba_mm.families.rsmamba import FAMILY, PATHS, grid_of
from vmamba_mm.layers import DropPath, LayerNorm, MultiPathMixer, PatchEmbed
from vmamba_mm.layers.positions import resize_grid, resize_patches
from vmamba_mm.models.flat import FlatBackbone
from vmamba_mm.registry import MODELS

# What torch.fx records as it is, since it looks at shapes.
torch.fx.wrap('_check_permutations')
torch.fx.wrap('_choose_permutations')
torch.fx.wrap('_embed')
torch.fx.wrap('_to_map')

_SHUFFLES = ('training', 'always', 'never')
_NORM_EPS = 1e-6


class RSMambaBlock(nn.Module):
    """x + mixer(norm(x)), of tokens; the norm is the model's, which all blocks share.

    Args:
        mixer: of several paths over the tokens.
        drop_path: probability to drop the mixer's result for a sample.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, L, C) -> (B, L, C).
    """

    def __init__(self, mixer: MultiPathMixer, drop_path: float = 0.0, with_cp: bool = False):
        super().__init__()
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)
        self.with_cp = with_cp

    def forward(self, x: Tensor, norm: nn.Module, permutation: Tensor | None = None) -> Tensor:
        """The block's result.

        Args:
            x: (B, L, C).
            norm: of the last dimension.
            permutation: (L) of integers, for a mixer of three paths.
        """
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, norm, permutation,
                                                     use_reentrant=False)
        return self._forward(x, norm, permutation)

    def _forward(self, x, norm, permutation):
        return x + self.drop_path(self.mixer(norm(x), permutation))


@MODELS.register_module()
class RSMamba(FlatBackbone):
    """RSMamba as a backbone for mmpretrain, a classifier of remote-sensing images.

    Patches, which overlap by half, go row by row through blocks that read them forwards, backwards
    and in a random order, with the same weights, and weight the three results by a gate (section
    II-C). All blocks share one norm, ``pre_norm``.

    The random order is a permutation of the tokens for each block, the same for all images of a
    batch. The public code draws new ones with every call, at evaluation too, so that its results
    are random. Here evaluation has permutations that depend on the number of tokens and of the
    block alone, unless ``shuffle='always'``; and whoever has permutations passes them to
    :meth:`forward`.

    Args:
        arch: a key of ``RSMamba.arch_settings``, or a dict with the keys ``embed_dims`` (C),
            ``depth`` (blocks), ``d_state`` (N), ``expand`` (inner channels by C), ``path_type``
            ('forward_reverse_shuffle_gate' as published, 'forward_reverse_shuffle_mean',
            'forward_reverse_gate', 'forward_reverse_mean' or 'forward'), ``cls_token`` ('none' as
            published, 'head', 'middle' or 'tail'), ``patch_size``, ``stride`` (pixels from patch to
            patch) and ``image_size`` (of the position embedding, one int, or height and width),
            and as it likes ``pos_embed`` ('learnable', 'sine' or 'none'), ``final_norm`` (True),
            ``d_conv`` (4) and ``dt_rank`` ('auto' for ceil(C / 16)). With ``base``, the name of a
            published one, only the keys that differ from it. The default is 'base'.
        out_indices: blocks to return; the last by default, which goes through ``norm``.
        out_type: 'featmap' for the patches as maps; 'avg_featmap' for their mean, which goes
            through a norm of its own, ``pool_norm``, the feature of the published classifiers;
            'cls_token' for the class token; 'raw' for all tokens.
        shuffle: when permutations are drawn anew with every call: in 'training', 'always', or
            'never', which has the fixed ones in training too.
        drop_path_rate, frozen_stages, norm_eval, with_cp, in_channels, compile, init_cfg: as of
            :class:`Backbone`, a stage being a block.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple: of maps (B, C, h, w) with h =
        ceil(H / stride), of (B, C), or of (B, L, C). Where h and w are not those of ``image_size``,
        a learnable position embedding is resized (bicubic); the public code takes no other size.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family = FAMILY
    default_arch = 'base'
    # The first block cannot be frozen without the norm that all share.
    stem = ('patch_embed', 'cls_token', 'pos_embed', 'pre_norm')
    out_types = ('featmap', 'avg_featmap', 'cls_token', 'raw')

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, out_type: str = 'featmap',
                 shuffle: str = 'training', **kwargs):
        if shuffle not in _SHUFFLES:
            raise ValueError(f'shuffle={shuffle!r} does not exist; choose one of {_SHUFFLES}')
        self.shuffle = shuffle
        super().__init__(arch, out_indices, out_type, **kwargs)
        if out_type == 'cls_token' and self.arch['cls_token'] == 'none':
            raise ValueError("out_type='cls_token' needs an arch with a class token, and "
                             "arch['cls_token'] is 'none'")

    @classmethod
    def stage_strides(cls, arch: Mapping[str, Any]) -> list[int]:
        return [arch['stride']] * arch['depth']

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        return -(-size // arch['stride'])

    @staticmethod
    def has_cls_token(arch: Mapping[str, Any]) -> bool:
        return arch['cls_token'] != 'none'

    @staticmethod
    def has_pool_norm(arch: Mapping[str, Any]) -> bool:
        return arch['cls_token'] == 'none'

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        arch = self.arch
        dims = arch['embed_dims']
        #: patches of an image of ``image_size``: rows and columns
        self.grid = grid_of(arch)
        self.patch_embed = PatchEmbed(in_channels, dims, arch['patch_size'], arch['stride'],
                                      bias=False, ceil_mode=True)
        has_cls = arch['cls_token'] != 'none'
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims)) if has_cls else None
        rows = self.grid[0] * self.grid[1] + has_cls
        is_learnable = arch.get('pos_embed', 'learnable') == 'learnable'
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dims)) if is_learnable else None
        self.pre_norm = LayerNorm(dims, feeds_matmul=True, eps=_NORM_EPS)
        paths, gated = PATHS[arch['path_type']]
        kwargs = {key: arch[key] for key in ('d_state', 'expand', 'd_conv', 'dt_rank')
                  if key in arch}
        self.blocks = nn.ModuleList(
            RSMambaBlock(MultiPathMixer(dims, paths=paths, gated=gated, **kwargs), rate, with_cp)
            for rate in drop_path_rates)
        self.norm = LayerNorm(dims, eps=_NORM_EPS) if arch.get('final_norm', True) else None
        self.pool_norm = LayerNorm(dims, eps=_NORM_EPS) if self.out_type == 'avg_featmap' else None
        self._init_parameters()

    def _init_parameters(self):
        """As published: nothing of Mamba's own initial values but A and D."""
        nn.init.kaiming_normal_(self.patch_embed.proj.weight, nonlinearity='linear')
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            block.mixer.dt_proj.reset_parameters()

    # --- forward ------------------------------------------------------------------------------

    def forward(self, x: Tensor, permutations: Sequence[Tensor] | Tensor | None = None
                ) -> tuple[Tensor, ...]:
        """The outputs of the blocks in ``out_indices``.

        Args:
            x: (B, in_channels, H, W).
            permutations: of the tokens, (L) of integers for each block; None for those that
                ``shuffle`` says.

        Raises:
            ValueError: if there are permutations and no path that takes them, or not one for each
                block.
        """
        if self.out_type == 'featmap':
            maps = self.forward_stages(x, self.out_indices, permutations)
            return tuple(self.norm_output(i, y).contiguous()
                         for i, y in zip(self.out_indices, maps, strict=True))
        return self.forward_tokens(x, permutations)

    def forward_stages(self, x: Tensor, indices: Sequence[int],
                       permutations: Sequence[Tensor] | Tensor | None = None) -> list[Tensor]:
        """The maps after some blocks, before the norm, each (B, h, w, C).

        Args:
            x, permutations: as of :meth:`forward`.
            indices: increasing numbers of blocks; none after the last one runs.
        """
        return [patches for _, patches in self._forward_parts(x, indices, permutations)]

    def forward_with_cls(self, x: Tensor, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return self._forward_parts(x, indices, None)

    def _forward_parts(self, x, indices, permutations):
        tokens, patches = self._embed(x)
        kind = self.arch['cls_token']
        return [(self._cls_token(y), _to_map(y, patches, kind))
                for y in self._run(tokens, indices, permutations)]

    def forward_tokens(self, x: Tensor, permutations: Sequence[Tensor] | Tensor | None = None
                       ) -> tuple[Tensor, ...]:
        tokens, patches = self._embed(x)
        outs = []
        for i, y in zip(self.out_indices, self._run(tokens, self.out_indices, permutations),
                        strict=True):
            norm = self.output_norm(i)
            if self.out_type == 'cls_token':
                y = self._cls_token(y).squeeze(1)
            y = y if norm is None else norm(y)
            if self.out_type == 'avg_featmap':
                y = self.pool_norm(_to_map(y, patches, self.arch['cls_token']).mean((1, 2)))
            outs.append(y)
        return tuple(outs)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, L, C), and the patches (B, h, w, C) before their position embedding."""
        patches = self.patch_embed(x)
        is_sine = self.arch.get('pos_embed') == 'sine'
        return _embed(patches, self.cls_token, self.pos_embed, self.grid,
                      self.arch['cls_token'], is_sine), patches

    def _run(self, tokens: Tensor, indices: Sequence[int],
             permutations: Sequence[Tensor] | Tensor | None) -> list[Tensor]:
        """The tokens after some blocks."""
        orders, outs = self._permutations(tokens, indices[-1] + 1, permutations), []
        for i, block in enumerate(self.blocks[:indices[-1] + 1]):
            tokens = block(tokens, self.pre_norm, orders[i])
            if i in indices:
                outs.append(tokens)
        return outs

    def _permutations(self, tokens, count, given):
        kind = self.arch['path_type']
        if PATHS[kind][0] < 3:
            _check_permutations(given, 0, kind)
            return [None] * count
        _check_permutations(given, len(self.blocks), kind)
        draws = self.shuffle == 'always' or (self.shuffle == 'training' and self.training)
        return _choose_permutations(tokens, count, given, draws)

    def _cls_token(self, tokens: Tensor) -> Tensor | None:
        """(B, L, C) to the class token, (B, 1, C).

        In the middle it is read where the public code does, which for an odd number of patches is
        the place after it.
        """
        place = {'none': None, 'head': 0, 'middle': tokens.shape[1] // 2,
                 'tail': tokens.shape[1] - 1}[self.arch['cls_token']]
        return None if place is None else tokens[:, place:place + 1]

    # --- loading ------------------------------------------------------------------------------

    @classmethod
    def arguments_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        pooled = dict(out_type='avg_featmap') if 'pool_norm.weight' in weights else {}
        return super().arguments_of(weights) | pooled

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The position embedding, resized where it is of another image size."""
        embed, kind = weights.get('pos_embed'), self.arch['cls_token']
        if embed is None or self.pos_embed is None or embed.dim() != 3 \
                or embed.shape[1] == self.pos_embed.shape[1]:
            return weights
        patches, cls = _take_out(embed, kind)
        patches = resize_patches(patches, self.grid)
        return dict(weights, pos_embed=_put_in(patches, cls, kind))


# --- tokens -------------------------------------------------------------------------------------

def _place(num_patches: int, kind: str) -> int:
    """Where the class token stands among the patches."""
    return {'head': 0, 'middle': num_patches // 2, 'tail': num_patches}[kind]


def _put_in(patches: Tensor, cls: Tensor | None, kind: str) -> Tensor:
    """(B, n, C) with the class token (B, 1, C) at its place."""
    if cls is None:
        return patches
    before, after = patches.tensor_split((_place(patches.shape[1], kind),), dim=1)
    return torch.cat((before, cls, after), dim=1)


def _take_out(tokens: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`_put_in`."""
    if kind == 'none':
        return tokens, None
    place = _place(tokens.shape[1] - 1, kind)
    before, cls, after = tokens.tensor_split((place, place + 1), dim=1)
    return torch.cat((before, after), dim=1), cls


def _embed(patches: Tensor, cls_token: Tensor | None, pos_embed: Tensor | None,
           grid: tuple[int, int], kind: str, is_sine: bool) -> Tensor:
    """Patches (B, h, w, C) to tokens (B, L, C), with their position embeddings."""
    batch, height, width, dims = patches.shape
    tokens = patches.flatten(1, 2)
    if is_sine:
        tokens = tokens + sine_embedding((height, width), dims, tokens)
    cls = None if cls_token is None else cls_token.expand(batch, -1, -1).to(tokens.dtype)
    tokens = _put_in(tokens, cls, kind)
    if pos_embed is None:
        return tokens
    if (height, width) != grid:
        of_patches, of_cls = _take_out(pos_embed, kind)
        pos_embed = _put_in(resize_grid(of_patches, grid, (height, width)), of_cls, kind)
    return tokens + pos_embed


def _to_map(tokens: Tensor, patches: Tensor, kind: str) -> Tensor:
    """Tokens (B, L, C) without the class token, (B, h, w, C)."""
    return _take_out(tokens, kind)[0].reshape(patches.shape)


def sine_embedding(grid: tuple[int, int], dims: int, like: Tensor) -> Tensor:
    """The 2-D sine-cosine embedding of MoCo v3 (arXiv 2104.02057) as mmpretrain has it, (1, h * w,
    C), in the dtype and on the device of ``like``.

    Its positions count column by column, and the tokens row by row: on a map that is no square a
    token has the embedding of another place, which weights that were trained so need.
    """
    height, width = grid
    rates = 10000.0 ** (-torch.arange(dims // 4, device=like.device) / (dims // 4))
    columns, rows = torch.meshgrid(torch.arange(width, device=like.device),
                                   torch.arange(height, device=like.device), indexing='ij')
    parts: Iterable[Tensor] = (n.flatten()[:, None] * rates for n in (columns, rows))
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], 1)[None].to(
        like.dtype)


def _check_permutations(given: Sequence[Tensor] | Tensor | None, count: int, path_type: str
                        ) -> None:
    if given is None or len(given) == count:
        return
    if count == 0:
        raise ValueError(f'path_type={path_type!r} takes no permutations')
    raise ValueError(f'permutations must be {count}, one for each block, got {len(given)}')


def _choose_permutations(tokens: Tensor, count: int, given: Sequence[Tensor] | Tensor | None,
                         draws: bool) -> Sequence[Tensor] | Tensor:
    """Permutations of the tokens (B, L, C) for ``count`` blocks, (count, L)."""
    if given is not None:
        return given
    if draws:
        return torch.rand(count, tokens.shape[1], device=tokens.device).argsort(dim=1)
    return fixed_permutations(tokens.shape[1], count, tokens.device)


def fixed_permutations(length: int, count: int, device: torch.device | str = 'cpu') -> Tensor:
    """Permutations of tokens for ``count`` blocks, (count, length), always the same.

    The positions of all blocks, counted on, are sorted by the finalizer of MurmurHash3, which gives
    32 bits that look random, each once. No generator is asked, so nothing depends on the device, on
    torch's version or on what was drawn before.
    """
    bits = 0xFFFFFFFF
    # 0 would stay 0, and the first token the first of all.
    h = torch.arange(1, count * length + 1, device=device)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & bits
    return (h ^ (h >> 16)).view(count, length).argsort(dim=1)
