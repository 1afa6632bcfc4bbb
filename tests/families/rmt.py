"""RMT under the generic tests."""

import re

import torch
from official import listed_keys
from specs import Spec

from vmamba_mm.families.rmt import FAMILY
from vmamba_mm.models import RMT

PUBLISHED = dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 3),
                 mlp_ratios=(4.0, 4.0, 3.0, 3.0))
SCALED = dict(PUBLISHED, depths=(1, 1, 1, 1), layer_scales=(0.0, 0.0, 1e-6, 1e-6))

_NAMES = (
    (r'^patch_embed\.conv(\d)\.conv', lambda m: f'patch_embed.proj.{3 * int(m[1]) - 3}'),
    (r'^patch_embed\.conv(\d)\.norm', lambda m: f'patch_embed.proj.{3 * int(m[1]) - 2}'),
    (r'^stages\.', 'layers.'), (r'\.(\d)\.decay$', r'.\1.Relpos.decay'), (r'\.pos\.', '.pos.conv.'),
    (r'\.downsample\.conv', '.downsample.reduction'), (r'\.norm1\.', '.retention_layer_norm.'),
    (r'\.norm2\.', '.final_layer_norm.'), (r'\.attn\.', '.retention.'),
    (r'\.lepe\.', '.lepe.conv.'), (r'\.mlp\.dwconv', '.ffn.dwconv.conv'), (r'\.mlp\.', '.ffn.'))


def _shapes(arch, height, width):
    height, width = ((size + 3) // 4 for size in (height, width))
    shapes = []
    for dim in arch['embed_dims']:
        shapes.append((dim, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def _official(model):
    state = {}
    for key, value in model.state_dict().items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        state[re.sub(r'^norm(\d)\.', r'extra_norms.\1.', key)] = value
    for i, heads in enumerate(model.arch['num_heads']):
        state[f'layers.{i}.Relpos.angle'] = torch.ones(model.arch['embed_dims'][i] // heads)
    return [state]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.bias': torch.randn(num_classes)}
    return [{re.sub(r'^extra_norms\.3\.', '', k): v for k, v in state.items()} | head
            for state in _official(model)]


def _published_keys():
    """Without what our model computes."""
    listed = listed_keys('rmt', dict(tiny='rmt_t', small='rmt_s', base='rmt_b', large='rmt_l'))
    return listed and {arch: {key: shape for key, shape in keys.items()
                              if not key.endswith('Relpos.angle')} for arch, keys in listed.items()}


SPEC = Spec(
    family=FAMILY, model=RMT, archs=dict(published=PUBLISHED, scaled=SCALED), shapes=_shapes,
    published_keys=_published_keys,
    changes=[dict(mlp_ratios=(2.0, 4.0, 3.0, 3.0)), dict(depths=(1, 2, 1, 1)),
             dict(num_heads=(4, 2, 2, 3)), dict(embed_dims=(16, 16, 16, 24)),
             dict(layer_scales=(1e-6, 0.0, 0.0, 1e-6))],
    wrong=[(dict(embed_dims=(7, 16, 16, 24)), 'embed_dims.*the first of them even'),
           (dict(depths=(1, 1, 1)), '4 ints'),
           (dict(num_heads=(3, 1, 1, 1)), 'num_heads.*even number.*stage 0 has .* for 3'),
           (dict(mlp_ratios=(3, 3, 3, 0)), 'mlp_ratios.*4 numbers above 0'),
           (dict(mlp_ratios=(3, 3, 3, 1e-4)), 'mlp_ratios.*stage 3 no channel'),
           (dict(forms=('whole', 'axial', 'whole', 'whole')), "4 of 'decomposed' and 'whole'"),
           (dict(init_values=2), 'init_values.*4 numbers above 0'),
           (dict(heads_ranges=(4, 4, 6, -1)), 'heads_ranges.*at least 0'),
           (dict(layer_scales=(0, 0, True, True)), 'layer_scales.*0 for none')],
    official=_official, official_classifiers=_classifiers,
    layer_depths={
        'patch_embed.conv1.conv.weight': 0, 'stages.0.blocks.0.pos.weight': 1,
        'stages.0.downsample.conv.weight': 1, 'stages.2.blocks.1.attn.lepe.bias': 4,
        'stages.3.blocks.0.attn.q_proj.weight': 5, 'norm3.weight': 6},
    a_weight='stages.2.blocks.0.mlp.fc1.weight')
