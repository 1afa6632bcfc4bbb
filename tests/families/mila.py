"""MILA under the generic tests."""

import re

import torch
from official import listed_keys
from specs import Spec

from vmamba_mm.families.mila import FAMILY
from vmamba_mm.models import MILA

# Heads leave no trace in weights; without the key they are those of the published models.
PUBLISHED = dict(embed_dims=8, depths=(1, 1, 2, 1))
HEADS = dict(PUBLISHED, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
TWO_STAGES = dict(embed_dims=12, depths=(1, 2), num_heads=(4, 3), mlp_ratio=2.5, qkv_bias=False,
                  image_size=48)


def _shapes(arch, height, width):
    height, width = -(-height // 4), -(-width // 4)
    shapes = []
    for i in range(len(arch['depths'])):
        shapes.append((arch['embed_dims'] * 2 ** i, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def _rotations(dim, height, width):
    """Section 1 of the facts, with complex numbers."""
    rates = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.arange(height), torch.arange(width)
    angles = torch.cat([(rows[:, None] * rates)[:, None].expand(-1, width, -1),
                        (columns[:, None] * rates)[None].expand(height, -1, -1)], -1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def _official(model):
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r'\.attn\.(in_proj|act_proj|out_proj)\.', r'.\1.', key)
        key = key.replace('.attn.conv2d.', '.dwc.').replace('stages.', 'layers.')
        state['absolute_pos_embed' if key == 'pos_embed' else key] = value
    for i, (dim, depth) in enumerate(zip(model.num_features, model.depths, strict=True)):
        for j in range(depth):  # of images of 64 pixels
            state[f'layers.{i}.blocks.{j}.attn.rope.rotations'] = _rotations(
                dim, 16 // 2 ** i, 16 // 2 ** i)
    return [state]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.bias': torch.randn(num_classes)}
    return [{re.sub(r'^norm\d\.', 'norm.', k): v for k, v in state.items()} | head
            for state in _official(model)]


def _published_keys():
    """Without what our model computes."""
    listed = listed_keys('mila', dict(tiny='T', small='S', base='B'))
    return listed and {arch: {key: shape for key, shape in keys.items()
                              if not key.endswith('rotations')}
                       for arch, keys in listed.items()}


SPEC = Spec(
    family=FAMILY, model=MILA, archs=dict(published=PUBLISHED, heads=HEADS, two_stages=TWO_STAGES),
    shapes=_shapes, published_keys=_published_keys,
    changes=[dict(embed_dims=16), dict(depths=(1, 2, 1, 1)), dict(depths=(2,)),
             dict(mlp_ratio=2.0), dict(qkv_bias=False), dict(image_size=32)],
    wrong=[(dict(embed_dims=6), 'embed_dims.*a multiple of 4'),
           (dict(depths=()), 'depths.*at least 1 for each stage'),
           (dict(num_heads=(1, 1)), 'num_heads.*a number for each of the 4 stages'),
           (dict(num_heads=(5, 1, 1, 1)), 'num_heads.*must divide.*stage 0 has .* for 5'),
           (dict(mlp_ratio=0), 'mlp_ratio.*a number above 0'),
           (dict(mlp_ratio=0.001), 'mlp_ratio.*no channel'),
           (dict(qkv_bias=1), 'True or False'), (dict(image_size=-1), 'image_size.*0 for no')],
    official=_official, official_classifiers=_classifiers,
    layer_depths={
        'patch_embed.conv1.conv.weight': 0, 'stages.0.blocks.0.attn.qk.weight': 1,
        'stages.0.downsample.conv.0.conv.weight': 1, 'stages.2.blocks.1.cpe2.bias': 4,
        'stages.3.blocks.0.attn.lepe.weight': 5, 'norm3.weight': 6},
    # Of a single token, which the last map of small images is, attention returns the value.
    zero_grads=r'stages\.3\.blocks\.0\.attn\.qk\.(?:weight|bias)',
    a_weight='stages.1.blocks.0.mlp.fc1.weight')
