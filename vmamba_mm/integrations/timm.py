"""All backbones in timm: ``import vmamba_mm.timm``, then ``timm.create_model``.

    model = timm.create_model('vmamba_tiny_s1l8', pretrained=True)
    model = timm.create_model('vmamba_tiny_s1l8', features_only=True, out_indices=(1, 3))

A name is that of the family and of a published architecture; the published weights of the zoo have
their tags behind it, such as ``vmamba_vanilla_base.dp05_in1k``. :func:`register_models` adds a
family of your own. Those that timm has itself under these names, as EfficientViM, stay timm's.

torch.compile, torch.export and torch.fx work; torch.jit.script does not, as it cannot follow the
model's Python code.
"""

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmamba_mm import zoo
from vmamba_mm.checkpoints.compare import adapt_in_channels, fit_names, require_equal
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES, Family, name_of, resolve_arch
from vmamba_mm.models import VMamba
from vmamba_mm.models.base import Backbone, init_linear
from vmamba_mm.registry import MODELS

__all__ = ['TimmBackbone', 'TimmVMamba', 'register_models']

_POOLS = ('avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax', 'fastavgmax',
          'fastcatavgmax', '')
#: Of tokens, the class token first.
_TOKEN_POOLS = ('token', 'avg', '')


class TimmBackbone(nn.Module):
    """A :class:`vmamba_mm.models.base.Backbone` and timm's classifier head, with timm's methods.

    Parameters are named ``backbone.*`` and ``head.fc.*``, as in mmpretrain's ImageClassifier and
    in the files of ``tools/convert_checkpoint.py``. ``TimmVMamba`` and its like are this class with
    the ``model`` of a family.

    Args:
        arch: as in the backbone; None for its default.
        num_classes: 0 for none: the pooled features come out.
        in_chans: channels of the input.
        global_pool: a pooling of timm; '' for none, with ``num_classes=0`` only. An arch with a
            class token takes 'token', that token, or 'avg', the mean of the patches. None for
            'token' there and 'avg' elsewhere, as the published weights have it.
        drop_rate: dropout before the classifier.
        drop_path_rate: as in the backbone.
        device, dtype: of the parameters.

    Shape:
        (B, in_chans, H, W), any H and W, to (B, num_classes); ``forward_features`` to the normed
        map of the last stage, (B, C, H', W'), or, of an arch with a class token, to tokens
        (B, 1 + H'W', C), that token first.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    model: type[Backbone]

    def __init__(self, arch: str | Mapping[str, Any] | None = None, num_classes: int = 1000,
                 in_chans: int = 3, global_pool: str | None = None, drop_rate: float = 0.0,
                 drop_path_rate: float = 0.0, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        arch = resolve_arch(self.model.family, arch or self.model.default_arch)
        self.has_cls_token = self.model.has_cls_token(arch)
        self.has_pool_norm = self.model.has_pool_norm(arch)
        self.output_fmt = 'NLC' if self.has_cls_token else 'NCHW'
        if global_pool is None:
            global_pool = 'token' if self.has_cls_token else 'avg'
        self._check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        depths, channels = self.model.stage_sizes(arch)
        pooled = dict(out_type='avg_featmap') if self.has_pool_norm else {}
        self.backbone = self.model(arch, out_indices=(len(depths) - 1,), in_channels=in_chans,
                                   drop_path_rate=drop_path_rate, **self.model.classifier_options,
                                   **pooled)
        inner = '' if self.backbone.is_flat else '.blocks'
        self.feature_info = [
            dict(num_chs=num_chs, reduction=stride,
                 module=f'backbone.{self.backbone.stages_name}.{i}{inner}')
            for i, (num_chs, stride) in enumerate(zip(
                channels, self.model.stage_strides(arch), strict=True))]
        self.num_features = self.backbone.num_features[-1]
        head = TokenHead if self.has_cls_token else ClassifierHead
        hidden = self.model.family.head_dims.get(name_of(self.model.family, arch))
        if hidden is not None:
            head = functools.partial(HiddenHead, hidden_features=hidden)
        self.head = head(self.num_features, num_classes, pool_type=global_pool,
                         drop_rate=drop_rate)
        self.head.apply(init_linear)
        self.to(device=device, dtype=dtype)

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier reads; 'catavgmax' doubles it."""
        return self.num_features * self.head.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        if not self.has_cls_token:
            return self.backbone.forward_channels_last(x)[0]
        last, = self.backbone.out_indices
        (cls, last_map), = self.backbone.forward_with_cls(x, (last,))
        return self._join(last, cls, last_map)

    def _join(self, i: int, cls: Tensor, stage_map: Tensor) -> Tensor:
        """Class tokens and the map of a stage, through its norm: (B, 1 + L, C)."""
        norm = self.backbone.norm_output
        parts = norm(i, cls).mean(2, keepdim=True), norm(i, stage_map).flatten(2)
        return torch.cat(parts, dim=2).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        head = self.head
        if not self.has_pool_norm or not head.global_pool.pool_type:
            return head(x, pre_logits=pre_logits)
        x = head.drop(self.backbone.pool_norm(head.global_pool(x)))
        return x if pre_logits else head.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier (none for 0 classes), and another pooling unless it is None."""
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        self._check_head(num_classes, pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool)
        self.head.apply(init_linear)

    def _check_head(self, num_classes, global_pool):
        pools = _TOKEN_POOLS if self.has_cls_token else _POOLS
        if self.has_pool_norm:  # which is of one pooling
            pools = tuple(pool for pool in pools if pool != 'catavgmax')
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f'num_classes must be an int of at least 0, got {num_classes!r}')
        if global_pool not in pools:
            raise ValueError(f'global_pool must be one of {pools}, got {global_pool!r}')
        if num_classes > 0 and not global_pool:
            raise ValueError("global_pool='' leaves maps, which only num_classes=0 allows, got "
                             f'num_classes={num_classes}')

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.backbone.modules():
            if hasattr(module, 'with_cp'):
                module.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """One group per block, or stage; a downsampling goes with the block before it."""
        backbone = self.backbone
        stages = rf'^backbone\.{backbone.stages_name}\.(\d+)'
        return dict(
            stem=rf'^backbone\.(?:{"|".join(backbone.stem)})(?:\.|$)',
            blocks=stages if coarse else [
                (stages + ('' if backbone.is_flat else r'\.blocks\.(\d+)'), None),
                (stages, (99999,)),
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
            early, those of the last map computed.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        backbone = self.backbone
        take, last = feature_take_indices(len(backbone.depths), indices)
        final = last if stop_early or intermediates_only else len(backbone.depths) - 1
        computed = sorted({*take, final})
        if self.has_cls_token:
            cls_tokens, stage_maps = zip(*backbone.forward_with_cls(x, computed), strict=True)
        else:
            stage_maps = backbone.forward_stages(x, computed)
        raw = dict(zip(computed, stage_maps, strict=True))
        outs = {i: y.permute(0, 3, 1, 2) for i, y in raw.items()}
        normed = outs | {i: backbone.norm_output(i, raw[i])
                         for i in computed if i == backbone.out_indices[-1]}
        maps = [(normed if norm else outs)[i] for i in take]
        maps = [y.permute(0, 2, 3, 1) if output_fmt == 'NHWC' else y.contiguous() for y in maps]
        if intermediates_only:
            return maps
        features = normed[final].contiguous() if not self.has_cls_token else \
            self._join(final, cls_tokens[-1], stage_maps[-1])
        return features, maps

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Remove what the maps of ``indices`` do not need; returns them counted from 0."""
        backbone = self.backbone
        take, last = feature_take_indices(len(backbone.depths), indices)
        shorter = last < len(backbone.depths) - 1
        norm = backbone.output_norm(backbone.out_indices[-1])
        if norm is not None and (prune_norm or shorter):
            name = next(name for name, child in backbone.named_children() if child is norm)
            setattr(backbone, name, nn.Identity())
            # A norm may have been a projection to other channels.
            backbone.num_features = [info['num_chs'] for info in self.feature_info]
        if shorter:
            stages = getattr(backbone, backbone.stages_name)[:last + 1]
            setattr(backbone, backbone.stages_name, stages)
            if not backbone.is_flat:
                stages[last].downsample = None
            backbone.depths = backbone.depths[:last + 1]
            backbone.num_features = backbone.num_features[:last + 1]
            backbone.out_indices = (last,)
        self.num_features = self.head.in_features = backbone.num_features[last]
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
        checkpoint = read_checkpoint(checkpoint_path, weights, family=self.backbone.family)
        expected = self.state_dict()
        weights = fit_names(checkpoint.get('state_dict', checkpoint), expected)
        for conv in (f'backbone.{name}' for name in self.backbone.family.first_convs):
            if conv in weights and weights[conv].shape[1] == 3:
                weights[conv] = adapt_in_channels(weights[conv], self.in_chans)
        inner = {k.removeprefix('backbone.'): v for k, v in weights.items()
                 if k.startswith('backbone.')}
        weights |= {f'backbone.{k}': v for k, v in self.backbone.adapt_weights(inner).items()}
        place = HiddenHead.classifier if isinstance(self.head, HiddenHead) else 'head.fc'
        held = len(weights[f'{place}.bias']) if f'{place}.bias' in weights else 0
        if held != self.num_classes:
            fresh = f'{place}.' if self.num_classes else 'head.'
            weights = {k: v for k, v in weights.items() if not k.startswith(fresh)}
            weights |= {k: v for k, v in expected.items() if k.startswith(fresh)}
        require_equal(expected, weights, str(checkpoint_path))
        promised = getattr(self, 'pretrained_cfg', {}).get('num_classes', 1000)
        if held != self.num_classes == promised:
            raise UserError(f'{checkpoint_path} holds a classifier of {held} classes, the model '
                            f'has {promised}: create it with num_classes={held}')
        self.load_state_dict(weights)


class TokenHead(nn.Module):
    """timm's ``ClassifierHead`` for tokens: a pooling, dropout, and ``fc``.

    Args:
        in_features: C.
        num_classes: 0 for no ``fc``.
        pool_type: 'token' for the first token, 'avg' for the mean of the others, '' for all.
        drop_rate: before ``fc``.

    Shape: (B, 1 + L, C) to (B, num_classes), (B, C) or (B, 1 + L, C).
    """

    def __init__(self, in_features: int, num_classes: int, pool_type: str = 'token',
                 drop_rate: float = 0.0):
        super().__init__()
        self.in_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str) -> None:
        self.global_pool = TokenPool(pool_type)
        self.fc = nn.Linear(self.in_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


class TokenPool(nn.Module):
    """The pooling of :class:`TokenHead`."""

    def __init__(self, pool_type: str):
        super().__init__()
        self.pool_type = pool_type

    def feat_mult(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        if self.pool_type == 'token':
            return x[:, 0]
        return x[:, 1:].mean(1) if self.pool_type == 'avg' else x


class HiddenHead(nn.Module):
    """timm's ``ClassifierHead`` with a hidden layer and a tanh before the classifier, named as in
    mmpretrain's VisionTransformerClsHead.

    Args:
        in_features, num_classes, pool_type, drop_rate: as of ``ClassifierHead``.
        hidden_features: width of the hidden layer.

    Shape: (B, C, H, W) to (B, num_classes), or what the pooling gives.
    """

    #: The name of the last layer in a model.
    classifier = 'head.layers.head'

    def __init__(self, in_features: int, num_classes: int, pool_type: str = 'avg',
                 drop_rate: float = 0.0, *, hidden_features: int):
        super().__init__()
        self.in_features, self.hidden_features = in_features, hidden_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        width = self.in_features * self.global_pool.feat_mult()
        self.layers = nn.Sequential(OrderedDict(
            pre_logits=nn.Linear(width, self.hidden_features), act=nn.Tanh(),
            head=nn.Linear(self.hidden_features, num_classes))) if num_classes else nn.Identity()

    @property
    def fc(self) -> nn.Module:
        return self.layers.head if isinstance(self.layers, nn.Sequential) else self.layers

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.layers(x)


class TimmVMamba(TimmBackbone):
    """:class:`TimmBackbone` around :class:`vmamba_mm.models.VMamba`."""

    model = VMamba


def register_models(family: Family) -> type[TimmBackbone]:
    """Register the published architectures of images with timm, as ``family_arch``, once.

    Those of clips are left out: timm's models take images.

    Returns:
        The class of the models.
    """
    backbone = MODELS.get(family.model)
    known = _REGISTERED.get(family.name)
    if known is not None and known.model is backbone:
        return known
    model = TimmVMamba if backbone is VMamba else type(
        f'Timm{family.model}', (TimmBackbone,), dict(model=backbone, __module__=__name__))
    configs = {}
    archs = [arch for arch, settings in family.archs.items() if not backbone.clip_length(settings)]
    for arch in archs:
        published = [e for e in zoo.entries(family.name, arch, 'cls') if e.weights]
        configs |= {f'{family.name}_{arch}.{e.tag}': _cfg(backbone, arch, e) for e in published}
        if not published:  # a name without a tag
            configs[f'{family.name}_{arch}'] = _cfg(backbone, arch)
    default_cfgs.update(generate_default_cfgs(configs))
    for arch in archs:
        _register(model, family, arch)
    _REGISTERED[family.name] = model
    return model


_REGISTERED: dict[str, type[TimmBackbone]] = {}
#: {name: configs of its weights}: register_model looks here for them.
default_cfgs: dict[str, Any] = {}


def _cfg(backbone: type[Backbone], arch: str, entry: zoo.Entry | None = None) -> dict[str, Any]:
    family = backbone.family
    settings = family.archs[arch]
    size = settings.get('image_size', 224)
    if entry:
        size = entry.metadata.get('Image Size', size)
    side = backbone.map_size(settings, size)
    config = dict(
        input_size=(3, size, size), pool_size=(side, side), fixed_input_size=False,
        num_classes=1000, crop_pct=0.875, interpolation='bicubic', mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classifier=HiddenHead.classifier if arch in family.head_dims else 'head.fc',
        first_conv=_first_conv(backbone, arch),
        license=family.licence.lower(), origin_url=family.url, custom_load=True)
    if entry:
        paper = entry.collection['Paper']
        # As a 'file' it goes to load_pretrained, which downloads with a record of the hash.
        config.update(url=entry.weights, file=entry.weights, paper_name=paper['Title'],
                      paper_ids=f'arXiv:{paper["URL"].rpartition("/")[2]}')
    return config


def _first_conv(backbone: type[Backbone], arch: str) -> str:
    """The name of the first convolution; which of several there is, the kind of the stem says."""
    names = backbone.family.first_convs
    if len(names) > 1:
        # Sizes change no names: one architecture of each kind is enough.
        kind = frozenset((k, v) for k, v in backbone.family.archs[arch].items()
                         if isinstance(v, str | bool))
        names = _first_convs(backbone, kind)
    return 'backbone.' + names[0].removesuffix('.weight') if names else ''


@functools.cache
def _first_convs(backbone: type[Backbone], kind: frozenset) -> list[str]:
    arch = next(arch for arch in backbone.family.archs.values() if kind <= set(arch.items()))
    with torch.device('meta'):
        state = backbone(arch).state_dict()
    return [name for name in backbone.family.first_convs if name in state]


def _register(model: type[TimmBackbone], family: Family, arch: str) -> None:
    num_stages = len(model.model.stage_sizes(family.archs[arch])[0])

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
            model, create.__name__, pretrained, pretrained_cfg_overlay=overlay,
            feature_cfg=dict(feature_cls='getter', out_indices=tuple(range(num_stages))),
            **{'arch': arch, **kwargs})

    create.__name__ = create.__qualname__ = f'{family.name}_{arch}'
    create.__doc__ = f"``arch='{arch}'``; keywords as in :class:`TimmBackbone`."
    globals()[create.__name__] = register_model(create)


for _family in FAMILIES.values():
    if _family.takes == 'images' and _family.task == 'cls' and not _family.in_timm:
        register_models(_family)
