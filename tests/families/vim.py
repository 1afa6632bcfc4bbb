"""Vim under the generic tests."""

import json

import torch
from official import SHARED
from specs import Spec

from vmamba_mm.families.vim import FAMILY
from vmamba_mm.models import Vim

MIDDLE = dict(embed_dims=8, depth=3, d_state=2, patch_size=4, image_size=16, cls_token='middle')
OVERLAP = dict(MIDDLE, patch_size=16, image_size=224, stride=8, cls_token='none', norm='ln',
               layer_scale=0.1, expand=1, rope='both')
SHARED_MIXER = dict(MIDDLE, image_size=(8, 12), cls_token='double', mixer='shared', d_conv=3)


def _shapes(arch, height, width):
    patch, stride = arch['patch_size'], arch.get('stride', arch['patch_size'])
    height, width = (max(0, side - patch) // stride + 1 for side in (height, width))
    return [(arch['embed_dims'], height, width)] * arch['depth']


def _official(model):
    """As the official code calls them, with the table of the rotary embedding."""
    names = {f'norm{len(model.depths) - 1}': 'norm_f', 'blocks': 'layers'}
    state = {}
    for key, value in model.state_dict().items():
        top, _, rest = key.partition('.')
        state[f'{names.get(top, top)}.{rest}' if rest else key] = value
    if model.arch.get('rope', 'none') != 'none':
        state |= {'rope.freqs_cos': torch.ones(4, 8), 'rope.freqs_sin': torch.ones(4, 8)}
    return [state]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.bias': torch.randn(num_classes)}
    return [state | head for state in _official(model)]


def _published_keys():
    """Those of the classifiers, from a list that gives each model's blocks once."""
    path = SHARED / 'facts/keys/vim.json'
    if not path.is_file():
        return None
    published = {}
    for name, model in json.loads(path.read_text()).items():
        if name.startswith('vim_'):
            published[name.removeprefix('vim_')] = {
                k.replace('layers.0.', f'layers.{i}.'): tuple(shape)
                for k, shape in model['keys'].items()
                for i in (range(24) if k.startswith('layers.0.') else (0,))}
    return published


SPEC = Spec(
    family=FAMILY, model=Vim,
    archs=dict(middle=MIDDLE, overlap=OVERLAP, shared=SHARED_MIXER), shapes=_shapes,
    # Official VideoMambas of images have the same names.
    shares_names=lambda arch: arch['cls_token'] in ('middle', 'head')
    and arch.get('mixer', 'bidirectional') == 'bidirectional',
    published_keys=_published_keys,
    changes=[dict(embed_dims=12), dict(depth=1), dict(d_state=3), dict(patch_size=2),
             dict(image_size=20), dict(image_size=(8, 12)), dict(cls_token='none'),
             dict(cls_token='double'), dict(mixer='shared'), dict(mixer='causal'), dict(norm='ln'),
             dict(layer_scale=0.1), dict(d_conv=3), dict(expand=1.5), dict(dt_rank=3)],
    wrong=[(dict(depth=0), 'depth.*an int of at least 1'),
           (dict(image_size=(8, 8, 8)), 'image_size.*height and width'),
           (dict(image_size=2), 'image_size.*at least.*patch_size'),
           (dict(cls_token='tail'), "cls_token.*'middle', 'head', 'double' or 'none'"),
           (dict(stride=17), 'stride.*at most.*patch_size'),
           (dict(mixer='v2'), "mixer.*'bidirectional', 'shared' or 'causal'"),
           (dict(reduce='max'), "reduce.*'mean' or 'sum'"),
           (dict(depth=3, paired=True), 'depth.*must be even'), (dict(reverse=1), 'True or False'),
           (dict(rope='all'), "rope.*'none', 'hidden' or 'both'"),
           (dict(rope='both', embed_dims=6), 'rope.*multiple of 4'),
           (dict(rope='both', cls_token='double'), "rope.*than 'double'"),
           (dict(expand=0), 'expand.*a number above 0'), (dict(d_conv=1), 'd_conv.*at least 2')],
    official=_official, official_classifiers=_classifiers,
    layer_depths={'patch_embed.proj.weight': 0, 'cls_token': 0, 'pos_embed': 0,
                  'blocks.0.mixer.A_b_log': 1, 'blocks.1.norm.weight': 2, 'norm2.weight': 4},
    a_weight='blocks.1.mixer.out_proj.weight')
