"""The models of end_to_end.py: ours, the same as published, and their peers in timm."""

import timm
import torch
from end_to_end_report import OURS
from mila_models import MILAS
from ravlt_models import RAVLTS
from rmt_models import RMTS
from torch import nn
from vim_models import PUBLISHED, VIMS, make_vim
from vrwkv_models import VRWKVS
from vssd_models import VSSDS

import vmamba_mm.timm  # noqa: F401 (registers the classifiers)
from vmamba_mm.models import VMamba

#: name: timm's name, the layout that suits it, whether it is built for one size of images
PEERS = {'swin_t': ('swin_tiny_patch4_window7_224', torch.contiguous_format, True),
         'swin_s': ('swin_small_patch4_window7_224', torch.contiguous_format, True),
         'swin_b': ('swin_base_patch4_window7_224', torch.contiguous_format, True),
         'convnext_t': ('convnext_tiny', torch.channels_last, False),
         'convnext_s': ('convnext_small', torch.channels_last, False),
         'convnext_b': ('convnext_base', torch.channels_last, False),
         **{f'{name}_{size[0]}': (f'deit_{size}_patch16_224', torch.contiguous_format, True)
            for name in ('deit', 'plain_deit') for size in ('tiny', 'small', 'base')},
         'mambaout_t': ('mambaout_tiny', torch.channels_last, False),
         'mambavision_t': ('mamba_vision_T', torch.contiguous_format, False)}
TWINS = (VSSDS, RMTS, MILAS, RAVLTS, VRWKVS)
#: what runs as published, in plain PyTorch
PLAIN = tuple(name for twins in TWINS for name in twins.theirs)
MODELS = (*OURS, *PEERS, *PUBLISHED, *PLAIN)


def make_model(name: str, output: str, height: int, width: int) -> nn.Module:
    """A model with random weights, on the default device."""
    if name in VIMS or name in PUBLISHED:
        return make_vim(name, output, height, width)
    for twins in TWINS:
        if name in twins.ours or name in twins.theirs:
            return twins.make(name, output, height, width)
    if name in OURS:
        if output == 'maps':
            return VMamba(name, out_indices=(0, 1, 2, 3))
        return timm.create_model(f'vmamba_{name}', drop_path_rate=0.0)
    timm_name, _, one_size = PEERS[name]
    options = dict(img_size=(height, width)) if one_size else {}
    if output == 'maps':
        options['features_only'] = True
    create = timm.create_model
    if name == 'mambavision_t':
        from mambavision import create_model as create
    model = create(timm_name, drop_path_rate=0.0, **options)
    if name.startswith('plain_deit'):
        for module in model.modules():
            if hasattr(module, 'fused_attn'):
                module.fused_attn = False
    return model


def layout_of(name: str) -> torch.memory_format:
    """The layout that a model's images and convolutions have."""
    if name in PLAIN:
        return torch.contiguous_format
    return PEERS[name][1] if name in PEERS else torch.channels_last
