"""The VMamba backbone (arXiv 2401.10166)."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, update_init_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import (
    FIRST_CONVS,
    adapt_in_channels,
    backbone_prefixes,
    describe_places,
    drop_wrappers,
    is_vmamba,
)
from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.families import resolve_arch
from vmamba_mm.families.vmamba import ARCH_SETTINGS, FAMILY
from vmamba_mm.layers import (
    ConvDownsample,
    ConvStem,
    LayerNorm2d,
    MergeDownsample,
    PatchStem,
    VSSBlock,
    VSSStage,
)
from vmamba_mm.models.fitting import check_fits, find_caller, under_names_of
from vmamba_mm.registry import MODELS

_STEMS = {'patch': PatchStem, 'conv': ConvStem}
_DOWNSAMPLES = {'merge': MergeDownsample, 'conv': ConvDownsample}
_SSM_KEYS = ('d_state', 'ssm_ratio', 'dt_rank', 'conv_bias', 'gate', 'act', 'conv_kernel',
             'ssm_init', 'scan')
_NUM_STAGES = 4
_PRETRAINED = ('Pretrained', 'PretrainedInit')
_OUT_NORM = re.compile(r'norm\d\.')


@MODELS.register_module()
class VMamba(BaseModule):
    """VMamba as a backbone for mmpretrain, mmdet and mmseg.

    Args:
        arch: a key of ``VMamba.arch_settings``, or a dict with the keys ``embed_dims``
            (channels C of the first stage, doubled at each further one), ``depths`` (blocks of
            the 4 stages), ``d_state`` (N), ``ssm_ratio`` (D / C), ``dt_rank`` ('auto' for
            ceil(C / 16), or an int), ``conv_bias``, ``gate`` (the SiLU(z) branch), ``mlp_ratio``
            (0 for no MLP), ``stem`` ('patch' or 'conv'), ``downsample`` ('merge' or 'conv'),
            ``scan`` ('cross', 'unidirectional', 'bidirectional', 'cascade', or a name of
            :func:`vmamba_mm.ops.register_scan`), and as it likes ``act`` ('silu', 'gelu' or
            'relu'), ``conv_kernel`` (3; 0 for no convolution) and ``ssm_init`` ('mamba', 'random'
            or 'zero'), as of :class:`SS2D`. With ``base``, the name of a published one, only the
            keys that differ from it: ``dict(base='tiny_s1l8', depths=(2, 2, 4, 2))``.
        out_indices: stages to return, each through a norm of its own, ``norm{i}``.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages with
            their norms and downsamplings.
        norm_eval: keep batch norms in eval mode while training. The model itself has layer
            norms only, which keep no statistics, so this matters to modules swapped in.
        with_cp: recompute each block in the backward pass (gradient checkpointing).
        in_channels: channels of the input.
        compile: True, or keyword arguments of ``torch.compile``, to compile the backbone alone,
            for training and evaluation (mmengine's own ``compile`` takes the training step).
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint=...)``. None keeps
            the published initialisation, which the layers set by themselves.

    Shape:
        (B, in_channels, H, W), any H and W of at least 1, to a tuple of (B, C_i, H_i, W_i) with
        C_i = embed_dims * 2^i and H_i about H / (4 * 2^i): the 'conv' stem and both downsamplings
        round up, the 'patch' stem down. The maps are contiguous.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    arch_settings = ARCH_SETTINGS

    def __init__(self, arch: str | Mapping[str, Any] = 'tiny_s1l8',
                 out_indices: Sequence[int] = (0, 1, 2, 3), drop_path_rate: float = 0.0,
                 frozen_stages: int = -1, norm_eval: bool = False, with_cp: bool = False,
                 in_channels: int = 3, compile: bool | Mapping[str, Any] = False,
                 init_cfg: dict | list[dict] | None = None, **leftover):
        if leftover:
            raise TypeError(
                f'VMamba has no argument {", ".join(map(repr, sorted(leftover)))}. If the config '
                'replaces another backbone, that key was inherited from it: write '
                "backbone=dict(_delete_=True, type='vmamba_mm.VMamba', ...)"
                + (', and pretrained=None beside the backbone, where mmseg took that key from'
                   if 'pretrained' in leftover else ''))
        super().__init__(init_cfg=init_cfg)
        self.arch = resolve_arch(FAMILY, arch)
        self.out_indices = _check_out_indices(out_indices)
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= _NUM_STAGES:
            raise ValueError(f'frozen_stages must be an int from -1 (nothing) to {_NUM_STAGES} '
                             f'(all), got {frozen_stages!r}')
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels must be an int of at least 1, got {in_channels!r}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        self.depths = self.arch['depths']
        self.num_features = [self.arch['embed_dims'] * 2 ** i for i in range(_NUM_STAGES)]
        ssm_cfg = {key: self.arch[key] for key in _SSM_KEYS if key in self.arch}
        rates = iter(torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist())

        self.patch_embed = _STEMS[self.arch['stem']](in_channels, self.num_features[0])
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(self.num_features, self.depths, strict=True)):
            last = i == _NUM_STAGES - 1
            blocks = [VSSBlock(dim, mlp_ratio=self.arch['mlp_ratio'], drop_path=next(rates),
                               with_cp=with_cp, ssm_cfg=ssm_cfg,
                               feeds_matmul=not last and j == depth - 1) for j in range(depth)]
            downsample = None if last else _DOWNSAMPLES[self.arch['downsample']](dim)
            self.stages.append(VSSStage(blocks, downsample))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(self.num_features[i]))

        self.apply(_init_linear)
        self._freeze_stages()
        if compile or isinstance(compile, Mapping):  # an empty dict asks for it too
            self.compile(**(compile if isinstance(compile, Mapping) else {}))

    def init_weights(self) -> None:
        """As mmengine's; ``init_cfg=dict(type='Pretrained', ...)`` loads strictly.

        The dict takes the arguments of :meth:`load_pretrained`.
        """
        init_cfg = self.init_cfg
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or ())
        pretrained = [c for c in cfgs if type_name(c) in _PRETRAINED]
        if self._is_init or not pretrained:
            super().init_weights()
            return
        arguments = [{k: v for k, v in c.items() if k != 'type'} for c in pretrained]
        for kwargs in arguments:
            _check_keys(kwargs, self.load_pretrained)
        self.init_cfg = [c for c in cfgs if c not in pretrained]
        super().init_weights()
        self.init_cfg = init_cfg
        for kwargs in arguments:
            self.load_pretrained(**kwargs)
            if hasattr(self, '_params_init_info'):
                update_init_info(self, init_info=f'loaded from {kwargs["checkpoint"]}')

    def load_pretrained(self, checkpoint: str, prefix: str | None = None,
                        weights: str = 'auto', map_location: Any = 'cpu',
                        adapt_in_channels: bool = False, strict: bool | None = None,
                        allow: str | Sequence[str] = ()) -> None:
        """Load the backbone of a checkpoint, official or ours; all of it, or raise.

        The norms of the outputs, ``norm{i}``, belong to the task: they are loaded if the
        checkpoint has all that this model has, and stay as they are otherwise, as the published
        detectors and segmentors started from classifiers. A head beside the backbone is ignored.

        What a VMamba of this architecture has must be in the checkpoint. What a user added to the
        model (modules of a subclass, buffers, adapters), or to the model in the checkpoint,
        follows ``strict``.

        Args:
            checkpoint, weights, map_location: as of
                :func:`vmamba_mm.checkpoints.files.read_checkpoint`.
            prefix: where the backbone lies in the checkpoint; None for ``'backbone.'``, where
                official files have it too under our names, or for the only VMamba there is.
            adapt_in_channels: adapt the stem's first convolution to ``in_channels``, as timm
                does: :func:`vmamba_mm.checkpoints.names.adapt_in_channels`.
            strict: None: what a user added to the model may be missing from the checkpoint, and
                stays as it is, but nothing may be left over. True: it may not be missing either.
                False: what the model has no place for may be left over too.
            allow: regular expressions of names that may be missing, left over or of another
                shape, such as ``['^stages.3', 'norm1']``; the names are this model's, with or
                without ``backbone.`` before them. Another architecture is refused all the same.

        Raises:
            UserError: if the file cannot be read, or any weight is missing, left over or of
                another shape; it names the architecture that the file holds. The model is then as
                it was.
        """
        state = self._find_backbone(checkpoint, prefix, weights, map_location)
        ours = self.state_dict()
        norms = {k for k in ours if _OUT_NORM.match(k)}
        found = under_names_of(state, ours)
        logger = MMLogger.get_current_instance()
        if not norms <= set(found):
            logger.info(f'{checkpoint} has not the norms of all outputs {self.out_indices}: they '
                        'start anew')
            found.update({k: v for k, v in ours.items() if k in norms})
        found = {k: v for k, v in found.items() if k in norms or not _OUT_NORM.match(k)}
        if adapt_in_channels:
            self._adapt_stem(found, ours, checkpoint)
        left = check_fits(self, found, str(checkpoint), strict, allow)
        if left:
            logger.info(f'Not loaded from {checkpoint} (missing, left over or of another shape): '
                        f'{", ".join(left[:20])}'
                        + (f' and {len(left) - 20} more' if len(left) > 20 else ''))
        self.load_state_dict({k: v for k, v in found.items() if k not in left}, strict=False)

    def _find_backbone(self, checkpoint, prefix, weights, map_location):
        """The weights in a checkpoint, by the names that they have below their place."""
        place = f'{(prefix or "backbone").rstrip(".")}.'
        usual = place == 'backbone.'
        state = read_checkpoint(checkpoint, weights, map_location, keep_places=not usual)
        state = state.get('state_dict', state)
        state = drop_wrappers({k: v for k, v in state.items() if isinstance(k, str)})
        places = backbone_prefixes(state)
        if usual and place not in places:
            if len(places) > 1:
                raise UserError(f'{checkpoint} holds {describe_places(state)}: say with prefix= '
                                'which one is meant')
            place = places[0] if places else place
        found = _inside(state, place)
        if not found:
            tops = sorted({k.partition('.')[0] for k in state})
            raise UserError(f'{checkpoint} has no weights that begin with {place!r}, only with: '
                            f'{", ".join(tops[:8])}'
                            + (f'; it holds {describe_places(state)}' if places else ''))
        # A classifier around a bare VMamba has its head beside the stages.
        return {k: v for k, v in found.items() if not k.startswith('head.fc.')
                or k in self.state_dict()}

    def _adapt_stem(self, found, ours, checkpoint):
        for key in FIRST_CONVS:
            if key in found and key in ours and found[key].dim() == 4:
                try:
                    found[key] = adapt_in_channels(found[key], ours[key].shape[1])
                except UserError as err:
                    raise UserError(f'{checkpoint}: {err}') from err

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Take official names, and refuse a state dict that is not this model's.

        mmengine loads whole models with strict=False and only logs what did not fit: what a
        VMamba of this architecture has must be complete there. ``load_state_dict(part,
        strict=False)`` of torch, of this model or of one around it, loads a part, unless it has
        none of this model's names. Norms of outputs that this model does not have are left to
        ``strict``.
        """
        caller = find_caller()
        found = _inside(state_dict, prefix)
        renamed = under_names_of(found, self.state_dict())
        if list(renamed) != list(found):
            for key in found:
                del state_dict[prefix + key]
            state_dict.update({prefix + k: v for k, v in renamed.items()})
        # As the last of the hooks: those of others may rename what they know.
        check = self.register_load_state_dict_pre_hook(
            lambda _, state, *args: self._check_state(_inside(state, prefix), prefix, caller))
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            check.remove()

    def plain_state(self, arch: str | Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Names and shapes (3 channels) of a VMamba that nobody added to, on the device meta.

        Args:
            arch: as of the class; None for this model's.
        """
        with torch.device('meta'):
            return VMamba(arch or self.arch, self.out_indices).state_dict()

    def _check_state(self, found, prefix, caller):
        ours = self.state_dict()
        if not (caller.strict or caller.is_mmengine):
            if not prefix and not set(found) & set(ours):
                check_fits(self, found, 'the state dict')
            return
        whole = caller.state_dict
        if not found and isinstance(whole, Mapping) and is_vmamba(whole):
            raise UserError(f'the state dict does not fit the model: it holds '
                            f'{describe_places(whole)}, and nothing under {prefix!r}, where the '
                            'model has its VMamba; tools/convert_checkpoint.py brings a VMamba '
                            'alone to its usual place')
        found = {k: v for k, v in found.items() if k in ours or not _OUT_NORM.match(k)}
        check_fits(self, found, 'the state dict', caller.strict, is_whole=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # mmcv's RoIAlign reads raw memory: channels-last strides would reach it through the FPN's
        # convolutions, and it would pool the wrong pixels without a word.
        return tuple(y.contiguous() for y in self.forward_channels_last(x))

    def forward_channels_last(self, x: Tensor) -> tuple[Tensor, ...]:
        """What ``forward`` gives, in the memory format ``channels_last``: without its copies."""
        maps = self.forward_stages(x, self.out_indices)
        return tuple(self.norm_output(i, y) for i, y in zip(self.out_indices, maps, strict=True))

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some stages before norm and downsampling, each (B, H, W, C).

        Args:
            x: (B, in_channels, H, W).
            indices: increasing numbers of stages; none after the last one runs.
        """
        x, maps, final = self.patch_embed(x), [], len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            # The plain call wherever it does: another module may stand in for a stage.
            if i == indices[-1]:
                maps.append(stage(x) if i == final else stage(x, downsample=False))
                break
            if i in indices:
                x, before = stage(x, with_map=True)
                maps.append(before)
            else:
                x = stage(x)
        return maps

    def norm_output(self, i: int, x: Tensor) -> Tensor:
        """The norm of output ``i``: (B, H, W, C) to (B, C, H, W), a view."""
        norm = getattr(self, f'norm{i}')
        if isinstance(norm, nn.LayerNorm) and not isinstance(norm, LayerNorm2d):
            return norm(x).permute(0, 3, 1, 2)  # put there by a user: of the last dimension
        return norm(x.permute(0, 3, 1, 2))

    def train(self, mode: bool = True) -> 'VMamba':
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
        parts = param_name[len(prefix):].split('.')
        if parts[0] == 'patch_embed':
            return 0, num_layers
        if parts[0] != 'stages':
            return num_layers - 1, num_layers
        stage = int(parts[1])
        if parts[2] == 'downsample':
            return sum(self.depths[:stage + 1]), num_layers
        return sum(self.depths[:stage]) + int(parts[3]) + 1, num_layers

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = [self.patch_embed]
        for i in range(self.frozen_stages):
            frozen.append(self.stages[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}


def _check_keys(given: Mapping[str, Any], function: Callable) -> None:
    """Raise one line that names the keys if ``given`` are none to call ``function`` with."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(set(given) - set(parameters))
    if unknown or 'checkpoint' not in given:
        wrong = f'has no key {", ".join(map(repr, unknown))}' if unknown else \
            "needs the key 'checkpoint'"
        raise TypeError(f"init_cfg=dict(type='Pretrained', ...) of VMamba {wrong}; its keys are "
                        f'{", ".join(parameters)}')


def _check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
    if not indices or any(i not in range(_NUM_STAGES) for i in indices) \
            or list(indices) != sorted(set(indices)):
        raise ValueError(f'out_indices must be increasing stage numbers from 0 to '
                         f'{_NUM_STAGES - 1}, such as (0, 1, 2, 3), got {out_indices!r}')
    return indices


def _init_linear(module: nn.Module) -> None:
    """Linear: truncated normal of std 0.02, bias 0. The rest starts as torch or SS2D sets it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
