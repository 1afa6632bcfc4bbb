"""PointMamba under the generic tests."""

import torch
from official import listed_keys
from specs import Spec

from vmamba_mm.families.pointmamba import FAMILY
from vmamba_mm.heads import PartSegHead, PointClassifier, PointHead, PointSegmentor
from vmamba_mm.models import PointMamba

# What leaves no trace in weights, 64 groups of 32 points, is as published.
HILBERT = dict(embed_dims=8, depth=3, num_groups=64, group_size=32, order='hilbert', d_state=2)
AXES = dict(HILBERT, order='axes', norm='rms')
CLASS = dict(HILBERT, cls_token=True, d_state=3)

_EMBED = {'conv1': 'first_conv.0', 'norm1': 'first_conv.1', 'conv2': 'first_conv.3',
          'conv3': 'second_conv.0', 'norm2': 'second_conv.1', 'conv4': 'second_conv.3'}
_HEAD = {'layers.0': 0, 'layers.1': 1, 'layers.4': 4, 'layers.5': 5, 'fc': 8}


def _shapes(arch, height, width):
    count = {'hilbert': 2, 'axes': 3}[arch['order']] * arch['num_groups']
    return [(arch['embed_dims'], count + arch.get('cls_token', False))] * arch['depth']


def official_name(key):
    """Written out from the list of names."""
    top, _, rest = key.partition('.')
    if top == 'patch_embed':
        layer, _, leaf = rest.partition('.')
        return f'encoder.{_EMBED[layer]}.{leaf}'
    if top == 'order_scales':
        number, _, leaf = rest.partition('.')
        kind = {'weight': 'gamma', 'bias': 'beta'}[leaf]
        return f'OrderScale_{kind}_{int(number) + 1}'
    if top == 'blocks':
        return f'blocks.layers.{rest}'
    if top == 'head':
        layer, _, leaf = rest.rpartition('.')
        return f'cls_head_finetune.{_HEAD[layer]}.{leaf}'
    return f'blocks.{key}' if top == 'norm_f' else key


def _official(model):
    return [{official_name(k): v for k, v in model.state_dict().items()}]


def _whole_model(arch, name):
    """By its name in the zoo, a classifier or a segmentation of parts."""
    if 'shapenetpart' in name:
        backbone = PointMamba(arch, (3, 7, 11), 'raw')
        return PointSegmentor(backbone, PartSegHead([384] * 3, 50))
    backbone = PointMamba(arch, out_type='raw')
    classes = 40 if 'modelnet40' in name else 15
    return PointClassifier(backbone, PointHead(
        backbone.num_features[-1], classes,
        'cls+avg' if backbone.arch.get('cls_token') else 'avg'))


def _classifiers(model, num_classes):
    head = PointHead(model.num_features[-1], num_classes,
                     'cls+avg' if model.arch.get('cls_token') else 'avg')
    return [{**state, **{official_name(f'head.{k}'): v for k, v in head.state_dict().items()}}
            for state in _official(model)]


def _published_keys():
    """The list has the first of the blocks of each."""
    names = {f'{order}_g{groups}': f'{version}_cls_{data}'
             for order, version in (('hilbert', 'final'), ('axes', 'early'))
             for groups, data in ((64, 'modelnet40'), (128, 'scanobjectnn'))}
    models = listed_keys('pointmamba', names)
    if models is None:
        return None
    return {arch: {k.replace('layers.0.', f'layers.{i}.'): shape for k, shape in keys.items()
                   for i in range(12 if 'layers.0.' in k else 1)}
            for arch, keys in models.items()}


def _drop_path_rates(arch, rate):
    if arch['order'] == 'hilbert':
        return torch.linspace(0, rate, arch['depth']).tolist()
    return [rate] * (arch['depth'] - 1) + [0.0]


SPEC = Spec(
    family=FAMILY, model=PointMamba, archs=dict(hilbert=HILBERT, axes=AXES, cls=CLASS),
    shapes=_shapes, is_of_points=True, sizes=((8, 8), (7, 10), (31, 33)), whole_model=_whole_model,
    official=_official, official_classifiers=_classifiers, published_keys=_published_keys,
    drop_path_rates=_drop_path_rates,
    changes=[dict(embed_dims=12), dict(depth=1), dict(d_state=3), dict(norm='rms'),
             dict(order='axes'), dict(cls_token=True)],
    wrong=[(dict(depth=0), 'depth.*an int of at least 1'),
           (dict(num_groups=0), 'num_groups.*an int of at least 1'),
           (dict(order='z'), "order.*'hilbert' or 'axes'"),
           (dict(norm='bn'), "norm.*'ln' or 'rms'"), (dict(cls_token=1), 'True or False'),
           (dict(order='axes', cls_token=True), "cls_token.*order='hilbert' alone")],
    layer_depths={'patch_embed.conv1.weight': 0, 'pos_embed.2.bias': 0,
                  'order_scales.1.bias': 0, 'blocks.0.mixer.A_log': 1, 'blocks.2.norm.weight': 3,
                  'norm_f.weight': 4},
    a_weight='blocks.1.mixer.out_proj.weight',
    nudge=0.01,
    zero_grads=r'patch_embed\.conv[13]\.bias')
