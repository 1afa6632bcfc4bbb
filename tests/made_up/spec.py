"""The tests of the made-up family: all that tests/specs.py asks for."""

import torch
from made_up.family import FAMILY
from made_up.model import Ripple
from specs import Spec

NANO = dict(embed_dims=8, depth=3, d_state=2, patch_size=4, image_size=16)


def _shapes(arch, height, width):
    patch = arch['patch_size']
    return [(arch['embed_dims'], -(-height // patch), -(-width // patch))] * arch['depth']


def _dense(model):
    """Written out from the model that nobody published."""
    names = {'patch_embed.weight': 'patch_embed.proj.weight', 'norm.weight': 'norm_f.weight',
             'patch_embed.bias': 'patch_embed.proj.bias', 'norm.bias': 'norm_f.bias'}
    return [{names.get(k, k): v for k, v in model.state_dict().items()} | {'freqs': torch.ones(3)}]


def _classifiers(model, num_classes):
    head = {'head.weight': torch.randn(num_classes, model.num_features[-1]),
            'head.bias': torch.randn(num_classes)}
    return [state | head for state in _dense(model)]


SPEC = Spec(
    family=FAMILY, model=Ripple, archs={'tiny': NANO}, shapes=_shapes,
    changes=[dict(d_state=3), dict(depth=1), dict(patch_size=2), dict(image_size=20)],
    wrong=[(dict(depth=0), 'depth.*an int of at least 1')],
    official=_dense, official_classifiers=_classifiers,
    layer_depths={'pos_embed': 0, 'blocks.2.mixer.D': 3, 'norm.weight': 4},
    a_weight='blocks.1.mixer.out_proj.weight')
