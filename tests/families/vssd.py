"""VSSD under the generic tests."""

import json

import torch
from official import SHARED
from specs import Spec

from vmamba_mm.families.vssd import FAMILY
from vmamba_mm.models import VSSD

PUBLISHED = dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), d_state=4)
SIMPLE = dict(PUBLISHED, depths=(1, 1, 1, 1), num_heads=(2, 4, 4, 8), positive=False,
              mlp_ratio=2.0, stem='patch', downsample='conv')


def _shapes(arch, height, width):
    height, width = -(-height // 4), -(-width // 4)
    shapes = []
    for i in range(4):
        shapes.append((arch['embed_dims'] * 2 ** i, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def _official(model):
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (('stages.', 'layers.'), ('.attn.qkv.', '.attn.to_qkv.'),
                             ('.attn.proj.', '.attn.to_out.')):
            key = key.replace(ours, theirs)
        state[f'out{key}' if key.startswith('norm') else key] = value
    return [state]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.bias': torch.randn(num_classes)}
    return [{k.replace('outnorm3.', 'norm.'): v for k, v in state.items()} | head
            for state in _official(model)]


def _published_keys():
    """From a list that gives the first block of each stage for all, as ``blocks.0..7``."""
    path = SHARED / 'facts/keys/vssd.json'
    if not path.is_file():
        return None
    published = {}
    for name, model in json.loads(path.read_text()).items():
        published[name] = {}
        for key, shape in model['keys'].items():
            head, dots, rest = key.partition('0..')
            last, _, end = rest.partition('.')
            names = [f'{head}{i}.{end}' for i in range(int(last) + 1)] if dots else [key]
            published[name] |= {name_: tuple(shape) for name_ in names}
    return published


SPEC = Spec(
    family=FAMILY, model=VSSD, archs=dict(published=PUBLISHED, simple=SIMPLE), shapes=_shapes,
    published_keys=_published_keys,
    changes=[dict(embed_dims=16), dict(depths=(1, 2, 1, 1)), dict(num_heads=(2, 4, 8, 16)),
             dict(d_state=5), dict(mixers=('ssd', 'ssd', 'ssd', 'ssd')),
             dict(mixers=('ssd', 'attention', 'attention', 'ssd')), dict(expand=1.5),
             dict(mlp_ratio=2.0), dict(stem='patch'), dict(downsample='conv')],
    wrong=[(dict(embed_dims=7), 'embed_dims.*an even int'), (dict(depths=(1, 1, 1)), '4 ints'),
           (dict(num_heads=(3, 1, 1, 1)), 'num_heads.*must divide.*stage 0 has .* for 3'),
           (dict(num_heads=(1, 2, 4, 7)), 'num_heads.*must divide.*stage 3 has .* for 7'),
           (dict(n_groups=3), 'n_groups.*must divide the heads.*stage 0'),
           (dict(mixers=('attention', 'ssd', 'ssd', 'ssd')), "mixers.*the first of them 'ssd'"),
           (dict(mixers=('ssd', 'mamba2', 'ssd', 'ssd')), "4 of 'ssd' and 'attention'"),
           (dict(positive=1), 'True or False'), (dict(expand=0), 'expand.*a number above 0'),
           (dict(mlp_ratio=0.001), 'mlp_ratio.*no channel'),
           (dict(stem='conv'), "stem.*'residual' or 'patch'"),
           (dict(downsample='merge'), "downsample.*'inverted' or 'conv'")],
    official=_official, official_classifiers=_classifiers,
    layer_depths={
        'patch_embed.conv1.conv.weight': 0, 'stages.0.blocks.0.attn.A_log': 1,
        'stages.0.downsample.conv.0.conv.weight': 1, 'stages.2.blocks.1.cpe2.bias': 4,
        'stages.3.blocks.0.attn.qkv.weight': 5, 'norm3.weight': 6},
    a_weight='stages.2.blocks.0.mlp.fc1.weight')
