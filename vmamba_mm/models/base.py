"""What every backbone of this package has, whatever its blocks are."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vmamba_mm.families import Family, resolve_arch
from vmamba_mm.layers import LayerNorm2d
from vmamba_mm.models.pretrained import StrictLoading


class Backbone(StrictLoading, BaseModule):
    """A backbone for mmpretrain, mmdet, mmseg and timm.

    It is a stem and then stages: modules of blocks, as in VMamba, each followed by a downsampling;
    or, in a flat backbone such as Vim, the blocks themselves. A subclass says:

    - ``family``, and ``default_arch``, one of its names;
    - :meth:`stage_sizes`: from an arch, how many blocks each stage has, and its channels;
    - :meth:`build`: makes the stem (whose modules and parameters ``stem`` names) and the
      ``ModuleList`` of stages (which ``stages_name`` names), and for each output ``norm{i}`` where
      outputs have norms of their own;
    - a flat one also :meth:`forward_stages`.

    All that changes names or shapes of weights, but for the channels of images and the norms of
    outputs, is a key of the arch, so that it can be told from weights.

    Args:
        arch: a key of ``arch_settings``, or a dict with the keys of the family's ``rules``; with
            ``base``, the name of a published one, only the keys that differ from it:
            ``dict(base='tiny_s1l8', depths=(2, 2, 4, 2))``. None for ``default_arch``.
        out_indices: stages to return; None for all of them, or the last of a flat backbone or a
            decoder.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages with
            their norms and downsamplings.
        norm_eval: keep batch norms in eval mode while training.
        with_cp: recompute each block in the backward pass (gradient checkpointing).
        in_channels: channels of the input.
        compile: True, or keyword arguments of ``torch.compile``, to compile the backbone alone,
            for training and evaluation (mmengine's own ``compile`` takes the training step).
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint=...)``. None keeps
            the published initialisation, which the layers set by themselves.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    family: Family
    default_arch: str
    arch_settings: Mapping[str, Mapping[str, Any]]
    stem: tuple[str, ...] = ('patch_embed',)
    stages_name = 'stages'
    is_flat = False
    #: Whether ``out_indices`` is the last stage alone by default.
    returns_last = False
    #: Whether the norms of outputs are of the last dimension, as of tokens, and no LayerNorm2d.
    norms_last = False
    #: Keywords that the backbones of published classifiers have, beside the last output alone, or
    #: those of what else was published, which may name other outputs.
    classifier_options: Mapping[str, Any] = MappingProxyType({})
    #: Of a model, the keywords that say which norms its outputs have.
    output_options: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'family' in vars(cls):
            cls.arch_settings = cls.family.archs

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, drop_path_rate: float = 0.0,
                 frozen_stages: int = -1, norm_eval: bool = False, with_cp: bool = False,
                 in_channels: int = 3, compile: bool | Mapping[str, Any] = False,
                 init_cfg: dict | list[dict] | None = None, **leftover):
        if leftover:
            _refuse_leftover(self.family.model, leftover)
        super().__init__(init_cfg=init_cfg)
        self.arch = resolve_arch(self.family, self.default_arch if arch is None else arch)
        self.depths, self.num_features = self.stage_sizes(self.arch)
        num_stages = len(self.depths)
        if out_indices is None:
            out_indices = (num_stages - 1,) if self.returns_last else range(num_stages)
        self.out_indices = _check_out_indices(out_indices, num_stages)
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages must be an int from -1 (nothing) to {num_stages} '
                             f'(all), got {frozen_stages!r}')
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels must be an int of at least 1, got {in_channels!r}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        rates = self.drop_path_rates(self.arch, drop_path_rate)
        self.build(in_channels, rates, with_cp)
        self._freeze_stages()
        if compile or isinstance(compile, Mapping):  # an empty dict asks for it too
            self.compile(**(compile if isinstance(compile, Mapping) else {}))

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        """The number of blocks of each stage (1 in a flat backbone), and the channels of each."""
        raise NotImplementedError

    @classmethod
    def drop_path_rates(cls, arch: Mapping[str, Any], rate: float) -> list[float]:
        """The stochastic depth of each block: from 0 to that of the last one, ``rate``."""
        depths, _ = cls.stage_sizes(arch)
        return torch.linspace(0, rate, sum(depths), device='cpu').tolist()

    @classmethod
    def stage_strides(cls, arch: Mapping[str, Any]) -> list[int]:
        """The side, in pixels of the image, of what one position of each stage's map stands for.

        A subclass whose stem is no patch of 4 pixels (of ``patch_size`` if it is flat), or whose
        stages do not halve the map, overrides this.
        """
        depths, _ = cls.stage_sizes(arch)
        if cls.is_flat:
            return [arch['patch_size']] * len(depths)
        return [4 * 2 ** i for i in range(len(depths))]

    @staticmethod
    def clip_length(arch: Mapping[str, Any]) -> int:
        """The frames of a clip that the arch is made for, (B, C, T, H, W); 0 if it takes images."""
        return 0

    @staticmethod
    def has_cls_token(arch: Mapping[str, Any]) -> bool:
        """Whether published classifiers of the arch read class tokens (``out_type='cls_token'``),
        and not the mean of the last map; then there is :meth:`forward_with_cls`."""
        return False

    @staticmethod
    def has_pool_norm(arch: Mapping[str, Any]) -> bool:
        """Whether published classifiers of the arch read the mean of the last map through a norm
        more, ``pool_norm``, which a model has with ``out_type='avg_featmap'``."""
        return False

    @classmethod
    def map_size(cls, arch: Mapping[str, Any], size: int) -> int:
        """The side of the last map, of a square image of ``size`` pixels."""
        return size // cls.stage_strides(arch)[-1]

    @property
    def out_channels(self) -> list[int]:
        """The channels of each output."""
        return [self.num_features[i] for i in self.out_indices]

    def build(self, in_channels: int, drop_path_rates: Sequence[float], with_cp: bool) -> None:
        """Make the modules, with their initial weights.

        Args:
            in_channels, with_cp: as of the class.
            drop_path_rates: one per block.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # mmcv's RoIAlign reads raw memory: channels-last strides would reach it through the FPN's
        # convolutions, and it would pool the wrong pixels without a word.
        return tuple(y.contiguous() for y in self.forward_channels_last(x))

    def forward_channels_last(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of ``forward`` in the memory format ``channels_last``, without its copies."""
        maps = self.forward_stages(x, self.out_indices)
        return tuple(self.norm_output(i, y) for i, y in zip(self.out_indices, maps, strict=True))

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some stages before norm and downsampling, each (B, H, W, C).

        Args:
            x: (B, in_channels, H, W).
            indices: increasing numbers of stages; none after the last one runs.
        """
        x, maps, final = self.embed(x), [], len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            # The plain call wherever it does: another module may stand in for a stage.
            if i == indices[-1]:
                maps.append(stage(x) if i == final else stage(x, downsample=False))
                break
            if i in indices:
                x, stage_map = stage(x, with_map=True)
                maps.append(stage_map)
            else:
                x = stage(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """The stem: (B, in_channels, H, W) to (B, H', W', C). A subclass may add to its map."""
        return self.patch_embed(x)

    def forward_with_cls(self, x: Tensor, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The class tokens (B, n, C) and the maps of some stages, both before the norm.

        Args:
            x, indices: as of :meth:`forward_stages`, which gives the maps alone.
        """
        raise NotImplementedError

    def output_norm(self, i: int) -> nn.Module | None:
        """The norm of output ``i``, of maps (B, C, H, W) as LayerNorm2d, or None."""
        return getattr(self, f'norm{i}', None)

    def norm_output(self, i: int, x: Tensor) -> Tensor:
        """The norm of output ``i``: (B, H, W, C) to (B, C, H, W), a view."""
        norm = self.output_norm(i)
        if norm is None:
            return x.movedim(-1, 1)
        last = self.norms_last or (isinstance(norm, nn.LayerNorm)
                                   and not isinstance(norm, LayerNorm2d))
        return norm(x).movedim(-1, 1) if last else norm(x.movedim(-1, 1))

    def train(self, mode: bool = True) -> 'Backbone':
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as mmpretrain's backbones.

        Args:
            param_name: full name of the parameter.
            prefix: what stands before the backbone's own names, such as ``'backbone.'``.

        Returns:
            (depth, number of depths): 0 for the stem, one per block, a downsampling with the
            block before it, the last for output norms and whatever is not the backbone's.
        """
        num_layers = sum(self.depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        levels = param_name[len(prefix):].split('.')
        if levels[0] in self.stem:
            return 0, num_layers
        if levels[0] != self.stages_name:
            return num_layers - 1, num_layers
        stage = int(levels[1])
        if levels[2] == 'blocks' and not self.is_flat:
            return sum(self.depths[:stage]) + int(levels[3]) + 1, num_layers
        return sum(self.depths[:stage + 1]), num_layers

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [getattr(self, name) for name in self.stem]
        stages = getattr(self, self.stages_name)
        for i in range(self.frozen_stages):
            frozen.append(stages[i])
            if i in self.out_indices:
                frozen.append(self.output_norm(i))
        for part in frozen:
            if isinstance(part, nn.Module):
                part.eval()
            if part is not None:
                part.requires_grad_(False)


def init_linear(module: nn.Module) -> None:
    """Linear: truncated normal of std 0.02, bias 0, for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _refuse_leftover(model, leftover):
    raise TypeError(
        f'{model} has no argument {", ".join(map(repr, sorted(leftover)))}. If the config '
        'replaces another backbone, that key was inherited from it: write '
        f"backbone=dict(_delete_=True, type='vmamba_mm.{model}', ...)"
        + (', and pretrained=None beside the backbone, where mmseg took that key from'
           if 'pretrained' in leftover else ''))


def _check_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
    if not indices or any(i not in range(num_stages) for i in indices) \
            or list(indices) != sorted(set(indices)):
        example = tuple(range(num_stages)) if num_stages <= 4 else (num_stages // 2, num_stages - 1)
        raise ValueError(f'out_indices must be increasing stage numbers from 0 to '
                         f'{num_stages - 1}, such as {example}, got {out_indices!r}')
    return indices
