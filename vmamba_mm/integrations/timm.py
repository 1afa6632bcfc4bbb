"""The nine architectures in timm: ``import vmamba_mm.timm``, then ``timm.create_model``.

    model = timm.create_model('vmamba_tiny_s1l8', pretrained=True)
    model = timm.create_model('vmamba_tiny_s1l8', features_only=True, out_indices=(1, 3))

torch.compile, torch.export and torch.fx work; torch.jit.script does not, as it cannot follow the
model's Python code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmamba_mm.checkpoints.compare import (
    adapt_in_channels,
    differences,
    explain_differences,
    fit_names,
)
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.errors import UserError
from vmamba_mm.families.vmamba import ARCH_SETTINGS
from vmamba_mm.models import VMamba
from vmamba_mm.models.base import init_linear

__all__ = ['TimmVMamba']

#: architecture.tag -> release tag (after its '#') and file. The first of an architecture is timm's
#: default; 'dp05_in1k' is the older model from which the published dense models of v0 started.
_FILES = {
    'vanilla_tiny.in1k': 'v0cls/vssmtiny_dp01_ckpt_epoch_292.pth',
    'vanilla_small.in1k': 'v0cls/vssmsmall_dp03_ckpt_epoch_238.pth',
    'vanilla_base.in1k': 'v0cls/vssmbase_dp06_ckpt_epoch_241.pth',
    'vanilla_base.dp05_in1k': '20240218/vssmbase_dp05_ckpt_epoch_260.pth',
    'tiny_s2l5.in1k': 'v2cls/vssm_tiny_0230_ckpt_epoch_262.pth',
    'small_s2l15.in1k': 'v2cls/vssm_small_0229_ckpt_epoch_222.pth',
    'base_s2l15.in1k': 'v2cls/vssm_base_0229_ckpt_epoch_237.pth',
    'tiny_s1l8.in1k': 'v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth',
    'small_s1l20.in1k': 'v2cls/vssm1_small_0229s_ckpt_epoch_240.pth',
    'base_s1l20.in1k': 'v2cls/vssm1_base_0229s_ckpt_epoch_225.pth',
}
_FIRST_CONV = {'conv': 'backbone.patch_embed.conv1', 'patch': 'backbone.patch_embed.proj'}
_POOLS = ('avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax', 'fastavgmax',
          'fastcatavgmax', '')


class TimmVMamba(nn.Module):
    """:class:`vmamba_mm.models.VMamba` and timm's classifier head, with timm's methods.

    Parameters are named ``backbone.*`` and ``head.fc.*``, as in mmpretrain's ImageClassifier and
    in the files of ``tools/convert_checkpoint.py``.

    Args:
        arch: as in VMamba.
        num_classes: 0 for none: the pooled features come out.
        in_chans: channels of the input.
        global_pool: a pooling of timm; '' for none, with ``num_classes=0`` only.
        drop_rate: dropout before the classifier.
        drop_path_rate: as in VMamba.
        device, dtype: of the parameters.

    Shape:
        (B, in_chans, H, W), any H and W, to (B, num_classes); ``forward_features`` to the normed
        map of the last stage, (B, C, H/32, W/32).

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    output_fmt = 'NCHW'

    def __init__(self, arch: str | Mapping[str, Any] = 'tiny_s1l8', num_classes: int = 1000,
                 in_chans: int = 3, global_pool: str = 'avg', drop_rate: float = 0.0,
                 drop_path_rate: float = 0.0, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        _check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.backbone = VMamba(arch, out_indices=(3,), drop_path_rate=drop_path_rate,
                               in_channels=in_chans)
        self.feature_info = [
            dict(num_chs=channels, reduction=4 * 2 ** i, module=f'backbone.stages.{i}.blocks')
            for i, channels in enumerate(self.backbone.num_features)]
        self.num_features = self.backbone.num_features[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool,
                                   drop_rate=drop_rate)
        self.head.apply(init_linear)
        self.to(device=device, dtype=dtype)

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier reads; 'catavgmax' doubles it."""
        return self.num_features * self.head.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.backbone.forward_channels_last(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier (none for 0 classes), and another pooling unless it is None."""
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        _check_head(num_classes, pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool)
        self.head.apply(init_linear)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.backbone.stages:
            for block in stage.blocks:
                block.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One group per block, or stage; a downsampling goes with the block before it."""
        return dict(
            stem=r'^backbone\.patch_embed',
            blocks=r'^backbone\.stages\.(\d+)' if coarse else [
                (r'^backbone\.stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^backbone\.stages\.(\d+)\.downsample', (99999,)),
                (r'^backbone\.norm', (99999,)),
            ])

    def no_weight_decay(self) -> set[str]:
        """Nothing by name: as published, all decays but biases and 1-D parameters."""
        return set()

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None,
                              norm: bool = False, stop_early: bool = False,
                              output_fmt: str = 'NCHW', intermediates_only: bool = False,
                              ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stages, before their downsampling.

        Args:
            x: (B, in_chans, H, W).
            indices: stages to return: the last n, a list, or None for all.
            norm: give the last stage's map through the model's norm, which fits no other stage.
            stop_early: compute no stage after the last one of ``indices``.
            output_fmt: of the maps: 'NCHW' or 'NHWC'.
            intermediates_only: leave the features out.

        Returns:
            (features, maps) or maps; the features are those of ``forward_features``, or, stopped
            early, the last map computed, both (B, C, H', W').
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        backbone = self.backbone
        take, last = feature_take_indices(len(backbone.stages), indices)
        final = last if stop_early or intermediates_only else len(backbone.stages) - 1
        computed = sorted({*take, final})
        raw = dict(zip(computed, backbone.forward_stages(x, computed), strict=True))
        outs = {i: y.permute(0, 3, 1, 2) for i, y in raw.items()}
        normed = outs | {i: backbone.norm_output(i, raw[i])
                         for i in computed if i == backbone.out_indices[-1]}
        maps = [(normed if norm else outs)[i] for i in take]
        maps = [y.permute(0, 2, 3, 1) if output_fmt == 'NHWC' else y.contiguous() for y in maps]
        return maps if intermediates_only else (normed[final].contiguous(), maps)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Remove what the maps of ``indices`` do not need; returns them counted from 0."""
        backbone = self.backbone
        take, last = feature_take_indices(len(backbone.stages), indices)
        shorter = last < len(backbone.stages) - 1
        if prune_norm or shorter:
            delattr(backbone, f'norm{backbone.out_indices[-1]}')
            backbone.out_indices = (last,)
            backbone.add_module(f'norm{last}', nn.Identity())
        if shorter:
            backbone.stages = backbone.stages[:last + 1]
            backbone.stages[last].downsample = None
            self.num_features = self.head.in_features = self.feature_info[last]['num_chs']
        if prune_head or shorter:
            self.reset_classifier(0, '')
        return take

    def load_pretrained(self, checkpoint_path: str, weights: str = 'auto') -> None:
        """Load a classifier, official or converted, strictly and without running its pickle.

        The classifier stays fresh where the model was built with another ``num_classes`` than
        ``pretrained_cfg`` names, and the first convolution is adapted to ``in_chans``, both as
        timm does it. Anything else that differs raises, and leaves the model as it was.

        Args:
            checkpoint_path, weights: as in :func:`vmamba_mm.checkpoints.files.read_checkpoint`.

        Raises:
            UserError: with one line that says what does not fit, and what to do.
        """
        checkpoint = read_checkpoint(checkpoint_path, weights)
        expected = self.state_dict()
        found = fit_names(checkpoint.get('state_dict', checkpoint), expected)
        conv = _FIRST_CONV[self.backbone.arch['stem']] + '.weight'
        if conv in found and found[conv].shape[1] == 3:
            found[conv] = adapt_in_channels(found[conv], self.in_chans)
        held = len(found['head.fc.bias']) if 'head.fc.bias' in found else 0
        if held != self.num_classes:
            found = {k: v for k, v in found.items() if not k.startswith('head.fc.')}
            found |= {k: v for k, v in expected.items() if k.startswith('head.fc.')}
        wrong = differences(expected, found)
        if wrong:
            raise UserError(explain_differences(wrong, expected, found, str(checkpoint_path)))
        promised = getattr(self, 'pretrained_cfg', {}).get('num_classes', 1000)
        if held != self.num_classes == promised:
            raise UserError(f'{checkpoint_path} holds a classifier of {held} classes, the model '
                            f'has {promised}: create it with num_classes={held}')
        self.load_state_dict(found)


def _check_head(num_classes: int, global_pool: str) -> None:
    if not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f'num_classes must be an int of at least 0, got {num_classes!r}')
    if global_pool not in _POOLS:
        raise ValueError(f'global_pool must be one of {_POOLS}, got {global_pool!r}')
    if num_classes > 0 and not global_pool:
        raise ValueError("global_pool='' leaves maps, which only num_classes=0 allows, got "
                         f'num_classes={num_classes}')


def _cfg(arch: str, file: str) -> dict[str, Any]:
    url = f'https://github.com/MzeroMiko/VMamba/releases/download/%23{file}'
    return dict(
        # As a 'file' it goes to load_pretrained, which downloads with a record of the hash.
        url=url, file=url, custom_load=True, input_size=(3, 224, 224), pool_size=(7, 7),
        fixed_input_size=False, num_classes=1000, crop_pct=0.875, interpolation='bicubic',
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classifier='head.fc',
        first_conv=_FIRST_CONV[ARCH_SETTINGS[arch]['stem']], license='mit',
        origin_url='https://github.com/MzeroMiko/VMamba',
        paper_name='VMamba: Visual State Space Model', paper_ids='arXiv:2401.10166')


#: read by register_model
default_cfgs = generate_default_cfgs(
    {f'vmamba_{name}': _cfg(name.partition('.')[0], file) for name, file in _FILES.items()})


def _register(arch: str) -> None:
    def create(pretrained: bool = False, pretrained_cfg_overlay: Mapping[str, Any] | None = None,
               feature_cls: str = 'getter', **kwargs) -> nn.Module:
        if feature_cls != 'getter':
            # The others take the inner maps as they are, which here is channels last.
            raise ValueError(f"feature_cls must be 'getter', got {feature_cls!r}")
        overlay = dict(pretrained_cfg_overlay or {})
        if overlay.get('file') or overlay.get('url'):
            overlay.setdefault('file', overlay.get('url'))
            overlay.setdefault('custom_load', True)  # timm would unset it
        return build_model_with_cfg(
            TimmVMamba, create.__name__, pretrained, pretrained_cfg_overlay=overlay,
            feature_cfg=dict(feature_cls='getter', out_indices=(0, 1, 2, 3)),
            **{'arch': arch, **kwargs})

    create.__name__ = create.__qualname__ = f'vmamba_{arch}'
    create.__doc__ = f"``arch='{arch}'``; keywords as in :class:`TimmVMamba`."
    globals()[create.__name__] = register_model(create)


for _arch in ARCH_SETTINGS:
    _register(_arch)
