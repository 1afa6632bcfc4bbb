"""EfficientViM under the generic tests."""

import re

import torch
from official import listed_keys
from specs import Spec

from vmamba_mm.families.efficientvim import FAMILY
from vmamba_mm.heads import StageFusionHead
from vmamba_mm.models import EfficientViM
from vmamba_mm.testing import Classifier

PUBLISHED = dict(embed_dims=(8, 12, 16), depths=(1, 2, 1), d_state=(6, 4, 3))
NARROW = dict(embed_dims=(16, 8, 12), depths=(1, 1, 1), d_state=(2, 3, 1), expand=0.5,
              mlp_ratio=1.5)


def _shapes(arch, height, width):
    height, width = -(-height // 16), -(-width // 16)
    shapes = []
    for dim in arch['embed_dims']:
        shapes.append((dim, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def _official(model):
    """As the authors have it, and as timm's files, whose norms have one dimension."""
    authors, timms = {}, {}
    for key, value in model.state_dict().items():
        name = re.sub(r'\.mixer\.(BCdt_proj|dw|hz_proj|out_proj)\.', r'.mixer.\1.conv.', key)
        name = re.sub(r'^norm(\d)\.', r'norm.\1.', name)
        if re.search(r'mixer\.\w+_proj\.', key):
            value = value[:, :, None]
        elif '.fc1.weight' in key or '.fc2.weight' in key:
            value = value[:, :, None, None]
        timms[name] = value
        if re.search(r'blocks\.\d+\.norm\.|^norm\d\.', key):
            value = value[None, :, None, None] if key.startswith('norm3') else value[None, :, None]
        authors[name] = value
    return [authors, timms]


def _classifiers(model, num_classes):
    head = {'weights': torch.randn(4)}
    for i, dim in enumerate(model.out_channels):
        head |= {f'heads.{i}.weight': torch.randn(num_classes, dim),
                 f'heads.{i}.bias': torch.randn(num_classes)}
    return [state | head for state in _official(model)]


def _published_keys():
    return listed_keys('efficientvim', {f'm{i}': f'EfficientViM_M{i}' for i in range(1, 5)})


def _whole_model(arch, name):
    model = EfficientViM(arch, (2,), with_states=True)
    head = StageFusionHead(1000, model.out_channels, distilled='-dist_' in name)
    return Classifier(model, 1000, head=head)


SPEC = Spec(
    family=FAMILY, model=EfficientViM, archs=dict(published=PUBLISHED, narrow=NARROW),
    shapes=_shapes, whole_model=_whole_model, published_keys=_published_keys,
    changes=[dict(embed_dims=(16, 12, 16)), dict(depths=(1, 1, 2)), dict(d_state=(6, 4, 4)),
             dict(expand=2.0), dict(mlp_ratio=2.0)],
    wrong=[(dict(embed_dims=(12, 12, 16)), 'embed_dims.*the first of them a multiple of 8'),
           (dict(depths=(1, 1, 1, 1)), '3 ints'), (dict(d_state=(6, 4, 0)), 'd_state.*at least 1'),
           (dict(expand=0), 'expand.*a number above 0'),
           (dict(mlp_ratio=1e-3), 'mlp_ratio.*no channel')],
    official=_official, official_classifiers=_classifiers,
    layer_depths={
        'patch_embed.conv.0.conv.weight': 0, 'stages.0.blocks.0.alpha': 1,
        'stages.0.downsample.dwconv2.conv.weight': 1, 'stages.1.blocks.1.mixer.A': 3,
        'stages.2.blocks.0.norm.weight': 4},
    a_weight='stages.1.blocks.0.mixer.out_proj.weight')
