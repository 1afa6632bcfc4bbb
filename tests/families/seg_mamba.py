"""SegMamba under the generic tests."""

import json

from official import SHARED
from specs import Spec

from vmamba_mm.families.seg_mamba import FAMILY
from vmamba_mm.heads import SegMamba
from vmamba_mm.models import SegMambaEncoder

SMALL = dict(embed_dims=(4, 6, 8, 10), depths=(1, 2, 1, 1), d_state=2, num_slices=(64, 32, 16, 8))
WIDER = dict(SMALL, embed_dims=(5, 4, 6, 4), depths=(1, 1, 1, 1), d_state=3)
SLICES = 32
HIDDEN = 12


def _shapes(arch, height, width):
    sides = [-(-side // 16) * 16 for side in (SLICES, height, width)]
    return [(dim, *(side // 2 ** (i + 1) for side in sides))
            for i, dim in enumerate(arch['embed_dims'])]


def official_name(key):
    """Written out from the list of names."""
    levels = key.split('.')
    top, number = levels[0], int(levels[1]) if len(levels) > 1 and levels[1].isdigit() else None
    if top == 'decode_head':
        part, rest = levels[1], levels[2:]
        if part == 'conv_seg':
            return '.'.join(['out.conv.conv', *rest])
        if part == 'last':
            return '.'.join(['decoder1.layer', rest[0], 'conv', *rest[1:]])
        if part == 'skips':
            return '.'.join([f'encoder{int(rest[0]) + 1}.layer', rest[1], 'conv', *rest[2:]])
        block = 'transp_conv' if rest[1] == 'up' else f'conv_block.{rest[1]}'
        return '.'.join([f'decoder{5 - int(rest[0])}', block, 'conv', *rest[2:]])
    if top == 'patch_embed':
        return f'downsample_layers.0.0.{levels[-1]}'
    if top.startswith('norm'):
        return '.'.join([f'mlps.{top.removeprefix("norm")}', *levels[1:]])
    if levels[2] == 'downsample':
        return f'downsample_layers.{number + 1}.1.{levels[-1]}'
    if levels[2] == 'gsc':
        return '.'.join([f'gscs.{number}', *levels[3:]])
    part = {'norm': 'norm', 'mixer': 'mamba'}[levels[4]]
    return '.'.join(['stages', levels[1], levels[3], part, *levels[5:]])


def _official(model):
    return [{official_name(k): v for k, v in model.state_dict().items()}]


def _whole_model(arch, name, **kwargs):
    return SegMamba(**{**(dict(in_channels=4) if name else dict(in_channels=3, hidden_dims=HIDDEN)),
                       **kwargs}, arch=arch)


def _networks(model, num_classes):
    whole = _whole_model(model.arch, '', out_channels=num_classes)
    head = {official_name(k): v for k, v in whole.state_dict().items()
            if not k.startswith('backbone.')}
    return [{f'vit.{k}': v for k, v in state.items()} | head for state in _official(model)]


def _published_keys():
    path = SHARED / 'facts/keys/seg_mamba.json'
    if path.is_file():
        keys = json.loads(path.read_text())['BraTS']['keys']
        base = {k: tuple(shape) for k, shape in keys.items()}
        stem = 'vit.downsample_layers.0.0.weight'
        width, channels, *sides = base[stem]
        assert channels == 4
        return dict(base=base | {stem: (width, 3, *sides)})  # the generic tests have 3 channels


SPEC = Spec(
    family=FAMILY, model=SegMambaEncoder, archs=dict(small=SMALL, wider=WIDER), shapes=_shapes,
    slices=SLICES,
    whole_model=_whole_model, official=_official, official_classifiers=_networks,
    published_keys=_published_keys,
    changes=[dict(embed_dims=(4, 6, 8, 12)), dict(depths=(1, 1, 1, 2)), dict(d_state=3)],
    wrong=[(dict(embed_dims=4), 'embed_dims.*4 ints'), (dict(depths=(1, 1, 0, 1)), '4 ints'),
           (dict(d_state=0), 'd_state.*at least 1'),
           (dict(num_slices='real'), "num_slices.*4 ints of at least 1, or 'depth'")],
    layer_depths={'patch_embed.proj.weight': 0, 'stages.0.blocks.0.mixer.A_b_log': 1,
                  'stages.0.downsample.conv.weight': 1, 'stages.1.blocks.1.norm.weight': 3,
                  'stages.1.gsc.proj.weight': 3, 'norm0.fc1.weight': 6},
    a_weight='stages.1.blocks.0.mixer.out_proj.weight',
    zero_grads=r'stages\.\d\.gsc\.proj\d?\.bias')
