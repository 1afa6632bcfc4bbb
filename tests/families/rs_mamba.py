"""RS-Mamba under the generic tests."""

from specs import Spec

from vmamba_mm.families.rs_mamba import FAMILY
from vmamba_mm.heads import RemoteSensingModel
from vmamba_mm.models import RemoteSensingMamba

SMALL = dict(embed_dims=8, depths=(1, 1, 2, 1), d_state=2, ssm_ratio=2.0, dt_rank='auto',
             mlp_ratio=2.0)
UNWRAPPED = dict(SMALL, embed_dims=(6, 8, 12, 16), depths=(1, 1, 1, 1), d_state=1, dt_rank=2,
                 scan='omnidirectional-unwrapped')


def _dims(arch):
    dims = arch['embed_dims']
    return dims if isinstance(dims, tuple) else [dims * 2 ** i for i in range(4)]


def _shapes(arch, height, width):
    height, width = -(-height // 4), -(-width // 4)
    shapes = []
    for dim in _dims(arch):
        shapes.append((dim, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def official_name(key):
    """Written out from the list of names."""
    levels = key.split('.')
    if levels[0] == 'decode_head':
        part, rest = levels[2], levels[3:]
        if part == 'blocks':
            return '.'.join([f'deocder_block{int(rest[0]) + 1}', 'fuse',
                             {'conv': '0', 'norm': '1'}[rest[1]], *rest[2:]])
        if part == 'conv_out':
            return '.'.join(['conv_out_seg', *rest])
        number = {'up1.conv': '0', 'up1.norm': '1', 'up2.conv': '4', 'up2.norm': '5'}
        return '.'.join(['upsample_x4', number[f'{part}.{rest[0]}'], *rest[1:]])
    if levels[0] == 'patch_embed':
        levels[1] = {'conv1': '0', 'norm1': '2', 'conv2': '5', 'norm2': '7'}[levels[1]]
        return '.'.join(levels)
    stage, rest = int(levels[1]), levels[2:]
    if rest[0] == 'downsample':
        return '.'.join([f'encoder_block{stage + 2}', 'downsample',
                         {'conv': '1', 'norm': '3'}[rest[1]], *rest[2:]])
    rest[2] = {'norm1': 'norm', 'ssm': 'op'}.get(rest[2], rest[2])
    return '.'.join([f'encoder_block{stage + 1}', *rest])


def _official(model):
    return [{official_name(k): v for k, v in model.state_dict().items()}]


def _whole_model(arch, name, **kwargs):
    return RemoteSensingModel(arch, num_images=2 if '-cd-' in name else 1, **kwargs)


def _segmentors(model, num_classes):
    whole = _whole_model(model.arch, '', out_channels=num_classes)
    head = {official_name(k): v for k, v in whole.state_dict().items()
            if not k.startswith('backbone.')}
    return [state | head for state in _official(model)]


SPEC = Spec(
    family=FAMILY, model=RemoteSensingMamba, archs=dict(small=SMALL, unwrapped=UNWRAPPED),
    shapes=_shapes, whole_model=_whole_model,
    changes=[dict(embed_dims=16), dict(embed_dims=(8, 16, 32, 48)), dict(depths=(1, 2, 1, 1)),
             dict(d_state=5), dict(ssm_ratio=1.0), dict(dt_rank=3), dict(mlp_ratio=4.0),
             dict(mlp_ratio=0)],
    wrong=[(dict(embed_dims=7), 'embed_dims.*an even int'), (dict(depths=(1, 1, 1)), '4 ints'),
           (dict(d_state=0), 'd_state.*at least 1'), (dict(ssm_ratio=0), 'ssm_ratio.*above 0'),
           (dict(mlp_ratio=0.01), 'mlp_ratio.*no channel'),
           (dict(scan='cross'), "scan.*'omnidirectional' or 'omnidirectional-unwrapped'")],
    official=_official, official_classifiers=_segmentors,
    layer_depths={
        'patch_embed.conv1.weight': 0, 'stages.0.blocks.0.ssm.A_logs': 1,
        'stages.0.downsample.conv.weight': 1, 'stages.2.blocks.1.mlp.fc1.bias': 4,
        'stages.3.blocks.0.norm2.weight': 5},
    a_weight='stages.2.blocks.0.mlp.fc1.weight')
