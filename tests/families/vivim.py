"""ViViM under the generic tests."""

import json

import torch
from official import SHARED
from specs import Spec

from vmamba_mm.families.vivim import FAMILY
from vmamba_mm.models import ViViM

FRAME = dict(embed_dims=8, depth=3, d_state=2, expand=2.0, mixer='bidirectional',
             cls_token='frame', patch_size=4, image_size=16, num_frames=3)
DECOMPOSED = dict(FRAME, mixer='decomposed', expand=1.0, num_frames=2, image_size=(8, 12))
SCAN_NORM = dict(FRAME, mixer='scan_norm', num_frames=2)


def _shapes(arch, height, width):
    height, width = (max(1, side // arch['patch_size']) for side in (height, width))
    return [(arch['embed_dims'], arch['num_frames'], height, width)] * arch['depth']


def official_name(key):
    """Written out from the released files."""
    module, _, leaf = key.rpartition('.')
    key = f'norm_f.{leaf}' if module == 'norm' else key
    return key.replace('blocks.', 'layers.', 1)


def _dense(model):
    return [{official_name(k): v for k, v in model.state_dict().items()}]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.bias': torch.randn(num_classes)}
    return [state | head for state in _dense(model)]


def _published_keys():
    path = SHARED / 'facts/keys/video_mamba_suite.json'
    if path.is_file():
        models = json.loads(path.read_text())
        return {size: expand_keys(models[f'vivim_{size}_f16']) for size in ('tiny', 'small')}


def expand_keys(model):
    """All names and shapes of a list that has those of the first block alone."""
    (block, count), = model['repeat'].items()
    return {name.replace(block, f'{block.removesuffix("0.")}{i}.'): tuple(shape)
            for name, shape in model['keys'].items()
            for i in range(int(count.removeprefix('x ')) if name.startswith(block) else 1)}


SPEC = Spec(
    family=FAMILY, model=ViViM, archs=dict(frame=FRAME, decomposed=DECOMPOSED, scan_norm=SCAN_NORM),
    shapes=_shapes, official=_dense, official_classifiers=_classifiers,
    published_keys=_published_keys,
    changes=[dict(d_state=3), dict(embed_dims=20), dict(depth=1), dict(expand=1.0),
             dict(mixer='scan_norm'), dict(mixer='decomposed'), dict(patch_size=2),
             dict(image_size=20), dict(image_size=(4, 12)), dict(num_frames=1), dict(d_conv=3),
             dict(dt_rank=2)],
    wrong=[(dict(mixer='v3'), "mixer.*'bidirectional', 'scan_norm' or 'decomposed'"),
           (dict(cls_token='none'), "cls_token.*'frame' or 'clip'"),
           (dict(num_frames=0), 'num_frames.*an int of at least 1'),
           (dict(image_size=(8, 8, 8)), 'image_size.*or two of them'),
           (dict(image_size=2, patch_size=4), 'smaller than a patch of 4 pixels'),
           (dict(reduce='sum', mixer='decomposed'), "reduce.*'bidirectional' alone"),
           (dict(reduce='max'), "reduce.*'mean' or 'sum'"), (dict(expand=0), 'a number above 0')],
    layer_depths={'pos_embed': 0, 'temporal_embedding': 0, 'cls_token': 0,
                  'blocks.2.mixer.A_b_log': 3, 'blocks.0.norm.weight': 1, 'norm.weight': 4},
    a_weight='blocks.1.mixer.out_proj.weight')
