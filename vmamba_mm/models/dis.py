"""DiS, which predicts the noise in an image or a latent (arXiv 2402.05608)."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from vmamba_mm.families import resolve_arch
from vmamba_mm.families.dis import DEFAULTS, FAMILY
from vmamba_mm.layers import BiMambaMixer, DropPath, LayerNorm, MambaBlock, PatchEmbed, RMSNorm
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.models.pretrained import StrictLoading
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.registry import MODELS

_NORMS = {'rms': RMSNorm, 'ln': LayerNorm}
_MIXER_KEYS = ('d_state', 'd_conv', 'expand', 'dt_rank')


class SkipBlock(MambaBlock):
    """A :class:`MambaBlock` that an earlier one's mixer may have a long skip to (U-ViT, arXiv
    2209.12152): both results, side by side, go through a Linear, ``skip_linear``, before they are
    added to the residual stream.

    Args:
        mixer, norm, with_cp: as of :class:`MambaBlock`.
        drop_path: probability to drop what comes in for a sample.
        skip_dims: C of a block with a skip; None for one without.

    Shape: (B, L, C), twice or with the skip three times -> (mixer's result, residual).
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0,
                 with_cp: bool = False, skip_dims: int | None = None):
        super().__init__(mixer, norm, 0.0, with_cp)
        self.drop_input = DropPath(drop_path)
        self.skip_linear = nn.Linear(2 * skip_dims, skip_dims) if skip_dims else None

    def forward(self, hidden: Tensor, residual: Tensor | None = None, skip: Tensor | None = None
                ) -> tuple[Tensor, ...]:
        if skip is not None:
            hidden = self.skip_linear(torch.cat((hidden, skip), dim=-1))
        if residual is not None:  # nothing is added to the first block's
            hidden = self.drop_input(hidden)
        return super().forward(hidden, residual)


class LabelEmbedding(nn.Module):
    """An embedding of each class, and after them one of no class: (B) -> (B, C)."""

    def __init__(self, num_classes: int, embed_dims: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, embed_dims)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """From tokens to the pixels of patches, by a norm that the class and the time modulate where
    there are classes.

    Args:
        embed_dims: C.
        out_features: of a patch.
        is_conditional: whether there are classes.

    Shape: (B, L, C), and the condition (B, C) -> (B, L, out_features).
    """

    def __init__(self, embed_dims: int, out_features: int, is_conditional: bool):
        super().__init__()
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(embed_dims, out_features)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(embed_dims, 2 * embed_dims)) if is_conditional else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return self.linear(x)


@MODELS.register_module()
class DiS(StrictLoading, BaseModule):
    """DiS: the noise that is in an image, or in the latent of one, at a time of the diffusion.

    The class, the time and the patches, row by row, are the tokens of bidirectional S6 blocks, the
    second half of which has long skips from the first (section 3.2). Names of weights are those of
    the public code, whose files load as they are.

    Args:
        arch: a key of ``DiS.arch_settings``, or a dict with the keys ``embed_dims`` (C), ``depth``
            (blocks but for the middle one; of an odd number the last is left out), ``patch_size``,
            ``image_size`` (pixels, or a latent's, of a side), ``in_channels`` and ``num_classes``
            (0 for a model without classes), and as it likes those below. With ``base``, the name
            of a published one, only the keys that differ from it: ``dict(base='small_p2',
            in_channels=3, num_classes=0)`` is that of CIFAR-10. The default is 'small_p2'.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        with_cp: recompute each block in the backward pass (gradient checkpointing).
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint=...)``. None keeps
            the published initialisation.

    Optional keys of ``arch``: ``learn_sigma`` (True), whether twice the channels come out, the
    noise and then what the variance is made of; ``skip`` (True); ``norm`` ('rms', or 'ln');
    ``d_state`` (16), ``d_conv`` (4), ``expand`` (2) and ``dt_rank`` ('auto') as of
    :class:`vmamba_mm.layers.MambaMixer`.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    family = FAMILY
    arch_settings = FAMILY.archs
    default_arch = 'small_p2'

    def __init__(self, arch: str | Mapping[str, Any] | None = None, drop_path_rate: float = 0.0,
                 with_cp: bool = False, init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        self.arch = resolve_arch(self.family, self.default_arch if arch is None else arch)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        options = DEFAULTS | self.arch
        dims, depth, patch = (options[key] for key in ('embed_dims', 'depth', 'patch_size'))
        self.in_channels, self.num_classes = options['in_channels'], options['num_classes']
        self.out_channels = self.in_channels * (2 if options['learn_sigma'] else 1)
        side = options['image_size'] // patch
        self.patch_embed = PatchEmbed(self.in_channels, dims, patch)
        self.time_embed = nn.Sequential(nn.Linear(dims, 4 * dims), nn.SiLU(),
                                        nn.Linear(4 * dims, dims))
        self.label_emb = LabelEmbedding(self.num_classes, dims) if self.num_classes else None
        #: tokens before those of the patches
        self.num_extras = 2 if self.num_classes else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extras + side * side, dims))
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()]
        mixer = functools.partial(BiMambaMixer, dims, **{key: options[key] for key in _MIXER_KEYS})
        norm, half = _NORMS[options['norm']], depth // 2
        blocks = [SkipBlock(mixer(), norm(dims), rates[i], with_cp,
                            dims if options['skip'] and i > half else None)
                  for i in range(2 * half + 1)]
        self.in_blocks = nn.ModuleList(blocks[:half])
        self.mid_block = blocks[half]
        self.out_blocks = nn.ModuleList(blocks[half + 1:])
        self.drop_path = DropPath(drop_path_rate)
        self.norm_f = norm(dims)
        self.final_layer = FinalLayer(dims, patch * patch * self.out_channels,
                                      bool(self.num_classes))
        _init_parameters(self, blocks, depth)

    def forward(self, x: Tensor, timesteps: Tensor | float, labels: Tensor | None = None
                ) -> Tensor:
        """The noise, and with ``learn_sigma`` beside it what the variance is made of.

        Args:
            x: (B, in_channels, image_size, image_size).
            timesteps: (B), or one for all; from 0 on, fractions too.
            labels: (B), numbers of classes, ``num_classes`` for none; of a model without classes
                None.

        Returns:
            (B, out_channels, image_size, image_size).

        Raises:
            ValueError: on another size, labels of a model without classes, none of one with
                classes, or a number that is no class.
        """
        self._check(x, labels)
        patches = self.patch_embed(x).flatten(1, 2)
        timesteps = torch.as_tensor(timesteps, device=x.device).expand(len(x))
        weight = self.time_embed[0].weight
        wave = sinusoids(timesteps.to(compute_dtype(weight.dtype)), weight.shape[1])
        condition = self.time_embed(wave.to(weight.dtype))
        extras = [condition.unsqueeze(1)]
        if self.label_emb is not None:
            classes = self.label_emb(labels)
            extras.insert(0, classes.unsqueeze(1))
            condition = condition + classes
        tokens = torch.cat((*extras, patches), dim=1) + self.pos_embed
        tokens = self._run_blocks(tokens)[:, self.num_extras:]
        return self._to_image(self.final_layer(tokens, condition))

    def forward_with_cfg(self, x: Tensor, timesteps: Tensor | float, labels: Tensor,
                         cfg_scale: float = 1.5, guided_channels: int | None = 3) -> Tensor:
        """The same with the noise guided away from that of the second half of the labels.

        Args:
            x: (2B, in_channels, image_size, image_size), of which the first half counts.
            timesteps: (2B), or one for all.
            labels: (2B), B classes, and what to guide away from: mostly B times ``num_classes``.
            cfg_scale: s of ``second + s * (first - second)``.
            guided_channels: the first channels alone are guided, 3 as in the public code, which
                leaves the fourth of a latent as it is; None for all those of the noise.

        Returns:
            (2B, out_channels, image_size, image_size), the guided channels the same in both halves.
        """
        half = x[:len(x) // 2]
        out = self(torch.cat((half, half)), timesteps, labels)
        return self.guide(out, cfg_scale, guided_channels)

    def guide(self, out: Tensor, cfg_scale: float, guided_channels: int | None = 3) -> Tensor:
        """What :meth:`forward_with_cfg` makes of the model's result (2B, ...) for the same samples
        twice."""
        count = self.in_channels if guided_channels is None else guided_channels
        if not 1 <= count <= self.in_channels:
            raise ValueError(f'guided_channels must be from 1 to {self.in_channels}, those of the '
                             f'noise, or None for all of them, got {guided_channels!r}')
        first, second = out[:, :count].chunk(2)
        guided = second + cfg_scale * (first - second)
        return torch.cat((torch.cat((guided, guided)), out[:, count:]), dim=1)

    def _check(self, x, labels):
        size = self.arch['image_size']
        if x.dim() != 4 or x.shape[1:] != (self.in_channels, size, size):
            raise ValueError(f'DiS takes (B, {self.in_channels}, {size}, {size}), got '
                             f'{tuple(x.shape)}: other sizes need another model, '
                             'arch=dict(..., image_size=..., in_channels=...)')
        if labels is None and self.num_classes:
            raise ValueError(f'a DiS with {self.num_classes} classes needs labels; '
                             f'{self.num_classes} is the one of no class')
        if labels is not None and not self.num_classes:
            raise ValueError('this DiS has no classes and takes no labels')
        # On a GPU this would wait for the numbers.
        if labels is not None and labels.device.type == 'cpu' \
                and not torch.compiler.is_compiling() and labels.numel() \
                and not 0 <= labels.min() <= labels.max() <= self.num_classes:
            raise ValueError(f'labels must be from 0 to {self.num_classes}, the one of no class, '
                             f'got {labels.tolist()[:8]}')

    def _run_blocks(self, tokens: Tensor) -> Tensor:
        """(B, L, C), the normed sum of all."""
        hidden, residual, skips = tokens, None, []
        for block in self.in_blocks:
            hidden, residual = block(hidden, residual)
            skips.append(hidden)
        hidden, residual = self.mid_block(hidden, residual)
        for block in self.out_blocks:
            skip = skips.pop()
            hidden, residual = block(hidden, residual, skip if block.skip_linear is not None
                                     else None)
        normed = sum_and_norm(self.norm_f, residual, self.drop_path(hidden))[1]
        return normed.to(hidden.dtype)

    def _to_image(self, patches: Tensor) -> Tensor:
        """(B, h w, p p C) to (B, C, h p, w p)."""
        patch, side = self.arch['patch_size'], self.arch['image_size'] // self.arch['patch_size']
        x = patches.unflatten(2, (patch, patch, self.out_channels)).unflatten(1, (side, side))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def plain_state(self, arch: str | Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        with torch.device('meta'):
            return DiS(self.arch if arch is None else arch).state_dict()


def sinusoids(positions: Tensor, dims: int) -> Tensor:
    """(B) to (B, dims): cosines, then sines, of wavelengths from 2 pi to nearly 20000 pi; of an odd
    number the last is 0."""
    half = dims // 2
    steps = torch.arange(half, dtype=positions.dtype, device=positions.device)
    angles = positions[:, None] * torch.exp(-math.log(10000) / max(half, 1) * steps)
    waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return nn.functional.pad(waves, (0, dims % 2))


def _init_parameters(model: DiS, blocks: Sequence[SkipBlock], depth: int) -> None:
    """Initial values as published: PyTorch's, but no biases of Linear layers save those of dt,
    which the backward direction has not either, and results of blocks made smaller."""
    for block in blocks:
        mixer = block.mixer
        nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
        mixer.out_proj.weight.data /= math.sqrt(depth)
        nn.init.zeros_(mixer.dt_proj_b.bias)
        if block.skip_linear is not None:
            nn.init.zeros_(block.skip_linear.bias)
    for part in (model.time_embed, model.final_layer):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    if model.label_emb is not None:
        nn.init.normal_(model.label_emb.embedding_table.weight, std=0.02)
