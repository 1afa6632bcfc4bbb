"""VM-UNet under the generic tests."""

import json

import torch
from official import SHARED
from specs import Spec

from vmamba_mm.families.vm_unet import FAMILY
from vmamba_mm.models import VMUNet

FOUR = dict(embed_dims=8, depths=(1, 2, 1, 1), decoder_depths=(1, 1, 2, 1), d_state=2)
TWO = dict(FOUR, depths=(1, 2), decoder_depths=(2, 1), d_state=3)


def _shapes(arch, height, width):
    count = len(arch['depths'])
    multiple = 4 * 2 ** (count - 1)
    padded = [-(-side // multiple) * multiple for side in (height, width)]
    sizes = [(arch['embed_dims'] * 2 ** i, *(side // (4 * 2 ** i) for side in padded))
             for i in range(count)]
    return [*sizes, *sizes[:0:-1], (arch['embed_dims'] // 4, height, width)]


def official_name(key, half):
    """Written out from the public code."""
    top, _, rest = key.partition('.')
    if top != 'stages':
        return key
    number, _, rest = rest.partition('.')
    rest = rest.replace('.norm1.', '.ln_1.').replace('.ssm.', '.self_attention.')
    is_up = int(number) >= half
    return f'layers_up.{int(number) - half}.{rest}' if is_up else f'layers.{number}.{rest}'


def _dense(model):
    half = len(model.arch['depths'])
    return [{official_name(k, half): v for k, v in model.state_dict().items()}]


def _whole(model, num_classes):
    head = {'final_conv.weight': torch.randn(num_classes, model.num_features[-1], 1, 1),
            'final_conv.bias': torch.randn(num_classes)}
    return [{f'vmunet.{k}': v for k, v in (state | head).items()} for state in _dense(model)]


def _published_keys():
    """The list has those of the published setting; the other one's deeper stages repeat a block."""
    path = SHARED / 'facts/keys/vm_unet.json'
    if not path.is_file():
        return None
    keys = json.loads(path.read_text())['Synapse (config)']['keys']
    keys = {k: tuple(shape) for k, shape in keys.items()}
    deeper = dict(keys)
    for stage, depth in (('layers.2', 9), ('layers_up.1', 9), ('layers_up.3', 2)):
        first = f'vmunet.{stage}.blocks.0.'
        deeper |= {k.replace(first, f'vmunet.{stage}.blocks.{i}.'): shape
                   for k, shape in keys.items() if k.startswith(first) for i in range(depth)}
    return dict(l2=keys, l9=deeper)


def _drop_path_rates(arch, rate):
    """Up to the middle of the U and down again."""
    up, down = (torch.linspace(0, rate, sum(arch[key])).tolist()
                for key in ('depths', 'decoder_depths'))
    return [*up, *reversed(down)]


SPEC = Spec(
    family=FAMILY, model=VMUNet, archs=dict(four=FOUR, two=TWO), shapes=_shapes,
    official=_dense, official_classifiers=_whole, published_keys=_published_keys,
    drop_path_rates=_drop_path_rates,
    changes=[dict(embed_dims=12), dict(depths=(2, 2, 1, 1)), dict(decoder_depths=(1, 1, 1, 2)),
             dict(d_state=3), dict(depths=(1, 2), decoder_depths=(1, 1)),
             dict(depths=(1, 1, 1), decoder_depths=(1, 2, 1))],
    wrong=[(dict(embed_dims=0), 'embed_dims.*an int of at least 1'),
           (dict(depths=(1,)), 'depths.*at least 2 ints'),
           (dict(decoder_depths=(1, 1, 1)), 'decoder_depths.*as many stages as depths, 4'),
           (dict(d_state=0), 'd_state.*an int of at least 1')],
    layer_depths={'patch_embed.proj.weight': 0, 'stages.0.blocks.0.ssm.A_logs': 1,
                  'stages.0.downsample.norm.weight': 1, 'stages.4.blocks.0.norm1.weight': 6,
                  'stages.6.upsample.expand.weight': 9, 'final_up.norm.weight': 11},
    a_weight='stages.2.blocks.0.ssm.in_proj.weight')
