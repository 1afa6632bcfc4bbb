"""TimeMamba under the generic tests."""

import json

import torch
from families.vivim import expand_keys
from official import SHARED
from specs import Spec

from vmamba_mm.families.timemamba import FAMILY
from vmamba_mm.models import TimeMamba

VANILLA = dict(embed_dims=64, depth=3, num_heads=1, mlp_ratio=0.5, d_state=2, expand=1.0,
               patch_size=4, image_size=16, style='timesformer-div')
WIDE = dict(VANILLA, embed_dims=128, num_heads=2, image_size=(4, 12))


def _shapes(arch, height, width):
    height, width = (max(1, side // arch['patch_size']) for side in (height, width))
    return [(arch['embed_dims'], TimeMamba.clip_length(arch), height, width)] * arch['depth']


def official_name(key):
    """Written out from the released files."""
    return key.replace('.attn.qkv.', '.attn.Wqkv.').replace('.attn.proj.', '.attn.out_proj.')


def _dense(model):
    return [{official_name(k): v.reshape(()) if k.endswith('alpha_timeattn') else v
             for k, v in model.state_dict().items()}]


def _classifiers(model, num_classes):
    head = {'fc_cls.weight': torch.randn(num_classes, model.num_features[-1]),
            'fc_cls.bias': torch.randn(num_classes)}
    return [{f'visual.{k}': v for k, v in state.items()} | head for state in _dense(model)]


def _published_keys():
    path = SHARED / 'facts/keys/video_mamba_suite.json'
    if path.is_file():
        keys = expand_keys(json.loads(path.read_text())['timemamba_base_f4'])
        del keys['image_projection']
        keys = {f'visual.{k}': shape for k, shape in keys.items()}
        keys |= {'fc_cls.weight': (97, 768), 'fc_cls.bias': (97,)}
        return dict.fromkeys(FAMILY.archs, keys)


SPEC = Spec(
    family=FAMILY, model=TimeMamba, archs=dict(vanilla=VANILLA, wide=WIDE),
    shapes=_shapes, official=_dense, official_classifiers=_classifiers,
    published_keys=_published_keys,
    changes=[dict(d_state=3), dict(embed_dims=128, num_heads=2), dict(depth=1), dict(expand=2.0),
             dict(mlp_ratio=1.0), dict(patch_size=2), dict(image_size=20),
             dict(image_size=(4, 12))],
    wrong=[(dict(style='frozen'), "style.*'frozen-in-time', 'timesformer-div' or 'frozen-joint'"),
           (dict(num_heads=5), 'num_heads.*must divide embed_dims'),
           (dict(image_size=2, patch_size=4), 'smaller than a patch of 4 pixels'),
           (dict(mlp_ratio=0), 'a number above 0')],
    layer_depths={'pos_embed': 0, 'ln_pre.weight': 0, 'blocks.0.alpha_timeattn': 1,
                  'blocks.2.time_mamba.A_b_log': 3, 'norm.weight': 4},
    a_weight='blocks.1.time_mamba.out_proj.weight')
