"""VideoMamba under the generic tests."""

import json

import torch
from official import SHARED
from specs import Spec

from vmamba_mm.families.videomamba import FAMILY
from vmamba_mm.models import VideoMamba

CLIP = dict(embed_dims=8, depth=3, d_state=2, patch_size=4, image_size=8, num_frames=2,
            tubelet_size=1)
IMAGE = dict(CLIP, num_frames=0)
OTHER = dict(CLIP, image_size=(8, 12), num_frames=4, tubelet_size=2, norm='ln',
             order='alternate', d_conv=3, expand=1)


def _shapes(arch, height, width):
    patch = arch['patch_size']
    frames = [arch['num_frames'] // arch['tubelet_size']] if arch['num_frames'] else []
    size = [*frames, max(1, height // patch), max(1, width // patch)]
    return [(arch['embed_dims'], *size)] * arch['depth']


def _official(model):
    """As the official code calls them."""
    names = {'norm.weight': 'norm_f.weight', 'norm.bias': 'norm_f.bias',
             'spatial_pos_embed': 'pos_embed', 'temporal_pos_embed': 'temporal_pos_embedding'}
    return [{names.get(k, k.replace('blocks.', 'layers.')): v
             for k, v in model.state_dict().items()}]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.bias': torch.randn(num_classes)}
    return [state | head for state in _official(model)]


def _published_keys():
    """Those of the arches, from a list that gives each model's blocks once."""
    path = SHARED / 'facts/keys/videomamba.json'
    if not path.is_file():
        return None
    published, models = {}, json.loads(path.read_text())
    for name, model in models.items():
        kind, size, *rest = name.split('_')
        if rest[-1] not in ('224', '288', '384', '448', '576') or 'pretrain' in rest \
                or 'student' in rest or 'encoder' in rest:
            continue
        arch = '_'.join([size, *(part for part in rest if part != '224')])
        shapes = models[model.get('same_keys_as', name)]['keys'] | model.get('differs', {})
        depth = FAMILY.archs[arch]['depth']
        published[arch] = {k.replace('layers.0.', f'layers.{i}.'): tuple(shape)
                           for k, shape in shapes.items()
                           for i in (range(depth) if k.startswith('layers.0.') else (0,))}
    return published


SPEC = Spec(
    family=FAMILY, model=VideoMamba, archs=dict(clip=CLIP, image=IMAGE, other=OTHER),
    shapes=_shapes, published_keys=_published_keys,
    changes=[dict(depth=1), dict(embed_dims=12), dict(d_state=3), dict(patch_size=2),
             dict(image_size=12), dict(image_size=(8, 12)), dict(num_frames=4, tubelet_size=2),
             dict(num_frames=6), dict(num_frames=0), dict(norm='ln'), dict(d_conv=3),
             dict(expand=1.5), dict(dt_rank=3)],
    wrong=[(dict(depth=0), 'depth.*an int of at least 1'),
           (dict(image_size=(8, 8, 8)), 'image_size.*height and width'),
           (dict(image_size=2), 'image_size.*at least.*patch_size'),
           (dict(num_frames=-1), 'num_frames.*at least 0'),
           (dict(num_frames=3, tubelet_size=2), 'num_frames.*multiple of.*tubelet_size'),
           (dict(num_frames=0, tubelet_size=2), 'tubelet_size.*of clips'),
           (dict(norm='batch'), "norm.*'rms' or 'ln'"),
           (dict(order='snake'), "order.*'spatial-first', 'temporal-first'"),
           (dict(expand=0), 'expand.*a number above 0'), (dict(d_conv=1), 'd_conv.*at least 2')],
    official=_official, official_classifiers=_classifiers,
    layer_depths={'patch_embed.proj.weight': 0, 'cls_token': 0, 'spatial_pos_embed': 0,
                  'temporal_pos_embed': 0, 'blocks.0.mixer.A_b_log': 1,
                  'blocks.1.norm.weight': 2, 'norm.weight': 4},
    a_weight='blocks.1.mixer.out_proj.weight',
    shares_names=lambda arch: not arch['num_frames'])  # with Vim
