"""Vision-RWKV under the generic tests."""

import torch
from official import listed_keys
from specs import Spec

from vmamba_mm.families.vision_rwkv import FAMILY
from vmamba_mm.models import VisionRWKV

PRE_NORM = dict(embed_dims=8, depth=3, patch_size=4, image_size=16, formula='official')
POST_NORM = dict(PRE_NORM, embed_dims=14, image_size=(8, 12),
                 post_norm=True, layer_scale=1e-5, key_norm=True, mlp_ratio=2.5)
PLAIN = dict(PRE_NORM, shift_pixel=0)
V6 = dict(embed_dims=12, depth=3, patch_size=4, image_size=16, mixer='wkv6', head_dim=6,
          post_norm=True, layer_scale=1e-5, key_norm=True)


def _shapes(arch, height, width):
    patch = arch['patch_size']
    return [(arch['embed_dims'], -(-height // patch), -(-width // patch))] * arch['depth']


def _official(model):
    names = {f'norm{len(model.depths) - 1}': 'ln1', 'blocks': 'layers'}
    state = {}
    for key, value in model.state_dict().items():
        top, _, rest = key.replace('patch_embed.proj.', 'patch_embed.projection.').partition('.')
        state[f'{names.get(top, top)}.{rest}' if rest else key] = value
    return [state]


def _classifiers(model, num_classes):
    head = {'head.fc.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.fc.bias': torch.randn(num_classes)}
    return [state | head for state in _official(model)]


def _published_keys():
    return listed_keys('vision_rwkv', dict(
        tiny='vrwkv_t', small='vrwkv_s', base='vrwkv_b', large='vrwkv_l_22kto1k_384',
        v6_tiny='vrwkv6_t', v6_small='vrwkv6_s', v6_base='vrwkv6_b'))


SPEC = Spec(
    family=FAMILY, model=VisionRWKV,
    archs=dict(pre_norm=PRE_NORM, post_norm=POST_NORM, plain=PLAIN, v6=V6), shapes=_shapes,
    published_keys=_published_keys,
    changes=[dict(embed_dims=12), dict(depth=1), dict(patch_size=2), dict(image_size=20),
             dict(image_size=(8, 12)), dict(post_norm=True, layer_scale=1e-5),
             dict(key_norm=True), dict(mlp_ratio=2.5), dict(shift_pixel=0)],
    wrong=[(dict(depth=0), 'depth.*an int of at least 1'),
           (dict(image_size=(8, 8, 8)), 'image_size.*height and width'),
           (dict(formula='kernel'), "formula.*'paper' or 'official'"),
           (dict(post_norm=1), 'True or False'), (dict(layer_scale='1'), 'a number or None'),
           (dict(mlp_ratio=0.001), 'mlp_ratio.*no hidden channel'),
           (dict(shift_pixel=-1), 'shift_pixel.*at least 0'),
           (dict(shift_share=0.3), 'shift_share.*from 0 to 1/4'),
           (dict(mixer='wkv7'), "mixer.*'wkv' or 'wkv6'"),
           (dict(mixer='wkv6', head_dim=1), r"formula.*is of arch\['mixer'\]='wkv' alone"),
           (dict(head_dim=4), r"head_dim.*is of arch\['mixer'\]='wkv6' alone"),
           (dict(mixer='wkv6', head_dim=5), 'head_dim.*must divide')],
    official=_official, official_classifiers=_classifiers,
    layer_depths={'patch_embed.proj.weight': 0, 'pos_embed': 0,
                  'blocks.0.att.spatial_decay': 1, 'blocks.1.ffn.key.weight': 2,
                  'norm2.weight': 4},
    a_weight='blocks.0.ffn.value.weight')
