"""RAVLT under the generic tests."""

import re

import torch
from official import listed_keys
from specs import Spec

from vmamba_mm.families.ravlt import FAMILY, heads_of
from vmamba_mm.models import RAVLT

# Heads and kinds of attention leave no trace in weights; without the keys they are those of the
# published models.
PUBLISHED = dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 2, 1), mlp_ratios=(3.5, 3.5, 3.5, 3.5))
MIXED = dict(PUBLISHED, num_heads=(2, 1, 4, 3), mlp_ratios=(2.0, 3.0, 2.5, 3.0),
             attentions=('softmax', 'linear', ('linear', 'softmax'), 'linear'),
             layer_scales=(0.0, 1.0, 1.0, 0.0))

_NAMES = (
    (r'^patch_embed\.conv(\d)\.conv', lambda m: f'patch_embed.proj.{3 * int(m[1]) - 3}'),
    (r'^patch_embed\.conv(\d)\.norm', lambda m: f'patch_embed.proj.{3 * int(m[1]) - 2}'),
    (r'^stages\.', 'layers.'), (r'\.downsample\.conv', '.downsample.reduction'),
    (r'\.norm([12])\.', r'.norm\1.norm.'), (r'\.mlp\.', '.ffn.'),
    (r'^norm(\d)\.(weight|bias)$', r'extra_norms.\1.norm.\2'), (r'^norm3\.proj', 'proj'),
    (r'^norm3\.norm', 'norm'))


def _shapes(arch, height, width):
    height, width = ((size + 3) // 4 for size in (height, width))
    shapes = []
    for dim in arch['embed_dims']:
        shapes.append((dim, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def _official(model):
    """Linear layers are 1x1 convolutions, and the factors of maps with the channels first."""
    state = {}
    for key, value in model.state_dict().items():
        if 'gamma_' in key:
            value = value.view(1, -1, 1, 1)
        elif value.dim() == 2:
            value = value[..., None, None]
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        state[key] = value
    for i, heads in enumerate(heads_of(model.arch)):
        count = model.arch['embed_dims'][i] // heads // 4
        rates = 1 / 10000 ** torch.linspace(0, 1, count)
        state[f'layers.{i}.RoPE.angle'] = rates.repeat_interleave(2)
    return [state]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1], 1, 1),
            'head.bias': torch.randn(num_classes)}
    return [state | head for state in _official(model)]


def _published_keys():
    """Without what our model computes."""
    listed = listed_keys('ravlt', dict(tiny='T', small='S', base='B', large='L'))
    return listed and {arch: {key: shape for key, shape in keys.items()
                              if not key.endswith('RoPE.angle')} for arch, keys in listed.items()}


SPEC = Spec(
    family=FAMILY, model=RAVLT, archs=dict(published=PUBLISHED, mixed=MIXED), shapes=_shapes,
    published_keys=_published_keys,
    changes=[dict(mlp_ratios=(2.0, 3.5, 3.5, 3.5)), dict(depths=(1, 2, 1, 1)),
             dict(embed_dims=(16, 16, 16, 24)), dict(layer_scales=(1.0, 0.0, 0.0, 1.0))],
    wrong=[(dict(embed_dims=(8, 16, 18, 24)), 'embed_dims.*4 multiples of 4'),
           (dict(depths=(1, 1, 1)), '4 ints'),
           (dict(num_heads=(3, 1, 1, 1)), 'num_heads.*multiple of 4.*stage 0 has .* for 3'),
           (dict(mlp_ratios=(3, 3, 3, 0)), 'mlp_ratios.*4 numbers above 0'),
           (dict(mlp_ratios=(3, 3, 3, 1e-4)), 'mlp_ratios.*stage 3 no channel'),
           (dict(attentions=('linear', 'linear', 'whole', 'softmax')),
            "4 of 'linear' and 'softmax'"),
           (dict(depths=(1, 1, 2, 1), attentions=('linear', 'linear', ('softmax',), 'softmax')),
            'attentions.*a kind for each of the .* blocks'),
           (dict(layer_scales=(0, 0, True, True)), 'layer_scales.*0 for none')],
    official=_official, official_classifiers=_classifiers,
    layer_depths={
        'patch_embed.conv1.conv.weight': 0, 'stages.0.blocks.0.pos.weight': 1,
        'stages.0.downsample.conv.weight': 1, 'stages.2.blocks.1.attn.lepe.bias': 4,
        'stages.3.blocks.0.attn.qkvo.weight': 5, 'norm3.weight': 6},
    a_weight='stages.2.blocks.0.mlp.fc1.weight')
