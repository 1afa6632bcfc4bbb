"""RSMamba under the generic tests."""

import json

import torch
from official import SHARED
from specs import Spec

from vmamba_mm.families.rsmamba import FAMILY
from vmamba_mm.models import RSMamba

SHUFFLED = dict(embed_dims=8, depth=3, d_state=2, expand=2.0,
                path_type='forward_reverse_shuffle_gate', cls_token='none', patch_size=8, stride=4,
                image_size=16)
MIDDLE = dict(SHUFFLED, path_type='forward_reverse_gate', cls_token='middle', image_size=(8, 12),
              d_conv=3)
FORWARD = dict(SHUFFLED, path_type='forward', pos_embed='none', image_size=224)

_NAMES = (('patch_embed.proj.', 'patch_embed.projection.'), ('norm.', 'ln1.'),
          ('pool_norm.', 'ln2.'))


def _shapes(arch, height, width):
    return [(arch['embed_dims'], *(-(-side // arch['stride']) for side in (height, width)))
            ] * arch['depth']


def official_name(key):
    """Written out from the released files."""
    if key.startswith('blocks.'):
        _, number, _, rest = key.split('.', 3)
        layers = f'layers.{number}.{rest}'
        return layers if rest != 'gate.weight' else f'gate_layers.{number}.0.weight'
    for ours, theirs in _NAMES:
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def _dense(model):
    return [{official_name(k): v for k, v in model.state_dict().items()}]


def _classifiers(model, num_classes):
    head = {'head.fc.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.fc.bias': torch.randn(num_classes)}
    return [{f'backbone.{k}': v for k, v in state.items()} | head for state in _dense(model)]


def _published_keys():
    """The list is of backbones."""
    path = SHARED / 'facts/keys/rsmamba.json'
    if not path.is_file():
        return None
    published = {}
    sizes = dict(s='small', b='base', l='large', h='huge')
    for name, model in json.loads(path.read_text()).items():
        keys = {f'backbone.{k}': tuple(shape) for k, shape in model['keys'].items()}
        dims = keys['backbone.pre_norm.weight']
        published[sizes[name.removeprefix('RSMamba-')]] = keys | {
            'head.fc.weight': (45, *dims), 'head.fc.bias': (45,)}
    return published


SPEC = Spec(
    family=FAMILY, model=RSMamba, archs=dict(shuffled=SHUFFLED, middle=MIDDLE, forward=FORWARD),
    shapes=_shapes, official=_dense, official_classifiers=_classifiers,
    published_keys=_published_keys, repeatable=dict(shuffle='never'),
    called_often=r'pre_norm$|mixer\.(conv1d|x_proj|dt_proj|out_proj)$',
    changes=[dict(embed_dims=12), dict(depth=1), dict(d_state=3), dict(expand=1.5),
             dict(path_type='forward_reverse_gate'), dict(path_type='forward'),
             dict(cls_token='middle'), dict(patch_size=4, stride=2, image_size=8),
             dict(image_size=20), dict(image_size=(8, 12)), dict(d_conv=3), dict(dt_rank=3),
             dict(final_norm=False), dict(pos_embed='none', image_size=224)],
    wrong=[(dict(depth=0), 'depth.*an int of at least 1'),
           (dict(path_type='shuffle'), "path_type.*'forward', 'forward_reverse_mean', "),
           (dict(cls_token='head_tail'), "cls_token.*'none', 'head', 'middle' or 'tail'"),
           (dict(stride=17), 'stride.*at most patch_size'),
           (dict(image_size=(8, 8, 8)), 'image_size.*or two of them'),
           (dict(pos_embed='rope'), "pos_embed.*'learnable', 'sine' or 'none'"),
           (dict(pos_embed='sine', cls_token='head'), 'sine.*no row for a class token'),
           (dict(pos_embed='sine', embed_dims=6), 'sine.*multiple of 4'),
           (dict(final_norm=1), 'True or False'), (dict(expand=0), 'a number above 0')],
    layer_depths={'patch_embed.proj.weight': 0, 'pos_embed': 0, 'pre_norm.weight': 0,
                  'blocks.0.mixer.A_log': 1, 'blocks.2.mixer.gate.weight': 3, 'norm.weight': 4},
    a_weight='blocks.1.mixer.out_proj.weight')
